"""Where in the content of a file its tensors lie, under whatever keys and wrappers."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from ddetr.untrusted import MAX_DEPTH, MAX_DICTS
from ddetr.weight_files.pickled import StandIn, TensorView, mapping_of

# Wrappers that PyTorch puts around a module, anywhere in a name: torch.compile, DistributedDataParallel (also by
# itself, as DataParallel and AveragedModel), FullyShardedDataParallel, activation checkpointing, Fabric and DeepSpeed.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:module|_orig_mod|_forward_module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)


def without_wrappers(name: str) -> str:
    """The name of a tensor without what PyTorch's wrappers put into it: "module.fc.weight" -> "fc.weight"."""
    return _WRAPPERS.sub("", name)


Rules = Sequence[tuple[str, str]]  # (pattern, replacement), applied in order to each name


def renamed(names: Iterable[str], rules: Rules) -> dict[str, str]:
    """Each name -> what the rules make of it, one after another."""
    new = {}
    for name in names:
        new[name] = name
        for pattern, replacement in rules:
            new[name] = re.sub(pattern, replacement, new[name])
    return new


def state_dicts(content: Any) -> Iterator[tuple[tuple[str, ...], Mapping[Any, Any]]]:
    """All dicts of the content with the keys that lead to them, the outer ones first."""
    due: list[tuple[tuple[str, ...], Any]] = [((), content)]
    seen: set[int] = set()
    for keys, value in due:  # grows
        mapping = mapping_of(value)
        if mapping is None or id(mapping) in seen:
            continue
        seen.add(id(mapping))
        yield keys, mapping
        if len(keys) < MAX_DEPTH and not (keys and keys[-1].startswith("optim")):
            inner = [((*keys, str(key)), item) for key, item in mapping.items() if mapping_of(item) is not None]
            due.extend(inner[: MAX_DICTS - len(due)])


def tensor_names(content: Any) -> list[str]:
    """Names of the tensors of the dict that has most of them."""
    names = ([str(k) for k, v in m.items() if isinstance(v, TensorView)] for _, m in state_dicts(content))
    return max(names, key=len, default=[])


def whole_model(content: Any) -> str | None:
    """The class of a network that was pickled whole instead of its weights."""
    for value in [content, *(mapping_of(content) or {}).values()]:
        if isinstance(value, StandIn) and isinstance(value.state, dict) and "_modules" in value.state:
            return value.name
    return None

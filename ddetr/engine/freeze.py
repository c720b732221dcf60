"""Parts of a model that do not train: `optim.freeze`, glob patterns over the official parameter names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddetr.errors import InputError
from ddetr.wording import did_you_mean


def freeze_parameters(model: nn.Module, patterns: Sequence[str]) -> None:
    """Take the gradient from every parameter whose name matches a pattern, e.g. "backbone.*", "*.norm1.*".

    A batch norm all of whose parameters match also keeps its running statistics, and normalises by them: it is put into
    eval mode, which Lightning leaves as it is. Dropout in a frozen part stays on.

    Raises:
        InputError: a pattern that matches nothing; nothing left to train.
    """
    names = list(model.state_dict())  # with what is frozen already, and with all names of a shared head
    matched: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if fnmatchcase(name, pattern)]
        if not found:
            raise InputError(f"optim.freeze: no parameter is called {pattern!r}{_hint(pattern, names)}")
        matched.update(found)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name in matched:
            parameter.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm) and all(f"{name}.{part}" in matched for part, _ in module.named_parameters()):
            module.eval()
    if patterns and not any(parameter.requires_grad for parameter in model.parameters()):
        raise InputError(f"optim.freeze: {', '.join(patterns)} leave nothing to train")


def _hint(pattern: str, names: Sequence[str]) -> str:
    """' (did you mean ...?)': the nearest among whole names and the modules that contain them."""
    parts = [name.split(".") for name in names]
    modules = {".".join(path[:depth]) + ".*" for path in parts for depth in range(1, len(path))}
    near = did_you_mean(pattern, [*sorted(modules), *names], most=3)
    return near or ", for instance backbone.* or transformer.encoder.*"

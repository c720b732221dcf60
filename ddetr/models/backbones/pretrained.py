"""What a backbone starts from: nothing, weights that timm knows or has from the hub, or a file of any project."""

import logging
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ddetr.errors import InputError
from ddetr.models.backbones.families import ALTERNATIVES, Family, family_of
from ddetr.models.backbones.names import AVERAGES, NAMINGS, PREFIXES, Naming, efficientnet_pytorch
from ddetr.models.backbones.plain_vit import patch_arguments
from ddetr.printable import one_line
from ddetr.weight_files.folders import Weights, read_files
from ddetr.weight_files.hub import hub_place, is_of_the_hub, why_not_had
from ddetr.weight_files.pickled import TensorView
from ddetr.weight_files.state_dicts import state_dicts, tensor_names, without_wrappers
from ddetr.wording import did_you_mean, first_few, plural

logger = logging.getLogger(__name__)

# The paper's recipe starts from torchvision's first ImageNet weights, which timm keeps under these tags.
IMAGENET_V1 = {"resnet50": "resnet50.tv_in1k", "resnet101": "resnet101.tv_in1k"}
_SUFFIXES = (".pth", ".pt", ".bin", ".safetensors", ".ckpt", ".tar", ".pkl", ".npz")


class Start(NamedTuple):
    """What a backbone starts from.

    Attributes:
        name: of a model of timm, with the tag of its weights or as an address of the hub ("hf-hub:org/name").
        is_fetched: whether timm brings the weights, from its cache or from the hub.
        file: weights to read, None where there is none.
    """

    name: str
    is_fetched: bool
    file: Path | None


def find_start(name: str, pretrained: bool | str) -> Start:
    """What `pretrained_backbone` means for a backbone; nothing is fetched or read.

    Args:
        name: a model of timm, with or without a tag.
        pretrained: False, True for timm's weights of it, a tag ("resnet50.a1_in1k"), an address of the hub
            ("hf-hub:org/name", or "org/name"), or a path.

    Raises:
        InputError: no such model, tag or file; weights of another model.
    """
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), most=3)
        raise InputError(f"unknown backbone {one_line(name)!r}: expected a timm model name{hint}")
    _check_tag(name)
    if isinstance(pretrained, str) and not Path(pretrained).exists():
        address = pretrained.removeprefix("hf-hub:").removeprefix("hf_hub:")
        is_path = pretrained.endswith(_SUFFIXES)
        if not is_path and address.count("/") == 1 and all(address.split("/")):
            return Start(f"hf-hub:{address}", True, None)
        if is_path or not timm.is_model(pretrained):
            raise InputError(
                "pretrained_backbone: expected True, False, a file of weights, a name of timm with its tag "
                f"(resnet50.a1_in1k) or an address of the hub (hf-hub:org/name), got {one_line(pretrained)!r}, and "
                "there is no such file"
            )
        if _architecture(pretrained) != _architecture(name):
            raise InputError(f"pretrained_backbone: expected weights of {name}, got the name {pretrained!r}")
        _check_tag(pretrained)
        name, pretrained = pretrained, True
    if isinstance(pretrained, str):
        return Start(name, False, Path(pretrained))
    if pretrained:
        name = IMAGENET_V1.get(name, name)
        if not timm.models.is_model_pretrained(name):
            known = timm.list_pretrained(f"{_architecture(name)}.*")
            hint = f"give one of {first_few(known, 3)}" if known else "give a file of weights"
            raise InputError(f"pretrained_backbone: timm has no weights of {name!r}: {hint}")
    return Start(name, pretrained, None)


def create(start: Start, **arguments: Any) -> nn.Module:
    """The network of timm, with the weights that timm brings; a file is not read.

    Args:
        start: what it starts from.
        arguments: of timm's function.

    Raises:
        InputError: weights that cannot be had; arguments that the model does not know.
    """
    import timm

    if start.is_fetched:
        logger.info("weights of %s: from the cache of timm, or downloaded", start.name)
    try:
        return timm.create_model(start.name, pretrained=start.is_fetched, **arguments)
    except TypeError as error:
        if "output_stride" not in str(error):
            raise
        raise InputError(
            f"backbone {start.name!r} cannot be dilated: its strides are fixed. Take a ResNet, or dilation=false"
        ) from error
    except Exception as error:
        if "features_only not implemented" in str(error):
            raise InputError(f"backbone {start.name!r} gives no feature maps in timm. {ALTERNATIVES}") from error
        if not start.is_fetched:
            raise
        # A network that is not there, an address that nobody has, a file that is no weights: of several libraries.
        raise _not_had(start, error) from error


def check_is_of(start: Start, name: str) -> None:
    """Raises `InputError` where an address of the hub holds another model than `name`; reads its configuration."""
    import timm

    if not start.name.startswith("hf-hub:"):
        return
    try:
        _, found, _ = timm.models.load_model_config_from_hf(start.name.removeprefix("hf-hub:"))
    except Exception as error:  # of several libraries
        if is_of_the_hub(error):
            raise _not_had(start, error, "config.json") from error
        raise InputError(
            f"{start.name}: expected weights that timm has put on the hub (a repository with a config.json of timm), "
            f"but its config.json cannot be read ({type(error).__name__}: {_first_line(error)})"
        ) from error
    if _architecture(str(found)) != _architecture(name):
        raise InputError(f"{start.name}: expected weights of the backbone {name}, got those of {one_line(found)}")


def _not_had(start: Start, error: Exception, file: str = "such file") -> InputError:
    """For weights that timm was to bring; `file` is what it looked for."""
    import timm

    address = start.name.removeprefix("hf-hub:")
    if address == start.name:
        address = timm.models.get_pretrained_cfg(start.name).hf_hub_id or ""
    place = hub_place(address)
    why = f"{type(error).__name__}: {_first_line(error)}"
    if place is not None and is_of_the_hub(error):
        why = why_not_had(place, error, file)
    return InputError(
        f"the weights of {start.name!r} could not be had: {why}. A file of them, whose names may be timm's or others, "
        "is given by --model.pretrained_backbone FILE; with false it starts from random values, which needs far more "
        "data"
    )


def size_arguments(name: str) -> tuple[Family, dict[str, Any]]:
    """The family of a model, and the arguments of timm's function that make its image size free."""
    family = family_of(name)
    arguments = dict(family.arguments)
    if family.kind == "plain":
        arguments |= patch_arguments(name)
    return family, arguments


@torch.no_grad()
def load_file(body: nn.Module, start: Start, arguments: Mapping[str, Any]) -> None:
    """Load a file of weights, under whatever names, into a network of timm or into the part of it that gives features;
    what was found, adapted and left out is logged.

    Args:
        body: what `create` made of `start`, perhaps as features.
        start: with a file.
        arguments: those of the whole network: `size_arguments`.

    Raises:
        InputError: no file of weights, a damaged one, or one of another network.
    """
    with torch.device("cpu"):  # also where the network itself has no memory, to check its options
        whole = create(start._replace(is_fetched=False), num_classes=0, **arguments)
        names = _names_in_whole(body, whole)
        own = body.state_dict()
        found = _best_match(start.file, whole, {names[name]: tensor for name, tensor in own.items()})
    for name, tensor in own.items():
        if names[name] in found.tensors:
            tensor.copy_(found.tensors[names[name]])
    adapted = f"; resized: {first_few(found.resized, 3)}" if found.resized else ""
    unused = f"; left out: {first_few(map(one_line, found.unused), 3)}" if found.unused else ""
    logger.info(
        "%s: %s of the backbone found (names: %s)%s%s",
        start.file,
        plural(len(found.tensors), "tensor"),
        found.kind,
        adapted,
        unused,
    )


class _Found(NamedTuple):
    """A network of a file: its tensors under timm's names, and what does not fit."""

    kind: str
    tensors: dict[str, Tensor]
    resized: list[str]
    unused: list[str]
    missing: list[str]
    wrong: list[str]

    @property
    def num_unfit(self) -> int:
        return len(self.missing) + len(self.wrong)


def _best_match(path: Path, whole: nn.Module, own: Mapping[str, Tensor]) -> _Found:
    weights = read_files(path)
    best = None
    for naming, views in _candidates(weights, own):
        found = _match(naming, views, weights, whole, own)
        if best is None or found.num_unfit < best.num_unfit:
            best = found
        if not best.num_unfit:
            break
    if best is None or best.num_unfit:
        raise InputError(f"{path}: {_why_not(best, tensor_names(weights.content), own)}")
    bad = [name for name, tensor in best.tensors.items() if not tensor.isfinite().all()]
    if bad:
        raise InputError(f"{path}: {bad[0]} holds values that are NaN or infinite, as a diverged run leaves them")
    return best


def _candidates(weights: Weights, own: Mapping[str, Tensor]) -> Iterator[tuple[Naming, dict[str, TensorView]]]:
    """The networks that a file may hold, in the order in which they should be tried: (its naming, its tensors under the
    names of its project)."""
    found = []
    for keys, mapping in state_dicts(weights.content):
        views = {without_wrappers(str(name)): value for name, value in mapping.items() if isinstance(value, TensorView)}
        for prefix in PREFIXES:
            part = {name[len(prefix) :]: view for name, view in views.items() if name.startswith(prefix)}
            counted = efficientnet_pytorch(part, own)
            for naming in (*NAMINGS, counted):
                if part and naming is not None and naming.is_of(part):
                    hits = sum(name in own for name in naming.renamed(part).values())
                    found.append((hits, any(key in AVERAGES for key in keys), naming, part))
    # Names that only timm's filter knows hit nothing: the largest part without a prefix may be one.
    found.sort(key=lambda one: (-one[0], not one[1], -len(one[3])))
    for _, _, naming, part in found[:MOST_TRIED]:
        yield naming, part


MOST_TRIED = 6  # of a file that fits nothing


def _match(
    naming: Naming,
    views: Mapping[str, TensorView],
    weights: Weights,
    whole: nn.Module,
    own: Mapping[str, Tensor],
) -> _Found:
    weights.records.check_total(views.values())
    loaded = {name: weights.records.load(name, view) for name, view in views.items()}
    renamed = naming.renamed(loaded)
    tensors = naming.adapt({renamed[name]: tensor for name, tensor in loaded.items()})
    found = _compared(naming.kind, tensors, own)
    if found.num_unfit:
        better = _compared(naming.kind, _filtered(tensors, whole, own), own)
        if better.num_unfit < found.num_unfit:
            resized = [f"{name} {tuple(tensors[name].shape)} -> {tuple(own[name].shape)}" for name in found.wrong]
            found = better._replace(resized=resized)
    return found


def _compared(kind: str, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> _Found:
    counters = "num_batches_tracked"
    return _Found(
        kind,
        tensors={name: tensors[name] for name in own if name in tensors},
        resized=[],
        unused=[name for name in tensors if name not in own and not name.endswith(counters)],
        missing=[name for name in own if name not in tensors and not name.endswith(counters)],
        wrong=[name for name in own if name in tensors and tensors[name].shape != own[name].shape],
    )


def _filtered(tensors: dict[str, Tensor], whole: nn.Module, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as timm's own filter for this family gives them: the names of the authors' repository to timm's, and
    positions of another image size resized."""
    from timm.layers import resize_rel_pos_bias_table_simple

    tensors = dict(tensors)
    for name, tensor in tensors.items():
        # timm's filters do it with indices that PyTorch gives up.
        if name.endswith("relative_position_bias_table") and name in own and own[name].ndim == tensor.ndim:
            window = whole.get_submodule(name.rpartition(".")[0]).window_size
            tensors[name] = resize_rel_pos_bias_table_simple(tensor, window, tuple(own[name].shape))
    filter_names = getattr(sys.modules[type(whole).__module__], "checkpoint_filter_fn", lambda same, _: same)
    try:
        return filter_names(tensors, whole)
    except Exception:  # a filter expects a file of its family, and this may be any
        return tensors


def _why_not(best: _Found | None, names: list[str], own: Mapping[str, Tensor]) -> str:
    wanted = ", ".join(list(own)[:2])
    held = ", ".join(repr(one_line(name)) for name in names[:2]) or "no tensors"
    if best is None:
        return f"expected the weights of this backbone in timm's names ({wanted} ...), got {held}"
    counts = [(len(best.missing), "are missing"), (len(best.wrong), "have other shapes")]
    said = " and ".join(f"{count} {what}" for count, what in counts if count)
    return (
        f"expected the weights of this backbone in timm's names ({wanted} ...) or others that are known, but of its "
        f"{len(own)} tensors {said}, first {(best.missing + best.wrong)[0]!r}. The file holds {held}"
        + (": it is another backbone's" if best.wrong else "")
    )


def _names_in_whole(body: nn.Module, whole: nn.Module) -> dict[str, str]:
    """The names of a network of features -> those of the network that it was made of: timm puts it into another module
    ("model."), or joins the names of its stages ("stages_0")."""
    flat = {name.replace(".", "_"): name for name in whole.state_dict()}
    names = {}
    for name in body.state_dict():
        inner = name.split(".", 1)[-1]
        names[name] = flat.get(name.replace(".", "_")) or flat[inner.replace(".", "_")]
    return names


def _check_tag(name: str) -> None:
    import timm

    known = timm.models.list_models(f"{_architecture(name)}.*", pretrained=True)
    if "." in name and name not in known:
        hint = f"timm has {first_few(known, 4)}" if known else "timm has none for it"
        raise InputError(f"unknown weights {one_line(name)!r}: {hint}")


def _architecture(name: str) -> str:
    return name.split(".")[0]


def _first_line(error: Exception) -> str:
    return one_line(str(error).strip().split("\n")[0][:200])

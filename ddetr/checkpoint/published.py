"""Our one published format: weights, the arguments that rebuild the network, its classes, and how it was made.

On disk it is one dict of tensors and plain values (`torch.save`, loadable with `weights_only=True`), or a
`.safetensors` file with the plain values as JSON in its metadata; the suffix decides, the content is the same.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ddetr import __version__
from ddetr.datasets.annotations import Category
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, checked_colors
from ddetr.errors import InputError
from ddetr.models.auxiliary import PREFIX
from ddetr.models.deformable_detr import DeformableDETR, check_fits
from ddetr.models.query_selection import QuerySelection
from ddetr.printable import one_line
from ddetr.untrusted import MAX_VALUES, parse_json
from ddetr.weight_files.files import FileContent, read_file, write_file, write_safetensors
from ddetr.weight_files.folders import weights_file
from ddetr.weight_files.pickled import Global, StandIn, TensorView
from ddetr.weight_files.state_dicts import tensor_names

FORMAT = "ddetr"
FORMAT_VERSION = 1
LIGHTNING = "pytorch-lightning_version"  # is in every training state that Lightning writes
COLORS = "image_mean_std"  # in the training states of ours: how the images of the run are normalised
_ALIASES = "aliases"  # safetensors metadata: names that share the tensor of another name
_PLAIN_FIELDS: dict[str, type | tuple[type, ...]] = {
    "format_version": int,
    "ddetr_version": str,
    "config": dict,
    "categories": list,
    "input": dict,
    "threshold": (int, float),
    "metrics": dict,
    "training": dict,
}


@dataclass
class Checkpoint:
    """A trained detector, whole: `build_from_checkpoint` makes the network, and the rest says how to use it.

    Attributes:
        model: state dict under the official names.
        config: constructor arguments of `DeformableDETR` that rebuild the network without a download.
        categories: the class of each label, in order.
        input: how images reach the network: "image_size" (short side, pixels), "max_size" (long side), "mean", "std".
        threshold: score from which detections are shown.
        metrics: plain values, e.g. {"AP": 0.445}.
        training: plain values: data, epoch, step, recipe.
    """

    model: dict[str, Tensor]
    config: dict[str, Any]
    categories: tuple[Category, ...]
    input: dict[str, Any]
    threshold: float = 0.5
    metrics: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    ddetr_version: str = __version__
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(
        cls,
        model: DeformableDETR,
        categories: Sequence[Category],
        *,
        image_size: int = 800,
        max_size: int = 1333,
        threshold: float = 0.5,
        metrics: Mapping[str, Any] | None = None,
        training: Mapping[str, Any] | None = None,
    ) -> "Checkpoint":
        """The checkpoint of a model in memory, without what trained beside it; its tensors are the model's own, not
        copies."""
        if len(categories) != model.config["num_classes"]:
            raise InputError(
                f"expected a category for each of the {model.config['num_classes']} classes, got {len(categories)}"
            )
        return cls(
            model={name: value for name, value in model.state_dict().items() if not name.startswith(PREFIX)},
            config=portable_config(model.config),
            categories=tuple(categories),
            input={
                "image_size": image_size,
                "max_size": max_size,
                "mean": list(model.image_mean),
                "std": list(model.image_std),
            },
            threshold=threshold,
            metrics=dict(metrics or {}),
            training=dict(training or {}),
        )


def portable_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same network without ImageNet weights to fetch; what those decide about frozen norms is written out."""
    freeze = config.get("freeze_backbone") or ("stem" if config.get("pretrained_backbone") else "none")
    return {**config, "pretrained_backbone": False, "freeze_backbone": freeze}


def save_checkpoint(path: str | Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint, as `.safetensors` where `path` ends so. Killed at any moment, it leaves the old file.

    Raises:
        TypeError: metrics, training or config hold something other than plain values.
    """
    path = Path(path)
    content = contents(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix != ".safetensors":
        write_file(path, content)
        return
    tensors, aliases = without_aliases(content.pop("model"))
    metadata = {name: json.dumps(value) for name, value in {**content, _ALIASES: aliases}.items()}
    metadata["format"] = FORMAT
    write_safetensors(path, tensors, metadata)


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """What the file of a checkpoint holds: plain values, and tensors that are the checkpoint's own where they are on
    the CPU. Raises as `save_checkpoint`."""
    header = {
        "format_version": checkpoint.format_version,
        "ddetr_version": checkpoint.ddetr_version,
        "config": portable_config(checkpoint.config),
        "categories": [{"category_id": c.category_id, "name": c.name} for c in checkpoint.categories],
        "input": checkpoint.input,
        "threshold": checkpoint.threshold,
        "metrics": checkpoint.metrics,
        "training": checkpoint.training,
    }
    header = {name: _plain(value, name) for name, value in header.items()}
    tensors, aliases = without_aliases(checkpoint.model)
    return {"format": FORMAT, **header, "model": {name: tensors[aliases.get(name, name)] for name in checkpoint.model}}


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint of ours: a file, or a folder that holds one as model.safetensors.

    Raises:
        InputError: the file is missing, damaged, not ours, or from a newer version.
    """
    path = weights_file(Path(path))
    return parse_checkpoint(path, read_file(path))


def is_checkpoint(content: Any, metadata: Mapping[str, str]) -> bool:
    """Whether the content of a file is in our format."""
    return FORMAT in (metadata.get("format"), content.get("format") if isinstance(content, dict) else None)


def parse_checkpoint(path: Path, file: FileContent, *, with_model: bool = True) -> Checkpoint:
    """The checkpoint in the content of a file, on request without its weights; raises as `load_checkpoint`."""
    content, metadata, records = file
    if not is_checkpoint(content, metadata):
        raise InputError(f"{path}: expected a ddetr checkpoint, got {_what_else(content)}")
    if metadata:
        header = {name: _from_json(value) for name, value in metadata.items() if name != "format"}
        aliases = header.pop(_ALIASES, None)
        aliases = aliases.items() if isinstance(aliases, dict) else ()
        model = content | {alias: content.get(name) for alias, name in aliases if isinstance(name, str)}
    else:
        header, model = content, content.get("model")
    for name in _PLAIN_FIELDS:
        _check_plain(path, name, header.get(name))
    version = header.get("format_version")
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise InputError(
            f"{path}: expected a checkpoint of format {FORMAT_VERSION} or older, got format {version}, written by "
            f"ddetr {header.get('ddetr_version')}: this is ddetr {__version__}, upgrade it (pip install -U ddetr)"
        )
    wrong = [name for name, kind in _PLAIN_FIELDS.items() if not isinstance(header.get(name), kind)]
    if not wrong and not all(
        isinstance(c, dict) and isinstance(c.get("category_id"), int) and isinstance(c.get("name"), str)
        for c in header["categories"]
    ):
        wrong = ["categories"]
    if wrong or not isinstance(model, dict) or not all(isinstance(view, TensorView) for view in model.values()):
        raise InputError(f"{path}: expected a ddetr checkpoint, but its {', '.join(wrong or ['model'])} is not whole")
    records.check_total(model.values())
    return Checkpoint(
        model={name: records.load(str(name), view) for name, view in model.items()} if with_model else {},
        categories=tuple(Category(c["category_id"], c["name"]) for c in header["categories"]),
        **{name: header[name] for name in _PLAIN_FIELDS if name != "categories"},
    )


def build_from_checkpoint(
    checkpoint: Checkpoint, *, num_queries: int | None = None, query_selection: QuerySelection | None = None
) -> DeformableDETR:
    """The network of a checkpoint with its weights, in eval mode; fetches nothing.

    Args:
        checkpoint: the weights, and the arguments of the network.
        num_queries: how many queries it works with; by default as it was trained. For two-stage alone.
        query_selection: how it chooses them among the proposals; by default as it was trained. For two-stage alone.

    Raises:
        InputError: the weights do not fit the configuration beside them, or the network cannot do what was asked for.
    """
    known = inspect.signature(DeformableDETR).parameters
    unknown = [name for name in checkpoint.config if name not in known]
    if unknown:
        raise InputError(
            f"the checkpoint was made by ddetr {checkpoint.ddetr_version} with {unknown[0]!r}, which ddetr "
            f"{__version__} does not know: upgrade it (pip install -U ddetr)"
        )
    config = portable_config(checkpoint.config)
    chosen = {"num_queries": num_queries, "query_selection": query_selection}
    chosen = {name: value for name, value in chosen.items() if value is not None}
    if chosen and not config.get("two_stage"):
        raise InputError(
            f"{next(iter(chosen))} can be chosen for a two-stage network alone, whose queries are made from the image; "
            "this one has learned its queries, and has just these"
        )
    config |= chosen
    weights = checkpoint.model
    contents = weights.get("query_embed.weight")
    if num_queries is not None and contents is not None and contents.ndim == 2:  # of mixed selection
        if num_queries > len(contents):
            raise InputError(
                f"num_queries {num_queries}: this network has learned a content for each of its {len(contents)} "
                f"queries (mixed selection): choose at most {len(contents)}"
            )
        weights = weights | {"query_embed.weight": contents[:num_queries]}
    try:
        check_fits(config, weights)
        model = DeformableDETR(**config)
    except InputError:
        raise
    except Exception as error:  # a value of the wrong type raises anything
        raise InputError(
            f"the configuration in the checkpoint makes no network ({type(error).__name__}: {error})"
        ) from error
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]
        raise InputError(
            f"the weights of the checkpoint do not fit its own configuration: {first[0].strip()}"
        ) from error
    bad = next((name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()), None)
    if bad is not None:
        raise InputError(
            f"the weights of the checkpoint are of no use: {bad} holds values that are NaN or infinite, as a diverged "
            "run leaves them. Take an earlier checkpoint"
        )
    model.image_mean, model.image_std = colors_of(checkpoint)
    return model.eval()


def colors_of(checkpoint: Checkpoint) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation with which its images are normalised; raises `InputError` for what are none."""
    return checked_colors(checkpoint.input.get("mean", IMAGENET_MEAN), checkpoint.input.get("std", IMAGENET_STD))


def colors_in(state: Mapping[Any, Any]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The same of a training state or a bundle of ours; those of older versions do not say it: always ImageNet's."""
    colors = state.get(COLORS, (IMAGENET_MEAN, IMAGENET_STD))
    return checked_colors(*(colors if isinstance(colors, (list, tuple)) and len(colors) == 2 else (colors, None)))


def without_aliases(state_dict: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors on the CPU, each once and with no more memory than it shows; and {alias: name}."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: dict[tuple, str] = {}
    for name, tensor in state_dict.items():
        tensor = tensor.detach()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in names:
            aliases[name] = names[place]
            continue
        names[place] = name
        tensor = tensor.cpu().contiguous()
        if tensor.untyped_storage().nbytes() != tensor.nbytes:
            tensor = tensor.clone()  # a view would drag the tensor that it is a part of into the file
        tensors[name] = tensor
    return tensors, aliases


def _plain(value: Any, where: str) -> Any:
    """A copy of plain values in Python's own types: subclasses of str or float pickle as code to run."""
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{where}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item, where) for item in value]
    if isinstance(value, (np.generic, Tensor)) and value.ndim == 0:
        return _plain(value.item(), where)
    raise TypeError(f"a checkpoint holds plain values only, but {where} is a {type(value).__name__}: {value!r}")


def _check_plain(path: Path, name: str, value: Any) -> None:
    """Our own files hold plain values beside the tensors and nothing else. Lists that hold one list many times, or
    themselves, would have no end where they are shown."""
    due, count = [value], 0
    while due:
        value, count = due.pop(), count + 1
        if isinstance(value, (dict, list, tuple)) and count + len(due) + len(value) < MAX_VALUES:
            due.extend(value.values() if isinstance(value, dict) else value)
        elif not isinstance(value, (str, int, float, type(None))):
            what = f"{type(value).__name__} or more than {MAX_VALUES:,} values"
            what = repr(one_line(value.name)) if isinstance(value, (StandIn, Global)) else what
            raise InputError(f"{path}: expected plain values in the {name} of a ddetr checkpoint, got {what}")


def _from_json(text: str) -> Any:
    """None for what is no JSON."""
    try:
        return parse_json(text, "metadata")
    except InputError:
        return None


def _what_else(content: Any) -> str:
    if not isinstance(content, dict):
        return f"a {type(content).__name__}"
    if LIGHTNING in content:
        return (
            "the training state of a Lightning program: start from its weights with --weights; a run of ddetr has a "
            "checkpoint (best.pth) beside it, and is continued with --resume RUN"
            if content.get("state_dict")
            else "a training state of Lightning without weights: take the file that its program published"
        )
    if tensor_names(content):
        return "bare weights: start from them with --weights, or ddetr.checkpoint.load_weights(model, path)"
    return f"a dict of {', '.join(repr(one_line(key)) for key in list(content)[:4]) or 'nothing'}"

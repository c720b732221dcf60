"""Any file of a trained detector as a `Checkpoint` of ours: variant and sizes are read from its weights.

What weights do not show (attention heads, DC5, the queries of a two-stage model, image size) is taken from what lies
beside them: the official code's command line, transformers' JSON files. Where nothing says it, it is as published, and
`Recognised.notes` says so. A file that holds more than the detector, or less, is refused: it would find other objects.
"""

import inspect
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddetr.checkpoint.class_rows import RowClass
from ddetr.checkpoint.coco_classes import COCO_CLASSES, UNUSED
from ddetr.checkpoint.foreign import BODY, COUNTER, SourceWeights, num_class_rows, weights_of
from ddetr.checkpoint.preprocessing import input_beside
from ddetr.checkpoint.published import (
    COLORS,
    LIGHTNING,
    Checkpoint,
    is_checkpoint,
    parse_checkpoint,
    portable_config,
)
from ddetr.checkpoint.report import Remark
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR, check_fits
from ddetr.printable import one_line
from ddetr.weight_files.architectures import architecture_of
from ddetr.weight_files.files import FileContent
from ddetr.weight_files.folders import Weights, read_files

logger = logging.getLogger(__name__)

# Bottlenecks or not, blocks of each stage -> timm's ResNets of that kind, the commonest first; their shapes differ.
_RESNETS: dict[tuple[bool, tuple[int, ...]], tuple[str, ...]] = {
    (False, (1, 1, 1, 1)): ("resnet10t",),
    (True, (1, 1, 1, 1)): ("resnet14t",),
    (False, (2, 2, 2, 2)): ("resnet18", "resnet18d"),
    (True, (2, 2, 2, 2)): ("resnet26", "resnet26d", "resnet26t"),
    (False, (3, 4, 6, 3)): ("resnet34", "resnet34d"),
    (True, (3, 4, 6, 3)): ("resnet50", "resnet50d", "resnext50_32x4d", "wide_resnet50_2"),
    (True, (3, 4, 23, 3)): ("resnet101", "resnet101d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet101_2"),
    (True, (3, 8, 36, 3)): ("resnet152", "resnet152d"),
}


class Recognised(NamedTuple):
    """A detector as it was found in a file.

    project: whose names the file has: "ddetr", "official", "transformers", "detrex", "Mr.DETR", "mmdetection", ...
    where: under which keys of the file it lies: "ema.module"; "" for its outermost names.
    left_out: what the file holds for training alone, and what it is of.
    notes: what was assumed, or is computed otherwise than where the weights come from.
    """

    checkpoint: Checkpoint
    project: str
    where: str = ""
    left_out: tuple[Remark, ...] = ()
    notes: tuple[str, ...] = ()


def read_detector(path: str | Path) -> Checkpoint:
    """Any file or folder of a trained Deformable DETR: ours, the official code's, H-DETR's, transformers', detrex's,
    Mr.DETR's or mmdetection's. What was assumed is logged.

    Returns:
        A checkpoint: weights under official names and in the file's own precision, the complete `config` of
        `DeformableDETR`, a category for each logit, the image size and normalisation.

    Raises:
        InputError: no such file, a damaged one, another network, or one that this one cannot compute.
    """
    found = recognise(path)
    for note in found.notes:
        logger.info("%s: %s", Path(path).name, note)
    return found.checkpoint


def read_config(path: str | Path) -> dict[str, Any]:
    """The arguments of the network in such a file; raises as `read_detector`, and where the weights are not of them."""
    checkpoint = recognise(path).checkpoint
    config = portable_config(checkpoint.config)
    check_fits(config, checkpoint.model)
    return config


def recognise(path: str | Path, weights: Weights | None = None) -> Recognised:
    """As `read_detector`, with all that there is to say about the file.

    weights: what was read from it already.
    """
    path = Path(path)
    weights = weights or read_files(path)
    content, metadata, records, _ = weights
    if is_checkpoint(content, metadata):
        return Recognised(parse_checkpoint(path, FileContent(content, metadata, records)), "ddetr")
    source = weights_of(path, weights)
    if isinstance(content, dict) and LIGHTNING in content and COLORS in content:
        return _of_own_run(path, source)
    if (other := architecture_of(source.in_file)) is not None:
        raise InputError(
            f"{path}: expected weights of Deformable DETR, got those of another detector: {other.name}. Its own "
            "program runs it"
        )
    if source.kind == "transformers":
        _check_configuration(path, weights.transformers_config)
    notes = list(_differences(source))
    config, shapes = _config(path, source, notes)
    categories = _categories(source, config["num_classes"], notes)
    checkpoint = Checkpoint(
        model=_weights(path, source, shapes),
        config=config,
        categories=categories,
        input={**input_beside(path, source.kind, notes), "mean": [*source.image_mean], "std": [*source.image_std]},
        training={"weights": {"file": path.name, "project": source.kind}},
    )
    return Recognised(checkpoint, source.kind, source.where, source.left_out, tuple(notes))


def _of_own_run(path: Path, source: SourceWeights) -> Recognised:
    """The state of a run of ours, which names neither classes nor sizes, by what the run has published beside it."""
    if source.published is None:
        raise InputError(
            f"{path}: expected a whole detector, got the state of a run, which names neither classes nor sizes: give "
            "best.pth or last.pth of the run's folder, or put one of them beside it. --resume RUN goes on with the run"
        )
    config = portable_config(source.published.config)
    shapes = _shapes(config)
    of_network = replace(source, tensors={name: value for name, value in source.tensors.items() if name in shapes})
    checkpoint = replace(source.published, config=config, model=_weights(path, of_network, shapes), metrics={})
    return Recognised(checkpoint, source.kind, source.where, source.left_out)


def _shapes(config: Mapping[str, Any]) -> dict[str, torch.Size]:
    """Of the tensors of a network, which is built without memory: a few bytes can ask for terabytes."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in DeformableDETR(**config).state_dict().items()}


def _check_configuration(path: Path, told: Mapping[str, Any]) -> None:
    """Raises `InputError` where transformers' configuration asks for what this network does not compute."""
    heads = [told.get(f"{part}_attention_heads", 8) for part in ("encoder", "decoder")]
    activation = told.get("activation_function", "relu")
    if heads[0] != heads[1] or activation != "relu":
        raise InputError(
            f"{path}: expected equal attention heads in encoder and decoder, and ReLU, got {one_line(heads[0])} and "
            f"{one_line(heads[1])} heads, and {one_line(activation)!r}: transformers itself runs it"
        )


def _differences(source: SourceWeights) -> Iterable[str]:
    """What is computed otherwise here than by the project itself, or was guessed of it."""
    if source.kind == "Mr.DETR":
        yield (
            "scores are those of the last decoder layer; Mr.DETR's own evaluation mixes in those of the layers before "
            "(its code says 0.1 to 0.2 AP)"
        )
    if source.kind in ("detrex", "Mr.DETR"):
        yield "boxes may start 0.00001 from the borders, as in the official code; detrex keeps them 0.001 away"
    if "num_queries" not in source.config and any(name == "query_embed.weight" for name, _ in source.left_out):
        kept = len(source.tensors["query_embed.weight"])
        yield f"the first {kept} queries are taken for those that are matched one to one, as H-DETR published it"


def _config(path: Path, source: SourceWeights, notes: list[str]) -> tuple[dict[str, Any], dict[str, torch.Size]]:
    """All arguments of the network, and the shapes of its tensors."""
    tensors, told = source.tensors, source.config
    num_levels, hidden_dim = tensors["transformer.level_embed"].shape
    defaults = {name: p.default for name, p in inspect.signature(DeformableDETR).parameters.items()}
    queries = tensors.get("query_embed.weight")
    num_queries = told.get("num_queries", 300) if queries is None or not queries.ndim else len(queries)
    if queries is None and "num_queries" not in told:
        notes.append(f"{num_queries} queries, as published: the weights of a two-stage network fit any number")
    nheads, points = _heads_and_points(path, source, notes)
    if num_levels == 1 and "dilation" not in told:
        notes.append("no dilation: its weights do not show whether it is the DC5 variant")
    ffn = tensors.get("transformer.decoder.layers.0.linear1.weight")
    config = defaults | {
        "num_classes": num_class_rows(tensors),
        "hidden_dim": hidden_dim,
        "num_queries": num_queries,
        "pretrained_backbone": False,
        "freeze_backbone": "stem",
        "dilation": told.get("dilation", False) and num_levels == 1,
        "position_embedding": "learned" if "backbone.1.row_embed.weight" in tensors else "sine",
        "num_feature_levels": num_levels,
        "num_backbone_levels": 4 if source.num_backbone_levels == 4 else 3,
        "nheads": nheads,
        "enc_layers": source.num_layers("encoder"),
        "dec_layers": source.num_layers("decoder"),
        "dim_feedforward": len(ffn) if ffn is not None and ffn.ndim else defaults["dim_feedforward"],
        "dropout": told.get("dropout", defaults["dropout"]),
        **points,
        "with_box_refine": source.two_stage or told["with_box_refine"] or not source.is_one_head("bbox_embed"),
        "two_stage": source.two_stage,
        "mixed_selection": source.two_stage and queries is not None,
    }
    if not config["num_classes"]:
        raise InputError(
            f"{path}: expected a whole detector, but it has no class heads, as transformers' base models have none. "
            "Start from it with --weights"
        )
    problems = []
    for backbone in _backbones(path, source):
        try:
            shapes = _shapes(config | {"backbone": backbone})
        except Exception as error:  # a name from a file may make timm raise anything
            problems.append(
                str(error) if isinstance(error, InputError) else f"timm cannot build {one_line(backbone)!r}"
            )
            continue
        if all(
            name in tensors and tensors[name].shape == shape
            for name, shape in shapes.items()
            if name.startswith(BODY) and not name.endswith(COUNTER)
        ):
            return config | {"backbone": backbone}, shapes
        problems.append(f"its backbone has other weights than timm's {one_line(backbone)!r}")
    raise InputError(f"{path}: expected a Deformable DETR that can be built here, but {problems[0]}")


def _heads_and_points(path: Path, source: SourceWeights, notes: list[str]) -> tuple[int, dict[str, int]]:
    """Attention heads, and points that a head samples per level: of their product the weights have the rows."""
    told, hidden_dim = source.config, source.tensors["transformer.level_embed"].shape[1]
    nheads = told.get("nheads", 8)
    points: dict[str, int] = {}
    for name, module in (
        ("enc_n_points", "encoder.layers.0.self_attn"),
        ("dec_n_points", "decoder.layers.0.cross_attn"),
    ):
        weights = source.tensors.get(f"transformer.{module}.attention_weights.weight")
        if weights is None or not weights.ndim:
            continue
        points[name], rest = divmod(len(weights), nheads * source.num_levels)
        if rest or not points[name] or hidden_dim % nheads:
            raise InputError(
                f"{path}: expected a number of attention heads that fits {len(weights)} sampling points, "
                f"{source.num_levels} levels and hidden_dim {hidden_dim}, got {nheads}"
                + (
                    ""
                    if "nheads" in told
                    else ", which was assumed: its weights do not show it. Start from it with "
                    "--weights and --model.nheads"
                )
            )
    if "nheads" not in told and (hidden_dim, set(points.values())) != (256, {4}):  # other sizes than the published ones
        notes.append("8 attention heads: the weights do not show their number")
    return nheads, points


def _backbones(path: Path, source: SourceWeights) -> list[str]:
    """Names of timm models that the backbone may be, the likeliest first."""
    body = [name.removeprefix(BODY) for name in source.tensors if name.startswith(BODY)]
    if source.kind != "transformers" and any(n.endswith(".relative_position_bias_table") for n in source.tensors):
        raise InputError(
            f"{path}: expected a backbone that timm has, got the Swin transformer of its own project, which norms the "
            "map of each stage. Start from its other weights with --weights and a backbone of your choice"
        )
    blocks = [{int(m[1]) for name in body if (m := re.match(rf"layer{s}\.(\d{{1,3}})\.", name))} for s in (1, 2, 3, 4)]
    kind = ("layer1.0.conv3.weight" in body, tuple(map(len, blocks)))
    told = source.config.get("backbone")
    names = [*([told] if told else []), *(name for name in _RESNETS.get(kind, ()) if name != told)]
    if not names:
        some = f"{one_line(body[0])!r}" if body else "none"
        raise InputError(
            f"{path}: expected a backbone that its weights show (a ResNet) or a file beside them names (config.json), "
            f"got one of other names, first {some}. Start from its other weights with --weights and a backbone of your "
            "choice"
        )
    return names


def _weights(path: Path, source: SourceWeights, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Every tensor of the network, each head under all its names; refuses what is missing, left, or of other shape."""
    tensors = source.tensors
    numbers = {family: source.heads(family) for family in ("class_embed", "bbox_embed")}
    only = {family: found[0] for family, found in numbers.items() if len(found) == 1}
    weights, missing = {}, []
    for name, shape in shapes.items():
        family, _, rest = name.partition(".")
        twin = name
        if family in only:  # a library that stores shared tensors once has kept one head of many
            twin = f"{family}.{only[family]}.{rest.partition('.')[2]}"
        tensor = tensors.get(name, tensors.get(twin))
        if name.endswith(COUNTER):
            if tensor is not None:
                weights[name] = tensor
        elif tensor is None:
            missing.append(name)
        elif tensor.shape != shape or not tensor.is_floating_point():
            raise InputError(
                f"{path}: expected {one_line(name)} to be {tuple(shape)} floating-point numbers, as its other weights "
                f"say, got {tuple(tensor.shape)} of {tensor.dtype}"
            )
        else:
            weights[name] = tensor
    if missing:
        raise InputError(
            f"{path}: expected all weights of the detector, but {len(missing)} of {len(shapes)} tensors are missing, "
            f"first {missing[0]}: it is a part of one. Start from it with --weights"
        )
    ignored = (COUNTER, "total_params", "total_ops")  # the last two are left by tools that count operations
    left = [name for name in tensors if name not in shapes and not name.endswith(ignored)]
    if left:
        raise InputError(
            f"{path}: expected a Deformable DETR, which has no {one_line(left[0])!r}, got a change of it or another "
            f"detector ({len(left)} such tensors). Start from what fits with --weights"
        )
    return weights


def _categories(source: SourceWeights, num_classes: int, notes: list[str]) -> tuple[Category, ...]:
    classes = source.classes
    if classes is None and num_classes == len(COCO_CLASSES):
        classes = tuple(RowClass(name, category_id) for category_id, name in COCO_CLASSES.items())
        notes.append(f"its {num_classes} classes have no names and were taken for COCO's")
    if classes is None:
        notes.append(f"its {num_classes} classes have no names in the file")
        return tuple(Category(row, f"class_{row}") for row in range(num_classes))
    return tuple(
        Category(
            row if one.category_id is None else one.category_id, f"{UNUSED} {row}" if one.name is None else one.name
        )
        for row, one in enumerate(classes)
    )

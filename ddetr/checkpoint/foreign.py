"""Weight files of other projects, and our own, read under the official parameter names."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr.checkpoint.class_rows import RowClass
from ddetr.checkpoint.coco_classes import COCO_CLASSES, NUM_IDS, is_unused
from ddetr.checkpoint.names import Detector, find_detector, official_names, with_average
from ddetr.checkpoint.preprocessing import input_beside
from ddetr.checkpoint.published import LIGHTNING, Checkpoint, colors_in, colors_of, is_checkpoint, parse_checkpoint
from ddetr.checkpoint.report import Remark
from ddetr.checkpoint.training_parts import one_to_one_queries, why_left_out
from ddetr.datasets.transforms import checked_colors
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.printable import one_line
from ddetr.untrusted import MAX_NETWORK
from ddetr.weight_files.architectures import architecture_of
from ddetr.weight_files.files import FileContent, Records, read_file
from ddetr.weight_files.folders import Weights, read_files
from ddetr.weight_files.pickled import StandIn, TensorView, mapping_of
from ddetr.weight_files.state_dicts import tensor_names, whole_model

BODY = "backbone.0.body."  # before the backbone's own names
COUNTER = "num_batches_tracked"  # of norms that were not frozen: nothing that is found depends on it


@dataclass(frozen=True)
class SourceWeights:
    """Weights of a file under official names, each head once.

    `config` holds those of our constructor's arguments that the file tells; `classes` is None where it names none.
    `where` is where in the file they lie, `others` names tensors that lie beside them, `in_file` has the names of
    all, as they are in the file, `left_out` is what exists for training alone. `published` is what a run of ours has
    published beside its state, without the weights.
    """

    kind: str
    tensors: dict[str, Tensor]
    classes: tuple[RowClass, ...] | None
    config: dict[str, Any]
    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    where: str = ""
    others: tuple[str, ...] = ()
    in_file: tuple[str, ...] = ()
    left_out: tuple[Remark, ...] = ()
    published: Checkpoint | None = None

    @property
    def two_stage(self) -> bool:
        return "transformer.enc_output.weight" in self.tensors

    @property
    def num_levels(self) -> int:
        return self.tensors["transformer.level_embed"].shape[0]

    def num_layers(self, part: str) -> int:
        """Of "encoder" or "decoder"."""
        layers = (re.match(rf"transformer\.{part}\.layers\.(\d{{1,4}})\.", name) for name in self.tensors)
        return 1 + max((int(layer[1]) for layer in layers if layer), default=-1)

    def heads(self, family: str) -> list[int]:
        """The numbers of the heads of a family, "class_embed" or "bbox_embed"."""
        heads = (re.match(rf"{family}\.(\d{{1,4}})\.", name) for name in self.tensors)
        return sorted({int(head[1]) for head in heads if head})

    def is_one_head(self, family: str) -> bool:
        """Whether all heads of a family hold the same values, as where it is one head for all layers."""
        first, *others = self.heads(family) or [0]
        of_first = {n: tensor for n, tensor in self.tensors.items() if n.startswith(f"{family}.{first}.")}
        twins = (
            (tensor, self.tensors.get(name.replace(f".{first}.", f".{other}.", 1)))
            for other in others
            for name, tensor in of_first.items()
        )
        return all(twin is not None and same_values(tensor, twin) for tensor, twin in twins)

    @property
    def num_backbone_levels(self) -> int:
        """Levels that are stages of the backbone: theirs are the projections of single cells."""
        weights = (self.tensors.get(f"input_proj.{level}.0.weight") for level in range(self.num_levels))
        return sum(weight is not None and weight.shape[2:] == (1, 1) for weight in weights) or min(self.num_levels, 3)


def read_weights(path: Path) -> SourceWeights:
    """Read a file, a folder of transformers, or weights in several files, of any known kind.

    Raises:
        InputError: not such a file, or a damaged one; a decoder that disagrees with the heads that it repeats.
    """
    return weights_of(path, read_files(path))


def weights_of(path: Path, weights: Weights) -> SourceWeights:
    """As `read_weights`, of what was read from `path`."""
    content, metadata, records, transformers_config = weights
    where, others, in_file, published = "", (), (), None
    if is_checkpoint(content, metadata):
        checkpoint = parse_checkpoint(path, FileContent(content, metadata, records))
        colors = colors_of(checkpoint)
        kind, tensors, config = "ddetr", checkpoint.model, checkpoint.config
        classes = _row_classes(checkpoint)
    else:
        detector = _detector(path, content)
        content = mapping_of(content) or {}
        kind, where, others = detector.kind, detector.where, detector.others
        in_file = (*detector.in_file.values(), *others)
        tensors = _each_head_once(path, _official(path, detector, records))
        config = _config_of(kind, content, transformers_config)
        config.setdefault("with_box_refine", detector.repeats_box_heads)
        classes = _classes_of(kind, tensors, content, transformers_config)
        if (published := _published_beside(path, content)) is not None:
            kind, config, classes = "ddetr", published.config, _row_classes(published)
        beside = input_beside(path, kind)
        colors = colors_in(content) if LIGHTNING in content else checked_colors(beside["mean"], beside["std"])
    level_embed = tensors.get("transformer.level_embed")
    if level_embed is None or level_embed.ndim != 2 or not level_embed.numel():
        got = "nothing" if level_embed is None else f"the shape {tuple(level_embed.shape)}"
        raise InputError(f"{path}: expected level_embed to be a tensor of a vector per level, got {got}")
    config = _checked(config)
    left_out = [Remark(name, why) for name in tensors if (why := why_left_out(name, kind))]
    for remark in left_out:
        del tensors[remark.name]
    if kind in ("official", "detrex"):
        tensors, more = one_to_one_queries(tensors, config.get("num_queries"))
        left_out += more
    return SourceWeights(kind, tensors, classes, config, *colors, where, others, in_file, tuple(left_out), published)


def check_is_weights(path: Path) -> None:
    """Raises `InputError` as `read_weights` does where there is no file, or one of another kind. The numbers themselves
    are not read."""
    content, metadata, *_ = read_files(path)
    if not is_checkpoint(content, metadata):
        _detector(path, content)


def _detector(path: Path, content: Any) -> Detector:
    detector = find_detector(with_average(content))
    if detector is None:
        raise InputError(_why_none(path, content))
    return detector


def _row_classes(checkpoint: Checkpoint) -> tuple[RowClass, ...]:
    names = (None if is_unused(category.name) else category.name for category in checkpoint.categories)
    return tuple(RowClass(name, category.category_id) for name, category in zip(names, checkpoint.categories))


def _published_beside(path: Path, content: Mapping[Any, Any]) -> Checkpoint | None:
    """What a run of ours has published beside its state, which itself names no classes; without the weights."""
    if LIGHTNING not in content:
        return None
    for file in (path.with_name("last.pth"), path.with_name("best.pth")):
        if file.is_file():
            published = read_file(file)
            if is_checkpoint(published.content, published.metadata):
                return parse_checkpoint(file, published, with_model=False)
    return None


def _official(path: Path, detector: Detector, records: Records) -> dict[str, Tensor]:
    """The detector's tensors in official names and shapes."""
    views: dict[str, TensorView] = {}
    for name, value in detector.tensors.items():
        if isinstance(value, TensorView):
            views[name] = value
        elif value.name.startswith("numpy."):
            raise InputError(
                f"{path}: expected tensors, but {one_line(detector.in_file[name])!r} is an array of NumPy: where you "
                "trust the file, write it again with torch.save({name: torch.tensor(a) for name, a in ...}, FILE)"
            )
        elif value.name.startswith("torch."):  # other objects in a state dict are no weights
            raise InputError(
                f"{path}: expected plain tensors, but {one_line(detector.in_file[name])!r} is of another kind "
                f"({one_line(value.name)!r}), such as sparse or quantised ones: write it again as a plain tensor"
            )
    records.check_total(views.values())
    official = official_names(detector.kind, views)
    tensors = {official[name]: records.load(detector.in_file[name], view) for name, view in views.items()}
    if detector.kind == "transformers":
        return _join_projections(tensors)
    return _fill_projection_biases(tensors) if detector.kind.startswith("mmdetection") else tensors


def _why_none(path: Path, content: Any) -> str:
    if (name := whole_model(content)) is not None:
        return (
            f"{path}: expected weights, got a whole network of the class {one_line(name)!r}, which only its own "
            "program can open: write there torch.save(model.state_dict(), FILE)"
        )
    names = tensor_names(content)
    expected = "expected weights of Deformable DETR (ddetr, official, transformers, detrex or mmdetection)"
    if (other := architecture_of(names)) is not None:
        if other.is_backbone:
            return (
                f"{path}: {expected}, got a backbone alone ({other.name}): start from it with "
                "--model.pretrained_backbone FILE"
            )
        return f"{path}: {expected}, got those of another detector: {other.name}. Its own program runs it"
    some = ", ".join(repr(one_line(name)) for name in names[:3]) or "no tensors"
    parts = ("cls_branches.", "class_embed.", "sampling_offsets.")
    hint = "; it has no level_embed, so it is incomplete or of another detector"
    is_alike = any(part in name for name in names for part in parts)
    return f"{path}: {expected}, got {some}{hint if is_alike else ''}"


def to_official_state_dict(model: DeformableDETR) -> dict[str, Tensor]:
    """The state dict as the official code saves it: its refining decoder holds the heads a second time."""
    state_dict = model.state_dict()
    counters = [name for name in state_dict if name.endswith(COUNTER)]  # its norms are always frozen
    return with_decoder_heads({n: tensor for n, tensor in state_dict.items() if n not in counters}, model.config)


def with_decoder_heads(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The same with the heads that the official decoder has too, under their second names."""
    twice = ("bbox_embed.",) * config["with_box_refine"] + ("class_embed.",) * config["two_stage"]
    twins = {f"transformer.decoder.{name}": tensor for name, tensor in tensors.items() if name.startswith(twice)}
    return {**tensors, **twins}


def num_class_rows(tensors: Mapping[str, Tensor]) -> int:
    """Rows of the first class head, 0 where there is none."""
    return next((len(t) for name, t in tensors.items() if re.match(r"class_embed\.\d+\.", name) and t.ndim), 0)


def same_values(one: Tensor, other: Tensor) -> bool:
    """As `torch.equal`, of any two types."""
    return one.shape == other.shape and torch.equal(one.float(), other.float())


def _join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps query, key and value projections apart; torch's attention holds them in one tensor."""
    joined = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if part is None:
            joined[name] = tensor
        elif part[2] == "q":
            parts = [tensors.get(f"{part[1]}.{letter}_proj.{part[3]}") for letter in "qkv"]
            if all(other is not None and other.shape == tensor.shape and tensor.ndim for other in parts):
                joined[f"{part[1]}.in_proj_{part[3]}"] = torch.cat(parts)
    return joined


def _fill_projection_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's neck has no biases before its group norms: a zero is the same."""
    for name in [name for name in tensors if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)]:
        weight = tensors[name]
        if not weight.ndim:
            continue
        tensors.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return tensors


def _each_head_once(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    once = {}
    for name, tensor in tensors.items():
        twin = re.sub(r"^transformer\.decoder\.(?=(?:bbox|class)_embed\.)", "", name)
        if twin != name and twin in tensors and not same_values(tensors[twin], tensor):
            raise InputError(
                f"{path}: expected {name} and {twin} to be the same head, but they differ: "
                "the file was not written by a model that shares its heads with its decoder"
            )
        once[twin] = tensor
    return once


def _config_of(kind: str, content: Mapping[Any, Any], transformers_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file tells of the model, under our names."""
    if kind == "transformers":
        return _config_of_transformers(transformers_config)
    if kind.startswith("mmdetection"):
        return _config_of_mmdetection(mapping_of(content.get("meta")) or {})
    args = content.get("args")  # the command line, in the official code's names, which are ours
    told = args.state if isinstance(args, StandIn) and isinstance(args.state, dict) else mapping_of(args) or {}
    return {**told, "num_queries": told.get("num_queries_one2one", told.get("num_queries"))}  # of H-DETR


def _config_of_transformers(told: Mapping[str, Any]) -> dict[str, Any]:
    names = {
        "nheads": "encoder_attention_heads",
        "enc_n_points": "encoder_n_points",
        "dec_n_points": "decoder_n_points",
    }
    names["num_queries"] = "two_stage_num_proposals" if told.get("two_stage") is True else "num_queries"
    names |= {name: name for name in ("with_box_refine", "dilation", "dropout", "backbone")}
    backbone = told.get("backbone_config")
    if isinstance(backbone, dict) and backbone.get("model_type") == "timm_backbone":
        told = {"backbone": backbone.get("backbone"), "dilation": backbone.get("output_stride") == 16, **told}
    return {ours: told[theirs] for ours, theirs in names.items() if theirs in told}


def _config_of_mmdetection(meta: Mapping[str, Any]) -> dict[str, Any]:
    """Of the configuration, which is a program in text, the one number that its weights don't show."""
    text = next((meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)), "")
    numbers = {int(number) for number in re.findall(r"\bnum_quer(?:y|ies)\s*=\s*(\d{1,5})\b", text)}
    return {"num_queries": numbers.pop()} if len(numbers) == 1 else {}


def _checked(config: Mapping[str, Any]) -> dict[str, Any]:
    """What is used of a configuration, where it is what it should be: anybody can write a file."""
    found = {name: config.get(name) for name in ("nheads", "enc_n_points", "dec_n_points", "num_queries")}
    checked = {n: value for n, value in found.items() if isinstance(value, int) and 1 <= value <= MAX_NETWORK[n]}
    backbone, dropout = config.get("backbone"), config.get("dropout")
    if isinstance(backbone, str) and backbone:
        checked["backbone"] = backbone
    if isinstance(dropout, float) and 0 <= dropout < 1:
        checked["dropout"] = dropout
    if isinstance(config.get("dilation"), bool):
        checked["dilation"] = config["dilation"]
    return {**checked, **{name: config.get(name) is True for name in ("with_box_refine", "class_aware")}}


def _classes_of(
    kind: str, tensors: Mapping[str, Tensor], content: Mapping[Any, Any], transformers_config: Mapping[str, Any]
) -> tuple[RowClass, ...] | None:
    num_rows = num_class_rows(tensors)
    if (stated := _stated_classes(kind, content.get("categories"), num_rows)) is not None:
        return stated
    names: Sequence[str] = ()
    if kind == "transformers":
        id2label = transformers_config.get("id2label")
        by_row = id2label if isinstance(id2label, dict) else {}
        names = [str(by_row.get(str(row), f"LABEL_{row}")) for row in range(num_rows)]
    elif kind.startswith("mmdetection"):
        names = _mmdetection_names(mapping_of(content.get("meta")) or {})
    is_named = any(not re.fullmatch(r"LABEL_\d+", name) and not is_unused(name) for name in names)
    if num_rows == NUM_IDS and (not is_named or list(names)[1:2] == [COCO_CLASSES[1]]):
        return tuple(RowClass(COCO_CLASSES.get(row), row) for row in range(num_rows))
    if is_named and len(names) == num_rows:
        return tuple(RowClass(name, None) for name in names)
    if kind in ("detrex", "Mr.DETR", "mmdetection", "mmdetection 2") and num_rows == len(COCO_CLASSES) and not names:
        return tuple(RowClass(name, category_id) for category_id, name in COCO_CLASSES.items())
    return None


def _stated_classes(kind: str, categories: Any, num_rows: int) -> tuple[RowClass, ...] | None:
    """The classes that `ddetr.checkpoint.convert` writes beside weights in other projects' names, as COCO's files have
    them. A row is a category id in official weights, and a label in those of detrex."""
    if not isinstance(categories, list) or not categories or kind not in ("official", "detrex"):
        return None
    rows: dict[int, RowClass] = {}
    for label, category in enumerate(categories):
        category_id, name = (category.get("id"), category.get("name")) if isinstance(category, dict) else (None, None)
        if not isinstance(category_id, int) or not isinstance(name, str):
            return None
        rows[category_id if kind == "official" else label] = RowClass(name, category_id)
    return tuple(rows.get(row, RowClass(None, None)) for row in range(num_rows)) if max(rows) < num_rows else None


def _mmdetection_names(meta: Mapping[str, Any]) -> Sequence[str]:
    data_set = mapping_of(meta.get("dataset_meta")) or {}
    names = data_set.get("classes") or data_set.get("CLASSES") or meta.get("CLASSES")
    is_plain = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
    return names if is_plain else ()

"""Weight files of other projects, read under the official parameter names.

Read: the official code, Hugging Face transformers (4.x and 5.x names), detrex, mmdetection 3, and our own format.
"""

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr.checkpoint.class_rows import RowClass
from ddetr.checkpoint.coco_classes import COCO_CLASSES, NUM_IDS
from ddetr.checkpoint.files import read_file
from ddetr.checkpoint.published import is_checkpoint, parse_checkpoint
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR

Rules = Sequence[tuple[str, str]]  # (pattern, replacement), applied in order to each name


@dataclass(frozen=True)
class SourceWeights:
    """Weights of a file under official names, each head once.

    `config` holds those of our constructor's arguments that the file tells; `classes` is None where it names none.
    """

    kind: str
    tensors: dict[str, Tensor]
    classes: tuple[RowClass, ...] | None
    config: dict[str, Any]

    @property
    def two_stage(self) -> bool:
        return "transformer.enc_output.weight" in self.tensors

    @property
    def num_levels(self) -> int:
        return self.tensors["transformer.level_embed"].shape[0]


_TRANSFORMERS: Rules = (
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone.0.body."),
    # Its own ResNet (use_timm_backbone=False) in torchvision's names.
    (r"\.body\.embedder\.embedder\.convolution\.", ".body.conv1."),
    (r"\.body\.embedder\.embedder\.normalization\.", ".body.bn1."),
    (r"\.body\.encoder\.stages\.0\.layers\.", ".body.layer1."),
    (r"\.body\.encoder\.stages\.1\.layers\.", ".body.layer2."),
    (r"\.body\.encoder\.stages\.2\.layers\.", ".body.layer3."),
    (r"\.body\.encoder\.stages\.3\.layers\.", ".body.layer4."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.0\.convolution\.", r"\1.conv1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.1\.convolution\.", r"\1.conv2."),
    (r"(\.body\.layer\d\.\d+)\.layer\.2\.convolution\.", r"\1.conv3."),
    (r"(\.body\.layer\d\.\d+)\.layer\.0\.normalization\.", r"\1.bn1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.1\.normalization\.", r"\1.bn2."),
    (r"(\.body\.layer\d\.\d+)\.layer\.2\.normalization\.", r"\1.bn3."),
    (r"^model\.(?:backbone\.)?position_embedding\.row_embeddings\.", "backbone.1.row_embed."),
    (r"^model\.(?:backbone\.)?position_embedding\.column_embeddings\.", "backbone.1.col_embed."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.", "transformer."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
    (r"(decoder\.layers\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
    (r"(coder\.layers\.\d+)\.(?:mlp\.)?fc([12])\.", r"\1.linear\2."),
)
_OPENMMLAB_LAYERS: Rules = (  # detrex took its layers over from mmcv
    (r"(coder\.layers\.\d+)\.ffns?(?:\.0)?\.layers\.0\.0\.", r"\1.linear1."),
    (r"(coder\.layers\.\d+)\.ffns?(?:\.0)?\.layers\.1\.", r"\1.linear2."),
    (r"(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),  # they number the norms in the order of the forward
    (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.(?:gn|norm)\.", r"input_proj.\1.1."),
    (r"^query_embedding\.", "query_embed."),
)
_DETREX: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.0.body.bn1."),
    (r"^backbone\.stem\.", "backbone.0.body."),
    (r"^backbone\.res2\.", "backbone.0.body.layer1."),
    (r"^backbone\.res3\.", "backbone.0.body.layer2."),
    (r"^backbone\.res4\.", "backbone.0.body.layer3."),
    (r"^backbone\.res5\.", "backbone.0.body.layer4."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"(\.body\.layer\d\.\d+)\.conv([123])\.norm\.", r"\1.bn\2."),
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
    *_OPENMMLAB_LAYERS,
)
_MMDETECTION: Rules = (
    (r"^backbone\.", "backbone.0.body."),
    (r"^(encoder|decoder|level_embed|pos_trans_norm)\b", r"transformer.\1"),
    (r"^reference_points_fc\.", "transformer.reference_points."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^pos_trans_fc\.", "transformer.pos_trans."),
    (r"(decoder\.layers\.\d+\.self_attn)\.attn\.", r"\1."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    (r"^bbox_head\.reg_branches\.(\d+)\.0\.", r"bbox_embed.\1.layers.0."),  # 1 and 3 are ReLUs
    (r"^bbox_head\.reg_branches\.(\d+)\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^bbox_head\.reg_branches\.(\d+)\.4\.", r"bbox_embed.\1.layers.2."),
    *_OPENMMLAB_LAYERS,
)
_RULES: dict[str, Rules] = {
    "official": (),
    "transformers": _TRANSFORMERS,
    "detrex": _DETREX,
    "mmdetection": _MMDETECTION,
}
_SIGNS = (  # (a parameter that every file of a kind has and no file of the others, the kind)
    ("transformer.level_embed", "official"),
    ("model.level_embed", "transformers"),
    ("transformer.level_embeds", "detrex"),
    ("bbox_head.cls_branches.0.weight", "mmdetection"),
)


def read_weights(path: Path) -> SourceWeights:
    """Read a file, or a transformers folder, of any known kind.

    Raises:
        InputError: not such a file, or a damaged one; a decoder that disagrees with the heads that it repeats.
    """
    path, transformers_config = _file_of(path)
    content, metadata = read_file(path)
    if is_checkpoint(content, metadata):
        checkpoint = parse_checkpoint(path, content, metadata)
        classes = tuple(RowClass(c.name, c.category_id) for c in checkpoint.categories)
        return SourceWeights("ddetr", checkpoint.model, classes, checkpoint.config)
    if isinstance(content, dict) and "pytorch-lightning_version" in content:
        raise InputError(
            f"{path}: expected weights, got a training state of Lightning: pass it to --resume, or take the published "
            "file beside it"
        )
    tensors = _tensors_of(content)
    kind = next((kind for sign, kind in _SIGNS if sign in tensors), None)
    if kind is None:
        some = ", ".join(repr(name) for name in list(tensors)[:3]) or "no tensors"
        raise InputError(
            f"{path}: expected weights of Deformable DETR (ddetr, official, transformers, detrex or mmdetection 3), "
            f"got {some}"
        )
    tensors = _rename(tensors, _RULES[kind])
    if kind == "transformers":
        tensors = _join_projections(tensors)
    elif kind == "mmdetection":
        tensors = _fill_projection_biases(tensors)
    config = _config_of(kind, content, transformers_config)
    config.setdefault("with_box_refine", any(name.startswith("transformer.decoder.bbox_embed.") for name in tensors))
    tensors = _each_head_once(path, tensors)
    return SourceWeights(kind, tensors, _classes_of(kind, tensors, content, transformers_config), config)


def to_official_state_dict(model: DeformableDETR) -> dict[str, Tensor]:
    """The state dict as the official code saves it: its refining decoder holds the heads a second time."""
    state_dict = dict(model.state_dict())
    twice = ("bbox_embed.",) * model.config["with_box_refine"] + ("class_embed.",) * model.config["two_stage"]
    twins = {f"transformer.decoder.{name}": tensor for name, tensor in state_dict.items() if name.startswith(twice)}
    counters = [name for name in state_dict if name.endswith("num_batches_tracked")]  # its norms are always frozen
    return {name: tensor for name, tensor in (state_dict | twins).items() if name not in counters}


def _file_of(path: Path) -> tuple[Path, dict[str, Any]]:
    """The file of weights, and the configuration that transformers keeps in the same folder."""
    if path.is_dir():
        files = [path / name for name in ("model.safetensors", "pytorch_model.bin") if (path / name).is_file()]
        if not files:
            raise InputError(
                f"{path}: expected a file of weights or a transformers folder with model.safetensors or "
                "pytorch_model.bin, got a folder without them"
            )
        path = files[0]
    try:
        config = json.loads((path.parent / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return path, {}
    return path, config if isinstance(config, dict) and config.get("model_type") == "deformable_detr" else {}


def _tensors_of(content: Any) -> dict[str, Tensor]:
    """The state dict in what a file holds, without the prefix of a wrapper for several devices."""
    for wrapper in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    tensors = {str(k): v for k, v in content.items() if isinstance(v, Tensor)} if isinstance(content, Mapping) else {}
    if tensors and all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
    return tensors


def _rename(tensors: Mapping[str, Tensor], rules: Rules) -> dict[str, Tensor]:
    num_convs = 1 + max((int(name.split(".")[2]) for name in tensors if name.startswith("neck.convs.")), default=-1)
    renamed = {}
    for name, tensor in tensors.items():
        if extra := re.match(r"neck\.extra_convs\.(\d+)\.", name):  # counted anew after the backbone's levels
            name = f"neck.convs.{num_convs + int(extra[1])}.{name[extra.end() :]}"
        for pattern, replacement in rules:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def _join_projections(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers keeps query, key and value projections apart; torch's attention holds them in one tensor."""
    joined = {}
    for name, tensor in tensors.items():
        part = re.fullmatch(r"(.*\.self_attn)\.([qkv])_proj\.(weight|bias)", name)
        if part is None:
            joined[name] = tensor
        elif part[2] == "q":
            parts = [tensors.get(f"{part[1]}.{letter}_proj.{part[3]}") for letter in "qkv"]
            if all(other is not None for other in parts):
                joined[f"{part[1]}.in_proj_{part[3]}"] = torch.cat(parts)
    return joined


def _fill_projection_biases(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """mmdetection's neck has no biases before its group norms: a zero is the same."""
    for name in [name for name in tensors if re.fullmatch(r"input_proj\.\d+\.0\.weight", name)]:
        weight = tensors[name]
        tensors.setdefault(name.removesuffix("weight") + "bias", weight.new_zeros(weight.shape[0]))
    return tensors


def _each_head_once(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    once = {}
    for name, tensor in tensors.items():
        twin = re.sub(r"^transformer\.decoder\.(?=(?:bbox|class)_embed\.)", "", name)
        if twin != name and twin in tensors and not torch.equal(tensors[twin], tensor):
            raise InputError(
                f"{path}: expected {name} and {twin} to be the same head, but they differ: "
                "the file was not written by a model that shares its heads with its decoder"
            )
        once[twin] = tensor
    return once


def _config_of(kind: str, content: Any, transformers_config: Mapping[str, Any]) -> dict[str, Any]:
    """What the file tells of the model, under our names."""
    if kind == "transformers":
        names = {
            "encoder_attention_heads": "nheads",
            "encoder_n_points": "enc_n_points",
            "decoder_n_points": "dec_n_points",
            "with_box_refine": "with_box_refine",
        }
        return {ours: transformers_config[theirs] for theirs, ours in names.items() if theirs in transformers_config}
    args = content.get("args") if isinstance(content, dict) else None
    if kind == "official" and isinstance(args, argparse.Namespace):
        names = ("nheads", "enc_n_points", "dec_n_points", "with_box_refine")
        return {name: getattr(args, name) for name in names if hasattr(args, name)}
    return {}


def _classes_of(
    kind: str, tensors: Mapping[str, Tensor], content: Any, transformers_config: Mapping[str, Any]
) -> tuple[RowClass, ...] | None:
    num_rows = next((len(tensor) for name, tensor in tensors.items() if name.startswith("class_embed.")), 0)
    names: Sequence[str] = ()
    if kind == "transformers":
        by_row = {int(row): str(name) for row, name in (transformers_config.get("id2label") or {}).items()}
        names = [by_row.get(row, f"LABEL_{row}") for row in range(num_rows)]
    elif kind == "mmdetection":
        meta = content.get("meta") if isinstance(content, dict) else None
        names = _mmdetection_names(meta if isinstance(meta, dict) else {})
    is_named = any(not re.fullmatch(r"LABEL_\d+|N/A", name) for name in names)
    if num_rows == NUM_IDS and (not is_named or list(names)[1:2] == [COCO_CLASSES[1]]):
        return tuple(RowClass(COCO_CLASSES.get(row), row) for row in range(num_rows))
    if is_named and len(names) == num_rows:
        return tuple(RowClass(name, None) for name in names)
    if kind in ("detrex", "mmdetection") and num_rows == len(COCO_CLASSES) and not names:
        return tuple(RowClass(name, category_id) for category_id, name in COCO_CLASSES.items())
    return None


def _mmdetection_names(meta: Mapping[str, Any]) -> Sequence[str]:
    data_set = meta.get("dataset_meta")
    names = (data_set.get("classes") or data_set.get("CLASSES")) if isinstance(data_set, dict) else meta.get("CLASSES")
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else ()

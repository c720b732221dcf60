"""Small models with random weights, and the same weights in the names and shapes of each project."""

import argparse
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr.checkpoint import Checkpoint, LoadReport, to_official_state_dict
from ddetr.datasets.annotations import Category
from ddetr.models.deformable_detr import DeformableDETR

SMALL: dict[str, Any] = {
    "backbone": "resnet10t",
    "hidden_dim": 32,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 32,
    "num_queries": 6,
    "num_classes": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
REFINE, TWO_STAGE = VARIANTS["refine"], VARIANTS["two_stage"]
PETS = (Category(17, "cat"), Category(18, "dog"), Category(5, "guinea pig"))


def make_model(seed: int = 0, **options: Any) -> DeformableDETR:
    """A small model whose every value is random, so that no two parameters can be taken for each other."""
    torch.manual_seed(seed)
    model = DeformableDETR(**SMALL | {"freeze_backbone": "stem"} | options)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return model


def make_checkpoint(model: DeformableDETR, **fields: Any) -> Checkpoint:
    categories = [Category(10 * i + 7, f"class {i}") for i in range(model.config["num_classes"])]
    return Checkpoint.of(model, **{"categories": categories} | fields)


def save_official(path: Path, model: DeformableDETR, **args: Any) -> Path:
    """As the official code saves: everything of a run, its command line pickled."""
    namespace = argparse.Namespace(lr=2e-4, nheads=model.config["nheads"], **args)
    torch.save(
        {"model": to_official_state_dict(model), "optimizer": {"state": {}}, "epoch": 49, "args": namespace}, path
    )
    return path


def assert_same_weights(model: DeformableDETR, source: DeformableDETR, but: Iterable[str] = ()) -> None:
    state_dict = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name in state_dict and not name.startswith(tuple(but)):
            assert state_dict[name].equal(tensor), name


def assert_accounts_for_everything(report: LoadReport, model: DeformableDETR, source: dict[str, Tensor]) -> None:
    """Each tensor of the model in one list, and each tensor of the file used or skipped."""
    ours = report.loaded + [name for name, _ in report.adapted] + [name for name, _ in report.initialised]
    assert len(ours) == len(set(ours))
    own = model.state_dict(keep_vars=True)
    assert {id(own[name]) for name in ours} == {id(tensor) for tensor in own.values()}
    assert all(why for _, why in [*report.adapted, *report.skipped, *report.initialised])
    assert {name for name, _ in report.skipped} <= set(source)
    assert 0.5 <= report.share <= 1


def reasons(remarks: list) -> dict[str, str]:
    return dict(remarks)


def to_transformers(source: DeformableDETR, generation: int) -> dict[str, Tensor]:
    """Names of transformers 4 and 5, written down from their models and not from our reader."""
    weights = {}
    for name, tensor in to_official_state_dict(source).items():
        if name.startswith("backbone.0.body."):
            name = name.replace("backbone.0.body.", "backbone.conv_encoder.model.")
        name = name.removeprefix("transformer.").replace("query_embed.", "query_position_embeddings.")
        name = name.replace("linear1", "fc1").replace("linear2", "fc2")
        if name.startswith("encoder."):
            name = name.replace("norm1", "self_attn_layer_norm").replace("norm2", "final_layer_norm")
        if name.startswith("decoder."):
            name = name.replace("norm1", "encoder_attn_layer_norm").replace("norm2", "self_attn_layer_norm")
            name = name.replace("norm3", "final_layer_norm").replace("cross_attn", "encoder_attn")
        if not name.startswith(("class_embed", "bbox_embed")):
            name = f"model.{name}"
        if generation == 5:
            name = name.replace("backbone.conv_encoder", "backbone").replace("self_attn.out_proj", "self_attn.o_proj")
            name = re.sub(r"(layers\.\d+)\.fc", r"\1.mlp.fc", name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                weights[name.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        else:
            weights[name] = tensor.clone()
    return weights


def to_detrex(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of detrex, written down from its own converter and not from our reader."""
    weights = {}
    for name, tensor in to_official_state_dict(source).items():
        if name.startswith("backbone.0.body."):
            name = name.removeprefix("backbone.0.body.")
            name = name if name.startswith("layer") else f"stem.{name}"
            name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
            name = re.sub(r"bn(\d)", r"conv\1.norm", name)
            name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            name = f"backbone.{name}"
        if level := re.match(r"input_proj\.(\d)\.(\d)", name):
            place = f"convs.{level[1]}" if int(level[1]) < 3 else f"extra_convs.{int(level[1]) - 3}"
            name = name.replace(level[0], f"neck.{place}.{'conv' if level[2] == '0' else 'norm'}")
        name = name.replace("linear1", "ffns.0.layers.0.0").replace("linear2", "ffns.0.layers.1")
        if "encoder.layers" in name:
            name = name.replace("self_attn", "attentions.0").replace("norm1", "norms.0").replace("norm2", "norms.1")
        if "decoder.layers" in name:
            name = name.replace("self_attn", "attentions.0.attn").replace("cross_attn", "attentions.1")
            name = name.replace("norm1", "norms.1").replace("norm2", "norms.0").replace("norm3", "norms.2")
        weights[name.replace("level_embed", "level_embeds").replace("query_embed", "query_embedding")] = tensor
    return weights


def to_mmdetection(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of mmdetection 3, written down from its modules and not from our reader."""
    weights = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("backbone.0.body.", "backbone.").removeprefix("transformer.")
        if level := re.match(r"input_proj\.(\d)\.(\d)", name):
            if name.endswith(".0.bias"):
                continue  # its neck has none
            place = f"convs.{level[1]}" if int(level[1]) < 3 else f"extra_convs.{int(level[1]) - 3}"
            name = name.replace(level[0], f"neck.{place}.{'conv' if level[2] == '0' else 'gn'}")
        name = name.replace("linear1", "ffn.layers.0.0").replace("linear2", "ffn.layers.1")
        if name.startswith("encoder.layers"):
            name = name.replace("norm1", "norms.0").replace("norm2", "norms.1")
        if name.startswith("decoder.layers"):
            name = name.replace("self_attn.", "self_attn.attn.")
            name = name.replace("norm1", "norms.1").replace("norm2", "norms.0").replace("norm3", "norms.2")
        name = re.sub(r"^(enc_output|pos_trans)\.", r"\1_fc.", name).replace("enc_output", "memory_trans")
        name = name.replace("reference_points.", "reference_points_fc.").replace("query_embed.", "query_embedding.")
        name = name.replace("class_embed.", "bbox_head.cls_branches.")
        name = re.sub(
            r"bbox_embed\.(\d)\.layers\.(\d)", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}", name
        )
        weights[name] = tensor
    return weights


def to_mmdetection_2(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of mmdetection 2, written down from its modules (the transformer in the head, layers of mmcv) and not from
    our reader."""
    weights = {}
    for name, tensor in source.state_dict().items():
        if level := re.match(r"input_proj\.(\d)\.(\d)", name):
            if name.endswith(".0.bias"):
                continue
            place = f"convs.{level[1]}" if int(level[1]) < 3 else f"extra_convs.{int(level[1]) - 3}"
            name = name.replace(level[0], f"neck.{place}.{'conv' if level[2] == '0' else 'gn'}")
        name = name.replace("backbone.0.body.", "backbone.").replace("linear1", "ffns.0.layers.0.0")
        name = name.replace("linear2", "ffns.0.layers.1").replace("cross_attn", "attentions.1")
        if "encoder.layers" in name:
            name = name.replace("self_attn", "attentions.0").replace("norm1", "norms.0").replace("norm2", "norms.1")
        if "decoder.layers" in name:
            name = name.replace("self_attn", "attentions.0.attn")
            name = name.replace("norm1", "norms.1").replace("norm2", "norms.0").replace("norm3", "norms.2")
        if name.startswith(("transformer.", "query_embed.")):
            name = "bbox_head." + name.replace("level_embed", "level_embeds").replace("query_embed", "query_embedding")
        name = name.replace("class_embed.", "bbox_head.cls_branches.")
        name = re.sub(
            r"bbox_embed\.(\d)\.layers\.(\d)", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}", name
        )
        weights[name] = tensor
    return weights


def to_mr_detr(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of Mr.DETR, written down from its modules and not from our reader: detrex's encoder, its own decoder, and
    what exists for its training routes."""
    weights = {}
    for name, tensor in to_detrex(source).items():
        layer = re.match(r"transformer\.decoder\.layers\.\d+\.", name)
        if layer is None:
            weights[name] = tensor
            continue
        inner = name[layer.end() :]
        inner = (
            inner.replace("norms.0", "attentions.0.norm_o2o")
            .replace("norms.1", "norms.0")
            .replace("norms.2", "norms.1")
        )
        inner = inner.replace("layers.0.0", "layers.0.linear.linear").replace("layers.1.", "layers.1.linear.")
        weights[layer[0] + inner] = tensor
        if "norm_o2o" in inner:
            weights[layer[0] + inner.replace("o2o", "o2m")] = torch.randn_like(tensor)
        if "ffns" in inner:
            second = re.sub(r"linear\.(weight|bias)$", r"linear_sep.\1", inner)
            weights[layer[0] + second] = torch.randn_like(tensor)
        for part in ("instruction_o2m", "instruction_o2m_pos"):
            weights[f"{layer[0]}attentions.0.{part}.weight"] = torch.randn(10, source.config["hidden_dim"])
    for name, tensor in source.state_dict().items():
        if name.startswith("class_embed.0."):
            weights[name.replace("class_embed.0", "transformer.decoder.class_embed_o2m_encoder")] = torch.randn_like(
                tensor
            )
        if name.startswith("bbox_embed.0."):
            weights[name.replace("bbox_embed.0", "transformer.decoder.bbox_embed_enc_o2m")] = torch.randn_like(tensor)
    weights["label_enc.weight"] = torch.randn(
        source.config["num_classes"], source.config["hidden_dim"]
    )  # its DINO version
    return weights


FORMATS: dict[str, Callable[[DeformableDETR], dict[str, Tensor]]] = {
    "official": to_official_state_dict,
    "transformers": lambda source: to_transformers(source, 5),
    "detrex": to_detrex,
    "mmdetection": to_mmdetection,
    "mmdetection 2": to_mmdetection_2,
}

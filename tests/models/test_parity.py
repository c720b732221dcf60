"""Against transformers' Deformable DETR, which nobody here wrote: the same random weights, the same outputs.

It is a reference for inference only: what it initialises and how it trains differs from the official code.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models import resnet50

from ddetr.checkpoint import load_weights
from ddetr.models.backbones import Backbone
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.padding import pad_images

transformers = pytest.importorskip("transformers")


def make_reference(config: dict[str, Any]) -> nn.Module:
    """transformers' model of our configuration, with every head a tensor of its own and no value left at zero."""
    num_levels = config.get("num_feature_levels", 4)
    two_stage, refine = config.get("two_stage", False), config.get("with_box_refine", False)
    options = {
        "features_only": True,
        "out_indices": [2, 3, 4] if num_levels > 1 else [4],
        "use_pretrained_backbone": False,
    }
    backbone: dict[str, Any] = {"use_timm_backbone": False, "use_pretrained_backbone": False, "backbone": None}
    if not config.get("dilation"):
        backbone["backbone_config"] = transformers.TimmBackboneConfig(backbone=config["backbone"], **options)
    elif int(transformers.__version__.partition(".")[0]) >= 5:
        backbone["backbone_config"] = transformers.TimmBackboneConfig(
            backbone=config["backbone"], output_stride=16, **options
        )
    else:  # the 4.x line reads it from here only
        backbone |= {
            "use_timm_backbone": True,
            "backbone": config["backbone"],
            "dilation": True,
            "backbone_config": None,
        }
        backbone["backbone_kwargs"] = {"out_indices": options["out_indices"]}
    reference = transformers.DeformableDetrForObjectDetection(
        transformers.DeformableDetrConfig(
            **backbone,
            num_feature_levels=num_levels,
            d_model=config["hidden_dim"],
            encoder_layers=config["enc_layers"],
            decoder_layers=config["dec_layers"],
            encoder_ffn_dim=config["dim_feedforward"],
            decoder_ffn_dim=config["dim_feedforward"],
            encoder_attention_heads=config["nheads"],
            decoder_attention_heads=config["nheads"],
            num_queries=config["num_queries"],
            two_stage_num_proposals=config["num_queries"],
            num_labels=config["num_classes"],
            with_box_refine=refine,
            two_stage=two_stage,
        )
    ).eval()
    # Its tying of heads is wrong for refinement and changes from version to version: every head gets its own values.
    for family in ("class_embed", "bbox_embed"):
        heads = getattr(reference, family)
        heads = [copy.deepcopy(head) for head in heads] if refine else [heads[0]] * len(heads)
        setattr(reference, family, nn.ModuleList(heads))
    if refine:
        reference.model.decoder.bbox_embed = reference.bbox_embed
    if two_stage:
        reference.model.decoder.class_embed = reference.class_embed
    randomise(reference)
    if two_stage:
        score_cells_without_proposal_last(reference)
    return reference


@torch.no_grad()
def score_cells_without_proposal_last(reference: nn.Module) -> None:
    """They all look alike to the proposal head: chosen, they would make queries that are all the same."""
    model = reference.model
    looks = model.enc_output_norm(model.enc_output(torch.zeros(model.enc_output.in_features)))
    row = reference.class_embed[-1].weight[0]
    row -= looks * (row @ looks + 10) / (looks @ looks)


@torch.no_grad()
def randomise(module: nn.Module) -> None:
    """No zero biases, no rings of offsets, no unit norms: defaults hide mistakes."""
    for name, tensor in module.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif name.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        elif "sampling_offsets.bias" in name:
            tensor.normal_(0, 2)
        elif tensor.is_floating_point() and tensor.dim() == 1:
            tensor.add_(torch.randn_like(tensor) * 0.2)
        elif "query_position_embeddings" in name:
            tensor.normal_()
        elif "reference_points.weight" in name:
            tensor.normal_(0, 0.3)
        elif "sampling_offsets.weight" in name or "attention_weights.weight" in name or ".layers.2.weight" in name:
            tensor.normal_(0, 0.1)


def assert_equal_outputs(config: dict[str, Any], sizes: list[tuple[int, int]], tmp_path: Path) -> None:
    torch.manual_seed(0)
    reference = make_reference(config)
    torch.save(reference.state_dict(), tmp_path / "pytorch_model.bin")
    model = DeformableDETR(**config, freeze_backbone="stem").eval()
    report = load_weights(model, tmp_path / "pytorch_model.bin")
    assert report.kind == "transformers"
    assert not report.adapted, report.adapted
    assert not report.initialised, report.initialised
    assert not report.skipped, report.skipped

    images, mask = pad_images([torch.randn(3, h, w) for h, w in sizes])
    with torch.no_grad():
        expected = reference(pixel_values=images, pixel_mask=(~mask).long())
        got = model(images, mask)
    got_all = torch.cat((got["pred_logits"], got["pred_boxes"]), dim=-1)
    expected_all = torch.cat((expected.logits, expected.pred_boxes), dim=-1)
    if config.get("two_stage"):
        # Queries are ranked by score: rounding may swap two of nearly the same, on one machine and not on another.
        nearest = torch.cdist(expected_all, got_all, p=float("inf")).argmin(-1)
        assert all(len(set(order)) == len(order) for order in nearest.tolist())
        got_all = got_all.gather(1, nearest[..., None].expand_as(got_all))
    torch.testing.assert_close(got_all, expected_all, atol=1e-4, rtol=1e-4)
    for outputs in (expected.logits, expected.pred_boxes):
        assert outputs.flatten(0, 1).std(0).mean() > 0.03, "queries that hardly differ compare nothing"


def test_equals_transformers_on_padded_batch(small_variant: dict[str, Any], tmp_path: Path) -> None:
    assert_equal_outputs(small_variant, [(160, 96), (128, 192), (150, 70)], tmp_path)


@pytest.mark.parametrize("two_stage", [False, True])
def test_equals_transformers_with_published_sizes(two_stage: bool, tmp_path: Path) -> None:
    """ResNet-50, 256 dimensions, 6 + 6 layers, 300 queries, 91 classes, as published."""
    config = {
        "backbone": "resnet50",
        "hidden_dim": 256,
        "nheads": 8,
        "enc_layers": 6,
        "dec_layers": 6,
        "dim_feedforward": 1024,
        "num_queries": 300,
        "num_classes": 91,
        "with_box_refine": two_stage,
        "two_stage": two_stage,
    }
    assert_equal_outputs(config, [(256, 224), (200, 288)], tmp_path)


@pytest.mark.parametrize("dilation", [False, True])
@torch.no_grad()
def test_backbone_equals_torchvision(dilation: bool, tmp_path: Path) -> None:
    """The official code takes torchvision's ResNet; ours comes from timm and loads the same file."""
    torch.manual_seed(0)
    reference = resnet50(weights=None, replace_stride_with_dilation=[False, False, dilation]).eval()
    randomise(reference)
    torch.save(reference.state_dict(), tmp_path / "resnet50.pth")
    num_features = 1 if dilation else 3
    backbone = Backbone(
        "resnet50", num_features, pretrained=str(tmp_path / "resnet50.pth"), dilation=dilation, freeze="stem"
    ).eval()

    x = images = torch.randn(1, 3, 96, 64)
    expected = []
    for name, layer in reference.named_children():
        if name == "avgpool":
            break
        x = layer(x)
        expected.append(x)
    for got, reference_map in zip(backbone(images), expected[-num_features:], strict=True):
        scale = reference_map.std()
        torch.testing.assert_close(got / scale, reference_map / scale, atol=1e-4, rtol=1e-4)

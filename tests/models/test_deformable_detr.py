"""The detector: its shapes, initial values, names, errors, and that it learns."""

import argparse
import math
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from ddetr.boxes import box_cxcywh_to_xyxy, generalized_iou
from ddetr.checkpoint import to_official_state_dict
from ddetr.errors import InputError
from ddetr.models.attention import MSDeformAttn
from ddetr.models.backbones import Backbone
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion, build_model
from ddetr.models.deformable_transformer import Decoded, DeformableTransformer, cell_centres, valid_ratio
from ddetr.models.heads import PRIOR_BIAS, BoxHead, class_head, refine_boxes
from ddetr.padding import pad_images

TRAINABLE_PARAMETERS = {  # with ResNet-50 and 91 classes, from the official code
    "single_scale": 33_844_193,
    "single_scale_dc5": 33_844_193,
    "base": 39_847_265,
    "refine": 40_627_260,
    "two_stage": 40_959_129,
}


def some_targets(num_classes: int) -> list[dict[str, Tensor]]:
    """Two objects on the first image, none on the second."""
    return [
        {
            "labels": torch.tensor([0, num_classes - 1]),
            "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.9]]),
        },
        {"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)},
    ]


# --- the published variants -------------------------------------------------------------------------------------------


def test_trainable_parameters_are_exactly_the_official_ones(variant: dict[str, Any], request: Any) -> None:
    model = DeformableDETR(91, freeze_backbone="stem", **variant)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == TRAINABLE_PARAMETERS[request.node.callspec.params["variant"]]


def test_seed_calls(small_variant: dict[str, Any]) -> None:
    """What the design promises a caller: official flags in; model, criterion and post-processing out."""
    args = argparse.Namespace(**small_variant, lr=2e-4, dataset_file="coco", masks=False, device="cpu")
    model, criterion, postprocessors = build_model(args)
    outputs = model([torch.rand(3, 80, 100), torch.rand(3, 96, 64)])
    n, q, k = 2, small_variant["num_queries"], small_variant["num_classes"]
    assert outputs["pred_logits"].shape == (n, q, k)
    assert outputs["pred_boxes"].shape == (n, q, 4)
    assert len(outputs["aux_outputs"]) == small_variant["dec_layers"] - 1
    assert ("enc_outputs" in outputs) == small_variant.get("two_stage", False)
    losses = criterion(outputs, some_targets(k))
    assert set(criterion.weight_dict) <= set(losses)
    assert all(loss.isfinite() for loss in losses.values())
    detections = postprocessors["bbox"](outputs, torch.tensor([[80, 100], [96, 64]]))
    assert [set(detection) for detection in detections] == [{"scores", "labels", "boxes"}] * n


def test_default_model_works_as_it_stands() -> None:
    model = DeformableDETR(num_classes=80, hidden_dim=256, num_queries=300).eval()
    with torch.no_grad():
        outputs = model(torch.rand(1, 3, 64, 96))
    assert outputs["pred_logits"].shape == (1, 300, 80)
    assert outputs["pred_boxes"].shape == (1, 300, 4)


def test_every_trainable_parameter_gets_a_gradient(small_variant: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**small_variant, freeze_backbone="stem")
    criterion = build_criterion(model)
    criterion.total(criterion(model(torch.rand(2, 3, 96, 96)), some_targets(5))).backward()
    without = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    with_gradient_though_frozen = [n for n, p in model.named_parameters() if not p.requires_grad and p.grad is not None]
    assert not with_gradient_though_frozen


@pytest.mark.parametrize("variant_flags", [{}, {"with_box_refine": True}, {"with_box_refine": True, "two_stage": True}])
def test_gradients_stop_at_references(small: dict[str, Any], variant_flags: dict[str, Any]) -> None:
    """Each refining layer learns its own correction, proposals learn from their own loss; plain references learn."""
    model = DeformableDETR(**small, **variant_flags)
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    model(torch.rand(1, 3, 96, 96))["pred_boxes"].sum().backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    last_layer = {f"bbox_embed.{2 if variant_flags else 0}.layers.{i}.weight" for i in range(3)}
    assert {name for name in with_gradient if re.match(r"bbox_embed.*weight", name)} == last_layer
    assert ("transformer.reference_points.weight" in with_gradient) == ("two_stage" not in variant_flags)
    assert "transformer.enc_output.weight" not in with_gradient
    assert ("transformer.pos_trans.weight" in with_gradient) == ("two_stage" in variant_flags)


# --- shapes -----------------------------------------------------------------------------------------------------------


def test_documented_shapes_of_outputs(small_variant: dict[str, Any]) -> None:
    model = DeformableDETR(**small_variant).eval()
    with torch.no_grad():
        outputs = model(torch.rand(2, 3, 96, 128))
    for layer in [outputs, *outputs["aux_outputs"]]:
        assert layer["pred_logits"].shape == (2, 12, 5)
        assert layer["pred_boxes"].shape == (2, 12, 4)
        assert layer["pred_boxes"].ge(0).all()
        assert layer["pred_boxes"].le(1).all()
    if small_variant.get("two_stage"):
        s = 12 * 16 + 6 * 8 + 3 * 4 + 2 * 2
        assert outputs["enc_outputs"]["pred_logits"].shape == (2, s, 5)
        assert outputs["enc_outputs"]["pred_boxes"].shape == (2, s, 4)


@torch.no_grad()
def test_documented_shapes_of_parts() -> None:
    n, q, s, c, m, p = 2, 7, 12 * 8 + 6 * 4, 32, 4, 3
    shapes = [(12, 8), (6, 4)]
    attention = MSDeformAttn(c, n_levels=2, n_heads=m, n_points=p)
    for coordinates in (2, 4):
        reference_points = torch.rand(n, q, 2, coordinates)
        out = attention(torch.rand(n, q, c), reference_points, torch.rand(n, s, c), shapes, torch.rand(n, s) > 0.5)
        assert out.shape == (n, q, c)
    assert class_head(c, 9)(torch.rand(n, q, c)).shape == (n, q, 9)
    assert BoxHead(c, -2.0)(torch.rand(n, q, c)).shape == (n, q, 4)
    for coordinates in (2, 4):
        assert refine_boxes(torch.rand(n, q, 4), torch.rand(n, q, coordinates)).shape == (n, q, 4)
    assert cell_centres(shapes, torch.ones(n, 2, 2)).shape == (n, s, 2)
    assert valid_ratio(torch.zeros(n, 12, 8, dtype=torch.bool)).shape == (n, 2)

    maps = Backbone("resnet18", 3)(torch.rand(n, 3, 64, 96))
    assert [tuple(feature.shape) for feature in maps] == [(n, 128, 8, 12), (n, 256, 4, 6), (n, 512, 2, 3)]
    maps = Backbone("resnet18", 1, dilation=True)(torch.rand(n, 3, 64, 96))
    assert [tuple(feature.shape) for feature in maps] == [(n, 512, 4, 6)]

    transformer = DeformableTransformer(c, m, 1, 2, 16, num_feature_levels=2, num_queries=q)
    srcs = [torch.rand(n, c, h, w) for h, w in shapes]
    heads = [[head(c) for _ in range(2)] for head in (lambda c: class_head(c, 9), lambda c: BoxHead(c, 0.0))]
    encoded = transformer(srcs, None, srcs, torch.rand(q, 2 * c), *(head[-1] for head in heads))
    assert encoded.memory.shape == (n, s, c)
    assert [part.shape[-1] for part in encoded.queries] == [c, c, 2]
    assert encoded.proposals is None
    out = transformer.decoder(encoded.queries, encoded, heads[1])
    assert [tuple(state.shape) for state in out.states] == [(n, q, c)] * 2
    assert [tuple(boxes.shape) for boxes in out.boxes] == [(n, q, 4)] * 2


@pytest.mark.parametrize(
    "sizes",
    [
        {"hidden_dim": 36, "nheads": 3, "num_feature_levels": 2, "enc_n_points": 1, "dec_n_points": 2},
        {"hidden_dim": 48, "nheads": 1, "num_feature_levels": 5, "enc_n_points": 5, "dec_n_points": 3},
        {"hidden_dim": 64, "nheads": 16, "num_feature_levels": 3, "position_embedding": "learned"},
        {"hidden_dim": 40, "nheads": 2, "two_stage": True, "with_box_refine": True, "enc_layers": 0},
        {"hidden_dim": 40, "nheads": 2, "backbone": "convnext_atto", "num_queries": 1, "dec_layers": 1},
    ],
)
def test_any_sizes_work(small: dict[str, Any], sizes: dict[str, Any]) -> None:
    config = small | sizes
    model = DeformableDETR(**config)
    outputs = model([torch.rand(3, 140, 150), torch.rand(3, 129, 170)])
    assert outputs["pred_logits"].shape == (2, config["num_queries"], 5)
    outputs["pred_boxes"].sum().backward()
    assert DeformableDETR(**model.config).state_dict().keys() == model.state_dict().keys()


def test_fewer_cells_than_queries(small: dict[str, Any]) -> None:
    """112 x 112 has 265 cells: the official two-stage crashes on its 300 proposals."""
    config = small | {"with_box_refine": True, "two_stage": True, "num_queries": 300}
    model = DeformableDETR(**config)
    outputs = model(torch.rand(2, 3, 112, 112))
    cells = 14 * 14 + 7 * 7 + 4 * 4 + 2 * 2
    assert cells == 265
    assert outputs["pred_boxes"].shape == (2, cells, 4)
    criterion = build_criterion(model)
    criterion.total(criterion(outputs, some_targets(5))).backward()


# --- padding ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_list_of_images_equals_padded_batch(small_variant: dict[str, Any]) -> None:
    model = DeformableDETR(**small_variant).eval()
    images = [torch.rand(3, 96, 128), torch.rand(3, 128, 70)]
    batch, mask = pad_images(images)
    from_list, from_batch = model(images), model(batch, mask)
    torch.testing.assert_close(from_list["pred_logits"], from_batch["pred_logits"], rtol=0, atol=0)
    torch.testing.assert_close(from_list["pred_boxes"], from_batch["pred_boxes"], rtol=0, atol=0)


@torch.no_grad()
def test_no_mask_equals_mask_without_padding(small_variant: dict[str, Any]) -> None:
    model = DeformableDETR(**small_variant).eval()
    randomise_attention(model)
    images = torch.rand(2, 3, 96, 128)
    without, with_mask = model(images), model(images, torch.zeros(2, 96, 128, dtype=torch.bool))
    torch.testing.assert_close(without["pred_logits"], with_mask["pred_logits"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(without["pred_boxes"], with_mask["pred_boxes"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("two_stage", [False, True])
@torch.no_grad()
def test_padding_of_feature_maps_changes_nothing(two_stage: bool) -> None:
    """What the architecture guarantees: the same feature maps with padding beside them, whatever stands in it.

    Of images it guarantees less, since a backbone's convolutions look over the edge into the padding.
    """
    torch.manual_seed(0)
    c, q, shapes, padded = 32, 6, [(8, 10), (4, 5)], [(12, 12), (6, 6)]
    transformer = DeformableTransformer(
        c, 4, 2, 3, 32, num_feature_levels=2, num_queries=q, with_box_refine=two_stage, two_stage=two_stage
    ).eval()
    randomise_attention(transformer)
    if two_stage:
        nn.init.zeros_(transformer.enc_output.bias)  # cells without a proposal score in the middle, not at the top
    class_embed = [class_head(c, 3) for _ in range(3 + two_stage)]
    bbox_embed = [BoxHead(c, 0.0) for _ in range(3 + two_stage)]
    for head in bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.3)
    queries = None if two_stage else torch.randn(q, 2 * c)

    srcs = [torch.randn(1, c, h, w) for h, w in shapes]
    positions = [torch.randn(1, c, h, w) for h, w in shapes]

    def run(srcs: list[Tensor], masks: list[Tensor] | None, positions: list[Tensor]) -> Decoded:
        encoded = transformer(srcs, masks, positions, queries, class_embed[-1], bbox_embed[-1])
        return transformer.decoder(encoded.queries, encoded, bbox_embed)

    alone = run(srcs, None, positions)

    def beside_noise(feature: Tensor, size: tuple[int, int]) -> Tensor:
        wide = torch.randn(1, c, *size)
        wide[:, :, : feature.shape[2], : feature.shape[3]] = feature
        return wide

    masks = [torch.ones(1, *size, dtype=torch.bool) for size in padded]
    for mask, (h, w) in zip(masks, shapes):
        mask[:, :h, :w] = False
    beside = run(
        [beside_noise(src, size) for src, size in zip(srcs, padded)],
        masks,
        [beside_noise(position, size) for position, size in zip(positions, padded)],
    )
    torch.testing.assert_close(beside.states[-1], alone.states[-1], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(beside.boxes[-1], alone.boxes[-1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_box_refine", [False, True])
@torch.no_grad()
def test_padding_of_images_changes_little(small: dict[str, Any], with_box_refine: bool) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**small, with_box_refine=with_box_refine, freeze_backbone="stem").eval()
    image = torch.rand(3, 128, 128)
    alone = model(image[None])
    batch, mask = pad_images([image, torch.rand(3, 192, 256)])
    beside = model(batch, mask)
    assert (beside["pred_boxes"][0] - alone["pred_boxes"][0]).abs().max() < 0.01
    assert (beside["pred_logits"][0] - alone["pred_logits"][0]).abs().mean() < 0.15


@torch.no_grad()
def randomise_attention(module: nn.Module) -> None:
    """Offsets and weights that depend on the query, as after training."""
    for part in module.modules():
        if isinstance(part, MSDeformAttn):
            nn.init.normal_(part.sampling_offsets.weight, std=0.2)
            nn.init.normal_(part.attention_weights.weight, std=0.2)


# --- initial values ---------------------------------------------------------------------------------------------------


def test_initial_heads(small_variant: dict[str, Any]) -> None:
    model = DeformableDETR(**small_variant)
    refine, two_stage = small_variant.get("with_box_refine", False), small_variant.get("two_stage", False)
    assert math.isclose(PRIOR_BIAS, -4.59512, abs_tol=1e-5)
    num_heads = small_variant["dec_layers"] + two_stage
    assert len(model.class_embed) == len(model.bbox_embed) == num_heads
    for index, (cls, box) in enumerate(zip(model.class_embed, model.bbox_embed)):
        assert cls.bias.eq(PRIOR_BIAS).all()
        assert not box.layers[-1].weight.any()
        size = -2.0 if not two_stage and (index == 0 or not refine) else 0.0
        assert box.layers[-1].bias.tolist() == [0.0, 0.0, size, size]
        assert cls.weight.equal(model.class_embed[0].weight)
        assert box.layers[0].weight.equal(model.bbox_embed[0].layers[0].weight)
    distinct = len({id(head) for head in model.bbox_embed})
    assert distinct == (num_heads if refine else 1)


def test_initial_attention_looks_in_rings() -> None:
    attention = MSDeformAttn(64, n_levels=3, n_heads=8, n_points=4)
    assert not attention.sampling_offsets.weight.any()
    assert not attention.attention_weights.weight.any()
    assert not attention.attention_weights.bias.any()
    assert not attention.value_proj.bias.any()
    offsets = attention.sampling_offsets.bias.view(8, 3, 4, 2)
    for head, direction in {0: (1, 0), 1: (1, 1), 2: (0, 1), 4: (-1, 0), 6: (0, -1), 7: (1, -1)}.items():
        for level in range(3):
            for point in range(4):
                expected = torch.tensor(direction, dtype=torch.float32) * (point + 1)
                torch.testing.assert_close(offsets[head, level, point], expected, atol=1e-5, rtol=0)


def test_other_initial_values() -> None:
    torch.manual_seed(0)
    model = DeformableDETR(num_queries=400, num_classes=5, backbone="resnet18", enc_layers=1, dec_layers=1)
    assert not model.transformer.reference_points.bias.any()
    bound = math.sqrt(6 / (256 + 2))
    assert bound * 0.9 < model.transformer.reference_points.weight.abs().max() <= bound
    assert abs(model.query_embed.weight.std() - 1) < 0.02
    assert abs(model.transformer.level_embed.std() - 1) < 0.1
    projection = model.input_proj[0][0]
    assert not projection.bias.any()
    bound = math.sqrt(6 / (128 + 256))
    assert bound * 0.99 < projection.weight.abs().max() <= bound
    assert model.input_proj[3][0].weight.shape == (256, 512, 3, 3)
    assert model.input_proj[0][1].num_groups == 32


# --- names and weights ------------------------------------------------------------------------------------------------


def test_names_are_the_official_ones() -> None:
    model = DeformableDETR(91, with_box_refine=True, two_stage=True, freeze_backbone="stem", enc_layers=1, dec_layers=2)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name, shape in {
        "backbone.0.body.conv1.weight": (64, 3, 7, 7),
        "backbone.0.body.bn1.running_var": (64,),
        "backbone.0.body.layer4.2.conv3.weight": (2048, 512, 1, 1),
        "input_proj.0.0.weight": (256, 512, 1, 1),
        "input_proj.3.0.weight": (256, 2048, 3, 3),
        "input_proj.3.1.bias": (256,),
        "transformer.level_embed": (4, 256),
        "transformer.encoder.layers.0.self_attn.sampling_offsets.weight": (256, 256),
        "transformer.encoder.layers.0.self_attn.attention_weights.weight": (128, 256),
        "transformer.encoder.layers.0.linear1.weight": (1024, 256),
        "transformer.decoder.layers.1.cross_attn.value_proj.weight": (256, 256),
        "transformer.decoder.layers.1.self_attn.in_proj_weight": (768, 256),
        "transformer.decoder.layers.1.norm3.weight": (256,),
        "transformer.enc_output.weight": (256, 256),
        "transformer.pos_trans.weight": (512, 512),
        "class_embed.2.weight": (91, 256),
        "bbox_embed.2.layers.2.weight": (4, 256),
    }.items():
        assert shapes.get(name) == shape, name
    assert not any(re.search(r"num_batches_tracked|decoder\.(bbox|class)_embed|query_embed", name) for name in shapes)


def test_official_state_dict_loads_strictly(small_variant: dict[str, Any]) -> None:
    source = DeformableDETR(**small_variant, freeze_backbone="stem")
    official = to_official_state_dict(source)
    twins = [name for name in official if name.startswith("transformer.decoder.bbox_embed.")]
    assert bool(twins) == small_variant.get("with_box_refine", False)
    twins = [name for name in official if name.startswith("transformer.decoder.class_embed.")]
    assert bool(twins) == small_variant.get("two_stage", False)
    official |= {"total_params": torch.zeros(1), "transformer.encoder.total_ops": torch.zeros(1)}
    before = list(official)

    for freeze in ("stem", "none"):  # the official norms hold no counter of batches
        model = DeformableDETR(**small_variant, freeze_backbone=freeze)
        result = model.load_state_dict(official, strict=True)
        assert not result.missing_keys
        assert not result.unexpected_keys
        for name, tensor in source.state_dict().items():
            assert model.state_dict()[name].equal(tensor), name
    assert list(official) == before, "the caller's state dict stays as it was"


def test_state_dict_with_differing_twin_heads_is_refused(small: dict[str, Any]) -> None:
    model = DeformableDETR(**small, with_box_refine=True)
    official = to_official_state_dict(model)
    twin = "transformer.decoder.bbox_embed.0.layers.0.weight"
    official[twin] = official[twin] + 1
    with pytest.raises(ValueError, match="the same head"):
        model.load_state_dict(official)


def test_loading_leaves_other_parts_of_a_larger_state_dict_alone(small: dict[str, Any]) -> None:
    """The model as a part of another module, beside an average of its weights that keeps batch counters."""
    whole = nn.ModuleDict({"model": DeformableDETR(**small, freeze_backbone="stem"), "norm": nn.BatchNorm2d(2)})
    state_dict = whole.state_dict()
    state_dict["norm.num_batches_tracked"] += 7
    whole.load_state_dict(state_dict, strict=True)
    assert whole["norm"].num_batches_tracked == 7


def test_pretrained_backbone_from_a_file(small: dict[str, Any], tmp_path: Path) -> None:
    weights = resnet18(weights=None).state_dict()
    torch.save(weights, tmp_path / "resnet18.pth")
    model = DeformableDETR(**small, pretrained_backbone=str(tmp_path / "resnet18.pth"))
    body = model.backbone[0].body
    for name, tensor in body.state_dict().items():
        assert tensor.equal(weights[name]), name
    names = {name for name, p in body.named_parameters() if p.requires_grad}
    assert names
    assert all(name.startswith(("layer2", "layer3", "layer4")) for name in names)
    assert not any("bn" in name for name in names), "norms of a pretrained backbone are frozen"


def test_pretrained_backbone_from_a_file_that_is_made_to_take_memory(small: dict[str, Any], tmp_path: Path) -> None:
    path, stored = tmp_path / "resnet18.pth", tmp_path / "stored.pth"
    torch.save({"conv1.weight": torch.zeros(1).expand(2**40)}, path)
    with pytest.raises(InputError, match=r"resnet18\.pth: conv1\.weight: .* made to do harm"):
        DeformableDETR(**small, pretrained_backbone=str(path))
    torch.save({"conv1.weight": torch.zeros(2**16)}, stored)
    with zipfile.ZipFile(stored) as archive, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in archive.namelist():
            packed.writestr(entry, archive.read(entry))
    with pytest.raises(InputError, match=r"resnet18\.pth: its records are compressed"):
        DeformableDETR(**small, pretrained_backbone=str(path))


def test_norms_train_where_the_backbone_starts_from_nothing(small: dict[str, Any]) -> None:
    body = DeformableDETR(**small).backbone[0].body
    assert all(p.requires_grad for p in body.parameters())
    assert any(isinstance(module, nn.BatchNorm2d) for module in body.modules())
    frozen = DeformableDETR(**small, freeze_backbone="all").backbone[0].body
    assert not any(p.requires_grad for p in frozen.parameters())


@pytest.mark.parametrize(("num_levels", "made"), [(4, 0), (5, 1)])
def test_levels_from_stride_4_on(small: dict[str, Any], num_levels: int, made: int) -> None:
    """DINO's five scales are four stages of the backbone and a level made from the last; and without that level."""
    model = DeformableDETR(**small | {"num_feature_levels": num_levels, "num_backbone_levels": 4}).eval()
    assert model.backbone[0].strides == [4, 8, 16, 32]
    kernels = [projection[0].kernel_size for projection in model.input_proj]
    assert kernels == [(1, 1)] * 4 + [(3, 3)] * made
    sizes = [tuple(src.shape[2:]) for src in model._features(torch.rand(1, 3, 64, 96), None)[0]]
    assert sizes == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)][:num_levels]
    model(torch.rand(1, 3, 64, 96))["pred_logits"].sum().backward()
    assert model.input_proj[0][0].weight.grad.abs().sum() > 0


def test_a_map_of_one_cell_with_a_channel_for_each_group(small: dict[str, Any]) -> None:
    model = DeformableDETR(**small | {"hidden_dim": 32, "nheads": 4, "num_feature_levels": 4}).eval()
    assert model.input_proj[3][1].num_groups == 32
    with torch.no_grad():
        assert model(torch.rand(1, 3, 64, 64))["pred_logits"].isfinite().all()
        assert model._features(torch.rand(1, 3, 64, 64), None)[0][3].shape == (1, 32, 1, 1)


# --- errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"two_stage": True}, "two_stage needs with_box_refine"),
        ({"dilation": True}, "num_feature_levels 1"),
        ({"num_backbone_levels": 4, "num_feature_levels": 3}, "needs num_feature_levels 4 or more, got 3"),
        ({"num_backbone_levels": 2, "num_feature_levels": 4}, "num_backbone_levels: expected one of 3, 4, got 2"),
        ({"hidden_dim": 66, "nheads": 8}, "divisible by 4 and by nheads=8, got 66"),
        ({"hidden_dim": 100, "nheads": 8}, "divisible by 4 and by nheads=8, got 100"),
        ({"num_queries": 0}, "num_queries must be at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"backbone": "resnet5000"}, "unknown backbone 'resnet5000'.*resnet50"),
        ({"pretrained_backbone": "no/such/file.pth"}, "no/such/file.pth"),
        ({"backbone": "beit_base_patch16_224"}, "beit_base_patch16_224"),
        ({"backbone_window": 0, "backbone": "vit_tiny_patch16_224"}, "backbone_window must be at least 1"),
    ],
)
def test_constructor_errors(small: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DeformableDETR(**small | options)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_querys": 100}, "num_querys.*num_queries"),
        ({"with_box_refinement": True}, "with_box_refinement.*with_box_refine"),
        ({"set_cost_clas": 1}, "set_cost_clas.*set_cost_class"),
        ({"masks": True}, "masks"),
    ],
)
def test_build_model_names_the_nearest_flag(small: dict[str, Any], flags: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(small | flags)


def test_build_model_takes_official_flags(small: dict[str, Any]) -> None:
    flags = small | {"lr_backbone": 0.0, "cls_loss_coef": 3.0, "set_cost_giou": 7.0, "aux_loss": False}
    del flags["num_classes"]
    model, criterion, _ = build_model(flags)
    assert model.config["num_classes"] == 91
    assert isinstance(criterion, SetCriterion)
    assert criterion.weight_dict == {"loss_ce": 3.0, "loss_bbox": 5.0, "loss_giou": 2.0}
    assert criterion.matcher.set_cost_giou == 7.0
    assert not any(p.requires_grad for p in model.backbone[0].body.parameters()), "official meaning of a zero rate"


@pytest.mark.parametrize(
    ("images", "mask", "message"),
    [
        (torch.rand(3, 64, 64), None, "shape"),
        (torch.rand(1, 1, 64, 64), None, "shape"),
        (torch.zeros(1, 3, 64, 64, dtype=torch.uint8), None, "floating-point"),
        ([torch.zeros(3, 64, 64, dtype=torch.uint8)] * 2, None, "floating-point"),
        ([torch.rand(64, 64, 3)], None, r"\(3, h, w\)"),
        ([], None, "empty"),
        (torch.rand(1, 3, 64, 64), torch.zeros(1, 64, 64), "bool mask"),
        (torch.rand(1, 3, 64, 64), torch.zeros(1, 32, 64, dtype=torch.bool), "bool mask"),
        ([torch.rand(3, 64, 64)], torch.zeros(1, 64, 64, dtype=torch.bool), "mask=None"),
    ],
)
def test_forward_errors(small: dict[str, Any], images: Any, mask: Tensor | None, message: str) -> None:
    model = DeformableDETR(**small)
    with pytest.raises(ValueError, match=message):
        model(images, mask)


# --- precision and learning -------------------------------------------------------------------------------------------


@torch.no_grad()
def test_bfloat16_autocast_is_close_to_float32(small: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**small, with_box_refine=True).eval()
    randomise_attention(model)
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight, std=0.1)
    batch, mask = pad_images([torch.rand(3, 128, 160), torch.rand(3, 160, 96)])
    exact = model(batch, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = model(batch, mask)
    assert rounded["pred_boxes"].dtype == torch.float32
    assert all(layer["pred_boxes"].dtype == torch.float32 for layer in rounded["aux_outputs"])
    assert (rounded["pred_boxes"] - exact["pred_boxes"]).abs().max() < 0.02
    assert (rounded["pred_logits"].float() - exact["pred_logits"]).abs().max() < 0.1


def test_overfits_four_images() -> None:
    """From nothing to the right boxes and classes: model, matching, losses and gradients at work together."""
    torch.manual_seed(0)
    num_steps = 200
    model = DeformableDETR(
        num_classes=3,
        hidden_dim=64,
        num_queries=20,  # as many as cells: no proposal can be left out
        backbone="test_resnet",
        num_feature_levels=2,
        nheads=4,
        enc_layers=1,
        dec_layers=2,
        dim_feedforward=128,
        dropout=0.0,
        with_box_refine=True,
        two_stage=True,
    )
    images, targets = torch.full((4, 3, 64, 64), -1.0), []
    for image, boxes, labels in zip(
        images,
        ([(4, 8, 28, 40), (36, 30, 60, 60)], [(10, 10, 54, 30)], [(2, 34, 30, 62), (20, 4, 44, 24)], []),
        ([0, 1], [2], [1, 2], []),
    ):
        for (x1, y1, x2, y2), label in zip(boxes, labels):
            image[label, y1:y2, x1:x2] = 1.0
        corners = torch.tensor(boxes, dtype=torch.float32).view(-1, 4) / 64
        centres = torch.cat(((corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]), dim=1)
        targets.append({"labels": torch.tensor(labels, dtype=torch.long), "boxes": centres})

    criterion = build_criterion(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=num_steps)
    history = []
    for _ in range(num_steps):
        loss = criterion.total(criterion(model(images), targets))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        history.append(loss.item())
    assert history[-1] < history[0] / 10, (history[0], history[-1])

    with torch.no_grad():
        outputs = model(images)
    for index, ((queries, objects), target) in enumerate(zip(criterion.matcher(outputs, targets), targets)):
        scores = outputs["pred_logits"][index].sigmoid()
        others = [query for query in range(20) if query not in queries]
        assert scores[queries].amax(-1).ge(0.4).all(), "one confident query an object"
        assert scores[others].le(0.35).all(), "and no other"
        assert scores[queries].argmax(-1).tolist() == target["labels"][objects].tolist()
        iou = generalized_iou(
            box_cxcywh_to_xyxy(outputs["pred_boxes"][index, queries]), box_cxcywh_to_xyxy(target["boxes"][objects])
        )
        assert iou.ge(0.8).all(), iou

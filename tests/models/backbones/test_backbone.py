"""Any network of timm as a backbone."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddetr.engine.config import OptimConfig
from ddetr.engine.memory import estimate_memory
from ddetr.engine.optimizer import parameter_groups
from ddetr.errors import InputError
from ddetr.inference.optimize import optimize_model
from ddetr.models.backbones import Backbone
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))

# Name -> (what freeze "stem" leaves to train of `body`, by the start of its names, and the number of its stages)
FAMILIES: dict[str, tuple[tuple[str, ...], int]] = {
    "test_resnet": (("layer2", "layer3", "layer4"), 5),
    "regnetx_002": (("s2", "s3", "s4"), 5),
    "tf_efficientnet_lite0": (("blocks.2", "blocks.3", "blocks.4", "blocks.5", "blocks.6"), 5),
    "mobilenetv4_conv_small_050": (("blocks.1", "blocks.2", "blocks.3", "blocks.4"), 5),
    "tiny_convnext": (("stages_1", "stages_2", "stages_3"), 4),
    "hgnetv2_b0": (("stages_1", "stages_2", "stages_3"), 4),
    "test_mambaout": (("stages_1", "stages_2", "stages_3"), 4),
    "tiny_swin": (("layers_1", "layers_2", "layers_3"), 4),
    "tiny_swinv2": (("layers_1", "layers_2", "layers_3"), 4),
    "tiny_hiera": (("model.blocks.1", "model.blocks.2", "model.blocks.3", "model.blocks.4"), 4),
    "test_maxvit": (("stages_1", "stages_2", "stages_3"), 5),
    "test_coatnet": (("stages_1", "stages_2", "stages_3"), 5),
    "tiny_vit": (("blocks", "norm"), 9),
    "tiny_dinov2": (("blocks", "norm"), 9),
    "tiny_deit": (("blocks", "norm"), 9),
    "tiny_eva02": (("blocks",), 9),
    "tiny_dinov3": (("blocks", "norm"), 9),
    "tiny_rope_mixed": (("blocks", "norm"), 9),
}
PLAIN = [name for name, (starts, _) in FAMILIES.items() if "blocks" in starts]
# Those that failed when "any timm model" was first tried, and some of today's strongest.
WHOLE = (
    "convnext_tiny swin_tiny_patch4_window7_224 swinv2_tiny_window8_256 mambaout_tiny hiera_tiny_224 "
    "maxvit_tiny_rw_224 coatnet_0_rw_224 vit_small_patch14_dinov2.lvd142m vit_base_patch16_224 "
    "eva02_tiny_patch14_224 vit_small_patch16_dinov3 focalnet_tiny_srf sam2_hiera_tiny twins_svt_small"
)


def images(height: int, width: int, count: int = 2) -> Tensor:
    return torch.randn(count, 3, height, width, generator=torch.Generator().manual_seed(height))


def expected_shapes(backbone: Backbone, height: int, width: int, count: int = 2) -> list[tuple[int, ...]]:
    sizes = [(math.ceil(height / stride), math.ceil(width / stride)) for stride in backbone.strides]
    return [(count, channels, *size) for channels, size in zip(backbone.num_channels, sizes, strict=True)]


def assert_works_at_any_size(name: str) -> Backbone:
    """Sizes that are multiples of no window or patch; backward reaches every parameter."""
    torch.manual_seed(0)
    backbone = Backbone(name, 3)
    assert backbone.strides == [8, 16, 32]
    for height, width in ((64, 96), (75, 45)):
        maps = backbone(images(height, width))
        assert [tuple(one.shape) for one in maps] == expected_shapes(backbone, height, width)
        assert all(one.isfinite().all() for one in maps)
    sum(one.square().mean() for one in maps).backward()
    assert [key for key, parameter in backbone.named_parameters() if parameter.grad is None] == []
    return backbone


@pytest.mark.parametrize("name", FAMILIES)
def test_it_runs_and_trains_at_any_size_and_its_state_is_kept(name: str) -> None:
    backbone = assert_works_at_any_size(name).eval()
    other = Backbone(name, 3).eval()
    other.load_state_dict(backbone.state_dict())
    with torch.no_grad():
        for one, two in zip(backbone(images(75, 45)), other(images(75, 45)), strict=True):
            assert one.equal(two)


@pytest.mark.slow
@pytest.mark.parametrize("name", WHOLE.split())
def test_a_whole_network_runs_and_trains_at_any_size(name: str) -> None:
    assert_works_at_any_size(name)


@pytest.mark.parametrize("name", FAMILIES)
def test_maps_depend_on_the_image_alone(name: str) -> None:
    """Neither on the other images of the batch nor on what was seen before."""
    torch.manual_seed(0)
    backbone = Backbone(name, 3).eval()
    pair = images(75, 45)
    with torch.no_grad():
        together = backbone(pair)
        backbone(images(64, 96))
        for both, alone in zip(together, backbone(pair[1:]), strict=True):
            torch.testing.assert_close(both[1:], alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_freezing_leaves_to_train(name: str) -> None:
    rest, num_stages = FAMILIES[name]
    stem, everything = (Backbone(name, 3, freeze=how) for how in ("stem", "all"))
    for key, parameter in stem.body.named_parameters():
        assert parameter.requires_grad == key.startswith(rest), key
    assert not any(parameter.requires_grad for parameter in everything.body.parameters())
    for backbone in (stem, everything):
        if backbone.pyramid is not None:
            assert all(parameter.requires_grad for parameter in backbone.pyramid.parameters())
        assert not any(isinstance(module, nn.BatchNorm2d) for module in backbone.modules())
    assert set(stem.stages()) == {key for key, _ in stem.named_parameters() if key.startswith("body.")}
    assert set(stem.stages().values()) == set(range(num_stages))


@pytest.mark.parametrize(("name", "are_fixed"), [("test_resnet", True), ("tiny_swin", False), ("tiny_vit", False)])
def test_freezing_norms_freezes_batch_norms_alone(name: str, are_fixed: bool) -> None:
    """Layer norms have no statistics of the pretraining's batches, and train as in the transformers' own recipes."""
    free, frozen = Backbone(name, 3), Backbone(name, 3, freeze="norm")
    assert all(parameter.requires_grad for parameter in [*free.parameters(), *frozen.parameters()])
    assert any(isinstance(module, nn.BatchNorm2d) for module in free.modules()) == are_fixed
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert (len(list(free.parameters())) > len(list(frozen.parameters()))) == are_fixed


@pytest.mark.parametrize("name", ["tiny_convnext", "tiny_swin", "tiny_hiera", "tiny_vit", "tiny_eva02"])
def test_layer_decay_gives_each_stage_its_rate(name: str) -> None:
    """The last has lr_backbone; a feature pyramid, which starts from nothing, the rate of the rest."""
    with torch.device("meta"):
        model = DeformableDETR(backbone=name, hidden_dim=32, nheads=4, enc_layers=1, dec_layers=1)
    config = OptimConfig(lr=1e-3, lr_backbone=1e-4, layer_decay=0.5)
    groups = parameter_groups(model, config, backbone_pretrained=True)
    rates = {group["name"]: group["lr"] for group in groups}
    last = FAMILIES[name][1] - 1
    by_stage = {f"backbone.stage{stage}": 1e-4 * 0.5 ** (last - stage) for stage in range(last + 1)}
    assert rates == pytest.approx({"rest": 1e-3, "linear_proj": 1e-4} | by_stage)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    for key, parameter in model.backbone[0].named_parameters():
        if key.startswith("pyramid."):
            assert rate_of[id(parameter)] == 1e-3
        elif key.startswith(("body.blocks.0.", "body.model.blocks.0.", "body.layers_0.", "body.stages_0.")):
            assert rate_of[id(parameter)] == pytest.approx(by_stage[f"backbone.stage{int(name in PLAIN)}"])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", IMAGENET),
        ("resnet50", IMAGENET),
        ("tf_efficientnet_lite0", HALF),  # of TensorFlow
        ("tf_efficientnet_b0.ns_jft_in1k", IMAGENET),  # the tag decides, not the network
        ("tf_efficientnetv2_s.in1k", HALF),
        ("tiny_vit", HALF),
        ("tiny_clip", CLIP),
        ("tiny_siglip", HALF),
        ("tiny_dinov2", IMAGENET),
    ],
)
def test_the_normalisation_is_that_of_the_weights(name: str, expected: tuple) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, 3)
    assert (backbone.mean, backbone.std) == expected


@pytest.mark.parametrize("name", ["tiny_swin", "tiny_hiera", "tiny_dinov2", "test_coatnet", "test_mambaout"])
def test_a_detector_has_it(name: str) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "num_queries": 5, "dim_feedforward": 32}
    model = DeformableDETR(3, backbone=name, **sizes, num_backbone_levels=4, num_feature_levels=5)
    assert model.backbone[0].strides == [4, 8, 16, 32]
    detected = model([torch.randn(3, 70, 40), torch.randn(3, 33, 64)])
    assert detected["pred_logits"].shape == (2, 5, 3)
    again = DeformableDETR(**model.config)
    again.load_state_dict(model.state_dict())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "beit_base_patch16_224"}, "table of positions for one image size.*convnext_tiny or swin_tiny"),
        ({"name": "gmlp_ti16_224"}, "a grid of one size"),
        ({"name": "swinv2_cr_tiny_224"}, "its windows are made for one image size"),
        ({"name": "eca_botnext26ts_256"}, "table of positions"),
        ({"name": "volo_d1_224"}, r"expected feature maps of strides \[8, 16, 32\], got \[16, 16, 16\]. Take for"),
        ({"name": "tiny_swin", "dilation": True, "num_features": 1}, "cannot be dilated: its strides are fixed"),
        ({"name": "tiny_hiera", "dilation": True, "num_features": 1}, "cannot be dilated: its strides are fixed"),
        ({"name": "tiny_swin", "window": 7}, "backbone_window is for plain vision transformers"),
        ({"name": "resnet18", "window": 7}, "backbone_window is for plain vision transformers"),
    ],
)
def test_what_cannot_be_says_why(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message), torch.device("meta"):
        Backbone(**{"num_features": 3} | options)


@pytest.mark.parametrize("name", ["test_maxvit", "tiny_swin", "tiny_eva02", "tiny_hiera"])
def test_it_can_be_rewritten_for_inference_and_its_memory_estimated(name: str) -> None:
    """Batch norms folded, other linear layers; on tensors that have shapes alone."""
    torch.manual_seed(0)
    sizes = {"hidden_dim": 32, "nheads": 4, "enc_layers": 1, "dec_layers": 1, "num_queries": 5, "dim_feedforward": 32}
    model = DeformableDETR(3, backbone=name, freeze_backbone="norm", **sizes)
    optimize_model(model.eval())  # compares the outputs itself
    small = {"batch": 1, "num_objects": 2}
    criterion = build_criterion(model)
    estimates = [estimate_memory(model.train(), criterion, size_hw=size, **small) for size in ((64, 64), (256, 256))]
    assert estimates[0].activations < estimates[1].activations

"""Parameter groups and schedule against the official recipe."""

import math
from typing import Any

import pytest
import torch

from ddetr.engine.config import OptimConfig
from ddetr.engine.optimizer import build_optimizer, describe_groups, lr_factor, parameter_groups
from ddetr.errors import InputError
from ddetr.models.backbones import Backbone
from ddetr.models.deformable_detr import DeformableDETR


@pytest.fixture(scope="module")
def models() -> dict[str, DeformableDETR]:
    """The two kinds of official model, ResNet-50 with frozen stem; on no device, since only the names matter."""
    official = {"num_classes": 91, "freeze_backbone": "stem"}
    with torch.device("meta"):
        return {
            "base": DeformableDETR(**official),
            "two_stage": DeformableDETR(**official, with_box_refine=True, two_stage=True),
        }


@pytest.mark.parametrize("name", ["base", "two_stage"])
def test_every_trainable_parameter_is_in_exactly_one_group(models: dict[str, DeformableDETR], name: str) -> None:
    groups = parameter_groups(models[name], OptimConfig(), backbone_pretrained=True)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in models[name].parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(trainable)


def test_rates_and_weight_decay_are_the_official_ones(models: dict[str, DeformableDETR]) -> None:
    groups = parameter_groups(models["base"], OptimConfig(), backbone_pretrained=True)
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    assert all(group["weight_decay"] == 1e-4 for group in groups)
    for name, parameter in models["base"].named_parameters():
        if not parameter.requires_grad:
            assert id(parameter) not in group_of
            continue
        slow = "backbone.0" in name or "reference_points" in name or "sampling_offsets" in name
        assert group_of[id(parameter)]["lr"] == pytest.approx(2e-5 if slow else 2e-4), name


def test_the_groups_have_the_sizes_of_the_published_model(models: dict[str, DeformableDETR]) -> None:
    sizes = {
        group["name"]: sum(parameter.numel() for parameter in group["params"])
        for group in parameter_groups(models["base"], OptimConfig(), backbone_pretrained=True)
    }
    assert sum(sizes.values()) == 39_847_265
    # offsets of 6 + 6 layers: 8 heads x 4 levels x 4 points x 2 of 256 features and a bias; one reference point layer
    assert sizes["linear_proj"] == 12 * 256 * 257 + 2 * 257


def test_a_two_stage_model_has_no_reference_points(models: dict[str, DeformableDETR]) -> None:
    groups = {g["name"]: g for g in parameter_groups(models["two_stage"], OptimConfig(), backbone_pretrained=True)}
    assert sum(parameter.numel() for parameter in groups["linear_proj"]["params"]) == 12 * 256 * 257


@pytest.mark.parametrize(
    ("lr_backbone", "pretrained", "expected"),
    [(None, True, 1e-4), (None, False, 1e-3), (3e-6, True, 3e-6), (0.0, True, 0.0)],
)
def test_the_rate_of_the_backbone(
    models: dict[str, DeformableDETR], lr_backbone: float | None, pretrained: bool, expected: float
) -> None:
    config = OptimConfig(lr=1e-3, lr_backbone=lr_backbone)
    rates = {g["name"]: g["lr"] for g in parameter_groups(models["base"], config, backbone_pretrained=pretrained)}
    assert rates == {"rest": 1e-3, "backbone": pytest.approx(expected), "linear_proj": pytest.approx(1e-4)}


def test_a_wholly_frozen_backbone_leaves_no_empty_group(models: dict[str, DeformableDETR]) -> None:
    with torch.device("meta"):
        model = DeformableDETR(num_classes=91, freeze_backbone="all")
    assert {g["name"] for g in parameter_groups(model, OptimConfig(), backbone_pretrained=True)} == {
        "rest",
        "linear_proj",
    }


def test_the_table_names_every_group_and_what_is_frozen(models: dict[str, DeformableDETR]) -> None:
    groups = parameter_groups(models["base"], OptimConfig(), backbone_pretrained=True)
    lines = describe_groups(groups, models["base"])
    assert [line.split()[0] for line in lines] == ["rest", "backbone", "linear_proj", "frozen"]
    frozen = sum(p.numel() for p in models["base"].parameters() if not p.requires_grad)
    assert f"{frozen:,} parameters" in lines[-1]
    assert "lr 2e-05  weight decay 0.0001" in lines[1]


@pytest.mark.parametrize(
    "options", [{"layer_decay": 0.5}, {"decay_norms": False}, {"layer_decay": 0.5, "decay_norms": False}]
)
@pytest.mark.parametrize("name", ["base", "two_stage"])
def test_finer_groups_still_hold_every_trainable_parameter_once(
    models: dict[str, DeformableDETR], name: str, options: dict[str, Any]
) -> None:
    groups = parameter_groups(models[name], OptimConfig(**options), backbone_pretrained=True)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in models[name].parameters() if parameter.requires_grad]
    assert len(grouped) == len(set(grouped)) == len(trainable)
    assert set(grouped) == set(trainable)
    assert len({group["name"] for group in groups}) == len(groups)


def test_each_stage_of_the_backbone_has_its_rate() -> None:
    """layer_decay is a factor a stage, counted from the last; nothing else changes."""
    with torch.device("meta"):
        model = DeformableDETR(num_classes=91, freeze_backbone="norm")
    config = OptimConfig(lr=1e-3, lr_backbone=1e-4, layer_decay=0.5)
    groups = parameter_groups(model, config, backbone_pretrained=True)
    rate_of = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    halvings = {"conv1": 4, "layer1": 3, "layer2": 2, "layer3": 1, "layer4": 0}
    for name, parameter in model.named_parameters():
        expected = 1e-4 if "sampling_offsets" in name or "reference_points" in name else 1e-3
        if name.startswith("backbone.0.body."):
            expected = 1e-4 * 0.5 ** halvings[name.split(".")[3]]
        assert rate_of[id(parameter)] == pytest.approx(expected), name
    lines = describe_groups(groups, model)
    assert [line.split()[0] for line in lines] == ["rest", *(f"backbone.stage{s}" for s in range(5)), "linear_proj"]
    assert "lr 0.0001 " in lines[5]


@pytest.mark.parametrize(
    ("backbone", "first", "last"),
    [
        ("resnet50", ("conv1", 0), ("layer4", 4)),
        ("regnetx_002", ("stem.bn", 0), ("s4", 4)),
        ("convnext_tiny", ("stages_0", 0), ("stages_3", 3)),
        ("swin_tiny_patch4_window7_224", ("patch_embed", 0), ("layers_3", 3)),
        ("efficientnet_b0", ("conv_stem", 0), ("blocks.6", 4)),
    ],
)
def test_stages_of_other_backbones(backbone: str, first: tuple[str, int], last: tuple[str, int]) -> None:
    """timm names the modules of each family in another way; every parameter has a stage, and they do not descend."""
    with torch.device("meta"):
        model = Backbone(backbone, 3)
    stages = model.stages()
    names = [name for name, _ in model.named_parameters()]
    assert stages.keys() == set(names)
    for part, stage in (first, last):
        assert {stages[name] for name in names if name.startswith(f"body.{part}.")} == {stage}
    modules = list(dict.fromkeys(name.split(".")[1] for name in names))
    in_order = [max(stages[name] for name in names if name.split(".")[1] == module) for module in modules]
    assert in_order == sorted(in_order)


def test_norms_without_weight_decay_are_the_norms_alone(models: dict[str, DeformableDETR]) -> None:
    """As detectron2 and with it detrex: scales and shifts of norms, while other biases keep their decay."""
    groups = parameter_groups(models["two_stage"], OptimConfig(decay_norms=False), backbone_pretrained=True)
    decay_of = {id(parameter): group["weight_decay"] for group in groups for parameter in group["params"]}
    for name, parameter in models["two_stage"].named_parameters():
        if parameter.requires_grad:
            is_norm = any(part in name for part in (".norm1.", ".norm2.", ".norm3.", "_norm.")) or (
                name.startswith("input_proj.") and name.split(".")[2] == "1"
            )
            assert decay_of[id(parameter)] == (0.0 if is_norm else 1e-4), name
    assert [group["name"] for group in groups] == ["rest", "rest.norms", "backbone", "linear_proj"]


def rates_of(config: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> list[float]:
    """The rate of every step, as the module's scheduler sets it."""
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": 1.0}], config)
    factor = lr_factor(config, steps_per_epoch=steps_per_epoch, total_steps=total_steps)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    rates = []
    for _ in range(total_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_the_step_schedule_is_the_official_one() -> None:
    """StepLR, stepped once per epoch."""
    config, steps_per_epoch, epochs = OptimConfig(lr_drop=2), 3, 5
    official = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.StepLR(official, config.lr_drop)
    expected = []
    for _ in range(epochs):
        expected += [official.param_groups[0]["lr"]] * steps_per_epoch
        official.step()
        scheduler.step()
    assert rates_of(config, steps_per_epoch=steps_per_epoch, total_steps=15) == pytest.approx(expected)


def test_warmup_rises_evenly_to_the_full_rate() -> None:
    rates = rates_of(OptimConfig(warmup_steps=4), steps_per_epoch=10, total_steps=10)
    assert rates == pytest.approx([0.25, 0.5, 0.75, *[1.0] * 7])


def test_cosine_falls_to_a_hundredth() -> None:
    rates = rates_of(OptimConfig(schedule="cosine"), steps_per_epoch=10, total_steps=100)
    assert rates[0] == 1.0
    assert rates[50] == pytest.approx(0.505)
    assert rates == sorted(rates, reverse=True)
    assert lr_factor(OptimConfig(schedule="cosine"), steps_per_epoch=10, total_steps=100)(100) == pytest.approx(0.01)
    assert all(math.isfinite(rate) and rate > 0 for rate in rates)


def test_sgd_has_momentum() -> None:
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], OptimConfig(sgd=True))
    assert isinstance(optimizer, torch.optim.SGD)
    assert optimizer.defaults["momentum"] == 0.9


def test_adamw_has_pytorchs_own_betas() -> None:
    optimizer = build_optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))]}], OptimConfig())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (optimizer.defaults["betas"], optimizer.defaults["eps"]) == ((0.9, 0.999), 1e-8)


@pytest.mark.parametrize(
    "wrong", [{"lr": -1.0}, {"lr": math.nan}, {"clip_max_norm": -0.1}, {"warmup_steps": -1}, {"lr_drop": 0}]
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(InputError, match=f"{next(iter(wrong))} must be at least"):
        OptimConfig(**wrong)


@pytest.mark.parametrize("factor", [0.0, 1.5, -1.0, math.nan])
def test_a_layer_decay_that_is_none_is_refused(factor: float) -> None:
    with pytest.raises(InputError, match="layer_decay must lie in"):
        OptimConfig(layer_decay=factor)

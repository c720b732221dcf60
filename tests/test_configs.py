"""Every YAML in configs/ goes through the real parser and makes the model that it describes."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddetr.bench.convergence.sides import SIDES
from ddetr.cli.main import train_command
from ddetr.cli.parser import Parser
from ddetr.datasets import build_transform
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig
from ddetr.engine.freeze import freeze_parameters
from ddetr.engine.optimizer import parameter_groups
from ddetr.models.auxiliary import PREFIX, attach_auxiliary
from ddetr.models.backbones import find_start
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.settings import flat

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def read(config: Path) -> Any:
    parser = Parser("train", "")
    train_command(parser)
    return parser.read(["--config", str(config), "--data", "x"])


def test_there_are_configs() -> None:
    assert CONFIGS


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_it_makes_a_model(config: Path) -> None:
    settings = read(config)
    arguments = vars(settings.model) | {"pretrained_backbone": False, "num_classes": 91}  # weights would be fetched
    if settings.model.freeze_backbone is None and settings.model.pretrained_backbone:
        arguments["freeze_backbone"] = "stem"
    with torch.device("meta"):
        model = DeformableDETR(**arguments)
    freeze_parameters(model, settings.optim.freeze)
    assert parameter_groups(model, settings.optim, backbone_pretrained=settings.model.pretrained_backbone)
    assert isinstance(settings.loss, LossWeights)
    assert build_criterion(model, settings.loss).weight_dict
    assert isinstance(settings.optim, OptimConfig)
    assert isinstance(settings.data, DataConfig)
    for is_train in (True, False):
        build_transform(settings.data.augmentation, train=is_train, image_size=settings.data.image_size)
    assert settings.batch_size % settings.device_batch_size == 0, "the last turn of a step would be smaller"


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_what_it_sets_arrives(config: Path) -> None:
    settings = read(config)
    for name, value in yaml.safe_load(config.read_text()).items():
        found = getattr(settings, name)
        values = (
            {field.name: getattr(found, field.name) for field in fields(found)}
            if hasattr(found, "__dataclass_fields__")
            else found
        )
        if isinstance(value, dict):
            values = values if isinstance(values, dict) else vars(values)
            assert {key: values[key] for key in value} == value
        else:
            assert values == value


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_its_header_holds_its_command(config: Path) -> None:
    header = re.match(r"(#.*\n)+", config.read_text())
    assert header, "say in a comment at the top what the file claims: what it is, what it costs, its command"
    assert f"ddetr train --config configs/{config.relative_to(ROOT / 'configs')}" in header[0]


@pytest.mark.parametrize("name", ["swin", "convnext", "vit"])
def test_the_other_sizes_that_a_header_names_have_weights(name: str) -> None:
    config = ROOT / "configs" / f"{name}.yaml"
    backbones = re.findall(r"^#   \S+ +--model\.backbone (\S+)$", config.read_text(), re.MULTILINE)
    assert len(backbones) >= 2
    assert read(config).model.backbone == backbones[0]
    for backbone in backbones:
        assert find_start(backbone, True).is_fetched


# The official code's values, whether a file spells them out or leaves them to the defaults.
PAPER = yaml.safe_load("""
model: {backbone: resnet50, pretrained_backbone: true, position_embedding: sine, hidden_dim: 256, nheads: 8, enc_layers:
    6,
  dec_layers: 6, dim_feedforward: 1024, dropout: 0.1, num_queries: 300, enc_n_points: 4, dec_n_points: 4, aux_loss:
      true}
loss: {cls_loss_coef: 2.0, bbox_loss_coef: 5.0, giou_loss_coef: 2.0, focal_alpha: 0.25,
  set_cost_class: 2.0, set_cost_bbox: 5.0, set_cost_giou: 2.0}
optim: {lr: 0.0002, lr_backbone: 0.00002, lr_linear_proj_mult: 0.1, layer_decay: 1.0, freeze: [], weight_decay: 0.0001,
  decay_norms: true, clip_max_norm: 0.1, schedule: step, lr_drop: 40, warmup_steps: 0, sgd: false, ema_decay: null}
data: {augmentation: official, image_size: 800, keep_empty: true, mosaic: 0.0, mixup: 0.0, scale_jitter: 0.0,
  color_jitter: 0.0, blur: 0.0}
run: {epochs: 50, batch_size: 32, precision: "32", seed: 42, max_detections: 100, val_every: 1, patience: null, weights:
null} """)
# (feature levels, DC5, refinement, two-stage) of each row, and its exact number of trained parameters
ROWS = {
    "deformable_detr_r50_single_scale": (1, False, False, False, 33_844_193),
    "deformable_detr_r50_single_scale_dc5": (1, True, False, False, 33_844_193),
    "deformable_detr_r50": (4, False, False, False, 39_847_265),
    "deformable_detr_r50_plus_iterative_bbox_refinement": (4, False, True, False, 40_627_260),
    "deformable_detr_r50_plus_plus_two_stage": (4, False, True, True, 40_959_129),
}


def trained_model(settings: Any, num_classes: int) -> DeformableDETR:
    """The network as `train` makes it, without its weights."""
    freeze = settings.model.freeze_backbone or "stem"
    arguments = {"num_classes": num_classes, "pretrained_backbone": False, "freeze_backbone": freeze}
    with torch.device("meta"):
        model = DeformableDETR(**vars(settings.model) | arguments)
    freeze_parameters(model, settings.optim.freeze)
    return model


@pytest.mark.parametrize("name", ROWS)
def test_a_published_row_is_trained_as_published(name: str) -> None:
    settings = read(ROOT / "configs" / f"{name}.yaml")
    for group, values in PAPER.items():
        found = settings if group == "run" else getattr(settings, group)
        assert {key: getattr(found, key) for key in values} == values
    *variant, num_parameters = ROWS[name]
    model = settings.model
    assert [model.num_feature_levels, model.dilation, model.with_box_refine, model.two_stage] == variant
    parameters = trained_model(settings, 91).parameters()
    assert sum(parameter.numel() for parameter in parameters if parameter.requires_grad) == num_parameters


def test_the_strong_recipe_trains_what_detrex_trains() -> None:
    """Of ResNet-50 all but the stem, with fixed batch norms; one rate for the backbone and one for the rest."""
    settings = read(ROOT / "configs" / "strong.yaml")
    model = trained_model(settings, 80)
    frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == {"backbone.0.body.conv1.weight"}
    assert not any("bn" in name for name, _ in model.named_parameters())
    groups = parameter_groups(model, settings.optim, backbone_pretrained=True)
    rates = {"rest": 1e-4, "rest.norms": 1e-4, "backbone": 1e-5, "linear_proj": 1e-4}
    assert {group["name"]: group["lr"] for group in groups} == pytest.approx(rates)
    assert [group["weight_decay"] for group in groups] == [1e-4, 0.0, 1e-4, 1e-4]
    # 375,000 steps of which 300,000 have the full rate, to half an epoch
    images_with_objects = 117_266
    steps_per_epoch = images_with_objects // settings.batch_size
    assert abs(settings.epochs * steps_per_epoch - 375_000) < steps_per_epoch / 2
    assert abs(settings.optim.lr_drop * steps_per_epoch - 300_000) < steps_per_epoch / 2


@pytest.mark.parametrize(("name", "num_parameters", "more"), [
    ("fast", 40_959_129, set()),
    ("small_data", 40_959_129, set()),
    # 12 feed-forward parts of 1024 * 513 more numbers, and 300 contents of 256
    ("fast_ffn2048", 40_959_129 + 12 * 1024 * 513 + 300 * 256, {"query_embed.weight"}),
])  # fmt: skip
def test_what_trains_beside_the_network_is_not_in_it(name: str, num_parameters: int, more: set[str]) -> None:
    """A recipe that converges faster publishes the weights of the paper's network; the schedule fits the epochs."""
    settings = read(ROOT / "configs" / f"{name}.yaml")
    published = trained_model(read(ROOT / "configs" / "deformable_detr_r50_plus_plus_two_stage.yaml"), 91)
    settings.model.freeze_backbone = "stem"  # the same count of trained parameters as in the paper
    model = trained_model(settings, 91)
    assert model.state_dict().keys() - published.state_dict().keys() == more
    assert not published.state_dict().keys() - model.state_dict().keys()
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == num_parameters
    attach_auxiliary(model, settings.auxiliary)
    assert any(name.startswith(PREFIX) for name in model.state_dict()), "it trains beside the network, not in it"
    assert settings.optim.lr_drop < settings.epochs or settings.optim.schedule == "cosine"


def test_the_side_fast_of_a_comparison_is_the_recipe() -> None:
    """But for the one-to-many route, which gained nothing on small data (benchmarks/results/)."""
    recipe = flat(yaml.safe_load((ROOT / "configs" / "fast.yaml").read_text()))
    side = SIDES["fast"].options
    assert {name: recipe[name] for name in side} == {**side, "auxiliary.one_to_many": recipe["auxiliary.one_to_many"]}

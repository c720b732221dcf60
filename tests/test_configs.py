"""Every YAML in configs/ goes through the real parser and makes the model that it describes."""

import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ddetr.cli import train_command
from ddetr.datasets import build_transform
from ddetr.engine.config import DataConfig, OptimConfig
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.parser import Parser

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

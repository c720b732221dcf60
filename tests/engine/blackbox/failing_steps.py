"""Steps that fail, and what they leave: for the tests beside this file."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.datasets import load_annotations
from ddetr.datasets.config import DataConfig
from ddetr.engine.blackbox.bundle import FOLDER
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion


class Spoiled(torch.nn.Module):
    """A module whose output gets a NaN in one element."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Tensor:
        output = self.module(*args).clone()
        output[0, 0] = float("nan")
        return output


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def break_backward(module: torch.nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args: BadGradient.apply(original(*args))


def spoil_pixels(monkeypatch: pytest.MonkeyPatch, image_ids: set[int]) -> None:
    """The images come as floats, these with one NaN."""
    from ddetr.datasets.dataset import DetectionDataset

    original = DetectionDataset.__getitem__

    def spoiled(self: DetectionDataset, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = original(self, index)
        if self.train:
            image = image.float()
            if int(target["image_id"]) in image_ids:
                image[0, 3, 5] = float("nan")
        return image, target

    monkeypatch.setattr(DetectionDataset, "__getitem__", spoiled)


def a_step(
    shapes: Path, tiny_model: dict[str, Any], **options: Any
) -> tuple[DeformableDETR, SetCriterion, list, float]:
    """A model and a batch of two micro-batches."""
    torch.manual_seed(0)
    annotations = load_annotations(shapes, "train")
    config = DataConfig(str(shapes), augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(annotations, annotations, config, batch_size=4, device_batch_size=2, seed=1)
    data.trainer = type("One", (), {"world_size": 1, "global_rank": 0})
    model = DeformableDETR(**tiny_model | {"num_classes": 3} | options)
    return model, build_criterion(model), next(iter(data.train_dataloader())), 9.0


def bundles_of(run: Path) -> list[Path]:
    """The bundles of a run, oldest step first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if (path / "bundle.json").is_file())

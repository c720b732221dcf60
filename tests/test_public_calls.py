"""Calls that articles and other people's code are written with: exactly these lines."""

from pathlib import Path

import torch

ARGS = {
    "num_classes": 3,
    "backbone": "resnet18",
    "pretrained_backbone": False,
    "hidden_dim": 32,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 32,
    "num_queries": 10,
}


def test_the_model() -> None:
    from ddetr.models.deformable_detr import DeformableDETR, build_model

    args = ARGS
    model, criterion, postprocessors = build_model(args)
    assert isinstance(model, DeformableDETR)
    outputs = model(torch.rand(1, 3, 128, 128))
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    assert criterion.total(criterion(outputs, targets)).isfinite()
    (found,) = postprocessors["bbox"](outputs, torch.tensor([[128, 128]]))
    assert set(found) == {"scores", "labels", "boxes"}


def test_the_data_set(shapes: Path) -> None:
    from ddetr.datasets.coco import build_coco_dataset

    dataset = build_coco_dataset("val", {"coco_path": str(shapes)})
    image, target = dataset[0]
    assert image.shape[0] == 3
    assert len(target["boxes"]) == len(target["labels"])

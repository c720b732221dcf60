"""Labels and boxes make the round trip: annotation -> transform -> target, and -> criterion, post-processing,
evaluation."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2

from ddetr.boxes import box_cxcywh_to_xyxy, box_iou, box_xywh_to_xyxy, box_xyxy_to_cxcywh
from ddetr.datasets.annotations import ImageRecord
from ddetr.datasets.config import DataConfig
from ddetr.datasets.dataset import DetectionDataset, seeded
from ddetr.datasets.splits import load_splits
from ddetr.datasets.transforms import build_transform
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.preflight.data import perfect_outputs
from ddetr.inference.detections import Detections

SEEDS = range(6)
PIXELS = 0.5  # that a box may move on its way to and fro: rounding
MARKER_PIXELS = 3.0  # the same for a box painted into an image, which is resized with it

SetUp = tuple[DetectionModule, DetectionData]


class _Numbered(Sequence[ImageRecord]):
    """The same images with the number of each object in place of its label: shows which objects a transform keeps."""

    def __init__(self, images: Sequence[ImageRecord]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageRecord:
        record = self.images[index]
        return replace(record, labels=np.arange(len(record.labels), dtype=np.int64))


def numbered(dataset: DetectionDataset) -> DetectionDataset:
    other = copy.copy(dataset)
    other.annotations = replace(dataset.annotations, images=_Numbered(dataset.annotations.images))
    return other


@pytest.fixture(params=["official", "plain", "none"])
def training_set(request: pytest.FixtureRequest, oblong: Path) -> DetectionDataset:
    train, _ = load_splits(DataConfig(str(oblong)))
    return DetectionDataset(train, build_transform(request.param, train=True, image_size=64), normalize=False)


def test_augmented_targets_have_their_objects_labels_and_boxes_inside(training_set: DetectionDataset) -> None:
    numbers = numbered(training_set)
    num_objects = 0
    for index, record in enumerate(training_set.annotations.images):
        for seed in SEEDS:
            image, target = training_set[index, seed]
            _, same = numbers[index, seed]
            assert target["labels"].tolist() == record.labels[same["labels"].numpy()].tolist()
            assert torch.equal(target["boxes"], same["boxes"])
            assert target["image_id"].item() == record.image_id
            assert tuple(target["size"].tolist()) == image.shape[1:]
            assert (target["boxes"][:, 2:] > 0).all()
            corners = box_cxcywh_to_xyxy(target["boxes"])
            assert ((corners > -1e-5) & (corners < 1 + 1e-5)).all()
            num_objects += len(corners)
    assert num_objects >= 36


def pixels_off(dataset: DetectionDataset, record: ImageRecord, number: int, seed: int) -> float | None:
    """How far the box of an object is from the white rectangle that was painted in its place, after the transform.

    None where the transform left too little of it to be measured. `dataset` is `numbered`.
    """
    left, top, right, bottom = record.boxes_xyxy[number].round().astype(int).tolist()
    image = torch.zeros(3, *record.size_hw, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 255
    with seeded(seed):
        shown, target = dataset.augmented(replace(record, labels=np.arange(len(record.labels))), image)
    boxes = target["boxes"][target["labels"] == number]
    shown = shown.float().mean(0)
    bright = shown > 127
    if not len(boxes) or float(boxes[0, 2:].min()) < 0.08 or bright.all() or not bright.any():
        return None
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    size = torch.tensor([shown.shape[1], shown.shape[0]] * 2)
    return float((box_cxcywh_to_xyxy(boxes[0]) * size - seen).abs().max())


def all_pixels_off(dataset: DetectionDataset) -> list[float]:
    images, dataset = dataset.annotations.images, numbered(dataset)
    measured = [pixels_off(dataset, record, number, seed) for record in images for number in range(3) for seed in SEEDS]
    return [off for off in measured if off is not None]


def test_a_painted_marker_moves_with_its_box(training_set: DetectionDataset) -> None:
    measured = all_pixels_off(training_set)
    assert len(measured) >= 60
    assert max(measured) <= MARKER_PIXELS


@pytest.mark.parametrize("what", ["image alone", "boxes alone"])
def test_the_marker_shows_a_flip_of_one_without_the_other(oblong: Path, what: str) -> None:
    """The measurement itself: image and boxes transformed differently are far apart."""
    train, _ = load_splits(DataConfig(str(oblong)))
    original, flip = build_transform("none", train=True, image_size=64), v2.RandomHorizontalFlip(1.0)

    def transform(image: Any, target: dict[str, Any]) -> Any:
        image, target = original(image, target)
        flipped_image, flipped = flip(image, target)
        return (flipped_image, target) if what == "image alone" else (image, flipped)

    measured = all_pixels_off(DetectionDataset(train, transform, normalize=False))
    assert np.mean(np.array(measured) > MARKER_PIXELS) > 0.5


def test_validation_targets_come_back_as_the_annotations(set_up: Callable[..., SetUp]) -> None:
    """Labels, ids, names and boxes in pixels of the original, from post-processing of perfect predictions."""
    module, data = set_up()
    dataset = data.val_set
    categories = dataset.annotations.categories
    assert categories == module.evaluator.annotations.categories == data.train_set.categories
    for index, record in enumerate(dataset.annotations.images):
        _, target = dataset[index]
        outputs = perfect_outputs([target], len(target["labels"]), len(categories))
        detected = module.postprocess(outputs, target["orig_size"][None])[0]
        found = list(Detections.from_labels(detected, categories, record.size_hw))[: len(record.labels)]
        assert [(one.label, one.category_id, one.name) for one in found] == [
            (label, categories[label].category_id, categories[label].name) for label in record.labels.tolist()
        ]
        assert np.abs(np.array([one.box_xyxy for one in found]) - record.boxes_xyxy).max() <= PIXELS


def test_predictions_of_the_annotation_have_no_loss(set_up: Callable[..., SetUp]) -> None:
    """The criterion reads boxes as the annotations mean them, whatever the transform made of the image's size."""
    module, data = set_up()
    for index, record in enumerate(data.val_set.annotations.images):
        _, target = data.val_set[index]
        height, width = record.size_hw
        boxes = box_xyxy_to_cxcywh(torch.tensor(record.boxes_xyxy)) / torch.tensor([width, height] * 2)
        annotated = {"labels": torch.tensor(record.labels), "boxes": boxes}
        count = len(record.labels)
        losses = module.criterion(perfect_outputs([annotated], count, 3), [target], float(count))
        assert float(losses["loss_bbox"]) < 0.02
        assert float(losses["loss_ce"]) < 0.01


def test_the_evaluation_finds_every_object_under_its_own_image_and_id(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    for batch in data.val_dataloader():
        module.evaluate(batch, lambda *_, targets=batch[2]: perfect_outputs(targets, 12, 3), module.evaluator)
    records = data.val_set.annotations.images
    assert module.evaluator.state()["image_ids"].tolist() == [record.image_id for record in records]
    results = [result for result in module.evaluator.coco_results() if result["score"] > 0.5]
    for record in records:
        found = [result for result in results if result["image_id"] == record.image_id]
        assert len(found) == len(record.labels)
        ids = {category.category_id: label for label, category in enumerate(data.val_set.categories)}
        boxes_xyxy = box_xywh_to_xyxy(torch.tensor([result["bbox"] for result in found]))
        overlaps: Tensor = box_iou(torch.tensor(record.boxes_xyxy), boxes_xyxy)
        place = overlaps.argmax(1)
        assert overlaps.amax(1).min() > 0.95
        assert [ids[found[i]["category_id"]] for i in place.tolist()] == record.labels.tolist()
    assert pytest.approx(1, abs=1e-9) == module.evaluator.compute().AP

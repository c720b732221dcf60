"""Preflight, the data's half: training images can be read, and the ground truth as predictions has AP 1 in the run's
own evaluation."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ddetr.datasets import Annotations, DetectionDataset
from ddetr.datasets.dataset import ReadableImages, readable
from ddetr.engine.loading.datamodule import DetectionData, collate_micro
from ddetr.engine.module import DetectionModule
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator

NUM_IMAGES = 8
SURE = (6.0, 3.0)  # logits of perfect predictions, first to last: far enough from each other to keep their order
ABSENT = -12.0

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, in words."""

    name: str
    status: Status
    expected: str
    found: str
    cause: str = ""  # the likely one
    next: str = ""  # what to look at next
    facts: dict[str, Any] = field(default_factory=dict)


def check_training_images(dataset: DetectionDataset, seed: int) -> Check:
    """A handful of images goes through the augmentation.

    Raises:
        InputError: an image cannot be read, and training would stop at it.
    """
    name, expected = "training images", "images that can be read, with objects"
    skips, dataset = dataset.on_error != "raise", copy.copy(dataset)
    dataset.on_error = "raise"  # no other image may stand in for a damaged one here
    places = images_with_objects(dataset.annotations)
    num_objects = num_read = 0
    for index in places:
        try:
            num_objects += len(dataset[index, seed][1]["labels"])
        except InputError:
            if not skips:
                raise
            continue  # training reports it, and goes on
        num_read += 1
    if not places:
        return Check(name, "warning", expected, "none of the training images looked at has an object")
    return Check(name, "ok", expected, f"{num_objects} objects in {num_read} images")


def check_evaluation(module: DetectionModule, data: DetectionData, num_queries: int) -> Check:
    """The ground truth as perfect predictions, through the run's own validation step and evaluator."""
    name, expected = "evaluation", "AP 1.000 for the ground truth given as predictions"
    dataset, evaluator = data.val_set, module.evaluator
    annotations = dataset.annotations
    images = ReadableImages(dataset) if data.survives_bad_images else dataset
    places = images_with_objects(annotations, crowded=True)
    if not places:
        return Check(name, "warning", expected, "no validation image has an object: AP is undefined")
    num_classes = len(annotations.categories)
    fresh = CocoEvaluator(evaluator.annotations, evaluator.max_detections, evaluator.backend)
    for start in range(0, len(places), data.device_batch_size):
        chunk = places[start : start + data.device_batch_size]
        samples, _ = readable(images[index] for index in chunk)  # the others are in no number, as in validation
        if not samples:
            continue
        [batch] = collate_micro(samples, len(samples))
        module.evaluate(batch, lambda *_, targets=batch[2]: perfect_outputs(targets, num_queries, num_classes), fresh)
    metrics = fresh.compute(partial=True)
    records = [annotations.images[index] for index in places]
    facts = {"AP": metrics.AP, "images": [record.image_id for record in records]}
    if metrics.AP > 0.9995:
        return Check(name, "ok", expected, f"AP {metrics.AP:.3f} over {len(places)} images", facts=facts)
    low = [row.name for row in metrics.per_class if row.AP < 0.9995]
    found = f"AP {metrics.AP:.3f} over {len(places)} images; below 1: {', '.join(low[:5])}"
    most, limit = max(records, key=lambda r: int((~r.ignore).sum())), evaluator.max_detections
    count = int((~most.ignore).sum())
    if count > min(limit, num_queries):
        option = "--max_detections" if limit < num_queries else "--model.num_queries"
        cause = (
            f"image {most.image_id} has {count} objects: {limit} detections count, and the model has {num_queries} "
            "queries"
        )
        return Check(name, "warning", expected, found, cause, f"a larger {option}", facts)
    return Check(name, "failed", expected, found, "", "the validation annotations: `ddetr data audit`", facts)


def images_with_objects(annotations: Annotations, *, crowded: bool = False) -> list[int]:
    """Indices of a handful of images with objects, spread over the split; with `crowded` the fullest one among them."""
    total = len(annotations.images)

    def count(index: int) -> int:
        return int((~annotations.images[index].ignore).sum())

    spread = (
        np.unique(np.linspace(0, total - 1, min(total, 16 * NUM_IMAGES)).round().astype(int)).tolist() if total else []
    )
    having = [index for index in spread if count(index)]
    chosen = [
        having[i] for i in np.unique(np.linspace(0, len(having) - 1, min(len(having), NUM_IMAGES)).round().astype(int))
    ]
    if crowded and total and count(fullest := max(range(total), key=count)) and fullest not in chosen:
        chosen.append(fullest)
    return chosen


def perfect_outputs(targets: Sequence[dict[str, Tensor]], num_queries: int, num_classes: int) -> dict[str, Tensor]:
    """The outputs of a model that finds exactly these objects: one query each, as far as queries go."""
    logits = torch.full((len(targets), max(num_queries, 1), num_classes), ABSENT)
    boxes = torch.full((len(targets), max(num_queries, 1), 4), 0.5)
    for row, target in enumerate(targets):
        count = min(len(target["labels"]), num_queries)
        labels = target["labels"][:count].cpu().clamp(0, num_classes - 1)
        logits[row, torch.arange(count), labels] = torch.linspace(*SURE, count)
        boxes[row, :count] = target["boxes"][:count].cpu()
    return {"pred_logits": logits, "pred_boxes": boxes}

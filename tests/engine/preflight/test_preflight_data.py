"""Preflight, the data's half: images that cannot be read, and evaluations that cannot reach AP 1."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from preflight_parts import SetUp, looked_at, statuses
from torchvision.transforms import v2

from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.postprocess import PostProcess


@pytest.mark.parametrize(
    ("changes", "advice"), [({"max_detections": 2}, "--max_detections"), ({"num_queries": 2}, "--model.num_queries")]
)
def test_more_objects_than_can_be_found_is_a_warning(
    set_up: Callable[..., SetUp], changes: dict[str, Any], advice: str
) -> None:
    checks = looked_at(set_up(**changes))
    assert statuses(checks) == {"evaluation": "warning"}
    assert "has 3 objects" in checks["evaluation"].cause
    assert advice in checks["evaluation"].next


def shifted(transform: Callable) -> Callable:
    def wrong(image: Any, target: dict[str, Any]) -> Any:
        image, target = transform(image, target)
        return image, {**target, "labels": (target["labels"] + 1) % 3}

    return wrong


@pytest.mark.parametrize("fault", ["labels", "flip", "sizes", "ids"])
def test_an_evaluation_below_1_fails(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """Whatever the reason: labels shifted, images mirrored, height and width swapped, detections of another image."""
    module, data = set_up()
    if fault == "labels":
        data.val_set.transform = shifted(data.val_set.transform)
    elif fault == "flip":
        data.val_set.transform = v2.Compose([data.val_set.transform, v2.RandomHorizontalFlip(1.0)])
    elif fault == "sizes":
        forward = PostProcess.forward
        monkeypatch.setattr(PostProcess, "forward", lambda self, out, sizes: forward(self, out, sizes.flip(1)))
    else:
        update = CocoEvaluator.update
        monkeypatch.setattr(CocoEvaluator, "update", lambda self, ids, found: update(self, ids, found[::-1]))
    check = looked_at((module, data), max_seconds=0.0)["evaluation"]
    assert check.status == "failed"
    assert "below 1: " in check.found


def test_a_data_set_that_cannot_be_read_is_a_failed_check(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    data.train_set = copy.copy(data.train_set)
    data.train_set.transform = lambda *_: 1 / 0
    check = looked_at((module, data))["training images"]
    assert check.status == "failed"
    assert "ZeroDivisionError" in check.found


def test_a_damaged_image_is_a_failed_check_unless_training_skips_it(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    record = data.train_set.annotations.images[5]  # not among those of the batch that is learnt
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[:200])
    try:
        data.train_set.on_error = "raise"
        check = looked_at((module, data), max_seconds=0.0)["training images"]
        data.train_set.on_error = "skip"
        skipping = looked_at((module, data), max_seconds=0.0)["training images"]
    finally:
        record.path.write_bytes(whole)
    assert check.status == "failed"
    assert record.path.name in check.found
    assert skipping.status == "ok"
    assert "in 5 images" in skipping.found


def test_a_split_without_objects_is_a_warning(set_up: Callable[..., SetUp]) -> None:
    """It can be meant: nothing can be learnt from it, and no AP is defined."""
    module, data = set_up()
    for dataset in (data.train_set, data.val_set):
        nothing = [replace(record, ignore=np.ones_like(record.ignore)) for record in dataset.annotations.images]
        dataset.annotations = replace(dataset.annotations, images=nothing)
    assert statuses(looked_at((module, data))) == dict.fromkeys(
        ["training images", "evaluation", "learning"], "warning"
    )

"""What a validation leaves: the same when read back, and the same numbers."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_validation import make_found, make_objects, make_validation

from ddetr.datasets.annotations import Annotations, ImageTable
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.report import RunFiles, Validation, best_or_last


def test_a_validation_reads_back_the_same(tmp_path: Path) -> None:
    paths = [tmp_path / "ä b.jpg", tmp_path / os.fsdecode(b"\xff.jpg"), tmp_path / "c\nd.jpg"]
    objects = make_objects((0, [1, 2, 3, 4], 1), (2, [1, 2, 9.5, 4], 0), ignored=[1])
    found = make_found((1, [0.1, 0.2, 0.3, 0.4], 1, 0.123456789))
    validation = make_validation(["a", "b"], paths, objects, found)
    validation.save(tmp_path / "validation_last.npz")
    read = best_or_last(tmp_path)
    assert read is not None
    assert read.paths == paths
    assert (read.step, read.epoch, read.threshold) == (3, 0, 0.3)
    assert read.categories == validation.categories
    for ours, theirs in zip((*objects, *found, validation.image_ids), (*read.objects, *read.found, read.image_ids)):
        np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_allclose(read.curves, validation.curves, atol=1e-6)


def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "validation_best.npz"
    with pytest.raises(InputError, match="there is no"):
        Validation.load(path)
    make_validation(["a"], [tmp_path / "a.jpg"], make_objects(), make_found()).save(path)
    content = path.read_bytes()
    for damaged in (b"", b"nonsense", content[: len(content) // 2]):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="can't be read"):
            Validation.load(path)
    assert best_or_last(tmp_path) is None
    path.write_bytes(content)
    assert best_or_last(tmp_path).paths == [tmp_path / "a.jpg"]


def test_an_empty_validation_reads_back(tmp_path: Path) -> None:
    make_validation([], [], make_objects(), make_found()).save(tmp_path / "validation_best.npz")
    assert best_or_last(tmp_path).paths == []


def test_what_training_left_gives_the_metrics_of_training(tiny_run: Any) -> None:
    """The file holds all that the metrics were made from: evaluated again, it gives the AP of the run."""
    validation = RunFiles.read(tiny_run.path).detections
    objects, found = validation.objects, validation.found
    table = ImageTable(
        image_ids=validation.image_ids,
        paths=[str(path) for path in validation.paths],
        sizes_hw=validation.sizes_hw,
        image_index=objects.image,
        boxes_xyxy=objects.boxes_xyxy,
        labels=objects.labels,
        area=objects.area,
        ignore=objects.ignore,
    )
    evaluator = CocoEvaluator(Annotations("again", "coco", validation.categories, table))
    num_images = len(validation.image_ids)
    evaluator.merge(
        [
            {
                "image_ids": validation.image_ids,
                "num_detections": np.bincount(found.image, minlength=num_images),
                "num_non_finite": np.zeros(num_images, np.int64),
                "boxes_xywh": found.boxes_xywh,
                "scores": found.scores,
                "labels": found.labels,
            }
        ]
    )
    again = evaluator.compute()
    best = RunFiles.read(tiny_run.path).metrics["best"]
    assert best["AP"] > 0.1
    assert math.isclose(again.AP, best["AP"], abs_tol=1e-9)
    assert [row.APs for row in again.per_class] == pytest.approx(
        [row["APs"] for row in best["per_class"]], abs=1e-9, nan_ok=True
    )
    assert all(path.is_file() and path.is_absolute() for path in validation.paths)

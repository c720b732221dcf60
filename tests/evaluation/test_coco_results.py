"""COCO's results format: short, exact, and the same metrics when read back."""

import json
from pathlib import Path

import numpy as np
import pytest
from made_detections import (
    INSTALLED,
    as_detections,
    assert_equals_pycocotools,
    coco_json,
    empty_objects,
    ids_of,
    make_annotations,
    make_detections,
    pycocotools_eval,
)

from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.evaluation.evaluator import CocoEvaluator


def from_coco_results(annotations: Annotations, results: list[dict]) -> dict:
    """The metrics of what a file in COCO's format holds."""
    label_of = {category.category_id: label for label, category in enumerate(annotations.categories)}
    ids = list(dict.fromkeys(result["image_id"] for result in results))
    assert [result["image_id"] for result in results] == sorted(result["image_id"] for result in results)
    evaluator = CocoEvaluator(annotations)
    evaluator.merge(
        [
            {
                "image_ids": np.array(ids),
                "num_detections": np.array([sum(result["image_id"] == i for result in results) for i in ids]),
                "num_non_finite": np.zeros(len(ids), np.int64),
                "boxes_xywh": np.array([result["bbox"] for result in results], np.float32),
                "scores": np.array([result["score"] for result in results], np.float32),
                "labels": np.array([label_of[result["category_id"]] for result in results]),
            }
        ]
    )
    return evaluator.compute().to_dict()


def test_saved_predictions_give_the_same_numbers(tmp_path):
    annotations = make_annotations()
    detections = make_detections(annotations)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids_of(annotations), detections)
    results = evaluator.coco_results()
    assert {result["category_id"] for result in results} <= {c.category_id for c in annotations.categories}
    saved = tmp_path / "predictions.json"
    saved.write_text(json.dumps(results))
    assert from_coco_results(annotations, json.loads(saved.read_text())) == evaluator.compute().to_dict()
    if "pycocotools" in INSTALLED:
        evaluation = pycocotools_eval(coco_json(annotations), json.loads(saved.read_text()))
        assert_equals_pycocotools(evaluator.compute(), evaluation)


def test_results_are_short_and_exact():
    boxes = [[0.1, 0.2, 100.3, 50.4]]
    record = ImageRecord(7, Path("a.jpg"), (100, 200), *empty_objects())
    evaluator = CocoEvaluator(Annotations("one", "coco", (Category(1, "a"), Category(5, "b")), [record], ()))
    evaluator.update([7], [as_detections(boxes, [0.9], [1])])
    (result,) = evaluator.coco_results()
    assert result == {"image_id": 7, "category_id": 5, "bbox": pytest.approx([0.1, 0.2, 100.2, 50.2]), "score": 0.9}
    assert max(len(str(value)) for value in result["bbox"]) <= 10

"""Truth and detections made at random, and pycocotools' numbers of them."""

import contextlib
import importlib.util
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator

MODULES = {name: modules[0].split(".")[0] for name, modules in BACKENDS.items()}
INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]
needs_pycocotools = pytest.mark.skipif("pycocotools" not in INSTALLED, reason="pycocotools, the reference, is missing")
every_backend = pytest.mark.parametrize("backend", INSTALLED)


def make_annotations(num_images=40, num_classes=6, seed=0, crowds=True) -> Annotations:
    """Random boxes of all three sizes; some crowds; some images without objects; category ids with gaps."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num_images):
        n = int(rng.integers(0, 12)) if i % 5 else 0
        height, width = int(rng.integers(200, 500)), int(rng.integers(200, 500))
        top_left = rng.uniform(0, [width - 12, height - 12], (n, 2))
        size = np.exp(rng.uniform(np.log(8), np.log(250), (n, 2)))
        bottom_right = np.minimum(top_left + size, [width, height])
        boxes_xyxy = np.concatenate([top_left, bottom_right], axis=1).astype(np.float32)
        area = (bottom_right - top_left).prod(axis=1) * rng.uniform(0.5, 1, n)  # a mask's, smaller than the box
        labels = rng.integers(0, num_classes - 1, n)  # the last class has no objects
        ignore = (rng.random(n) < 0.15) & crowds
        path = Path(f"{i}.jpg")
        record = ImageRecord(10 * i + 3, path, (height, width), boxes_xyxy, labels, area.astype(np.float32), ignore)
        images.append(record)
    categories = tuple(Category(7 * label + 2, f"class {label}") for label in range(num_classes))
    return Annotations("synthetic", "coco", categories, images, ())


def make_detections(annotations: Annotations, seed=1, per_image=60):
    """Objects shifted a little, with some wrong classes, doubles and boxes anywhere; scores with ties."""
    rng = np.random.default_rng(seed)
    num_classes = len(annotations.categories)
    detections = []
    for record in annotations.images:
        height, width = record.size_hw
        n = len(record.labels)
        side = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2])[:, [0, 1, 0, 1]]
        near = [record.boxes_xyxy + side * rng.normal(0, noise, (n, 4)) for noise in (0.03, 0.15)]
        corners = rng.uniform(0, 1, (per_image, 2, 2)) * [width, height]
        anywhere = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
        boxes = np.concatenate([*near, anywhere])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.concatenate([record.labels, record.labels, rng.integers(0, num_classes, per_image)])
        labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(0, num_classes, len(labels)), labels)
        scores = np.concatenate([rng.uniform(0.2, 1, 2 * n), rng.uniform(0, 0.5, per_image)])
        scores = np.where(rng.random(len(scores)) < 0.3, scores.round(1), scores)
        detections.append(as_detections(boxes, scores, labels))
    return detections


def as_detections(boxes_xyxy, scores, labels) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.as_tensor(np.array(boxes_xyxy), dtype=torch.float32).reshape(-1, 4),
        "scores": torch.as_tensor(np.array(scores), dtype=torch.float32),
        "labels": torch.as_tensor(np.array(labels), dtype=torch.int64),
    }


def truth_as_detections(annotations: Annotations) -> list[dict[str, torch.Tensor]]:
    kept = [~record.ignore for record in annotations.images]
    return [
        as_detections(record.boxes_xyxy[keep], np.ones(int(keep.sum())), record.labels[keep])
        for record, keep in zip(annotations.images, kept)
    ]


def ids_of(annotations: Annotations) -> list[int]:
    return [record.image_id for record in annotations.images]


def compute(annotations, detections, **options):
    evaluator = CocoEvaluator(annotations, **options)
    evaluator.update(ids_of(annotations), detections)
    return evaluator.compute()


def coco_json(annotations: Annotations) -> dict:
    """Written out here on its own, so that the evaluator's way of handing over the truth is tested too."""
    objects = []
    for record in annotations.images:
        for box, label, area, ignore in zip(record.boxes_xyxy, record.labels, record.area, record.ignore):
            x0, y0, x1, y1 = (float(value) for value in box)
            category_id = annotations.categories[label].category_id
            entry = {"image_id": record.image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            objects.append({**entry, "id": len(objects) + 1, "area": float(area), "iscrowd": int(ignore)})
    return {
        "info": {},
        "images": [{"id": r.image_id, "height": r.size_hw[0], "width": r.size_hw[1]} for r in annotations.images],
        "categories": [{"id": c.category_id, "name": c.name} for c in annotations.categories],
        "annotations": objects,
    }


def pycocotools_eval(truth: dict, results: list[dict]):
    """pycocotools as its own demo uses it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def exact_results(annotations, detections) -> list[dict]:
    """Detections in COCO's format without any rounding, by other means than the package's."""
    results = []
    for image_id, one in zip(ids_of(annotations), detections):
        for box, score, label in zip(one["boxes"].double(), one["scores"].double(), one["labels"]):
            x0, y0, x1, y1 = box.tolist()
            category_id = annotations.categories[label].category_id
            entry = {"image_id": image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            results.append({**entry, "score": score.item()})
    return results


def assert_equals_pycocotools(metrics, evaluation) -> None:
    expected = [math.nan if value == -1 else value for value in evaluation.stats]
    assert list(metrics.numbers().values()) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    precision = evaluation.eval["precision"]  # (10, 101, K, 4, 3)
    for index, category_id in enumerate(evaluation.params.catIds):
        row = next(row for row in metrics.per_class if row.category_id == category_id)
        of_class = precision[:, :, index, 0, -1]
        expected_row = (
            [math.nan] * 3 if of_class.max() == -1 else [of_class.mean(), of_class[0].mean(), of_class[5].mean()]
        )
        of_row = [getattr(row, name) for name in ("AP", "AP50", "AP75")]
        assert of_row == pytest.approx(expected_row, abs=1e-6, nan_ok=True)


def read_truth(truth: dict) -> Annotations:
    categories = tuple(Category(category["id"], category["name"]) for category in truth["categories"])
    label_of = {category.category_id: label for label, category in enumerate(categories)}
    images = []
    for image in truth["images"]:
        objects = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        boxes_xywh = np.array([entry["bbox"] for entry in objects]).reshape(-1, 4)
        boxes_xyxy = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        labels = np.array([label_of[entry["category_id"]] for entry in objects], np.int64)
        area = np.array([entry["area"] for entry in objects], np.float32)
        ignore = np.array([entry.get("iscrowd", 0) for entry in objects], bool)
        size_hw = (image["height"], image["width"])
        path = Path(image["file_name"])
        images.append(ImageRecord(image["id"], path, size_hw, boxes_xyxy.astype(np.float32), labels, area, ignore))
    return Annotations("coco", "coco", categories, images, ())


def empty_objects():
    return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)

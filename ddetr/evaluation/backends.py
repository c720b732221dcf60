"""COCO's evaluators behind one function: hotcoco, faster-coco-eval, pycocotools, whose numbers are the same.

Images and classes go by their positions, so that no data set's own ids can be repeated, negative or strings.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np

from ddetr.errors import InputError
from ddetr.evaluation.overlaps import Found, Objects

__all__ = ["BACKENDS", "Backend"]

logger = logging.getLogger(__name__)

# name for the user: (module of COCO, module of COCOeval, class of COCOeval), fastest first
BACKENDS = {
    "hotcoco": ("hotcoco", "hotcoco", "COCOeval"),
    "faster-coco-eval": ("faster_coco_eval", "faster_coco_eval", "COCOeval_faster"),
    "pycocotools": ("pycocotools.coco", "pycocotools.cocoeval", "COCOeval"),
}


class Backend:
    """One of the evaluators.

    Args:
        name: "auto" (the first that is installed) or one of `BACKENDS`.
    """

    def __init__(self, name: str = "auto"):
        self.name, self.coco_class, self.eval_class = _load(name)

    def accumulate(
        self, objects: Objects, found: Found, num_images: int, num_classes: int, max_dets: Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """precision (10 IoUs, 101 recalls, K, 4 areas, 3 limits) and recall (10, K, 4, 3); -1 is undefined.

        `max_dets` are the three limits on detections per image and class.
        """
        if not num_images or not num_classes:
            return np.full((10, 101, num_classes, 4, 3), -1.0), np.full((10, num_classes, 4, 3), -1.0)
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
            truth, detected = self.load(objects, found, num_images, num_classes)
            evaluation = self.eval_class(truth, detected, iouType="bbox")
            evaluation.params.imgIds = list(range(1, num_images + 1))
            evaluation.params.catIds = list(range(num_classes))
            evaluation.params.maxDets = list(max_dets)
            evaluation.evaluate()
            evaluation.accumulate()
            result = evaluation.eval
        return np.asarray(result["precision"]), np.asarray(result["recall"])

    def load(self, objects: Objects, found: Found, num_images: int, num_classes: int) -> tuple[Any, Any]:
        """The library's own objects of truth and detections."""
        images = [{"id": i} for i in range(1, num_images + 1)]
        categories = [{"id": label, "name": str(label)} for label in range(num_classes)]
        objects_xyxy = objects.boxes_xyxy.astype(np.float64)
        objects_xywh = np.concatenate([objects_xyxy[:, :2], objects_xyxy[:, 2:] - objects_xyxy[:, :2]], axis=1)
        found_xywh = found.boxes_xywh.astype(np.float64)
        truth = {
            "image_ids": objects.image + 1,
            "category_ids": objects.labels,
            "boxes": objects_xywh,
            "area": objects.area.astype(np.float64),
            "iscrowd": objects.ignore.astype(np.int64),
        }
        if hasattr(self.coco_class, "from_arrays"):  # hotcoco: no object of Python's for each box
            coco = self.coco_class.from_arrays(images, categories, **truth)
            columns = (found.image + 1, found_xywh, found.scores.astype(np.float64), found.labels)
            return coco, coco.load_res(np.column_stack(columns))
        detected = {
            "image_ids": found.image + 1,
            "category_ids": found.labels,
            "boxes": found_xywh,
            "area": found_xywh[:, 2] * found_xywh[:, 3],
            "iscrowd": np.zeros(len(found.labels), np.int64),
            "score": found.scores.astype(np.float64),
        }
        return self._of_rows(images, categories, truth), self._of_rows(images, categories, detected)

    def _of_rows(self, images: list[Any], categories: list[Any], columns: dict[str, np.ndarray]) -> Any:
        names = [
            "id",
            *({"image_ids": "image_id", "category_ids": "category_id", "boxes": "bbox"}.get(c, c) for c in columns),
        ]
        rows = zip(range(1, len(columns["area"]) + 1), *(column.tolist() for column in columns.values()))
        coco = self.coco_class()
        annotations = [dict(zip(names, row)) for row in rows]
        coco.dataset = {"info": {}, "images": images, "categories": categories, "annotations": annotations}
        coco.createIndex()
        return coco


def _load(backend: str) -> tuple[str, type, type]:
    if backend != "auto" and backend not in BACKENDS:
        raise InputError(f"Unknown evaluation backend {backend!r}: expected auto, {', '.join(BACKENDS)}.")
    for name in BACKENDS if backend == "auto" else (backend,):
        coco_module, eval_module, eval_class = BACKENDS[name]
        try:
            coco = importlib.import_module(coco_module)
            return name, coco.COCO, getattr(importlib.import_module(eval_module), eval_class)
        except ImportError as error:
            logger.debug("%s is not usable: %s", name, error)
    if backend == "auto":
        raise InputError(f"Evaluation needs one of {', '.join(BACKENDS)}, and none is installed: pip install hotcoco")
    raise InputError(f"The evaluation backend {backend} is not installed: pip install {backend}, or use auto.")

"""COCO's results format: a JSON list with an object a detection, the form that every COCO evaluator reads.

Numbers are written with the digits that a float32 has and no more (0.1, not 0.10000000149), so that a file read back is
the same to the last bit and evaluates to the same metrics.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.errors import InputError

__all__ = ["coco_results", "read_coco_results"]


def coco_results(
    image_id: int, boxes_xywh: np.ndarray, scores: np.ndarray, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The k detections of an image: boxes_xywh (k, 4) and scores (k,), float32, and the data set's own category ids."""
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(category_ids, _as_decimals(boxes_xywh), _as_decimals(scores), strict=True)
    ]


def read_coco_results(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a file in COCO's results format, for `CocoEvaluator.update_coco_results`, which checks them."""
    try:
        results = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read the predictions {path}: {error.strerror or error}.") from error
    except ValueError as error:
        raise InputError(f"Expected JSON in {path}: {error}.") from error
    if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
        raise InputError(f"Expected a list of objects in {path} (COCO's results format), got {type(results).__name__}.")
    return results


def _as_decimals(values: np.ndarray) -> list[Any]:
    return values.astype(np.float32).astype(str).astype(np.float64).tolist()

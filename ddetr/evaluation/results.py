"""COCO's results format: a JSON list with an object per detection, the form that every COCO evaluator reads.

Numbers are written with the digits that a float32 has and no more (0.1, not 0.10000000149), so that a file read back is
the same to the last bit and evaluates to the same metrics.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["coco_results"]


def coco_results(
    image_id: int, boxes_xywh: np.ndarray, scores: np.ndarray, category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """The k detections of an image: boxes_xywh (k, 4) and scores (k,), float32, and the data set's own category ids."""
    return [
        {"image_id": image_id, "category_id": category_id, "bbox": box, "score": score}
        for category_id, box, score in zip(category_ids, _as_decimals(boxes_xywh), _as_decimals(scores), strict=True)
    ]


def _as_decimals(values: np.ndarray) -> list[Any]:
    return values.astype(np.float32).astype(str).astype(np.float64).tolist()

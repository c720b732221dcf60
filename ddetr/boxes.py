"""Box formats and overlaps: the only place where boxes are converted.

`boxes` alone means (cx, cy, w, h) relative to the image, in [0, 1]; every other format says so in its name:
`boxes_xyxy` is (left, top, right, bottom), `boxes_xywh` is (left, top, width, height).
"""

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "box_cxcywh_to_xyxy",
    "box_iou",
    "box_xywh_to_xyxy",
    "box_xyxy_to_cxcywh",
    "box_xyxy_to_xywh",
    "generalized_iou",
    "relative_boxes",
]


def box_cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """(..., 4) centre form to corner form, in the same unit."""
    return _converted(boxes, "cxcywh", "xyxy")


def box_xyxy_to_cxcywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corner form to centre form, in the same unit."""
    return _converted(boxes_xyxy, "xyxy", "cxcywh")


def relative_boxes(boxes_xyxy: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(n, 4) corner form in pixels of an image of (h, w) to `boxes`; numpy, which is quicker for a few boxes."""
    low, high = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    sides = np.array([size_hw[1], size_hw[0]] * 2, dtype=boxes_xyxy.dtype)
    return np.concatenate([(low + high) / 2, high - low], axis=1) / sides


def box_xywh_to_xyxy(boxes_xywh: Tensor) -> Tensor:
    """(..., 4) COCO's own form (left, top, width, height) to corner form, in the same unit."""
    return _converted(boxes_xywh, "xywh", "xyxy")


def box_xyxy_to_xywh(boxes_xyxy: Tensor) -> Tensor:
    """(..., 4) corner form to COCO's own form (left, top, width, height), in the same unit."""
    return _converted(boxes_xyxy, "xyxy", "xywh")


def _converted(boxes: Tensor, before: str, after: str) -> Tensor:
    from torchvision.ops import box_convert  # here, since it takes seconds, and `ddetr train --help` has no use for it

    return box_convert(boxes, before, after)


def box_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """(T, 4), (Q, 4) -> (T, Q) intersection over union."""
    from torchvision.ops import box_iou as pairwise

    return pairwise(boxes1_xyxy, boxes2_xyxy)


def generalized_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """Generalised IoU (arXiv:1902.09630) of boxes that broadcast against each other: (..., 4), (..., 4) -> (...).

    Pairwise (T, Q) values come from shapes (T, 1, 4) and (1, Q, 4); torchvision's pairwise function takes no batch,
    and its loss adds an epsilon to the areas that is not small beside small relative boxes. In [-1, 1]; two boxes
    without any extent give 0 or less instead of NaN.
    """
    intersection, union = _intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    hull_wh = torch.maximum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:]) - torch.minimum(
        boxes1_xyxy[..., :2], boxes2_xyxy[..., :2]
    )
    hull = hull_wh.clamp(min=0).prod(-1).clamp(min=torch.finfo(boxes1_xyxy.dtype).tiny)
    return intersection / union - (hull - union) / hull


def broadcast_iou(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> Tensor:
    """IoU of boxes that broadcast against each other: (..., 4), (..., 4) -> (...), in [0, 1]."""
    intersection, union = _intersection_and_union(boxes1_xyxy, boxes2_xyxy)
    return intersection / union


def _intersection_and_union(boxes1_xyxy: Tensor, boxes2_xyxy: Tensor) -> tuple[Tensor, Tensor]:
    top_left = torch.maximum(boxes1_xyxy[..., :2], boxes2_xyxy[..., :2])
    bottom_right = torch.minimum(boxes1_xyxy[..., 2:], boxes2_xyxy[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = _area(boxes1_xyxy) + _area(boxes2_xyxy) - intersection
    return intersection, union.clamp(min=torch.finfo(union.dtype).tiny)


def _area(boxes_xyxy: Tensor) -> Tensor:
    return (boxes_xyxy[..., 2:] - boxes_xyxy[..., :2]).prod(-1)

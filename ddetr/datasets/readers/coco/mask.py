"""COCO masks to the boxes around them: polygons, and run lengths (RLE) plain or compressed. No mask is drawn: a few
bytes can stand for gigabytes of pixels. And boxes that lie elsewhere than their masks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.box_form import corners_of, numbers_of

_MAX_DIGITS = 6  # of a compressed run length, 5 bits each: longer than any image has pixels

# A box contradicts its mask that reaches out of it by so many pixels where they overlap less than that (intersection
# over union). One that is larger alone does not: it may have been drawn around what is hidden too.
_REACH_PX, _OVERLAP = 3.0, 0.7
_FEW, _SHARE = 5, 0.2  # boxes that do, and that part of all, are no mistakes of their own
_CLEARER = 20  # times fewer of them do if the masks are read otherwise, or the boxes
_MOST_EQUAL = 2  # masks; more of one place stand for no object's


def box_of_mask(segmentation: Any, size_hw: tuple[int, int] | None = None) -> np.ndarray | None:
    """(4,) xywh around a COCO segmentation; None where it is empty, none, or runs of an image of another size than
    `size_hw`."""
    try:
        if isinstance(segmentation, dict):
            height, width = (int(side) for side in segmentation["size"])
            if size_hw is not None and (height, width) != tuple(size_hw):
                return None
            return _box_of_runs(segmentation["counts"], height, width)
        if segmentation and not isinstance(segmentation[0], list):
            segmentation = [segmentation]  # one polygon, not in a list of its own
        points = np.concatenate([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
        with np.errstate(over="ignore", invalid="ignore"):
            return np.concatenate([points.min(axis=0), np.ptp(points, axis=0)])
    except (TypeError, ValueError, OverflowError, KeyError, IndexError):
        return None


def _box_of_runs(counts: Any, height: int, width: int) -> np.ndarray | None:
    """Run lengths count pixels down the columns, from the left one on: first of background, then of the object, and so
    on in turn."""
    lengths = _decompressed(counts) if isinstance(counts, str) else np.array(counts, dtype=np.float64)
    if min(height, width) < 1 or not height * width < 2**53 or lengths.ndim != 1:
        return None
    if not ((lengths >= 0) & (lengths == np.floor(lengths))).all() or lengths.sum() != height * width:
        return None
    ends = np.cumsum(lengths.astype(np.int64))
    starts, stops = ends[:-1:2], ends[1::2]
    starts, lasts = starts[stops > starts], stops[stops > starts] - 1
    if not len(starts):
        return None
    x1, x2 = starts[0] // height, lasts[-1] // height + 1
    if (starts // height < lasts // height).any():  # from one column into the next: through its end and its beginning
        y1, y2 = 0, height
    else:
        y1, y2 = (starts % height).min(), (lasts % height).max() + 1
    return np.array([x1, y1, x2 - x1, y2 - y1], dtype=np.float64)


def _decompressed(text: str) -> np.ndarray:
    """(n,) lengths of runs. Each is written in characters of 5 bits above 48, the lowest first, 32 added to all but the
    last, whose highest bit is the sign; from the fourth on it is the difference to the one two before.

    Raises:
        ValueError: it is none of this.
    """
    digits = np.frombuffer(text.encode("latin-1"), dtype=np.uint8).astype(np.int64) - 48
    is_last = digits < 32
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or not is_last[-1]:
        raise ValueError
    firsts = np.concatenate([[0], np.flatnonzero(is_last)[:-1] + 1])
    sizes = np.diff(np.concatenate([firsts, [len(digits)]]))
    if sizes.max() > _MAX_DIGITS:
        raise ValueError
    shifts = 5 * (np.arange(len(digits)) - np.repeat(firsts, sizes))
    lengths = np.add.reduceat((digits & 31) << shifts, firsts)
    lengths -= np.where(digits[is_last] & 16, np.int64(1) << (5 * sizes), 0)
    for start in (1, 2):
        lengths[start::2] = np.cumsum(lengths[start::2])
    return lengths


def check_masks(
    boxes_xyxy: np.ndarray, masks_xyxy: np.ndarray, sizes_hw: np.ndarray, where: Callable[[int], str], log: FindingLog
) -> None:
    """Reports boxes that lie elsewhere than their masks.

    Masks that are not in pixels of their images (stale ones of images that were resized, fractions) say nothing.

    Args:
        boxes_xyxy: (n, 4) in pixels, read as COCO's.
        masks_xyxy: (n, 4) corners around their masks, NaN where they can't be told.
        sizes_hw: (n, 2) of their images.
        where: the place of box i.
    """
    limits = sizes_hw[:, ::-1]
    with np.errstate(invalid="ignore"):
        judged = ((masks_xyxy[:, :2] >= -_REACH_PX) & (masks_xyxy[:, 2:] <= limits + _REACH_PX)).all(axis=1)
        judged &= (masks_xyxy[:, 2:] > np.maximum(masks_xyxy[:, :2], 2)).all(axis=1)
    places = np.flatnonzero(judged & np.isfinite(boxes_xyxy).all(axis=1))
    if len(places) <= (1 - _SHARE) * len(judged):
        return
    _, of_mask, counts = np.unique(masks_xyxy[places], axis=0, return_inverse=True, return_counts=True)
    places = places[counts[of_mask.reshape(-1)] <= _MOST_EQUAL]
    boxes, masks = boxes_xyxy[places], masks_xyxy[places]
    fewest = max(_FEW, _SHARE * len(places))
    differ, reach = _differ(boxes, masks)
    numbers = numbers_of(boxes, "xywh")
    forms = [f for f in ("xyxy", "cxcywh") if _are_clearer(differ, _differ(corners_of(numbers, f), masks)[0])]
    if differ.sum() < fewest or not forms:
        differ &= reach
    count = int(differ.sum())
    if not count:
        return
    first = int(places[np.flatnonzero(differ)[0]])
    said = f"{_shown(boxes_xyxy[first])} beside {_shown(masks_xyxy[first])} around the mask"
    if count < fewest:
        message = f"{count:,} of {len(places):,} boxes lie elsewhere than their masks, such as {said}: look at them."
        log.add("box-contradicts-mask", "note", where(first), message, count=count)
        return
    points = numbers.reshape(-1, 2, 2)
    of_numbers = np.concatenate([points.min(axis=1), points.max(axis=1)], axis=1)
    pairs = [(boxes, masks[:, [1, 0, 3, 2]]), (boxes, masks + np.tile(boxes[:, :2], 2)), (of_numbers, masks)]
    if not forms and any(_are_clearer(differ, _differ(*pair)[0]) for pair in pairs):
        return  # y before x, counted from the box, or the box's numbers as points: no masks, and the boxes are right
    cure = (
        f"They agree when the boxes are read by --data.boxes {forms[0]}"
        if forms
        else 'If the masks are right, take "bbox" out of the annotations: the box around the mask is used then'
    )
    message = (
        f"{count:,} of {len(places):,} boxes that were compared lie elsewhere than their own masks, such as {said}. "
        f"{cure}; if the boxes are right as they are, read them by --data.boxes xywh."
    )
    log.add("boxes-contradict-masks", "refused", where(first), message, count=count)


def _differ(boxes_xyxy: np.ndarray, masks_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of (n, 4) corners each: which lie in other places (n,) bool, and where the mask reaches out of the box (n,)."""
    low, high = np.maximum(boxes_xyxy[:, :2], masks_xyxy[:, :2]), np.minimum(boxes_xyxy[:, 2:], masks_xyxy[:, 2:])
    both = (high - low).clip(0).prod(axis=1)
    either = sum((c[:, 2:] - c[:, :2]).clip(0).prod(axis=1) for c in (boxes_xyxy, masks_xyxy)) - both
    outside = np.maximum(low - masks_xyxy[:, :2], masks_xyxy[:, 2:] - high).max(axis=1)
    apart = np.abs(boxes_xyxy - masks_xyxy).max(axis=1)
    return (apart > _REACH_PX) & (both < _OVERLAP * either), outside > _REACH_PX


def _are_clearer(differ: np.ndarray, otherwise: np.ndarray) -> bool:
    return bool(otherwise.sum() * _CLEARER <= differ.sum())


def _shown(corners: np.ndarray) -> str:
    return f"({', '.join(f'{value:g}' for value in corners.round(1))})"

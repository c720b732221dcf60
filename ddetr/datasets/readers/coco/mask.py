"""COCO masks to the boxes around them: polygons, and run lengths (RLE) plain or compressed. No mask is drawn: a few
bytes can stand for gigabytes of pixels."""

from __future__ import annotations

from typing import Any

import numpy as np

_MAX_DIGITS = 6  # of a compressed run length, 5 bits each: longer than any image has pixels


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

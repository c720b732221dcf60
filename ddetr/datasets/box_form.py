"""What the four numbers of a box mean: corners or sizes, pixels or fractions.

A form is "xyxy" (two corners), "xywh" (a corner and the size) or "cxcywh" (the centre and the size), in pixels, or with
"-relative" in fractions of the image. n boxes; sizes are (h, w).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.config import BoxForm

RELATIVE = "-relative"


def is_relative(form: BoxForm) -> bool:
    return form.endswith(RELATIVE)


def base(form: str) -> str:
    """The form without its unit."""
    return form.removesuffix(RELATIVE)


def corners_of(numbers: np.ndarray, form: BoxForm) -> np.ndarray:
    """(n, 4) numbers as written -> (n, 4) corners in the same unit."""
    start, other = numbers[:, :2], numbers[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):  # not finite then, which is reported
        if form.startswith("xywh"):
            return np.concatenate([start, start + other], axis=1)
        if form.startswith("cxcywh"):
            return np.concatenate([start - other / 2, start + other / 2], axis=1)
    return numbers


def numbers_of(boxes_xyxy: np.ndarray, form: BoxForm) -> np.ndarray:
    """(n, 4) corners -> the (n, 4) numbers that `corners_of` makes them of."""
    start, end = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    with np.errstate(over="ignore", invalid="ignore"):
        if form.startswith("xywh"):
            return np.concatenate([start, end - start], axis=1)
        if form.startswith("cxcywh"):
            return np.concatenate([(start + end) / 2, end - start], axis=1)
    return boxes_xyxy


def read_as(boxes_xyxy: np.ndarray, own: BoxForm, wanted: BoxForm) -> np.ndarray:
    """(n, 4) corners, read as the format's `own` form, read as the `wanted` one: (n, 4) corners, in fractions where it
    is relative."""
    if wanted == "auto" or base(wanted) == base(own):
        return boxes_xyxy
    return corners_of(numbers_of(boxes_xyxy, own), wanted)


def in_pixels(boxes_xyxy: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """(n, 4) corners in fractions of images of (n, 2) or (2,) sizes -> pixels."""
    sizes_hw = np.asarray(sizes_hw, dtype=np.float64).reshape(-1, 2)
    with np.errstate(over="ignore", invalid="ignore"):
        return boxes_xyxy * sizes_hw[:, [1, 0, 1, 0]]


def put_in_order(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, form: BoxForm, log: FindingLog, where: Callable[[int], str]
) -> np.ndarray:
    """The (n, 4) boxes in pixels with the smaller corner first, wherever that can't mean anything else.

    sizes_hw: (n, 2) or (2,) of their images. form: what the numbers are as written. `where(i)` names the place of box
    i.
    """
    if form.startswith("xyxy"):
        return _ordered_corners(boxes_xyxy, log, where)
    ordered, was_turned = turned(boxes_xyxy, sizes_hw)
    for i in np.flatnonzero(was_turned).tolist():
        numbers = ", ".join(f"{value:g}" for value in numbers_of(boxes_xyxy[i : i + 1], form)[0])
        message = f"The box ({numbers}) has a negative width or height: drawn from another corner, it was turned."
        log.add("negative-size", "repaired", where(i), message)
    return ordered


def turned(boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, slack: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Corners made of a place and a size: those of a negative size turned, if they lie in their image then, and which
    they are (n,). A size of -1 stands for none in many files: boxes of at most `slack` stay as they are."""
    negative = (boxes_xyxy[:, 2:] < boxes_xyxy[:, :2]).any(axis=1)
    if not negative.any():
        return boxes_xyxy, negative
    limits = np.asarray(sizes_hw, dtype=np.float64).reshape(-1, 2)[:, ::-1]
    low = np.minimum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    high = np.maximum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    with np.errstate(over="ignore", invalid="ignore"):  # what is not finite lies in no image
        negative &= ((low >= -slack) & (high <= limits + slack) & (high - low > slack)).all(axis=1)
    return np.where(negative[:, None], np.concatenate([low, high], axis=1), boxes_xyxy), negative


def _ordered_corners(boxes_xyxy: np.ndarray, log: FindingLog, where: Callable[[int], str]) -> np.ndarray:
    """The (n, 4) boxes with the smaller corner first; `where(i)` names the place of box i."""
    low = np.minimum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    high = np.maximum(boxes_xyxy[:, :2], boxes_xyxy[:, 2:])
    swapped = (boxes_xyxy[:, 2:] < boxes_xyxy[:, :2]).any(axis=1) & np.isfinite(boxes_xyxy).all(axis=1)
    for i in np.flatnonzero(swapped).tolist():
        numbers = ", ".join(f"{value:g}" for value in boxes_xyxy[i])
        message = f"The corners of the box ({numbers}) are swapped; the smaller numbers were taken as the first corner."
        log.add("swapped-corners", "repaired", where(i), message)
    return np.concatenate([low, high], axis=1)

"""A validation made by hand."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import Category
from ddetr.evaluation.overlaps import Found, Objects
from ddetr.report import Validation

Box = tuple[int, Sequence[float], Any]  # image, left top right bottom, and what follows


def make_objects(*rows: tuple[int, Sequence[float], int], ignored: Sequence[int] = ()) -> Objects:
    """(image, box, label) each; `ignored` are the numbers of those to be ignored."""
    boxes_xyxy = np.array([box for _, box, _ in rows], np.float32).reshape(-1, 4)
    ignore = np.zeros(len(rows), bool)
    ignore[list(ignored)] = True
    return Objects(
        np.array([image for image, _, _ in rows], np.int64),
        boxes_xyxy,
        np.array([label for _, _, label in rows], np.int64),
        (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1),
        ignore,
    )


def make_found(*rows: tuple[int, Sequence[float], int, float]) -> Found:
    """(image, box, label, score) each."""
    boxes_xyxy = np.array([box for _, box, _, _ in rows], np.float32).reshape(-1, 4)
    return Found(
        np.array([row[0] for row in rows], np.int64),
        np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1),
        np.array([row[3] for row in rows], np.float32),
        np.array([row[2] for row in rows], np.int64),
    )


def make_validation(names: Sequence[str], paths: Sequence[Path], objects: Objects, found: Found) -> Validation:
    """Images of 64 x 48 pixels, curves that fall."""
    return Validation(
        step=3,
        epoch=0,
        threshold=0.3,
        categories=tuple(Category(10 + label, name) for label, name in enumerate(names)),
        image_ids=np.arange(len(paths)) + 5,
        paths=list(paths),
        sizes_hw=np.tile([48, 64], (len(paths), 1)),
        objects=objects,
        found=found,
        curves=np.tile(np.linspace(1, 0, 101)[None, :, None], (2, 1, len(names))),
    )

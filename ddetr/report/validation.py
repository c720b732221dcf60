"""What a validation leaves for the report: truth and detections as flat arrays in one file of NumPy's.

Some 24 bytes per detection: COCO's validation set with 100 detections per image takes 13 MB.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.arrays import read_arrays
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.metrics import Metrics
from ddetr.evaluation.overlaps import Found, Objects
from ddetr.files import write_atomically
from ddetr.printable import one_line
from ddetr.report.signature import is_signed, signed
from ddetr.untrusted import MAX_CLASSES, MAX_PAIRS, parse_json

BEST_FILE, LAST_FILE = "validation_best.npz", "validation_last.npz"
_OBJECTS = {"image": np.int32, "boxes_xyxy": np.float32, "labels": np.int32, "area": np.float32, "ignore": bool}
_FOUND = {"image": np.int32, "boxes_xywh": np.float32, "scores": np.float32, "labels": np.int32}
_COLUMNS = ("about", "image_ids", "paths", "sizes_hw", "curves")
_COLUMNS += (*(f"object_{name}" for name in _OBJECTS), *(f"found_{name}" for name in _FOUND))
_WIDE = {np.int32: np.int64}


@dataclass(frozen=True)
class Validation:
    """I images with their n objects and k detections, and the K classes."""

    step: int
    epoch: int
    threshold: float  # the score of the best F1; 0.5 where none finds anything
    categories: tuple[Category, ...]
    image_ids: np.ndarray  # (I,)
    paths: list[Path]  # I, absolute
    sizes_hw: np.ndarray  # (I, 2)
    objects: Objects
    found: Found
    curves: np.ndarray  # (2, 101, K) precision at IoU 0.5 and 0.75 over recall, -1 where undefined
    is_own: bool = True  # computed by this user's ddetr; of a file: signed so

    @classmethod
    def of(cls, evaluator: CocoEvaluator, metrics: Metrics, *, step: int, epoch: int) -> Validation:
        """What `evaluator` holds, after it has computed `metrics`."""
        image_ids, objects, found = evaluator.gathered()
        images = evaluator.images
        order = np.argsort(images.image_ids, kind="stable")
        order = order[np.isin(images.image_ids[order], image_ids)]
        num_classes = len(evaluator.annotations.categories)
        return cls(
            step=step,
            epoch=epoch,
            threshold=0.5 if math.isnan(metrics.threshold) else metrics.threshold,
            categories=tuple(evaluator.annotations.categories),
            image_ids=image_ids,
            paths=[images.path(i).absolute() for i in order.tolist()],
            sizes_hw=images.sizes_hw[order],
            objects=objects,
            found=found,
            curves=np.full((2, 101, num_classes), -1.0) if metrics.curves is None else metrics.curves,
        )

    def save(self, path: Path) -> None:
        """Whole or not at all."""
        about = {
            "step": self.step,
            "epoch": self.epoch,
            "threshold": self.threshold,
            "categories": [[category.category_id, category.name] for category in self.categories],
        }
        paths = b"\0".join(os.fsencode(path) for path in self.paths)  # a name is bytes, not always text, without zeros
        if self.is_own:
            about["signature"] = signed(paths)
        columns: dict[str, Any] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "image_ids": self.image_ids,
            "paths": np.frombuffer(paths, np.uint8),
            "sizes_hw": self.sizes_hw.astype(np.int32),
            "curves": self.curves.astype(np.float32),
        }
        columns |= {f"object_{name}": getattr(self.objects, name).astype(kind) for name, kind in _OBJECTS.items()}
        columns |= {f"found_{name}": getattr(self.found, name).astype(kind) for name, kind in _FOUND.items()}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **columns)

        write_atomically(path, write)

    @classmethod
    def load(cls, path: Path) -> Validation:
        """What `save` wrote.

        Raises:
            InputError: no such file, or a damaged one.
        """
        try:
            columns = read_arrays(path, _COLUMNS)
            about = parse_json(columns["about"].tobytes().decode("utf-8"), "about")
            names = columns["paths"].tobytes().split(b"\0") if len(columns["image_ids"]) else []
            objects = Objects(*(columns[f"object_{n}"].astype(_WIDE.get(k, k)) for n, k in _OBJECTS.items()))
            found = Found(*(columns[f"found_{n}"].astype(_WIDE.get(k, k)) for n, k in _FOUND.items()))
            validation = cls(
                step=int(about["step"]),
                epoch=int(about["epoch"]),
                threshold=float(about["threshold"]),
                categories=tuple(Category(int(number), str(name)) for number, name in about["categories"]),
                image_ids=columns["image_ids"],
                paths=[Path(os.fsdecode(name)) for name in names],
                sizes_hw=columns["sizes_hw"],
                objects=objects,
                found=found,
                curves=columns["curves"],
                is_own=is_signed(columns["paths"].tobytes(), about.get("signature")),
            )
            validation._check()
        except FileNotFoundError as error:
            raise InputError(f"there is no {path}") from error
        except Exception as error:  # a damaged zip file raises anything
            reason = getattr(error, "strerror", None) or error
            raise InputError(f"{path} can't be read ({type(error).__name__}: {reason})") from error
        return validation

    def _check(self) -> None:
        """ValueError where the parts do not fit each other: the file may come from anybody."""
        num_images, num_classes = len(self.image_ids), len(self.categories)
        wrong = []
        if len(self.paths) != num_images or self.sizes_hw.shape != (num_images, 2) or (self.sizes_hw < 1).any():
            wrong.append("images")
        if num_classes > MAX_CLASSES or self.curves.shape != (2, 101, num_classes) or not math.isfinite(self.threshold):
            wrong.append("classes")
        for what, rows, boxes in (("objects", self.objects, "boxes_xyxy"), ("detections", self.found, "boxes_xywh")):
            number = len(rows.image)
            shapes_fit = all(getattr(rows, n).shape == ((number, 4) if n == boxes else (number,)) for n in rows._fields)
            if not shapes_fit or not np.isfinite(getattr(rows, boxes)).all():
                wrong.append(what)
            elif number and not (0 <= rows.image.min() <= rows.image.max() < num_images):
                wrong.append(f"images of the {what}")
            elif number and not (0 <= rows.labels.min() <= rows.labels.max() < num_classes):
                wrong.append(f"classes of the {what}")
        if not wrong:
            crowds = (np.bincount(rows.image, minlength=num_images) for rows in (self.objects, self.found))
            if math.prod(crowds).max(initial=0) > MAX_PAIRS:
                wrong.append("objects and detections of one image")
        if wrong:
            raise ValueError(f"its {wrong[0]} do not fit")

    def may_show(self, index: int, folders: Iterable[Path]) -> bool:
        """Whether the picture of an image may get into a page or a file that is passed on: the validation is this
        user's own, or the image lies in one of the folders, with links followed."""
        if self.is_own:
            return True
        try:
            place = self.paths[index].resolve()
            return any(place.is_relative_to(folder.resolve()) for folder in folders)
        except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
            return False

    def name(self, label: int) -> str:
        """Of a class, as people are shown it: never empty, on one line."""
        return one_line(self.categories[label].name) or f"class {label}"


def best_or_last(run: Path) -> Validation | None:
    """The best validation of a run that left its detections, otherwise the last; None where there is neither."""
    for name in (BEST_FILE, LAST_FILE):
        try:
            return Validation.load(run / name)
        except InputError:
            continue
    return None

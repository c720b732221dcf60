"""What a validation leaves for the report: truth and detections as flat arrays in one file of NumPy's.

Some 24 bytes per detection: COCO's validation set with 100 detections per image takes 13 MB.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.metrics import Metrics
from ddetr.evaluation.overlaps import Found, Objects
from ddetr.files import write_atomically

BEST_FILE, LAST_FILE = "validation_best.npz", "validation_last.npz"
_OBJECTS = {"image": np.int32, "boxes_xyxy": np.float32, "labels": np.int32, "area": np.float32, "ignore": bool}
_FOUND = {"image": np.int32, "boxes_xywh": np.float32, "scores": np.float32, "labels": np.int32}


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

    @classmethod
    def of(cls, evaluator: CocoEvaluator, metrics: Metrics, *, step: int, epoch: int) -> Validation:
        """What `evaluator` holds, after it has computed `metrics`."""
        image_ids, objects, found = evaluator.gathered()
        images = evaluator.images
        order = np.argsort(images.image_ids, kind="stable")
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
        columns: dict[str, Any] = {
            "about": np.frombuffer(json.dumps(about).encode(), np.uint8),
            "image_ids": self.image_ids,
            # A file's name is bytes, not always text; it has no zero byte.
            "paths": np.frombuffer(b"\0".join(os.fsencode(path) for path in self.paths), np.uint8),
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
            with path.open("rb") as raw, np.load(raw, allow_pickle=False) as file:
                columns = {name: file[name] for name in file.files}
            about = json.loads(columns["about"].tobytes())
            names = columns["paths"].tobytes().split(b"\0") if len(columns["image_ids"]) else []
            wide = {np.int32: np.int64}
            return cls(
                step=int(about["step"]),
                epoch=int(about["epoch"]),
                threshold=float(about["threshold"]),
                categories=tuple(Category(*category) for category in about["categories"]),
                image_ids=columns["image_ids"],
                paths=[Path(os.fsdecode(name)) for name in names],
                sizes_hw=columns["sizes_hw"],
                objects=Objects(*(columns[f"object_{n}"].astype(wide.get(k, k)) for n, k in _OBJECTS.items())),
                found=Found(*(columns[f"found_{n}"].astype(wide.get(k, k)) for n, k in _FOUND.items())),
                curves=columns["curves"],
            )
        except FileNotFoundError as error:
            raise InputError(f"there is no {path}") from error
        except Exception as error:  # a damaged zip file raises anything
            raise InputError(f"{path} can't be read ({type(error).__name__}: {error})") from error

    def name(self, label: int) -> str:
        """Of a class; never empty."""
        return self.categories[label].name or f"class {label}"


def best_or_last(run: Path) -> Validation | None:
    """The best validation of a run that left its detections, otherwise the last; None where there is neither."""
    for name in (BEST_FILE, LAST_FILE):
        try:
            return Validation.load(run / name)
        except InputError:
            continue
    return None

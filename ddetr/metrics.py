"""The numbers of an evaluation: COCO's twelve, a row a class, and the score threshold of the best F1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor
from torchvision.ops import box_area, box_iou

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["METRIC_NAMES", "ClassMetrics", "Metrics", "best_threshold", "match_detections"]

METRIC_NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")


@dataclass(frozen=True)
class ClassMetrics:
    """One row of the per-class table; fractions in [0, 1], NaN where the class has no objects."""

    label: int
    category_id: int
    name: str
    num_objects: int  # without ignore regions
    AP: float
    AP50: float
    AP75: float
    AR100: float


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve numbers as fractions in [0, 1], NaN where undefined.

    AR1, AR10 and AR100 allow 1, 10 and `max_detections` detections an image and class. `threshold` is the score
    threshold of the highest F1 (mean over classes, IoU 0.5), NaN where no threshold finds anything.
    """

    AP: float
    AP50: float
    AP75: float
    APs: float
    APm: float
    APl: float
    AR1: float
    AR10: float
    AR100: float
    ARs: float
    ARm: float
    ARl: float
    per_class: list[ClassMetrics] = field(repr=False)
    threshold: float
    f1: float
    num_images: int
    num_objects: int
    num_detections: int
    max_detections: int
    backend: str

    def numbers(self) -> dict[str, float]:
        """The twelve alone, by name, in COCO's order."""
        return {name: getattr(self, name) for name in METRIC_NAMES}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN becomes None, since JSON has no NaN."""
        return _without_nan(asdict(self))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metrics:
        """What `to_dict` made; other keys are left out."""
        rows = [ClassMetrics(**_with_nan(ClassMetrics, row)) for row in values["per_class"]]
        return cls(**{**_with_nan(cls, values), "per_class": rows})

    def render(self, per_class: bool = True) -> RenderableType:
        """Tables for `rich.print`: the twelve numbers and, unless switched off, a row a class."""
        from rich.console import Group
        from rich.table import Table

        tables = []
        for names in (METRIC_NAMES[:6], METRIC_NAMES[6:]):
            table = Table(*names)
            table.add_row(*(_shown(getattr(self, name)) for name in names))
            tables.append(table)
        tables[0].title = f"COCO metrics: {self.num_images} images, {self.num_objects} objects"
        tables[-1].caption = f"best F1 {_shown(self.f1)} at score threshold {_shown(self.threshold)}"
        if per_class:
            table = Table("class", title="Per class")
            for name in ("id", "objects", "AP", "AP50", "AP75", "AR100"):
                table.add_column(name, justify="right")
            for row in self.per_class:
                numbers = (_shown(number) for number in (row.AP, row.AP50, row.AP75, row.AR100))
                table.add_row(row.name, str(row.category_id), str(row.num_objects), *numbers)
            tables.append(table)
        return Group(*tables)


def best_threshold(
    scores: np.ndarray, labels: np.ndarray, correct: np.ndarray, num_objects: np.ndarray
) -> tuple[float, float]:
    """The score threshold, in steps of 0.01, with the highest F1, mean over the classes with objects; and that F1.

    Args:
        scores, labels, correct: (k,) all detections that count, with what `match_detections` says of them.
        num_objects: (K,) objects of each class.

    Returns NaN for the threshold where none finds anything, for both where there are no objects.
    """
    present = num_objects > 0
    if not present.any():
        return math.nan, math.nan
    thresholds = np.arange(1, 100) / 100
    f1 = np.zeros(len(thresholds))
    for i, threshold in enumerate(thresholds):
        kept = scores >= threshold
        num_found = np.bincount(labels[kept], minlength=len(num_objects))
        num_correct = np.bincount(labels[kept & correct], minlength=len(num_objects))
        f1[i] = (2 * num_correct[present] / (num_found + num_objects)[present]).mean()
    if f1.max() == 0:
        return math.nan, 0.0
    best = np.flatnonzero(f1 >= f1.max() - 1e-9)
    return float(thresholds[best[len(best) // 2]]), float(f1.max())  # the middle of equals: farthest from a change


def match_detections(
    boxes_xyxy: Tensor,
    scores: np.ndarray,
    labels: np.ndarray,
    objects_xyxy: Tensor,
    object_labels: np.ndarray,
    ignore: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Matches the k detections of an image with its n objects at IoU 0.5, for `best_threshold`.

    Correct is, of the detections that overlap an object most, the one of the highest score. COCO lets the others try
    the next object; for a threshold the difference is nothing, and this needs no loop over detections.

    Returns which detections count (k,), those in ignore regions do not, and which are correct (k,).
    """
    counts, correct = np.ones(len(labels), bool), np.zeros(len(labels), bool)
    same_class = labels[:, None] == object_labels[None]  # (k, n)
    if not same_class.any():
        return counts, correct
    iou = np.where(same_class, box_iou(boxes_xyxy, objects_xyxy).numpy(), 0.0)
    overlap = np.where(ignore, 0.0, iou)
    hits = np.flatnonzero(overlap.max(axis=1) >= 0.5)
    hits = hits[np.argsort(-scores[hits], kind="stable")]
    _, first = np.unique(overlap[hits].argmax(axis=1), return_index=True)
    correct[hits[first]] = True
    # COCO measures an ignore region by the part of the detection inside it: |A and B| = IoU (|A| + |B|) / (1 + IoU)
    area, object_area = box_area(boxes_xyxy).numpy()[:, None], box_area(objects_xyxy).numpy()[None]
    inside = iou * (area + object_area) / (1 + iou) / np.maximum(area, 1e-9)
    in_ignored = np.where(ignore, inside, 0.0).max(axis=1) >= 0.5
    return correct | ~in_ignored, correct


def _shown(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def _with_nan(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    return {field.name: math.nan if values[field.name] is None else values[field.name] for field in fields(kind)}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

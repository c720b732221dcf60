"""The numbers of an evaluation: COCO's twelve, a row per class, and the score threshold of the best F1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from ddetr.printable import one_line

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["METRIC_NAMES", "ClassMetrics", "Metrics", "best_threshold"]

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
    APs: float = math.nan  # of small, medium and large objects; files of older versions lack them
    APm: float = math.nan
    APl: float = math.nan


@dataclass(frozen=True)
class Metrics:
    """COCO's twelve numbers as fractions in [0, 1], NaN where undefined.

    AR1, AR10 and AR100 allow 1, 10 and `max_detections` detections per image and class. `threshold` is the score
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
    # (2, 101, K) precision at IoU 0.5 and 0.75 over the recalls 0, 0.01, ... 1, -1 where undefined: in no JSON
    curves: np.ndarray | None = field(default=None, repr=False, compare=False)

    def numbers(self) -> dict[str, float]:
        """The twelve alone, by name, in COCO's order."""
        return {name: getattr(self, name) for name in METRIC_NAMES}

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; NaN becomes None, since JSON has no NaN."""
        values = asdict(self)
        del values["curves"]
        return _without_nan(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Metrics:
        """What `to_dict` made; other keys are left out."""
        rows = [ClassMetrics(**_with_nan(ClassMetrics, row)) for row in values["per_class"]]
        return cls(**{**_with_nan(cls, values), "per_class": rows, "curves": None})

    def render(self, per_class: bool = True) -> RenderableType:
        """Tables for `rich.print`: the twelve numbers and, unless switched off, a row per class."""
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

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
                table.add_row(Text(one_line(row.name)), str(row.category_id), str(row.num_objects), *numbers)
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
    num_passed = np.searchsorted(thresholds, scores, side="right")  # (k,) of the thresholds, ascending

    def num_kept(mask: np.ndarray) -> np.ndarray:  # (K, 99) detections of each class at each threshold
        size = len(num_objects) * (len(thresholds) + 1)
        counts = np.bincount(labels[mask] * (len(thresholds) + 1) + num_passed[mask], minlength=size)
        return counts.reshape(len(num_objects), -1)[:, ::-1].cumsum(axis=1)[:, ::-1][:, 1:]

    found, right = num_kept(np.ones(len(scores), bool))[present], num_kept(correct)[present]
    f1 = (2 * right / (found + num_objects[present, None])).mean(axis=0)
    if f1.max() == 0:
        return math.nan, 0.0
    best = np.flatnonzero(f1 >= f1.max() - 1e-9)
    return float(thresholds[best[len(best) // 2]]), float(f1.max())  # the middle of equals: farthest from a change


def _shown(number: float) -> str:
    return "-" if math.isnan(number) else f"{number:.3f}"


def _with_nan(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    known = {field.name: values.get(field.name) for field in fields(kind)}
    return {name: math.nan if value is None else value for name, value in known.items()}


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value

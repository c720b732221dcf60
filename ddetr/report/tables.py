"""The report's tables: AP by class and size, confusions, errors, findings, settings, files."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from ddetr.evaluation.metrics import METRIC_NAMES
from ddetr.report.analysis import ERROR_KINDS, Analysis
from ddetr.report.run_files import FILES
from ddetr.report.validation import Validation
from ddetr.untrusted import MAX_ROWS
from ddetr.wording import first_few

MOST_CLASSES = 16  # of a whole confusion matrix; beyond, the most confused ones
MOST_PAIRS = 12
PLACES_SHOWN = 3
LISTED = 8  # classes of one picture, in its words
CLASS_COLUMNS = ("AP", "AP50", "AP75", "AR100", "APs", "APm", "APl")
_SPLIT_COLUMNS = ("name", "format", "num_images", "num_objects", "num_ignored", "num_without_objects")
_SPLIT_COLUMNS += ("objects_p50", "objects_max")
SIZES = (("small", 0, 32**2), ("medium", 32**2, 96**2), ("large", 96**2, math.inf))  # COCO's, in pixels^2


def ap_rows(metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """COCO's twelve numbers of the best and the last validation."""
    rows = []
    for which in ("best", "last"):
        values = metrics.get(which)
        if isinstance(values, Mapping) and values:
            rows.append({"which": which, "step": values.get("step"), "values": [values.get(n) for n in METRIC_NAMES]})
    return rows


def class_rows(metrics: Mapping[str, Any], detections: Validation | None) -> list[dict[str, Any]]:
    """A row per class: number of objects, of each size where the truth is there, and the metrics of the best
    validation."""
    best = metrics.get("best") or metrics.get("last") or {}
    by_size = _objects_by_size(detections) if detections else {}
    return [
        {
            "name": row["name"] or f"class {row['label']}",
            "num_objects": row["num_objects"],
            "sizes": by_size.get((row["category_id"], row["name"])),
            "values": [row.get(column) for column in CLASS_COLUMNS],
        }
        for row in best.get("per_class", ())[:MAX_ROWS]
    ]


def confusion(analysis: Analysis, names: list[str]) -> dict[str, Any]:
    """The matrix, of many classes the most confused ones and the rest together; and the most frequent confusions."""
    num_classes = len(names)
    truth, prediction, times = analysis.confused.T  # the whole matrix of 20,000 classes would have 3 GB
    is_between = (truth != prediction) & (truth < num_classes) & (prediction < num_classes)
    between = np.where(is_between, times, 0)
    chosen = np.arange(num_classes)
    labels = list(names)
    is_partial = num_classes > MOST_CLASSES
    if is_partial:
        total = np.zeros(num_classes + 1, np.int64)
        np.add.at(total, truth, between)
        np.add.at(total, prediction, between)
        chosen = np.sort(np.argsort(-total[:-1], kind="stable")[: MOST_CLASSES - 1])
        labels = [*(names[i] for i in chosen), f"{num_classes - len(chosen)} other classes"]
    groups = np.full(num_classes + 1, len(chosen))  # of each class the row that it goes to
    groups[chosen] = np.arange(len(chosen))
    groups[num_classes] = len(labels)
    matrix = np.zeros((len(labels) + 1,) * 2, np.int64)
    np.add.at(matrix, (groups[truth], groups[prediction]), times)
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    last = len(labels)

    def kind(i: int, j: int) -> str:
        if i != j:
            return "wrong"
        return "right" if i < len(chosen) else "mixed"  # the other classes: their own confusions too

    rows = [
        {
            "name": labels[i] if i < last else "background",
            "cells": [
                {"count": int(matrix[i, j]), "share": round(float(share[i, j]), 3), "kind": kind(i, j)}
                for j in range(last + 1)
            ],
        }
        for i in range(last + 1)
    ]
    pairs = [
        {
            "truth": names[truth[k]],
            "prediction": names[prediction[k]],
            "count": int(times[k]),
            "share": times[k] / analysis.num_objects[truth[k]],
        }
        for k in np.argsort(-between, kind="stable")[:MOST_PAIRS]
        if between[k]
    ]
    return {"columns": [*labels, "missed"], "rows": rows, "pairs": pairs, "is_partial": is_partial}


def errors(analysis: Analysis, names: list[str]) -> dict[str, Any]:
    """Numbers by kind, and by class."""
    totals = {kind: int(analysis.errors[kind].sum()) for kind in ERROR_KINDS}
    most = max(1, *totals.values())
    num_objects, num_found = int(analysis.num_objects.sum()), int(analysis.num_found.sum())
    num_correct = int(analysis.num_correct.sum())
    return {
        "more": num_left_out(names),
        "num_objects": num_objects,
        "num_found": num_found,
        "num_correct": num_correct,
        "precision": num_correct / num_found if num_found else math.nan,
        "recall": num_correct / num_objects if num_objects else math.nan,
        "kinds": [
            {"kind": kind, "what": what, "count": totals[kind], "bar": totals[kind] / most}
            for kind, what in ERROR_KINDS.items()
        ],
        "classes": [
            {
                "name": name,
                "num_objects": int(analysis.num_objects[label]),
                "num_correct": int(analysis.num_correct[label]),
                "precision": _ratio(analysis.num_correct[label], analysis.num_found[label]),
                "recall": _ratio(analysis.num_correct[label], analysis.num_objects[label]),
                "kinds": [int(analysis.errors[kind][label]) for kind in ERROR_KINDS],
            }
            for label, name in enumerate(names[:MAX_ROWS])
            if analysis.num_objects[label] or analysis.num_found[label]
        ],
    }


def num_left_out(rows: Sequence[Any]) -> int:
    """Of a table of classes."""
    return max(0, len(rows) - MAX_ROWS)


def findings(audit: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row per kind of finding, with the first places."""
    return [
        {
            "action": group["action"],
            "kind": group["kind"],
            "count": group["count"],
            "places": [f"{place['where']}: {place['message']}" for place in group["places"][:PLACES_SHOWN]],
            "more": max(0, len(group["places"]) - PLACES_SHOWN),
        }
        for group in audit.get("findings", ())[:MAX_ROWS]
    ]


def data(audit: Mapping[str, Any]) -> dict[str, Any]:
    """The splits, the classes and the findings of an audit, as `AuditReport.to_dict` has them."""
    splits = [(role, audit[key]) for role, key in (("training", "train"), ("validation", "val")) if audit.get(key)]
    counts = [split["class_counts"] for _, split in splits]
    categories = audit.get("categories", ())
    totals = [max(1, sum(column)) for column in counts]
    most = max((max(column, default=0) / total for column, total in zip(counts, totals)), default=0) or 1
    order = sorted(range(len(categories)), key=lambda label: [-column[label] for column in counts])
    if len(order) > MAX_ROWS:  # of a long tail the middle is left out: the rarest are what one has to see
        order = order[: MAX_ROWS // 2] + order[-(MAX_ROWS // 2) :]
    return {
        "splits": [(role, {name: split[name] for name in _SPLIT_COLUMNS}) for role, split in splits],
        "classes": [
            {
                "label": label,
                "name": categories[label]["name"] or f"class {label}",
                "category_id": categories[label]["category_id"],
                "counts": [column[label] for column in counts],
                "bars": [column[label] / total / most for column, total in zip(counts, totals)],
            }
            for label in order
        ],
        "findings": findings(audit),
        "there": bool(audit),
        "more": num_left_out(categories),
    }


def settings(config: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """(group, its settings as YAML spells them), those of the run itself first."""
    groups: dict[str, list[tuple[str, str]]] = {"run": []}
    for key, value in config.items():
        if isinstance(value, Mapping):
            groups[key] = list(_flat(value))
        else:
            groups["run"].append((key, _spelled(value)))
    return [(group, rows[:MAX_ROWS]) for group, rows in groups.items() if rows][:MAX_ROWS]


def files(run: Path) -> list[dict[str, str]]:
    """Links to what lies in the folder, known files first."""
    known = [name for name in FILES if (run / name).exists()]
    others = sorted(entry.name for entry in os.scandir(run) if entry.name not in FILES and entry.name[0] != ".")
    rows = []
    for name in [*known, *others][:MAX_ROWS]:
        path = run / name
        if name == "report.html":
            continue
        is_folder = path.is_dir()
        try:
            size = f"{len(os.listdir(path))} files" if is_folder else shown_bytes(path.stat().st_size)
        except OSError as error:  # a link to nothing, a folder of somebody else's
            size = error.strerror or "cannot be read"
        href = quote(os.fsencode(name)) + ("/" if is_folder else "")
        # "./": a name with a colon would be taken for a scheme
        rows.append(
            {
                "name": name + ("/" if is_folder else ""),
                "href": f"./{href}",
                "size": size,
                "what": FILES[name].what if name in FILES else "",
            }
        )
    return rows


def shown_bytes(size: float) -> str:
    """With the unit that gives the fewest digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000 or unit == "GB":
            break
        size /= 1000
    return f"{size:.0f} {unit}" if unit == "B" or size >= 100 else f"{size:.1f} {unit}"


def listed(labels: np.ndarray, name_of: Callable[[int], str]) -> str:
    """ "3 cat, 1 dog", the most frequent first where there are many."""
    found, counts = np.unique(labels, return_counts=True)
    order = np.argsort(-counts, kind="stable") if len(found) > LISTED else np.arange(len(found))
    return first_few((f"{counts[i]} {name_of(int(found[i]))}" for i in order), LISTED)


def _objects_by_size(validation: Validation) -> dict[tuple[int, str], list[int]]:
    counted = ~validation.objects.ignore
    labels, area = validation.objects.labels[counted], validation.objects.area[counted]
    num_classes = len(validation.categories)
    columns = [np.bincount(labels[(area >= low) & (area < high)], minlength=num_classes) for _, low, high in SIZES]
    rows = np.column_stack(columns).tolist()
    return {(category.category_id, category.name): row for category, row in zip(validation.categories, rows)}


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else math.nan


def _flat(values: Mapping[str, Any], group: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{group}{key}.")
        else:
            yield f"{group}{key}", _spelled(value)


def _spelled(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "null" if value is None else str(value).lower()
    if isinstance(value, Iterable) and not isinstance(value, str):
        return "[" + ", ".join(_spelled(one) for one in value) + "]"
    return str(value)

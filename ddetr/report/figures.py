"""Which curves the report shows: of any columns that train.csv and val.csv have, whoever wrote them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

from ddetr.report.charts import NUM_COLORS, Line, chart
from ddetr.report.run_files import Table
from ddetr.report.validation import Validation

MOST_CLASSES = 100  # whose curves are drawn: beyond, those with the most objects
_RECALL = np.linspace(0, 1, 101)


class _Panel(NamedTuple):
    """A chart and the columns that belong to it."""

    title: str
    belongs: Callable[[str], object]
    log: bool = False
    y_range: tuple[float, float | None] | None = None


_TRAINING = (
    _Panel("Training losses", re.compile(r"loss|loss_(ce|bbox|giou)").fullmatch, log=True),
    _Panel("Learning rates", re.compile(r"lr(_.*)?").fullmatch),
    _Panel("Gradient norm", re.compile(r"grad_norm.*").fullmatch, log=True),
    _Panel("Images per second", re.compile(r"images_per_second.*").fullmatch, y_range=(0, None)),
    _Panel(
        "Share of time waiting for data",
        re.compile(r"(data_)?wait(_share|_fraction)?|data_wait.*").fullmatch,
        y_range=(0, None),
    ),
    _Panel("Memory", re.compile(r".*memory.*").fullmatch, y_range=(0, None)),
)
_EARLIER = tuple(
    _Panel(f"{name}, every layer", re.compile(rf"{name}(_\d+|_enc.*|_dn.*)").fullmatch, log=True)
    for name in ("loss_ce", "loss_bbox", "loss_giou")
)
_VALIDATION = (
    _Panel("Validation AP", re.compile(r"AP(50|75)?").fullmatch, y_range=(0, None)),
    _Panel("AP by size of the objects", re.compile(r"AP[sml]").fullmatch, y_range=(0, None)),
    _Panel("Average recall", re.compile(r"AR\w*").fullmatch, y_range=(0, None)),
)
_NO_CURVES = {"step", "epoch"}


def training_charts(training: Table, validation: Table) -> tuple[list[Markup], list[Markup]]:
    """(the charts that everybody wants to see, the others); columns that no chart is known for get one of their own."""
    main = [*_charts(training, _TRAINING[:1]), *_charts(validation, _VALIDATION), *_charts(training, _TRAINING[1:])]
    more = _charts(training, _EARLIER)
    for table, panels in ((training, (*_TRAINING, *_EARLIER)), (validation, _VALIDATION)):
        for column in table:
            if column not in _NO_CURVES and not any(panel.belongs(column) for panel in panels):
                more += _charts(table, [_Panel(column, column.__eq__)])
    return main, more


def precision_recall_charts(validation: Validation) -> tuple[list[Markup], list[Markup]]:
    """(overall and, where they fit into one, by class; a small chart per class)."""
    curves = np.where(validation.curves < 0, np.nan, validation.curves.astype(np.float64))  # (2, 101, K)
    defined = [label for label in range(curves.shape[2]) if np.isfinite(curves[0, :, label]).any()]
    if not defined:
        return [], []

    def lines_of(values: Sequence[np.ndarray], names: Sequence[str]) -> list[Line]:
        return [Line(name, _RECALL, value, color) for color, (name, value) in enumerate(zip(names, values))]

    def drawn(title: str, lines: list[Line]) -> Markup | None:
        return chart(lines, title=title, x_label="recall", y_range=(0, 1), legend_values=False)

    at_50, at_75 = curves[0][:, defined], curves[1][:, defined]
    overall = lines_of([at_50.mean(axis=1), at_75.mean(axis=1)], ["IoU 0.5", "IoU 0.75"])
    main = [drawn("Precision over recall, mean of the classes", overall)]
    names = [validation.name(label) for label in defined]
    if len(defined) <= NUM_COLORS:
        main.append(drawn("By class, IoU 0.5", lines_of(list(at_50.T), names)))
        main.append(drawn("By class, IoU 0.75", lines_of(list(at_75.T), names)))
        return [one for one in main if one], []
    counts = np.bincount(validation.objects.labels[~validation.objects.ignore], minlength=curves.shape[2])
    chosen = sorted(defined, key=lambda label: -counts[label])[:MOST_CLASSES]
    small = [
        drawn(validation.name(label), lines_of([curves[0, :, label], curves[1, :, label]], ["IoU 0.5", "IoU 0.75"]))
        for label in sorted(chosen)
    ]
    return [one for one in main if one], [one for one in small if one]


def _charts(table: Table, panels: Sequence[_Panel]) -> list[Markup]:
    charts = []
    for panel in panels:
        columns = [column for column in table if column not in _NO_CURVES and panel.belongs(column)]
        lines = [Line(column, table["step"], table[column], i) for i, column in enumerate(columns)]
        drawn = chart(lines, title=panel.title, log=panel.log, y_range=panel.y_range)
        charts += [drawn] if drawn else []
    return charts

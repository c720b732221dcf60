"""`convergence.png`: AP over epochs and over seconds, the mean of the seeds in a band from the lowest to the
highest."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np

from ddetr.bench.convergence.points import START, Curve
from ddetr.report.plots import png_figure


def draw(path: Path, curves: Iterable[Curve], clock: str) -> None:
    """
    Args:
        path: of the picture.
        curves: of any number of sides and seeds.
        clock: what seconds are, in words.
    """
    sides: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.points:
            sides.setdefault(curve.side, []).append(curve)
    with png_figure(path, (12, 4.5)) as figure:
        for axes, count, label in zip(figure.subplots(1, 2), ("epoch", "seconds"), ("epochs", clock), strict=True):
            for side, seeds in sides.items():
                x, ap = values_of(seeds, count)
                (line,) = axes.plot(x.mean(0), ap.mean(0), marker=".", label=side)
                if len(seeds) > 1:
                    axes.fill_between(x.mean(0), ap.min(0), ap.max(0), color=line.get_color(), alpha=0.2, linewidth=0)
            axes.set(xlabel=label, ylabel="AP", title=f"validation AP over {label}")
            axes.set_ylim(bottom=0)
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3)


def values_of(seeds: list[Curve], count: str) -> tuple[np.ndarray, np.ndarray]:
    """(seeds, points) of the count and of the AP, from the start to where all seeds have come."""
    length = min(len(curve.points) for curve in seeds)
    rows = [[START, *curve.points[:length]] for curve in seeds]
    return tuple(np.array([[getattr(point, name) for point in row] for row in rows]) for name in (count, "AP"))

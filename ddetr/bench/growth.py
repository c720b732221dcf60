"""How the cost of attention grows: deformable attention with the points it samples, dense attention with the image.

The claim of arXiv:2010.04159, sec. 4.1: a query costs as much as its points, L*P for each head, whatever the size of
the image, while dense attention compares it with all S cells. Forward in inference mode, heads of the paper's size. Few
queries show what a call costs at least: some tenths of a millisecond on a CPU.
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from rich.table import Table

from ddetr.bench import record
from ddetr.bench.sides import Setting, prepare
from ddetr.bench.sizes import STRIDES, Inputs, Size, make_inputs, pyramid
from ddetr.bench.timing import Clock, in_inference_mode, interleaved
from ddetr.report.plots import png_figure

DENSE = "dense attention"
SIDES = ("ours", "grid_sample", DENSE)
_COLOURS = {"ours": "tab:blue", "grid_sample": "tab:orange", DENSE: "tab:red"}

# Of one call of dense attention: half a second of a CPU core, a tenth of a second of a large GPU.
_MOST_OPERATIONS = {"cpu": 3e10, "cuda": 2e12}
_IMAGE = (480, 640)


class Panel(NamedTuple):
    """One variable: what it is called, and the layer for each of its values."""

    label: str
    title: str
    sizes: dict[int, Size]


PANELS = {
    "queries": Panel(
        "queries", "Queries (480x640)", {q: Size(1, pyramid(*_IMAGE), q) for q in (100, 300, 1000, 3000, 10000)}
    ),
    "points": Panel(
        "sampled points per query and head",
        "Points (480x640, 1000 queries, 4 levels)",
        {4 * p: Size(1, pyramid(*_IMAGE), 1000, points=p) for p in (1, 2, 4, 8, 16, 32)},
    ),
    "levels": Panel(
        "levels",
        "Levels (480x640, 1000 queries, 4 points per level)",
        {n: Size(1, pyramid(*_IMAGE, STRIDES[:n]), 1000) for n in (1, 2, 3, 4)},
    ),
    "image": Panel(
        "pixels of the image",
        "Image size (300 queries, 4 levels of 4 points)",
        {s * s * 4 // 3: Size(1, pyramid(s, s * 4 // 3), 300) for s in (240, 360, 480, 720, 960, 1440, 1920)},
    ),
}


class Curve(NamedTuple):
    """Milliseconds of a side over one variable, and the exponent of the power of it that fits best."""

    panel: str
    side: str
    x: list[int]
    ms: list[float]
    exponent: float | None


def measure(
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    rounds: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Curve]:
    """All curves. Dense attention ends where a call would take too long."""
    points: dict[tuple[str, str], dict[int, float]] = {}
    total = sum(len(panel.sizes) for panel in PANELS.values())
    done = 0
    for name, panel in PANELS.items():
        for x, size in panel.sizes.items():
            times = interleaved(_calls(size, device, dtype), clock, rounds)
            for side, values in times.items():
                points.setdefault((name, side), {})[x] = statistics.median(values)
            done += 1
            progress(done, total)
    return [
        Curve(panel, side, list(values), list(values.values()), exponent(list(values), list(values.values())))
        for (panel, side), values in points.items()
    ]


def exponent(x: Sequence[float], y: Sequence[float]) -> float | None:
    """The k of the y = c * x^k that fits best, by least squares of the logarithms; None for fewer than two points."""
    if len(x) < 2:
        return None
    log_x, log_y = [math.log(value) for value in x], [math.log(value) for value in y]
    return statistics.linear_regression(log_x, log_y).slope


def table(curves: Sequence[Curve]) -> Table:
    """The exponents: 1 is linear growth, 0 none."""
    found = Table(
        title="cost grows with the power (0 not at all, 1 in proportion) of",
        title_justify="left",
        box=None,
        pad_edge=False,
    )
    found.add_column("")
    for side in SIDES:
        found.add_column(side, justify="right")
    of = {(curve.panel, curve.side): curve.exponent for curve in curves}
    for panel in dict.fromkeys(curve.panel for curve in curves):
        exponents = [of.get((panel, side)) for side in SIDES]
        found.add_row(PANELS[panel].label, *("-" if k is None else _power(k) for k in exponents))
    return found


def save(folder: Path, curves: Sequence[Curve], report: Mapping[str, Any], dtype: str) -> None:
    """growth.json and growth.png."""
    content = {**report, "dtype": dtype, "curves": [curve._asdict() for curve in curves]}
    record.save_json(folder / "growth.json", content)
    where = report["machine"].get("gpu") or report["machine"]["processor"]
    with png_figure(folder / "growth.png", (11, 8.5)) as figure:
        figure.suptitle(f"Cost of attention, forward, {dtype}: {where}, {report['clock']}", fontsize=10)
        grid = figure.subplots(2, 2)
        for axes, name in zip(grid.flat, dict.fromkeys(curve.panel for curve in curves)):
            _draw(axes, PANELS[name], [curve for curve in curves if curve.panel == name])


def _draw(axes: Any, panel: Panel, curves: Sequence[Curve]) -> None:
    for curve in curves:
        grows = "" if curve.exponent is None else f", grows with power {_power(curve.exponent)}"
        axes.loglog(curve.x, curve.ms, marker="o", color=_COLOURS[curve.side], label=f"{curve.side}{grows}")
    ticks = sorted({x for curve in curves for x in curve.x})
    axes.set_xticks(ticks, [_short(x) for x in ticks])
    axes.set_xticks([], minor=True)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high * (high / low) ** 0.35)  # room for the legend
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}")
    axes.set(xlabel=panel.label, ylabel="ms", title=panel.title)
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)


def _power(exponent: float) -> str:
    return f"{round(exponent, 2) + 0.0:.2f}"  # no -0.00


def _short(number: int) -> str:
    return f"{number / 1e6:.2g} M" if number >= 1e6 else f"{number / 1e3:.0f} k" if number >= 1e4 else str(number)


def _calls(size: Size, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    inputs = make_inputs(size, device, dtype)
    steps, _ = prepare(Setting(size.shapes, device, dtype), SIDES[:2])
    calls = {side: in_inference_mode(lambda step=step: step(*inputs)) for side, step in steps.items()}
    if 4 * size.heads * size.head_size * size.queries * size.cells <= _MOST_OPERATIONS[device.type]:
        calls[DENSE] = _dense(size, inputs)
    return calls


def _dense(size: Size, inputs: Inputs) -> Callable[[], object]:
    """The queries over all cells of all levels, heads as deformable attention has them; without projections."""
    value = inputs.value.transpose(1, 2).contiguous()  # (N, M, S, D)
    keys = torch.randn_like(value)
    queries = keys.new_zeros(size.batch, size.heads, size.queries, size.head_size).normal_()
    return in_inference_mode(lambda: F.scaled_dot_product_attention(queries, keys, value))

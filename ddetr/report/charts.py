"""Line charts and histograms as inline SVG: colours come from the page's style sheet, so that they follow light and
dark.

A long run has more rows than pixels: beyond `MOST_POINTS` the line is the mean of neighbouring rows, on a band from
their least to their greatest value, so that a spike stays visible.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup

MOST_POINTS = 300
NUM_COLORS = 8  # in the style sheet: s0 to s7
_WIDTH, _HEIGHT = 440, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 34


class Line(NamedTuple):
    """One curve: values over positions, NaN where undefined."""

    name: str
    x: np.ndarray
    y: np.ndarray
    color: int = 0


class Bars(NamedTuple):
    """One row of a histogram: how much of it falls between each two of the edges."""

    name: str
    shares: np.ndarray  # (n,) in [0, 1]
    color: int = 0


class Axis(NamedTuple):
    """From the least to the greatest value shown, and the ticks between."""

    low: float
    high: float
    ticks: list[float]
    is_log: bool = False

    def place(self, value: np.ndarray) -> np.ndarray:
        """0 at the low end, 1 at the high one."""
        if self.is_log:
            return (np.log10(value) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return (value - self.low) / (self.high - self.low)


def chart(
    lines: Sequence[Line],
    *,
    title: str,
    x_label: str = "step",
    y_range: tuple[float, float | None] | None = None,
    log: bool = False,
    legend_values: bool = True,
) -> Markup | None:
    """A figure: title, plot, legend; None where no line has a point.

    Args:
        y_range: of the vertical axis; by default the values decide, of None for the upper end too.
        log: a logarithmic vertical axis, where all values are above zero.
        legend_values: the legend has the last value of each line.
    """
    lines = [line for line in lines if (np.isfinite(line.x) & np.isfinite(line.y)).any()]
    if not lines:
        return None
    values = np.concatenate([line.y for line in lines])
    values = values[np.isfinite(values)]
    log = log and bool((values > 0).all())
    positions = np.concatenate([line.x for line in lines])
    x_axis = linear_axis(float(np.nanmin(positions)), float(np.nanmax(positions)), most=5, tight=True)
    low, high = y_range or (float(values.min()), None)
    is_tight, high = high is not None, float(values.max()) if high is None else high
    y_axis = log_axis(low, high) if log else linear_axis(low, high, most=5, tight=is_tight)
    parts = [_grid(x_axis, y_axis, x_label)]
    parts += [_curve(line, x_axis, y_axis) for line in lines]
    lasts = [shown(_last(line)) if legend_values else "" for line in lines]
    named = ", ".join(f"{line.name} {last}".strip() for line, last in zip(lines, lasts))
    label = f"{title} over {x_label}: {named}" + (" at the end" if legend_values else "")
    legend = [(line.name, last, line.color) for line, last in zip(lines, lasts)]
    return _figure(f"{title} (logarithmic)" if log else title, label, parts, legend)


def histogram(
    rows: Sequence[Bars], edges: np.ndarray, *, title: str, x_label: str, log: bool = False, note: str = ""
) -> Markup | None:
    """A figure: what share of each row lies between each two edges, the rows beside each other; None where no row has
    a share.

    Args:
        rows: with n shares each.
        edges: (n + 1,) rising, above zero where `log`.
        log: a logarithmic horizontal axis.
        note: what the numbers say, in words: for those who do not see the picture.
    """
    rows = [row for row in rows if row.shares.any()]
    if not rows:
        return None
    low, high = float(edges[0]), float(edges[-1])
    if log:
        x_axis = log_axis(low, high)
        x_axis = x_axis._replace(low=low, high=high, ticks=[tick for tick in x_axis.ticks if low <= tick <= high])
    else:
        x_axis = linear_axis(low, high, most=6, tight=True)
    y_axis = linear_axis(0.0, 100 * max(float(row.shares.max()) for row in rows), most=5)
    sides = _x(x_axis, np.asarray(edges, dtype=np.float64))
    foot = _y(y_axis, np.array(0.0)).item()
    bar = '<rect class="fill s{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    parts = [_grid(x_axis, y_axis, x_label)]
    for place, row in enumerate(rows):
        tops = _y(y_axis, 100 * row.shares)
        for i in np.flatnonzero(row.shares):
            width = (sides[i + 1] - sides[i]) * 0.9 / len(rows)
            left = sides[i] + (sides[i + 1] - sides[i]) * 0.05 + place * width
            said = f"{row.name}: {shown(100 * row.shares[i])} % from {shown(edges[i])} to {shown(edges[i + 1])}"
            parts.append(Markup(bar).format(row.color % NUM_COLORS, left, tops[i], width, foot - tops[i], said))
    label = ": ".join(filter(None, (f"{title}, in percent, by {x_label}", note)))
    legend = [(row.name, "", row.color) for row in rows]
    return _figure(f"{title} (%)", label, parts, legend, note)


def _figure(
    title: str, label: str, parts: Sequence[Markup], legend: Sequence[tuple[str, str, int]], note: str = ""
) -> Markup:
    """legend: (name, value, colour) of each row."""
    key = '<li><svg class="key s{}" viewBox="0 0 16 8" aria-hidden="true"><path d="M0 4H16"/></svg>{} <b>{}</b></li>'
    keys = Markup("").join(Markup(key).format(color % NUM_COLORS, name, value) for name, value, color in legend)
    return Markup(
        '<figure class="chart"><figcaption>{}</figcaption>'
        '<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>'
        '<ul class="legend">{}</ul>{}</figure>'
    ).format(
        title,
        _WIDTH,
        _HEIGHT,
        label,
        Markup("").join(parts),
        keys,
        Markup("<small>{}</small>").format(note) if note else "",
    )


def linear_axis(low: float, high: float, *, most: int, tight: bool = False) -> Axis:
    """Ticks at 1, 2 or 5 times a power of ten; the axis ends at ticks, or, if `tight`, at the values."""
    if high <= low:  # a single value: in the middle, or at the foot where it is zero
        low, high, tight = (low - abs(low) / 2, low + abs(low) / 2, False) if low else (0.0, 1.0, False)
    step = 10 ** math.floor(math.log10((high - low) / most))
    step = next(step * factor for factor in (1, 2, 5, 10, 20) if (high - low) / (step * factor) <= most)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [number * step for number in range(first, last + 1)]
    if tight:
        ticks = [tick for tick in ticks if low - step * 1e-6 <= tick <= high + step * 1e-6]
        return Axis(low, high, ticks)
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """Ticks at powers of ten, with 2 and 5 between where the range is short."""
    low, high = (low / 2, high * 2) if high / low < 2 else (low, high)
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    factors = (1, 2, 5) if last - first <= 2 else (1,)
    every = max(1, (last - first) // 5)
    ticks = [factor * 10.0**power for power in range(first, last + 1, every) for factor in factors]
    below = [tick for tick in ticks if tick <= low]
    above = [tick for tick in ticks if tick >= high]
    low, high = below[-1] if below else low, above[0] if above else high
    return Axis(low, high, [tick for tick in ticks if low <= tick <= high], is_log=True)


def shown(value: float) -> str:
    """Three digits that mean something."""
    if not math.isfinite(value):
        return "-"
    if value == 0:
        return "0"
    if 1000 <= abs(value) < 10_000_000:
        return f"{value:,.0f}"
    text = f"{value:.3g}" if 0.001 <= abs(value) < 1000 else f"{value:.2g}"
    mantissa, _, power = text.partition("e")
    return f"{mantissa}e{int(power)}" if power else mantissa


def _tick(value: float) -> str:
    if abs(value) >= 1e6 or (value and abs(value) < 1e-3):
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.6g}"


def _grid(x_axis: Axis, y_axis: Axis, x_label: str) -> Markup:
    right, bottom = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM
    parts = []
    for tick in y_axis.ticks:
        y = _y(y_axis, np.array(tick)).item()
        parts.append(Markup('<path class="grid" d="M{} {:.1f}H{}"/>').format(_LEFT, y, right))
        parts.append(Markup('<text class="y" x="{}" y="{:.1f}">{}</text>').format(_LEFT - 6, y + 4, _tick(tick)))
    for tick in x_axis.ticks:
        x = _x(x_axis, np.array(tick)).item()
        parts.append(Markup('<path class="grid" d="M{:.1f} {}V{}"/>').format(x, bottom, bottom + 4))
        parts.append(Markup('<text class="x" x="{:.1f}" y="{}">{}</text>').format(x, bottom + 16, _tick(tick)))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(_LEFT, bottom, right))
    parts.append(Markup('<text class="x" x="{}" y="{}">{}</text>').format((_LEFT + right) / 2, _HEIGHT - 3, x_label))
    return Markup("").join(parts)


def _curve(line: Line, x_axis: Axis, y_axis: Axis) -> Markup:
    x, y = (np.asarray(values, dtype=np.float64) for values in (line.x, line.y))
    color = line.color % NUM_COLORS
    parts = []
    usable = np.isfinite(x) & np.isfinite(y)
    if usable.sum() > MOST_POINTS:
        x, y = x[usable], y[usable]
        starts = np.linspace(0, len(x), MOST_POINTS, endpoint=False).astype(int)
        counts = np.diff([*starts, len(x)])
        low, high = np.minimum.reduceat(y, starts), np.maximum.reduceat(y, starts)
        x, y = np.add.reduceat(x, starts) / counts, np.add.reduceat(y, starts) / counts
        outline = _points(np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]), x_axis, y_axis)
        parts.append(Markup('<polygon class="band s{}" points="{}"/>').format(color, outline))
        usable = np.ones(len(x), bool)
    pieces = np.split(np.arange(len(x)), np.flatnonzero(np.diff(usable.astype(int))) + 1)
    for piece in pieces:  # a gap where a value is undefined
        if usable[piece[0]] and len(piece) > 1:
            points = _points(x[piece], y[piece], x_axis, y_axis)
            parts.append(Markup('<polyline class="line s{}" points="{}"/>').format(color, points))
    if usable.sum() <= 40:
        parts += [
            Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="2.6"><title>{}</title></circle>').format(
                color, _x(x_axis, x[i]), _y(y_axis, y[i]), f"{line.name}: {shown(y[i])} at {x[i]:g}"
            )
            for i in np.flatnonzero(usable)
        ]
    return Markup("").join(parts)


def _points(x: np.ndarray, y: np.ndarray, x_axis: Axis, y_axis: Axis) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(_x(x_axis, x), _y(y_axis, y)))


def _x(axis: Axis, values: np.ndarray) -> np.ndarray:
    return _LEFT + axis.place(values) * (_WIDTH - _LEFT - _RIGHT)


def _y(axis: Axis, values: np.ndarray) -> np.ndarray:
    return _HEIGHT - _BOTTOM - axis.place(values) * (_HEIGHT - _BOTTOM - _TOP)


def _last(line: Line) -> float:
    finite = line.y[np.isfinite(line.y)]
    return float(finite[-1])

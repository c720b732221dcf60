"""The charts: what is drawn stands where its numbers say."""

import math
import re

import numpy as np
import pytest

from ddetr.report.charts import MOST_POINTS, Bars, Line, chart, histogram, linear_axis, log_axis, shown
from ddetr.report.figures import training_charts


def points(svg: str, tag: str = "polyline") -> list[list[tuple[float, float]]]:
    found = re.findall(rf'<{tag} class="[^"]*" points="([^"]*)"', svg)
    return [[tuple(map(float, pair.split(","))) for pair in line.split()] for line in found]


def test_points_are_where_their_values_are() -> None:
    svg = chart([Line("a", np.array([0.0, 5, 10]), np.array([0.0, 1, 0.5]))], title="t", y_range=(0, 1))
    (line,) = points(svg)
    (x0, y0), (x1, y1), (x2, y2) = line
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y2 == pytest.approx((y0 + y1) / 2)
    assert y1 < y0  # upwards is less in SVG
    svg = chart([Line("a", np.arange(3.0), np.array([1.0, 10, 100]))], title="t", log=True)
    assert "logarithmic" in svg
    (line,) = points(svg)
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2)


def test_undefined_values_are_gaps_and_a_single_point_is_seen() -> None:
    svg = chart([Line("a", np.arange(5.0), np.array([1, 2, math.nan, 3, math.inf]))], title="t")
    assert [len(line) for line in points(svg)] == [2]
    assert svg.count("<circle") == 3
    assert "nan" not in svg
    assert "inf" not in svg
    assert chart([Line("a", np.arange(2.0), np.array([math.nan] * 2))], title="t") is None
    assert chart([], title="t") is None
    svg = chart([Line("a", np.array([7.0]), np.array([0.0]))], title="t", log=True)  # no logarithm of zero
    assert "logarithmic" not in svg
    assert svg.count("<circle") == 1


def test_a_spike_of_a_long_run_stays_visible() -> None:
    values = np.ones(100_000)
    values[54_321] = 50
    svg = chart([Line("a", np.arange(100_000.0), values)], title="t", y_range=(0, 50))
    (line,), (band,) = points(svg), points(svg, "polygon")
    assert len(line) == MOST_POINTS
    top = min(y for _, y in band)
    assert top == pytest.approx(10, abs=0.2)
    assert len(svg) < 30_000


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.1, 0.1), (0, 0), (-3, 7e9), (1e-7, 2e-7), (12.34, 56.78)])
def test_axes_hold_all_values_and_have_a_few_ticks(low: float, high: float) -> None:
    axis = linear_axis(low, high, most=5)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 7
    assert axis.high > axis.low


@pytest.mark.parametrize(("low", "high"), [(0.1, 100), (3, 4), (1e-9, 1e9), (5, 5), (0.02, 7)])
def test_logarithmic_axes(low: float, high: float) -> None:
    axis = log_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 2 <= len(axis.ticks) <= 12


def test_numbers_for_people() -> None:
    cases = {0: "0", 0.5: "0.5", 0.0123: "0.0123", 1234.4: "1,234", 1e-5: "1e-5", 0.00023: "0.00023"}
    cases |= {999.6: "1e3", 123456: "123,456", -1.5e8: "-1.5e8"}
    assert {value: shown(value) for value in cases} == cases
    assert shown(math.nan) == "-"


def test_every_column_has_a_chart_whoever_wrote_it() -> None:
    steps = np.arange(1.0, 6)
    names = ["epoch", "loss", "loss_ce", "loss_ce_0", "loss_bbox_enc", "lr_rest", "grad_norm", "images_per_second"]
    names += ["data_wait", "gpu_memory_mb", "cardinality_error", "somebody's own"]
    training = {"step": steps} | dict.fromkeys(names, steps)
    main, more = training_charts(training, {"step": steps, "AP": steps / 10, "F7": steps})
    drawn = "".join(main)
    for title in (
        "Training losses",
        "Validation AP",
        "Learning rates",
        "Gradient norm",
        "Images per second",
        "Share of time",
    ):
        assert title in drawn
    assert "gpu_memory_mb" in drawn
    others = "".join(more)
    for name in ("loss_ce, every layer", "loss_bbox, every layer", "cardinality_error", "somebody&#39;s own", "F7"):
        assert name in others
    assert "epoch" not in drawn + others
    assert training_charts({}, {}) == ([], [])


@pytest.mark.parametrize("log", [False, True])
def test_bars_stand_where_their_shares_are(log: bool) -> None:
    rows = [Bars("a", np.array([0.5, 0.0, 0.25]), 0), Bars("b", np.array([0.0, 1.0, 0.0]), 1), Bars("c", np.zeros(3))]
    edges = np.array([1.0, 10, 100, 1000]) if log else np.array([0.0, 10, 20, 30])
    svg = histogram(rows, edges, title="t", x_label="pixels", log=log, note="<b>")
    bar = r'<rect class="fill s(\d)" x="([\d.]+)" y="[\d.]+" width="([\d.]+)" height="([\d.]+)"><title>([^<]*)<'
    first, second, third = [(int(s), float(x), float(w), float(h), said) for s, x, w, h, said in re.findall(bar, svg)]
    assert [one[0] for one in (first, second, third)] == [0, 0, 1]
    assert first[3] == pytest.approx(2 * second[3], abs=0.2)
    assert third[3] == pytest.approx(2 * first[3], abs=0.2)
    assert third[1] - first[1] == pytest.approx(second[1] - third[1] + 2 * third[2], abs=0.3)  # in the second half
    assert second[4] == f"a: 25 % from {shown(edges[2])} to {shown(edges[3])}"
    assert "&lt;b&gt;" in svg
    assert ">c " not in svg  # a row of nothing
    assert histogram(rows[2:], edges, title="t", x_label="pixels") is None

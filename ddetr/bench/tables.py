"""The figures of `ddetr bench op` for people: tables of the terminal, and a markdown file for benchmarks/results/."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rich.table import Table

from ddetr.bench.record import describe
from ddetr.bench.sides import BASE

KINDS = ("forward", "forward + backward")


def header(report: Mapping[str, Any]) -> list[str]:
    """Machine, command and what was counted."""
    return [
        describe(report["machine"]),
        f"{report['command']}: {report['clock']}, median of {report['rounds']} interleaved rounds",
        f"a large copy moves {report['copy_gb_per_s']:.1f} GB/s here, reading and writing",
    ]


def of_size(name: str, dtype: str, rows: Iterable[Mapping[str, Any]]) -> Table:
    """One size's rows for the terminal."""
    table = Table(title=f"{name}, {dtype}", title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("")
    for heading in ("forward ms", "ratio", "GB/s", "fwd + bwd ms", "ratio", "GB/s", "error"):
        table.add_column(heading, justify="right")
    for row in rows:
        table.add_row(row["side"], *_cells(row))
    return table


def footer(report: Mapping[str, Any]) -> list[str]:
    """Correctness by dtype, and who was left out."""
    return [*correctness(report), *(f"left out: {line}" for line in left_out(report))]


def correctness(report: Mapping[str, Any]) -> Iterator[str]:
    """The largest errors of our operator over all sizes, a line for each dtype."""
    for dtype in dict.fromkeys(row["dtype"] for row in report["rows"]):
        errors = [row["error"] for row in report["rows"] if row["dtype"] == dtype and row["side"] == "ours"]
        if errors:
            worst = ", ".join(f"{what} {max(error[what] for error in errors):.1e}" for what in errors[0])
            yield f"ours against float64, {dtype}, largest error relative to the largest value: {worst}"


def left_out(report: Mapping[str, Any]) -> Iterator[str]:
    """A line for each side and reason; where it holds, unless it holds everywhere."""
    everywhere = {(row["size"], row["dtype"]) for row in (*report["rows"], *report["left_out"])}
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for row in report["left_out"]:
        found.setdefault((row["side"], row["reason"]), []).append((row["size"], row["dtype"]))
    for (side, reason), places in found.items():
        where = "" if set(places) == everywhere else f" ({', '.join(' '.join(place) for place in places)})"
        yield f"{side}: {reason}{where}"


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machine, command, copy = header(report)
    device = "GPU" if report["device"] == "cuda" else "CPU"
    lines = [
        f"# The operator on the {device}, {report['machine']['date']}",
        "",
        f"- Machine: {machine}.",
        f"- Command: `{report['command']}`. {report['clock'][0].upper()}{report['clock'][1:]}, milliseconds, median of "
        f"{report['rounds']} interleaved rounds; in brackets the ratio to {BASE}.",
        f"- Bandwidth: {copy}. GB/s are the bytes that must move (the sampled values, other inputs, output,",
        "  gradients, each once) over the time; what lies in a cache can be faster than a copy.",
        "- Every side gave the output and the gradients of the reference in float64 before it was timed; `error` is "
        "its",
        "  largest deviation, relative to the largest value.",
    ]
    lines += [f"- {line[0].upper()}{line[1:]}." for line in correctness(report)]
    for dtype in dict.fromkeys(row["dtype"] for row in report["rows"]):
        lines += ["", f"## {dtype}", "", "| size | side | forward | GB/s | forward + backward | GB/s | error |"]
        lines += ["|---|---|---|---|---|---|---|"]
        last = None
        for row in (row for row in report["rows"] if row["dtype"] == dtype):
            forward, ratio, speed, both, both_ratio, both_speed, error = _cells(row)
            size = "" if row["size"] == last else row["size"]
            cells = [size, row["side"], f"{forward} ({ratio})", speed, f"{both} ({both_ratio})", both_speed, error]
            lines.append(f"| {' | '.join(cells)} |")
            last = row["size"]
    if report["left_out"]:
        lines += ["", "Left out:", "", *(f"- {line}" for line in left_out(report))]
    sides = dict.fromkeys(row["side"] for row in report["rows"])
    lines += ["", "Sides:", "", *(f"- {side}: {report['sides'].get(side, 'not described')}" for side in sides)]
    return "\n".join(lines) + "\n"


def _cells(row: Mapping[str, Any]) -> list[str]:
    cells = []
    for kind in KINDS:
        ratio = row[kind]["ratio"]
        cells += [_short(row[kind]["ms"]), "-" if ratio is None else f"{ratio:.1f}x", f"{row[kind]['gb_per_s']:.1f}"]
    return [*cells, f"{max(row['error'].values()):.0e}"]


def _short(milliseconds: float) -> str:
    """Three digits that mean something."""
    return (
        f"{milliseconds:.3f}"
        if milliseconds < 1
        else f"{milliseconds:.2f}"
        if milliseconds < 100
        else f"{milliseconds:.0f}"
    )

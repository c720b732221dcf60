"""The figures of `ddetr bench convergence` for people: a table of the terminal, and a markdown file for
benchmarks/results/."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ddetr.bench.convergence.summary import COUNTS


def header(report: Mapping[str, Any]) -> list[str]:
    """Machines and settings."""
    settings = report["settings"]
    budget = (
        f"{settings['minutes']:g} minutes for a side and a seed"
        if settings["minutes"]
        else f"{settings['epochs']} epochs"
    ) + (" where its name says no other" if any("+epochs=" in side for side in report["sides"]) else "")
    weights = settings["model.pretrained_backbone"]
    return [
        *report["machines"],
        f"{report['num_images'][0]} training and {report['num_images'][1]} validation images of "
        f"{settings['data.path']}, image_size {settings['data.image_size']}, batch {settings['batch_size']}; "
        f"{settings['model.backbone']} {'from trained weights' if weights else 'from nothing'}; {budget}",
        f"seconds are {report['clock']}, of training alone; a level is reached on the line between two validations; "
        "mean ± standard deviation over seeds",
    ]


def shown(report: Mapping[str, Any]) -> list[Table]:
    """For a terminal: a row for each side, in two tables."""
    ends = [(heading, place) for place, heading in enumerate(_headings(report))]
    num_levels = len(report["levels"])
    parts = [ends[1:4] + ends[4 + num_levels :], ends[4 : 4 + num_levels]]
    tables = []
    for part in parts:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("", overflow="fold")
        for heading, _ in part:
            table.add_column(heading, justify="right")
        for row in report["rows"]:
            cells = _cells(row)
            table.add_row(cells[0], *(cells[place] for _, place in part))
        tables.append(table)
    return tables


def left_out(report: Mapping[str, Any]) -> list[str]:
    """A line for each side that could not train, and for each that has not finished."""
    lines = [f"left out: {name}: {reason}" for name, reason in report["left_out"].items()]
    for row in report["rows"]:
        if row["unfinished"]:
            seeds = ", ".join(map(str, row["unfinished"]))
            lines.append(f"not finished: {row['side']}, seed {seeds}: its AP is that of its last validation")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machines, lines = report["machines"], header(report)
    headings = ["side", *_headings(report)[1:]]
    out = [
        f"# How soon detectors learn, {report['machine']['date']}",
        "",
        *(f"- Machine: {machine}." for machine in machines),
        *(f"- Command: `{command}`." for command in report["commands"]),
        *(f"- {line[0].upper()}{line[1:]}." for line in lines[len(machines) :]),
        "",
        "![AP over epochs and over seconds](convergence.png)",
        "",
        f"| {' | '.join(headings)} |",
        f"|---|{'---:|' * (len(headings) - 1)}",
        *(f"| {' | '.join(_cells(row))} |" for row in report["rows"]),
        "",
        "Sides:",
        "",
        *(f"- {name}: {about}" for name, about in report["sides"].items()),
        *(f"- {line}" for line in left_out(report)),
    ]
    return "\n".join(out) + "\n"


def _headings(report: Mapping[str, Any]) -> list[str]:
    levels = [f"{name} ({ap:.3f})" if "best" in name else f"until {name}" for name, ap in report["levels"].items()]
    return ["", "seeds", "AP", "AP50", *levels, "epochs", "seconds", "s per step", "parameters"]


def _cells(row: Mapping[str, Any]) -> list[str]:
    return [
        row["side"],
        str(len(row["seeds"])),
        _shown(row["AP"], "{:.3f}"),
        _shown(row["AP50"], "{:.3f}"),
        *(_place(place, len(row["seeds"])) for place in row["reached"].values()),
        f"{row['epochs done']:g} of {row['epochs']}" if row["unfinished"] else str(row["epochs"]),
        _shown(row["seconds"], "{:.0f}"),
        _shown(row["seconds a step"], "{:.3g}"),
        f"{row['parameters'] / 1e6:.2f} M",
    ]


def _place(place: Mapping[str, Any], num_seeds: int) -> str:
    if not place["seeds"]:
        return "never"
    epochs, images, seconds = (place[count] for count in COUNTS)
    words = f"{_shown(epochs, '{:.1f}')} epochs, {images['mean']:,.0f} images, {_shown(seconds, '{:.0f}')} s"
    return words if place["seeds"] == num_seeds else f"{words} ({place['seeds']} of {num_seeds} seeds)"


def _shown(value: Mapping[str, float | None], form: str) -> str:
    mean = form.format(value["mean"])
    return mean if value["deviation"] is None else f"{mean} ± {form.format(value['deviation'])}"

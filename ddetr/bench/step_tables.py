"""The figures of `ddetr bench train` for people: tables of the terminal, and a markdown file for
benchmarks/results/."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from ddetr.bench.peak import in_words
from ddetr.bench.record import describe
from ddetr.engine.memory import readable


def header(report: Mapping[str, Any]) -> list[str]:
    """Machine, command and settings."""
    settings = report["settings"]
    threads = f", {report['threads']} threads" if report["threads"] else ""
    return [
        describe(report["machine"]),
        f"{report['command']}: medians of {report['steps']} steps after {report['warmup']} on "
        f"{report['device']}{threads}",
        f"{settings['images']}; {settings['batch_size']} images per step, {settings['device_batch_size']} at a time, "
        f"precision {settings['precision']}, activation checkpointing {_on(settings['activation_checkpointing'])}, "
        f"compile {_on(settings['compile'])}; {settings['model'].get('backbone', 'resnet50')}",
    ]


def of_engine(report: Mapping[str, Any]) -> str:
    """The engine's step, in a line."""
    return f"a step of the engine, data included: {_summary(report['engine'])}"


def split(report: Mapping[str, Any]) -> Table:
    """Where the time of that step goes."""
    engine = report["engine"]
    table = _table("", "ms", "share")
    for name, milliseconds in engine["ms"].items():
        table.add_row(name, f"{milliseconds:.1f}", f"{100 * engine['share'][name]:.1f} %")
    return table


def sides(report: Mapping[str, Any]) -> Table:
    """The same step by others, on batches that are in memory."""
    table = _table("", "ms per step", "images/s", "times ours", "peak memory")
    for row in report["sides"]:
        table.add_row(*_cells(row))
    return table


def left_out(report: Mapping[str, Any]) -> list[str]:
    """A line for each side that could not run."""
    return [f"left out: {row['side']}: {row['reason']}" for row in report["left_out"]]


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machine, command, settings = header(report)
    device = "GPU" if report["device"] == "cuda" else "CPU"
    engine = report["engine"]
    lines = [
        f"# A training step on the {device}, {report['machine']['date']}",
        "",
        f"- Machine: {machine}.",
        f"- Command: `{report['command']}`: medians of {report['steps']} steps after {report['warmup']}.",
        f"- {settings}.",
        f"- A{of_engine(report)[1:]}. The CPU's memory is the whole process's."
        if device == "CPU"
        else f"- A{of_engine(report)[1:]}.",
        *(f"- {name} {value} is left out." for name, value in report["not_measured"].items()),
        "",
        "| part of a step | ms | share |",
        "|---|---|---|",
    ]
    lines += [f"| {name} | {ms:.1f} | {100 * engine['share'][name]:.1f} % |" for name, ms in engine["ms"].items()]
    if report["sides"]:
        lines += ["", f"The same step on {report['compared_batches']} batches that are in memory:", ""]
        lines += ["| side | ms per step | images/s | times ours | peak memory |", "|---|---|---|---|---|"]
        lines += [f"| {' | '.join(_cells(row))} |" for row in report["sides"]]
        lines += ["", *(f"- {name}: {what}" for name, what in report["descriptions"].items())]
    lines += [f"- {line}" for line in left_out(report)]
    return "\n".join(lines) + "\n"


def _summary(engine: Mapping[str, Any]) -> str:
    peak = "" if engine["peak_bytes"] is None else f", peak memory {readable(engine['peak_bytes'])}"
    return f"{engine['step_ms']:.0f} ms, {engine['images_per_s']:.2f} images/s{peak}"


def _cells(row: Mapping[str, Any]) -> list[str]:
    ratio = f"{row['ratio']:.2f}x" if "ratio" in row else "-"
    return [row["side"], f"{row['step_ms']:.0f}", f"{row['images_per_s']:.2f}", ratio, in_words(row["peak_bytes"])]


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="left" if not heading else "right")
    return table


def _on(switch: bool) -> str:
    return "on" if switch else "off"

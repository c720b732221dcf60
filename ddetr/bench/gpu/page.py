"""The figures of `ddetr bench gpu` for people: tables of the terminal, and gpu.md for benchmarks/results/."""

from collections.abc import Iterator, Mapping
from typing import Any

from ddetr.bench.gpu.sheet import Sheet
from ddetr.bench.gpu.stages import STAGES
from ddetr.bench.record import describe
from ddetr.wording import aligned


def outcome(sheet: Sheet) -> str:
    """A stage in a line."""
    wrong = [check for check in sheet.checks if not check.ok]
    parts = [f"{sheet.state}, {sheet.seconds:.0f} s"]
    if sheet.checks:
        parts.append(f"{len(sheet.checks) - len(wrong)} of {len(sheet.checks)} checks hold")
    return "; ".join(parts) + (f"; {sheet.reason}" if sheet.reason else "")


def shown(sheet: Sheet) -> Iterator[Any]:
    """A stage for the terminal."""
    yield f"\n== {sheet.stage}: {STAGES[sheet.stage].what} ({outcome(sheet)})"
    for table in sheet.tables:
        yield "\n".join([table.title, *(f"  {line}" for line in aligned([table.columns, *table.rows]))])
    yield from sheet.lines
    yield from (f"WRONG: {check.what}: {check.detail}" for check in sheet.checks if not check.ok)
    yield from (f"left out: {what}: {why}" for what, why in sheet.skipped)


def markdown(report: Mapping[str, Any], sheets: Mapping[str, Sheet]) -> str:
    """A file for benchmarks/results/."""
    machine = next((s.data["machine"] for s in sheets.values() if "machine" in s.data), None)
    name = (machine or {}).get("gpu", "no GPU: a rehearsal" if report["device"] == "cpu" else "a GPU")
    lines = [f"# ddetr on {name}, {report['date']}", ""]
    lines += [f"- Machine: {describe(machine)}."] if machine else []
    lines += [f"- Command: `{report['command']}`. All figures: gpu.json beside this file.", ""]
    lines += ["| stage | what | outcome |", "|---|---|---|"]
    for stage in report["chosen"]:
        found = outcome(sheets[stage]) if stage in sheets else "not begun"
        lines.append(f"| {stage} | {STAGES[stage].what} | {found} |")
    for sheet in sheets.values():
        lines += ["", f"## {sheet.stage}: {STAGES[sheet.stage].what}"]
        for table in sheet.tables:
            lines += ["", f"### {table.title}", "", _row(table.columns), "|" + "---|" * len(table.columns)]
            lines += [_row(row) for row in table.rows]
        checks = [f"{'ok' if c.ok else '**wrong**'}: {c.what}{c.detail and f' ({c.detail})'}" for c in sheet.checks]
        skipped = [f"{what}: {why}" for what, why in sheet.skipped]
        for title, entries in (("", sheet.lines), ("Checks:", checks), ("Left out:", skipped)):
            if entries:
                lines += ["", *([title, ""] if title else []), *(f"- {entry}" for entry in entries)]
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

"""The doctor's table: for a terminal with colours, for a log file plain lines."""

import json
import textwrap
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ddetr.doctor.causes import Cause
from ddetr.doctor.diagnosis import Diagnosis
from ddetr.doctor.rows import Row
from ddetr.wording import plural

_STYLES = {"ok": "green", "warning": "bold yellow", "broken": "bold red"}
_WIDTH = 18


def shown(diagnosis: Diagnosis, *, as_json: bool, brief: bool, terminal: bool) -> Iterator[Any]:
    """What `ddetr doctor` prints, one after the other."""
    if as_json:
        yield json.dumps(diagnosis.to_dict(), indent=1)
        return
    rows = diagnosis.rows
    if brief:
        rows = [row for row in rows if row.state != "ok"]
        yield headline(diagnosis)
    if rows:
        yield table(rows) if terminal else "\n".join(lines(rows))
    if brief:
        yield f"{summary(diagnosis)} `ddetr doctor` shows and tries everything."
        return
    yield "\n" + summary(diagnosis)
    yield "Next: ddetr data audit PATH looks at a data set, ddetr preflight --data PATH at a training set-up."


def table(rows: list[Row]) -> Group:
    """For a terminal."""
    parts: list[Any] = []
    for section, members in groupby(rows, key=lambda row: row.section):
        part = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
        part.add_column(width=len("warning"), no_wrap=True)
        part.add_column(width=_WIDTH)
        part.add_column(overflow="fold")
        for row in members:
            text = Text(row.text, "" if row.state == "ok" else _STYLES[row.state].removeprefix("bold "))
            if row.to_do:
                text.append("\nto do: ", "bold").append(row.to_do, "default")
            part.add_row(Text(row.state, _STYLES[row.state]), Text(row.name), text)
        parts += [Text(section, "bold"), part]
    return Group(*parts)


def lines(rows: list[Row]) -> Iterator[str]:
    """For a file: a line per row, what to do under it; not wrapped, so that a search finds them."""
    for section, members in groupby(rows, key=lambda row: row.section):
        yield section
        yield from map(line, members)


def line(row: Row) -> str:
    text = f"  {row.state:<8} {row.name:<{_WIDTH}} {row.text}"
    return text + (f"\n{textwrap.indent('to do: ' + row.to_do, ' ' * (12 + _WIDTH))}" if row.to_do else "")


def summary(diagnosis: Diagnosis) -> str:
    """The verdict in a sentence, with the exit code."""
    states = [row.state for row in diagnosis.rows]
    counts = f"{states.count('broken')} broken, {plural(states.count('warning'), 'warning')}"
    cause = diagnosis.cause
    if cause is None:
        computed = "" if diagnosis.facts.steps else " (nothing was computed)"
        return f"Fit for work{computed}: {counts}. Exit code 0 (ok)."
    if {row.cause for row in diagnosis.rows if row.cause} == {Cause.NO_GPU}:
        verdict = f"Fit for work on the CPU, which is slow: there is no NVIDIA GPU ({counts})."
    else:
        verdict = f"Not fit: {counts}. First of all: {cause.meaning}."
    return f"{verdict} Exit code {cause.code} ({cause.title})."


def headline(diagnosis: Diagnosis) -> str:
    """What machine this is, in a line."""
    facts = diagnosis.facts
    torch = facts.pytorch
    parts = [facts.machine.system, f"Python {facts.machine.python}"]
    parts.append(f"PyTorch {torch.version}" if torch.version else "no PyTorch")
    if facts.driver.version:
        parts.append(f"driver {facts.driver.version}")
    names = [gpu.name for gpu in facts.gpus]
    parts.append(f"{plural(len(names), 'GPU')}: {', '.join(sorted(set(names)))}" if names else "no GPU")
    return f"ddetr doctor: {'; '.join(parts)}"

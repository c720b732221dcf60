"""What a stage is given (`Place`) and what it writes down (`Sheet`): tables, checks, sentences, figures.

A sheet is saved after every entry, so that a stage that is cut off leaves all that it had found.
"""

import json
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ddetr import console
from ddetr.bench.sides import reason_of
from ddetr.files import write_text

# "cut off": out of time; "skipped": nothing of it could run here; "failed": the stage itself broke
State = Literal["running", "done", "cut off", "skipped", "failed"]


@dataclass(frozen=True)
class Place:
    """Where a stage works."""

    device: torch.device
    small: bool  # a rehearsal: every line of the code on sizes that take seconds
    scratch: Path  # folder of the stage for its own files, removed afterwards
    data: str | None = None  # data set of the real training; drawn shapes where there is none
    built: str | None = None  # folder in which the official operator appears once it is built

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"


@dataclass
class Table:
    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass
class Check:
    """Something that must be so."""

    what: str
    ok: bool
    detail: str = ""


@dataclass
class Sheet:
    """The findings of a stage."""

    stage: str
    file: Path | None = None  # where it is saved
    ends: float = float("inf")  # of `time.monotonic`
    state: State = "running"
    reason: str = ""  # of a state that is not "done"
    seconds: float = 0.0
    lines: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    skipped: list[list[str]] = field(default_factory=list)  # what, why
    data: dict[str, Any] = field(default_factory=dict)  # figures as they are, for programs
    _started: float = field(default_factory=time.monotonic, repr=False)

    def say(self, line: str) -> None:
        """A sentence for the reader."""
        console.show(line)
        self.lines.append(line)
        self.save()

    def check(self, what: str, ok: bool, detail: str = "") -> bool:
        """Something that must be so, and whether it is."""
        console.show(f"{'ok    ' if ok else 'WRONG '} {what}{detail and f': {detail}'}")
        self.checks.append(Check(what, bool(ok), detail))
        self.save()
        return ok

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """A table; one of the same title takes the place of the earlier one, so that it can grow."""
        made = Table(title, list(columns), [[str(cell) for cell in row] for row in rows])
        self.tables = [table for table in self.tables if table.title != title] + [made]
        self.save()

    def skip(self, what: str, why: str) -> None:
        """Something that is not done here."""
        console.show(f"left out: {what}: {why}")
        self.skipped.append([what, why])
        self.save()

    def left(self) -> float:
        """Seconds until the stage is cut off."""
        return self.ends - time.monotonic()

    @contextmanager
    def part(self, what: str, seconds: float = 0) -> Iterator[bool]:
        """A piece of the stage that may fail without the others: then it is left out, with the reason.

        Yields:
            Whether there is time for it: False where fewer than `seconds` are left.
        """
        if self.left() < seconds:
            self.skip(what, f"no time left for it ({max(self.left(), 0):.0f} of {seconds:.0f} s)")
            yield False
            return
        try:
            yield True
        except Exception as error:  # a new machine fails in every way there is
            traceback.print_exc()
            self.check(what, False, reason_of(error))

    def save(self) -> None:
        """To its file, whole or not at all."""
        self.seconds = time.monotonic() - self._started
        if self.file:
            write_text(self.file, json.dumps(self.to_dict(), indent=1))

    def to_dict(self) -> dict[str, Any]:
        return {
            "stage": self.stage,
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 1),
            "lines": self.lines,
            "checks": [vars(check) for check in self.checks],
            "tables": [vars(table) for table in self.tables],
            "skipped": self.skipped,
            "data": self.data,
        }

    @classmethod
    def read(cls, file: Path) -> "Sheet":
        """A saved one."""
        saved = json.loads(file.read_text("utf-8"))
        checks = [Check(**check) for check in saved.pop("checks")]
        tables = [Table(**table) for table in saved.pop("tables")]
        return cls(**saved, checks=checks, tables=tables, file=file)

"""What lies in a run folder, however old, unfinished or damaged: what cannot be read is missing, with its reason."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.report.validation import BEST_FILE, LAST_FILE, Validation
from ddetr.runtime.environment import is_running
from ddetr.untrusted import (
    MAX_COLUMNS,
    MAX_RUN_BYTES,
    MAX_TABLE_BYTES,
    MAX_YAML_BYTES,
    is_number,
    parse_csv,
    parse_json,
    parse_yaml,
    read_text,
)

Table = dict[str, np.ndarray]  # column -> a number per row, NaN where the cell is empty


class Entry(NamedTuple):
    """A file or folder of a run."""

    what: str
    without: str = ""  # what a report lacks where it is not there; "" where a report does not read it


# All that a run leaves, in the order in which a person wants it. The README lists the same.
FILES = {
    "best.pth": Entry("published checkpoint of the best validation, for ddetr eval and ddetr predict"),
    "last.pth": Entry("published checkpoint of the last validation"),
    "report.html": Entry("all of it to look at, in one file"),
    "last.ckpt": Entry("everything that --resume needs"),
    "previous.ckpt": Entry("the state before it"),
    "damaged.ckpt": Entry("a state that could not be read again, where there was one"),
    "config.yaml": Entry("all settings, readable by ddetr train --config", "the settings"),
    "metrics.json": Entry(
        "metrics of the last and the best validation", "the metrics; they come with the first validation"
    ),
    "per_class.csv": Entry("the best validation's table by class"),
    "train.csv": Entry("a row every few steps", "the curves of training"),
    "val.csv": Entry("a row per validation", "the curves of validation"),
    "curves.png": Entry("losses and AP by step"),
    "pictures": Entry("validation images, truth beside prediction"),
    "environment.json": Entry(
        "machine, software and command line of each session",
        "machine, software and command line; runs of older versions did not write it",
    ),
    "audit.json": Entry("what was found in the data", "what was found in the data"),
    "data.npz": Entry("the files and a hash of the annotations that the run began with"),
    "held_back.json": Entry("the images held back for validation, where --data.val_fraction chose them"),
    "run.lock": Entry("which process the folder belongs to, while it runs"),
    "preflight.json": Entry("what was tried before the first step"),
    BEST_FILE: Entry(
        "truth and detections of the best validation", "the detections of a validation; older versions left none"
    ),
    LAST_FILE: Entry("truth and detections of the last validation"),
    "tensorboard": Entry("the rows of train.csv and val.csv for TensorBoard"),
    "loggers.json": Entry("the run's ids at other services"),
    "blackbox": Entry("steps that failed, for ddetr replay"),
}
_READ = [name for name, entry in FILES.items() if entry.without]  # of a folder with none of these there is no report


@dataclass
class RunFiles:
    """A run as its folder tells it; a part that is not there is empty, and `missing` says why."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    sessions: list[dict[str, Any]] = field(default_factory=list)  # of training: one, and one more each time it resumed
    audit: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)
    training: Table = field(default_factory=dict)
    validation: Table = field(default_factory=dict)
    detections: Validation | None = None
    missing: list[tuple[str, str]] = field(default_factory=list)  # (file, why)
    images: Path | None = None  # folder whose pictures may be shown, whoever made the run

    @classmethod
    def read(cls, path: Path, images: Path | None = None) -> RunFiles:
        """
        Args:
            images: a folder whose pictures may get into a report. Those in the run folder always may, and all of a
                validation that this user made (`report/signature.py`).

        Raises:
            InputError: no such folder, or one without any file of a run.
        """
        if not path.is_dir():
            raise InputError(f"expected a run folder, but {path} is {'a file' if path.exists() else 'not there'}")
        if not any((path / name).is_file() for name in _READ):
            raise InputError(
                f"{path} is no run folder: it has none of {', '.join(_READ)}. A run folder is what --output of "
                "`ddetr train` named"
            )
        run = cls(path, images=images)
        run.config = run._mapping("config.yaml")
        sessions = run._mapping("environment.json").get("sessions")
        run.sessions = [one for one in sessions if isinstance(one, dict)] if isinstance(sessions, list) else []
        run.audit = run._mapping("audit.json")
        run.metrics = run._mapping("metrics.json")
        run.training = run._table("train.csv")
        run.validation = run._table("val.csv")
        run.detections = run._detections()
        return run

    @property
    def state(self) -> tuple[str, str]:
        """("running", "finished", "stopped" or "unknown", what else is known of it)."""
        if not self.sessions:
            return "unknown", "no environment.json says whether the run has ended"
        last = self.sessions[-1]
        step, total = last.get("step"), last.get("total_steps")
        state, reason = str(last.get("state", "unknown")), str(last.get("reason") or "")
        if state == "running":
            about = last.get("environment")
            alive = is_running(about) if isinstance(about, Mapping) else None
            if alive is False:
                state, reason = "stopped", "its process is gone and left no word: killed, or the machine went down"
            elif alive is None:
                reason = (
                    f"or killed: its process is on another machine; last sign of life {shown_time(last.get('seen'))}"
                )
        where = f"step {step:,} of {total:,}" if isinstance(step, int) and isinstance(total, int) else ""
        return state, "; ".join(filter(None, (where, reason)))

    @property
    def seconds(self) -> float:
        """Of all sessions together, as far as each has given a sign of life; NaN where nothing is known."""
        total = [s["seen"] - s["began"] for s in self.sessions if _are_numbers(s.get("seen"), s.get("began"))]
        return float(sum(total)) if total else math.nan

    def _mapping(self, name: str) -> dict[str, Any]:
        parse, most_bytes = (parse_yaml, MAX_YAML_BYTES) if name.endswith(".yaml") else (parse_json, MAX_RUN_BYTES)
        try:
            value = parse(read_text(self.path / name, most_bytes, encoding="utf-8"), name)
            if not isinstance(value, dict):
                raise ValueError("it does not hold what it should")
            return value
        except FileNotFoundError:
            self.missing.append((name, f"not there: {FILES[name].without}"))
        except (OSError, ValueError) as error:
            self.missing.append((name, f"can't be read ({_first_line(error)}): {FILES[name].without}"))
        return {}

    def _table(self, name: str) -> Table:
        """A row that was half written when the run was killed is left out, and so is what is no number."""
        try:
            header, *rows = parse_csv(read_text(self.path / name, MAX_TABLE_BYTES, "utf-8", "replace")) or [[]]
        except FileNotFoundError:
            self.missing.append((name, f"not there: {FILES[name].without}"))
            return {}
        except (OSError, ValueError) as error:
            self.missing.append((name, f"can't be read ({_first_line(error)}): {FILES[name].without}"))
            return {}
        if len(header) > MAX_COLUMNS:
            self.missing.append((name, f"has {len(header):,} columns and is left out: ours have some dozens"))
            return {}
        header = [one_line(column) for column in header]
        fitting = [row for row in rows if len(row) == len(header)]
        if len(fitting) < len(rows):
            number = len(rows) - len(fitting)
            self.missing.append((name, f"{number} of its {len(rows)} rows do not fit its header and are left out"))
        columns = {column: np.array([_number(row[i]) for row in fitting]) for i, column in enumerate(header)}
        steps = columns.get("step")
        if steps is None or not np.isfinite(steps).any():
            return {}
        usable = np.isfinite(steps)
        order = np.flatnonzero(usable)[np.argsort(steps[usable], kind="stable")]
        return {column: values[order] for column, values in columns.items()}

    def _detections(self) -> Validation | None:
        reasons = []
        for name in (BEST_FILE, LAST_FILE):
            if not (self.path / name).is_file():
                continue
            try:
                return Validation.load(self.path / name)
            except InputError as error:
                reasons.append((name, str(error)))
        self.missing += reasons or [(BEST_FILE, f"not there: {FILES[BEST_FILE].without}")]
        return None


def shown_time(seconds: Any) -> str:
    """A time as a person of this machine reads it."""
    if not _are_numbers(seconds):
        return "unknown"
    try:
        return datetime.datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M %Z")
    except (OverflowError, ValueError, OSError):  # a year that no calendar has
        return "unknown"


def _are_numbers(*values: Any) -> bool:
    return all(is_number(v) and abs(v) < 1e18 for v in values)


def _number(cell: str) -> float:
    try:
        number = float(cell)
    except ValueError:
        return math.nan
    return number if abs(number) < 1e100 else math.nan  # no loss, rate or size; charts could not span them


def _first_line(error: Exception) -> str:
    said = getattr(error, "strerror", None) or str(error)
    return (said.strip().splitlines() or [type(error).__name__])[0]

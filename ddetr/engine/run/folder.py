"""The run folder: where everything that a run leaves lies, and how a run is found again. `ddetr.report.run_files.FILES`
says what each file is.
"""

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ddetr.engine.config import TrainConfig
from ddetr.engine.run.lock import LOCK_FILE, RunLock
from ddetr.engine.run.states import (
    PREVIOUS_FILE,
    RESUME_FILE,
    check_training_state,
    epochs_done,
    newest_state,
    set_aside_damaged,
    states,
)
from ddetr.engine.run.tables import Table, text_of
from ddetr.errors import InputError
from ddetr.evaluation.metrics import Metrics
from ddetr.files import make_folder, remove_leftovers, write_text
from ddetr.printable import csv_cell, one_line
from ddetr.runtime.distributed import is_first_process
from ddetr.settings import flat, kept, names_with
from ddetr.untrusted import MAX_RUN_BYTES, MAX_YAML_BYTES, parse_json, parse_yaml, read_text

logger = logging.getLogger(__name__)

CONFIG_FILE, PREFLIGHT_FILE = "config.yaml", "preflight.json"
_CHOSEN = "DDETR_RUN"  # tells the processes that Lightning starts which folder the first one has chosen


class RunFolder:
    """Paths and files of one run. All files are written whole, under another name first, or row by row."""

    def __init__(self, path: Path):
        self.path, self.lock = path, RunLock(path)
        self.unwritten: dict[str, str] = {}  # names of files that could not be written when last tried, and why
        self._seen = self._stamps()
        self._tables: dict[str, Table] = {}

    @contextmanager
    def going_on_without(self, name: str) -> Iterator[None]:
        """Reports once that a file could not be written instead of raising: a disk that is full now may have room at
        the next try, and what was there before is intact."""
        try:
            yield
        except OSError as error:
            reason = error.strerror or str(error)
            if self.unwritten.get(name) != reason:
                logger.error(
                    "%s could not be written (%s; %s): what was there before is intact and the run goes on",
                    self.path / name, reason, self._room(),
                )  # fmt: skip
            self.unwritten[name] = reason
        else:
            if self.unwritten.pop(name, None) is not None:
                logger.info("%s could be written again", self.path / name)

    def _room(self) -> str:
        try:
            return f"{shutil.disk_usage(self.path).free / 2**20:.0f} MB are free there"
        except OSError:
            return "the folder is not there any more: was it moved?"

    def check_written(self) -> None:
        """Raises `InputError` where the last state of a file is not on disk."""
        if self.unwritten:
            names = ", ".join(f"{name} ({reason})" for name, reason in self.unwritten.items())
            cure = "Make room" if self.path.is_dir() else "Put the folder back"
            raise InputError(
                f"the run has come to its end, but in {self.path} these could not be written: {names}. {cure}; the "
                "same command with --resume goes on from the last state that was written"
            )

    @classmethod
    def choose(cls, output: str | None, resume: str | None, default_name: str) -> tuple["RunFolder", Path | None]:
        """The folder of this run and the file to resume from, or None where the run starts at its beginning.

        Args:
            output: the folder that the user wants; by default runs/NAME, or runs/NAME-2 and so on.
            resume: None for a new run, "last" for the one in `output` or else the newest of this name, "auto" for the
                same where there is one and otherwise a new run, or a run folder or its last.ckpt.
            default_name: NAME.

        Raises:
            InputError: a folder that already holds a run (nothing is ever overwritten), nothing to resume from.
        """
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if _CHOSEN in os.environ and not is_first_process() and not under_torchrun:
            path = Path(os.environ[_CHOSEN])
        elif resume not in (None, "last", "auto"):
            path = _resumed_folder(Path(resume))
            if output is not None and Path(output).resolve() != path.resolve():
                raise InputError(
                    f"--resume continues the run in {path}: leave --output out, or start anew with --weights"
                )
        elif output is not None:
            path = Path(output)
        elif under_torchrun:
            raise InputError("under torchrun every process must know the folder: give --output FOLDER")
        else:
            path = _newest_run(Path("runs"), default_name) if resume is not None else None
            if path is None and resume == "last":
                there = Path("runs") / default_name
                raise InputError(f"--resume: there is no run {there} to continue; start one without --resume")
            path = path or free_folder(Path("runs"), default_name)
        if is_first_process():
            os.environ[_CHOSEN] = str(path)
            holds_run = (path / CONFIG_FILE).exists()
            if resume is None and holds_run:
                raise _already_holds_a_run(path)
            if resume is not None and not holds_run and not states(path):
                if resume != "auto":
                    raise InputError(f"--resume: {path} holds no run; start one without --resume")
                logger.info("--resume auto: %s holds no run yet, so a new one begins", path)
        # A run that was killed before its first save has no state yet: resuming it is starting it again.
        return cls(path), newest_state(path) if resume is not None else None

    def settings(self) -> dict[str, Any]:
        """What config.yaml holds; empty where there is none yet.

        Raises:
            InputError: the file is empty or broken.
        """
        file = self.path / CONFIG_FILE
        if not file.is_file():
            return {}
        try:
            content = parse_yaml(read_text(file, MAX_YAML_BYTES), file.name)
        except (InputError, UnicodeDecodeError, OSError) as error:
            content = f"broken ({one_line(error)})"
        if not isinstance(content, dict):
            what = {type(None): "empty", str: content}.get(type(content), "no list of settings")
            raise InputError(
                f"--resume: {file} is {what}: the settings of the run are not known. Put the file back (its values are "
                f"in {self.path / 'report.html'} too), or start a new run from its --weights {self.path / 'last.pth'}"
            )
        return content

    def last_metrics(self) -> Metrics:
        """Of the last validation.

        Raises:
            InputError: metrics.json is not there, or is none.
        """
        file = self.path / "metrics.json"
        try:
            return Metrics.from_dict(parse_json(read_text(file, MAX_RUN_BYTES), file.name)["last"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"the run in {self.path} is complete, but {file.name} cannot be read ({type(error).__name__}): measure "
                f"again with `ddetr eval --checkpoint {self.path / 'last.pth'}`"
            ) from error

    def _stamps(self) -> list[tuple[str, int, int]]:
        found = [(file, file.stat()) for file in states(self.path)]
        return [(file.name, stat.st_mtime_ns, stat.st_size) for file, stat in found]

    def check_nobody_came(self) -> None:
        """`InputError` where another process has worked on the run since this one has chosen its state: it would take
        that one's steps back."""
        if self._stamps() != self._seen:
            raise InputError(
                f"another process has gone on with the run in {self.path} while this one was starting: start it again"
            )

    def check_unchanged(self, config: TrainConfig, resume_file: Path) -> None:
        """A resumed run must be the same run: a changed setting would make the loaded optimiser and schedule wrong.
        Of a run that has come to its end what may only grow, the number of epochs, may have grown."""
        before, now = flat(self.settings()), flat(kept(config))
        free, growing = names_with(config, "free"), names_with(config, "grows")
        is_complete = epochs_done(resume_file) >= before.get("epochs", math.inf)
        changed = [
            f"{key} was {before[key]!r} and is {now.get(key)!r}"
            for key in before  # a setting that came with a later version had its default then
            if before[key] != now.get(key)
            and key not in free
            and not (key in growing and isinstance(before[key], int) and before[key] < now[key] and is_complete)
        ]
        if changed:
            raise InputError(
                f"--resume continues a run with the settings that it had, but {', '.join(changed)}: put them back "
                f"(--config {self.path / CONFIG_FILE}), or start a new run from its --weights {self.path / 'last.pth'}"
            )

    @contextmanager
    def claimed(self, *, is_new: bool) -> Iterator[None]:
        """The folder, made where it is not there, is this process's alone within the block.

        Raises:
            InputError: another process has it; or it holds a run that was begun since `choose` has looked, and a new
                one is wanted; or it cannot be written to.
        """
        make_folder(self.path, "--output")
        with self._written():
            self.lock.take()
        try:
            if is_new and (self.path / CONFIG_FILE).exists():
                raise _already_holds_a_run(self.path)
            yield
        finally:
            self.lock.release()

    def start(self, config: TrainConfig, resumed_from: Path | None = None) -> None:
        """Writes the settings, and clears away what a killed process has left half."""
        with self._written():
            remove_leftovers(self.path)
            if resumed_from is not None:
                set_aside_damaged(resumed_from)
            self.write_settings(kept(config))

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            reason = error.strerror or error
            raise InputError(f"--output: {self.path} cannot be written to ({reason}; {self._room()})") from error

    def write_settings(self, config: Mapping[str, Any]) -> None:
        self.write_text(CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_csv(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        rows = [{column: csv_cell(value) for column, value in row.items()} for row in rows]
        self.write_text(name, text_of(rows, list(rows[0]), header=True) if rows else "")

    def table(self, name: str) -> Table:
        return self._tables.setdefault(name, Table(self.path / name))

    def append_row(self, name: str, row: Mapping[str, Any]) -> None:
        """A row of train.csv or val.csv; one that cannot be written is reported, and comes with the next."""
        with self.going_on_without(name):
            self.table(name).append(row)


def _already_holds_a_run(path: Path) -> InputError:
    return InputError(f"{path} already holds a run: add --resume to continue it, or choose another --output")


def is_free(path: Path) -> bool:
    """Whether a run may begin there: nothing is, or only what one has left that ended before its beginning."""
    if not path.exists():
        return True
    if not path.is_dir() or not {entry.name for entry in path.iterdir()} <= {PREFLIGHT_FILE, LOCK_FILE}:
        return False
    return not RunLock(path).is_held()


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or the first of parent/name-2, parent/name-3, ... that `is_free`."""
    path, number = parent / name, 1
    while not is_free(path):
        number += 1
        path = parent / f"{name}-{number}"
    return path


def _resumed_folder(place: Path) -> Path:
    if place.is_dir():
        return place
    if not place.is_file():
        raise InputError(f"--resume: expected a run folder or its {RESUME_FILE}, but there is no {place}")
    if place.name not in (RESUME_FILE, PREVIOUS_FILE):
        check_training_state(place)
        raise InputError(f"--resume: expected a run folder or its {RESUME_FILE}, got {place}: give the folder")
    if place.name == PREVIOUS_FILE and place.with_name(RESUME_FILE).exists():
        raise InputError(
            f"--resume: a run goes on from its newest state, and {place} is the one before: give the folder, or move "
            f"{RESUME_FILE} away first"
        )
    return place.parent


def _newest_run(parent: Path, name: str) -> Path | None:
    """Of parent/NAME, parent/NAME-2, ... the one that was worked on last; None where there is none."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    folders = [path for path in parent.glob("*") if pattern.fullmatch(path.name) and (path / CONFIG_FILE).is_file()]

    def last_change(path: Path) -> float:
        return max(file.stat().st_mtime for file in (path / CONFIG_FILE, *states(path)))

    return max(folders, key=last_change, default=None)

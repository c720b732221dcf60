"""The run folder: where everything that a run leaves lies, and how a run is found again. `ddetr.report.run_files.FILES`
says what each file is.
"""

import csv
import io
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml

from ddetr.engine.config import TrainConfig
from ddetr.errors import InputError
from ddetr.files import make_folder, write_text
from ddetr.runtime.distributed import is_first_process
from ddetr.settings import flat, free_to_change, kept
from ddetr.untrusted import csv_cell

logger = logging.getLogger(__name__)

RESUME_FILE, PREVIOUS_FILE = "last.ckpt", "previous.ckpt"
CONFIG_FILE = "config.yaml"
_CHOSEN = "DDETR_RUN"  # tells the processes that Lightning starts which folder the first one has chosen


class RunFolder:
    """Paths and files of one run. All files are written whole, under another name first, or appended line by line."""

    def __init__(self, path: Path):
        self.path = path
        self.unwritten: dict[str, str] = {}  # names of files that could not be written when last tried, and why

    @contextmanager
    def going_on_without(self, name: str) -> Iterator[None]:
        """Reports that a file could not be written instead of raising: a disk that is full now may have room at the
        next try, and what was there before is intact."""
        try:
            yield
        except OSError as error:
            self.unwritten[name] = error.strerror or str(error)
            free = shutil.disk_usage(self.path).free / 2**20
            logger.error(
                "%s could not be written (%s; %.0f MB are free there): what was there before is intact and the "
                "run goes on",
                self.path / name, self.unwritten[name], free,
            )  # fmt: skip
        else:
            self.unwritten.pop(name, None)

    def check_written(self) -> None:
        """Raises `InputError` where the last state of a file is not on disk."""
        if self.unwritten:
            names = ", ".join(f"{name} ({reason})" for name, reason in self.unwritten.items())
            raise InputError(
                f"the run has come to its end, but in {self.path} these could not be written: {names}. Make "
                "room; the same "
                "command with --resume goes on from the last state that was written"
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
                raise InputError(f"{path} already holds a run: add --resume to continue it, or choose another --output")
            if resume is not None and not holds_run and not _states(path):
                if resume != "auto":
                    raise InputError(f"--resume: {path} holds no run; start one without --resume")
                logger.info("--resume auto: %s holds no run yet, so a new one begins", path)
        # A run that was killed before its first save has no state yet: resuming it is starting it again.
        return cls(path), newest_state(path) if resume is not None else None

    def settings(self) -> dict[str, Any]:
        """What config.yaml holds; empty where there is none yet."""
        file = self.path / CONFIG_FILE
        return yaml.safe_load(file.read_text()) if file.is_file() else {}

    def check_unchanged(self, config: TrainConfig) -> None:
        """A resumed run must be the same run: a changed setting would make the loaded optimiser and schedule wrong."""
        before, now, free = flat(self.settings()), flat(kept(config)), free_to_change(config)
        changed = [
            f"{key} was {before[key]!r} and is {now.get(key)!r}"
            for key in before  # a setting that came with a later version had its default then
            if before[key] != now.get(key) and key not in free
        ]
        if changed:
            raise InputError(
                f"--resume continues a run with the settings that it had, but {', '.join(changed)}: put them back "
                f"(--config {self.path / CONFIG_FILE}), or start a new run from its --weights {self.path / 'last.pth'}"
            )

    def start(self, config: TrainConfig) -> None:
        """Makes the folder and writes the settings into it."""
        make_folder(self.path, "--output")
        self.write_settings(kept(config))

    def write_settings(self, config: Mapping[str, Any]) -> None:
        self.write_text(CONFIG_FILE, yaml.safe_dump(dict(config), sort_keys=False))

    def write_text(self, name: str, text: str) -> None:
        write_text(self.path / name, text)

    def write_json(self, name: str, value: Any) -> None:
        self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_csv(self, name: str, rows: Iterable[Mapping[str, Any]]) -> None:
        rows, text = list(rows), io.StringIO(newline="")
        if rows:
            writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
        self.write_text(name, text.getvalue())

    def append_csv(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.path / name
        is_new = not path.exists()
        with self.going_on_without(name), path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys(), lineterminator="\n")
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def read_csv(self, name: str) -> list[dict[str, str]]:
        path = self.path / name
        if not path.exists():
            return []
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        return [row for row in rows if None not in row.values()]  # a killed process may leave half a row

    def drop_rows_after(self, name: str, step: int) -> None:
        """Take back what a killed run wrote after the checkpoint that it resumes from."""
        kept = [row for row in self.read_csv(name) if int(row["step"]) <= step]
        if kept:
            self.write_csv(name, kept)
        else:
            (self.path / name).unlink(missing_ok=True)  # with its header, which comes with the next row


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or the first of parent/name-2, parent/name-3, ... that is not there yet."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


def newest_state(folder: Path) -> Path | None:
    """The newest whole state in a run folder, or None where there is none at all.

    Raises:
        InputError: there are files, but all are damaged.
    """
    errors: list[InputError] = []
    for file in _states(folder):
        try:
            check_training_state(file)
        except InputError as error:
            errors.append(error)
            continue
        if errors:
            logger.warning("%s: the state before it, %s, is taken", errors[0], file)
        return file
    if errors:
        raise errors[0]
    return None


def _states(folder: Path) -> list[Path]:
    return [folder / name for name in (RESUME_FILE, PREVIOUS_FILE) if (folder / name).is_file()]


def check_training_state(file: Path) -> None:
    """Raises `InputError` where `file` is not the state of a training run."""
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises anything
        raise InputError(
            f"--resume: {file} is no training state, or a damaged one ({type(error).__name__}); a run can also be "
            "started anew from its last.pth or best.pth by --weights"
        ) from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise InputError(
            f"--resume: {file} holds weights, not the state of a run: start from them with --weights {file}"
        )


def _resumed_folder(place: Path) -> Path:
    if place.is_dir():
        return place
    if not place.is_file():
        raise InputError(f"--resume: expected a run folder or its {RESUME_FILE}, but there is no {place}")
    if place.name not in (RESUME_FILE, PREVIOUS_FILE):
        check_training_state(place)
        raise InputError(f"--resume: expected a run folder or its {RESUME_FILE}, got {place}: give the folder")
    return place.parent


def _newest_run(parent: Path, name: str) -> Path | None:
    """Of parent/NAME, parent/NAME-2, ... the one that was worked on last; None where there is none."""
    pattern = re.compile(re.escape(name) + r"(-\d+)?")
    folders = [path for path in parent.glob("*") if pattern.fullmatch(path.name) and (path / CONFIG_FILE).is_file()]

    def last_change(path: Path) -> float:
        return max(file.stat().st_mtime for file in (path / CONFIG_FILE, *_states(path)))

    return max(folders, key=last_change, default=None)

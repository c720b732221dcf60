"""The run folder: where everything that a run leaves lies, and how a run is found again.

    config.yaml          all settings, readable by `ddetr train --config`
    audit.json           what was found in the data
    train.csv, val.csv   a row every few steps, a row a validation
    metrics.json         the last and the best validation, by class
    per_class.csv        the best validation's table
    last.ckpt            everything that resuming needs
    best.pth, last.pth   published checkpoints, for `ddetr eval` and `ddetr predict`
    curves.png, pictures/
"""

import csv
import json
import os
from collections.abc import Iterable, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ddetr.errors import InputError

RESUME_FILE = "last.ckpt"
_CHOSEN = "DDETR_RUN"  # keeps the processes that Lightning starts from choosing folders of their own


class RunFolder:
    """Paths and files of one run. All files are written whole, under another name first, or appended line by line."""

    def __init__(self, path: Path):
        self.path = path

    @classmethod
    def choose(cls, output: str | None, resume: str | None, default_name: str) -> tuple["RunFolder", Path | None]:
        """The folder of this run and the file to resume from, or None.

        Args:
            output: the folder that the user wants; by default runs/NAME, or runs/NAME-2 and so on.
            resume: None for a new run, "auto" for the newest of this name, or a run folder or its last.ckpt.
            default_name: NAME.

        Raises:
            InputError: a folder that already holds a run (nothing is ever overwritten), nothing to resume from.
        """
        if resume not in (None, "auto"):
            file = Path(resume) / RESUME_FILE if Path(resume).is_dir() else Path(resume)
            if not file.is_file():
                raise InputError(f"--resume {resume}: expected a run folder with {RESUME_FILE}, or that file; nothing is there")
            return cls(Path(output) if output else file.parent), file
        if _CHOSEN in os.environ:
            path = Path(os.environ[_CHOSEN])
        elif output is not None:
            path = Path(output)
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            raise InputError("under torchrun every process must know the folder: give --output FOLDER")
        elif resume == "auto":
            candidates = [p for p in Path("runs").glob(f"{default_name}*") if (p / RESUME_FILE).is_file()]
            if not candidates:
                raise InputError(f"--resume: no run to continue in runs/{default_name}*: expected one with {RESUME_FILE}")
            path = max(candidates, key=lambda p: (p / RESUME_FILE).stat().st_mtime)
        else:
            path = free_folder(Path("runs"), default_name)
        if resume == "auto":
            if not (path / RESUME_FILE).is_file():
                raise InputError(f"--resume: {path} holds no {RESUME_FILE}: start without --resume")
            return cls(path), path / RESUME_FILE
        if (path / "config.yaml").exists() and _CHOSEN not in os.environ:
            raise InputError(f"{path} already holds a run: add --resume to continue it, or choose another --output")
        os.environ[_CHOSEN] = str(path)
        return cls(path), None

    def file(self, name: str) -> Path:
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write_text(self, name: str, text: str) -> Path:
        path = self.file(name)
        with atomic(path) as temporary:
            temporary.write_text(text)
        return path

    def write_json(self, name: str, value: Any) -> Path:
        return self.write_text(name, json.dumps(value, indent=1) + "\n")

    def write_yaml(self, name: str, value: Any) -> Path:
        return self.write_text(name, yaml.safe_dump(value, sort_keys=False))

    def write_csv(self, name: str, rows: Iterable[Mapping[str, Any]]) -> Path:
        rows = list(rows)
        path = self.file(name)
        with atomic(path) as temporary, temporary.open("w", newline="") as file:
            if rows:
                writer = csv.DictWriter(file, rows[0].keys())
                writer.writeheader()
                writer.writerows(rows)
        return path

    def append_csv(self, name: str, row: Mapping[str, Any]) -> None:
        path = self.file(name)
        is_new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, row.keys())
            if is_new:
                writer.writeheader()
            writer.writerow(row)

    def read_csv(self, name: str) -> list[dict[str, str]]:
        path = self.path / name
        if not path.exists():
            return []
        with path.open(newline="") as file:
            return list(csv.DictReader(file))

    def drop_rows_after(self, name: str, step: int) -> None:
        """Take back what a killed run wrote after the checkpoint that it resumes from."""
        rows = self.read_csv(name)
        kept = [row for row in rows if row["step"] and int(row["step"]) <= step]
        if len(kept) < len(rows):
            self.write_csv(name, kept)


def free_folder(parent: Path, name: str) -> Path:
    """parent/name, or the first of parent/name-2, parent/name-3, ... that is not there yet."""
    path, number = parent / name, 1
    while path.exists():
        number += 1
        path = parent / f"{name}-{number}"
    return path


@contextmanager
def atomic(path: Path):
    """Yields a temporary path beside `path` and renames it on success; on an error `path` stays as it was."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)

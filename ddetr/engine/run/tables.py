"""A CSV file that grows by a row at a time, and survives what may happen between two rows: kills, full disks, a
resume."""

import csv
import io
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ddetr.files import write_text
from ddetr.untrusted import MAX_TABLE_BYTES, parse_csv, read_text

logger = logging.getLogger(__name__)

KEY = "step"  # the column that each row has: a whole number
_LONGEST_LINE = 100_000  # bytes; a row is far shorter


class Table:
    """The rows of a run by step: train.csv, val.csv. A row is on disk whole or not at all."""

    def __init__(self, path: Path):
        self.path = path
        self._waiting: list[dict[str, Any]] = []  # rows that found no room on the disk

    def append(self, row: Mapping[str, Any]) -> None:
        """Adds a row, after those that could not be written before.

        Raises:
            OSError: it cannot be written now. The file is as it was, and the row comes with the next one.
        """
        self._waiting.append(dict(row))
        columns = self._columns()
        if columns is None:
            self._write([], list(row))
        elif set(row) <= set(columns):
            _append(self.path, text_of(self._waiting, columns))
        else:  # columns that came with another version
            self._write(self.rows(), list(dict.fromkeys([*columns, *row])))
        self._waiting.clear()

    def rows(self) -> list[dict[str, str]]:
        """Those that are whole: a killed process may leave half a row, and versions before this one half a row with
        another one behind it."""
        return self._read()[1]

    def drop_after(self, step: int) -> None:
        """Takes back what a killed run wrote after the state that it resumes from, and what is no whole row. A full
        disk has room for it: where only an end is taken away, the file is cut."""
        if not self.path.is_file():
            return
        columns, rows = self._read()
        rows = [row for row in rows if int(row[KEY]) <= step]
        if columns is None and self.path.stat().st_size:
            aside = self.path.with_name(f"{self.path.name}.damaged")
            os.replace(self.path, aside)
            logger.warning("%s is no table of a run any more: it is kept as %s, a new one begins", self.path, aside)
        elif not rows:
            self.path.unlink()  # with its header, which comes with the next row
        else:
            kept = text_of(rows, columns, header=True).encode()
            if self.path.read_bytes().startswith(kept):
                os.truncate(self.path, len(kept))
            else:
                self._write(rows, columns)

    def _read(self) -> tuple[list[str] | None, list[dict[str, str]]]:
        """The header, None where there is no whole one or the file is broken, and the whole rows."""
        columns = self._columns()
        if columns is None:
            return None, []
        try:
            _, *lines = parse_csv(read_text(self.path, MAX_TABLE_BYTES, "utf-8", "replace"))
        except ValueError:
            return None, []
        rows = [dict(zip(columns, line)) for line in lines if len(line) == len(columns)]
        return columns, [row for row in rows if row[KEY].isdecimal()]

    def _columns(self) -> list[str] | None:
        """Of the file's header; None where there is no file yet, or none with a whole header."""
        if not self.path.is_file():
            return None
        with self.path.open("rb") as file:
            header = parse_csv(file.readline(_LONGEST_LINE).decode("utf-8", "replace"))
        return header[0] if header and KEY in header[0] else None

    def _write(self, rows: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> None:
        """Anew, with the rows that wait."""
        write_text(self.path, text_of([*rows, *self._waiting], columns, header=True))


def text_of(rows: Iterable[Mapping[str, Any]], columns: Sequence[str], *, header: bool = False) -> str:
    """Rows as lines of CSV; a row without a column has nothing there."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    if header:
        writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _append(path: Path, text: str) -> None:
    """All of it or, where an error is raised, nothing. What stands behind the last whole line is taken away."""
    content = text.encode()
    with path.open("rb+", buffering=0) as file:
        end = _end_of_lines(file)
        file.truncate(end)
        file.seek(end)
        try:
            while content:
                content = content[file.write(content) :]
        except OSError:
            file.truncate(end)
            raise


def _end_of_lines(file: io.FileIO) -> int:
    """Where the last line that is whole ends."""
    size = file.seek(0, os.SEEK_END)
    for length in (1, _LONGEST_LINE):  # nearly always its last byte says it
        start = max(0, size - length)
        file.seek(start)
        if (end := (file.read(size - start) or b"").rfind(b"\n")) >= 0:
            return start + end + 1
    return start

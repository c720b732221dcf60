"""Tables that grow by rows: a row is on disk whole or not at all, whatever happened before."""

import errno
import io
from pathlib import Path
from typing import Any

import pytest

from ddetr.engine.run import tables
from ddetr.engine.run.tables import Table


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path / "train.csv")


def fill(table: Table, *steps: int) -> None:
    for step in steps:
        table.append({"step": step, "loss": step / 2})


def test_rows_after_the_state_are_taken_back(table: Table) -> None:
    fill(table, 1, 2, 3)
    table.drop_after(2)
    table.append({"step": 3, "loss": 7.0})
    assert table.path.read_text() == "step,loss\n1,0.5\n2,1.0\n3,7.0\n"
    table.drop_after(0)
    assert not table.path.exists()
    fill(table, 1)
    assert table.path.read_text() == "step,loss\n1,0.5\n"
    Table(table.path.with_name("none.csv")).drop_after(3)


@pytest.mark.parametrize("cut", range(1, 22))
def test_a_file_that_ends_anywhere_is_continued(table: Table, cut: int) -> None:
    """In its header, in a row, at a line's end: what a kill or a full disk leaves."""
    fill(table, 1, 2)
    whole = table.path.read_bytes()
    assert len(whole) == 22
    table.path.write_bytes(whole[:cut])
    again = Table(table.path)
    known = [row["step"] for row in again.rows()]
    fill(again, 3)
    assert [row["step"] for row in again.rows()] == [*known, "3"]
    again.drop_after(3)
    assert table.path.read_text() == "step,loss\n" + "".join(f"{n},{int(n) / 2}\n" for n in [*known, "3"])


def test_a_row_that_finds_no_room_comes_with_the_next(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk takes a part of the row first."""
    fill(table, 1)
    before = table.path.read_bytes()
    original = tables._append

    class Full(io.FileIO):
        def write(self, content: Any) -> int:
            if len(content) > 2:
                return super().write(content[:2])
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "open", lambda path, mode, **_: Full(path, mode.replace("b", "")))
    with pytest.raises(OSError, match="No space left"):
        original(table.path, "2,1.0\n")
    monkeypatch.undo()
    assert table.path.read_bytes() == before

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables, "_append", full)
    for step in (2, 3):
        with pytest.raises(OSError, match="No space left"):
            fill(table, step)
    monkeypatch.undo()
    fill(table, 4)
    assert [row["step"] for row in table.rows()] == ["1", "2", "3", "4"]


def test_a_header_that_never_came(table: Table) -> None:
    """The rows of an older version whose header found no room: kept aside, and a new table begins."""
    table.path.write_text("5,0.5\n6,0.25\n")
    assert table.rows() == []
    table.drop_after(6)
    assert table.path.with_name("train.csv.damaged").read_text() == "5,0.5\n6,0.25\n"
    fill(table, 7)
    assert [row["step"] for row in table.rows()] == ["7"]


def test_zeros_and_endless_cells_are_no_rows(table: Table) -> None:
    """What a crash of the machine leaves in the place of pages that it had not written."""
    fill(table, 1, 2)
    with table.path.open("ab") as file:
        file.write(bytes(5000))
    assert [row["step"] for row in table.rows()] == ["1", "2"]
    fill(table, 3)
    assert table.path.read_text() == "step,loss\n1,0.5\n2,1.0\n3,1.5\n"
    with table.path.open("a") as file:
        file.write("4," + "9" * 200_000 + "\n")
    assert table.rows() == []
    table.drop_after(3)
    assert table.path.with_name("train.csv.damaged").read_text().startswith("step,loss\n1,0.5\n")


def test_a_row_that_others_are_glued_to_is_left_out(table: Table) -> None:
    table.path.write_text("step,loss\n1,0.5\n2,0.3,0.25\nx,1\n4,2.0\n5,2.5\n")
    table.drop_after(4)
    assert table.path.read_text() == "step,loss\n1,0.5\n4,2.0\n"


def test_columns_that_come_later_stand_at_the_end(table: Table) -> None:
    fill(table, 1)
    table.append({"step": 2, "memory": 3, "loss": 1.0})
    fill(table, 3)
    assert table.path.read_text() == "step,loss,memory\n1,0.5,\n2,1.0,3\n3,1.5,\n"


def test_a_cut_needs_no_room(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(table, 1, 2, 3)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tables, "write_text", full)
    table.drop_after(1)
    assert table.path.read_text() == "step,loss\n1,0.5\n"

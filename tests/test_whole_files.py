"""Files that are whole or absent."""

import errno
from pathlib import Path

import pytest

from ddetr.files import write_atomically


def test_a_full_disk_names_the_file_that_found_no_room(tmp_path: Path) -> None:
    """The system's error does not, where a program only writes into what it has opened."""
    target = tmp_path / "a.txt"
    target.write_text("before")

    def full(temporary: Path) -> None:
        temporary.write_text("ha")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left") as caught:
        write_atomically(target, full)
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "before"

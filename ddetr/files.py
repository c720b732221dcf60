"""Files that are whole or absent: written under another name first, then put in their place."""

import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from ddetr.errors import InputError


def write_atomically(path: Path, write: Callable[[Path], object], keep_as: Path | None = None) -> None:
    """Call `write` with a temporary name beside `path`, then put the file in its place: killed at any moment, it
    leaves either the old file or the new one under `path`.

    keep_as: the name, in the same folder, that the old file gets; killed between the two renamings, it is there alone.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with an empty folder of a temporary name, then put it in the place of `path`, which it replaces:
    killed at any moment, it leaves no half of a folder under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    temporary.mkdir()
    try:
        write(temporary)
        for place in temporary.rglob("*"):
            if place.is_file():
                with place.open("rb+") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8; what is no valid text, as in some file names, is escaped."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))


def make_folder(path: Path, option: str) -> Path:
    """A folder to write to, made if it is not there; `InputError` naming `option` where that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{option}: the folder {path} cannot be made ({error.strerror or error})") from error
    if not os.access(path, os.W_OK):
        raise InputError(f"{option}: the folder {path} cannot be written to; choose another")
    return path


def _sync_folder(folder: Path) -> None:
    """The new name is on disk only when the folder is; not every system can open one."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)

"""Files that are whole or absent: written under another name first, then put in their place."""

import os
import re
import secrets
import shutil
import time
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ddetr.errors import InputError
from ddetr.wording import did_you_mean


def write_atomically(path: Path, write: Callable[[Path], object], keep_as: Path | None = None) -> None:
    """Call `write` with a temporary name beside `path`, then put the file in its place: killed at any moment, it
    leaves either the old file or the new one under `path`.

    keep_as: the name, in the same folder, that the old file gets; killed between the two renamings, it is there alone.
    """
    temporary = _temporary(path)
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except OSError as error:
        if error.filename is None and error.errno is not None:  # a full disk does not say for which file
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_folder_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with an empty folder of a temporary name, then put it in the place of `path`, which it replaces:
    killed at any moment, it leaves no half of a folder under `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        write(temporary)
        for place in temporary.rglob("*"):
            if place.is_file() and place.stat().st_nlink == 1:  # of more names: one from before, perhaps read-only
                with place.open("rb+") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    _sync_folder(path.parent)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")


def remove_leftovers(folder: Path) -> None:
    """What the two functions above have left in it, and in the folders in it, where their process was killed."""
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        found = re.fullmatch(r"\..+\.(\d+)\.[0-9a-f]{8}\.tmp", path.name)
        with suppress(OSError):
            is_old = time.time() - path.lstat().st_mtime > 3600  # its number may be that of another process by now
            if found is not None and (is_old or not _is_alive(int(found[1]))):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _is_alive(pid: int) -> bool:
    if os.name == "nt":  # where this call would send Ctrl+C
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # somebody else's
        return True
    return pid != os.getpid()  # the number of a process before this one: this one has left nothing


def damage(path: Path) -> str | None:
    """What is wrong with an archive, as `torch.save` writes it, in words; None where its bytes are those of their
    checksums, or it is no archive. PyTorch's own reader looks at no checksum."""
    try:
        if not zipfile.is_zipfile(path):
            return None
        with zipfile.ZipFile(path) as archive:
            member = archive.testzip()
        return None if member is None else f"the checksum of {ascii(member)} in it is wrong"
    except OSError:
        raise
    except Exception as error:  # a changed byte in its table raises anything
        return f"its table of contents is broken ({type(error).__name__})"


def write_text(path: Path, text: str) -> None:
    """`text` as UTF-8; what is no valid text, as in some file names, is escaped."""
    write_atomically(path, lambda file: file.write_text(text, encoding="utf-8", errors="backslashreplace"))


def existing(path: str | os.PathLike) -> Path:
    """The path; `InputError` with the nearest name where nothing is there."""
    path = Path(path).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise InputError(f"{path} is neither a folder nor a file: expected the folder of a data set")
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    hint = did_you_mean(missing, (entry.name for entry in parent.iterdir()))
    raise InputError(f"there is no {path}: {parent} has no {missing!r}{hint}")


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

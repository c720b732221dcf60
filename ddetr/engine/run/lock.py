"""A run folder belongs to one process at a time: two that trained into it would mix up their rows and states."""

import errno
import json
import logging
import os
import socket
import time
from contextlib import suppress
from pathlib import Path

from ddetr.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

logger = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
_HELD: set[Path] = set()  # by this process
_NOT_POSSIBLE = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}  # some network and FUSE file systems


class RunLock:
    """The lock is the system's (POSIX `fcntl`): it ends with its process however that dies, is not inherited by the
    processes that load images, and holds between machines where their network file system passes locks on (NFS does).
    The file beside it names the holder for others, and goes with a run that ends by itself."""

    def __init__(self, folder: Path):
        self.path = folder / LOCK_FILE
        self._descriptor: int | None = None

    def take(self) -> None:
        """Does nothing where this process has it already.

        Raises:
            InputError: another process has it.
            OSError: the folder cannot be written to.
        """
        if self._descriptor is None and self._place() in _HELD:  # the system lets a process have its own lock twice
            raise InputError(f"{self.path.parent} is in use by another run of this process: choose another --output")
        while self._descriptor is None:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o644)
            try:
                if fcntl is not None:
                    fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                holder = os.read(descriptor, 1000)
                os.close(descriptor)
                if error.errno in _NOT_POSSIBLE:
                    logger.warning("%s: this file system has no locks: see to it that one run uses it", self.path)
                    return
                if error.errno not in (errno.EACCES, errno.EAGAIN):
                    raise
                raise InputError(
                    f"{self.path.parent} is in use by another run{_named(holder)}: stop that one first, or choose "
                    "another --output"
                ) from None
            if _is_still(self.path, descriptor):
                self._descriptor = descriptor
                _HELD.add(self._place())
                me = {"host": socket.gethostname(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
                with suppress(OSError):  # a full disk: it holds all the same, and is only not named
                    os.truncate(descriptor, 0)
                    os.write(descriptor, json.dumps(me).encode())
            else:  # its holder has ended, and has removed it, between the two calls
                os.close(descriptor)

    def is_held(self) -> bool:
        """By another run."""
        if not self.path.exists():
            return False
        try:
            self.take()
        except (InputError, OSError):  # also one that this user cannot open
            return True
        self.release()
        return False

    def release(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):  # the folder may have been moved, and another be in its place
                if _is_still(self.path, self._descriptor):
                    self.path.unlink()
            os.close(self._descriptor)
            self._descriptor = None
            _HELD.discard(self._place())

    def _place(self) -> Path:
        return self.path.parent.resolve()


def _is_still(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _named(holder: bytes) -> str:
    """ " (process 123 on host a, since ...)"; "" where the file does not say."""
    try:
        found = json.loads(holder)
        return f" (process {int(found['pid'])} on {str(found['host'])[:100]}, since {str(found['since'])[:40]})"
    except (ValueError, KeyError, TypeError):
        return ""

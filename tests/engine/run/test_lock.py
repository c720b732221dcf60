"""A run folder belongs to one process at a time."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ddetr.engine.run import lock
from ddetr.engine.run.folder import free_folder
from ddetr.engine.run.lock import LOCK_FILE, RunLock
from ddetr.errors import InputError

HOLDER = """
import sys, time
from pathlib import Path
from ddetr.engine.run.lock import RunLock
RunLock(Path(sys.argv[1])).take()
print("taken", flush=True)
time.sleep(100)
"""


def test_another_process_is_named_and_its_death_frees_the_folder(tmp_path: Path) -> None:
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "taken\n"
        message = (
            rf"in use by another run \(process {holder.pid} on {socket.gethostname()}, since 20.*\): stop that one"
        )
        with pytest.raises(InputError, match=message):
            RunLock(tmp_path).take()
        assert RunLock(tmp_path).is_held()
        assert free_folder(tmp_path.parent, tmp_path.name) != tmp_path
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert (tmp_path / LOCK_FILE).exists()
        assert free_folder(tmp_path.parent, tmp_path.name) == tmp_path
        mine = RunLock(tmp_path)
        mine.take()
        mine.take()
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
        mine.release()
        mine.release()
        assert list(tmp_path.iterdir()) == []
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_this_process_does_not_lose_its_own_lock(tmp_path: Path) -> None:
    """The system would let it take its own lock twice, and give back both with the first."""
    mine, other = RunLock(tmp_path), RunLock(tmp_path)
    mine.take()
    assert other.is_held()
    with pytest.raises(InputError, match="in use by another run of this process"):
        other.take()
    other.release()
    assert (tmp_path / LOCK_FILE).exists()
    mine.release()
    assert not other.is_held()


def test_a_holder_that_ends_in_that_moment_is_not_followed_into_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file that was opened is removed before it is locked: its lock would hold nobody off."""
    original, calls = lock.fcntl.lockf, []

    def late(descriptor: int, flags: int) -> None:
        calls.append(1)
        if len(calls) == 1:
            (tmp_path / LOCK_FILE).unlink()
        original(descriptor, flags)

    monkeypatch.setattr(lock.fcntl, "lockf", late)
    mine = RunLock(tmp_path)
    mine.take()
    assert len(calls) == 2
    assert (tmp_path / LOCK_FILE).exists()
    mine.release()


def test_a_file_system_without_locks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def none(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", none)
    RunLock(tmp_path).take()
    assert "this file system has no locks" in caplog.text


def test_what_the_file_says_is_not_trusted(tmp_path: Path) -> None:
    assert lock._named(b"") == lock._named(b"[]") == lock._named(b"\xff") == lock._named(b"{}") == ""
    assert lock._named(b'{"pid": 7, "host": "a", "since": "b"}') == " (process 7 on a, since b)"

"""Work that may crash, hang or poison its process runs in a child with a time limit; what it found out so far stays.

A child is a function `main(arguments)` of a module of this package. It tells what it finds with `tell`, an event at a
time: what a library prints to standard output is kept apart.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

# The same modules as here, wherever the child starts; `-I` keeps the current folder's files out of it.
_START = """
import importlib, json, sys
sys.path[:] = json.loads(sys.argv[1])
importlib.import_module("ddetr.doctor.children").open_channel()
importlib.import_module(sys.argv[2]).main(json.loads(sys.argv[3]))
"""
_channel = 1
_running: set[subprocess.Popen] = set()


class Outcome(NamedTuple):
    """What a child told, and how it ended where it did not end well."""

    events: list[dict[str, Any]]
    problem: str | None


def run(
    module: str, arguments: Sequence[str] = (), *, timeout: float, variables: Mapping[str, str] | None = None
) -> Outcome:
    """`module.main(arguments)` in a process of its own.

    Args:
        module: dotted name.
        arguments: plain text.
        timeout: seconds, after which the child and its children are killed.
        variables: environment variables to set.
    """
    command = [sys.executable, "-I", "-c", _START, json.dumps(sys.path), module, json.dumps(list(arguments))]
    try:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(variables or {})},
            start_new_session=True,
        )
    except OSError as error:
        return Outcome([], f"no process could be started ({error.strerror or error})")
    _running.add(child)
    try:
        out, err = child.communicate(timeout=timeout)
        problem = _how_it_ended(child.returncode, err)
    except subprocess.TimeoutExpired:
        _kill(child)
        out, err = child.communicate()
        problem = f"no answer within {timeout:g} s"
    except BaseException:
        _kill(child)
        raise
    finally:
        _running.discard(child)
    return Outcome(list(_events(out)), problem)


def stop_all() -> None:
    """End what runs in other threads: an interrupt reaches only the main one, and none of the children."""
    for child in list(_running):
        _kill(child)


def open_channel() -> None:
    """In a child: what it tells goes where standard output went, and standard output to standard error."""
    global _channel
    _channel = os.dup(1)
    os.dup2(2, 1)


def tell(**event: Any) -> None:
    """In a child: one event to the parent, at once."""
    os.write(_channel, (json.dumps(event) + "\n").encode())


def sentence(error: BaseException) -> str:
    """An error in one line; long ones are cut."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def _events(out: bytes) -> list[dict[str, Any]]:
    events = []
    for line in out.decode("utf-8", "replace").splitlines():
        with contextlib.suppress(ValueError):
            if isinstance(event := json.loads(line), dict):
                events.append(event)
    return events


def _how_it_ended(code: int, err: bytes) -> str | None:
    if code == 0:
        return None
    lines = [line.strip() for line in err.decode("utf-8", "replace").splitlines() if line.strip()]
    said = f": {lines[-1][:300]}" if lines else ""
    if code < 0:
        with contextlib.suppress(ValueError):
            name = {9: "killed, often for lack of memory", 11: "segmentation fault"}.get(
                -code, signal.Signals(-code).name
            )
            return f"the process died ({name}){said if code != -9 else ''}"
        return f"the process died (signal {-code}){said}"
    return f"the process ended with code {code}{said}"


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        if hasattr(os, "killpg"):
            os.killpg(child.pid, signal.SIGKILL)
        else:
            child.kill()

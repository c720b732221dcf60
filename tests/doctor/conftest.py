"""A pretended NVIDIA driver, and `ddetr doctor` in a process of its own."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import ddetr

_SOURCE = Path(__file__).with_name("fake_driver.c")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def found(self) -> dict[str, Any]:
        """Of --json."""
        return json.loads(self.out)


@pytest.fixture
def fake_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Make a driver that answers as told, found by the library path from then on: `fake_driver(CUDA_VERSION=11040)`."""
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if sys.platform != "linux" or compiler is None:
        pytest.skip("a driver can be pretended on Linux with a C compiler")

    def make(libraries: tuple[str, ...] = ("libcuda.so.1", "libnvidia-ml.so.1"), **answers: Any) -> Path:
        folder = tmp_path / "driver"
        folder.mkdir()
        macros = [
            f'-D{name}="{value}"' if isinstance(value, str) else f"-D{name}={value}" for name, value in answers.items()
        ]
        for name in libraries:
            command = [compiler, "-shared", "-fPIC", *macros, "-o", str(folder / name), str(_SOURCE)]
            subprocess.run(command, check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(folder))
        return folder

    return make


@pytest.fixture
def doctor(tmp_path: Path) -> Callable[..., Outcome]:
    """Run `ddetr doctor` in an empty folder; `shadow` is a folder whose modules come before the installed ones."""

    def run(*arguments: str, shadow: Path | None = None, variables: dict[str, str] | None = None) -> Outcome:
        folder = tmp_path / "work"
        folder.mkdir(exist_ok=True)
        path = [str(shadow)] if shadow else []
        path += [str(Path(ddetr.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
        done = subprocess.run(
            [sys.executable, "-W", "error", "-m", "ddetr", "doctor", *arguments],
            cwd=folder,
            env={**os.environ, **(variables or {}), "PYTHONPATH": os.pathsep.join(filter(None, path))},
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Outcome(done.returncode, done.stdout, done.stderr)

    return run

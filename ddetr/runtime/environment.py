"""What stands beside every figure and every run, so that it can be believed and repeated: machine, software, commit."""

import datetime
import importlib.metadata
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import ddetr
from ddetr.ops import backends
from ddetr.runtime.nvidia import kernel_module

__all__ = ["commit", "describe", "environment", "is_running", "machine"]

_PACKAGE = Path(ddetr.__file__).parent
# What a run's outcome can depend on; those that are not installed are left out.
_PACKAGES = (
    *("torch", "torchvision", "lightning", "timm", "numpy", "scipy", "pillow", "triton"),
    *("hotcoco", "faster-coco-eval", "pycocotools"),
)


def machine(device: torch.device) -> dict[str, Any]:
    """The machine, the software and the operator's back end on `device`, as plain values for JSON."""
    active = next((row for row in backends() if row.active and row.device == device.type), None)
    found = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ddetr": ddetr.__version__,
        "commit": commit(),
        "backend": f"{active.name} ({active.detail})" if active else "none",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        found["cuda"] = torch.version.cuda
    return found


def environment(device: torch.device) -> dict[str, Any]:
    """`machine()` and what else a run depends on: driver, package versions, host, process, folder, command line."""
    found = machine(device)
    if device.type == "cuda":
        found["gpus"] = torch.cuda.device_count()
        found["driver"] = kernel_module()
    return found | {
        "kernel": platform.release(),
        "packages": dict(filter(None, map(_version, _PACKAGES))),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "process_start": _process_start(os.getpid()),
        "folder": os.getcwd(),
        "command": _command_line(),
    }


def describe(found: Mapping[str, Any]) -> str:
    """`machine()` in a line."""
    parts = [f"{found['processor']}, {found['cores']} cores, load {found['load']}"]
    if "gpu" in found:
        parts.append(f"{found['gpu']}, CUDA {found['cuda']}")
    parts.append(f"torch {found['torch']}, back end {found['backend']}")
    parts.append(f"ddetr {found['ddetr']}" + (f", commit {found['commit']}" if found["commit"] else ""))
    return "; ".join(parts)


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with a note if the package was changed; elsewhere what
    DDETR_COMMIT says, or None."""
    # An installed package may lie in the environment of somebody else's checkout.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return os.environ.get("DDETR_COMMIT") or None
    head = _git("rev-parse", "--short", "HEAD")
    return head and head + (" with changes" if _git("status", "--porcelain", "--", ".") else "")


def is_running(found: Mapping[str, Any]) -> bool | None:
    """Whether the process that `environment()` described still runs; None where this machine cannot know."""
    start = found.get("process_start")
    if found.get("host") != socket.gethostname() or not isinstance(found.get("process"), int) or start is None:
        return None
    return _process_start(found["process"]) == start


def _process_start(process: int) -> str | None:
    """When a process started, in the kernel's own count: a later one of the same number differs. None where there is no
    such process, or no /proc to tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return None if fields[0] in ("Z", "X") else fields[19]
    except (OSError, IndexError):
        return None


def _command_line() -> str:
    """The command as one would type it again."""
    name, *arguments = sys.argv
    program = Path(name).name
    if program == "__main__.py" and Path(name).parent.name == "ddetr":
        program = "python -m ddetr"
    return " ".join([program, shlex.join(arguments)]).strip()


def _version(package: str) -> tuple[str, str] | None:
    try:
        return package, importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """What git says in the package's folder; None if it fails or is not there."""
    try:
        done = subprocess.run(["git", *arguments], cwd=_PACKAGE, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines[:30])}
    family = [fields[key] for key in ("cpu family", "model") if key in fields]
    name = fields.get("model name") or platform.machine()
    return name + (f" (family {family[0]}, model {family[1]})" if len(family) == 2 else "")

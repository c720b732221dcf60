"""What stands beside every figure, so that it can be believed and repeated: machine, commit, command; and the files."""

import datetime
import inspect
import json
import os
import platform
import shlex
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch

import ddetr
from ddetr.atomic import write_text
from ddetr.ops import backends

_PACKAGE = Path(ddetr.__file__).parent


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


def describe(found: Mapping[str, Any]) -> str:
    """`machine()` in a line."""
    parts = [f"{found['processor']}, {found['cores']} cores, load {found['load']}"]
    if "gpu" in found:
        parts.append(f"{found['gpu']}, CUDA {found['cuda']}")
    parts.append(f"torch {found['torch']}, back end {found['backend']}")
    parts.append(f"ddetr {found['ddetr']}" + (f", commit {found['commit']}" if found["commit"] else ""))
    return "; ".join(parts)


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with a note if the package was changed; None elsewhere."""
    # An installed package may lie in the environment of somebody else's checkout.
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    head = _git("rev-parse", "--short", "HEAD")
    return head and head + (" with changes" if _git("status", "--porcelain", "--", ".") else "")


def command_line(name: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> str:
    """The shortest command with these settings; where the results went is left out."""
    defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    chosen = {key: value for key, value in settings.items() if value != defaults[key] and key != "output"}
    data = chosen.pop("data", None)
    if is_dataclass(data):  # --data PATH, and its other settings where they were changed
        changed = {f"data.{f.name}": getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}
        chosen = {"data": changed.pop("data.path"), **changed, **chosen}
    words = [word for key, value in chosen.items() for word in (f"--{key}", _spelled(value))]
    return shlex.join(["ddetr", *name.split(), *words])


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def _spelled(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


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

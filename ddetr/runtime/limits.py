"""What this process may use of the machine: cores, memory, shared memory, open files; of a container its limits."""

from __future__ import annotations

import math
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `ddetr doctor` counts cores where PyTorch may be broken or missing
    import torch


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may really use: of the machine, by its affinity (taskset, Slurm) and by the quota of its
    container (Docker's --cpus, Kubernetes' limits). `root` is where /proc and /sys lie."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quotas = []
    for group in _control_groups(root, "cpu"):
        words = _words(group / "cpu.max") or _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")
        with suppress(ValueError, ZeroDivisionError):  # "max", and what is not there, are no limit
            limit, period = map(float, words)
            if limit > 0:
                quotas.append(limit / period)
    return max(1, min([cores, *map(math.ceil, quotas)]))


def free_and_total(device: torch.device, root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes that this process could still take on the device, and that it has; None where nobody says.

    On the CPU the limits of control groups count (containers), `root` is where /proc and /sys are looked for.
    """
    if device.type == "cuda":
        import torch

        return torch.cuda.mem_get_info(device)
    found = []
    with suppress(OSError, KeyError, ValueError, IndexError):
        lines = (root / "proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        found.append((kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024))
    for group in _control_groups(root, "memory"):
        for names in ("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"):
            with suppress(ValueError):  # "max", and what is not there, are no limit
                limit, used = (int(word) for name in names for word in _words(group / name))
                if limit < 1 << 60:  # version 1 says "none" by a number near 2^63
                    found.append((limit - used + _reclaimable(group), limit))
    if not found:
        return None
    return max(0, min(free for free, _ in found)), min(total for _, total in found)


def _control_groups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups around this process that may limit "cpu" or "memory", versions 2 and 1. The
    outermost of each version is among them: a container sees its own group there, and often a path that is only there
    outside."""
    version_2, version_1 = root / "sys/fs/cgroup", root / "sys/fs/cgroup" / controller
    folders = [version_2, version_1]
    with suppress(OSError, ValueError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            names = Path(path).parts[1:]
            base = version_1 if controllers else version_2
            folders += [base.joinpath(*names[:depth]) for depth in range(1, len(names) + 1)]
    return folders


def _words(file: Path) -> list[str]:
    try:
        return file.read_text().split()
    except OSError:
        return []


def _reclaimable(group: Path) -> int:
    """Bytes of cached files, which count as used and are given back when memory is short."""
    try:
        lines = (group / "memory.stat").read_text().splitlines()
        return sum(int(line.split()[1]) for line in lines if line.startswith("inactive_file "))
    except (OSError, ValueError, IndexError):
        return 0


def free_shared_memory() -> int | None:
    """Bytes that are free in /dev/shm, of which containers have 64 MiB where nothing else was asked for."""
    try:
        return shutil.disk_usage("/dev/shm").free
    except OSError:
        return None


def allow_open_files() -> None:
    """Lifts the soft limit of open files, often 1024, to the hard one: each tensor on its way from a loader holds
    one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

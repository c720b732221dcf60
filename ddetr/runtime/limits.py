"""What this process may use of the machine: cores, memory, shared memory, open files; of a container its limits."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch


def available_cores(root: Path = Path("/")) -> int:
    """Cores that this process may really use: of the machine, by its affinity (taskset, Slurm) and by the quota of its
    container (Docker's --cpus, Kubernetes' limits). `root` is where /proc and /sys lie."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    quota = _container_quota(root)
    return max(1, min(cores, math.ceil(quota))) if quota else cores


def _container_quota(root: Path) -> float | None:
    """Cores by the control group's quota; None without one."""
    base = root / "sys/fs/cgroup"
    groups = ["/"]
    try:
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            groups.append(line.split(":", 2)[2])  # inside a container often a path that is only there outside of it
    except (OSError, IndexError):
        pass
    quotas = []
    for group in groups:
        for folder in (base / group.lstrip("/"), base / "cpu" / group.lstrip("/")):
            try:
                if (folder / "cpu.max").is_file():  # version 2
                    limit, period = (folder / "cpu.max").read_text().split()
                else:
                    limit = (folder / "cpu.cfs_quota_us").read_text()
                    period = (folder / "cpu.cfs_period_us").read_text()
                if float(limit) > 0:
                    quotas.append(float(limit) / float(period))
            except (OSError, ValueError, ZeroDivisionError):  # "max", and what is not there, are no limit
                continue
    return min(quotas, default=None)


def free_and_total(device: torch.device, root: Path = Path("/")) -> tuple[int, int] | None:
    """Bytes that this process could still take on the device, and that it has; None where nobody says.

    On the CPU the limits of control groups count (containers), `root` is where /proc and /sys are looked for.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)
    found = []
    try:
        lines = (root / "proc/meminfo").read_text().splitlines()
        kilobytes = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        found.append((kilobytes["MemAvailable"] * 1024, kilobytes["MemTotal"] * 1024))
    except (OSError, KeyError, ValueError, IndexError):
        pass
    found += _cgroup_limits(root)
    if not found:
        return None
    return max(0, min(free for free, _ in found)), min(total for _, total in found)


def _cgroup_limits(root: Path) -> Iterator[tuple[int, int]]:
    """(free, limit) of each control group around this process that has a limit, versions 2 and 1."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    places = [Path("sys/fs/cgroup")]  # what a container sees of its own group
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers == "":
            places += [Path("sys/fs/cgroup", *Path(path).parts[1:i]) for i in range(2, len(Path(path).parts) + 1)]
        elif "memory" in controllers.split(","):
            parts = Path(path).parts
            places += [Path("sys/fs/cgroup/memory", *parts[1:i]) for i in range(1, len(parts) + 1)]
    for place in places:
        for limit_name, usage_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            try:
                limit = int((root / place / limit_name).read_text())  # "max" where there is none
                usage = int((root / place / usage_name).read_text())
            except (OSError, ValueError):
                continue
            if limit < 1 << 60:  # version 1 says "none" by a number near 2^63
                yield limit - usage + _reclaimable(root / place), limit


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
    """Lifts the soft limit of open files, often 1024, to the hard one: each tensor on its way from a loader holds one."""
    try:
        import resource
    except ImportError:  # Windows has no such limit
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

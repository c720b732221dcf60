"""What the operating system says: the machine, NVIDIA's hardware without its driver, limits, folders."""

import os
import platform
import re
import shutil
import sys
import threading
from pathlib import Path

import ddetr
from ddetr.doctor.facts import Folder, Hardware, Limits, Machine
from ddetr.runtime.limits import available_cores
from ddetr.runtime.nvidia import kernel_module

_PATIENCE = 20  # seconds for a folder
# Where the image mounts them.
DATA, OUTPUT = "/workspace/data", "/workspace/output"
_NVIDIA_VENDOR, _DISPLAY_CLASSES = "0x10de", ("0x0300", "0x0302")  # VGA controller, 3D controller
DRIVER_FOLDER = "/usr/local/nvidia/lib64"  # Google's Kubernetes engine; the image's LD_LIBRARY_PATH names it
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "LD_LIBRARY_PATH",
    "DDETR_OPS",
)


def look(root: str = "/") -> Machine:
    """The system; `root` stands for the root of the file system."""
    return Machine(
        system=_system(Path(root)),
        kernel=platform.release(),
        python=platform.python_version(),
        executable=sys.executable,
        ddetr=ddetr.__version__,
        cores=available_cores(Path(root)),
        wsl=Path(root, "dev/dxg").exists() or "microsoft" in platform.release().lower(),
        container=container(Path(root)),
    )


def look_at_hardware(root: str = "/") -> Hardware:
    base = Path(root)
    devices = [f"/dev/{path.name}" for path in sorted(base.glob("dev/nvidia[0-9]*"))]
    pci = base / "sys/bus/pci/devices"
    gpus = [path for path in _listed(pci) if _is_gpu(path)]
    drivers = {(path / "driver").resolve().name for path in gpus if (path / "driver").exists()}
    return Hardware(
        gpus_on_pci=len(gpus) if pci.is_dir() else None,
        pci_drivers=sorted(drivers),
        kernel_module=kernel_module(base),
        devices=devices,
        driver_folder=DRIVER_FOLDER if (base / DRIVER_FOLDER[1:] / "libcuda.so.1").exists() else None,
    )


def variables() -> dict[str, str]:
    """Those environment variables that change what CUDA and ddetr do."""
    return {name: os.environ[name] for name in _VARIABLES if name in os.environ}


def container(root: Path) -> str:
    """The kind of container around this process, "" outside of one."""
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        return "kubernetes"
    if (root / "run/.containerenv").exists():
        return "podman"
    if (root / ".dockerenv").exists():
        return "docker"
    named = os.environ.get("container")  # noqa: SIM112  (systemd's and podman's name for it)
    return "container" if named or "/docker/" in _read(root / "proc/1/cgroup") else ""


def look_at_limits() -> Limits:
    limits = Limits(c_compiler=next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None))
    if os.path.isdir("/dev/shm"):
        usage = shutil.disk_usage("/dev/shm")
        limits.shared_memory, limits.shared_memory_free = usage.total, usage.free
    try:
        import resource
    except ImportError:  # Windows
        return limits

    def number(value: int) -> int | None:
        return None if value == resource.RLIM_INFINITY else value

    limits.open_files, limits.open_files_hard = map(number, resource.getrlimit(resource.RLIMIT_NOFILE))
    limits.locked_memory = number(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0])
    return limits


def look_at_folder(path: str, *, asked_for: bool, to_write: bool) -> Folder:
    """A folder to read from or to write to; for one to write to that is not there yet, the space where it would be."""
    folder = Folder(path=path, asked_for=asked_for)
    looking = threading.Thread(target=_look_into, args=(folder, to_write), daemon=True)
    looking.start()
    looking.join(_PATIENCE)
    if looking.is_alive():
        return Folder(path=path, asked_for=asked_for, exists=True, is_folder=True, error=f"no answer in {_PATIENCE} s")
    return folder


def _look_into(folder: Folder, to_write: bool) -> None:
    """In a thread: a network file system whose server is gone blocks whoever asks it."""
    place = Path(folder.path).expanduser()
    try:
        folder.exists, folder.is_folder = place.exists(), place.is_dir()
        existing = next(parent for parent in (place, *place.resolve().parents) if parent.exists())
        folder.mounted = os.path.ismount(place)
        folder.writable = _can_write(existing)
        folder.free = shutil.disk_usage(existing).free
        if folder.is_folder and not to_write:
            folder.entries = len(os.listdir(place))
        folder.readable = folder.exists and os.access(place, os.R_OK | (os.X_OK if folder.is_folder else 0))
    except OSError as error:
        folder.error = error.strerror or str(error)


def _can_write(folder: Path) -> bool:
    """By the permissions and the mount; on a read-only mount `access` says no as well. Nothing is written."""
    return os.access(folder, os.W_OK)


def _system(root: Path) -> str:
    fields = dict(re.findall(r'^([A-Z_]+)="?([^"\n]*)"?$', _read(root / "etc/os-release"), re.MULTILINE))
    name = fields.get("PRETTY_NAME") or f"{platform.system()} {platform.release()}"
    return f"{name}, {platform.machine()}"


def _is_gpu(device: Path) -> bool:
    return _read(device / "vendor").strip() == _NVIDIA_VENDOR and _read(device / "class").startswith(_DISPLAY_CLASSES)


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _read(path: Path) -> str:
    try:
        return path.read_text("utf-8", "replace")
    except OSError:
        return ""

"""Self-tests that passed, remembered for later processes: on CUDA a test compiles kernels, which takes seconds.

A pass holds for the card's model, PyTorch, the driver, Triton and the operator's sources. It is kept in
`ddetr/ops-self-test.json` of the user's cache folder (XDG_CACHE_HOME or ~/.cache, on Windows LOCALAPPDATA); where that
can't be read or written, the test runs again and nothing else happens. DDETR_OPS_SELF_TEST=always runs it in every
process. The CPU's takes about 10 ms and runs in every process.
"""

import ctypes
import functools
import hashlib
import json
import logging
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

import torch

from ddetr.ops.self_test import self_test

VARIABLE = "DDETR_OPS_SELF_TEST"
_MOST = 32  # passes kept, the latest
_log = logging.getLogger(__name__)


def verify(module: ModuleType, device: torch.device) -> None:
    """The self-test of a back end on a device, unless it passed there before.

    Raises:
        SelfTestError: it failed.
        ValueError: DDETR_OPS_SELF_TEST is neither auto nor always.
    """
    when = os.environ.get(VARIABLE, "").strip() or "auto"
    if when not in ("auto", "always"):
        raise ValueError(f"{VARIABLE}={when}: choose auto (once for each device, PyTorch and driver) or always")
    identity = _identity(device)
    if when == "auto" and identity is not None and identity in _passed():
        _log.debug("self-test passed before: %s", identity)
        return
    self_test(module, device)
    if identity is not None:
        _remember(identity)


def _identity(device: torch.device) -> str | None:
    """What a pass depends on, in words; None where it is not to be remembered."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    driver = _driver_version()
    if driver is None:
        return None
    import triton  # here, where it is what is tested

    card = torch.cuda.get_device_properties(device)
    return (
        f"{card.name}, compute capability {card.major}.{card.minor}, PyTorch {torch.__version__}, driver {driver}, "
        f"Triton {triton.__version__}, ddetr.ops {_sources()}"
    )


@functools.cache
def _driver_version() -> str | None:
    """NVIDIA's driver as its management library names it, which PyTorch does not; None where there is no such
    library."""
    text = ctypes.create_string_buffer(80)
    try:
        nvml = ctypes.CDLL("nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1")
        if nvml.nvmlInitWithFlags(2):  # NVML_INIT_FLAG_NO_ATTACH: the cards themselves are not asked
            return None
        failed = nvml.nvmlSystemGetDriverVersion(text, ctypes.c_uint(len(text)))
        nvml.nvmlShutdown()
    except (OSError, AttributeError) as error:
        _log.debug("no driver version: %s", error)
        return None
    return None if failed else text.value.decode("ascii", "replace")


def _sources() -> str:
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where ddetr remembers something for the user on this machine; may not be there yet.

    Raises:
        RuntimeError: the user has no home folder.
    """
    folder = os.environ.get("LOCALAPPDATA" if sys.platform == "win32" else "XDG_CACHE_HOME")
    return Path(folder or Path.home() / ".cache", "ddetr")


def _file() -> Path:
    return cache_folder() / "ops-self-test.json"


def _passed() -> list[str]:
    try:
        passed = json.loads(_file().read_text("utf-8"))
    except (OSError, RuntimeError, ValueError) as error:
        _log.debug("no self-test is remembered: %s", error)
        return []
    return passed if isinstance(passed, list) else []


def _remember(identity: str) -> None:
    """Written beside and moved into place, so that no process reads half a file."""
    passed = [*(other for other in _passed() if other != identity), identity]
    try:
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.name, ignore_cleanup_errors=True) as folder:
            fresh = Path(folder, path.name)
            fresh.write_text(json.dumps(passed[-_MOST:], indent=1), "utf-8")
            os.replace(fresh, path)
    except (OSError, RuntimeError) as error:
        _log.debug("the self-test's pass is not remembered: %s", error)

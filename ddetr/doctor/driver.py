"""What NVIDIA's driver says of itself, through its own two libraries: NVML and libcuda. Runs in a child, since a broken
driver can crash or hang whoever asks it. ctypes, since it takes seven functions, and must work where nothing is
installed.
"""

import ctypes
import sys
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_uint, c_ulonglong, c_void_p
from dataclasses import asdict
from typing import Any

from ddetr.doctor import children
from ddetr.doctor.facts import Driver, Gpu

_NVML = "nvml.dll" if sys.platform == "win32" else "libnvidia-ml.so.1"
_CUDA = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


def look(timeout: float = 90) -> Driver:
    """The driver, as a child sees it. It takes seconds for each GPU where none is kept awake (persistence mode)."""
    outcome = children.run(__name__, timeout=timeout)
    found: dict[str, Any] = {}
    for event in outcome.events:
        found.update(event)
    gpus = [Gpu(**gpu) for gpu in found.pop("gpus", [])]
    return Driver(**found, gpus=gpus, problem=outcome.problem)


def main(arguments: Sequence[str]) -> None:
    for part in (_nvml, _cuda):
        part()


def _nvml() -> None:
    try:
        nvml = ctypes.CDLL(_NVML)
    except OSError as error:
        children.tell(nvml_error=str(error))
        return
    code = nvml.nvmlInit_v2()
    if code != 0:
        children.tell(nvml=code, nvml_error=_nvml_words(nvml, code))
        return
    children.tell(nvml=0)
    text = ctypes.create_string_buffer(96)
    if nvml.nvmlSystemGetDriverVersion(text, c_uint(len(text))) == 0:
        children.tell(version=text.value.decode("utf-8", "replace"))
    count = c_uint(0)
    if nvml.nvmlDeviceGetCount_v2(byref(count)) == 0:
        gpus = [gpu for gpu in (_gpu(nvml, index) for index in range(count.value)) if gpu is not None]
        children.tell(gpus=[asdict(gpu) for gpu in gpus])
    nvml.nvmlShutdown()


class _Memory(ctypes.Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


def _gpu(nvml: ctypes.CDLL, index: int) -> Gpu | None:
    handle = c_void_p()
    if nvml.nvmlDeviceGetHandleByIndex_v2(c_uint(index), byref(handle)) != 0:
        return None
    name = ctypes.create_string_buffer(96)
    major, minor, memory = c_int(), c_int(), _Memory()
    named = nvml.nvmlDeviceGetName(handle, name, c_uint(len(name))) == 0
    capable = nvml.nvmlDeviceGetCudaComputeCapability(handle, byref(major), byref(minor)) == 0
    measured = nvml.nvmlDeviceGetMemoryInfo(handle, byref(memory)) == 0
    return Gpu(
        name=name.value.decode("utf-8", "replace") if named else "a GPU without a name",
        capability=f"{major.value}.{minor.value}" if capable else None,
        memory_total=memory.total if measured else None,
        memory_free=memory.free if measured else None,
    )


def _nvml_words(nvml: ctypes.CDLL, code: int) -> str:
    nvml.nvmlErrorString.restype = c_char_p
    words = nvml.nvmlErrorString(c_int(code))
    return words.decode("utf-8", "replace") if words else f"error {code}"


def _cuda() -> None:
    try:
        cuda = ctypes.CDLL(_CUDA)
    except OSError as error:
        children.tell(libcuda_error=str(error))
        return
    children.tell(libcuda=True)
    version = c_int(0)
    if cuda.cuDriverGetVersion(byref(version)) == 0 and version.value:
        children.tell(cuda=f"{version.value // 1000}.{version.value % 1000 // 10}")
    children.tell(cu_init=cuda.cuInit(c_uint(0)))

"""Which back end computes on which device: the choice, the environment variable, the self-test on first use.

`DDETR_OPS` chooses by hand, read at first use: `auto` (default), `native` (the C++ library, CPU), `triton` (CUDA),
`embedding_bag` (stock PyTorch, fast), `reference` (stock PyTorch, plain). A name that does not serve a device leaves
that device to `auto`.
"""

import functools
import importlib.util
import logging
import os
from types import ModuleType
from typing import NamedTuple

import torch

from ddetr.ops import embedding_bag
from ddetr.ops.native import library
from ddetr.ops.self_test import SelfTestError
from ddetr.ops.verified import verify

VARIABLE = "DDETR_OPS"
_SERVES = {"cpu": ("native", "embedding_bag", "reference"), "cuda": ("triton", "embedding_bag", "reference")}
_NAMES = ("auto", "native", "triton", "embedding_bag", "reference")
CURE = f"set {VARIABLE}=reference to go on with plain PyTorch"
_log = logging.getLogger(__name__)


class Backend(NamedTuple):
    """One line of `backends()`: whether a back end can serve a device, whether it does, and why (not)."""

    device: str
    name: str
    available: bool
    active: bool
    detail: str


def backends() -> list[Backend]:
    """What there is for each device, what is active, and why something is not. Runs nothing on a device.

    Raises:
        ValueError: DDETR_OPS names no back end.
    """
    rows = []
    for device, names in _SERVES.items():
        try:
            active = chosen_backend(device)
        except RuntimeError:  # asked for and absent: its line says why
            active = None
        for name in names:
            problem = _problem(name)
            detail = problem or _detail(name)
            rows.append(Backend(device, name, problem is None, name == active, detail))
    return rows


@functools.cache
def requested() -> str:
    """The value of DDETR_OPS.

    Raises:
        ValueError: it names no back end.
    """
    name = os.environ.get(VARIABLE, "").strip() or "auto"
    if name not in _NAMES:
        raise ValueError(f"{VARIABLE}={name} is not a back end: choose one of {', '.join(_NAMES)}")
    return name


def uses_reference(device_type: str) -> bool:
    """Whether the public functions call the reference, not the operator.

    While torch.compile traces, nothing is chosen (that reads files and the environment): what was chosen so far counts,
    and the operator chooses when it runs.
    """
    if torch.compiler.is_compiling():
        return device_type in _plain_devices or device_type not in _SERVES
    return chosen_backend(device_type) == "reference"


def chosen_backend(device_type: str) -> str:
    """The back end for a kind of device, without running it there.

    Raises:
        RuntimeError: DDETR_OPS asks for one that is not there.
        ValueError: DDETR_OPS names none.
    """
    name = "reference" if device_type in _rejected else _chosen(device_type)
    if name == "reference":
        _plain_devices.add(device_type)
    return name


@functools.cache
def _chosen(device_type: str) -> str:
    serves = _SERVES.get(device_type, ("reference",))
    name = requested()
    if name in serves:
        if problem := _problem(name):
            raise RuntimeError(f"{VARIABLE}={name}, but {problem}; {CURE}")
        return name
    log = _log.info if device_type != "cuda" or torch.cuda.is_available() else _log.debug  # nobody asks for absent ones
    for name in serves:
        problem = _problem(name)
        if problem is None and not (device_type == "cuda" and name == "embedding_bag"):  # not measured there
            log("ms_deform_attn on %s: %s (%s)", device_type, name, _detail(name))
            return name
        if problem is not None:
            log("ms_deform_attn on %s: not %s: %s", device_type, name, problem)
    raise AssertionError("the reference is always there")


_rejected: set[str] = set()  # device types whose automatic choice failed its self-test
_plain_devices: set[str] = set()  # device types on which the reference computes
_verified: dict[str, ModuleType] = {}


def verified_backend(device: torch.device) -> ModuleType:
    """The module that computes on a device, after its self-test there (verified.py says how often).

    Raises:
        RuntimeError: the self-test failed, with the cure. An automatic choice on CUDA falls back with a warning.
    """
    key = str(device)
    if key not in _verified:
        _verified[key] = _verify(device)
    return _verified[key]


def _verify(device: torch.device) -> ModuleType:
    name = chosen_backend(device.type)
    module = _module(name)
    if name in ("embedding_bag", "reference"):
        return module
    try:
        verify(module, device)
    except SelfTestError as error:
        versions = f"PyTorch {torch.__version__}" + (f", CUDA {torch.version.cuda}" if device.type == "cuda" else "")
        message = f"the {name} back end of ms_deform_attn failed its self-test on {device} ({versions}): {error}"
        if requested() == name or device.type == "cpu":
            raise RuntimeError(f"{message}; {CURE}") from error
        _log.warning("%s; plain PyTorch is used instead, which is slower", message)
        _rejected.add(device.type)
        return embedding_bag
    return module


def _module(name: str) -> ModuleType:
    if name == "native":
        return library
    if name == "triton":
        from ddetr.ops import triton_kernels

        return triton_kernels
    # An operator needs a written backward, which the reference has not; its public functions never come here.
    return embedding_bag


def _problem(name: str) -> str | None:
    """Why a back end can't be used at all, None if it can."""
    if name == "native":
        try:
            library.load()
        except library.NativeUnavailableError as error:
            return str(error)
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed"
        if not torch.cuda.is_available():
            return "PyTorch sees no CUDA device"
    return None


def _detail(name: str) -> str:
    if name == "native":
        return f"C++ kernels, {library.isa()}"
    return {
        "triton": "fused kernels, compiled on first use",
        "embedding_bag": "stock PyTorch, chunked embedding_bag",
        "reference": "stock PyTorch, grid_sample",
    }[name]

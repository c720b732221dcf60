"""The CPU kernel as a shared library with a plain C interface, called by ctypes on raw pointers.

No header of Python or PyTorch is compiled in, so that one file per platform serves every version of both. The sources
lie beside this file; `build.py` compiles them when the package is installed.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddetr.ops.native.build import library_path, source_id

_TYPES = {torch.float32: 0, torch.bfloat16: 1}
_ERRORS = {1: "out of memory for its scratch arrays", 2: "this processor lacks SSE4.1"}


class NativeUnavailableError(RuntimeError):
    """The shared library is absent or does not fit; the message says why and what to do."""


class _Args(ctypes.Structure):
    """MsdaArgs in msda.h."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("n", "s", "m", "d", "q", "levels", "points", "reference_size")),
        *((name, ctypes.c_int64) for name in ("value_type", "points_type", "weights_type", "threads")),
        *((f"value_stride_{axis}", ctypes.c_int64) for axis in "ns"),
        *((f"points_stride_{axis}", ctypes.c_int64) for axis in "nq"),
        *((f"weights_stride_{axis}", ctypes.c_int64) for axis in "nq"),
        *((name, ctypes.c_void_p) for name in ("shapes", "value", "point_data", "weight_data", "reference", "output")),
        *((f"grad_{name}", ctypes.c_void_p) for name in ("output", "value", "points", "weights", "reference")),
    ]


@functools.cache
def load(path: Path | None = None) -> ctypes.CDLL:
    """The library of this platform.

    Raises:
        NativeUnavailableError: there is none, or it is not the one that this version of the sources builds.
    """
    path = path or library_path()
    if not path.is_file():
        raise NativeUnavailableError(
            f"no {path.name} in {path.parent.name}/: build it with `python -m ddetr.ops.native.build` "
            "(needs `pip install ziglang` or a C++ compiler)"
        )
    try:
        library = ctypes.CDLL(str(path))
        library.msda_source.restype = library.msda_isa.restype = ctypes.c_char_p
        stale = library.msda_args_bytes() != ctypes.sizeof(_Args) or library.msda_source().decode() != source_id()
    except (OSError, AttributeError) as error:
        raise NativeUnavailableError(f"{path.name} does not load here: {error}") from error
    if stale:
        raise NativeUnavailableError(
            f"{path.name} was built from other sources: build it again with `python -m ddetr.ops.native.build`"
        )
    for function in (library.msda_forward, library.msda_backward):
        function.argtypes = [ctypes.POINTER(_Args)]
        function.restype = ctypes.c_int64
    if "none" in (isa := library.msda_isa().decode()):
        raise NativeUnavailableError(f"{path.name} can't run on this processor ({isa})")
    return library


def isa() -> str:
    """The instruction set that the kernel chose: sse4, avx2, avx512 or generic (the platform's own)."""
    return load().msda_isa().decode()


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    """(N, Q, M*D), the same bits with any number of threads.

    Without `reference`, points are locations and weights weights; with it, offsets and logits.
    """
    call = _Call(value, shapes, points, weights, reference)
    output = call.value.new_empty(call.n, call.q, call.m * call.d)
    call.args.output = output.data_ptr()
    call.run(load().msda_forward)
    return output.to(value.dtype)


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    with_reference: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of value, points, weights and (if `with_reference`) reference.

    The same bits in every run with the same number of threads (`torch.get_num_threads()`): another number may cut the
    queries of a head into other parts, whose gradients of a value are then added up in another order.
    """
    call = _Call(value, shapes, points, weights, reference)
    grad_output = grad_output.to(call.value.dtype).contiguous()
    grad_value = torch.empty(call.value.shape, dtype=call.value.dtype)
    grad_points = torch.empty(call.points.shape, dtype=call.points.dtype)
    grad_weights = torch.empty(call.weights.shape, dtype=call.weights.dtype)
    if call.q == 0:
        grad_value.zero_()
    args = call.args
    args.grad_output = grad_output.data_ptr() or 1  # an empty tensor's is null, which would mean "forward"
    args.grad_value = grad_value.data_ptr()
    args.grad_points = grad_points.data_ptr()
    args.grad_weights = grad_weights.data_ptr()
    grad_reference = None
    if reference is not None and with_reference:
        grad_reference = torch.empty(call.n, call.q, call.m, *reference.shape[2:])
        args.grad_reference = grad_reference.data_ptr()
    call.run(load().msda_backward)
    if grad_reference is not None:
        grad_reference = grad_reference.sum(2).to(reference.dtype)
    return (
        grad_value.to(value.dtype),
        grad_points.to(points.dtype),
        grad_weights.to(weights.dtype),
        grad_reference,
    )


class _Call:
    """Tensors as the kernel takes them, and the struct that describes them; keeps the memory alive until `run` ends."""

    def __init__(
        self, value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, reference: Tensor | None
    ) -> None:
        self.n, s, self.m, self.d = value.shape
        _, self.q, _, levels, p, _ = points.shape
        if s >= 2**28:  # rows are counted in 32 bits, and a border can make eight of one cell
            raise ValueError(f"value has S={s} cells, the CPU kernel takes less than 2**28: use DDETR_OPS=reference")
        self.value = _prepare(value, 2)
        self.points = _prepare(points, 4)
        self.weights = _prepare(weights, 3)
        self.reference = None if reference is None else reference.detach().float().contiguous()
        self.shapes = (ctypes.c_int64 * len(shapes))(*shapes)
        self.args = _Args(
            self.n, s, self.m, self.d, self.q, levels, p,
            0 if reference is None else reference.shape[-1],
            _TYPES[self.value.dtype], _TYPES[self.points.dtype], _TYPES[self.weights.dtype],
            torch.get_num_threads(),
            *self.value.stride()[:2], *self.points.stride()[:2], *self.weights.stride()[:2],
            ctypes.addressof(self.shapes),
            self.value.data_ptr(), self.points.data_ptr(), self.weights.data_ptr(),
            None if self.reference is None else self.reference.data_ptr(),
        )  # fmt: skip

    def run(self, function: "ctypes._CFuncPtr") -> None:
        code = function(ctypes.byref(self.args))
        if code:
            raise RuntimeError(f"the CPU kernel failed: {_ERRORS.get(code, code)}")


def _prepare(tensor: Tensor, inner: int) -> Tensor:
    """float32 or bfloat16 with the last `inner` dimensions contiguous; the two before may have any stride."""
    tensor = tensor.detach()
    if tensor.dtype not in _TYPES:
        tensor = tensor.float()
    expected = 1
    for size, stride in zip(reversed(tensor.shape[-inner:]), reversed(tensor.stride()[-inner:])):
        if size != 1 and stride != expected:
            return tensor.contiguous()
        expected *= size
    return tensor

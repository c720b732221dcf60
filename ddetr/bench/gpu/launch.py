"""What a call of the operator costs the host: Python, checks, dispatcher, allocations and Triton's launcher.

A GPU that computes for less time than this waits for the host; CUDA graphs are the cure.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from unittest import mock

import torch

from ddetr.bench.sizes import Size, make_inputs
from ddetr.ops import ms_deform_attn_step, operators, triton_kernels
from ddetr.ops.arguments import check_arguments, flat_shapes

LIMIT_US = 30  # of a forward, without the launcher
_SIZE = Size(1, [(8, 8), (4, 4), (2, 2), (1, 1)], 4)  # so small that only Python counts
_ROUNDS = 30


def launch_overhead(device: torch.device, calls: int = 200) -> dict[str, float]:
    """Microseconds of host time, each the least of some rounds; with kernels that do nothing.

    On CUDA also of the forward with its kernel, which is more by what Triton's launcher takes.
    """
    inputs = make_inputs(_SIZE, device)
    value, *rest = inputs
    shapes = _SIZE.shapes
    flat = flat_shapes(shapes)
    leaves = [tensor.clone().requires_grad_() for tensor in inputs[:3]]
    grad_output = value.new_ones(1, _SIZE.queries, _SIZE.heads * _SIZE.head_size)

    def both() -> None:
        output = ms_deform_attn_step(leaves[0], shapes, *leaves[1:], inputs.references)
        torch.autograd.grad(output, leaves, grad_output)

    def forward() -> None:
        ms_deform_attn_step(value, shapes, *rest)

    parts: dict[str, Callable[[], object]] = {
        "forward": forward,
        "of it the operator": lambda: torch.ops.ddetr.ms_deform_attn(value, flat, *rest),
        "of it the module of the kernels": lambda: triton_kernels.forward(value, flat, *rest),
        "of it an allocation": lambda: value.new_empty(1, 4, 256),
        "of it a check of the arguments": lambda: check_arguments(value, flat, *rest),
    }
    with _without_kernels():
        with torch.inference_mode():
            found = {name: _microseconds(call, calls, device) for name, call in parts.items()}
        with torch.autograd.set_multithreading_enabled(False):  # the backward in this thread, whose time is taken
            found["forward and backward"] = _microseconds(both, calls, device)
    if device.type == "cuda":
        with torch.inference_mode():
            found["forward with its kernel"] = _microseconds(forward, calls, device)
    return found


def _microseconds(call: Callable[[], object], calls: int, device: torch.device) -> float:
    rounds = []
    for _ in range(_ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # a full queue would make the host wait
        start = time.thread_time_ns()
        for _ in range(calls):
            call()
        rounds.append((time.thread_time_ns() - start) / calls / 1e3)
    return min(rounds)


@contextmanager
def _without_kernels() -> Iterator[None]:
    """In it, the operator takes the way to the Triton kernels on any device, and they do nothing."""
    kernels = _Nothing()

    def backend(device: torch.device) -> ModuleType:  # a mock's call takes as long as all that is measured
        return triton_kernels

    with (
        mock.patch.object(operators, "verified_backend", backend),
        mock.patch.object(triton_kernels, "_forward_kernel", kernels),
        mock.patch.object(triton_kernels, "_backward_kernel", kernels),
    ):
        yield


class _Nothing:
    """A kernel whose launch does nothing."""

    def __getitem__(self, grid: tuple[int, ...]) -> "_Nothing":
        return self

    def __call__(self, *arguments: object, **options: object) -> None:
        pass

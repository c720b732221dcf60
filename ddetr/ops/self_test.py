"""A small forward and backward of a back end against the reference, before it is trusted with a model."""

from concurrent.futures import ThreadPoolExecutor
from types import ModuleType

import torch
from torch import Tensor

from ddetr.ops.reference import attention_step_reference

_SHAPES = [(5, 7), (3, 2), (1, 1)]


class SelfTestError(RuntimeError):
    """A back end raised, or disagrees with the reference; the message says in what."""


def self_test(module: ModuleType, device: torch.device) -> None:
    """Compare all outputs and gradients of `module` on a device, points outside included.

    In a thread of its own, where nothing of what the caller is in the midst of counts: inference mode, autocast, and
    the hooks by which activation checkpointing keeps account of the tensors that are saved for gradients.

    Raises:
        SelfTestError: a difference beyond rounding, or an error of the back end.
    """
    with ThreadPoolExecutor(1) as thread:
        for reference_size in (0, 2, 4):
            thread.submit(_compare, module, device, reference_size).result()


def _compare(module: ModuleType, device: torch.device, reference_size: int) -> None:
    inputs = _inputs(reference_size, device)
    value, points, weights, reference_points = inputs
    expected = attention_step_reference(value, _SHAPES, points, weights, reference_points)
    grad_output = torch.ones_like(expected).cumsum(-1) % 7 - 3
    leaves = [t for t in inputs if t is not None]
    # A sum, since autograd imports sympy (0.3 s and more) to check a gradient that it is given.
    expected_grads = torch.autograd.grad((expected * grad_output).sum(), leaves)
    shapes = [size for hw in _SHAPES for size in hw]
    with torch.no_grad():
        try:
            output = module.forward(value, shapes, points, weights, reference_points)
            grads = module.backward(grad_output, value, shapes, points, weights, reference_points, True)
        except Exception as error:
            raise SelfTestError(f"{type(error).__name__}: {error}") from error
        names = ("output", "gradient of value", "gradient of points", "gradient of weights", "gradient of references")
        for name, got, want in zip(names, (output, *grads), (expected, *expected_grads)):
            difference = (got - want).abs().max() / want.abs().max()
            if not difference.item() < 1e-4:
                raise SelfTestError(f"the {name} is off by {difference.item():.1e} of its largest value")


def _inputs(reference_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(0)  # the program's own random state is not touched

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")

    n, m, d, q, num_levels, p = 2, 2, 16, 9, len(_SHAPES), 2
    value = normal(n, sum(h * w for h, w in _SHAPES), m, d)
    points = normal(n, q, m, num_levels, p, 2)
    weights = normal(n, q, m, num_levels, p)
    reference = None
    if reference_size:
        reference = normal(n, q, num_levels, reference_size).sigmoid().to(device).requires_grad_()
    else:
        points = points * 0.4 + 0.5
    value, points, weights = (t.to(device).requires_grad_() for t in (value, points, weights))
    return value, points, weights, reference

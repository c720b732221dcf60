"""Random inputs of the operator and the float64 truth that every back end is compared with."""

from typing import NamedTuple

import torch
from torch import Tensor

from ddetr.ops.reference import attention_step_reference


class Inputs(NamedTuple):
    """float64 leaves; without `reference`, points are locations and weights weights."""

    shapes: list[tuple[int, int]]
    value: Tensor
    points: Tensor
    weights: Tensor
    reference: Tensor | None

    @property
    def flat(self) -> list[int]:
        return [size for hw in self.shapes for size in hw]

    @property
    def tensors(self) -> list[Tensor]:
        return [t for t in self[1:] if t is not None]

    def cast(self, dtype: torch.dtype, points_dtype: torch.dtype | None = None) -> "Inputs":
        """Detached copies; reference points stay float32 or wider."""
        points_dtype = points_dtype or dtype
        wide = torch.promote_types(dtype, torch.float32)
        reference = None if self.reference is None else self.reference.detach().to(wide)
        return Inputs(
            self.shapes,
            self.value.detach().to(dtype),
            self.points.detach().to(points_dtype),
            self.weights.detach().to(points_dtype),
            reference,
        )


def make_inputs(
    n: int = 1,
    m: int = 2,
    d: int = 8,
    shapes: list[tuple[int, int]] | None = None,
    p: int = 4,
    q: int = 9,
    reference: int = 2,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Values that `dtype` holds exactly, many points outside the image; `reference` 0 (plain), 2 or 4."""
    shapes = shapes or [(6, 5), (3, 2)]
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    num_levels = len(shapes)
    value = normal(n, sum(h * w for h, w in shapes), m, d)
    points, weights = normal(n, q, m, num_levels, p, 2), normal(n, q, m, num_levels, p)
    references = None
    if reference:
        points = points * 2
        references = normal(n, q, num_levels, reference).sigmoid()
    else:
        points = points * 0.6 + 0.5
    value, points, weights = (t.to(dtype).double().requires_grad_() for t in (value, points, weights))
    return Inputs(shapes, value, points, weights, None if references is None else references.double().requires_grad_())


def truth(inputs: Inputs) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Output, a gradient of it, and the gradients of the inputs, in float64."""
    output = attention_step_reference(*_arguments(inputs))
    grad_output = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grad_output = grad_output.bfloat16().double()
    return output.detach(), grad_output, list(torch.autograd.grad(output, inputs.tensors, grad_output))


def _arguments(inputs: Inputs) -> tuple:
    return inputs.value, inputs.shapes, inputs.points, inputs.weights, inputs.reference


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected value."""
    assert got.shape == expected.shape
    if expected.numel() == 0:
        return 0.0
    return ((got.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-30)).item()

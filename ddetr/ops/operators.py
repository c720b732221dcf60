"""`ddetr::ms_deform_attn` as a `torch.library` operator: schema, autograd, fake tensors; the arithmetic is elsewhere.

One operator serves both public functions: without `reference_points`, `points` are locations and `weights` weights;
with them, offsets and logits. Its gradient is an operator too, whose own gradient is the reference's.

Autocast has no rule here on purpose: values may be bfloat16 or float16, while locations and sums stay in float32, so
nothing must be cast on the way in.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddetr.ops import embedding_bag
from ddetr.ops.arguments import check_arguments, check_cells
from ddetr.ops.backends import CURE, verified_backend
from ddetr.ops.reference import attention_step_reference

_FORWARD = "ddetr::ms_deform_attn"
_BACKWARD = "ddetr::ms_deform_attn_backward"
_ARGUMENTS = "Tensor value, SymInt[] spatial_shapes, Tensor points, Tensor weights, Tensor? reference_points"

torch.library.define(_FORWARD, f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
torch.library.define(
    _BACKWARD,
    f"(Tensor grad_output, {_ARGUMENTS}, bool with_reference) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_FORWARD, ("cpu", "cuda"))
def _forward(
    value: Tensor, spatial_shapes: list[int], points: Tensor, weights: Tensor, reference_points: Tensor | None
) -> Tensor:
    _refuse_tangents()
    check_arguments(value, spatial_shapes, points, weights, reference_points)
    check_cells(value.shape[1], spatial_shapes)
    return _run(_module(value).forward, value, spatial_shapes, points, weights, reference_points)


@torch.library.impl(_BACKWARD, ("cpu", "cuda"))
def _backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor | None,
    with_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _refuse_tangents()
    check_arguments(value, spatial_shapes, points, weights, reference_points)
    check_cells(value.shape[1], spatial_shapes)
    n, _, m, d = value.shape
    if grad_output.shape != (n, points.shape[1], m * d):
        raise ValueError(f"grad_output must be {(n, points.shape[1], m * d)}, got {tuple(grad_output.shape)}")
    *grads, grad_reference = _run(
        _module(value).backward, grad_output, value, spatial_shapes, points, weights, reference_points, with_reference
    )
    return (*grads, value.new_empty(0) if grad_reference is None else grad_reference)


def _refuse_tangents() -> None:
    """Below autograd the tangents of forward mode are gone, and the result would count as constant."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            "the operator ddetr::ms_deform_attn has no forward-mode derivative (torch.func.jvp, dual numbers): call "
            "ddetr.ops.ms_deform_attn within it, which has one, or leave the dual level before backward()"
        )


def _module(value: Tensor) -> Any:
    """What computes: a module with `forward` and `backward`; float64 is for stock PyTorch."""
    return embedding_bag if value.dtype == torch.float64 else verified_backend(value.device)


def _run(function: Callable, tensor: Tensor, *arguments: Any) -> Any:
    """A back end's function; where it fails to run, the error says how to go on without that back end."""
    try:
        return function(tensor, *arguments)
    except (ValueError, torch.OutOfMemoryError):  # the caller's to handle: too much at once
        raise
    except Exception as error:
        where = f"{function.__module__.rpartition('.')[2]} on {tensor.device}"
        raise RuntimeError(f"ms_deform_attn failed in {where}: {type(error).__name__}: {error}; {CURE}") from error


@torch.library.register_fake(_FORWARD)
def _forward_fake(
    value: Tensor, spatial_shapes: list[int], points: Tensor, weights: Tensor, reference_points: Tensor | None
) -> Tensor:
    n, _, m, d = value.shape
    return value.new_empty(n, points.shape[1], m * d)


@torch.library.register_fake(_BACKWARD)
def _backward_fake(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: list[int],
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor | None,
    with_reference: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    has_reference = reference_points is not None and with_reference
    return (
        value.new_empty(value.shape),
        points.new_empty(points.shape),
        weights.new_empty(weights.shape),
        reference_points.new_empty(reference_points.shape) if has_reference else value.new_empty(0),
    )


def _save_forward(ctx: Any, inputs: tuple, output: Tensor) -> None:
    value, ctx.spatial_shapes, points, weights, reference_points = inputs
    ctx.save_for_backward(value, points, weights, reference_points)


def _differentiate_forward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    value, points, weights, reference_points = ctx.saved_tensors
    with_reference = reference_points is not None and ctx.needs_input_grad[4]
    grad_value, grad_points, grad_weights, grad_reference = torch.ops.ddetr.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, points, weights, reference_points, with_reference
    )
    return grad_value, None, grad_points, grad_weights, grad_reference if with_reference else None


def _save_backward(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    grad_output, value, ctx.spatial_shapes, points, weights, reference_points, ctx.with_reference = inputs
    ctx.save_for_backward(grad_output, value, points, weights, reference_points)


def _differentiate_backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Second derivatives, rare and therefore plain: the reference differentiated twice."""
    _refuse_tangents()
    with torch.enable_grad():
        inputs = [None if t is None else t.detach().requires_grad_() for t in ctx.saved_tensors]
        grad_output, value, points, weights, reference_points = inputs
        shapes = list(zip(ctx.spatial_shapes[::2], ctx.spatial_shapes[1::2]))
        output = attention_step_reference(value, shapes, points, weights, reference_points, by_gathers=True)
        wanted = [value, points, weights]
        if ctx.with_reference and reference_points is not None:
            wanted.append(reference_points)
        first = torch.autograd.grad(output, wanted, grad_output, create_graph=True)
        tensors = [t for t in inputs if t is not None]
        second = torch.autograd.grad(first, tensors, grads[: len(first)], allow_unused=True)
    found = dict(zip(map(id, tensors), second))
    grad_output, value, points, weights, reference = (None if t is None else found[id(t)] for t in inputs)
    return grad_output, value, None, points, weights, reference, None


torch.library.register_autograd(_FORWARD, _differentiate_forward, setup_context=_save_forward)
torch.library.register_autograd(_BACKWARD, _differentiate_backward, setup_context=_save_backward)

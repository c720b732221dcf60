"""The two public functions of multi-scale deformable attention.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ddetr.ops import operators as _operators  # noqa: F401  (defines torch.ops.ddetr.ms_deform_attn)
from ddetr.ops.arguments import SpatialShapes, check_arguments, flat_shapes
from ddetr.ops.backends import uses_reference
from ddetr.ops.reference import attention_step_reference


def ms_deform_attn(
    value: Tensor, spatial_shapes: SpatialShapes, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Sample `value` bilinearly at `sampling_locations` and add up with `attention_weights` (arXiv:2010.04159, eq. 3).

    Locations outside [0, 1] sample zeros beyond the border (`align_corners=False`: 0 and 1 are the outer edges of the
    first and the last cell).

    Args:
        value: (N, S, M, D) features of all levels, level after level, row-major.
        spatial_shapes: (H, W) of each level, Python ints.
        sampling_locations: (N, Q, M, L, P, 2) as (x, y) in [0, 1] of each level, float32 or wider.
        attention_weights: (N, Q, M, L, P), usually softmax-ed over L*P.

    Returns:
        (N, Q, M*D) in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named before anything runs.
    """
    return _attention(value, spatial_shapes, sampling_locations, attention_weights, None)


def ms_deform_attn_step(
    value: Tensor,
    spatial_shapes: SpatialShapes,
    sampling_offsets: Tensor,
    attention_logits: Tensor,
    reference_points: Tensor,
) -> Tensor:
    """The whole attention step from the raw outputs of the linear layers: softmax, locations, sampling, sum.

    Softmax and location arithmetic run in float32 (or wider) whatever the dtype of the inputs: bfloat16 locations are
    wrong by up to a pixel.

    Args:
        value: (N, S, M, D) features of all levels.
        spatial_shapes: (H, W) of each level, Python ints.
        sampling_offsets: (N, Q, M, L, P, 2) as (x, y), in cells of the level (points) or half extents/P (boxes).
        attention_logits: (N, Q, M, L, P) before the softmax over L*P.
        reference_points: (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (cx, cy, w, h), in [0, 1].

    Returns:
        (N, Q, M*D) in the dtype of `value`.

    Raises:
        ValueError: a shape, dtype or device that does not fit, named before anything runs.
    """
    return _attention(value, spatial_shapes, sampling_offsets, attention_logits, reference_points)


def _attention(
    value: Tensor, spatial_shapes: SpatialShapes, points: Tensor, weights: Tensor, reference_points: Tensor | None
) -> Tensor:
    shapes = flat_shapes(spatial_shapes)
    tracing = torch.jit.is_tracing()
    # The operator has no forward-mode derivative, and PyTorch drops the tangents of what runs below autograd.
    forward_mode = forward_ad._current_level >= 0
    # An exported graph holds nothing custom: it must run where ddetr is not.
    is_plain = tracing or forward_mode or _is_exporting() or uses_reference(value.device.type)
    # The operator checks by itself where it runs, but not what torch.compile traces; jit's trace would warn of each.
    if (is_plain and not tracing) or torch.compiler.is_compiling():
        check_arguments(value, shapes, points, weights, reference_points)
    if is_plain:
        return attention_step_reference(value, spatial_shapes, points, weights, reference_points, forward_mode)
    return torch.ops.ddetr.ms_deform_attn(value, shapes, points, weights, reference_points)


def _export_without_dynamo() -> bool:
    """Before `torch.compiler.is_exporting` existed: strict export (through dynamo) can't be told from torch.compile."""
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


_is_exporting = getattr(torch.compiler, "is_exporting", _export_without_dynamo)

"""Multi-scale deformable attention in plain PyTorch: the truth that every other back end is tested against.

Works on any device and any floating dtype, exports (ONNX, torch.export), and takes the shapes of the levels as Python
ints, so that no shape is read back from a device. Two formulations: by `grid_sample`, and by gathers, which
differentiate twice (`grid_sample` does not).

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr.ops.corners import corners_of


def ms_deform_attn_reference(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The definition (arXiv:2010.04159, eq. 3) by `grid_sample`; arguments as in `ddetr.ops.ms_deform_attn`.

    Samples in the wider of float32 and the dtype of `value`; returns the dtype of `value`.
    """
    n, _, m, d = value.shape
    _, q, _, num_levels, p, _ = sampling_locations.shape
    dtype = torch.promote_types(value.dtype, torch.float32)
    grids = (2 * sampling_locations.to(dtype) - 1).permute(0, 2, 1, 3, 4, 5).flatten(0, 1)  # (N*M, Q, L, P, 2)
    weights = attention_weights.to(dtype).permute(0, 2, 1, 3, 4).reshape(n * m, 1, q, num_levels, p)
    levels = value.to(dtype).split([h * w for h, w in spatial_shapes], dim=1)
    output = value.new_zeros(n * m, d, q, dtype=dtype)
    for level, ((h, w), value_l) in enumerate(zip(spatial_shapes, levels)):
        value_l = value_l.permute(0, 2, 3, 1).reshape(n * m, d, h, w)
        sampled = F.grid_sample(
            value_l, grids[:, :, level], mode="bilinear", padding_mode="zeros", align_corners=False
        )  # (N*M, D, Q, P)
        output = output + (sampled * weights[:, :, :, level]).sum(-1)
    return output.view(n, m * d, q).transpose(1, 2).to(value.dtype)


def ms_deform_attn_gather(
    value: Tensor, spatial_shapes: Sequence[tuple[int, int]], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """The same by gathers: it differentiates twice and in forward mode, and holds all gathered rows (N, Q, M, 4*L*P, D)
    in memory.
    """
    n, s, m, d = value.shape
    q = sampling_locations.shape[1]
    dtype = torch.promote_types(value.dtype, torch.float32)
    corners = corners_of(spatial_shapes, sampling_locations.to(dtype))
    coefficients = (corners.coefficients * attention_weights.to(dtype)[..., None]).flatten(3)  # (N, Q, M, L*P*4)
    rows = corners.rows.flatten(3).transpose(1, 2).flatten(2)  # (N, M, Q*L*P*4)
    table = value.to(dtype).transpose(1, 2)  # (N, M, S, D)
    gathered = table.gather(2, rows[..., None].expand(-1, -1, -1, d)).view(n, m, q, -1, d)
    output = (gathered * coefficients.transpose(1, 2)[..., None]).sum(-2)  # (N, M, Q, D)
    return output.transpose(1, 2).flatten(2).to(value.dtype)


def attention_step_reference(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    points: Tensor,
    weights: Tensor,
    reference_points: Tensor | None,
    by_gathers: bool = False,
) -> Tensor:
    """Both public functions by plain PyTorch: without `reference_points`, `points` are locations and `weights` weights;
    with them, offsets and logits. Softmax and locations in float32 or wider, outside autocast.

    by_gathers: the form that differentiates twice and in forward mode; `grid_sample` does neither.
    """
    sample = ms_deform_attn_gather if by_gathers else ms_deform_attn_reference
    with _without_autocast(value.device.type):
        if reference_points is not None:
            dtype = torch.promote_types(weights.dtype, torch.float32)
            weights = F.softmax(weights.to(dtype).flatten(3), -1).view(weights.shape)
            points = sampling_locations_reference(points, reference_points, spatial_shapes)
        return sample(value, spatial_shapes, points, weights)


def _without_autocast(device_type: str) -> AbstractContextManager:
    """Nothing where it is off anyway: exported graphs would carry the context along."""
    on = device_type != "meta" and torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def sampling_locations_reference(
    sampling_offsets: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
) -> Tensor:
    """Offsets in cells of their level -> locations in [0, 1], in float32 or wider (sec. 4.1 and A.4).

    Args:
        sampling_offsets: (N, Q, M, L, P, 2) as (x, y).
        reference_points: (N, Q, L, 2) points, or (N, Q, L, 4) boxes as (cx, cy, w, h), both in [0, 1]. Offsets from a
            point are counted in cells of the level, offsets from a box in half extents of the box, divided by P.
        spatial_shapes: (H, W) of each level.

    Returns:
        (N, Q, M, L, P, 2) as (x, y).
    """
    dtype = torch.promote_types(sampling_offsets.dtype, torch.float32)
    n, q, m, num_levels, p, _ = sampling_offsets.shape
    offsets = sampling_offsets.to(dtype).reshape(n, q, m, num_levels * p * 2)
    # One long inner dimension: broadcasting over a last dimension of 2 costs several times the arithmetic (CPU).
    points = reference_points.to(dtype)[:, :, :, None, :].expand(-1, -1, -1, p, -1)  # (N, Q, L, P, 2 or 4)
    centres = points[..., :2].reshape(n, q, 1, num_levels * p * 2)
    if reference_points.shape[-1] == 2:
        cells = torch.stack(
            [torch.scalar_tensor(s, dtype=dtype, device=offsets.device) for hw in spatial_shapes for s in hw[::-1]]
        )
        scale = (1 / cells).view(num_levels, 1, 2).expand(-1, p, -1).reshape(num_levels * p * 2)
    else:
        scale = (points[..., 2:] * (0.5 / p)).reshape(n, q, 1, num_levels * p * 2)
    return torch.addcmul(centres, offsets, scale).view(n, q, m, num_levels, p, 2)

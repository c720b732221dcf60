"""Bilinear sampling as table look-ups: the rows and the coefficients of the four cells around each point.

What `grid_sample` does (`align_corners=False`, zeros outside), in operations that differentiate twice and that every
runtime has.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Corners(NamedTuple):
    """The four cells around each point, in the order (top left, top right, bottom left, bottom right).

    `rows` (N, Q, M, L, P, 4) int64 in [0, S); `coefficients` the same shape, 0 for cells outside.
    """

    rows: Tensor
    coefficients: Tensor


def level_sizes(spatial_shapes: Sequence[tuple[int, int]], like: Tensor) -> tuple[Tensor, Tensor]:
    """Widths and heights as (L, 1) tensors of the dtype and device of `like`; symbolic sizes stay symbolic."""
    sizes = [torch.scalar_tensor(size, dtype=like.dtype, device=like.device) for hw in spatial_shapes for size in hw]
    table = torch.stack(sizes).view(-1, 2, 1)
    return table[:, 1], table[:, 0]


def corners_of(spatial_shapes: Sequence[tuple[int, int]], locations: Tensor) -> Corners:
    """Corners of `locations` (N, Q, M, L, P, 2), (x, y) in [0, 1] of each level."""
    width, height = level_sizes(spatial_shapes, locations)
    starts = [0]
    for h, w in spatial_shapes[:-1]:
        starts.append(starts[-1] + h * w)
    start = torch.stack([torch.scalar_tensor(s, dtype=torch.int64, device=locations.device) for s in starts])
    # Clamped, so that NaN and huge coordinates convert to integers; points that far outside have no weight anyway.
    x = torch.nan_to_num(locations[..., 0] * width - 0.5, nan=-2.0).clamp(min=-2).minimum(width + 1)
    y = torch.nan_to_num(locations[..., 1] * height - 0.5, nan=-2.0).clamp(min=-2).minimum(height + 1)
    left, top = x.detach().floor(), y.detach().floor()
    fx, fy = x - left, y - top
    rows, coefficients = [], []
    for right_of, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        column, line = left + right_of, top + below
        inside = ((column >= 0) & (column < width) & (line >= 0) & (line < height)).to(x.dtype)
        column, line = column.clamp(min=0).minimum(width - 1), line.clamp(min=0).minimum(height - 1)
        rows.append(start.view(-1, 1) + line.long() * width.long() + column.long())
        coefficients.append((fx if right_of else 1 - fx) * (fy if below else 1 - fy) * inside)
    return Corners(torch.stack(rows, -1), torch.stack(coefficients, -1))

"""The operator in stock PyTorch, for machines without the native library: `F.embedding_bag` over chunks of queries.

Every output row is a bag of 4*L*P weighted rows of the value table, which is what `embedding_bag` adds up without
writing the gathered rows to memory. The table has a border of zero cells around each level, so that points outside
need no masks, and chunks keep the temporaries in the cache. The backward is written out, since autograd's own is no
faster than `grid_sample`'s.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points; q = queries of a chunk, of any
images; K = M*L*P.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Points at a time, so that their arrays fit in the second-level cache; the backward holds the gathered rows as well.
_FORWARD_POINTS, _BACKWARD_POINTS = 32_768, 16_384


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    """(N, Q, M*D). Without `reference`, points are locations and weights weights; with it, offsets and logits."""
    n, _, m, d = value.shape
    q = points.shape[1]
    levels = _Levels(value, shapes, points)
    table = levels.padded(value)
    output = table.new_empty(n * q, m * d)
    for chunk in _chunks(levels, points, weights, reference, _FORWARD_POINTS):
        bags = F.embedding_bag(
            chunk.rows.flatten(0, 1).flatten(1),
            table,
            per_sample_weights=chunk.coefficients().flatten(0, 1).flatten(1).to(table.dtype),
            mode="sum",
        )
        output[chunk.queries] = bags.view(-1, m * d)
    return output.view(n, q, m * d).to(value.dtype)


def backward(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    with_reference: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of value, points, weights and (if `with_reference`) reference."""
    n, _, m, d = value.shape
    q, num_levels, p = points.shape[1], points.shape[3], points.shape[4]
    levels = _Levels(value, shapes, points)
    table = levels.padded(value)
    grad_output = grad_output.reshape(n * q, m, 1, d).to(table.dtype)
    everything = []
    grad_points = torch.empty((n * q, *points.shape[2:]), dtype=points.dtype, device=points.device)
    grad_weights = torch.empty((n * q, *weights.shape[2:]), dtype=weights.dtype, device=weights.device)
    grad_reference = None
    if reference is not None and with_reference:
        grad_reference = reference.new_empty((n * q, *reference.shape[2:]))
    for chunk in _chunks(levels, points, weights, reference, _BACKWARD_POINTS):
        everything.append((chunk.rows[:, :, 0].clone(), chunk.fx, chunk.fy, chunk.weights))
        grad = grad_output[chunk.queries]  # (q, M, 1, D)
        rows = chunk.rows.flatten(2)  # (q, M, 4*L*P)
        gathered = table.index_select(0, rows.flatten()).view(*rows.shape, d)
        dots = gathered.mul_(grad).sum(-1).view(chunk.rows.shape)  # (q, M, 4, L*P)
        upper_left, upper_right, lower_left, lower_right = dots.to(chunk.weights.dtype).unbind(2)
        upper_slope, lower_slope = upper_right - upper_left, lower_right - lower_left
        upper, lower = upper_left + chunk.fx * upper_slope, lower_left + chunk.fx * lower_slope
        grad_weight = upper + chunk.fy * (lower - upper)  # (q, M, L*P)
        dx = chunk.weights * (upper_slope + chunk.fy * (lower_slope - upper_slope))
        dy = chunk.weights * (lower - upper)
        pixels = torch.stack([dx, dy], -1).view(-1, m, num_levels, p, 2)  # by the pixel coordinates
        if reference is not None:
            mean = (grad_weight * chunk.weights).sum(-1, keepdim=True)
            grad_weight = chunk.weights * (grad_weight - mean)
        if grad_reference is not None:
            centre = (pixels * levels.cells).sum((1, 3))  # (q, L, 2)
            if reference.shape[-1] == 4:
                extent = (pixels * levels.cells * chunk.offsets).sum((1, 3)) * (0.5 / p)
                centre = torch.cat([centre, extent], -1)
            grad_reference[chunk.queries] = centre.to(reference.dtype)
        grad_points[chunk.queries] = (pixels * chunk.scale).to(points.dtype)
        grad_weights[chunk.queries] = grad_weight.view(-1, m, num_levels, p).to(weights.dtype)
    grad_value = _value_gradient(levels, grad_output.view(-1, d), everything).to(value.dtype)
    grad_reference = None if grad_reference is None else grad_reference.view(reference.shape)
    return grad_value, grad_points.view(points.shape), grad_weights.view(weights.shape), grad_reference


def _value_gradient(levels: "_Levels", grad_output: Tensor, parts: list[tuple[Tensor, ...]]) -> Tensor:
    """(N, S, M, D): for each cell, the bag of the points whose upper left corner it is, weighted rows of grad_output.

    Sorting the points by cell turns the scatter into `embedding_bag`s, one a corner: several times as fast as
    `scatter_add_`, and the same bits in every run.

    Args:
        grad_output: (N*Q*M, D).
        parts: of each chunk, the table rows of the upper left corners, fx, fy, weights, all (q, M, L*P).
    """
    if not parts:
        return grad_output.new_zeros(levels.batch, levels.cells_in, levels.heads, levels.head_size)
    rows, fx, fy, weights = (torch.cat([part[i].flatten() for part in parts]) for i in range(4))
    per_bag = parts[0][0].shape[-1]
    count = levels.batch * levels.cells_padded * levels.heads
    rows, order = torch.sort(rows, stable=True)
    bags = torch.div(order, per_bag, rounding_mode="floor")
    firsts = torch.searchsorted(rows, torch.arange(count, dtype=rows.dtype, device=rows.device))
    fx, fy, weights = fx[order].to(grad_output.dtype), fy[order].to(grad_output.dtype), weights[order]
    lower = weights.to(grad_output.dtype) * fy
    upper = weights.to(grad_output.dtype) - lower
    corners = []
    for line, along in ((upper, 1 - fx), (upper, fx), (lower, 1 - fx), (lower, fx)):
        found = F.embedding_bag(bags, grad_output, firsts, per_sample_weights=line * along, mode="sum")
        corners.append(found.view(levels.batch, levels.cells_padded, levels.heads, levels.head_size))
    return levels.gathered(corners)


class _Levels:
    """The levels with two zero cells at the end of each row and two zero rows above and below, and where they start.

    Row y, column x of a level lies `y * (W + 2) + x` after its first cell for all x from -2 to W + 1: the cells left
    of a row are the end of the row above.
    """

    def __init__(self, value: Tensor, shapes: Sequence[int], points: Tensor) -> None:
        self.sizes = list(zip(shapes[::2], shapes[1::2]))
        n, _, self.heads, self.head_size = value.shape
        p = points.shape[4]
        first, self.firsts = 0, []
        for h, w in self.sizes:
            self.firsts.append(first + 2 * (w + 2) + 2)
            first += (h + 4) * (w + 2) + 2
        self.cells_padded = first
        self.cells_in = sum(h * w for h, w in self.sizes)
        self.batch = n
        device, m = value.device, self.heads
        # Locations are as wide as they and the values are, float32 at least: with float64 values all is float64.
        self.dtype = torch.promote_types(torch.promote_types(points.dtype, value.dtype), torch.float32)
        self.cells = torch.tensor([[w, h] for h, w in self.sizes], dtype=self.dtype, device=device).view(-1, 1, 2)
        most = max(n, 1) * self.cells_padded * m
        self.index_dtype = torch.int32 if most < 2**31 else torch.int64

        def per_point(numbers: list[int], dtype: torch.dtype) -> Tensor:  # (K,)
            return torch.tensor(numbers, dtype=dtype, device=device).repeat_interleave(p).repeat(m)

        self.widths = per_point([w for _, w in self.sizes], self.dtype)
        self.heights = per_point([h for h, _ in self.sizes], self.dtype)
        self.line = per_point([(w + 2) * m for _, w in self.sizes], self.index_dtype)  # table rows from line to line
        head = torch.arange(m, dtype=self.index_dtype, device=device).repeat_interleave(len(self.sizes) * p)
        self.start = per_point([first * m for first in self.firsts], self.index_dtype) + head

    def padded(self, value: Tensor) -> Tensor:
        """(N*cells*M, D) table, float32 or wider."""
        dtype = torch.promote_types(value.dtype, torch.float32)
        table = torch.zeros(self.batch, self.cells_padded, self.heads, self.head_size, dtype=dtype, device=value.device)
        for level, part in enumerate(value.detach().split([h * w for h, w in self.sizes], 1)):
            inner = self._inner(table, level)
            inner.copy_(part.reshape(inner.shape))
        return table.view(-1, self.head_size)

    def gathered(self, corners: list[Tensor]) -> Tensor:
        """(N, S, M, D): what each cell gets as upper left, upper right, lower left, lower right corner of points.

        Each of `corners` is a padded table with what belongs to a corner at the cell of the *upper left* one.
        """
        parts = []
        for level in range(len(self.sizes)):
            width = self.sizes[level][1]
            shifts = (0, 1, width + 2, width + 3)
            parts.append(sum(self._inner(table, level, shift) for table, shift in zip(corners, shifts)).flatten(1, 2))
        return torch.cat(parts, 1)

    def _inner(self, table: Tensor, level: int, shift: int = 0) -> Tensor:
        """(N, H, W, M, D) view of the cells of a level, or of those `shift` before them, in a (N, cells, M, D)
        table."""
        (h, w), first = self.sizes[level], self.firsts[level] - shift
        return table[:, first : first + h * (w + 2)].unflatten(1, (h, w + 2))[:, :, :w]


class _Chunk(NamedTuple):
    """Some queries, as a slice of the N*Q; the corners in the order upper left, upper right, lower left, lower
    right."""

    queries: slice
    rows: Tensor  # (q, M, 4, L*P) of the table
    fx: Tensor  # (q, M, L*P) position between the corners
    fy: Tensor
    weights: Tensor  # (q, M, L*P), after the softmax
    offsets: Tensor  # (q, M, L, P, 2) as given
    scale: Tensor  # pixels per unit of `offsets`

    def coefficients(self) -> Tensor:
        """(q, M, 4, L*P)."""
        found = torch.empty(self.rows.shape, dtype=self.fx.dtype, device=self.fx.device)
        lower = self.weights * self.fy
        upper = self.weights - lower
        torch.mul(upper, self.fx, out=found[:, :, 1])
        torch.mul(lower, self.fx, out=found[:, :, 3])
        torch.sub(upper, found[:, :, 1], out=found[:, :, 0])
        torch.sub(lower, found[:, :, 3], out=found[:, :, 2])
        return found


def _chunks(
    levels: _Levels, points: Tensor, weights: Tensor, reference: Tensor | None, most_points: int
) -> Iterator[_Chunk]:
    n, q, m, num_levels, p, _ = points.shape
    per_head = num_levels * p
    points, weights = points.detach().flatten(0, 1), weights.detach().flatten(0, 1)
    reference = None if reference is None else reference.detach().flatten(0, 1)
    step = max(1, most_points // max(1, m * per_head))
    for start in range(0, n * q, step):
        queries = slice(start, min(start + step, n * q))
        offsets = points[queries].to(levels.dtype)
        count = len(offsets)
        weight = weights[queries].to(levels.dtype).reshape(count, m, per_head)
        if reference is None:
            scale = levels.cells
            pixels = torch.addcmul(offsets.new_tensor(-0.5), offsets, scale)
        else:
            weight = F.softmax(weight, -1)
            around = reference[queries].to(levels.dtype)[:, None, :, None]  # (q, 1, L, 1, 2 or 4)
            centre = (around[..., :2] * levels.cells - 0.5).expand(-1, -1, -1, p, -1).reshape(count, 1, per_head * 2)
            flat = offsets.reshape(count, m, per_head * 2)
            scale = offsets.new_ones(())
            if around.shape[-1] == 4:
                scale = around[..., 2:] * levels.cells * (0.5 / p)
                flat = flat * scale.expand(-1, -1, -1, p, -1).reshape(count, 1, per_head * 2)
            pixels = flat + centre
        x, y = (
            _clamped(part, size)
            for part, size in zip(pixels.view(count, -1, 2).unbind(-1), (levels.widths, levels.heights))
        )
        left, top = x.floor(), y.floor()
        images = torch.arange(queries.start, queries.stop, device=points.device) // q if n > 1 else None
        row = torch.addcmul(levels.start, top.to(levels.index_dtype), levels.line)
        row += left.to(levels.index_dtype) * m  # (q, K)
        if images is not None:
            row += (images * (levels.cells_padded * m)).to(row.dtype)[:, None]
        rows = row.new_empty(count, m, 4, per_head)
        row, line = row.view(count, m, per_head), levels.line.view(m, per_head)
        rows[:, :, 0] = row
        torch.add(row, m, out=rows[:, :, 1])
        torch.add(row, line, out=rows[:, :, 2])
        torch.add(row, line + m, out=rows[:, :, 3])
        fx, fy = (x - left).view(row.shape), (y - top).view(row.shape)
        yield _Chunk(queries, rows, fx, fy, weight, offsets, scale)


def _clamped(pixels: Tensor, size: Tensor) -> Tensor:
    """(q, K) contiguous coordinates, NaN and those far outside moved to the zero cells around the level."""
    return torch.nan_to_num(pixels, nan=-2.0).clamp_(min=-2).minimum(size)

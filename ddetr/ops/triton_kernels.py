"""The operator as fused Triton kernels for CUDA: softmax, locations, sampling and sum in one launch.

A program computes a block of queries of one head. Coordinates and weights are computed once per query, not once per
channel, and rows of values are read whole; everything is added up in float32. Loops run at run time: unrolled, the
float32 kernel spills registers. The gradient of the values is added atomically, except under
`torch.use_deterministic_algorithms(True)`, which takes the stock PyTorch backward.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddetr.ops import embedding_bag


def forward(value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, reference: Tensor | None) -> Tensor:
    """(N, Q, M*D). Without `reference`, points are locations and weights weights; with it, offsets and logits."""
    n, s, m, d = value.shape
    _, q, _, num_levels, p, _ = points.shape
    output = value.new_empty(n, q, m * d)
    if output.numel() == 0:
        return output
    value, points, weights, reference, size = _prepare(value, points, weights, reference)
    block_q, block_d = _blocks(d)
    with _on(value):
        _forward_kernel[(triton.cdiv(q, block_q) * n * m,)](
            value, points, weights, reference, _level_table(tuple(shapes), value.device), output,
            q, s, m, num_levels, p, D=d, REFERENCE=size, BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=4,
        )  # fmt: skip
    return output


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
    if torch.are_deterministic_algorithms_enabled():
        return embedding_bag.backward(grad_output, value, shapes, points, weights, reference, with_reference)
    n, s, m, d = value.shape
    _, q, _, num_levels, p, _ = points.shape
    needs_reference = reference is not None and with_reference
    inputs = value, points, weights, reference
    value, points, weights, reference, size = _prepare(value, points, weights, reference)
    device = value.device
    # float32 whatever the inputs: atomics round at each addition
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=device)
    grad_points = torch.empty(points.shape, dtype=points.dtype, device=device)
    grad_weights = torch.empty(weights.shape, dtype=torch.float32, device=device)
    partial = torch.empty((n, q, m, num_levels, size) if needs_reference else 1, dtype=torch.float32, device=device)
    if grad_points.numel() and value.numel():
        block_q, block_d = _blocks(d)
        with _on(value):
            _backward_kernel[(triton.cdiv(q, block_q) * n * m,)](
                grad_output.contiguous(), value, points, weights, reference, _level_table(tuple(shapes), device),
                grad_value, grad_points, grad_weights, partial,
                q, s, m, num_levels, p, D=d, REFERENCE=size, WITH_REFERENCE=needs_reference,
                BLOCK_Q=block_q, BLOCK_D=block_d, num_warps=4,
            )  # fmt: skip
    grads = [grad.to(tensor.dtype) for grad, tensor in zip((grad_value, grad_points, grad_weights), inputs)]
    grad_reference = partial.sum(2).to(inputs[3].dtype) if needs_reference else None
    return grads[0], grads[1], grads[2], grad_reference


def _blocks(d: int) -> tuple[int, int]:
    """Queries and channels of a program: about 1,024 values of each corner, 8 a thread."""
    block_d = max(triton.next_power_of_2(d), 8)
    return max(1, min(64, 1024 // block_d)), block_d


def _prepare(
    value: Tensor, points: Tensor, weights: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Contiguous inputs; where there are no reference points, any tensor stands in and the size is 0."""
    size = 0 if reference is None else reference.shape[-1]
    reference = weights if reference is None else reference.float()
    return value.contiguous(), points.contiguous(), weights.contiguous(), reference.contiguous(), size


@functools.lru_cache(maxsize=256)
def _level_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 3) int32 of height, width, first cell."""
    rows, start = [], 0
    for h, w in zip(shapes[::2], shapes[1::2]):
        rows.append([h, w, start])
        start += h * w
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)


def _on(tensor: Tensor) -> "torch.cuda.device":
    """Triton launches on the current device, which need not be the tensor's (the interpreter runs on the CPU)."""
    return torch.cuda.device(tensor.device if tensor.is_cuda else -1)


@triton.jit
def _place(q, m, BLOCK_Q: tl.constexpr):
    """Image, head and queries of this program, on one axis: CUDA's others end at 65,535."""
    blocks = tl.cdiv(q, BLOCK_Q)
    image_head = tl.program_id(0) // blocks
    query = (tl.program_id(0) % blocks) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    return (image_head // m).to(tl.int64), image_head % m, query


@triton.jit
def _logits_of(weights, base, num, mask, REFERENCE: tl.constexpr):
    """Maximum and 1 / sum of the exponentials of the logits of each query, or (0, 1) for plain weights."""
    top = tl.zeros_like(base).to(tl.float32)
    total = top + 1.0
    if REFERENCE:
        top = top - float("inf")
        for i in range(num):
            top = tl.maximum(top, tl.load(weights + base + i, mask=mask, other=0.0).to(tl.float32))
        total = tl.zeros_like(top)
        for i in range(num):
            total += tl.exp(tl.load(weights + base + i, mask=mask, other=0.0).to(tl.float32) - top)
    return top, 1.0 / total


@triton.jit
def _rule(reference, at, mask, size, points_per_level, axis: tl.constexpr, REFERENCE: tl.constexpr):
    """pixel = scale * input + offset along one axis (0: x, 1: y); `at` = (query, level) of the reference points."""
    if REFERENCE == 0:
        scale = tl.zeros_like(at).to(tl.float32) + size
        offset = tl.zeros_like(at).to(tl.float32) - 0.5
    else:
        centre = tl.load(reference + at * REFERENCE + axis, mask=mask, other=0.0)
        offset = centre * size - 0.5
        if REFERENCE == 2:
            scale = tl.zeros_like(at).to(tl.float32) + 1.0
        else:
            extent = tl.load(reference + at * REFERENCE + 2 + axis, mask=mask, other=0.0)
            scale = extent * size * (0.5 / points_per_level)
    return scale, offset


@triton.jit
def _cell(pixel, size):
    """The cell before a coordinate and the way to the next; NaN and far coordinates become cells outside."""
    pixel = tl.where(pixel > -2.0, pixel, -2.0)
    pixel = tl.where(pixel < size + 1.0, pixel, size + 1.0)
    cell = pixel.to(tl.int32)
    cell = tl.where(cell.to(tl.float32) > pixel, cell - 1, cell)
    return cell, pixel - cell.to(tl.float32)


@triton.jit
def _row(image, x, y, width, height, start, mask, channel, in_row, row_size, D: tl.constexpr):
    """Offsets of rows of values and whether they are there, both (BLOCK_Q, BLOCK_D)."""
    inside = mask & (x >= 0) & (x < width) & (y >= 0) & (y < height)
    row = tl.where(inside, start + y * width + x, 0).to(tl.int64)
    return image + row[:, None] * row_size + channel[None, :], inside[:, None] & in_row[None, :]


@triton.jit
def _forward_kernel(
    value, points, weights, reference, levels, output, q, s, m, num_levels, per_level,
    D: tl.constexpr, REFERENCE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, head, query = _place(q, m, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    mask, in_row = query < q, channel < D
    at_query = n * q + query
    num = num_levels * per_level
    base = (at_query * m + head) * num
    image = n * s * m * D + head * D
    top, inverse = _logits_of(weights, base, num, mask, REFERENCE)
    total = tl.zeros((BLOCK_Q, BLOCK_D), dtype=tl.float32)
    for level in range(num_levels):
        height, width = tl.load(levels + level * 3), tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        at = at_query * num_levels + level
        scale_x, offset_x = _rule(reference, at, mask, width.to(tl.float32), per_level, 0, REFERENCE)
        scale_y, offset_y = _rule(reference, at, mask, height.to(tl.float32), per_level, 1, REFERENCE)
        for point in range(per_level):
            i = base + level * per_level + point
            x, fx = _cell(tl.load(points + 2 * i, mask=mask, other=0.0).to(tl.float32) * scale_x + offset_x, width)
            y, fy = _cell(tl.load(points + 2 * i + 1, mask=mask, other=0.0).to(tl.float32) * scale_y + offset_y, height)
            weight = tl.load(weights + i, mask=mask, other=0.0).to(tl.float32)
            if REFERENCE:
                weight = tl.exp(weight - top) * inverse
            rows, there = _row(image, x, y, width, height, start, mask, channel, in_row, m * D, D)
            total += (weight * (1 - fy) * (1 - fx))[:, None] * tl.load(value + rows, mask=there, other=0.0).to(
                tl.float32
            )
            rows, there = _row(image, x + 1, y, width, height, start, mask, channel, in_row, m * D, D)
            total += (weight * (1 - fy) * fx)[:, None] * tl.load(value + rows, mask=there, other=0.0).to(tl.float32)
            rows, there = _row(image, x, y + 1, width, height, start, mask, channel, in_row, m * D, D)
            total += (weight * fy * (1 - fx))[:, None] * tl.load(value + rows, mask=there, other=0.0).to(tl.float32)
            rows, there = _row(image, x + 1, y + 1, width, height, start, mask, channel, in_row, m * D, D)
            total += (weight * fy * fx)[:, None] * tl.load(value + rows, mask=there, other=0.0).to(tl.float32)
    to = (at_query * m + head)[:, None] * D + channel[None, :]
    tl.store(output + to, total.to(output.dtype.element_ty), mask=mask[:, None] & in_row[None, :])


@triton.jit
def _corner(value, grad_value, rows, there, grad, coefficient):
    """Adds a corner's share of the gradient to its value; returns value . gradient of the output."""
    tl.atomic_add(grad_value + rows, coefficient[:, None] * grad, mask=there, sem="relaxed")
    return tl.sum(tl.load(value + rows, mask=there, other=0.0).to(tl.float32) * grad, 1)


@triton.jit
def _backward_kernel(
    grad_output, value, points, weights, reference, levels, grad_value, grad_points, grad_weights, grad_reference,
    q, s, m, num_levels, per_level,
    D: tl.constexpr, REFERENCE: tl.constexpr, WITH_REFERENCE: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    n, head, query = _place(q, m, BLOCK_Q)
    channel = tl.arange(0, BLOCK_D)
    mask, in_row = query < q, channel < D
    at_query = n * q + query
    num = num_levels * per_level
    base = (at_query * m + head) * num
    image = n * s * m * D + head * D
    top, inverse = _logits_of(weights, base, num, mask, REFERENCE)
    of_output = (at_query * m + head)[:, None] * D + channel[None, :]
    grad = tl.load(grad_output + of_output, mask=mask[:, None] & in_row[None, :], other=0.0).to(tl.float32)
    mean = tl.zeros((BLOCK_Q,), dtype=tl.float32)
    for level in range(num_levels):
        height, width = tl.load(levels + level * 3), tl.load(levels + level * 3 + 1)
        start = tl.load(levels + level * 3 + 2)
        at = at_query * num_levels + level
        scale_x, offset_x = _rule(reference, at, mask, width.to(tl.float32), per_level, 0, REFERENCE)
        scale_y, offset_y = _rule(reference, at, mask, height.to(tl.float32), per_level, 1, REFERENCE)
        sum_x, sum_y = tl.zeros_like(mean), tl.zeros_like(mean)
        sum_w, sum_h = tl.zeros_like(mean), tl.zeros_like(mean)
        for point in range(per_level):
            i = base + level * per_level + point
            in_x = tl.load(points + 2 * i, mask=mask, other=0.0).to(tl.float32)
            in_y = tl.load(points + 2 * i + 1, mask=mask, other=0.0).to(tl.float32)
            x, fx = _cell(in_x * scale_x + offset_x, width)
            y, fy = _cell(in_y * scale_y + offset_y, height)
            weight = tl.load(weights + i, mask=mask, other=0.0).to(tl.float32)
            if REFERENCE:
                weight = tl.exp(weight - top) * inverse
            rows, there = _row(image, x, y, width, height, start, mask, channel, in_row, m * D, D)
            dot0 = _corner(value, grad_value, rows, there, grad, weight * (1 - fy) * (1 - fx))
            rows, there = _row(image, x + 1, y, width, height, start, mask, channel, in_row, m * D, D)
            dot1 = _corner(value, grad_value, rows, there, grad, weight * (1 - fy) * fx)
            rows, there = _row(image, x, y + 1, width, height, start, mask, channel, in_row, m * D, D)
            dot2 = _corner(value, grad_value, rows, there, grad, weight * fy * (1 - fx))
            rows, there = _row(image, x + 1, y + 1, width, height, start, mask, channel, in_row, m * D, D)
            dot3 = _corner(value, grad_value, rows, there, grad, weight * fy * fx)
            upper, lower = dot0 + fx * (dot1 - dot0), dot2 + fx * (dot3 - dot2)
            grad_weight = upper + fy * (lower - upper)
            grad_x = weight * (dot1 - dot0 + fy * (dot3 - dot2 - dot1 + dot0))
            grad_y = weight * (lower - upper)
            mean += weight * grad_weight
            tl.store(grad_weights + i, grad_weight, mask=mask)
            tl.store(grad_points + 2 * i, (grad_x * scale_x).to(grad_points.dtype.element_ty), mask=mask)
            tl.store(grad_points + 2 * i + 1, (grad_y * scale_y).to(grad_points.dtype.element_ty), mask=mask)
            sum_x += grad_x
            sum_y += grad_y
            sum_w += grad_x * in_x
            sum_h += grad_y * in_y
        if WITH_REFERENCE:
            to = ((at_query * m + head) * num_levels + level) * REFERENCE
            wide, high = width.to(tl.float32), height.to(tl.float32)
            tl.store(grad_reference + to, sum_x * wide, mask=mask)
            tl.store(grad_reference + to + 1, sum_y * high, mask=mask)
            if REFERENCE == 4:
                tl.store(grad_reference + to + 2, sum_w * wide * (0.5 / per_level), mask=mask)
                tl.store(grad_reference + to + 3, sum_h * high * (0.5 / per_level), mask=mask)
    if REFERENCE:
        tl.debug_barrier()  # the gradients of the weights, stored above, are read again by other threads of the block
        for i in range(num):
            weight = tl.exp(tl.load(weights + base + i, mask=mask, other=0.0).to(tl.float32) - top) * inverse
            grad_weight = tl.load(grad_weights + base + i, mask=mask, other=0.0)
            tl.store(grad_weights + base + i, weight * (grad_weight - mean), mask=mask)

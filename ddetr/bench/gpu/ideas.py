"""Other kernels for the operator's work, which only a GPU can judge; one that wins moves to ddetr/ops/.

packed   a program takes pairs (query, head) as they lie in memory: offsets, logits and output are read and written in
         one piece, but fewer neighbours share rows of values
split    packed, and each level is a program of its own: for the decoder, whose few queries leave a card idle
copies   backward: the levels from `COARSE` on, which take half of all samples and few cells, are added up in several
         copies that are summed at the end, so that fewer additions wait for each other

Left out after reckoning: coarse gradients as a product of a one-hot matrix (cells x samples) with the gradients. For
221 cells it makes thousands of comparisons per sample, more time than all additions take; and Triton has no
accumulators in shared memory that are added to at computed places.

For inputs with reference points of two coordinates, as the encoder has them.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddetr.ops import triton_kernels
from ddetr.ops.triton_kernels import (
    Launch,
    _add_samples,
    _level,
    _logits_of,
    _place,
    _places,
    _point_gradients,
    _points,
    _through_softmax,
    _weight,
)

COARSE = 2  # levels before it are fine


def packed_forward(
    value: Tensor,
    shapes: Sequence[int],
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    launch: Launch,
    split: bool = False,
) -> Tensor:
    """(N, Q, M*D); `launch.queries` counts pairs."""
    n, s, m, d = value.shape
    _, q, _, num_levels, p, _ = offsets.shape
    table = triton_kernels.level_table(tuple(shapes), value.device)
    output = value.new_empty((num_levels, n, q, m * d), dtype=torch.float32) if split else value.new_empty(n, q, m * d)
    grid = (triton.cdiv(q * m, launch.queries) * n, num_levels if split else 1)
    packed_forward_kernel[grid](
        value, offsets, logits, reference, table, output, n, q, s, m, num_levels,
        D=d, P=p, SPLIT=split, PAIRS=launch.queries, POINTS=launch.points, CHANNELS=triton_kernels.channels_of(d),
        EVICT=launch.evict, num_warps=launch.warps,
    )  # fmt: skip
    return output.sum(0).to(value.dtype) if split else output


def backward_in_copies(
    grad_output: Tensor,
    value: Tensor,
    shapes: Sequence[int],
    offsets: Tensor,
    logits: Tensor,
    reference: Tensor,
    launch: Launch,
    copies: int = 8,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, offsets and logits."""
    n, s, m, d = value.shape
    _, q, _, num_levels, p, _ = offsets.shape
    table = triton_kernels.level_table(tuple(shapes), value.device)
    fine = sum(h * w for h, w in list(zip(shapes[::2], shapes[1::2]))[:COARSE])
    grad_value = torch.zeros(value.shape, dtype=torch.float32, device=value.device)
    coarse = grad_value.new_zeros(copies, n, s - fine, m, d)
    grad_offsets, grad_logits = torch.empty_like(offsets), grad_value.new_empty(logits.shape)
    grid = (triton.cdiv(q, launch.queries) * n * m,)
    copies_backward_kernel[grid](
        grad_output, value, offsets, logits, reference, table, grad_value, coarse, grad_offsets, grad_logits,
        n, q, s, m, num_levels, fine,
        D=d, P=p, FIRST=COARSE, COPIES=copies, QUERIES=launch.queries, POINTS=launch.points,
        CHANNELS=triton_kernels.channels_of(d), EVICT=launch.evict, num_warps=launch.warps,
    )  # fmt: skip
    grad_value[:, fine:] += coarse.sum(0)
    return grad_value.to(value.dtype), grad_offsets, grad_logits.to(logits.dtype)


@triton.jit
def packed_forward_kernel(
    value, points, weights, reference, levels, output, num_images, q, s, m, num_levels,
    D: tl.constexpr, P: tl.constexpr, SPLIT: tl.constexpr,
    PAIRS: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(q * m, PAIRS)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    pair = (tl.program_id(0) % blocks) * PAIRS + tl.arange(0, PAIRS)
    mask = pair < q * m
    query, head = pair // m, pair % m
    channel = tl.arange(0, CHANNELS)
    num = num_levels * P
    value += n * s * m * D
    output += n * q * m * D
    points += n * q * m * num * 2
    weights += n * q * m * num
    reference += n * q * num_levels * 2
    base = pair * num
    top, inverse = _logits_of(weights, base, mask, num_levels, P, POINTS)
    total = tl.zeros((PAIRS, POINTS, CHANNELS), dtype=tl.float32)
    first_level, end = 0, num_levels
    if SPLIT:
        first_level = tl.program_id(1)
        end = first_level + 1
        output += tl.program_id(1).to(tl.int64) * num_images * q * m * D
    for level in range(first_level, end):
        height, width, start, scale_x, offset_x, scale_y, offset_y = _level(
            levels, reference, query, mask, level, num_levels, P, 2
        )
        for first in tl.range(0, P, POINTS):
            there, i = _places(base, mask, level, first, P, POINTS)
            in_x, in_y, x, fx, y, fy = _points(points, i, there, width, height, scale_x, offset_x, scale_y, offset_y)
            weight = _weight(weights, i, there, top, inverse, 2)
            in_head = (head * D)[:, None, None]
            total = _add_samples(
                total, value, in_head, x, fx, y, fy, weight,
                width, height, start, there, channel, m * D, D, False, EVICT,
            )  # fmt: skip
    to = (pair * D)[:, None] + channel[None, :]
    tl.store(output + to, tl.sum(total, 1).to(output.dtype.element_ty), mask=mask[:, None] & (channel < D)[None, :])


@triton.jit
def copies_backward_kernel(
    grad_output, value, points, weights, reference, levels, grad_value, coarse, grad_points, grad_weights,
    num_images, q, s, m, num_levels, fine,
    D: tl.constexpr, P: tl.constexpr, FIRST: tl.constexpr, COPIES: tl.constexpr,
    QUERIES: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    n, head, query = _place(q, m, QUERIES)
    channel = tl.arange(0, CHANNELS)
    mask = query < q
    num = num_levels * P
    value += n * s * m * D + head * D
    grad_value += n * s * m * D + head * D
    # A cell keeps its number, so that a copy begins where its first fine cell would lie.
    copy = (tl.program_id(0) % COPIES).to(tl.int64) * num_images + n
    coarse += copy * (s - fine) * m * D - fine * m * D + head * D
    grad_output += n * q * m * D + head * D
    points += (n * q * m + head) * num * 2
    grad_points += (n * q * m + head) * num * 2
    weights += (n * q * m + head) * num
    grad_weights += (n * q * m + head) * num
    reference += n * q * num_levels * 2
    base = query * (m * num)
    top, inverse = _logits_of(weights, base, mask, num_levels, P, POINTS)
    of_output = (query * (m * D))[:, None] + channel[None, :]
    grad = tl.load(grad_output + of_output, mask=mask[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    grad = grad[:, None, :]
    mean = tl.zeros((QUERIES, POINTS), dtype=tl.float32)
    for level in range(num_levels):
        height, width, start, scale_x, offset_x, scale_y, offset_y = _level(
            levels, reference, query, mask, level, num_levels, P, 2
        )
        to_value = grad_value
        if level >= FIRST:
            to_value = coarse
        for first in tl.range(0, P, POINTS):
            there, i = _places(base, mask, level, first, P, POINTS)
            in_x, in_y, x, fx, y, fy = _points(points, i, there, width, height, scale_x, offset_x, scale_y, offset_y)
            weight = _weight(weights, i, there, top, inverse, 2)
            grad_weight, grad_x, grad_y = _point_gradients(
                value, to_value, grad, x, fx, y, fy, weight,
                width, height, start, there, channel, m * D, D, False, EVICT,
            )  # fmt: skip
            mean += weight * grad_weight
            tl.store(grad_weights + i, grad_weight, mask=there)
            tl.store(grad_points + 2 * i, (grad_x * scale_x).to(grad_points.dtype.element_ty), mask=there)
            tl.store(grad_points + 2 * i + 1, (grad_y * scale_y).to(grad_points.dtype.element_ty), mask=there)
    _through_softmax(weights, grad_weights, base, mask, top, inverse, mean, num_levels, P, POINTS)

"""The operator as fused Triton kernels for CUDA: softmax, locations, sampling and sum in one launch.

A program computes a block of queries of one head, and of each some points at once. Coordinates and weights are computed
once per point, not once per channel, and rows of values are read whole; everything is added up in float32. Loops run at
run time: unrolled, the float32 kernel spills registers. How the work is cut is a `Launch`.

The gradient of the values is added atomically, except under `torch.use_deterministic_algorithms(True)`, which takes the
stock PyTorch backward. PTX has 16-byte additions (`red.v4.f32`) from sm_90 on; sm_80 adds each float by itself.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ddetr.ops import embedding_bag


class Launch(NamedTuple):
    """How a kernel's work is cut: any choice gives the same result, at its own speed."""

    queries: int  # of a program
    points: int = 1  # of a query and level that are sampled at once, which is what is in flight: 4 rows each
    warps: int = 4
    stages: int = 1  # of a software pipeline over levels or points, which fetches rows through shared memory; 1: none
    evict: str = ""  # "evict_last": rows of values are the last to leave the L1 cache


class Kind(NamedTuple):
    """What a choice of `Launch` may depend on."""

    backward: bool
    channels: int  # the head size, rounded up to a power of two
    dtype: torch.dtype  # of the values
    many: bool  # queries, as the encoder has them


# Measured choices; what is not here takes `default_launch`. `ddetr/bench/gpu/sweep.py` prints this table.
LAUNCHES: dict[Kind, Launch] = {}
# Triton 3.2's pipeline ends the process where tensors have three dimensions; 3.6's is tested.
_PIPELINES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
MANY = 8192  # queries of all images: from here on there is a program for every place on a large card


def forward(
    value: Tensor,
    shapes: Sequence[int],
    points: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    launch: Launch | None = None,
) -> Tensor:
    """(N, Q, M*D). Without `reference`, points are locations and weights weights; with it, offsets and logits."""
    n, s, m, d = value.shape
    _, q, _, num_levels, p, _ = points.shape
    output = value.new_empty((n, q, m * d))
    if output.numel() == 0:
        return output
    value, points, weights, reference, size = _prepare(value, points, weights, reference)
    channels, usual = launch_of(False, d, value.dtype, n * q >= MANY)
    launch = launch or usual
    with _on(value):
        _forward_kernel[(-(-q // launch.queries) * n * m,)](
            value, points, weights, reference, level_table(tuple(shapes), value.device), output,
            q, s, m, num_levels, D=d, P=p, REFERENCE=size, WIDE=_is_wide(value, points),
            QUERIES=launch.queries, POINTS=launch.points, CHANNELS=channels, STAGES=_stages(launch), EVICT=launch.evict,
            num_warps=launch.warps,
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
    launch: Launch | None = None,
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
        channels, usual = launch_of(True, d, value.dtype, n * q >= MANY)
        launch = launch or usual
        with _on(value):
            _backward_kernel[(-(-q // launch.queries) * n * m,)](
                grad_output.contiguous(), value, points, weights, reference, level_table(tuple(shapes), device),
                grad_value, grad_points, grad_weights, partial,
                q, s, m, num_levels, D=d, P=p, REFERENCE=size, WITH_REFERENCE=needs_reference,
                WIDE=_is_wide(value, points), QUERIES=launch.queries, POINTS=launch.points, CHANNELS=channels,
                STAGES=_stages(launch), EVICT=launch.evict, num_warps=launch.warps,
            )  # fmt: skip
    grads = [grad.to(tensor.dtype) for grad, tensor in zip((grad_value, grad_points, grad_weights), inputs)]
    grad_reference = partial.sum(2).to(inputs[3].dtype) if needs_reference else None
    return grads[0], grads[1], grads[2], grad_reference


def default_launch(channels: int) -> Launch:
    """About 1,024 values of each corner, 8 a thread."""
    return Launch(max(1, min(64, 1024 // channels)))


def channels_of(d: int) -> int:
    """Channels of a program, of which the first D are there."""
    return max(triton.next_power_of_2(d), 8)


@functools.cache
def launch_of(backward: bool, d: int, dtype: torch.dtype, many: bool) -> tuple[int, Launch]:
    """Channels of a program, and how the work is cut."""
    channels = channels_of(d)
    return channels, LAUNCHES.get(Kind(backward, channels, dtype, many)) or default_launch(channels)


def _stages(launch: Launch) -> int:
    return launch.stages if _PIPELINES else 1


def _is_wide(value: Tensor, points: Tensor) -> bool:
    """Whether offsets inside an image need 64 bits: of values, of outputs, or of sampling points."""
    _, s, m, d = value.shape
    _, q, _, num_levels, p, _ = points.shape
    return max(s * m * d, q * m * d, q * m * num_levels * p * 2) >= 2**31


def _prepare(
    value: Tensor, points: Tensor, weights: Tensor, reference: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Contiguous inputs; where there are no reference points, any tensor stands in and the size is 0."""
    size = 0 if reference is None else reference.shape[-1]
    reference = weights if reference is None else reference.float()
    return value.contiguous(), points.contiguous(), weights.contiguous(), reference.contiguous(), size


@functools.lru_cache(maxsize=256)
def level_table(shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """(L, 3) int32 of height, width, first cell."""
    rows, start = [], 0
    for h, w in zip(shapes[::2], shapes[1::2]):
        rows.append([h, w, start])
        start += h * w
    table = torch.tensor(rows, dtype=torch.int32).reshape(-1, 3)
    if device.type == "cuda":  # a copy from memory that is not pinned would wait for the GPU
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


def _on(tensor: Tensor) -> AbstractContextManager:
    """Triton launches on the current device, which need not be the tensor's (the interpreter runs on the CPU)."""
    if not tensor.is_cuda or tensor.get_device() == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


@triton.jit
def _place(q, m, QUERIES: tl.constexpr):
    """Image, head and queries of this program, on one axis: CUDA's others end at 65,535."""
    blocks = tl.cdiv(q, QUERIES)
    image_head = tl.program_id(0) // blocks
    query = (tl.program_id(0) % blocks) * QUERIES + tl.arange(0, QUERIES)
    return (image_head // m).to(tl.int64), image_head % m, query


@triton.jit
def _places(base, mask, level, first, P: tl.constexpr, POINTS: tl.constexpr):
    """Which points there are from `first` on, and where they lie in memory, both (QUERIES, POINTS)."""
    lane = tl.arange(0, POINTS)
    there = mask[:, None] & (first + lane < P)[None, :]
    return there, base[:, None] + (level * P + first + lane)[None, :]


@triton.jit
def _logits_of(weights, base, mask, num_levels, P: tl.constexpr, POINTS: tl.constexpr):
    """Maximum and 1 / sum of the exponentials of the logits of each query."""
    top = tl.zeros((base.shape[0], POINTS), dtype=tl.float32) - float("inf")
    for level in range(num_levels):
        for first in tl.range(0, P, POINTS):
            there, i = _places(base, mask, level, first, P, POINTS)
            top = tl.maximum(top, tl.load(weights + i, mask=there, other=-float("inf")).to(tl.float32))
    highest = tl.where(mask, tl.max(top, 1), 0.0)
    total = tl.zeros_like(top)
    for level in range(num_levels):
        for first in tl.range(0, P, POINTS):
            there, i = _places(base, mask, level, first, P, POINTS)
            logit = tl.load(weights + i, mask=there, other=-float("inf")).to(tl.float32)
            total += tl.exp(logit - highest[:, None])
    return highest, 1.0 / tl.where(mask, tl.sum(total, 1), 1.0)


@triton.jit
def _weight(weights, i, there, top, inverse, REFERENCE: tl.constexpr):
    """Weights of points; 0 where there is none."""
    if REFERENCE:
        logit = tl.load(weights + i, mask=there, other=-float("inf")).to(tl.float32)
        weight = tl.exp(logit - top[:, None]) * inverse[:, None]
    else:
        weight = tl.load(weights + i, mask=there, other=0.0).to(tl.float32)
    return weight


@triton.jit
def _rule(reference, at, mask, size, axis: tl.constexpr, P: tl.constexpr, REFERENCE: tl.constexpr):
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
            scale = extent * size * (0.5 / P)
    return scale[:, None], offset[:, None]


@triton.jit
def _cell(pixel, size):
    """The cell before a coordinate and the way to the next; NaN and far coordinates become cells outside."""
    pixel = tl.where(pixel > -2.0, pixel, -2.0)
    pixel = tl.where(pixel < size + 1.0, pixel, size + 1.0)
    cell = tl.floor(pixel)
    return cell.to(tl.int32), pixel - cell


@triton.jit
def _level(levels, reference, query, mask, level, num_levels, P: tl.constexpr, REFERENCE: tl.constexpr):
    """Height, width and first cell of a level, and the rules of its x and y."""
    height, width = tl.load(levels + level * 3), tl.load(levels + level * 3 + 1)
    start = tl.load(levels + level * 3 + 2)
    at = query * num_levels + level
    scale_x, offset_x = _rule(reference, at, mask, width.to(tl.float32), 0, P, REFERENCE)
    scale_y, offset_y = _rule(reference, at, mask, height.to(tl.float32), 1, P, REFERENCE)
    return height, width, start, scale_x, offset_x, scale_y, offset_y


@triton.jit
def _points(points, i, there, width, height, scale_x, offset_x, scale_y, offset_y):
    """x and y of points as they were given, and the cells before them with the ways to the next."""
    in_x = tl.load(points + 2 * i, mask=there, other=0.0).to(tl.float32)
    in_y = tl.load(points + 2 * i + 1, mask=there, other=0.0).to(tl.float32)
    x, fx = _cell(in_x * scale_x + offset_x, width)
    y, fy = _cell(in_y * scale_y + offset_y, height)
    return in_x, in_y, x, fx, y, fy


@triton.jit
def _row(x, y, width, height, start, there, channel, row_size, D: tl.constexpr, WIDE: tl.constexpr):
    """Offsets of rows of values and whether they are there, both (QUERIES, POINTS, CHANNELS)."""
    # Unsigned, what is negative is too large: one comparison an axis, and fewer registers.
    inside = there & (x.to(tl.uint32) < width.to(tl.uint32)) & (y.to(tl.uint32) < height.to(tl.uint32))
    row = tl.where(inside, start + y * width + x, 0)
    if WIDE:
        row = row.to(tl.int64)
    return (row * row_size)[:, :, None] + channel[None, None, :], inside[:, :, None] & (channel < D)[None, None, :]


@triton.jit
def _sample(value, rows, there, coefficient, EVICT: tl.constexpr):
    row = tl.load(value + rows, mask=there, other=0.0, eviction_policy=EVICT)
    return coefficient[:, :, None] * row.to(tl.float32)


@triton.jit
def _add_samples(
    total, value, shift, x, fx, y, fy, weight, width, height, start, there, channel, row_size,
    D: tl.constexpr, WIDE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """`total` and what the four cells around each point add to it; `shift` is added to the offsets of rows."""
    rows, inside = _row(x, y, width, height, start, there, channel, row_size, D, WIDE)
    total += _sample(value, rows + shift, inside, weight * (1 - fy) * (1 - fx), EVICT)
    rows, inside = _row(x + 1, y, width, height, start, there, channel, row_size, D, WIDE)
    total += _sample(value, rows + shift, inside, weight * (1 - fy) * fx, EVICT)
    rows, inside = _row(x, y + 1, width, height, start, there, channel, row_size, D, WIDE)
    total += _sample(value, rows + shift, inside, weight * fy * (1 - fx), EVICT)
    rows, inside = _row(x + 1, y + 1, width, height, start, there, channel, row_size, D, WIDE)
    total += _sample(value, rows + shift, inside, weight * fy * fx, EVICT)
    return total


@triton.jit
def _forward_kernel(
    value, points, weights, reference, levels, output, q, s, m, num_levels,
    D: tl.constexpr, P: tl.constexpr, REFERENCE: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    n, head, query = _place(q, m, QUERIES)
    channel = tl.arange(0, CHANNELS)
    mask = query < q
    num = num_levels * P
    value += n * s * m * D + head * D
    output += n * q * m * D + head * D
    points += (n * q * m + head) * num * 2
    weights += (n * q * m + head) * num
    reference += n * q * num_levels * REFERENCE
    if WIDE:
        query = query.to(tl.int64)
    base = query * (m * num)
    top, inverse = tl.zeros((QUERIES,), dtype=tl.float32), tl.zeros((QUERIES,), dtype=tl.float32)
    if REFERENCE:
        top, inverse = _logits_of(weights, base, mask, num_levels, P, POINTS)
    total = tl.zeros((QUERIES, POINTS, CHANNELS), dtype=tl.float32)
    for level in tl.range(0, num_levels, num_stages=STAGES):
        height, width, start, scale_x, offset_x, scale_y, offset_y = _level(
            levels, reference, query, mask, level, num_levels, P, REFERENCE
        )
        for first in tl.range(0, P, POINTS, num_stages=STAGES):
            there, i = _places(base, mask, level, first, P, POINTS)
            in_x, in_y, x, fx, y, fy = _points(points, i, there, width, height, scale_x, offset_x, scale_y, offset_y)
            weight = _weight(weights, i, there, top, inverse, REFERENCE)
            total = _add_samples(
                total, value, 0, x, fx, y, fy, weight, width, height, start, there, channel, m * D, D, WIDE, EVICT
            )
    to = (query * (m * D))[:, None] + channel[None, :]
    tl.store(output + to, tl.sum(total, 1).to(output.dtype.element_ty), mask=mask[:, None] & (channel < D)[None, :])


@triton.jit
def _corner(value, grad_value, rows, there, grad, coefficient, EVICT: tl.constexpr):
    """Adds a corner's share of the gradient to its value; returns value . gradient of the output."""
    tl.atomic_add(grad_value + rows, coefficient[:, :, None] * grad, mask=there, sem="relaxed")
    row = tl.load(value + rows, mask=there, other=0.0, eviction_policy=EVICT)
    return tl.sum(row.to(tl.float32) * grad, 2)


@triton.jit
def _point_gradients(
    value, grad_value, grad, x, fx, y, fy, weight, width, height, start, there, channel, row_size,
    D: tl.constexpr, WIDE: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    """Gradients of weights and of pixel coordinates x and y; those of the values are added to theirs."""
    rows, inside = _row(x, y, width, height, start, there, channel, row_size, D, WIDE)
    dot0 = _corner(value, grad_value, rows, inside, grad, weight * (1 - fy) * (1 - fx), EVICT)
    rows, inside = _row(x + 1, y, width, height, start, there, channel, row_size, D, WIDE)
    dot1 = _corner(value, grad_value, rows, inside, grad, weight * (1 - fy) * fx, EVICT)
    rows, inside = _row(x, y + 1, width, height, start, there, channel, row_size, D, WIDE)
    dot2 = _corner(value, grad_value, rows, inside, grad, weight * fy * (1 - fx), EVICT)
    rows, inside = _row(x + 1, y + 1, width, height, start, there, channel, row_size, D, WIDE)
    dot3 = _corner(value, grad_value, rows, inside, grad, weight * fy * fx, EVICT)
    upper, lower = dot0 + fx * (dot1 - dot0), dot2 + fx * (dot3 - dot2)
    grad_x = weight * (dot1 - dot0 + fy * (dot3 - dot2 - dot1 + dot0))
    return upper + fy * (lower - upper), grad_x, weight * (lower - upper)


@triton.jit
def _through_softmax(
    weights, grad_weights, base, mask, top, inverse, mean, num_levels, P: tl.constexpr, POINTS: tl.constexpr
):
    """Gradients of weights -> of logits, in their place; `mean` (QUERIES, POINTS) sums weight * gradient."""
    average = tl.sum(mean, 1)[:, None]
    tl.debug_barrier()  # the gradients of the weights, stored before, are read again by other threads of the block
    for level in range(num_levels):
        for first in tl.range(0, P, POINTS):
            there, i = _places(base, mask, level, first, P, POINTS)
            weight = _weight(weights, i, there, top, inverse, 2)
            grad_weight = tl.load(grad_weights + i, mask=there, other=0.0)
            tl.store(grad_weights + i, weight * (grad_weight - average), mask=there)


@triton.jit
def _backward_kernel(
    grad_output, value, points, weights, reference, levels, grad_value, grad_points, grad_weights, grad_reference,
    q, s, m, num_levels,
    D: tl.constexpr, P: tl.constexpr, REFERENCE: tl.constexpr, WITH_REFERENCE: tl.constexpr, WIDE: tl.constexpr,
    QUERIES: tl.constexpr, POINTS: tl.constexpr, CHANNELS: tl.constexpr, STAGES: tl.constexpr, EVICT: tl.constexpr,
):  # fmt: skip
    n, head, query = _place(q, m, QUERIES)
    channel = tl.arange(0, CHANNELS)
    mask = query < q
    num = num_levels * P
    value += n * s * m * D + head * D
    grad_value += n * s * m * D + head * D
    grad_output += n * q * m * D + head * D
    points += (n * q * m + head) * num * 2
    grad_points += (n * q * m + head) * num * 2
    weights += (n * q * m + head) * num
    grad_weights += (n * q * m + head) * num
    reference += n * q * num_levels * REFERENCE
    grad_reference += (n * q * m + head) * num_levels * REFERENCE
    if WIDE:
        query = query.to(tl.int64)
    base = query * (m * num)
    top, inverse = tl.zeros((QUERIES,), dtype=tl.float32), tl.zeros((QUERIES,), dtype=tl.float32)
    if REFERENCE:
        top, inverse = _logits_of(weights, base, mask, num_levels, P, POINTS)
    of_output = (query * (m * D))[:, None] + channel[None, :]
    grad = tl.load(grad_output + of_output, mask=mask[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
    grad = grad[:, None, :]
    mean = tl.zeros((QUERIES, POINTS), dtype=tl.float32)
    for level in tl.range(0, num_levels, num_stages=STAGES):
        height, width, start, scale_x, offset_x, scale_y, offset_y = _level(
            levels, reference, query, mask, level, num_levels, P, REFERENCE
        )
        sum_x, sum_y = tl.zeros_like(mean), tl.zeros_like(mean)
        sum_w, sum_h = tl.zeros_like(mean), tl.zeros_like(mean)
        for first in tl.range(0, P, POINTS, num_stages=STAGES):
            there, i = _places(base, mask, level, first, P, POINTS)
            in_x, in_y, x, fx, y, fy = _points(points, i, there, width, height, scale_x, offset_x, scale_y, offset_y)
            weight = _weight(weights, i, there, top, inverse, REFERENCE)
            grad_weight, grad_x, grad_y = _point_gradients(
                value, grad_value, grad, x, fx, y, fy, weight,
                width, height, start, there, channel, m * D, D, WIDE, EVICT,
            )  # fmt: skip
            mean += weight * grad_weight
            tl.store(grad_weights + i, grad_weight, mask=there)
            tl.store(grad_points + 2 * i, (grad_x * scale_x).to(grad_points.dtype.element_ty), mask=there)
            tl.store(grad_points + 2 * i + 1, (grad_y * scale_y).to(grad_points.dtype.element_ty), mask=there)
            if WITH_REFERENCE:
                sum_x += grad_x
                sum_y += grad_y
                sum_w += grad_x * in_x
                sum_h += grad_y * in_y
        if WITH_REFERENCE:
            to = (query * (m * num_levels) + level) * REFERENCE
            wide, high = width.to(tl.float32), height.to(tl.float32)
            tl.store(grad_reference + to, tl.sum(sum_x, 1) * wide, mask=mask)
            tl.store(grad_reference + to + 1, tl.sum(sum_y, 1) * high, mask=mask)
            if REFERENCE == 4:
                tl.store(grad_reference + to + 2, tl.sum(sum_w, 1) * wide * (0.5 / P), mask=mask)
                tl.store(grad_reference + to + 3, tl.sum(sum_h, 1) * high * (0.5 / P), mask=mask)
    if REFERENCE:
        _through_softmax(weights, grad_weights, base, mask, top, inverse, mean, num_levels, P, POINTS)

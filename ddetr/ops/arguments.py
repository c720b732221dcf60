"""The one check of the operator's arguments, for the public functions and for the operator itself.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

SpatialShapes = Sequence[tuple[int, int]]


def flat_shapes(spatial_shapes: SpatialShapes) -> list[int]:
    """[h0, w0, h1, w1, ...] as the operator's schema takes them.

    Raises:
        ValueError: it is a tensor, or not pairs.
    """
    if isinstance(spatial_shapes, Tensor):
        raise ValueError("spatial_shapes must be a list of (H, W) Python ints, got a tensor: pass shapes.tolist()")
    try:
        return [size for h, w in spatial_shapes for size in (h, w)]
    except (TypeError, ValueError) as error:
        raise ValueError(f"spatial_shapes must be a list of (H, W) Python ints, got {spatial_shapes!r}") from error


def check_arguments(
    value: Tensor, shapes: Sequence[int], points: Tensor, weights: Tensor, reference_points: Tensor | None
) -> None:
    """Shapes, dtypes and devices; without `reference_points`, `points` and `weights` are locations and weights.

    Raises:
        ValueError: expected and got, before anything runs.
    """
    described = [(tensor.shape, tensor.dtype, tensor.device) for tensor in (value, points, weights)]
    described.append(
        None if reference_points is None else (reference_points.shape, reference_points.dtype, reference_points.device)
    )
    if torch.compiler.is_compiling():  # symbolic sizes: the operator checks the real ones when it runs
        _check(*described, len(shapes) // 2)
    else:
        _check_once(*described, len(shapes) // 2)
        check_cells(value.shape[1], shapes)


def check_cells(s: int, shapes: Sequence[int]) -> None:
    """The sizes of the levels are positive and add up to S."""
    if _num_cells(tuple(shapes)) != s:
        pairs = list(zip(shapes[::2], shapes[1::2]))
        cells = sum(h * w for h, w in pairs)
        raise ValueError(f"spatial_shapes {pairs} hold {cells} cells, but value has S={s}")


@functools.lru_cache(maxsize=256)
def _num_cells(shapes: tuple[int, ...]) -> int:
    """Cells of all levels; -1 where a size is not positive."""
    return -1 if any(size < 1 for size in shapes) else sum(h * w for h, w in zip(shapes[::2], shapes[1::2]))


_Description = tuple[torch.Size, torch.dtype, torch.device]


def _check(
    value: _Description, points: _Description, weights: _Description, reference: _Description | None, num_levels: int
) -> None:
    name, weights_name = ("sampling_locations", "attention_weights")
    if reference is not None:
        name, weights_name = ("sampling_offsets", "attention_logits")
    value_shape, points_shape, weights_shape = value[0], points[0], weights[0]
    if len(value_shape) != 4:
        raise ValueError(f"value must be (N, S, M, D), got {tuple(value_shape)}")
    n, _, m, _ = value_shape
    if len(points_shape) != 6 or points_shape[-1] != 2:
        raise ValueError(f"{name} must be (N, Q, M, L, P, 2), got {tuple(points_shape)}")
    if points_shape[0] != n or points_shape[2] != m or points_shape[3] != num_levels:
        raise ValueError(
            f"{name} must be (N, Q, M, L, P, 2) with N={n}, M={m}, L={num_levels} as in value and spatial_shapes, "
            f"got {tuple(points_shape)}"
        )
    if weights_shape != points_shape[:-1]:
        raise ValueError(f"{weights_name} must be {tuple(points_shape[:-1])} as {name}, got {tuple(weights_shape)}")
    tensors = [("value", value), (name, points), (weights_name, weights)]
    if reference is not None:
        shape, expected = reference[0], (n, points_shape[1], num_levels)
        if len(shape) != 4 or shape[:3] != expected or shape[3] not in (2, 4):
            raise ValueError(
                f"reference_points must be (N, Q, L, 2 or 4) = ({n}, {points_shape[1]}, {num_levels}, 2 or 4), "
                f"got {tuple(shape)}"
            )
        tensors.append(("reference_points", reference))
    for tensor_name, (_, dtype, device) in tensors:
        if device != value[2]:
            raise ValueError(f"value is on {value[2]} but {tensor_name} on {device}: move them together")
        if not dtype.is_floating_point:
            raise ValueError(f"{tensor_name} must be floating point, got {dtype}")


# A check takes as long as a launch, and what it passed it passes again; an error is not kept.
_check_once = functools.lru_cache(maxsize=256)(_check)

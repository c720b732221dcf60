"""The one check of the operator's arguments, for the public functions and for the operator itself.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

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
    name, weights_name = ("sampling_locations", "attention_weights")
    if reference_points is not None:
        name, weights_name = ("sampling_offsets", "attention_logits")
    if value.dim() != 4:
        raise ValueError(f"value must be (N, S, M, D), got {tuple(value.shape)}")
    n, s, m, _ = value.shape
    num_levels = len(shapes) // 2
    if points.dim() != 6 or points.shape[-1] != 2:
        raise ValueError(f"{name} must be (N, Q, M, L, P, 2), got {tuple(points.shape)}")
    if points.shape[0] != n or points.shape[2] != m or points.shape[3] != num_levels:
        raise ValueError(
            f"{name} must be (N, Q, M, L, P, 2) with N={n}, M={m}, L={num_levels} as in value and spatial_shapes, "
            f"got {tuple(points.shape)}"
        )
    if weights.shape != points.shape[:-1]:
        raise ValueError(f"{weights_name} must be {tuple(points.shape[:-1])} as {name}, got {tuple(weights.shape)}")
    tensors = [("value", value), (name, points), (weights_name, weights)]
    if reference_points is not None:
        expected = (n, points.shape[1], num_levels)
        if (
            reference_points.dim() != 4
            or reference_points.shape[:3] != expected
            or reference_points.shape[3] not in (2, 4)
        ):
            raise ValueError(
                f"reference_points must be (N, Q, L, 2 or 4) = ({n}, {points.shape[1]}, {num_levels}, 2 or 4), "
                f"got {tuple(reference_points.shape)}"
            )
        tensors.append(("reference_points", reference_points))
    for tensor_name, tensor in tensors:
        if tensor.device != value.device:
            raise ValueError(f"value is on {value.device} but {tensor_name} on {tensor.device}: move them together")
        if not tensor.is_floating_point():
            raise ValueError(f"{tensor_name} must be floating point, got {tensor.dtype}")
    if not torch.compiler.is_compiling():  # symbolic sizes: the operator checks the real ones when it runs
        check_cells(s, shapes)


def check_cells(s: int, shapes: Sequence[int]) -> None:
    """The sizes of the levels are positive and add up to S."""
    pairs = list(zip(shapes[::2], shapes[1::2]))
    cells = sum(h * w for h, w in pairs)
    if cells != s or any(size < 1 for size in shapes):
        raise ValueError(f"spatial_shapes {pairs} hold {cells} cells, but value has S={s}")

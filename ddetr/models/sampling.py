"""What deformable attention looks at, recorded while a model runs: for pictures and for finding faults.

Shapes: N batch, Q queries (of the encoder: all cells), M heads, L levels, P points.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from ddetr.models.attention import MSDeformAttn

__all__ = ["Sampling", "record_sampling"]


@dataclass(frozen=True)
class Sampling:
    """One call of an attention module; tensors float32 or wider, detached, on the model's device."""

    module: str  # its name in the model, for instance transformer.decoder.layers.0.cross_attn
    spatial_shapes: tuple[tuple[int, int], ...]  # (H, W) of each level
    reference_points: Tensor  # (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (cx, cy, w, h), in [0, 1] of the padded level
    locations: Tensor  # (N, Q, M, L, P, 2) as (x, y) in [0, 1] of the padded level, also outside
    weights: Tensor  # (N, Q, M, L, P), 1 in sum over L and P


@contextmanager
def record_sampling(model: nn.Module) -> Iterator[list[Sampling]]:
    """Inside the block each forward pass of `model` appends its attention calls to the list, in the order of the
    layers.

        with record_sampling(model) as calls, torch.no_grad():
            outputs = model(images)

    The outputs are the same as without. All calls of all passes are kept: those of the encoder have a query a cell.
    A compiled model records nothing; use the one that it was compiled from.
    """
    calls: list[Sampling] = []
    hooks = [
        module.register_forward_pre_hook(partial(_record, calls, name), with_kwargs=True)
        for name, module in model.named_modules()
        if isinstance(module, MSDeformAttn)
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def _record(
    calls: list[Sampling], name: str, module: MSDeformAttn, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    call = signature(module.forward).bind(*args, **kwargs).arguments
    shapes = tuple((h, w) for h, w in call["spatial_shapes"])
    locations, weights = module.sampling(call["query"], call["reference_points"], shapes)
    calls.append(Sampling(name, shapes, call["reference_points"].detach(), locations, weights))

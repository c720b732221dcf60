"""The inputs that the operator is timed on: attention layers of the encoder and the decoder, by name.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, Q queries, L levels, P points.
"""

import fnmatch
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddetr.errors import InputError
from ddetr.ops.corners import corners_of
from ddetr.ops.reference import sampling_locations_reference
from ddetr.wording import did_you_mean

STRIDES = (8, 16, 32, 64)
_MARGIN = 0.05  # of a cell


class Size(NamedTuple):
    """An attention layer's inputs; `queries` 0 = one for each cell, as in the encoder."""

    batch: int
    shapes: list[tuple[int, int]]
    queries: int = 0
    heads: int = 8
    head_size: int = 32
    points: int = 4

    @property
    def cells(self) -> int:
        """S."""
        return sum(h * w for h, w in self.shapes)

    @property
    def num_queries(self) -> int:
        """Q."""
        return self.queries or self.cells


class Inputs(NamedTuple):
    """What the linear layers of an attention layer give to the operator."""

    value: Tensor  # (N, S, M, D)
    offsets: Tensor  # (N, Q, M, L, P, 2) in cells
    logits: Tensor  # (N, Q, M, L, P)
    references: Tensor  # (N, Q, L, 2), float32


def pyramid(height: int, width: int, strides: Sequence[int] = STRIDES) -> list[tuple[int, int]]:
    """(H, W) of the feature levels of an image."""
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in strides]


SIZES = {
    f"{kind}-{height}x{width}-b{batch}": Size(batch, pyramid(height, width), queries)
    for kind, queries in (("encoder", 0), ("decoder", 300))
    for height, width in ((480, 640), (800, 1066), (800, 1333))
    for batch in (1, 4)
}
SIZES["encoder-demo"] = Size(8, pyramid(160, 160, STRIDES[:3]), head_size=16)
SIZES["decoder-demo"] = Size(8, pyramid(160, 160, STRIDES[:3]), 30, head_size=16)
SIZES["tiny"] = Size(2, [(6, 8), (3, 4)], 10, 2, 8, 2)  # a look at the command, and its tests

# About three minutes on a CPU core; a GPU takes all but the tiny one.
CPU_DEFAULT = "encoder-480x640-b1,encoder-800x1066-b1,decoder-480x640-b1,decoder-800x*,*-demo"
CUDA_DEFAULT = "encoder-*,decoder-*"


def chosen_sizes(patterns: str) -> dict[str, Size]:
    """The sizes that a list such as "decoder-demo,encoder-*-b1" names, in their own order; "none" is none.

    Raises:
        InputError: a name or pattern fits none.
    """
    wanted: set[str] = set()
    for pattern in (part.strip() for part in patterns.split(",")):
        found = set() if pattern == "none" else set(fnmatch.filter(SIZES, pattern))
        if not found and pattern != "none":
            hint = did_you_mean(pattern, SIZES)
            raise InputError(f"--sizes: no size is called {pattern!r}{hint}: expected some of {', '.join(SIZES)}, none")
        wanted |= found
    return {name: size for name, size in SIZES.items() if name in wanted}


def make_inputs(size: Size, device: torch.device, dtype: torch.dtype = torch.float32) -> Inputs:
    """Random values and logits; offsets as at initialisation, 1 to 4 cells outward in a head's direction, plus noise.

    No point lies near the border between cells, where the gradients by the offsets jump and implementations that round
    differently could not be compared.
    """
    generator = torch.Generator().manual_seed(0)
    num_levels, queries = len(size.shapes), size.num_queries
    angles = torch.arange(size.heads) * 2 * math.pi / size.heads
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = (
        1 + torch.arange(size.points).view(size.points, 1) % 4
    )  # more would lie outside the small levels, and be free
    noise = torch.randn(size.batch, queries, size.heads, num_levels, size.points, 2, generator=generator)
    offsets = directions.view(size.heads, 1, 1, 2) * steps + noise * 0.5
    centres = torch.rand(queries, 2, generator=generator) if size.queries else _cell_centres(size.shapes)
    references = centres[None, :, None].repeat(size.batch, 1, num_levels, 1)
    cells = torch.tensor([(w, h) for h, w in size.shapes], dtype=torch.float32)
    pixels = references[:, :, None, :, None] * cells[:, None] - 0.5 + offsets
    offsets += _MARGIN - 2 * _MARGIN * (pixels - pixels.floor())
    value = torch.randn(size.batch, size.cells, size.heads, size.head_size, generator=generator)
    logits = torch.randn(offsets.shape[:-1], generator=generator)
    rounded = (tensor.to(device=device, dtype=dtype) for tensor in (value, offsets, logits))
    return Inputs(*rounded, references.to(device))


def compulsory_bytes(size: Size, inputs: Inputs) -> tuple[int, int]:
    """What must cross the memory if nothing does so twice: of a forward, and of a forward and its backward.

    The forward reads its inputs, of the values those that are sampled, and writes the output; the backward reads the
    same and the gradient of the output, and writes the gradients of value, offsets and logits.
    """
    value, offsets, logits, references = (tensor.numel() * tensor.element_size() for tensor in inputs)
    n, _, m, d = inputs.value.shape
    output = n * inputs.offsets.shape[1] * m * d * inputs.value.element_size()
    sampled = num_sampled_rows(size, inputs) * d * inputs.value.element_size()
    forward = sampled + offsets + logits + references + output
    return forward, 2 * forward + value + offsets + logits


def num_sampled_rows(size: Size, inputs: Inputs) -> int:
    """How many of the N*S*M rows of values lie around some point: few queries do not read a large image."""
    count = 0
    heads = torch.arange(size.heads, device=inputs.value.device).view(-1, 1, 1, 1)
    for offsets, references in zip(inputs.offsets, inputs.references):
        locations = sampling_locations_reference(offsets[None], references[None], size.shapes)
        rows, coefficients = corners_of(size.shapes, locations)
        sampled = torch.zeros(size.cells, size.heads, dtype=torch.bool, device=offsets.device)
        inside = coefficients > 0
        sampled[rows[inside], heads.expand_as(rows)[inside]] = True
        count += int(sampled.sum())
    return count


def _cell_centres(shapes: list[tuple[int, int]]) -> Tensor:
    """(S, 2) as (x, y)."""
    centres = []
    for h, w in shapes:
        y, x = torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
        centres.append(torch.stack([x, y], -1).flatten(0, 1))
    return torch.cat(centres)

"""timm's Hiera (arXiv:2306.00989) at any image size: its own module is made for one.

Shapes: N batch, h and w mask units (of 8 x 8 tokens, 32 x 32 pixels), C channels.
"""

import torch.nn.functional as F
from torch import Tensor, nn

NUM_POOLS = 3  # each by 2 a side: from the 8 of a mask unit to 1


def hiera_maps(hiera: nn.Module, images: Tensor, stages: list[int]) -> list[Tensor]:
    """The maps of some stages.

    Args:
        hiera: timm's `Hiera`.
        images: (N, 3, 32 h, 32 w).
        stages: of 0 to 3, whose maps have strides 4 to 32.

    Returns:
        for each stage (N, C, 8 h, 8 w) to (N, C, h, w).
    """
    height, width = (size // 32 for size in images.shape[-2:])
    tokens = hiera.patch_embed(images)  # (N, 64 h w, C), row by row
    tokens = tokens + _positions(hiera, 8 * height, 8 * width)
    # Units of 8 are 2 x 2 x 2 a side. Attention and pooling take the place in a unit, from the finest part of it to the
    # coarsest, before the unit.
    tokens = tokens.unflatten(1, (height, 2, 2, 2, width, 2, 2, 2))
    tokens = tokens.permute(0, 4, 8, 3, 7, 2, 6, 1, 5, 9).flatten(1, 8)
    maps = []
    for number, block in enumerate(hiera.blocks):
        tokens = block(tokens)
        if number in hiera.stage_ends:
            stage = hiera.stage_ends.index(number)
            if stage in stages:
                maps.append(_in_rows(tokens, NUM_POOLS - stage, height, width))
    return maps


def _positions(hiera: nn.Module, height: int, width: int) -> Tensor:
    """(1, height * width, C) for the tokens of stride 4."""
    if hiera.pos_embed_win is not None:  # arXiv:2311.05613: of the image, interpolated, and of a window, repeated
        window = hiera.pos_embed_win.tile(height // 8, width // 8)
        return (_resized(hiera.pos_embed, height, width) + window).flatten(2).mT
    rows, columns = hiera.tokens_spatial_shape
    if (rows, columns) == (height, width):
        return hiera.pos_embed
    return _resized(hiera.pos_embed.mT.unflatten(2, (rows, columns)), height, width).flatten(2).mT


def _resized(grid: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(grid, size=(height, width), mode="bicubic", antialias=True)


def _in_rows(tokens: Tensor, num_pairs: int, height: int, width: int) -> Tensor:
    """(N, 4**num_pairs * h * w, C) -> (N, C, 2**num_pairs * h, 2**num_pairs * w)."""
    tokens = tokens.unflatten(1, (*(2, 2) * num_pairs, height, width))
    rows = [2 * num_pairs + 1, *range(2 * num_pairs - 1, 0, -2)]
    columns = [2 * num_pairs + 2, *range(2 * num_pairs, 0, -2)]
    maps = tokens.permute(0, tokens.ndim - 1, *rows, *columns)
    side = 2**num_pairs
    return maps.reshape(*maps.shape[:2], side * height, side * width)

"""Plain vision transformers of timm (ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP, MAE, EVA, EVA-02) at any image size, and
their attention in windows as in ViTDet (arXiv:2203.16527, sec. 3).

Every one gets patches of 16 pixels, whatever it was trained with, since the pyramid's strides are 4, 8, 16 and 32. Its
patch embedding is resampled for that (FlexiViT, arXiv:2212.08013: a patch that is enlarged gives the same token); the
grid of its position embeddings is kept. Resizing the images instead would cost a pass over them, and their detail.

Shapes: N batch, h and w patches of the image, P class and register tokens, C channels, s tokens a side of a window.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH = 16
NUM_GLOBAL = 4  # blocks that see the whole image where the others see windows; the paper's


def patch_arguments(name: str) -> dict[str, Any]:
    """The arguments of timm's function that make the patches of a model 16 pixels, at its grid of patches."""
    import timm

    with torch.device("meta"):
        patches = timm.create_model(name).patch_embed
    if tuple(patches.patch_size) == (PATCH, PATCH):
        return {}
    return {"patch_size": PATCH, "img_size": tuple(PATCH * cells for cells in patches.grid_size)}


def last_map(vit: nn.Module, images: Tensor, window: int | None) -> Tensor:
    """The tokens of the patches after the last block and its norm.

    Args:
        vit: timm's `VisionTransformer` or `Eva`, for images of any size.
        images: (N, 3, 16 h, 16 w).
        window: s, blocks but for `NUM_GLOBAL` attend inside windows of s x s tokens; None for all of them everywhere.

    Returns:
        (N, C, h, w).
    """
    patches = vit.patch_embed(images)  # (N, h, w, C)
    height, width = patches.shape[1:3]
    embedded = vit._pos_embed(patches)
    tokens, rope = embedded if isinstance(embedded, tuple) else (embedded, None)  # EVA's come with rotations
    tokens = vit.norm_pre(tokens)  # (N, P + h*w, C)
    num_prefix = tokens.shape[1] - height * width
    for is_global, first, blocks in _parts(vit.blocks, window):
        windows = None if is_global else _Windows(window, num_prefix, height, width)
        if windows is not None:
            tokens = windows.split(tokens)
        for number, block in enumerate(blocks, first):
            tokens = _run(block, tokens, _rotation(vit, rope, number), windows)
        if windows is not None:
            tokens = windows.join(tokens)
    patches = vit.norm(tokens)[:, num_prefix:]
    return patches.unflatten(1, (height, width)).permute(0, 3, 1, 2)


def _parts(blocks: nn.ModuleList, window: int | None) -> Iterator[tuple[bool, int, list[nn.Module]]]:
    """Runs of blocks of one kind: (whether they see the whole image, the number of the first, they themselves). The
    global ones are the last of each quarter."""
    depth = len(blocks)
    ends = {depth * (quarter + 1) // NUM_GLOBAL - 1 for quarter in range(NUM_GLOBAL)}
    if window is None:
        yield True, 0, list(blocks)
        return
    first = 0
    for end in sorted(ends):
        if end > first:
            yield False, first, list(blocks[first:end])
        yield True, end, [blocks[end]]
        first = end + 1


def _rotation(vit: nn.Module, rope: Tensor | None, number: int) -> Tensor | None:
    """Of a block: (h*w, D), or (heads, h*w, D) where each block has learned its own."""
    return rope[number] if rope is not None and getattr(vit, "rope_mixed", False) else rope


def _run(block: nn.Module, tokens: Tensor, rope: Tensor | None, windows: "_Windows | None") -> Tensor:
    arguments = {}
    if rope is not None:
        arguments["rope"] = rope if windows is None else windows.split_rotation(rope, len(tokens))
    if windows is not None and windows.is_padded:
        arguments["attn_mask"] = windows.mask(tokens)
    return block(tokens, **arguments)


class _Windows:
    """Tokens of an image to those of its windows, and back. The windows at the right and at the bottom are filled up
    with tokens that no other attends to."""

    def __init__(self, size: int, num_prefix: int, height: int, width: int):
        self.size, self.num_prefix, self.height, self.width = size, num_prefix, height, width
        self.rows, self.columns = -(-height // size), -(-width // size)
        self.is_padded = (self.rows * size, self.columns * size) != (height, width)

    def split(self, tokens: Tensor) -> Tensor:
        """(N, P + h*w, C) -> (N * windows, P + s*s, C); each window has the class and register tokens."""
        prefix, patches = tokens[:, : self.num_prefix], tokens[:, self.num_prefix :]
        patches = self._split(patches)
        prefix = prefix.repeat_interleave(self.rows * self.columns, 0)
        return torch.cat((prefix, patches), 1)

    def join(self, tokens: Tensor) -> Tensor:
        """The reverse; class and register tokens are the mean of those of the windows."""
        windows = self.rows * self.columns
        prefix = tokens[:, : self.num_prefix].unflatten(0, (-1, windows)).mean(1)
        patches = tokens[:, self.num_prefix :].reshape(
            len(prefix), self.rows, self.columns, self.size, self.size, tokens.shape[-1]
        )
        patches = patches.transpose(2, 3).flatten(3, 4).flatten(1, 2)  # (N, rows * s, columns * s, C)
        return torch.cat((prefix, patches[:, : self.height, : self.width].flatten(1, 2)), 1)

    def split_rotation(self, rope: Tensor, num_windows: int) -> Tensor:
        """(h*w, D) or (heads, h*w, D) -> (N * windows, 1 or heads, s*s, D)."""
        heads = rope.reshape(-1, *rope.shape[-2:])
        split = self._split(heads).unflatten(0, (len(heads), -1)).transpose(0, 1)
        return split.repeat(num_windows // len(split), 1, 1, 1)

    def mask(self, tokens: Tensor) -> Tensor:
        """(N * windows, 1, 1, P + s*s) bool, True for the tokens that there are."""
        there = self._split(torch.ones(1, self.height * self.width, 1, device=tokens.device))[..., 0] > 0
        there = F.pad(there, (self.num_prefix, 0), value=True)
        return there.repeat(len(tokens) // len(there), 1)[:, None, None]

    def _split(self, patches: Tensor) -> Tensor:
        """(N, h*w, C) -> (N * windows, s*s, C)."""
        grid = patches.unflatten(1, (self.height, self.width))
        more = (0, 0, 0, self.columns * self.size - self.width, 0, self.rows * self.size - self.height)
        grid = F.pad(grid, more).unflatten(2, (self.columns, self.size)).unflatten(1, (self.rows, self.size))
        return grid.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (N, rows, columns, s*s, C) before the last step

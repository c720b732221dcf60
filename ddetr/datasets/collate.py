"""Samples in, one padded batch out.

Shapes: N images, H and W the largest height and width among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def collate(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Pads right and bottom with 0, no size divisor (facts.md, 6).

    samples: (image (3, h, w) of one dtype, target) pairs. Returns images (N, 3, H, W), mask (N, H, W) bool with
    True = padding, and the targets as a list. uint8 images stay uint8: `normalize_images(images, mask)` makes of them
    what normalising before padding would have made.
    """
    images = [image for image, _ in samples]
    height = max(image.shape[1] for image in images)
    width = max(image.shape[2] for image in images)
    batch = images[0].new_zeros(len(images), 3, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool)
    for i, image in enumerate(images):
        h, w = image.shape[1:]
        batch[i, :, :h, :w] = image
        mask[i, :h, :w] = False
    return batch, mask, [target for _, target in samples]

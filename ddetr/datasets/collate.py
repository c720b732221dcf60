"""Samples in, one padded batch out.

Shapes: N images, H and W the largest height and width among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from ddetr.padding import pad_images


def collate(
    samples: Sequence[tuple[Tensor, dict[str, Any]]], shapes: Sequence[tuple[int, int]] = ()
) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Pads right and bottom with 0, no size divisor, as the official code; to the smallest of `shapes` (H, W) where
    some are given.

    samples: (image (3, h, w) of one dtype, target) pairs. Returns images (N, 3, H, W), mask (N, H, W) bool with
    True = padding, and the targets as a list. uint8 images stay uint8: `normalize_images(images, mask)` makes of them
    what normalising before padding would have made.
    """
    images, mask = pad_images([image for image, _ in samples], shapes)
    return images, mask, [target for _, target in samples]

"""Images of different sizes into one batch with a padding mask: the one place that pads."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_images(images: Sequence[Tensor], shapes: Sequence[tuple[int, int]] = ()) -> tuple[Tensor, Tensor]:
    """Pad each image with zeros at the right and the bottom to the largest height and width of the batch.

    Args:
        images: N tensors (C, h, w) of one dtype and device; h and w may differ.
        shapes: (H, W) to choose from: the smallest that holds the batch is padded to, and the largest sides of the
            batch only where none does. By default always those.

    Returns:
        images (N, C, H, W), channels-last in memory where the first image is, and mask (N, H, W), bool, True where
        padded.
    """
    if not images:
        raise ValueError("expected at least one image, got an empty list")
    height, width = padded_hw([(image.shape[-2], image.shape[-1]) for image in images], shapes)
    first, channels = images[0], images[0].shape[0]
    if first.stride(0) == 1:  # interleaved, as decoders give them: seven times as fast to copy as into planes
        batch = first.new_empty(len(images), height, width, channels).permute(0, 3, 1, 2)
    else:
        batch = first.new_empty(len(images), channels, height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=first.device)
    for image, slot, slot_mask in zip(images, batch, mask):
        h, w = image.shape[-2:]
        slot[:, :h, :w].copy_(image)
        slot[:, :h, w:] = 0
        slot[:, h:] = 0
        slot_mask[:h, :w] = False
    return batch, mask


def padded_hw(sizes_hw: Sequence[tuple[int, int]], shapes: Sequence[tuple[int, int]] = ()) -> tuple[int, int]:
    """(H, W) that `pad_images` gives a batch of images of these (h, w)."""
    height, width = max(h for h, _ in sizes_hw), max(w for _, w in sizes_hw)
    fitting = [(h, w) for h, w in shapes if h >= height and w >= width]
    return min(fitting, key=lambda shape: shape[0] * shape[1], default=(height, width))

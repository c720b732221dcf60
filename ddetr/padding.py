"""Images of different sizes into one batch with a padding mask: the one place that pads."""

from collections.abc import Sequence

import torch
from torch import Tensor


def pad_images(images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad each image with zeros at the right and the bottom to the largest height and width of the batch.

    Args:
        images: N tensors (C, h, w) of one dtype and device; h and w may differ.

    Returns:
        images (N, C, H, W) and mask (N, H, W), bool, True where padded.
    """
    if not images:
        raise ValueError("expected at least one image, got an empty list")
    height = max(image.shape[-2] for image in images)
    width = max(image.shape[-1] for image in images)
    batch = images[0].new_zeros(len(images), images[0].shape[0], height, width)
    mask = torch.ones(len(images), height, width, dtype=torch.bool, device=images[0].device)
    for image, slot, slot_mask in zip(images, batch, mask):
        h, w = image.shape[-2:]
        slot[:, :h, :w].copy_(image)
        slot_mask[:h, :w] = False
    return batch, mask

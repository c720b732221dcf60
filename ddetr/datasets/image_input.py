"""What people pass as an image, to upright 8-bit RGB: the decode policy of images.py, for arrays and tensors too."""

from __future__ import annotations

from os import PathLike

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ddetr.datasets.images import read_image, rgb_from_pillow
from ddetr.errors import InputError

__all__ = ["ImageInput", "as_rgb"]

ImageInput = str | PathLike | Image.Image | np.ndarray | Tensor


def as_rgb(image: ImageInput) -> Tensor:
    """(3, h, w) uint8 RGB, upright, on the CPU.

    Args:
        image: a path; a Pillow image; a numpy array uint8 (h, w, 3) RGB, (h, w) grey or (h, w, 4) RGBA; a tensor uint8
            or float in [0, 1], (3, h, w) RGB or (1, h, w) grey.
    """
    if isinstance(image, (str, PathLike)):
        return read_image(image)
    if isinstance(image, Image.Image):
        return rgb_from_pillow(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Tensor):
        return _from_tensor(image)
    wanted = "a path, a Pillow image, a numpy array or a torch tensor"
    raise InputError(f"expected an image as {wanted}, got {type(image).__name__}")


def _from_array(image: np.ndarray) -> Tensor:
    wanted = "expected an array uint8 (h, w, 3) RGB, (h, w) grey or (h, w, 4) RGBA"
    got = f"got {image.dtype} {image.shape}"
    channels = image.shape[2] if image.ndim == 3 else 1
    if image.ndim == 3 and image.shape[0] == 3 and channels not in (1, 3, 4):
        raise InputError(f"{wanted}, {got}: move the channels to the end, image.transpose(1, 2, 0)")
    if image.ndim == 4:
        raise InputError(f"{wanted}, {got}: pass several images as a list, list(images)")
    if image.ndim not in (2, 3) or channels not in (1, 3, 4) or 0 in image.shape:
        raise InputError(f"{wanted}, {got}")
    if image.dtype != np.uint8:
        raise InputError(f"{wanted}, {got}: scale it to 0..255 and convert it, image.astype(numpy.uint8)")
    return rgb_from_pillow(Image.fromarray(image[:, :, 0] if image.ndim == 3 and channels == 1 else image))


def _from_tensor(image: Tensor) -> Tensor:
    wanted = "expected a tensor uint8 or float in [0, 1], (3, h, w) RGB or (1, h, w) grey"
    got = f"got {image.dtype} {tuple(image.shape)}"
    if image.ndim == 4:
        raise InputError(f"{wanted}, {got}: pass several images as a list, list(images)")
    if image.ndim == 3 and image.shape[2] in (1, 3) and image.shape[0] not in (1, 3):
        raise InputError(f"{wanted}, {got}: move the channels to the front, image.permute(2, 0, 1)")
    if image.ndim != 3 or image.shape[0] not in (1, 3) or 0 in image.shape:
        raise InputError(f"{wanted}, {got}")
    image = image.detach().cpu()
    if image.is_floating_point():
        low, high = image.min().item(), image.max().item()
        if not (low >= -1e-3 and high <= 1 + 1e-3):  # written so that NaN is refused as well
            raise InputError(f"{wanted}, got values in [{low:.4g}, {high:.4g}]: pass it before normalisation")
        image = (image.float().clamp(0, 1) * 255).round().to(torch.uint8)
    elif image.dtype != torch.uint8:
        raise InputError(f"{wanted}, {got}")
    return image.expand(3, -1, -1).contiguous()

"""Augmentation recipes: (image, target) to (image, target), on uint8 tensors, with torchvision's v2 functions.

`official`: the recipe of the published results (facts.md, 6), exactly; `plain`: flip and resize; `none`: resize.
Every length is the paper's at `image_size=800` and scales with it, so that `image_size=160` is the same recipe on
images a fifth the size. Randomness is drawn from PyTorch's generator alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ddetr.datasets.annotations import did_you_mean
from ddetr.errors import InputError

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RECIPES = ("official", "plain", "none")
PAPER_SIZE = 800
PAPER_SCALES = tuple(range(480, 801, 32))
PAPER_MAX_SIZE = 1333
PAPER_CROP_SCALES = (400, 500, 600)
PAPER_CROP_RANGE = (384, 600)

Sample = tuple[tv_tensors.Image, dict[str, Any]]


def build_transform(recipe: str = "official", *, train: bool, image_size: int = PAPER_SIZE) -> v2.Transform:
    """The transform of a recipe by name; without `train` all three resize and nothing else.

    Args:
        recipe: "official", "plain" (flip, resize) or "none" (resize).
        train: whether to augment.
        image_size: short side in pixels that the paper's 800 becomes; the long side's limit, the list of scales and
            the crops follow in proportion.
    """
    if recipe not in RECIPES:
        raise InputError(
            f"The augmentation is one of {', '.join(RECIPES)}, not {recipe!r}.{did_you_mean(recipe, RECIPES)}"
        )
    if image_size < 16:
        raise InputError(f"image_size is the short side in pixels, 16 or more, not {image_size}.")
    max_size = scaled(PAPER_MAX_SIZE, image_size)
    if not train or recipe == "none":
        return official_eval(image_size, max_size)
    if recipe == "plain":
        return v2.Compose([v2.RandomHorizontalFlip(0.5), ResizeShortSide((image_size,), max_size)])
    return official_train(
        scales=tuple(scaled(size, image_size) for size in PAPER_SCALES),
        max_size=max_size,
        crop_scales=tuple(scaled(size, image_size) for size in PAPER_CROP_SCALES),
        crop_range=(scaled(PAPER_CROP_RANGE[0], image_size), scaled(PAPER_CROP_RANGE[1], image_size)),
    )


def official_train(
    scales: Sequence[int] = PAPER_SCALES,
    max_size: int = PAPER_MAX_SIZE,
    crop_scales: Sequence[int] = PAPER_CROP_SCALES,
    crop_range: tuple[int, int] = PAPER_CROP_RANGE,
) -> v2.Transform:
    """Flip; then, one time in two each, resize, or resize, crop and resize."""
    cropped = v2.Compose([ResizeShortSide(crop_scales), RandomSizeCrop(*crop_range), ResizeShortSide(scales, max_size)])
    return v2.Compose([v2.RandomHorizontalFlip(0.5), RandomSelect(ResizeShortSide(scales, max_size), cropped)])


def official_eval(size: int = PAPER_SIZE, max_size: int = PAPER_MAX_SIZE) -> v2.Transform:
    return ResizeShortSide((size,), max_size)


def scaled(length: int, image_size: int) -> int:
    """A length of the paper's recipe where its 800 pixels are `image_size`."""
    return max(1, round(length * image_size / PAPER_SIZE))


def resized_hw(size_hw: tuple[int, int], short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """The official size arithmetic, to the pixel: short side to `short_side`, less where the long one would pass
    `max_size`; the long side is rounded down."""
    height, width = size_hw
    short, long = float(min(size_hw)), float(max(size_hw))
    if max_size is not None and long / short * short_side > max_size:
        short_side = int(round(max_size * short / long))
    if min(size_hw) == short_side:
        return height, width
    if width < height:
        return int(short_side * height / width), short_side
    return short_side, int(short_side * width / height)


def worst_padded_hw(image_size: int = PAPER_SIZE) -> tuple[int, int]:
    """(H, W) of the largest batch that a recipe can make: the long side both ways, as when an image that lies meets one
    that stands. (An image thinner than 1:4 passes its limit by the few pixels that the official rounding adds.)"""
    longest = scaled(PAPER_MAX_SIZE, image_size)
    return longest, longest


# (H, W) by name: S the short side, M a 4:3 photograph's long one, L the limit of the long side; t S is a small scale.
# The first holds everything; each further one saves the most padding of COCO's images, given those before it.
_SHAPE_RATIOS = {"S": 1.0, "M": 4 / 3, "L": PAPER_MAX_SIZE / PAPER_SIZE}
_SHAPE_ORDER = ("LL", "SL", "LS", "MM", "SM", "MS", "SS")
MAX_PADDED_SHAPES = len(_SHAPE_ORDER)


def padded_shapes(image_size: int = PAPER_SIZE, count: int = 3) -> list[tuple[int, int]]:
    """At most `count` shapes (H, W), multiples of 32, of which one holds any batch of a recipe; the worst comes first."""
    if not 1 <= count <= MAX_PADDED_SHAPES:
        raise InputError(f"padded_shapes must lie in 1 to {MAX_PADDED_SHAPES}, got {count}")
    sides = {name: math.ceil(round(ratio * image_size) / 32) * 32 for name, ratio in _SHAPE_RATIOS.items()}
    return list(dict.fromkeys((sides[height], sides[width]) for height, width in _SHAPE_ORDER[:count]))


class ResizeShortSide(v2.Transform):
    """Resizes to a short side drawn from `short_sides` with the long side at most `max_size`; bilinear, antialiased.

    `area` is scaled with the image.
    """

    def __init__(self, short_sides: Sequence[int], max_size: int | None = None) -> None:
        super().__init__()
        self.short_sides = tuple(short_sides)
        self.max_size = max_size

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        old_hw = (image.shape[-2], image.shape[-1])
        short_side = self.short_sides[_randint(0, len(self.short_sides) - 1)]
        new_hw = resized_hw(old_hw, short_side, self.max_size)
        if new_hw == old_hw:
            return image, target
        image = F.resize(image, list(new_hw), interpolation=v2.InterpolationMode.BILINEAR, antialias=True)
        scale = (new_hw[0] / old_hw[0]) * (new_hw[1] / old_hw[1])
        return image, {**target, "boxes": F.resize(target["boxes"], list(new_hw)), "area": target["area"] * scale}


class RandomSizeCrop(v2.Transform):
    """Crops to a height and a width drawn from `min_size` to `max_size` each, at a random place.

    An object stays as long as any of its area does (the official recipe has no visibility threshold); its `area`
    becomes its box's.
    """

    def __init__(self, min_size: int, max_size: int) -> None:
        super().__init__()
        self.min_size = min_size
        self.max_size = max_size

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        full_height, full_width = image.shape[-2:]
        # an image smaller than the smallest crop, which the paper's sizes never meet, is kept whole on that side
        width = _randint(min(self.min_size, full_width), min(self.max_size, full_width))
        height = _randint(min(self.min_size, full_height), min(self.max_size, full_height))
        top = _randint(0, full_height - height)
        left = _randint(0, full_width - width)
        return crop(image, target, top, left, height, width)


class RandomSelect(v2.Transform):
    """`first` with probability `p`, else `second`."""

    def __init__(self, first: v2.Transform, second: v2.Transform, p: float = 0.5) -> None:
        super().__init__()
        self.first = first
        self.second = second
        self.p = p

    def forward(self, image: tv_tensors.Image, target: dict[str, Any]) -> Sample:
        chosen = self.first if torch.rand(()).item() < self.p else self.second
        return chosen(image, target)


def crop(image: tv_tensors.Image, target: dict[str, Any], top: int, left: int, height: int, width: int) -> Sample:
    """The window of image and target; objects with nothing in it go, everything that runs along with boxes too."""
    image = F.crop(image, top, left, height, width)
    corners = target["boxes"].as_subclass(Tensor) - torch.tensor([left, top, left, top])
    corners = corners.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    keep = (corners[:, 2:] > corners[:, :2]).all(dim=1)
    corners = corners[keep]
    boxes = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    along = {name: target[name][keep] for name in ("labels", "iscrowd") if name in target}
    return image, {**target, **along, "boxes": boxes, "area": (corners[:, 2:] - corners[:, :2]).prod(dim=1)}


def normalize_images(images: Tensor, mask: Tensor | None = None) -> Tensor:
    """uint8 (..., 3, H, W) to float32 with ImageNet's mean and deviation, on the images' own device.

    mask: (..., H, W) bool, True = padding, which becomes 0 as if padding had come after normalising.
    """
    mean = torch.tensor(IMAGENET_MEAN, device=images.device).view(3, 1, 1) * 255
    deviation = torch.tensor(IMAGENET_STD, device=images.device).view(3, 1, 1) * 255
    normalized = (images.to(torch.float32) - mean) / deviation
    return normalized if mask is None else normalized.masked_fill_(mask.unsqueeze(-3), 0.0)


def _randint(low: int, high: int) -> int:
    """Uniform over low..high, both included."""
    return int(torch.randint(low, high + 1, ()).item())

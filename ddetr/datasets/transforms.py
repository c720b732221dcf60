"""Augmentation recipes: (image, target) to (image, target), on uint8 tensors.

`official`: the recipe of the published results, exactly; `plain`: flip and resize; `none`: resize.
Every length is the paper's at `image_size=800` and scales with it, so that `image_size=160` is the same recipe on
images a fifth the size. Randomness is drawn from PyTorch's generator alone.

A recipe first draws a `View`, from the image's size alone, and then makes it. Sizes, boxes and areas are those of the
steps one after another (flip, resize, crop, resize); the pixels are resampled once, from the window of the original.
That is half of the work, and sharper: where the steps would resample twice, 8-bit values differ by 2 in the mean on
photographs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.runtime.transfer import sent
from ddetr.wording import did_you_mean

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

RECIPES = ("official", "plain", "none")
PAPER_SIZE = 800
PAPER_SCALES = tuple(range(480, 801, 32))
PAPER_MAX_SIZE = 1333
PAPER_CROP_SCALES = (400, 500, 600)
PAPER_CROP_RANGE = (384, 600)

_EXTRA_OUTPUTS = 8  # a side, to choose from: see whole_pixels

Sample = tuple[Tensor, dict[str, Any]]


class Crop(NamedTuple):
    """A window, in pixels of the image after it was resized to `of_hw`."""

    of_hw: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


class View(NamedTuple):
    """What a recipe does to one image: flips it or not, takes a window or not, and makes (h, w) = `out_hw` of it."""

    flip: bool
    crop: Crop | None
    out_hw: tuple[int, int]


@dataclass(frozen=True)
class Recipe:
    """Flip; then either resize, or resize, crop and resize. `recipe(image, target)` draws a view and makes it.

    image: (3, h, w) uint8. target: `boxes` (n, 4) xyxy in pixels, `area` (n,), and what runs along with them: `labels`,
    `iscrowd`. An object stays as long as any of its area does (the official recipe has no visibility threshold); the
    crop makes its `area` its box's, and a resize scales it.
    """

    short_sides: tuple[int, ...]
    """Short side in pixels, one of them by chance."""
    max_size: int | None = None
    """Limit of the long side."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    crop: float = 0.0
    """Probability of resizing to one of `crop_short_sides` and cropping, before."""
    crop_short_sides: tuple[int, ...] = ()
    """Without a limit of the long side."""
    crop_range: tuple[int, int] = (1, 1)
    """Least and largest height and width of the window."""

    def draw(self, size_hw: tuple[int, int], generator: torch.Generator | None = None) -> View:
        """A view of an image of this (h, w); from PyTorch's own generator if none is given."""
        flip, plain, crop_side, width, height, top, left, side = torch.rand(
            8, generator=generator
        ).tolist()  # in [0, 1)
        crop = None
        if plain >= 1 - self.crop:
            full_height, full_width = of_hw = resized_hw(size_hw, _one_of(self.crop_short_sides, crop_side))
            low, high = self.crop_range
            # an image smaller than the smallest crop, which the paper's sizes never meet, is kept whole on that side
            width = _between(min(low, full_width), min(high, full_width), width)
            height = _between(min(low, full_height), min(high, full_height), height)
            top, left = _between(0, full_height - height, top), _between(0, full_width - width, left)
            crop, size_hw = Crop(of_hw, top, left, height, width), (height, width)
        return View(flip < self.flip, crop, resized_hw(size_hw, _one_of(self.short_sides, side), self.max_size))

    def __call__(self, image: Tensor, target: dict[str, Any]) -> Sample:
        return apply_view(image, target, self.draw((image.shape[-2], image.shape[-1])))


def apply_view(image: Tensor, target: dict[str, Any], view: View) -> Sample:
    """A sample as a view shows it."""
    boxes, area = (target[name].as_subclass(Tensor).numpy() for name in ("boxes", "area"))
    boxes, area, keep = view_of_objects(boxes, area, view, (image.shape[-2], image.shape[-1]))
    target = dict(target)
    if keep is not None:
        kept = torch.from_numpy(keep)
        target.update({name: target[name][kept] for name in ("labels", "iscrowd") if name in target})
    target["boxes"] = tv_tensors.BoundingBoxes(torch.from_numpy(boxes), format="XYXY", canvas_size=view.out_hw)
    return view_of_image(image, view), {**target, "area": torch.from_numpy(area)}


def view_of_image(image: Tensor, view: View) -> Tensor:
    """(3, h, w) uint8 -> (3, *view.out_hw), bilinear with antialiasing; of the memory format of `image`."""
    image = image.as_subclass(Tensor)
    full_height, full_width = image.shape[-2:]
    rows, columns = Span(0, full_height, 0, view.out_hw[0]), Span(0, full_width, 0, view.out_hw[1])
    if view.crop is not None:
        _, top, left, height, width = view.crop
        scale_y, scale_x = full_height / view.crop.of_hw[0], full_width / view.crop.of_hw[1]
        rows = whole_pixels(top * scale_y, height * scale_y, view.out_hw[0], full_height)
        columns = whole_pixels(left * scale_x, width * scale_x, view.out_hw[1], full_width)
    if view.flip:  # the view is of the flipped image
        window = image[:, rows.start : rows.stop, full_width - columns.stop : full_width - columns.start].flip(-1)
    else:
        window = image[:, rows.start : rows.stop, columns.start : columns.stop]
        if image.stride(0) == 1:  # torchvision resizes interleaved pixels twice as fast, if there are no gaps
            window = window.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    size = [rows.num_outputs, columns.num_outputs]
    resized = F.resize_image(window, size, interpolation=InterpolationMode.BILINEAR, antialias=True)
    (height, width), top, left = view.out_hw, rows.before, columns.before
    return resized[:, top : top + height, left : left + width]


def view_of_objects(
    boxes_xyxy: np.ndarray, area: np.ndarray, view: View, size_hw: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Boxes (n, 4) and areas (n,) in an image of (h, w), as the recipe's steps change them one after another; and the
    mask of the objects that a crop kept, None without one.

    In numpy: these are a dozen small operations, each of which costs PyTorch five times as much.
    """
    boxes, keep = boxes_xyxy, None
    if view.flip:
        boxes = np.array([size_hw[1], 0, size_hw[1], 0], np.float32) + boxes[:, [2, 1, 0, 3]] * _MIRROR
    if view.crop is not None:
        of_hw, top, left, height, width = view.crop
        if of_hw != size_hw:
            boxes = boxes * _scale(size_hw, of_hw)
        boxes = np.maximum(boxes - np.array([left, top, left, top], np.float32), np.float32(0))
        boxes = np.minimum(boxes, np.array([width, height, width, height], np.float32))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes = boxes[keep]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        size_hw = (height, width)
    if view.out_hw != size_hw:
        boxes = boxes * _scale(size_hw, view.out_hw)
        area = area * np.float32((view.out_hw[0] / size_hw[0]) * (view.out_hw[1] / size_hw[1]))
    return boxes, area, keep


def _between(low: int, high: int, chance: float) -> int:
    """One of low..high, both included; chance is uniform in [0, 1)."""
    return low + int(chance * (high - low + 1))


def _one_of(lengths: Sequence[int], chance: float) -> int:
    return lengths[_between(0, len(lengths) - 1, chance)]


class Span(NamedTuple):
    """Pixels start..stop - 1 of a row or a column, to be resized to `num_outputs`, of which the first `before` and what
    comes after the wanted ones are thrown away."""

    start: int
    stop: int
    before: int
    num_outputs: int


def whole_pixels(start: float, length: float, num_outputs: int, limit: int) -> Span:
    """The window start..start + length of `limit` pixels, as whole pixels: it is made larger by as many outputs (0 to
    8) as bring each border nearest to a border between pixels, and moved there: by at most half a pixel, in the mean by
    0.07."""
    step, stop = length / num_outputs, start + length

    def off(position: float) -> float:
        return abs(position - round(position))

    before = min(range(_most(start / step) + 1), key=lambda extra: off(start - extra * step))
    after = min(range(_most((limit - stop) / step) + 1), key=lambda extra: off(stop + extra * step))
    first = min(round(start - before * step), limit - 1)
    last = min(max(round(stop + after * step), first + 1), limit)
    return Span(first, last, before, before + num_outputs + after)


def _most(outputs: float) -> int:
    return max(0, min(_EXTRA_OUTPUTS, math.floor(outputs)))


_MIRROR = np.array([-1, 1, -1, 1], np.float32)


def _scale(old_hw: tuple[int, int], new_hw: tuple[int, int]) -> np.ndarray:
    """(4,) factors of xyxy."""
    y, x = new_hw[0] / old_hw[0], new_hw[1] / old_hw[1]
    return np.array([x, y, x, y], np.float32)


def build_transform(recipe: str = "official", *, train: bool, image_size: int = PAPER_SIZE) -> Recipe:
    """The transform of a recipe by name; without `train` all three resize and nothing else.

    Args:
        recipe: "official", "plain" (flip, resize) or "none" (resize).
        train: whether to augment.
        image_size: short side in pixels that the paper's 800 becomes; the long side's limit, the list of scales and
            the crops follow in proportion.
    """
    if recipe not in RECIPES:
        raise InputError(
            f"the augmentation is one of {', '.join(RECIPES)}, not {recipe!r}{did_you_mean(recipe, RECIPES)}"
        )
    if image_size < 16:
        raise InputError(f"image_size is the short side in pixels, 16 or more, not {image_size}")
    max_size = scaled(PAPER_MAX_SIZE, image_size)
    if not train or recipe == "none":
        return official_eval(image_size, max_size)
    if recipe == "plain":
        return Recipe((image_size,), max_size, flip=0.5)
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
) -> Recipe:
    """Flip; then, one time in two each, resize, or resize, crop and resize."""
    return Recipe(
        tuple(scales), max_size, flip=0.5, crop=0.5, crop_short_sides=tuple(crop_scales), crop_range=crop_range
    )


def official_eval(size: int = PAPER_SIZE, max_size: int = PAPER_MAX_SIZE) -> Recipe:
    return Recipe((size,), max_size)


def scaled(length: int, image_size: int) -> int:
    """A length of the paper's recipe where its 800 pixels are `image_size`."""
    return max(1, round(length * image_size / PAPER_SIZE))


def resized_hw(size_hw: tuple[int, int], short_side: int, max_size: int | None = None) -> tuple[int, int]:
    """The official size arithmetic, to the pixel: short side to `short_side`, less where the long one would pass
    `max_size`; the long side is rounded down. Beyond it, of an image so thin that nothing would be left a strip of one
    pixel stays, no longer than `max_size`."""
    height, width = size_hw
    short, long = float(min(size_hw)), float(max(size_hw))
    if max_size is not None and long / short * short_side > max_size:
        short_side = int(round(max_size * short / long))
        if short_side <= 1:
            return (1, max_size) if height < width else (max_size, 1)
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


# (H, W) for the paper's size. The first holds everything; after the two oblong ones each further shape saves the most
# padding of COCO's images, in micro-batches of 2 and 4, given those before it.
_SHAPES = (
    (1333, 1333), (800, 1216), (1216, 800), (768, 896), (832, 1024), (672, 768),
    (960, 768), (800, 1333), (1088, 1120), (640, 960), (864, 672), (704, 1088),
)  # fmt: skip
MAX_PADDED_SHAPES = len(_SHAPES)


def padded_shapes(image_size: int = PAPER_SIZE, count: int = MAX_PADDED_SHAPES) -> list[tuple[int, int]]:
    """At most `count` shapes (H, W), multiples of 32, of which one holds any batch of a recipe; that one comes
    first."""
    if not 1 <= count <= MAX_PADDED_SHAPES:
        raise InputError(f"padded_shapes must lie in 1 to {MAX_PADDED_SHAPES}, got {count}")
    shapes = [tuple(math.ceil(scaled(side, image_size) / 32) * 32 for side in shape) for shape in _SHAPES[:count]]
    return list(dict.fromkeys(shapes))


def normalize_images(
    images: Tensor,
    mask: Tensor | None = None,
    mean: Sequence[float] = IMAGENET_MEAN,
    std: Sequence[float] = IMAGENET_STD,
) -> Tensor:
    """uint8 (..., 3, H, W) to float32 with a mean and a deviation for each colour, on the images' own device.

    Args:
        mask: (..., H, W) bool, True = padding, which becomes 0 as if padding had come after normalising.
        mean, std: of red, green and blue in [0, 1]; by default ImageNet's.
    """
    mean, deviation = sent((torch.tensor([mean, std]) * 255).view(2, 3, 1, 1), images.device)
    normalized = (images.to(torch.float32) - mean) / deviation
    return normalized if mask is None else normalized.masked_fill_(mask.unsqueeze(-3), 0.0)


def checked_colors(mean: Sequence[float], std: Sequence[float]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Both as tuples of floats; raises `InputError` for what are no three numbers each, or no deviation."""
    try:
        mean, std = tuple(map(float, mean)), tuple(map(float, std))
    except (TypeError, ValueError):
        raise InputError(f"mean and std are three numbers each, got {one_line(mean)} and {one_line(std)}.") from None
    if len(mean) != 3 or len(std) != 3 or not all(map(math.isfinite, mean + std)) or min(std) <= 0:
        raise InputError(f"mean and std are three numbers each, std above 0, got {mean} and {std}.")
    return mean, std

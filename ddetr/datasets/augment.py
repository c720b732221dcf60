"""Strong augmentation: what recipes after the paper's add to it, each by an option of its own, all off by default.

mosaic        four images around a point: the image and three others, cut where they meet
scale_jitter  large-scale jitter: the image becomes 0.1 to 2 times as large, and is cut or has a margin
mixup         another image shines through, at about a half
color_jitter  brightness, contrast, saturation and hue
blur          a Gaussian one

Every sample keeps the size that the recipe (transforms.py) draws for its image: what a batch needs of memory and
padding, and which images are similar, is the same with and without. A mosaic or a jittered scale stands in the place of
the recipe's crop; they are not used together, since a mosaic makes its images half as large already.

Objects follow the recipe's rule: one that is cut stays as long as any of its area does, and its `area` is then its
box's. All numbers are drawn from PyTorch's generator after those of the recipe, and always as many of them: what one
option does to a sample does not depend on the others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from ddetr.datasets.config import DataConfig
from ddetr.datasets.transforms import IMAGENET_MEAN, PAPER_SIZE, Crop, Sample, View, apply_view

FILL = tuple(round(255 * mean) for mean in IMAGENET_MEAN)  # where no image is: 0 when normalised, as padding is

MOSAIC_CENTRE = (0.3, 0.7)  # shares of height and width
MIXUP_RATIO = (0.45, 0.55)  # share of the image itself; DEIM's
BRIGHTNESS, CONTRAST, SATURATION = (0.875, 1.125), (0.5, 1.5), (0.5, 1.5)  # factors, of SSD's distortion, as is the hue
HUE = (-0.05, 0.05)  # turns of the colour circle
BLUR_SIGMA = (0.1, 2.0)  # pixels at image_size 800

_RECIPE_WORDS = {
    "official": "the paper's flips, scales and crops",
    "plain": "flips",
    "none": "resizing alone",
}
_OBJECTS = ("boxes", "labels", "area", "iscrowd")


class Partner(NamedTuple):
    """Another image of the data set, and whether it is flipped."""

    index: int
    flip: bool


class Plan(NamedTuple):
    """What is done to one sample. Places are shares, in [0, 1], of the room that there is."""

    mosaic: tuple[float, float] | None
    """y and x of the point where the four images meet, as shares of height and width."""
    scale: tuple[float, float, float] | None
    """Factor; y and x of the place."""
    mixup: tuple[float, float, float] | None
    """Share of the image itself; y and x of the other one's place."""
    partners: tuple[Partner, ...]
    """The images that are needed beside the sample's own: three for a mosaic, then one for mixup."""
    colors: tuple[float, float, float, float] | None
    """Factors of brightness, contrast and saturation; turns of the hue."""
    sigma: float | None
    """Of the blur, in pixels."""


class Place(NamedTuple):
    """Which part of an image is seen, and where its top left corner comes, in pixels of the result."""

    view: View
    top: int
    left: int


@dataclass(frozen=True)
class Augmentation:
    """The options as probabilities, and their ranges."""

    mosaic: float = 0.0
    mixup: float = 0.0
    scale_jitter: float = 0.0
    scale_range: tuple[float, float] = (0.1, 2.0)
    color_jitter: float = 0.0
    blur: float = 0.0
    sigma_range: tuple[float, float] = BLUR_SIGMA

    @classmethod
    def of(cls, data: DataConfig) -> Augmentation | None:
        """None where all is off."""
        if not any((data.mosaic, data.mixup, data.scale_jitter, data.color_jitter, data.blur)):
            return None
        low, high = (sigma * data.image_size / PAPER_SIZE for sigma in BLUR_SIGMA)
        return cls(
            mosaic=data.mosaic,
            mixup=data.mixup,
            scale_jitter=data.scale_jitter,
            scale_range=(data.scale_jitter_low, data.scale_jitter_high),
            color_jitter=data.color_jitter,
            blur=data.blur,
            sigma_range=(low, high),
        )

    @property
    def most_images(self) -> int:
        """Of how many images a sample may be made."""
        return (4 if self.mosaic else 1) + (1 if self.mixup else 0)

    def draw(self, index: int, num_images: int, flip: float, generator: torch.Generator | None = None) -> Plan:
        """What is done to image `index` of `num_images`; flip: probability that another image is flipped. From
        PyTorch's own generator if none is given."""
        chances = iter(torch.rand(26, generator=generator).tolist())  # in [0, 1)

        def happens(probability: float) -> bool:
            return next(chances) < probability

        def between(low_high: tuple[float, float]) -> float:
            low, high = low_high
            return low + next(chances) * (high - low)

        def partner() -> Partner:  # never the image itself, where there is another
            other = index + 1 + int(next(chances) * max(1, num_images - 1))
            return Partner(other % num_images, happens(flip))

        mosaic, centre = happens(self.mosaic), (between(MOSAIC_CENTRE), between(MOSAIC_CENTRE))
        partners = [partner() for _ in range(3)]
        jitter, scale = happens(self.scale_jitter), (between(self.scale_range), next(chances), next(chances))
        mixup, mixed = happens(self.mixup), (between(MIXUP_RATIO), next(chances), next(chances))
        partners.append(partner())
        distort = happens(self.color_jitter)
        colors = (between(BRIGHTNESS), between(CONTRAST), between(SATURATION), between(HUE))
        blur, sigma = happens(self.blur), between(self.sigma_range)
        return Plan(
            mosaic=centre if mosaic else None,
            scale=scale if jitter and not mosaic else None,
            mixup=mixed if mixup else None,
            partners=tuple(partners[0 if mosaic else 3 : 4 if mixup else 3]),
            colors=colors if distort else None,
            sigma=sigma if blur else None,
        )


def describe(data: DataConfig, epochs: int | None = None) -> str:
    """The augmentation of a run in words, for people; epochs: that the run has."""
    likely = {
        "mosaics of four images": data.mosaic,
        f"scales of {data.scale_jitter_low:g} to {data.scale_jitter_high:g}": data.scale_jitter,
        "mixup": data.mixup,
        "colours": data.color_jitter,
        "blur": data.blur,
    }
    parts = [f"{what} ({chance:.0%})" for what, chance in likely.items() if chance]
    said = f"augmentation: {_RECIPE_WORDS[data.augmentation]}"
    if not parts:
        return said
    said = f"{said}; {', '.join(parts)}"
    off = data.augmentation_off_epochs
    if not off:
        return f"{said}; in all epochs"
    if epochs is not None and off >= epochs:
        return f"{said}; never on: --data.augmentation_off_epochs is {off}, and the run's epochs are {epochs}"
    return f"{said}; these are off in the last {f'{off} epochs' if off > 1 else 'epoch'}"


def make(plan: Plan, view: View, own: Sample, others: Sequence[Sample]) -> Sample:
    """The sample that a plan and a recipe's view give.

    Args:
        own: the image (3, h, w) uint8 and its target with `boxes` (n, 4) xyxy in pixels, `labels`, `area` and
            `iscrowd` (n,).
        others: those of `plan.partners`.

    Returns:
        (3, *view.out_hw) uint8 and the target with the objects of all images that are seen.
    """
    size_hw = view.out_hw
    if plan.mosaic is not None:
        flips = [view.flip, *(partner.flip for partner in plan.partners)][:4]
        images = [own, *others][:4]
        places = mosaic_places([_size_hw(image) for image, _ in images], flips, plan.mosaic, size_hw)
        image, target = _laid_out(images, places, size_hw)
    elif plan.scale is not None:
        place = free_place(_size_hw(own[0]), view.flip, plan.scale, size_hw)
        image, target = _laid_out([own], [place], size_hw)
    else:
        image, target = apply_view(*own, view)
    if plan.mixup is not None:
        ratio, *where = plan.mixup
        place = free_place(_size_hw(others[-1][0]), plan.partners[-1].flip, (1.0, *where), size_hw)
        other, other_target = _laid_out([others[-1]], [place], size_hw)
        image, target = blended(image, other, ratio), _joined([target, other_target])
    return recolored(image, plan.colors, plan.sigma), target


def scaled_hw(size_hw: tuple[int, int], scale: float) -> tuple[int, int]:
    return max(1, round(size_hw[0] * scale)), max(1, round(size_hw[1] * scale))


def seen_through(
    of_hw: tuple[int, int], flip: bool, top_left: tuple[int, int], window: tuple[int, int, int, int]
) -> Place | None:
    """What is seen of an image that is resized to (h, w) = `of_hw` and has its corner at `top_left`, through a window
    (top, left, bottom, right) of the result; None for nothing."""
    (height, width), (image_top, image_left) = of_hw, top_left
    top, left = max(image_top, window[0]), max(image_left, window[1])
    bottom, right = min(image_top + height, window[2]), min(image_left + width, window[3])
    if bottom <= top or right <= left:
        return None
    seen_hw = (bottom - top, right - left)
    crop = None if seen_hw == of_hw else Crop(of_hw, top - image_top, left - image_left, *seen_hw)
    return Place(View(flip, crop, seen_hw), top, left)


def mosaic_places(
    sizes_hw: Sequence[tuple[int, int]], flips: Sequence[bool], centre: tuple[float, float], out_hw: tuple[int, int]
) -> list[Place | None]:
    """Four images with a corner each at the centre: top left, top right, bottom left, bottom right. Each is as large as
    its part of the result, in pixels of area: one of another shape is cut at one side and leaves a margin at the
    other, half as much as if it had to fill the part or to fit in whole."""
    (height, width), y, x = out_hw, round(centre[0] * out_hw[0]), round(centre[1] * out_hw[1])
    windows = [(0, 0, y, x), (0, x, y, width), (y, 0, height, x), (y, x, height, width)]
    places = []
    for number, (size_hw, flip, window) in enumerate(zip(sizes_hw, flips, windows, strict=True)):
        top, left, bottom, right = window
        scale = math.sqrt((bottom - top) * (right - left) / (size_hw[0] * size_hw[1]))
        of_hw = scaled_hw(size_hw, scale)
        corner = (bottom - of_hw[0] if number < 2 else top, right - of_hw[1] if number % 2 == 0 else left)
        places.append(seen_through(of_hw, flip, corner, window))
    return places


def free_place(
    size_hw: tuple[int, int], flip: bool, scale: tuple[float, float, float], out_hw: tuple[int, int]
) -> Place | None:
    """An image `factor` times as large as the result allows, anywhere in it; or any window of it where it is larger.

    scale: factor; y and x of the place, as shares of the room.
    """
    factor, y, x = scale
    of_hw = scaled_hw(size_hw, factor * min(out_hw[0] / size_hw[0], out_hw[1] / size_hw[1]))
    top_left = round(y * (out_hw[0] - of_hw[0])), round(x * (out_hw[1] - of_hw[1]))
    return seen_through(of_hw, flip, top_left, (0, 0, *out_hw))


def blended(image: Tensor, other: Tensor, ratio: float) -> Tensor:
    """ratio * image + (1 - ratio) * other, uint8."""
    mixed = image.to(torch.float32).mul_(ratio).add_(other, alpha=1 - ratio)
    return mixed.round_().to(torch.uint8)


def recolored(image: Tensor, colors: tuple[float, float, float, float] | None, sigma: float | None) -> Tensor:
    """(3, h, w) uint8 with other colours, then blurred; both are optional. In Pillow, whose matrix takes a third and
    whose blur takes half of the time of PyTorch's convolutions."""
    if colors is None and sigma is None:
        return image
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    if colors is not None:
        grey = float(np.asarray(picture, np.uint8)[::4, ::4].mean())  # what contrast turns about
        picture = picture.convert("RGB", tuple(color_matrix(*colors, grey).ravel().tolist()))
    if sigma is not None:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


_LUMA = np.array([0.299, 0.587, 0.114])
_TO_YIQ = np.array([_LUMA, [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
_FROM_YIQ = np.linalg.inv(_TO_YIQ)


def color_matrix(brightness: float, contrast: float, saturation: float, hue: float, grey: float) -> np.ndarray:
    """(3, 4): what makes new red, green and blue of the old and of 1. The hue turns about grey, in YIQ: there it is a
    rotation, so that all four are one matrix.

    grey: the value in 0..255 that contrast leaves where it is.
    """
    cosine, sine = math.cos(2 * math.pi * hue), math.sin(2 * math.pi * hue)
    chroma = saturation * np.array([[cosine, -sine], [sine, cosine]])
    turned = np.eye(3)
    turned[1:, 1:] = chroma
    matrix = brightness * contrast * _FROM_YIQ @ turned @ _TO_YIQ
    return np.column_stack([matrix, np.full(3, brightness * (1 - contrast) * grey)])


def _size_hw(image: Tensor) -> tuple[int, int]:
    return image.shape[-2], image.shape[-1]


def _laid_out(images: Sequence[Sample], places: Sequence[Place | None], out_hw: tuple[int, int]) -> Sample:
    """Images in their places, on a plain ground."""
    canvas = torch.empty((*out_hw, 3), dtype=torch.uint8)
    canvas[:] = torch.tensor(FILL, dtype=torch.uint8)
    canvas, targets = canvas.permute(2, 0, 1), []
    for sample, place in zip(images, places, strict=True):
        if place is None:
            continue
        image, target = apply_view(*sample, place.view)
        height, width = _size_hw(image)
        canvas[:, place.top : place.top + height, place.left : place.left + width] = image
        shift = torch.tensor([place.left, place.top, place.left, place.top], dtype=torch.float32)
        targets.append({**target, "boxes": target["boxes"].as_subclass(Tensor) + shift})
    return canvas, _joined(targets)


def _joined(targets: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([target[name].as_subclass(Tensor) for target in targets]) for name in _OBJECTS}

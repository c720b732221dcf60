"""Images of one or two splits in a row, and which of them a person should see: rare classes, small objects, crowds,
images without objects, and some at random.

I images, n objects. Everything comes from flat arrays; no file is opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ddetr.datasets.annotations import Annotations, ImageRecord, ImageTable
from ddetr.datasets.transforms import PAPER_MAX_SIZE, scaled
from ddetr.evaluation.overlaps import Objects

RARE, SMALL, CROWDED, EMPTY, RANDOM = GROUPS = (
    "Rarest classes",
    "Smallest objects",
    "Most objects",
    "Without objects",
    "At random",
)


@dataclass(frozen=True)
class Pool:
    """The images of `splits`, one split after another."""

    splits: tuple[Annotations, ...]
    starts: np.ndarray  # (number of splits + 1,) position of each split's first image
    sizes_hw: np.ndarray  # (I, 2) pixels
    objects: Objects  # n of them; `image` is a position in this row
    sides: np.ndarray  # (n,) root of the box's area, in pixels of the image
    trained_sides: np.ndarray  # (n,) the same where the image is resized as it is without augmentation

    @classmethod
    def of(cls, splits: Sequence[Annotations], image_size: int) -> Pool:
        """image_size: short side in pixels in training."""
        tables = [ImageTable.from_records(split.images) for split in splits]
        starts = np.concatenate([[0], np.cumsum([len(table) for table in tables])]).astype(np.int64)
        sizes_hw = np.concatenate([np.zeros((0, 2), np.int32), *(table.sizes_hw for table in tables)])
        counts = np.concatenate([np.zeros(0, np.int64), *(np.diff(table.offsets) for table in tables)])
        objects = Objects(
            np.repeat(np.arange(len(counts)), counts),
            *(
                np.concatenate([getattr(table, name) for table in tables])
                for name in ("boxes_xyxy", "labels", "area", "ignore")
            ),
        )
        sides = np.sqrt((objects.boxes_xyxy[:, 2:] - objects.boxes_xyxy[:, :2]).prod(axis=1))
        scales = trained_scales(sizes_hw, image_size)
        return cls(tuple(splits), starts, sizes_hw, objects, sides, sides * scales[objects.image])

    def split_of(self, image: int) -> Annotations:
        """The split of the image at this position."""
        return self.splits[int(np.searchsorted(self.starts, image, side="right")) - 1]

    def record(self, image: int) -> ImageRecord:
        """The image at this position, its arrays as views."""
        place = int(np.searchsorted(self.starts, image, side="right")) - 1
        return self.splits[place].images[image - int(self.starts[place])]

    @property
    def per_image(self) -> np.ndarray:
        """(I,) objects of each image; ignored ones are none."""
        return np.bincount(self.objects.image[~self.objects.ignore], minlength=len(self.sizes_hw))


class Choice(NamedTuple):
    """An image to be shown, and why."""

    image: int  # its position in the pool
    group: str  # one of GROUPS
    label: int | None = None  # the rare class
    object: int | None = None  # of the pool: the small one


def trained_scales(sizes_hw: np.ndarray, image_size: int) -> np.ndarray:
    """(I,) factors from the image to its size in training, without augmentation, but for the rounding."""
    sizes = np.maximum(sizes_hw, 1)
    return np.minimum(image_size / sizes.min(axis=1), scaled(PAPER_MAX_SIZE, image_size) / sizes.max(axis=1))


def choose(pool: Pool, num_images: int, seed: int) -> list[Choice]:
    """At most `num_images` images, none twice, in the order of GROUPS; the same for the same seed.

    A third goes to the rarest classes, a sixth to the smallest objects, one to the crowd, up to two to images without
    objects; the others are taken at random. Of each class in turn, the rarest first, an image is taken unless one was
    before.
    """
    generator = np.random.default_rng(seed)
    objects, per_image = pool.objects, pool.per_image
    counted = ~objects.ignore
    chosen: dict[int, Choice] = {}

    def take(images: np.ndarray, group: str, label: int | None = None, object: int | None = None) -> bool:
        free = [image for image in images.tolist() if image not in chosen]
        if not free or len(chosen) >= num_images:
            return False
        image = free[int(generator.integers(len(free)))]
        chosen[image] = Choice(image, group, label, object)
        return True

    left = -(-num_images // 3)
    counts = np.bincount(objects.labels[counted])
    shown = np.zeros(len(counts), bool)
    for label in np.lexsort((np.arange(len(counts)), counts)).tolist():
        if not left or not counts[label] or shown[label]:
            continue
        if take(np.unique(objects.image[counted & (objects.labels == label)]), RARE, label):
            left -= 1
            shown[objects.labels[counted & (objects.image == next(reversed(chosen)))]] = True
    left = -(-num_images // 6)
    smallest_first = np.argsort(np.where(counted, pool.trained_sides, np.inf), kind="stable")[: int(counted.sum())]
    for object in smallest_first.tolist():
        if not left or len(chosen) >= num_images:
            break
        left -= take(objects.image[object : object + 1], SMALL, object=object)
    if per_image.any():
        take(np.argsort(-per_image, kind="stable")[:1], CROWDED)
    for _ in range(min(2, -(-num_images // 12))):
        take(np.flatnonzero(np.bincount(objects.image, minlength=len(per_image)) == 0), EMPTY)
    rest = generator.permutation(len(per_image))
    for image in rest[: num_images + len(chosen)].tolist():
        take(np.array([image]), RANDOM)
    return sorted(chosen.values(), key=lambda choice: GROUPS.index(choice.group))

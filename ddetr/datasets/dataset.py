"""Annotations in, samples out: the map-style data set that a DataLoader reads.

Shapes: n objects of an image of h x w pixels after the transforms.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ddetr.boxes import relative_boxes
from ddetr.datasets.annotations import Annotations, Category, ImageRecord, UnreadImage
from ddetr.datasets.augment import Augmentation, make
from ddetr.datasets.config import DataConfig
from ddetr.datasets.images import read_image
from ddetr.datasets.transforms import Recipe, build_transform, normalize_images
from ddetr.errors import InputError

logger = logging.getLogger(__name__)

MOST_STAND_INS = 10  # more that can't be read in a row are no bad luck: the disk is gone, or the path is wrong

OnError = Callable[[str, str], None]  # path, reason
Transform = Callable[[tv_tensors.Image, dict[str, Any]], tuple[Tensor, dict[str, Any]]]


class Turn(NamedTuple):
    """One image's turn in an epoch."""

    index: int
    seed: int
    """Of all randomness of its sample."""
    strong: bool = True
    """Whether it gets mosaic, mixup and what else an `Augmentation` adds to the recipe."""


class DetectionDataset(Dataset):
    """`dataset[i]` is (image, target).

    image: (3, h, w) RGB, float32 normalised with ImageNet's mean and deviation, or uint8 with `normalize=False`
    (then the engine normalises on the device: a quarter of the bytes to move).
    target: `boxes` (n, 4) float32 cxcywh in [0, 1], `labels` (n,) int64, `area` (n,) float32 in pixels of the
    transformed image, `iscrowd` (n,) int64 (zeros), `image_id` () int64, `orig_size` and `size` (2,) int64 (h, w).

    Ignored objects (crowd, difficult) are in no target: training must not learn them, and the evaluator takes its
    ground truth, ignore regions included, from the annotations themselves.

    Args:
        annotations: what a reader returned.
        transform: takes and returns (tv_tensors.Image uint8, dict with `boxes` as tv_tensors.BoundingBoxes XYXY,
            `labels`, `area`, `iscrowd`); any torchvision v2 transform does.
        normalize: float32 normalised images instead of uint8.
        train: kept for whoever holds the data set (samplers, loggers); samples don't depend on it.
        on_error: "raise" stops at a file that can't be read (InputError naming it); "skip" logs it and lets another
            image stand in, chosen by the sample's seed, which is for training only. A function is called with the path
            and the reason instead of the log; with worker processes in the worker.
        augmentation: what is added to a recipe, which `transform` must be. `image_id` and `orig_size` of a sample that
            is made of several images are those of the first; its target has the ids of the others as `other_image_ids`
            (k,) int64.
    """

    def __init__(
        self,
        annotations: Annotations,
        transform: Transform | None = None,
        *,
        normalize: bool = True,
        train: bool = True,
        on_error: str | OnError = "raise",
        augmentation: Augmentation | None = None,
    ) -> None:
        if on_error not in ("raise", "skip") and not callable(on_error):
            raise InputError(f'on_error is "raise", "skip" or a function, not {on_error!r}')
        if on_error != "raise" and not train:
            raise InputError('on_error="skip" swaps images, which would falsify an evaluation; use "raise" there')
        if augmentation is not None and not isinstance(transform, Recipe):
            raise InputError("an augmentation needs a recipe of build_transform as its transform")
        self.annotations = annotations
        self.transform = transform
        self.normalize = normalize
        self.train = train
        self.on_error = on_error
        self.augmentation = augmentation

    @property
    def categories(self) -> tuple[Category, ...]:
        return self.annotations.categories

    def __len__(self) -> int:
        return len(self.annotations.images)

    @property
    def most_objects(self) -> int:
        """More objects than this no sample has; several images of it may be the same one."""
        num_images = 1 if self.augmentation is None else self.augmentation.most_images
        return num_images * max((len(record.labels) for record in self.annotations.images), default=1)

    def __getitem__(self, index: int | tuple[int, int] | Turn) -> tuple[Tensor, dict[str, Tensor]]:
        """index: an int, or (int, seed), or a `Turn`: then all randomness of the transforms comes from the seed alone,
        wherever the sample is loaded, and the caller's random state is left as it was."""
        if isinstance(index, tuple):
            turn = Turn(*index)
            with seeded(turn.seed):
                return self._sample(turn)
        return self._sample(Turn(index, 0))

    def _sample(self, turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        record, pixels = self._read(turn.index, turn.seed)
        if self.augmentation is None or not turn.strong:
            return self.augmented(record, pixels)
        recipe = self.transform
        view = recipe.draw((pixels.shape[1], pixels.shape[2]))
        plan = self.augmentation.draw(turn.index % len(self), len(self), recipe.flip)
        others = [self._read(partner.index, turn.seed) for partner in plan.partners]
        image, target = make(plan, view, _whole(record, pixels), [_whole(*other) for other in others])
        if others:
            target["other_image_ids"] = torch.tensor([other.image_id for other, _ in others])
        return self._finish(record, image, target)

    def _read(self, index: int, seed: int) -> tuple[ImageRecord, Tensor]:
        """Record and pixels of an image, or of the one that stands in for it."""
        if self.on_error == "raise":
            return self._load(self.annotations.images[index])
        record = self.annotations.images[index]
        for attempt in range(1, MOST_STAND_INS + 2):
            try:
                return self._load(record)
            except InputError as error:
                if callable(self.on_error):
                    self.on_error(str(record.path), str(error))
                else:
                    logger.warning("%s; another image stands in for it", error)
            others = sample_seed(seed, attempt, index) % max(1, len(self) - 1)  # never the image itself
            record = self.annotations.images[(index + 1 + others) % len(self)]
        raise InputError(
            f"{MOST_STAND_INS + 1} images of {self.annotations.name} in a row can't be read, the last is "
            f"{record.path}: restore them, or correct the path; `ddetr data audit --decode true` lists all that are "
            "damaged"
        )

    def _load(self, record: ImageRecord) -> tuple[ImageRecord, Tensor]:
        return record, read_image(record.path, record.size_hw)

    def augmented(self, record: ImageRecord, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The sample that the transform makes of an image that was read already; pixels (3, h, w) uint8 of the record's
        `size_hw`."""
        image, target = _whole(record, pixels)
        if self.transform is not None:
            image, target = self.transform(image, target)
        return self._finish(record, image, target)

    def _finish(self, record: ImageRecord, image: Tensor, target: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        target = {**target, "image_id": torch.tensor(record.image_id), "orig_size": torch.tensor(record.size_hw)}
        image = torch.as_tensor(image).as_subclass(Tensor)
        height, width = image.shape[1:]
        lengths = {name: len(target[name]) for name in ("boxes", "labels", "area", "iscrowd")}
        if len(set(lengths.values())) > 1:
            raise InputError(
                f"the transform left {lengths}: all four must keep the same objects; with torchvision's "
                'SanitizeBoundingBoxes, give labels_getter=lambda s: [s[1][k] for k in ("labels", "area", "iscrowd")]'
            )
        boxes_xyxy = target["boxes"].as_subclass(Tensor).to(torch.float32).reshape(-1, 4)
        target["boxes"] = torch.from_numpy(relative_boxes(boxes_xyxy.numpy(), (height, width)))
        target["size"] = torch.tensor([height, width])
        if self.normalize:
            image = normalize_images(image)
        return image, target


def _whole(record: ImageRecord, pixels: Tensor) -> tuple[tv_tensors.Image, dict[str, Any]]:
    """An image with its objects, without those that are ignored, as transforms take it."""
    keep = ~record.ignore
    image = tv_tensors.Image(pixels)
    canvas_size = (image.shape[1], image.shape[2])
    boxes = torch.from_numpy(record.boxes_xyxy[keep])  # indexing with a mask copies: the record stays untouched
    return image, {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=canvas_size),
        "labels": torch.from_numpy(record.labels[keep]),
        "area": torch.from_numpy(record.area[keep]),
        "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
    }


def training_set(annotations: Annotations, data: DataConfig, on_error: str | OnError = "raise") -> DetectionDataset:
    """The samples that training with these settings sees, as uint8 images: `training_set(...)[(index, seed)]` is the
    augmented one of a seed, with boxes cxcywh in [0, 1]; `[Turn(index, seed, strong=False)]` is that of the last
    epochs."""
    return DetectionDataset(
        annotations,
        build_transform(data.augmentation, train=True, image_size=data.image_size),
        normalize=False,
        on_error=on_error,
        augmentation=Augmentation.of(data),
    )


class ReadableImages(Dataset):
    """Images of a data set for evaluation, of which some may turn out to be damaged: `images[i]` is the sample of
    `dataset`, or an `UnreadImage`, for who names those and leaves them out."""

    def __init__(self, dataset: DetectionDataset) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Tensor]] | UnreadImage:
        try:
            return self.dataset[index]
        except InputError as error:
            record = self.dataset.annotations.images[index]
            return UnreadImage(record.image_id, str(record.path), str(error))


def readable(samples: Iterable[Any]) -> tuple[list[Any], list[UnreadImage]]:
    """Some of `ReadableImages`: the samples, and the images that could not be read."""
    samples = list(samples)
    return (
        [sample for sample in samples if not isinstance(sample, UnreadImage)],
        [sample for sample in samples if isinstance(sample, UnreadImage)],
    )


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Within it PyTorch's CPU generator starts from `seed`; afterwards it is as before.

    Not `torch.manual_seed`, which would reseed the GPUs of a training process that loads its samples itself.
    """
    state = torch.get_rng_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.set_rng_state(state)


def sample_seed(seed: int, epoch: int, index: int) -> int:
    """The seed of one sample of one epoch of one run, well mixed: neighbours share no randomness. In [0, 2**63)."""
    return int(np.random.SeedSequence([seed, epoch, index]).generate_state(1, np.uint64)[0] >> np.uint64(1))

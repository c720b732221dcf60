"""The settings of a data set -> its splits, read."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

from ddetr.datasets import Annotations, Category, ImageTable, load_annotations
from ddetr.datasets.config import DataSource, TrainingSource
from ddetr.datasets.load import default_splits
from ddetr.errors import InputError


def load_split(
    data: DataSource,
    which: Literal["train", "val"],
    split: str | None = None,
    categories: Sequence[Category] | None = None,
) -> Annotations:
    """One split: the one called `split`, or the one that the settings name for `which`, or the usual one.

    `categories` are the training set's, on to which the labels are mapped.
    """
    split = split or getattr(data, f"{which}_split")
    annotation_file, image_dir = getattr(data, f"{which}_annotations"), getattr(data, f"{which}_images")
    if split is None:
        split = which if annotation_file else dict(zip(("train", "val"), default_splits(data.path, data.format)))[which]
    if split is None:
        raise InputError(
            f"{data.path} has no validation split of a usual name (val, valid, test, ...): name one by "
            "val_split, or give "
            "its annotation file by val_annotations"
        )
    return load_annotations(
        data.path,
        split,
        format=data.format,
        annotation_file=annotation_file,
        image_dir=image_dir,
        categories=categories,
        boxes=data.boxes,
    )


def load_splits(data: TrainingSource, *, keep_empty: bool = True) -> tuple[Annotations, Annotations]:
    """Training and validation annotations; the labels of both are the training set's.

    keep_empty: whether training images without an object stay.
    """
    train = load_split(data, "train")
    if not keep_empty:
        train = without_empty_images(train)
    return train, load_split(data, "val", categories=train.categories)


def without_empty_images(annotations: Annotations) -> Annotations:
    """The images that have an object to learn from: one that is no ignore region.

    Raises:
        InputError: there is none.
    """
    images = ImageTable.from_records(record for record in annotations.images if not record.ignore.all())
    if not len(images):
        raise InputError(f"{annotations.name}: none of the {len(annotations.images)} images has an object to train on")
    return replace(annotations, images=images)

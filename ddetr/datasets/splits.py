"""The settings of a data set -> its splits, read; where it has no validation split, one is held back from training."""

import hashlib
import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np

from ddetr.datasets import Annotations, Category, Finding, ImageTable, available_splits, load_annotations
from ddetr.datasets.config import DataSource, TrainingSource
from ddetr.datasets.image_files import listed_lines
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.load import (
    FORMATS,
    also_there,
    check_parts,
    default_splits,
    detect_format,
    labels_not_read,
    read_together,
    said_of_not_named,
    same_beside,
)
from ddetr.datasets.readers.reader import WHOLE, layouts_kept, split_kind
from ddetr.datasets.readers.split_lists import lists_beside
from ddetr.datasets.related import copied_from, families
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.printable import one_line
from ddetr.untrusted import MAX_LABEL_BYTES, parse_json, read_text
from ddetr.wording import first_few

logger = logging.getLogger(__name__)

HELD_BACK_FILE = "held_back.json"  # of a run folder: the names of the images that `hold_back` chose


@layouts_kept()
def load_split(
    data: DataSource,
    which: Literal["train", "val"],
    split: str | None = None,
    categories: Sequence[Category] | None = None,
) -> Annotations:
    """One split: the one called `split`, or the one that the settings name for `which`, or the usual one.

    `categories` are the training set's, on to which the labels are mapped.
    """
    data = _settled(data)
    if split is None and data.val_fraction is not None:
        train, val = hold_back(_load(data, "train", None, categories), data)
        return train if which == "train" else val
    return _load(data, which, split, categories)


@layouts_kept()
def load_splits(
    data: TrainingSource, *, keep_empty: bool = True, held_back: Collection[str] | None = None
) -> tuple[Annotations, Annotations | None]:
    """Training and validation annotations; the labels of both are the training set's. The second is None where there
    is no validation split and no `val_fraction`.

    Args:
        keep_empty: whether training images without an object stay.
        held_back: with `val_fraction`, the images that were held back before (see `image_names`).
    """
    was_recognised, data = data.format == "auto", _settled(data)
    train = _load(data, "train", None, None)
    if data.train_annotations is None:
        others = [*left_unread(data, train, was_recognised), *_splits_not_used(data)]
        train = replace(train, findings=(*train.findings, *others))
    if data.val_fraction is not None:
        unused = None if data.train_annotations else _name_of_split(data, "val")
        if unused is not None:
            logger.warning("val_fraction: the validation split %s of %s is not used", unused, data.path)
        train, val = hold_back(train, data, held_back)
    elif _name_of_split(data, "val") is None:
        val = None
        if others := [name for name in available_splits(data.path, data.format) if name != train.split]:
            message = f"None of the other splits ({first_few(others, 8)}) has a usual name: --data.val_split names one."
            found = Finding("no-validation-split", "note", str(data.path), message)
            train = replace(train, findings=(*train.findings, found))
    else:
        val = _load(data, "val", None, train.categories)
    return (train if keep_empty else without_empty_images(train)), val


def left_unread(data: TrainingSource, train: Annotations, was_recognised: bool) -> list[Finding]:
    """Notes on what lies in the data set's folder and may have been meant. was_recognised: whether nobody has named its
    format."""
    found = _other_annotations(data, train) if was_recognised else []
    return [*found, *_not_named(data), *_together(data, train), *_lists(data, train), *_not_read(data)]


def _other_annotations(data: TrainingSource, train: Annotations) -> list[Finding]:
    """Of other formats, which are not read: they may be what was meant."""
    found = []
    for other, splits in also_there(data.path, data.format):
        message = (
            f"{FORMATS[other].title} annotations lie there too (splits: {first_few(splits, 5)}); {train.format} was "
            f"read. --data.format {other} reads the others."
        )
        found.append(Finding("other-annotations", "note", str(data.path), message))
    for folder, other in same_beside(data.path, data.format):
        message = (
            f"{one_line(folder)} has the same images, splits and objects ({FORMATS[other].title}); {train.name} "
            f"({train.format}) was read."
        )
        found.append(Finding("other-annotations", "note", str(data.path), message))
    return found


def _together(data: TrainingSource, train: Annotations) -> list[Finding]:
    """Of folders that are read as one data set, and may be several."""
    folders = read_together(data.path, data.format) if train.split == WHOLE else ()
    if not folders:
        return []
    names = first_few([one_line(folder.name) for folder in folders], 4)
    message = (
        f"{len(folders):,} folders of it were read as one data set: {names}. If they don't belong together, give the "
        "path of one."
    )
    return [Finding("read-together", "note", str(data.path), message, len(folders))]


def _not_read(data: TrainingSource) -> list[Finding]:
    """Of labels in folders of its folders, which no split takes."""
    folders = labels_not_read(data.path, data.format)
    if not folders:
        return []
    message = (
        "Labels of the same format lie within the folder of a split and are not read: in "
        f"{first_few([one_line(folder) for folder in folders], 4)}. If they are meant, put them and their images where "
        "those of the split are; if not, elsewhere."
    )
    return [Finding("labels-not-read", "note", str(data.path), message, len(folders))]


def _splits_not_used(data: TrainingSource) -> list[Finding]:
    """Of other splits called as those for training and validation are, where nobody has named one."""
    if (data.train_split, data.val_split, data.val_fraction) != (None, None, None):
        return []
    used = default_splits(data.path, data.format)
    names = [name for name in available_splits(data.path, data.format) if split_kind(name) in ("train", "val")]
    unused = [name for name in names if name not in used and name.lower() != "trainval"]  # which is both once more
    if not unused or used[1] is None:
        return []
    message = (
        f"Other splits are not used: {first_few([one_line(name) for name in unused], 6)}. {one_line(used[0])} and "
        f"{one_line(used[1])} were taken; --data.train_split and --data.val_split name others."
    )
    return [Finding("splits-not-used", "note", str(data.path), message, len(unused))]


def _lists(data: TrainingSource, train: Annotations) -> list[Finding]:
    """Of text files that list the images of splits, where all images are read as one split."""
    root = Path(data.path)
    if not root.is_dir() or len(available_splits(root, data.format)) > 1:
        return []
    lists = lists_beside(root)
    names = {PurePosixPath(name).stem for name in image_names(train, root)} if lists else set()
    used_not = [file for file in lists if _first_stem(file) in names]
    by_lists = train.format in ("voc", "kitti", "yolo")  # and one of them is read
    if not used_not or (by_lists and train.split in [f.stem for f in used_not]):
        return []
    message = (
        f"{first_few([one_line(file) for file in used_not], 3)} list images by splits and are not used: all images are "
        "read as one split. To use them, let each image be in exactly one list and no list name other images; or give "
        "each split a folder or an annotation file of its own."
    )
    return [Finding("lists-not-used", "note", str(root), message, len(used_not))]


def _first_stem(file: Path) -> str:
    """The name without suffix that a list begins with."""
    try:
        first = next(filter(str.strip, listed_lines(file)), "")
    except InputError:
        return ""
    name = first.strip().replace("\\", "/").rpartition("/")[2]
    return PurePosixPath(name).stem if is_image_name(name) else name


def _not_named(data: TrainingSource) -> list[Finding]:
    """Of a validation split beside those which the data set's description names, where nobody has named another."""
    named = (data.val_split, data.val_annotations, data.val_fraction)
    said = said_of_not_named(data.path, "val", data.format) if named == (None, None, None) else ""
    return [Finding("split-not-named", "note", str(data.path), said)] if said else []


def no_validation(data: DataSource) -> InputError:
    """What to do about a data set without a validation split."""
    splits = available_splits(data.path, data.format)
    has = f"it has {first_few(splits, 8)}" if splits else "it has none"
    unnamed = said_of_not_named(data.path, "val", data.format)
    return InputError(
        f"{data.path} has no validation split of a usual name (val, valid, test, ...; {has}): --data.val_fraction 0.1 "
        "holds back a tenth of the training images, --data.val_split names another split, --data.val_annotations "
        f"another file{unnamed and f'. {unnamed}'}"
    )


def _settled(data: DataSource) -> DataSource:
    """With the format that lies there, looked for once: each reader lists folders to know its own. Where a file is
    named, the format is that of the file."""
    named = (data.val_annotations, getattr(data, "train_annotations", None))
    if data.format != "auto" or any(file is not None for file in named):
        return data
    return replace(data, format=detect_format(data.path))


def _load(
    data: DataSource, which: Literal["train", "val"], split: str | None, categories: Sequence[Category] | None
) -> Annotations:
    split = split or _name_of_split(data, which)
    if split is None:
        raise no_validation(data)
    return load_annotations(
        data.path,
        split,
        format=data.format,
        annotation_file=getattr(data, f"{which}_annotations", None),
        image_dir=getattr(data, f"{which}_images", None),
        categories=categories,
        boxes=data.boxes,
        allow_incomplete=data.allow_incomplete,
    )


def _name_of_split(data: DataSource, which: Literal["train", "val"]) -> str | None:
    named = getattr(data, f"{which}_split", None)
    if named is not None:
        return named
    if getattr(data, f"{which}_annotations", None):
        return which
    train = getattr(data, "train_split", None)
    name = dict(zip(("train", "val"), default_splits(data.path, data.format, train, data.val_split)))[which]
    if name is not None:
        check_parts(data.path, name, available_splits(data.path, data.format), f"--data.{which}_split")
    return name


def without_empty_images(annotations: Annotations) -> Annotations:
    """The images that have an object to learn from: one that is no ignore region.

    Raises:
        InputError: no image has any.
    """
    images = ImageTable.from_records(record for record in annotations.images if not record.ignore.all())
    if not len(images):
        raise InputError(f"{annotations.name}: none of the {len(annotations.images)} images has an object to train on")
    return replace(annotations, images=images)


# ---- a validation split where there is none --------------------------------------------------------------------------


def read_held_back(run: Path) -> list[str] | None:
    """The images that a run holds back for validation; None where it chose none, or lost the list.

    Raises:
        InputError: the list is broken.
    """
    file = run / HELD_BACK_FILE
    if not file.is_file():
        return None
    names = parse_json(read_text(file, MAX_LABEL_BYTES), str(file))
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{file} is broken: expected a list of image names; restore it")
    return names


@dataclass(frozen=True)
class _Group:
    """Images that stay together."""

    indices: Sequence[int]
    labels: np.ndarray  # (K,) bool: the classes of their objects


def image_names(annotations: Annotations, root: Path) -> list[str]:
    """The path of each image, from the data set's folder on where it lies in it; with /. `root` is that folder, or its
    annotation file."""
    home = root if root.is_dir() else root.parent
    bases = (home, home.resolve())  # some readers resolve links, some keep them
    table = ImageTable.from_records(annotations.images)
    paths = [table.path(index) for index in range(len(table))]
    return [
        next((path.relative_to(base) for base in bases if path.is_relative_to(base)), path).as_posix() for path in paths
    ]


def hold_back(
    train: Annotations, data: DataSource, held_back: Collection[str] | None = None
) -> tuple[Annotations, Annotations]:
    """Training and validation out of a training split: `data.val_fraction` of its images, decided by their names and
    `data.split_seed`. Training keeps an image of every class.

    held_back: the names of the images to hold back instead: an image that was added since then is trained on.

    Raises:
        InputError: a pattern that is none or matches nothing; no image to hold back, or none left to train on.
    """
    for option in ("val_split", "val_annotations", "val_images"):
        if getattr(data, option) is not None:
            raise InputError(
                f"--data.val_fraction holds back images of the training split, --data.{option} names others: give one"
            )
    names = image_names(train, existing(data.path))
    if held_back is None:
        chosen = _chosen(_groups(train, names, data), len(names), data)
    else:
        held_names = frozenset(held_back)
        chosen = [i for i, name in enumerate(names) if name in held_names]
        if not chosen:
            raise InputError(
                f"none of the images that the run holds back for validation is there any more "
                f"({first_few(map(one_line, held_back), 3)}): restore them, or start a new run"
            )
    if not chosen or len(chosen) == len(names):
        what = "no image" if not chosen else "all images"
        raise InputError(
            f"{train.name} has {len(names):,} images, and --data.val_fraction {data.val_fraction:g} would hold back "
            f"{what} for validation (no class may lose its last image of training): give another fraction, another "
            "--data.group_pattern, or a validation split"
        )
    is_val = np.zeros(len(names), dtype=bool)
    is_val[chosen] = True
    if data.group_pattern is None:
        _say_where_frames_are_parted(names, is_val, train.categories)
    if held_back is None and abs(len(chosen) - len(names) * data.val_fraction) > max(1, len(chosen) / 2):
        logger.warning(
            "val_fraction: %d of %d images are held back, %.0f %% and not %.0f %%: some stay together, and no class "
            "may lose its last one",
            len(chosen), len(names), 100 * len(chosen) / len(names), 100 * data.val_fraction,
        )  # fmt: skip
    in_val = ImageTable.from_records(train.images[i] for i in np.flatnonzero(is_val).tolist())
    in_train = ImageTable.from_records(train.images[i] for i in np.flatnonzero(~is_val).tolist())
    held = f"{train.name} ({data.val_fraction:g} of it)"
    return replace(train, images=in_train), replace(train, name=held, images=in_val, findings=(), is_held_back=True)


def _groups(train: Annotations, names: Sequence[str], data: DataSource) -> list[_Group]:
    """In an order that depends on their names and the seed alone. Copies of one image stay together."""
    keys = [copied_from(name) or name for name in names]
    if data.group_pattern is not None:
        try:
            pattern = re.compile(data.group_pattern)
        except re.error as error:
            raise InputError(
                f"--data.group_pattern: {data.group_pattern!r} is no regular expression ({error})"
            ) from None
        matches = [pattern.search(name) for name in names]
        if not any(matches):
            raise InputError(f"--data.group_pattern: {data.group_pattern!r} matches no image, such as {names[0]}")
        keys = [
            key if match is None else "\0".join(["", *(match.groups("") or [match[0]])])
            for key, match in zip(keys, matches, strict=True)
        ]
        others = [name for name, match in zip(names, matches, strict=True) if match is None]
        if others:
            logger.warning(
                "group_pattern: %r matches %d of %d images; the others, such as %s, are held back one by one",
                data.group_pattern, len(names) - len(others), len(names), one_line(others[0]),
            )  # fmt: skip
        if len(set(keys)) == len(names):
            logger.warning(
                "group_pattern: no two images agree in what %r matches, such as %s: it keeps none together",
                data.group_pattern, one_line(names[0]),
            )  # fmt: skip
    members: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        members.setdefault(key, []).append(i)

    def place(key: str) -> bytes:
        return hashlib.blake2b(f"{data.split_seed}\n{key}".encode("utf-8", "surrogateescape")).digest()

    groups = []
    for key in sorted(members, key=place):
        labels = np.zeros(len(train.categories), dtype=bool)
        for i in members[key]:
            labels[train.images[i].labels] = True
        groups.append(_Group(members[key], labels))
    return groups


def _chosen(groups: Sequence[_Group], num_images: int, data: DataSource) -> list[int]:
    """The indices of images: of the first groups that fit, but none that would take the last image of a class from
    training; where none fits, of the smallest."""
    wanted = max(1, round(num_images * data.val_fraction))
    left = np.sum([group.labels for group in groups], axis=0, dtype=np.int64)  # groups of training with each class
    chosen: list[int] = []
    for group in groups:
        if len(chosen) + len(group.indices) <= wanted and (left[group.labels] > 1).all():
            chosen += group.indices
            left -= group.labels
    if not chosen:
        spare = [group for group in groups if (left[group.labels] > 1).all()]
        chosen = list(min(spare, key=lambda group: len(group.indices)).indices) if spare else []
    return chosen


def _say_where_frames_are_parted(names: Sequence[str], is_val: np.ndarray, categories: Sequence[Category]) -> None:
    """Frames of one video, or tiles of one image, on both sides make validation flatter the model."""
    for found in families(names, categories):
        parted = [family for family, places in found.members.items() if 0 < is_val[places].sum() < len(places)]
        if parted:
            logger.warning(
                "the image names look like %s (%s), and %d of them are in training and in validation, which flatters "
                'the model: --data.group_pattern "%s" keeps each on one side',
                found.said, first_few(sorted(found.members), 3), len(parted), found.group_pattern,
            )  # fmt: skip
            return

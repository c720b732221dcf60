"""Data sets that lie side by side in one folder, where nothing says that they belong together, or one in another."""

from __future__ import annotations

import filecmp
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import Annotations
from ddetr.datasets.image_files import folders_in
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.reader import split_kind
from ddetr.errors import InputError
from ddetr.printable import one_line

PARTS = ("images", "labels", "annotations", "jpegimages", "imagesets", "train", "valid", "val", "test", "data")
NOTHING_SAYS = "nothing says that they belong together"
_ROUNDING_PX = 1.5  # by which the boxes of one object differ in two formats
_COMPARED = 20  # images of a split whose files are compared byte by byte
_LEVELS = 3  # folders one in another that are looked through for neighbours
_MOST = 20  # neighbours that are looked into
_WALKED = 100  # folders below one in which an image is looked for


@dataclass(frozen=True)
class Neighbours:
    """Folders of one folder, each with images and annotations, none called as a split or a part of a data set is."""

    read: tuple[Path, ...] = ()  # those whose data a reader has found from above
    others: tuple[tuple[Path, str], ...] = ()  # those of which it knows nothing, with their formats


def neighbours(place: Path, splits: Iterable[Any], format_in: Callable[[Path], str | None]) -> Neighbours:
    """The data sets around those that a reader has found below the folder `place`; none where what it has found is one
    data set, or lies in no folder of its own.

    splits: where a reader says that its splits lie, in a form of its own. format_in: the format that lies in a folder.
    """
    paths = [path for split in splits for path in _paths_in(split)]
    for _ in range(_LEVELS):
        if not paths or any(path == place or not path.is_relative_to(place) for path in paths):
            break
        names = sorted({path.relative_to(place).parts[0] for path in paths})
        read = [place / name for name in names]
        if any(_is_part(name) for name in names) or not all(map(_has_images, read[:_MOST])):
            break
        around = [folder for folder in folders_in(place) if folder not in read and not _is_part(folder.name)]
        known = ((folder, format_in(folder)) for folder in around[:_MOST] if _has_images(folder))
        others = tuple((folder, format) for folder, format in known if format is not None)
        if others or len(read) > 1:
            return Neighbours(tuple(read), others)
        place = read[0]
    return Neighbours()


def unlike(one: Sequence[Annotations], other: Sequence[Annotations]) -> str | None:
    """In what two data sets differ, whose splits stand in the same order; None where these have the same images with
    the same objects."""
    stems = [[{record.path.stem for record in split.images} for split in splits] for splits in (one, other)]
    if set().union(*stems[0]) != set().union(*stems[1]):
        return NOTHING_SAYS
    if stems[0] != stems[1]:
        return "they split images of the same names in different ways"
    for mine, theirs in zip(one, other, strict=True):
        records = {record.path.stem: record for record in theirs.images}
        names = [np.array([category.name.lower() for category in split.categories] or [""]) for split in (mine, theirs)]
        for i, record in enumerate(mine.images):
            same = records[record.path.stem]
            if i < _COMPARED and not _are_equal(record.path, same.path):
                return f"they have different images of the same names, such as {one_line(record.path.name)}"
            apart = np.abs(record.boxes_xyxy[:, None] - same.boxes_xyxy[None]).max(axis=2, initial=0)  # (n, m)
            is_near = apart <= _ROUNDING_PX
            is_same = is_near & (names[0][record.labels][:, None] == names[1][same.labels][None])
            if not _is_matched(is_same):
                what = "names of classes" if _is_matched(is_near) else "objects"
                return f"they have different {what} in images of the same names, such as {one_line(record.path.name)}"
    return None


def not_read_below(place: Path, splits_of: Callable[[Path], Mapping[str, Any]]) -> list[Path]:
    """The folders below those that a reader takes its labels from, in which labels of the same format lie that no
    split has. place: the data set's folder. splits_of: where the reader says that the splits of a folder lie.
    """
    used = set(_paths_in(list(splits_of(place).values())))
    folders = sorted({path if path.is_dir() else path.parent for path in used})
    level = [folder for folder in folders if folder.is_relative_to(place) and _has_labels(folder)]
    found: list[Path] = []
    num_left = _WALKED
    for _ in range(_LEVELS):
        inner = (sub for folder in level for sub in folders_in(folder) if sub not in folders)
        level = list(islice(dict.fromkeys(inner), num_left))
        num_left -= len(level)
        lost = [sub for sub in level if _are_others(sub, used, splits_of)]
        found += lost
        level = [sub for sub in level if sub not in lost]
    return found


def _has_labels(folder: Path) -> bool:
    """Whether a file lies there itself that is no image."""
    with os.scandir(folder) as entries:
        return any(not is_image_name(e.name) and not is_clutter(e.name) and e.is_file() for e in entries)


def _are_others(folder: Path, used: set[Path], splits_of: Callable[[Path], Mapping[str, Any]]) -> bool:
    """Whether labels lie in the folder, and none that are used."""
    try:
        paths = list(_paths_in(list(splits_of(folder).values())))
    except InputError:
        return False  # a broken one is no data set
    return bool(paths) and used.isdisjoint(paths)


def _are_equal(one: Path, other: Path) -> bool:
    try:
        return filecmp.cmp(one, other, shallow=False)
    except OSError:
        return False


def _is_matched(pairs: np.ndarray) -> bool:
    """Of objects (n, m) of two sides: whether there are as many on both, and each has one of the other side."""
    return pairs.shape[0] == pairs.shape[1] and bool(pairs.any(axis=0).all() and pairs.any(axis=1).all())


def _paths_in(found: Any) -> Iterator[Path]:
    """The paths that a reader's own form holds of where a split lies."""
    if isinstance(found, Path):
        yield found
    elif isinstance(found, list | tuple):
        for item in found:
            yield from _paths_in(item)
    elif is_dataclass(found):
        for field in fields(found):
            yield from _paths_in(getattr(found, field.name))


def _is_part(name: str) -> bool:
    return name.lower() in PARTS or split_kind(name) is not None


def _has_images(folder: Path) -> bool:
    """Whether there, or below, is an image; a file has none."""
    walk = islice(os.walk(folder), _WALKED)
    return any(is_image_name(name) and not is_clutter(name) for _, _, names in walk for name in names)

"""Data sets that lie side by side in one folder, where nothing says that they belong together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ddetr.datasets.image_files import folders_in
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.reader import split_kind

PARTS = ("images", "labels", "annotations", "jpegimages", "imagesets", "train", "valid", "val", "test", "data")
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

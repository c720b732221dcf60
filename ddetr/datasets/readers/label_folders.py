"""Folders of one label file for each image, whatever the format: which of them are splits, where an image lies, what is
left over; and the box around a shape that is none."""

from __future__ import annotations

import heapq
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, folders_in, report_all_missing
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.file_names import last_parts
from ddetr.datasets.readers.reader import WHOLE, LabelledImage, Wanted, looked_at_once, split_kind
from ddetr.printable import one_line
from ddetr.wording import first_few, plural

IMAGE_FOLDERS = ("JPEGImages", "images", "image", "imgs", "img", "image_2")
_IMAGE_NAMES = frozenset(name.lower() for name in IMAGE_FOLDERS)
_ABOVE = 4  # folders above a label file's own in which a folder of images is looked for
_BELOW = 3  # folders one in another, in the folder of a split, that are looked through
_PROBED = 200  # of a level: where none of them holds data, the others don't

T = TypeVar("T")


@dataclass(frozen=True)
class Source:
    """Where images of a split come from."""

    folder: Path  # of label files, or of folders of them
    listing: Path | None = None  # a text file that lists some of them, or a folder with the images of some


def label_files(folder: Path, suffix: str, most: int | None = None) -> list[Path]:
    """The files of a folder whose names end in `suffix`, in capitals too, sorted; the first `most` of them. Hidden ones
    are none: a Mac writes `._x.xml` beside each `x.xml`."""
    try:
        ends = (suffix, suffix.upper(), suffix.title())
        names = [name for name in os.listdir(folder) if name.endswith(ends) and not is_clutter(name)]
    except OSError:
        return []
    return [folder / name for name in (sorted(names) if most is None else heapq.nsmallest(most, names))]


def folder_named(folder: Path, names: Sequence[str]) -> list[Path]:
    """The subfolders called by one of `names`, in their order, with the usual capitals. The folder, of which there may
    be many with 100,000 images, is not listed."""
    found: list[Path] = []
    for name in names:
        for spelled in dict.fromkeys((name, name.lower(), name.capitalize(), name.upper())):
            place = folder / spelled
            if os.path.isdir(place) and not any(place.samefile(other) for other in found):
                found.append(place)
    return found


def holds_json_labels(folder: Path) -> bool:
    """Whether there, or in its folders, are JSON files and no text files: a folder called labels that isn't YOLO's."""
    level = places = [folder]
    for _ in range(_BELOW):
        level = [sub for place in level for sub in folders_in(place)][:_PROBED]
        places = [*places, *level]
    return any(label_files(p, ".json", 1) for p in places) and not any(label_files(p, ".txt", 1) for p in places)


def named_splits(sources: Sequence[tuple[str, T]]) -> dict[str, list[T]]:
    """(name of a folder, what lies there) -> splits: each by its name; all together too where no name is that of a
    split, as folders of one class each are."""
    named: dict[str, list[T]] = {}
    for name, source in sources:
        named.setdefault(name, []).append(source)
    if any(map(split_kind, named)):
        return named
    whole = {WHOLE: [source for _, source in sources]} if sources else {}
    return whole if len(named) == 1 else {**named, **whole}


_folders_of = looked_at_once(folders_in)


def folders_holding(folder: Path, holds: Callable[[Path], bool]) -> list[Path]:
    """The folder itself where it `holds` data, else those in it and further down that do, as `train/0` and `train/1`
    do for train. [] where one of these is called as another split is: that is a data set of its own."""
    level, found = [folder], []
    for _ in range(1 + _BELOW):
        held = [place for place in level[:_PROBED] if holds(place)]
        held += [place for place in level[_PROBED:] if held and holds(place)]
        found += held
        level = [sub for place in level if place not in held for sub in _folders_of(place)]
    own = split_kind(folder.name)
    words = {part for place in found for part in place.relative_to(folder).parts}
    return [] if own and any(split_kind(word) not in (None, own) for word in words) else sorted(found)


def split_folders(folders: Iterable[Path], holds: Callable[[Path], bool]) -> dict[str, list[Path]]:
    """Name -> where its data lie: each folder that `holds` some, and each that is called as a split is and has folders
    that do."""
    deep = ((sub, folders_holding(sub, holds) if split_kind(sub.name) else [sub] * holds(sub)) for sub in folders)
    return {sub.name: places for sub, places in deep if places}


class ImagesBeside:
    """Finds the image of a label file: beside it, or in a folder of images beside its folder or one further up."""

    def __init__(self, root: Path, image_dir: Path | None) -> None:
        self.folders = ImageFolders()
        self._root, self._image_dir = root, image_dir
        self._places: dict[Path, list[Path]] = {}
        self._below: dict[Path, list[Path]] = {}

    def find(self, label_file: Path, stated: str) -> Path | None:
        """The image of a name that the label file gives, whatever folders, addresses and other systems add to it."""
        return next((found for name in last_parts(stated) if (found := self._find(label_file, name)) is not None), None)

    def _find(self, label_file: Path, name: str) -> Path | None:
        """The image called `name`, or as it is but for capitals and its image suffix."""
        for place in self.places(label_file.parent):
            image = self.folders.find(place / name)
            if image is not None and is_image_name(image.name):
                return image
        inner = {image for place in self._inner(label_file.parent) if (image := self.folders.find(place / name))}
        return inner.pop() if len(inner) == 1 else None  # of images/rgb and images/depth, which?

    def find_own(self, label_file: Path) -> Path | None:
        """The image that is called as the label file is (`a.xml`, `a.jpg.xml`)."""
        stem = label_file.stem
        found = self._find(label_file, stem) if is_image_name(stem) else None
        return found or self._find(label_file, f"{stem}.jpg")

    def find_stated(self, label_file: Path, path: str) -> Path | None:
        """The image at a path that the label file gives from its own folder; whoever wrote it may have used Windows."""
        place = Path(os.path.normpath(label_file.parent / path.replace("\\", "/")))
        image = self.folders.find(place) if place.name and place.is_relative_to(self._root) else None
        return image if image is not None and is_image_name(image.name) else None

    def places(self, folder: Path) -> list[Path]:
        """Where images of the label files in `folder` may lie."""
        if folder not in self._places:
            self._places[folder] = [self._image_dir] if self._image_dir else self._look(folder)
        return self._places[folder]

    def _inner(self, folder: Path) -> list[Path]:
        """The folders in those of images: images/train of labels that lie all in one folder."""
        if folder not in self._below:
            usual = [] if self._image_dir else [p for p in self.places(folder) if p.name.lower() in _IMAGE_NAMES]
            self._below[folder] = [sub for place in usual for sub in folders_in(place)]
        return self._below[folder]

    def _look(self, folder: Path) -> list[Path]:
        above = [up for up in (folder, *folder.parents[:_ABOVE]) if up.is_relative_to(self._root)]
        usual = [folder]
        for up in above:
            rest = folder.relative_to(up).parts[1:]  # annotations/train -> images/train
            usual += [place for sub in folder_named(up, IMAGE_FOLDERS) for place in (sub.joinpath(*rest), sub)]
        usual = list(dict.fromkeys([*usual, *above]))
        if any(self.folders.images(place) for place in usual):
            return usual
        others = [sub for up in above for sub in folders_in(up) if sub not in usual and self.folders.images(sub)]
        return [*usual, *others] if len(others) == 1 else usual  # of photos and masks, which are the images?


def report_images(
    log: FindingLog,
    wanted: Wanted,
    beside: ImagesBeside,
    labels: Sequence[Path],
    found: Iterable[LabelledImage],
    known: set[str],
) -> None:
    """Adds what a split's images show as a whole: that none was found, that some have no label file, or are in a format
    that is not read.

    labels: the split's label files. found: the images of those that have one. known: stems of the label files of all
    splits.
    """
    paths = {image.path for image in found}
    if labels and not paths:
        report_all_missing(log, str(wanted.path), labels[0].stem, len(labels), beside.places(labels[0].parent))
    beside.folders.report_unread(log)
    for folder in sorted({path.parent for path in paths}):
        if wanted.split not in (wanted.train_split, folder.name, folder.parent.name):
            continue  # several splits have their images there: the training split says it
        names = [
            n for n in beside.folders.images(folder) if folder / n not in paths and os.path.splitext(n)[0] not in known
        ]
        if names:
            some = first_few([one_line(name) for name in names], 3)
            message = f"{len(names)} images in {folder} have no label file and are not used ({some})."
            log.add("image-without-labels", "note", str(folder), message, count=len(names))


def report_in_no_list(log: FindingLog, folder: Path, names: Sequence[str], lists: Iterable[Path | None]) -> None:
    """Adds the images of these names, which have labels and are in none of the lists."""
    if names:
        known = first_few([one_line(listing.name) for listing in dict.fromkeys(lists) if listing is not None], 4)
        message = (
            f"No list ({known}) has {plural(len(names), 'image')} with labels, and they are not used, such as "
            f"{first_few([one_line(name) for name in names], 3)}."
        )
        log.add("in-no-list", "note", str(folder), message, count=len(names))


def without_shared(images: Iterable[LabelledImage], log: FindingLog) -> list[LabelledImage]:
    """The images, without those whose file belongs to an earlier one: two label files for one image."""
    first: dict[Path, str] = {}
    kept = []
    for image in images:
        where = first.setdefault(image.path, image.where)
        if where is image.where:
            kept.append(image)
            continue
        message = (
            f"It and {one_line(where)} both lead to {one_line(image.path)}: whose boxes these are can't be known; give "
            "each image the name of its label file."
        )
        log.add("ambiguous-image", "refused", image.where, message)
    return kept


def box_around(points: Sequence[Sequence[float]]) -> list[float]:
    """x1, y1, x2, y2 around points (x, y); of NaN where there is none, or one that is no number."""
    if not points or not all(math.isfinite(value) for point in points for value in point):
        return [math.nan] * 4
    xs, ys = zip(*points, strict=True)
    return [min(xs), min(ys), max(xs), max(ys)]


def box_around_turned(cx: float, cy: float, width: float, height: float, radians: float) -> list[float]:
    """x1, y1, x2, y2 around a box that is turned about its centre."""
    if not math.isfinite(radians):
        return [math.nan] * 4
    cos, sin = abs(math.cos(radians)), abs(math.sin(radians))
    half_w, half_h = (width * cos + height * sin) / 2, (width * sin + height * cos) / 2
    return [cx - half_w, cy - half_h, cx + half_w, cy + half_h]


def box_around_ellipse(cx: float, cy: float, rx: float, ry: float, radians: float) -> list[float]:
    """x1, y1, x2, y2 around an ellipse that is turned about its centre."""
    if not math.isfinite(radians):
        return [math.nan] * 4
    cos, sin = math.cos(radians), math.sin(radians)
    half_w, half_h = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
    return [cx - half_w, cy - half_h, cx + half_w, cy + half_h]

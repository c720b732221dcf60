"""`convert()`: a data set in a new folder, whole or not at all."""

from __future__ import annotations

import errno
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from PIL import ExifTags, Image

from ddetr.datasets.convert.source import Source
from ddetr.datasets.convert.written import NewImage, Target, class_names, note_lost, write_coco, write_voc, write_yolo
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.image_header import open_image
from ddetr.datasets.images import image_header, read_image
from ddetr.errors import InputError
from ddetr.files import remove_leftovers, write_folder_atomically
from ddetr.printable import one_line, printable
from ddetr.wording import first_few

Progress = Callable[[int, int], None]  # (done, total)
_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_NAME_BYTES = 200  # of a file name without its suffix: systems take 255
_NOT_IN_NAMES = re.compile(r"[\s<>:\"/\\|?*%#&;=\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


@dataclass(frozen=True)
class Conversion:
    """What was written, and what is not as it was."""

    path: Path
    num_images: Mapping[str, int]  # of each split, by its name in the new data set
    num_objects: int
    notes: tuple[str, ...]


def convert(
    source: Source,
    output: str | os.PathLike,
    to: Target,
    *,
    images: Literal["copy", "link"] = "copy",
    progress: Progress | None = None,
) -> Conversion:
    """Writes a data set into a folder that is new or empty.

    Args:
        to: "coco": annotations/instances_SPLIT.json and SPLIT/; "yolo": data.yaml, images/ and labels/ with the splits
            train, val and test; "voc": Annotations/, JPEGImages/ and ImageSets/Main/.
        images: "copy": files of their own. "link": hard links where the disk is the same: no space, but what is changed
            in such a file is changed in the original too.
        progress: called with (done, total) images.

    Raises:
        InputError: the folder holds something, or lies among the data set's images; a finding is refused; an image
            cannot be read.
    """
    path = Path(output).expanduser().resolve()
    _check_empty(path)
    for name, split in source.splits.items():
        refused = [finding for finding in split.findings if finding.action == "refused"]
        if refused:
            raise InputError(f"{name}: {one_line(refused[0].where)}: {refused[0].message} Nothing was written")
        for folder in {record.path.parent for record in split.images}:
            if path.is_relative_to(folder.resolve()):
                raise InputError(f"{output} lies in a folder of the data set's images ({folder}); choose another place")
    notes: Counter[str] = Counter()
    names = _split_names(source, to, notes)
    planned = _plan(source, names, to, notes)
    total = sum(map(len, planned.values()))
    writer = {"coco": write_coco, "yolo": write_yolo, "voc": write_voc}[to]

    def write(folder: Path) -> None:
        done = 0
        for split, of_split in planned.items():
            place = folder / {"coco": split, "yolo": f"images/{split}", "voc": "JPEGImages"}[to]
            place.mkdir(parents=True, exist_ok=True)
            for image in of_split:
                _write_image(image, place / image.name, images, notes)
                done += 1
                if progress is not None:
                    progress(done, total)
        writer(folder, planned, source.first, class_names(source.first, to, notes), notes)
        if to != "coco":
            note_lost(planned, to, source.first.format == "coco", notes)
        _check_empty(path)  # it takes minutes: somebody may have put something there

    remove_leftovers(path.parent)
    write_folder_atomically(path, write)
    for name in source.left_out:
        notes[f"the split {one_line(name)} was left out: all its images are in others"] = 0
    return Conversion(
        path=path,
        num_images={split: len(of_split) for split, of_split in planned.items()},
        num_objects=sum(
            len(image.record.labels) if to != "yolo" else int((~image.record.ignore).sum())
            for of_split in planned.values()
            for image in of_split
        ),
        notes=tuple(note if not count else f"{note}: {count:,}" for note, count in notes.items()),
    )


def _check_empty(path: Path) -> None:
    if path == Path.cwd():
        raise InputError(f"{path} is the folder that you are in; give the name of a new one")
    if path.exists() and (not path.is_dir() or next(path.iterdir(), None) is not None):
        what = "is not empty" if path.is_dir() else "is a file"
        raise InputError(f"{path} {what}: expected a new or an empty folder; nothing was written")


def _split_names(source: Source, to: Target, notes: Counter[str]) -> dict[str, str]:
    """Name of each split -> its name in the new data set."""
    if to != "yolo":
        names = {name: _safe_name(name) for name in source.splits}
        names = {name: "all" if safe == "annotations" else safe for name, safe in names.items()}  # COCO's own folder
        if to == "voc":  # where cat_train is what train says of cats
            names = {name: safe.replace("_", "-") for name, safe in names.items()}
    else:
        names = {name: _yolo_split(name, source) for name in source.splits}
    if len(set(names.values())) < len(names):
        raise InputError(
            f"the splits {first_few(names, 8)} would not all have names of their own in {to.upper()}; convert them one "
            "by one, each by --split into a folder of its own"
        )
    for name, new in names.items():
        if name != new:
            notes[f"the split {one_line(name)} is called {new}"] = 0
    return names


def _yolo_split(name: str, source: Source) -> str:
    """data.yaml knows three."""
    if name == source.train:
        return "train"
    if name == source.val:
        return "val"
    return "val" if source.val is None and name.lower().startswith("val") else "test"


def _plan(source: Source, names: Mapping[str, str], to: Target, notes: Counter[str]) -> dict[str, list[NewImage]]:
    """New split name -> its images, each with a name that nobody else has."""
    taken: set[str] = set()
    planned: dict[str, list[NewImage]] = {}
    for split, found in source.splits.items():
        if to != "voc":
            taken = set()
        planned[names[split]] = []
        for record in found.images:
            turned = _is_turned(record.path)
            suffix = record.path.suffix.lower() if is_image_name(record.path.name) else ".png"
            if turned and suffix not in _JPEG_SUFFIXES:
                suffix = ".png"
            elif not turned:
                suffix = record.path.suffix
            stem = safe = _safe_name(record.path.stem)
            number = 1
            while (key := _key(stem + suffix if to == "coco" else stem)) in taken:
                number += 1
                stem = f"{safe}_{number}"
            taken.add(key)
            if stem != record.path.stem:
                notes["images under other names, as theirs were not unique or not safe on every system"] += 1
            planned[names[split]].append(NewImage(record, stem + suffix, turned))
    return planned


def _is_turned(path: Path) -> bool:
    """Whether some program shows it otherwise than another: by an orientation in its header."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return image_header(path).orientation != 1
    with open_image(path) as image:  # which Pillow turns by itself: its header is the upright one
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _key(name: str) -> str:
    """The same for names that some system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _safe_name(name: str) -> str:
    """A file name (without suffix) that every system, list and address takes; letters of all scripts stay."""
    name = _NOT_IN_NAMES.sub("_", printable(name))
    if is_image_name(name) or name.lower().endswith(".xml"):  # a.jpg.png: its stem looks like another image
        name = name.replace(".", "_")
    name = name.encode("utf-8")[:_NAME_BYTES].decode("utf-8", "ignore").rstrip(".")
    if not name or name.startswith((".", "-")) or _OF_WINDOWS.match(name):
        name = f"_{name.lstrip('.-')}"
    return name


def _write_image(image: NewImage, place: Path, how: Literal["copy", "link"], notes: Counter[str]) -> None:
    record = image.record
    if image.turned:
        pixels = Image.fromarray(read_image(record.path, record.size_hw).permute(1, 2, 0).numpy())
        pixels.save(place, **({"quality": 95, "subsampling": 0} if place.suffix.lower() != ".png" else {}))
        notes["images that EXIF turns, encoded anew as their boxes see them"] += 1
        return
    try:
        if how == "link":
            try:
                os.link(record.path.resolve(), place)
                return
            except OSError:
                notes["images copied, as they cannot be linked from there"] += 1
        shutil.copyfile(record.path, place)
    except OSError as error:
        if error.errno == errno.ENOENT and not record.path.exists():
            raise InputError(f"{record.path} is gone; nothing was written") from None
        raise

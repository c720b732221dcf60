"""Images that one file of annotations names: found by ever shorter ends of their names, never guessed between two."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ddetr.datasets.annotations import FindingLog, report_crowd
from ddetr.datasets.image_files import ImageFolders, visible
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.coco.layout import image_dirs
from ddetr.datasets.readers.reader import LabelledImage
from ddetr.errors import InputError
from ddetr.untrusted import (
    MAX_ANNOTATION_BYTES,
    MAX_OBJECTS,
    MAX_PATH,
    MAX_PATH_PARTS,
    one_line,
    open_file,
    parse_json,
    read_text,
)

_DEPTH = 4  # folders below the data set's that are searched for an image that lies in no usual place


class ImageFinder:
    """The file of an image by the name that annotations give it."""

    def __init__(self, root: Path, annotation_file: Path, split: str, image_dir: Path | None) -> None:
        self._root = image_dir or root
        beside = annotation_file.parent
        also = [place for place in (beside.parent / "images" / split, beside.parent / split) if place.is_dir()]
        usual = [*image_dirs(root, annotation_file, split), *also]
        self.places = [image_dir] if image_dir else list(dict.fromkeys(usual))
        self.folders = ImageFolders()
        self._last = (self.places[0], 0) if self.places else None  # where the last one was: the next is there too
        self._below: dict[str, Path | None] | None = None
        self.without_folders: list[str] = []  # names that are found only without the folders that they state

    def find(self, name: str) -> Path | None:
        """None where there is no such image, or several that it could be."""
        parts = PurePosixPath(name).parts
        if not parts or len(name) > MAX_PATH or len(parts) > MAX_PATH_PARTS or "\0" in name:
            return None
        tries = ((place, start) for start in range(len(parts)) for place in self.places)
        likeliest = [self._last] if self._last and self._last[1] == 0 else []
        for place, start in itertools.chain(likeliest, tries):
            found = self.folders.find(place.joinpath(*parts[start:]))
            if found is not None and is_image_name(found.name):
                self._last = (place, start)
                if start:
                    self.without_folders.append(name)
                return found
        found = self._anywhere().get(parts[-1].lower())
        if found is not None and len(parts) > 1:
            self.without_folders.append(name)
        return found

    def _anywhere(self) -> dict[str, Path | None]:
        """Every image below the data set's folder by its name with and without suffix; None for one there twice."""
        if self._below is None:
            self._below = {}
            for folder, inner, files in os.walk(self._root):
                depth = len(Path(folder).relative_to(self._root).parts)
                inner[:] = [] if depth == _DEPTH else [name for name in sorted(inner) if not is_clutter(name)]
                for file in filter(is_image_name, files):
                    for key in {file.lower(), file.rpartition(".")[0].lower()}:
                        self._below[key] = None if key in self._below else Path(folder, file)
        return self._below


@dataclass
class Objects:
    """The objects of one image, as they are collected."""

    name: str  # of the image, as the annotations write it
    classes: list[str] = field(default_factory=list)
    boxes_xyxy: list[Sequence[float]] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    ignore: list[bool] = field(default_factory=list)
    declared_hw: tuple[int, int] | None = None

    def add(self, class_name: str, box_xyxy: Sequence[float], number: int | None = None, ignore: bool = False) -> None:
        """class_name: "" where it is not known; number: in the file, by default counted in the image."""
        self.classes.append(class_name)
        self.boxes_xyxy.append(box_xyxy)
        self.numbers.append(len(self.classes) if number is None else number)
        self.ignore.append(ignore)


class ImageCollector:
    """Objects in the order of a file -> its images; what names no image, or the same as another name, is reported."""

    def __init__(
        self,
        finder: ImageFinder,
        shown: str,
        log: FindingLog,
        *,
        in_fractions: bool = False,
        unit: str = "object",
        are_addresses: bool = False,  # the folders in names are those of a server
    ) -> None:
        self._finder, self._shown, self._log = finder, shown, log
        self._in_fractions, self._unit = in_fractions, unit
        self._of_folders = "note" if are_addresses else "repaired"
        self._of_written: dict[str, Objects | None] = {}  # None: no such image
        self._of_path: dict[Path, Objects] = {}
        self._missing: list[str] = []

    def of(self, written: str, also: Callable[[str], Iterable[str]] = lambda name: ()) -> Objects | None:
        """The image of this name, or of the first of `also(name)` that is there; None where there is none."""
        if written not in self._of_written:
            name = PurePosixPath(written.replace("\\", "/")).as_posix()
            self._of_written[written] = self._look_up(name, also)
        return self._of_written[written]

    def _look_up(self, name: str, also: Callable[[str], Iterable[str]]) -> Objects | None:
        path = next((found for one in (name, *also(name)) if (found := self._finder.find(one)) is not None), None)
        if path is None:
            self._missing.append(name)
            return None
        first = self._of_path.setdefault(path, Objects(name))
        if first.name != name:
            message = (
                f"It and {one_line(first.name)} both lead to {path}: whose boxes are whose can't be known. Give each "
                "image its own file, in the folders that the names state."
            )
            self._log.add("duplicate-image-id", "refused", f"{self._shown}, {one_line(name)}", message)
            return None
        return first

    def images(self) -> list[LabelledImage]:
        if self._missing and not self._of_path:
            looked = ", ".join(str(place) for place in self._finder.places[:4]) or "no folder"
            message = (
                f"None of its {len(self._missing)} images was found (the first is {one_line(self._missing[0])}; looked "
                f"in {looked}); give image_dir (--data.train_images, --data.val_images)."
            )
            self._log.add("every-image-missing", "refused", self._shown, message, count=len(self._missing))
        for name in self._missing if self._of_path else ():
            message = "There is no such image, or there are several that it could be; it was left out."
            self._log.add("missing-image", "dropped", f"{self._shown}, {one_line(name)}", message)
        if names := self._finder.without_folders:
            first = one_line(names[0])
            message = f"File names carry folders that are not here, such as {first}; only their last part was used."
            self._log.add("file-name-path", self._of_folders, self._shown, message, count=len(names))
        for parent in sorted({path.parent for path in self._of_path}):
            unlisted = [name for name in self._finder.folders.images(parent) if parent / name not in self._of_path]
            if unlisted:
                message = (
                    f"{len(unlisted)} images in {parent} are not listed in {self._shown} and not used, such as "
                    f"{one_line(unlisted[0])}."
                )
                self._log.add("unlisted-images", "note", str(parent), message, count=len(unlisted))
        return list(self._labelled())

    def _labelled(self) -> Iterator[LabelledImage]:
        for path, found in self._of_path.items():
            where = f"{self._shown}, {one_line(found.name)}"
            if len(found.classes) > MAX_OBJECTS:
                report_crowd(self._log, where, len(found.classes))
            named = [i for i, name in enumerate(found.classes) if name][:MAX_OBJECTS]
            for i, name in enumerate(found.classes):
                if not name:
                    place = f"{where}, {self._unit} {found.numbers[i]}"
                    self._log.add("missing-name", "dropped", place, "The object has no class; it was left out.")
            yield LabelledImage(
                path,
                where,
                [found.classes[i] for i in named],
                np.array([found.boxes_xyxy[i] for i in named], dtype=np.float64).reshape(-1, 4),
                [found.numbers[i] for i in named],
                in_fractions=self._in_fractions,
                declared_hw=found.declared_hw,
                ignore=np.array([found.ignore[i] for i in named], dtype=bool),
                unit=self._unit,
            )


# ---- JSON files whose content is a list of images --------------------------------------------------------------------


def list_files(path: Path, patterns: Sequence[str], is_ours: Callable[[bytes], bool]) -> list[Path]:
    """The file at `path`, or those of the first pattern in the folder, whose first kilobytes are `is_ours`."""
    if path.is_file():
        return [path] if path.suffix.lower() == ".json" and _starts_as(path, is_ours) else []
    for pattern in patterns:
        files = [file for file in visible(path.glob(pattern), path) if _starts_as(file, is_ours)]
        if files:
            return files
    return []


def _starts_as(file: Path, is_ours: Callable[[bytes], bool]) -> bool:
    try:
        with open_file(file) as stream:
            start = stream.read(1 << 16).lstrip(b"\xef\xbb\xbf \t\r\n")
    except OSError:
        return False
    return start[:1] == b"[" and is_ours(start)


def load_list(file: Path) -> list[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them."""
    try:
        text = read_text(file, MAX_ANNOTATION_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from None
    content = parse_json(text, str(file))
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"{file}: expected a list with an object for each image")
    return content

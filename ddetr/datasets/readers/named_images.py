"""Images that one file of annotations names: their objects are collected by the names, which file_names.py finds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.box_form import corners_of
from ddetr.datasets.config import BoxForm
from ddetr.datasets.image_files import ImageFolders, report_unlisted
from ddetr.datasets.readers.coco.layout import image_dirs
from ddetr.datasets.readers.file_names import Spell, find_files, path_parts, spellings
from ddetr.datasets.readers.reader import LabelledImage, Wanted, read_labelled
from ddetr.printable import one_line
from ddetr.untrusted import MAX_OBJECTS, MAX_PATH

_ONLY_CLASS = "object"  # the name of the class of boxes none of which states any


@dataclass(frozen=True)
class Place:
    """Where the annotations of a split lie."""

    root: Path  # the data set's folder
    file: Path
    split: str
    beside_file: bool = False  # names are paths from the file's folder, and nowhere else

    @property
    def shown(self) -> str:
        """The file, for people."""
        return str(self.file.relative_to(self.root)) if self.file.is_relative_to(self.root) else self.file.name

    @property
    def top(self) -> Path:
        """The folder below which the images lie."""
        return self.file.parent if self.beside_file else self.root

    def image_dirs(self, image_dir: Path | None) -> list[Path]:
        """The folders that may hold the images, the likeliest first; `image_dir` alone where it is given."""
        if image_dir or self.beside_file:
            return [image_dir or self.top]
        above = self.file.parent.parent
        also = [place for place in (above / "images" / self.split, above / self.split) if place.is_dir()]
        return list(dict.fromkeys([*image_dirs(self.root, self.file, self.split), *also]))


def read_files(
    wanted: Wanted,
    format: str,
    splits: Mapping[str, Sequence[Path]],
    read: Callable[[Place, FindingLog], list[LabelledImage]],
) -> Annotations:
    """A split of a format whose files name their images; of several files each names those by it."""

    def read_all(files: Sequence[Path], log: FindingLog) -> list[LabelledImage]:
        split = next(name for name in splits if splits[name] == files)
        places = [Place(wanted.root, file, split, beside_file=len(files) > 1) for file in files]
        return [image for place in places for image in read(place, log)]

    return read_labelled(wanted, format, splits, read_all)


@dataclass
class Objects:
    """The objects of one image, as they are collected."""

    name: str  # of the image, as the annotations write it
    classes: list[str] = field(default_factory=list)
    boxes: list[Sequence[float]] = field(default_factory=list)  # four numbers each, as written
    numbers: list[int] = field(default_factory=list)
    ignore: list[bool] = field(default_factory=list)
    declared_hw: tuple[int, int] | None = None

    def add(self, class_name: str, box: Sequence[float], number: int | None = None, ignore: bool = False) -> None:
        """class_name: "" where it is not known; number: in the file, by default counted in the image."""
        self.classes.append(class_name)
        self.boxes.append(box)
        self.numbers.append(len(self.classes) if number is None else number)
        self.ignore.append(ignore)


class ImageCollector:
    """Objects in the order of a file -> its images; what names no image, or the same as another name, is reported."""

    def __init__(
        self,
        place: Place,
        wanted: Wanted,
        log: FindingLog,
        *,
        form: BoxForm = "xyxy",  # what the four numbers of a box are
        in_fractions: bool = False,  # of the image; corners then
        unit: str = "object",
        spell: Spell = spellings,
        are_addresses: bool = False,  # the folders in names are those of a server
        may_be_part: bool = False,  # of a published data set, whose annotations are those of all its images
    ) -> None:
        self._place, self._wanted, self._log = place, wanted, log
        self._form, self._in_fractions, self._unit = form, in_fractions, unit
        self._spell, self._are_addresses, self._may_be_part = spell, are_addresses, may_be_part
        self._of_name: dict[str, Objects] = {}
        self._left_out: set[str] = set()  # file names

    def leave_out(self, written: str) -> None:
        """The file names the image of this name, but says nothing of it that can be used."""
        self._left_out |= {parts[-1] for one in self._spell(written) if (parts := path_parts(one))}

    def of(self, written: str) -> Objects:
        """What is collected for the image of this name."""
        name = written.replace("\\", "/").removeprefix("./")
        return self._of_name.setdefault(name, Objects(name))

    def images(self) -> list[LabelledImage]:
        """The images that are there; those that are not, and those beside them that are not named, go to the log."""
        self._name_the_only_class()
        place, folders, names = self._place, ImageFolders(), [name for name in self._of_name if len(name) <= MAX_PATH]
        for name in (name for name in self._of_name if len(name) > MAX_PATH):
            message = "The name is longer than any file's; the image was left out."
            self._log.add("missing-image", "dropped", f"{place.shown}, {one_line(name)}", message, image=name)
        paths = find_files(
            place.image_dirs(self._wanted.image_dir),
            names,
            folders,
            self._log,
            place.shown,
            root=self._wanted.image_dir or place.top,
            split=place.split,
            spell=self._spell,
            are_addresses=self._are_addresses,
            may_be_part=self._may_be_part,
        )
        report_unlisted(paths, folders, self._log, place.shown, known=self._left_out)
        found = zip(paths, names, strict=True)
        return list(self._labelled((path, self._of_name[name]) for path, name in found if path is not None))

    def _name_the_only_class(self) -> None:
        count = sum(len(found.classes) for found in self._of_name.values())
        if count and not any(any(found.classes) for found in self._of_name.values()):
            for found in self._of_name.values():
                found.classes = [_ONLY_CLASS] * len(found.classes)
            message = f'No box states a class; all are of one, which is called "{_ONLY_CLASS}".'
            self._log.add("missing-classes", "repaired", self._place.shown, message, count=count)

    def _labelled(self, images: Iterable[tuple[Path, Objects]]) -> Iterator[LabelledImage]:
        for path, found in images:
            where = f"{self._place.shown}, {one_line(found.name)}"
            if len(found.classes) > MAX_OBJECTS:
                report_crowd(self._log, where, len(found.classes))
            named = [i for i, name in enumerate(found.classes) if name][:MAX_OBJECTS]
            for i, name in enumerate(found.classes):
                if not name:
                    place = f"{where}, {self._unit} {found.numbers[i]}"
                    self._log.add("missing-name", "dropped", place, "The object has no class; it was left out.")
            boxes = np.array([found.boxes[i] for i in named], dtype=np.float64).reshape(-1, 4)
            yield LabelledImage(
                path,
                where,
                [found.classes[i] for i in named],
                corners_of(boxes, self._form),
                [found.numbers[i] for i in named],
                in_fractions=self._in_fractions,
                form=self._form,
                declared_hw=found.declared_hw,
                ignore=np.array([found.ignore[i] for i in named], dtype=bool),
                unit=self._unit,
            )

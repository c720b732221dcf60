"""The label file of each image of a YOLO data set, images that have none, and label files whose image is gone."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from ddetr.datasets.annotations import FindingLog, are_most
from ddetr.datasets.image_files import ImageFolders, folded, walk_folders
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.yolo.layout import has_rows
from ddetr.datasets.readers.yolo.paths import label_file, names_of_labels, usual_folder
from ddetr.printable import one_line

_NEAR = 1000  # folders in which lost label files are looked for
# By folded names, None where two are alike: the exact label names of a folder's images, and each place's text files.
_Folded = tuple[dict[str, str | None], list[tuple[Path, dict[str, str | None]]]]


def label_folders(folder: Path) -> list[Path]:
    """The folders that may hold the label files of a folder of images, the usual one first."""
    places = [usual_folder(folder)]
    for depth, part in ((1, folder.name), (2, folder.parent.name)):  # train_images -> train_labels
        head, tail = folder.parts[: len(folder.parts) - depth], folder.parts[len(folder.parts) - depth + 1 :]
        places += [Path(*head, name, *tail) for name in names_of_labels(part)]
    places += [folder, folder / "labels", folder.parent / "labels" / folder.name]
    found = [places[0]]
    for place in dict.fromkeys(places):  # a Mac's disk has one folder for labels and Labels
        if place.is_dir() and not any(other.is_dir() and place.samefile(other) for other in found):
            found.append(place)
    return found


class LabelFiles:
    """Finds the label file of each image; `report` says what is doubtful about what was found."""

    def __init__(self) -> None:
        self._folders = ImageFolders()
        self._places: dict[Path, list[Path]] = {}  # folder of images -> where their labels may be
        self._folded: dict[Path, _Folded] = {}  # folder of images
        self._bare: dict[Path, Counter[str]] = {}  # folder of images -> their names without any image suffix
        self._taken: dict[Path, dict[str, list[Path]]] = defaultdict(
            lambda: defaultdict(list)
        )  # folder -> name -> images
        self._used: dict[Path, Counter[Path]] = defaultdict(Counter)  # folder of images -> folder of labels -> images
        self._twice: dict[Path, list[tuple[Path, Path]]] = defaultdict(list)
        self._without: dict[Path, list[Path]] = defaultdict(list)  # folder of images -> those without

    @property
    def folders(self) -> list[Path]:
        """Where label files were found."""
        return sorted({place for used in self._used.values() for place in used})

    def find(self, image: Path) -> Path | None:
        """The label file of an image; None where it has none."""
        folder = image.parent
        if folder not in self._places:
            self._places[folder] = label_folders(folder)
        names = (f"{image.stem}.txt", f"{image.name}.txt")
        found = [place / name for place in self._places[folder] for name in names if name in self._folders.names(place)]
        found = found or self._alike(image, names) or self._of_two_suffixes(image)
        if not found:
            self._without[folder].append(image)
            return None
        file = found[0]
        self._used[folder][file.parent] += 1
        self._taken[file.parent][file.name].append(image)
        if len(found) > 1:
            self._twice[folder].append((file, found[1]))
        return file

    def _alike(self, image: Path, names: Sequence[str]) -> list[Path]:
        """Label files whose names differ from these only in capitals or in how accents are composed. Where two files
        or two images are alike in that, none: nobody knows whose is whose."""
        if image.parent not in self._folded:
            self._folded[image.parent] = self._fold(image.parent)
        stems, places = self._folded[image.parent]
        if stems.get(folded(names[0]), names[0]) != names[0]:
            return []
        words = [folded(name) for name in names]
        return [place / file for place, texts in places for word in words if (file := texts.get(word))]

    def _of_two_suffixes(self, image: Path) -> list[Path]:
        """The a.txt of an a.png.jpg, as converters and hidden suffixes leave them, where no other image is a."""
        if not is_image_name(image.stem):
            return []
        if image.parent not in self._bare:
            self._bare[image.parent] = Counter(map(_bare, self._folders.images(image.parent)))
        if self._bare[image.parent][_bare(image.name)] > 1:
            return []
        name = f"{_bare(image.name)}.txt"
        return [place / name for place in self._places[image.parent] if name in self._folders.names(place)]

    def _fold(self, folder: Path) -> _Folded:
        stems = _by_folded({f"{os.path.splitext(name)[0]}.txt" for name in self._folders.images(folder)})
        places = []
        for place in self._places[folder]:
            texts = (name for name in self._folders.names(place) if name.lower().endswith(".txt"))
            places.append((place, _by_folded(texts)))
        return stems, places

    def report(self, sources: Sequence[Path], others: Sequence[Path], log: FindingLog) -> None:
        """Adds what was found about the images asked for.

        sources: the folders that were read whole; others: those of the other splits.
        """
        num_found = sum(sum(places.values()) for places in self._used.values())
        num_without = sum(map(len, self._without.values()))
        if not num_found and num_without:
            first = next(iter(self._without.values()))[0]
            message = (
                f"No image has a label file (the first was expected at {label_file(first)}); all would be background."
            )
            if (other := _elsewhere(first)) is not None:
                message += f" There is {one_line(other)}: if it is a label file, put it and the others there."
            log.add("no-label-files", "refused", str(first.parent), message, count=num_without)
        elif num_without:
            for folder, images in self._without.items():
                total = len(images) + sum(self._used[folder].values())
                used = self._used[folder].most_common(1)  # where those of the others are
                expected = used[0][0] / f"{images[0].stem}.txt" if used else label_file(images[0])
                message = (
                    f"{len(images):,} of {total:,} images have no label file and count as background, such as "
                    f"{_few(image.name for image in images)} (expected {expected})."
                )
                log.add("image-without-labels", "note", str(folder), message, count=len(images))
        for folder, used in self._used.items():
            if len(used) > 1:
                parts = ", ".join(f"{count:,} in {place}" for place, count in sorted(used.items()))
                message = f"The label files of its images lie in more than one place: {parts}; all were used."
                log.add("labels-in-two-places", "note", str(folder), message)
        for folder, pairs in self._twice.items():
            used_file, other = pairs[0]
            message = f"{len(pairs):,} images have two label files, such as {used_file} (used) and {other} (not used)."
            log.add("two-label-files", "note", str(folder), message, count=len(pairs))
        for place, taken in self._taken.items():
            shared = [images for images in taken.values() if len(images) > 1]
            if shared:
                names = _few(image.name for image in shared[0])
                message = f"{len(shared):,} label files serve several images each, such as those of {names}."
                log.add("shared-label-file", "note", str(place), message, count=len(shared))
        self._report_orphans(sources, others, log)

    def _report_orphans(self, sources: Sequence[Path], others: Sequence[Path], log: FindingLog) -> None:
        """Label files whose image is gone. A text file with no row of numbers in it (classes.txt, notes) is none."""
        images_of: dict[Path, list[Path]] = defaultdict(list)  # folder of labels -> of images
        for folder, used in self._used.items():
            for place in used:
                images_of[place].append(folder)
        for source in sources:
            place = usual_folder(source)
            if place != source and place.is_dir():
                for parent in {folder for folder, names in walk_folders(place) if names} - images_of.keys():
                    images_of[parent].append(source / parent.relative_to(place))
        for place, folders in images_of.items():
            texts = (name for name in self._folders.names(place) if name.lower().endswith(".txt"))
            names = (name for name in texts if not is_clutter(name))
            alone = sorted(name for name in names if name not in self._taken[place])
            known = self._image_words(folders) if alone else set()
            orphans = [name for name in alone if folded(name[:-4]) not in known and has_rows(place / name)]
            if not orphans:
                continue
            message = f"{len(orphans):,} label files have no image and were not used, such as {_few(orphans)}."
            other = self._other_file(orphans[0], folders)
            if other:
                message += f" There is {one_line(other)}, which is not read as an image."
            with_image = len(self._taken[place]) + sum(folded(name[:-4]) in known for name in alone)
            is_whole = any(
                folder.is_relative_to(source) for folder in folders for source in sources
            )  # else a list says
            are_lost = is_whole and are_most(len(orphans), with_image) and not self._are_of(others, orphans, folders)
            action = "dropped" if are_lost else "note"
            log.add("labels-without-image", action, str(place), message, count=len(orphans))

    def _are_of(self, others: Sequence[Path], orphans: Sequence[str], folders: Sequence[Path]) -> bool:
        """Whether label files are those of images of other splits, as where each split has the labels of all; not where
        images of several splits have one name."""
        words = self._image_words([folder for source in others for folder, names in walk_folders(source) if names])
        return all(folded(name[:-4]) in words for name in orphans) and words.isdisjoint(self._image_words(folders))

    def _image_words(self, folders: Sequence[Path]) -> set[str]:
        """What label files of the images in these folders may be called, without `.txt`, folded."""
        images = (name.lower() for folder in folders for name in self._folders.images(folder))
        return {word for name in images for word in (name, os.path.splitext(name)[0])}

    def _other_file(self, name: str, folders: Sequence[Path]) -> Path | None:
        same = (folder / other for folder in folders for other in sorted(self._folders.names(folder)))
        return next(
            (file for file in same if folded(file.stem) == folded(name[:-4]) and file.suffix.lower() != ".txt"), None
        )


def _bare(name: str) -> str:
    """A file name without its image suffixes: a for a.png.jpg."""
    while is_image_name(name):
        name = os.path.splitext(name)[0]
    return name


def _by_folded(names: Iterable[str]) -> dict[str, str | None]:
    """Names by what they are folded to; None where two are alike."""
    found: dict[str, str | None] = {}
    for name in names:
        found[folded(name)] = None if folded(name) in found else name
    return found


def _elsewhere(image: Path) -> Path | None:
    """The text file called as an image is, in one of the next folders around it."""
    wanted = folded(f"{image.stem}.txt")
    top = Path(os.path.commonpath([label_file(image).parent, image.parent]))
    walk = islice(os.walk(top if top != image.parent else top.parent), _NEAR)
    return next((Path(folder, name) for folder, _, files in walk for name in files if folded(name) == wanted), None)


def _few(names: Iterable[str]) -> str:
    return ", ".join(one_line(os.path.basename(name), 60) for name in islice(names, 3))

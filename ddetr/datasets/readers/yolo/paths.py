"""What the paths in a YOLO data set's description and in its lists of images stand for.

They come from other machines, are relative to the wrong folder, or say `images/train` for `train/images`. Each is
looked for in ever wider ways, but never cut so short that it could be another one: what is nowhere is said.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, folded, folders_in, listed_lines, report_all_missing
from ddetr.datasets.readers.file_names import last_parts, spellings
from ddetr.printable import one_line
from ddetr.untrusted import MAX_PATH, MAX_PATH_PARTS
from ddetr.wording import did_you_mean, first_few

FEW = 8  # names of a folder in a message, and missing paths of which it is said what is there instead
_FEW_FOLDERS = 50  # below a description's own that may hold the whole set; among more it is none
_NOTHING = ("", "~", "null")
_JOINED = re.compile(r"[^/]\.(jpe?g|png|bmp|webp|tiff?)", re.IGNORECASE)  # in a folder: an image before it
_IMAGES = re.compile(r"jpegimages|images?|imgs?", re.IGNORECASE)

Parts = tuple[str, ...]


def given(value: Any) -> bool:
    """Whether a value of a description says anything."""
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in _NOTHING)


class Places:
    """Where the paths of a description are looked for: from its `path`, from its own folder and the one around that,
    without their leading `..`, with `images` on the other side, and at last by shorter ends, for they may come from
    another machine."""

    def __init__(self, file: Path, content: dict[str, Any], *, wide: bool = False) -> None:
        self.content = content
        self.wide = wide  # the folder around the file's own counts too, which may hold another data set
        self.home = file.absolute().parent
        stated = str(content["path"]).replace("\\", "/") if given(content.get("path")) else "."
        homes = list(dict.fromkeys((self.home, file.resolve().parent)))  # the file may be a link
        self.bases = [home / stated for home in homes]
        if stated not in (".", "./"):
            self.bases.append(Path(os.path.expanduser(stated)).absolute())
        self.bases += homes
        self._below = [place for place in folders_in(self.home) if place.name.lower() != "labels"][:_FEW_FOLDERS]

    def find(self, text: str, needed: int) -> Path | None:
        """What a path stands for; needed: so many of its last parts tell it from the others."""
        if len(_parts(text)) > MAX_PATH_PARTS or len(text) > MAX_PATH:
            return None
        found = next((place for place in self._tries(text, needed) if _exists(place)), None)
        if found is None or os.path.dirname(os.path.realpath(found)) == os.path.realpath(found):
            return None  # or the whole machine, which nobody means
        return _tidy(found)

    def _tries(self, text: str, needed: int) -> Iterator[Path]:
        parts, bare = _parts(text), bare_parts(text)
        bases = (
            [*self.bases, self.home.parent] if self.wide or parts[:1] in (("..",), (self.home.name,)) else self.bases
        )
        if text.startswith("~"):
            yield Path(os.path.expanduser(text))
        for names in (parts, bare):
            yield from (base.joinpath(*names) for base in bases if names or not parts)
        for other in _images_elsewhere(bare):
            yield from (base.joinpath(*other) for base in bases)
        for i in range(1, len(bare) - needed + 1):
            yield from (base.joinpath(*bare[i:]) for base in dict.fromkeys((self.bases[0], self.home)))
        below = [place for place in self._below if _exists(place.joinpath(*bare))]
        if len(below) == 1:  # the whole set lies one folder deeper than its description
            yield below[0].joinpath(*bare)
        yield from filter(None, (_in_other_capitals(base, bare) for base in self.bases))

    def said_of(self, text: str, split: str, needed: int) -> str:
        """A sentence on a path that is nowhere: what is there instead."""
        bare = bare_parts(text)
        folder = next((base for base in self.bases if base.is_dir()), self.home)
        if len(bare) > 1 and not _exists(folder / bare[0]):  # of another machine: from where the paths meet
            known = (i for i in range(1, min(len(bare) - 1, MAX_PATH_PARTS)) if _exists(folder / bare[i]))
            bare = bare[next(known, len(bare) - needed) :]
        while len(bare) > 1 and len(bare) <= MAX_PATH_PARTS and _exists(folder / bare[0]):
            folder, bare = folder / bare[0], bare[1:]
        names = [place.name for place in folders_in(folder)]
        if bare and bare[0].lower().endswith(".txt"):
            names = sorted(name for name in ImageFolders().names(folder) if name.lower().endswith(".txt"))
        names = names or sorted(ImageFolders().names(folder))
        near = did_you_mean(bare[0], names) if bare else ""
        has = one_line(first_few(names, FEW), 400)
        return f"{split} names {one_line(text)}, which is not there: {folder} has {has}{near}. Correct the path."


def listed_images(listing: Path, bases: Sequence[Path], log: FindingLog) -> Iterator[Path]:
    """The images that a text file lists, one a line; those that are nowhere go to the log.

    bases: the folders that its paths may start from, beside its own.
    """
    homes = [listing.parent, *bases]
    lines = [_meant(line.strip().strip("\"'")) for line in listed_lines(listing)]
    split = [(number, *line.rpartition("/")[::2]) for number, line in enumerate(lines, 1) if line]
    homes = list(dict.fromkeys(_tidy(home) for home in homes))
    parents = {parent: bare_parts(parent) for _, parent, _ in split}
    needed = shortest_ends(parents.values()) if len(set(parents.values())) > 1 else {}
    folders = ImageFolders()
    candidates = {
        text: [place for place in _folders_meant(text, bare, homes, needed.get(bare, 0), folders) if _exists(place)]
        for text, bare in parents.items()
    }
    joined = {parent for parent in parents if _JOINED.search(parent) and not any((h / parent).is_dir() for h in homes)}
    absent = []
    for number, parent, name in split:
        if parent in joined:
            message = (
                f"It lists several images without a line break: {one_line(f'{parent}/{name}', 80)}. Write one a line."
            )
            log.add("joined-lines", "refused", f"{listing.name}, line {number}", message)
            continue
        places = (folders.find(folder / one) for one in (name, *last_parts(name)) for folder in candidates[parent])
        found = next(filter(None, places), None)
        if found is not None:
            yield found
        else:
            absent.append((number, f"{parent}/{name}" if parent else name))
    if split and len(absent) == len(split):
        cure = "Put them where the list says, or correct it."
        report_all_missing(log, str(listing), absent[0][1], len(split), homes, cure)
        return
    for number, name in absent:
        message = f"There is no {one_line(listing.parent / name)}; the image was left out."
        log.add("missing-image", "dropped", f"{listing.name}, line {number}", message, image=name)


def _meant(line: str) -> str:
    """A line as a path; of an address without its host and query."""
    return spellings(line)[0] if "://" in line or "?" in line else line.replace("\\", "/")


def _folders_meant(text: str, bare: Parts, homes: list[Path], needed: int, folders: ImageFolders) -> Iterator[Path]:
    """Where the images of a list may be of which the list says that they are in `text`, in the order of trust."""
    if len(bare) > MAX_PATH_PARTS:
        return
    for home in homes:
        yield home.joinpath(*_parts(text))
    for i in range(len(bare) - needed + 1):
        end = bare[i:]
        yield from (home.joinpath(*end) for home in homes if not end or end[0] in folders.names(home))
    yield from filter(None, (_in_other_capitals(home, bare) for home in homes))
    if (decoded := unquote(text)) != text:
        yield from _folders_meant(decoded, bare_parts(decoded), homes, needed, folders)


# ---- paths -----------------------------------------------------------------------------------------------------------


def shortest_ends(paths: Iterable[Parts]) -> dict[Parts, int]:
    """How many of its last parts tell each path from all the others, at least one: cut shorter, `valid/images` would be
    any folder called images."""
    ordered = sorted({path[::-1] for path in paths})
    shared = [0, *(len(os.path.commonprefix([a, b])) for a, b in zip(ordered, ordered[1:])), 0]
    return {path[::-1]: min(len(path), max(shared[i : i + 2]) + 1) for i, path in enumerate(ordered)}


def _parts(text: str) -> Parts:
    return PurePosixPath(text.strip().replace("\\", "/")).parts


def bare_parts(text: str) -> Parts:
    return tuple(part for part in _parts(text) if part not in ("..", ".", "/", "//", "~"))


def _images_elsewhere(bare: Parts) -> Iterator[Parts]:
    """`images/train` for `train/images`, and the reverse."""
    for i, part in enumerate(bare):
        if part.lower() == "images":
            if i > 0:
                yield (*bare[: i - 1], part, bare[i - 1], *bare[i + 1 :])
            if i + 1 < len(bare):
                yield (*bare[:i], bare[i + 1], part, *bare[i + 2 :])


def _in_other_capitals(base: Path, parts: Parts) -> Path | None:
    """The one folder whose path differs from this only in capitals, or in how accents are composed, which make no
    difference where it was written."""
    if not parts or len(parts) > MAX_PATH_PARTS:
        return None
    for part in parts:
        alike = [place for place in folders_in(base) if folded(place.name) == folded(part)]
        if len(alike) != 1:
            return None
        base = alike[0]
    return base


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name that is too long for any file, or that none can have
        return False


def _tidy(place: Path) -> Path:
    """Without `..`, where that is the same place. Links stay: labels lie beside a link, not beside its target."""
    tidy = Path(os.path.normpath(place))
    return tidy if tidy == place or (_exists(tidy) and os.path.samefile(tidy, place)) else place


# ---- label files -----------------------------------------------------------------------------------------------------


def label_file(image: Path) -> Path:
    """Where an image's label file belongs: the last `images` of its path becomes `labels`, else beside it."""
    return usual_folder(image.parent) / f"{image.stem}.txt"


def usual_folder(folder: Path) -> Path:
    """The folder of the label files of a folder of images: that with `labels` for its last `images`, or for an earlier
    one, where names of images begin with folders called so too."""
    parts = folder.parts
    usual = folder
    for i in reversed(range(len(parts))):
        if parts[i].lower() == "images":
            places = [Path(*parts[:i], labels, *parts[i + 1 :]) for labels in written_like(parts[i], "labels")]
            if found := next((place for place in places if place.is_dir()), None):
                return found
            usual = Path(*parts[:i], "labels", *parts[i + 1 :]) if usual == folder else usual
    return usual


# ---- names of folders ------------------------------------------------------------------------------------------------


def names_of_labels(images: str) -> list[str]:
    """What the folder of the labels may be called where that of the images is called so: train_labels of train_images;
    nothing where the name doesn't speak of images."""
    word = _IMAGES.search(images)
    if word is None:
        return []
    return [images[: word.start()] + labels + images[word.end() :] for labels in written_like(word[0], "labels")]


def written_like(word: str, other: str) -> Sequence[str]:
    """`other` written as `word` is (Labels beside Images), then in small letters and in capitals."""
    alike = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return list(dict.fromkeys([alike, other, other.capitalize(), other.upper()]))

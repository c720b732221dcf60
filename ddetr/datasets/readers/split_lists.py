"""Text files beside a data set that list the images of its splits (train.txt, val.txt), where its format doesn't say
that they do: they are used where all images lie in one split, and each is in one of the lists."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from ddetr.datasets.annotations import Annotations, Finding, ImageTable, split_error
from ddetr.datasets.image_files import folded, folders_in, listed_lines
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.reader import Reader, Wanted, looked_at_once
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.wording import first_few

_LISTED = ("train", "trainval", "val", "valid", "test")  # text files that may list the images of splits
_FOLDERS = 10  # of a folder, in which they are looked for


@dataclass(frozen=True)
class _Listed:
    """A split that a list makes of all images."""

    whole: Any  # where they lie, as the format's reader says it
    listing: Path


def lists_beside(root: Path) -> list[Path]:
    """The text files, in a folder and up to two below, that are called as lists of splits are."""
    inner = folders_in(root)[:_FOLDERS]
    places = (root, *inner, *(sub for folder in inner for sub in folders_in(folder)[:_FOLDERS]))
    return [file for place in places for name in _LISTED if (file := place / f"{name}.txt").is_file()]


def with_lists(reader: Reader) -> Reader:
    """The reader, which uses the lists that lie beside a data set of one split."""

    @looked_at_once
    def splits(path: Path) -> Mapping[str, Any]:
        own = reader.splits(path)
        is_told = len(own) != 1 or path.is_file() or reader.description(path) is not None
        lists = {} if is_told else {file.stem: file for file in lists_beside(path)}
        if {"train", "val"} <= lists.keys():
            lists.pop("trainval", None)  # both once more
        if len(lists) < 2:
            return own
        (name,) = own
        try:
            whole = reader.read(Wanted(path, name, name, check_images=False))
            parts = dict(zip(lists, _parted(whole, path, list(lists.values())), strict=True))
        except InputError:
            return own  # reading it will say what is wrong
        parts = {split: part for split, part in parts.items() if any(i is not None for i in part)}  # not of notes
        are_used = "train" in parts and len(parts) > 1 and _are_all(list(parts.values()), whole)
        return {split: _Listed(own[name], lists[split]) for split in parts} if are_used else own

    def read(wanted: Wanted) -> Annotations:
        found = splits(wanted.path)
        if not any(isinstance(one, _Listed) for one in found.values()):
            return reader.read(wanted)
        if wanted.split not in found:
            raise split_error(wanted.path, wanted.split, list(found))
        (name,) = reader.splits(wanted.path)
        whole = reader.read(replace(wanted, split=name, train_split=name))
        lists = [one.listing for one in found.values()]
        (part,) = _parted(whole, wanted.path, [found[wanted.split].listing])
        images = ImageTable.from_records(whole.images[i] for i in dict.fromkeys(part) if i is not None)
        message = f"{first_few([one_line(file) for file in lists], 3)} say which of the images are in which split."
        said = Finding("lists-used", "note", str(wanted.path), message, len(lists))
        refused = tuple(finding for finding in whole.findings if finding.action == "refused")
        findings = (*whole.findings, said) if wanted.is_training else refused
        name = f"{wanted.path.name}/{wanted.split}"
        return replace(whole, name=name, images=images, findings=findings, split=wanted.split)

    return replace(reader, splits=splits, read=read)


def _parted(whole: Annotations, root: Path, lists: Sequence[Path]) -> list[list[int | None]]:
    """The index of the image that each line of each list names, None of a line that names none."""
    of_end: dict[str, int | None] = {}  # by every end of its path, with and without suffix; None where two have it
    for i, image in enumerate(whole.images):
        for end in _ends(os.path.relpath(image.path, root)):
            of_end[end] = None if end in of_end else i
    found = []
    for listing in lists:
        tries = (_ends(line) for line in listed_lines(listing) if line.strip())
        found.append([next((i for end in ends if (i := of_end.get(end)) is not None), None) for ends in tries])
    return found


def _are_all(parts: Sequence[Sequence[int | None]], whole: Annotations) -> bool:
    """Whether each image is in one list, and what else they name can only be images that are left out."""
    known = sorted(i for part in parts for i in set(part) if i is not None)
    num_unknown = sum(part.count(None) for part in parts)
    return known == list(range(len(whole.images))) and num_unknown <= whole.num_images_left_out


def _ends(written: str) -> list[str]:
    """The ends of the path of an image, as people may write it, the longest first: with its suffix, then without."""
    path = PurePosixPath(folded(written.strip().replace("\\", "/")))
    names = dict.fromkeys([path.name, path.stem] if is_image_name(path.name) else [path.name])
    folders = [part for part in path.parts[:-1] if part not in (".", "..", "/")]
    return ["/".join([*folders[k:], name]) for name in names for k in range(len(folders) + 1)]

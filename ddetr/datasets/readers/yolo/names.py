"""The files that name the classes of a YOLO data set where its description doesn't, or beside it: labelling tools leave
a `classes.txt` in each folder of labels, in an order of their own, and Label Studio a `notes.json`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from ddetr.datasets.annotations import Category, FindingLog, alike
from ddetr.datasets.image_files import listed_lines
from ddetr.datasets.readers.json_files import json_text
from ddetr.datasets.readers.yolo.rows import class_id_of
from ddetr.errors import InputError
from ddetr.untrusted import MAX_LABEL_BYTES, SHOWN_NAME, one_line, parse_json, shortened

_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "classes.names", "images/classes.txt")
_NOTES = "notes.json"


def name_files(root: Path, folders: Iterable[Path]) -> list[Path]:
    """The lists of classes that are there, the data set's own first; folders: those of its label files."""
    places = (*(root / name for name in _NAME_FILES), *(folder / "classes.txt" for folder in folders))
    return [place for place in dict.fromkeys(places) if place.is_file()]


def listed_classes(file: Path) -> list[Category]:
    """The classes of a list with a name in each line; `InputError` where it can't be read."""
    return [Category(i, word.strip()) for i, word in enumerate(listed_lines(file)) if word.strip()]


def report_other_order(
    own: Sequence[Category], ids: Collection[int], source: Path, root: Path, folders: Iterable[Path], log: FindingLog
) -> None:
    """Adds the files that give classes that have objects other ids.

    Args:
        own: the classes as they were read, out of the file `source`.
        ids: of the classes that have objects.
        root, folders: as for `name_files`.
    """
    mine = {category.category_id: category.name for category in own}
    for file in (*name_files(root, folders), root / _NOTES):
        if file == source or not file.is_file():
            continue
        listed = _noted(file) if file.name == _NOTES else listed_classes(file)
        theirs = {category.category_id: category.name for category in listed}
        known = {alike(name) for name in mine.values()}, {alike(name) for name in theirs.values()}
        for class_id in sorted(ids & mine.keys() & theirs.keys()):
            pair = alike(mine[class_id]), alike(theirs[class_id])
            if pair[0] != pair[1] and (pair[0] in known[1] or pair[1] in known[0]):
                message = (
                    f"It calls class {class_id} {shortened(theirs[class_id], SHOWN_NAME)!r}, and "
                    f"{one_line(source.name, 60)} calls it {shortened(mine[class_id], SHOWN_NAME)!r}: the same names "
                    "have other ids. Take the file that is wrong away, or correct it."
                )
                log.add("names-in-other-order", "refused", str(file), message)
                break


def _noted(file: Path) -> list[Category]:
    """The classes of Label Studio's notes; [] where it has none."""
    try:
        content = parse_json(json_text(file, MAX_LABEL_BYTES, FindingLog(), str(file)), str(file))
    except InputError:
        return []
    entries = content.get("categories") if isinstance(content, dict) else None
    found = []
    for entry in entries if isinstance(entries, list) else []:
        class_id = class_id_of(str(entry.get("id"))) if isinstance(entry, dict) else None
        if class_id is not None and isinstance(entry.get("name"), str):
            found.append(Category(class_id, entry["name"]))
    return found

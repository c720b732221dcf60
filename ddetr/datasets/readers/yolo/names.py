"""The classes of a YOLO data set: of its description, of lists beside its labels, or of the rows alone.

Labelling tools leave a `classes.txt` in each folder of labels, in an order of their own, and Label Studio a
`notes.json`: where they disagree about a class that has objects, nothing tells which is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Category, FindingLog, alike
from ddetr.datasets.image_files import listed_lines, visible
from ddetr.datasets.readers.json_files import json_text
from ddetr.datasets.readers.yolo.paths import Places, given
from ddetr.datasets.readers.yolo.rows import Class, class_id_of
from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, one_line, shortened
from ddetr.untrusted import MAX_CLASSES, MAX_LABEL_BYTES, MAX_PATH, parse_json

_LISTS = ("classes.txt", "obj.names", "classes.names", "_darknet.labels")  # the last is Roboflow's
_NOTES = "notes.json"
_MOST_FOLDERS = 50  # of labels, in which such a file is looked for
_LIST_MARKS = " []\"'"


def class_lists(root: Path, folders: Iterable[Path]) -> list[Path]:
    """The files with a class name in each line that are there; folders: those of label files."""
    places = dict.fromkeys([root, root / "labels", root / "images", *islice(folders, _MOST_FOLDERS)])
    return [place / name for place in places for name in _LISTS if (place / name).is_file()]


def classes_of(file: Path | None, content: dict[str, Any], lists: Sequence[Path], log: FindingLog) -> list[Category]:
    """The classes of the description `file`, or of the longest of `lists`; [] where nothing names them."""
    if file is None:
        return max(map(_listed, lists), key=len, default=[])
    names = content.get("names")
    if isinstance(names, list) and names and all(isinstance(item, dict) and len(item) == 1 for item in names):
        names = {key: name for item in names for key, name in item.items()}  # `- 0: cat`
    if isinstance(names, dict) and names:
        categories = [Category(_key(key, names, file), _name(name, file)) for key, name in names.items()]
        categories.sort(key=lambda category: category.category_id)
    elif isinstance(names, list) and names:
        categories = [Category(i, _name(name, file)) for i, name in enumerate(names)]
    elif isinstance(names, str) and given(names):
        categories = _from_text(names, file, content)
    else:
        return _counted(content, file)
    count = class_id_of(str(content.get("nc", "")))
    if count is not None and count != len(categories):
        message = f"nc is {count}, but there are {len(categories)} names; the names were used."
        log.add("nc-differs", "note", file.name, message)
    return categories


def _key(key: Any, names: dict[str, Any], file: Path) -> int:
    class_id = class_id_of(key) if isinstance(key, str) else None
    if class_id is None:
        raise InputError(f"{file}: the keys of names must be class ids (0, 1, ...), found {one_line(list(names))}")
    return class_id


def _name(name: Any, file: Path) -> str:
    if not isinstance(name, str):
        raise InputError(f"{file}: a class name must be a word, found {one_line(name)}")
    return name


def _from_text(names: str, file: Path, content: dict[str, Any]) -> list[Category]:
    """`names: data/obj.names`, a file of one name a line; or the names themselves, with commas or lines between."""
    words = [word.strip(_LIST_MARKS) for word in names.replace(",", "\n").splitlines()]
    listing = Places(file, content).find(names, 1) if len(words) == 1 and len(names) < MAX_PATH else None
    if listing is None and file.suffix.lower() == ".data":
        beside = visible(file.parent.glob("*.names"), file.parent)
        if len(beside) != 1:
            raise InputError(
                f"{file} names {one_line(names)} as the list of classes, which is not there; correct the path"
            )
        listing = beside[0]
    if listing is not None and listing.is_file():
        return _listed(listing)
    return [Category(i, word) for i, word in enumerate(word for word in words if word)]


def _counted(content: dict[str, Any], file: Path) -> list[Category]:
    """Classes without names, as many as `nc` says."""
    if not given(content.get("nc")):
        raise InputError(f"{file} has neither names (a list or a map) nor nc (a number of classes)")
    count = class_id_of(str(content["nc"]))
    if count is None or not 0 <= count <= MAX_CLASSES:
        shown = one_line(content["nc"])
        raise InputError(f"{file}: nc must be a number of classes, at most {MAX_CLASSES:,}, got {shown}")
    return [Category(i, f"class_{i}") for i in range(count)]


def ids_of_names(named: Sequence[Category]) -> dict[str, int]:
    """Class ids by the names of classes, as `alike` makes them; without those that two classes have."""
    count = Counter(alike(category.name) for category in named)
    return {key: category.category_id for category in named if count[key := alike(category.name)] == 1}


def classes_of_rows(classes: Collection[Class], root: Path, log: FindingLog) -> list[Category]:
    """The classes that the rows speak of, where no file names any: by the ids that are there, or by the words."""
    ids = [class_id for class_id in classes if not isinstance(class_id, str)]
    words = sorted(word for word in classes if isinstance(word, str))
    if words and not ids:
        message = "No file names the classes; the words that stand in the rows in place of ids are their names."
        log.add("unnamed-classes", "note", str(root), message)
        return [Category(i, word) for i, word in enumerate(words)]
    most = max(ids, default=-1)
    if most >= MAX_CLASSES:
        message = f"No file names the classes, and a class id is above {MAX_CLASSES:,}; correct it, or add a data.yaml."
        log.add("too-many-classes", "refused", str(root), message)
        most = max((class_id for class_id in ids if class_id < MAX_CLASSES), default=-1)
    if most >= 0:
        message = (
            "No file names the classes; they are called by their ids, class_0 and so on. Name them in a data.yaml."
        )
        log.add("unnamed-classes", "note", str(root), message)
    return [Category(i, f"class_{i}") for i in range(most + 1)]


def check_names(own: list[Category], ids: Collection[Class], where: str, log: FindingLog) -> None:
    """What the names and the ids in use say about each other."""
    if any("\ufffd" in category.name for category in own):
        message = "Class names hold characters that are not UTF-8; save the file as UTF-8."
        log.add("names-not-utf8", "note", where, message)
    if (
        own
        and [category.category_id for category in own] == list(range(len(own)))
        and set(ids) == set(range(1, len(own) + 1))
    ):
        message = (
            f"The class ids in the label files are 1 to {len(own)}, those of the names 0 to {len(own) - 1}: each name "
            "would stand for its neighbour. Write the names with their ids (names: {1: ..., 2: ...}), or correct the "
            "ids."
        )
        log.add("ids-from-one", "refused", where, message)


def report_other_lists(
    own: Sequence[Category],
    ids: Collection[Class],
    file: Path | None,
    lists: Sequence[Path],
    root: Path,
    log: FindingLog,
) -> None:
    """Adds the lists that name a class otherwise that has objects.

    Args:
        own: the classes as they were read.
        ids: of the classes that have objects.
        file: the description. Beside one, only lists that give its names other ids count: lists of other names may
            be of other languages, or of the labelling tool's own.
        lists: `class_lists`.
        root: of the data set.
    """
    mine = {category.category_id: category.name for category in own}
    source = one_line(file.name, 60) if file else "another list"
    for place in (*lists, root / _NOTES):
        theirs = {category.category_id: category.name for category in _listed(place)}
        if file is not None and not mine.keys() & set(ids) <= theirs.keys():
            continue  # the labels were not written by it: it is older
        known = {alike(name) for name in mine.values()}, {alike(name) for name in theirs.values()}
        for class_id in sorted(mine.keys() & theirs.keys() & set(ids)):
            pair = alike(mine[class_id]), alike(theirs[class_id])
            if pair[0] != pair[1] and (file is None or pair[0] in known[1] or pair[1] in known[0]):
                message = (
                    f"It calls class {class_id} {shortened(theirs[class_id], SHOWN_NAME)!r}, and {source} calls it "
                    f"{shortened(mine[class_id], SHOWN_NAME)!r}: which is right can't be known. Take the file that is "
                    "wrong away, or correct it."
                )
                log.add("class-lists-differ", "refused", str(place), message)
                break


def _listed(file: Path) -> list[Category]:
    """The classes of a list, or of Label Studio's notes; [] where there are none."""
    if file.name != _NOTES:
        return [Category(i, word.strip()) for i, word in enumerate(listed_lines(file)) if word.strip()]
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

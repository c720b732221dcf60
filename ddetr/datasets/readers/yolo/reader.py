"""YOLO: one text file of `class x y w h` lines per image, `labels/` mirroring `images/`, classes in a `data.yaml`.

layout.py finds the images, labels.py the label file of each, rows.py reads its lines; here they become a
split, with the classes that the YAML, Darknet's `obj.names` or a `classes.txt` name. `category_id` is the id in the
label files. An image without a label file is background, as YOLO defines it, and counted; polygons (segmentation,
oriented boxes) become the box around them.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import (
    Annotations,
    Category,
    FindingLog,
    match_categories,
    split_error,
    unlike_training,
    whole,
)
from ddetr.datasets.image_files import IMAGES_OPTION, listed_lines, visible
from ddetr.datasets.readers.reader import LabelledImage, Wanted, check_unnamed, table_of
from ddetr.datasets.readers.yolo.labels import LabelFiles
from ddetr.datasets.readers.yolo.layout import description, image_paths, yolo_file, yolo_splits
from ddetr.datasets.readers.yolo.paths import Places, given
from ddetr.datasets.readers.yolo.rows import RowReader, class_id_of
from ddetr.errors import InputError
from ddetr.untrusted import MAX_CLASSES, MAX_LABEL_BYTES, MAX_PATH, one_line, read_text

_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names", "classes.names", "images/classes.txt")
_LIST_MARKS = " []\"'"


def read_yolo(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    if wanted.image_dir is not None:
        raise InputError(f"{IMAGES_OPTION} is for other formats: a YOLO data set names its images in its data.yaml")
    path, split = wanted.path, wanted.split
    splits = yolo_splits(path)
    if split not in splits:
        raise split_error(path, split, list(splits))
    log = FindingLog()
    file = yolo_file(path)
    content = description(file) if file else {}
    root = path if path.is_dir() else path.absolute().parent
    root = root.absolute()
    for sentence in splits[split].missing:
        log.add("missing-path", "refused", file.name if file else str(root), sentence)
    images = image_paths(splits[split], log)
    if not images and splits[split].sources:
        looked = ", ".join(str(source) for source in splits[split].sources)
        log.add("no-images", "refused", looked, "There is no image in it; correct the split's path.")

    reader = RowReader(log, _keypoint_numbers(content, file), polygons=content.get("task") in ("segment", "obb"))
    labels = LabelFiles()
    rows = []
    for image in images:
        label = labels.find(image)
        lines = _read_lines(label, log) if label is not None else []
        rows.append(reader.read(lines, _shown(label or image, root)))
    labels.report([source for source in splits[split].sources if source.is_dir()], log)
    keypoints = reader.settle(root)
    own = _names(root, file, content, log) or _numbered(reader.ids, root, log)
    _check_names(own, reader.ids, str(file or root), log)

    categories = tuple(own if wanted.categories is None else wanted.categories)
    label_of = match_categories(own, categories, log, str(root), by_id=False)
    label_of_id = {category.category_id: label_of[i] for i, category in enumerate(own)}
    name_of_id = {category.category_id: category.name for category in own}

    def said_of(class_id: int) -> str:
        if class_id not in name_of_id:
            return f"Class id {class_id} has no name"
        return unlike_training(name_of_id[class_id], categories)

    found = []
    for image, read in zip(images, rows, strict=True):
        ids, boxes, numbers = reader.boxes(read, keypoints)
        found.append(
            LabelledImage(image, read.where, ids, boxes, numbers, in_fractions=True, form="cxcywh", unit="line")
        )
    del rows, images
    num_of_id = Counter(class_id for image in found for class_id in image.classes)
    unnamed = {class_id: count for class_id, count in num_of_id.items() if class_id not in name_of_id}
    check_unnamed(unnamed, num_of_id.total(), str(file or root), log)
    table = table_of(found, label_of_id, log, said_of, wanted.boxes)
    return whole(f"{root.name}/{split}", "yolo", categories, table, log)


def _read_lines(file: Path, log: FindingLog) -> list[str]:
    try:
        return read_text(file, MAX_LABEL_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"The label file can't be read ({error}); the image would silently become background. Restore it."
        log.add("unreadable-labels", "refused", str(file), message)
        return []


def _keypoint_numbers(content: dict[str, Any], file: Path | None) -> int | None:
    """How many numbers a keypoint has, by `kpt_shape: [keypoints, numbers]`; None where there are no keypoints."""
    shape = content.get("kpt_shape")
    if not given(shape):
        return None
    if isinstance(shape, list) and len(shape) == 2 and shape[1] in ("2", "3"):
        return int(shape[1])
    raise InputError(f"{file}: kpt_shape must be [number of keypoints, 2 or 3], got {one_line(shape)}")


# ---- classes ---------------------------------------------------------------------------------------------------------


def _names(root: Path, file: Path | None, content: dict[str, Any], log: FindingLog) -> list[Category]:
    """The classes of the description, or of a `classes.txt`; [] where nothing names them."""
    if file is None:
        return next((_listed(root / name) for name in _NAME_FILES if (root / name).is_file()), [])
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


def _listed(file: Path) -> list[Category]:
    words = listed_lines(file)
    return [Category(i, word.strip()) for i, word in enumerate(words) if word.strip()]


def _counted(content: dict[str, Any], file: Path) -> list[Category]:
    """Classes without names, as many as `nc` says."""
    if not given(content.get("nc")):
        raise InputError(f"{file} has neither names (a list or a map) nor nc (a number of classes)")
    count = class_id_of(str(content["nc"]))
    if count is None or not 0 <= count <= MAX_CLASSES:
        shown = one_line(content["nc"])
        raise InputError(f"{file}: nc must be a number of classes, at most {MAX_CLASSES:,}, got {shown}")
    return [Category(i, f"class_{i}") for i in range(count)]


def _numbered(ids: set[int], root: Path, log: FindingLog) -> list[Category]:
    """Classes by the ids that are there, where no file names any."""
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


def _check_names(own: list[Category], ids: set[int], where: str, log: FindingLog) -> None:
    """What the names and the ids in use say about each other."""
    if any("\ufffd" in category.name for category in own):
        message = "Class names hold characters that are not UTF-8; save the file as UTF-8."
        log.add("names-not-utf8", "note", where, message)
    if (
        own
        and [category.category_id for category in own] == list(range(len(own)))
        and ids == set(range(1, len(own) + 1))
    ):
        message = (
            f"The class ids in the label files are 1 to {len(own)}, those of the names 0 to {len(own) - 1}: each name "
            "would stand for its neighbour. Write the names with their ids (names: {1: ..., 2: ...}), or correct the "
            "ids."
        )
        log.add("ids-from-one", "refused", where, message)


def _shown(file: Path, root: Path) -> str:
    return str(file).removeprefix(f"{root}{os.sep}")

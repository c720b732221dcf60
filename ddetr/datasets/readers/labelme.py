"""LabelMe: one JSON file per image, beside it or in a folder of its own; a folder named after a split is one.

Rectangles, polygons, circles, turned boxes and masks become the box around them; shapes of one `group_id` and label are
one object in several pieces. Lines and points have no box. Classes are the labels in the training split, sorted.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import counted, folders_in
from ddetr.datasets.readers.json_files import json_text
from ddetr.datasets.readers.label_folders import (
    ImagesBeside,
    box_around,
    label_files,
    named_splits,
    report_images,
    split_folders,
    without_shared,
)
from ddetr.datasets.readers.reader import (
    WHOLE,
    LabelledImage,
    Wanted,
    looked_at_once,
    number,
    read_labelled,
    size_hw,
)
from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, one_line, shortened
from ddetr.untrusted import MAX_LABEL_BYTES, MAX_OBJECTS, open_file, parse_json
from ddetr.wording import first_few

_SAMPLED = 8  # files of a folder whose words say what it holds
_NO_BOX = ("line", "linestrip", "point", "points")
_NUMBERED = re.compile(r"(.*\D)[-_ ](\d{1,6})")
_NO_CLASS = ("__ignore__", "_background_")  # LabelMe's own words in lists of labels


@looked_at_once
def labelme_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its folders of JSON files; {} where there is no LabelMe data set."""
    if path.is_file():
        return {}
    if _holds_labelme(path):
        return {WHOLE: [path]}
    found = []
    for sub in folders_in(path):
        inner = split_folders([sub], _holds_labelme) or split_folders(folders_in(sub), _holds_labelme)
        found += [(name, folder) for name, folders in inner.items() for folder in folders]
    return named_splits(found)


def _holds_labelme(folder: Path) -> bool:
    return any(_is_labelme(file) for file in label_files(folder, ".json", _SAMPLED))


def _is_labelme(file: Path) -> bool:
    """By the words at either end: the image may lie in between, as text."""
    try:
        with open_file(file) as stream:
            ends = stream.read(1 << 14)
            stream.seek(max(0, stream.seek(0, 2) - (1 << 14)))
            ends += stream.read()
    except OSError:
        return False
    if b'"imagePath"' in ends:
        return b'"shapes"' in ends or b'"imageData"' in ends
    return b'"shapes"' in ends and b'"points"' in ends  # of tools that know the image by the file's name


def read_labelme(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    splits = labelme_splits(wanted.path)
    beside = ImagesBeside(wanted.path, wanted.image_dir)
    known = {f.stem for folders in splits.values() for folder in folders for f in label_files(folder, ".json")}

    def read(folders: Sequence[Path], log: FindingLog) -> list[LabelledImage]:
        contents = {}
        for file in counted([file for folder in folders for file in label_files(folder, ".json")]):
            content = _load(file, str(file.relative_to(wanted.path)), log)
            if content is not None:
                contents[file] = content
        images = without_shared(_images(wanted.path, contents, beside, log), log)
        report_images(log, wanted, beside, list(contents), images, known)
        _report_numbered(images, wanted.path.name, log)
        return images

    return read_labelled(wanted, "labelme", splits, read)


def _report_numbered(images: Sequence[LabelledImage], where: str, log: FindingLog) -> None:
    """Labels that end in numbers from 0 or 1 on, each at most once in an image: before it had group_id, LabelMe's users
    numbered the objects of an image so."""
    numbered: dict[str, dict[int, str]] = {}
    for name in sorted({name for image in images for name in image.classes}):
        if match := _NUMBERED.fullmatch(name):
            numbered.setdefault(match[1], {})[int(match[2])] = name
    repeated = {name for image in images for name, count in Counter(image.classes).items() if count > 1}
    for stem, names in numbered.items():
        alike, first = list(names.values()), min(names)
        if len(alike) > 1 and first <= 1 and max(names) - first + 1 == len(names) and repeated.isdisjoint(alike):
            message = (
                f"{first_few(map(one_line, alike), 4)} are classes of their own. If the numbers tell the objects of an "
                f"image apart, all are of one class: call them {one_line(stem)}."
            )
            log.add("numbered-labels", "note", where, message, count=len(alike))


def _load(file: Path, where: str, log: FindingLog) -> dict[str, Any] | None:
    """Of a file only what is used: the image in it may have megabytes."""
    try:
        content = parse_json(json_text(file, MAX_LABEL_BYTES, log, where), "the file")
    except InputError as error:
        log.add("malformed-json", "dropped", where, f"It can't be read ({error}); the image was left out.")
        return None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        log.add("other-json", "note", where, 'It has no list of "shapes": it is no annotation of an image.')
        return None
    keys = ("shapes", "imagePath", "imageHeight", "imageWidth")
    return {key: content.get(key) for key in keys} | {"has_image": bool(content.get("imageData"))}


def _images(
    root: Path, contents: dict[Path, dict[str, Any]], beside: ImagesBeside, log: FindingLog
) -> Iterator[LabelledImage]:
    for file, content in contents.items():
        where = str(file.relative_to(root))
        stated = str(content["imagePath"] or "")
        by_name = beside.find_own(file)
        by_statement = beside.find_stated(file, stated) or beside.find(file, stated)
        if by_statement is not None and by_statement.stem == file.stem:
            by_name = by_statement  # of a.jpg and a.png the one that it names
        path = by_statement or by_name
        if path is None:
            message = f"There is no image {shortened(stated, SHOWN_NAME)!r}; it was left out."
            if content["has_image"]:
                message += " It is inside the file (imageData): `labelme_export_json`, in older versions "
                message += "`labelme_json_to_dataset`, writes it."
            log.add("missing-image", "dropped", where, message, image=file.name)
            continue
        if by_name not in (None, path):
            message = (
                f"It states the image {one_line(stated)}, and {by_name.name} is there too: whose shapes these are "
                "can't be known; correct imagePath, or rename the file."
            )
            log.add("image-path-differs", "refused", where, message)
            continue
        classes, boxes, numbers = _objects(content["shapes"], where, log)
        declared_hw = size_hw(content["imageHeight"], content["imageWidth"])
        yield LabelledImage(path, where, classes, boxes, numbers, declared_hw=declared_hw, unit="shape")


def _objects(shapes: list[Any], where: str, log: FindingLog) -> tuple[list[str], np.ndarray, list[int]]:
    """Labels, corners (n, 4), and the number of each object's first shape."""
    if len(shapes) > MAX_OBJECTS:
        report_crowd(log, where, len(shapes))
    found: dict[Any, list[list[float]]] = {}
    numbers: list[int] = []
    for i, shape in enumerate(shapes[:MAX_OBJECTS], 1):
        shape = shape if isinstance(shape, dict) else {}
        label, kind, place = str(shape.get("label") or "").strip(), shape.get("shape_type"), f"{where}, shape {i}"
        if not label or label in _NO_CLASS:
            message = f"The shape's label is {shortened(label, SHOWN_NAME)!r}, which is no class; it was left out."
            log.add("missing-name", "dropped" if not label else "note", place, message)
            continue
        box = None if kind in _NO_BOX else _box(shape.get("points"), kind)
        if box is None:
            message = f"The shape is a {one_line(kind or 'polygon', 40)} that has no area, no box; it was left out."
            log.add("missing-box", "dropped", place, message)
            continue
        group = shape.get("group_id")
        key = (label, group) if isinstance(group, int | str) else (label, None, i)
        if key not in found:
            numbers.append(i)
        found.setdefault(key, []).append(box)
    pieces = [key for key, boxes in found.items() if len(boxes) > 1]
    if pieces:
        message = (
            f"{len(pieces)} objects have several shapes, whose label and group_id are equal, such as "
            f"{one_line(pieces[0][0])} of group {one_line(pieces[0][1])}; the box around all is used. If they are "
            "objects of their own, give each another group_id, or none."
        )
        log.add("grouped-shapes", "note", where, message, count=len(pieces))
    boxes = [box_around([corner for box in one for corner in (box[:2], box[2:])]) for one in found.values()]
    return [key[0] for key in found], np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _box(points: Any, kind: Any) -> list[float] | None:
    """None for what is no shape with an area. NaN where a coordinate is no number."""
    if not isinstance(points, list) or not all(isinstance(point, list) and len(point) == 2 for point in points):
        return None
    if len(points) < (2 if kind in ("rectangle", "circle", "mask") else 3):
        return None
    xy = [[number(value) for value in point] for point in points]
    if kind == "circle":  # its centre, and a point of its rim
        radius = math.dist(xy[0], xy[1])
        xy = [[xy[0][0] - radius, xy[0][1] - radius], [xy[0][0] + radius, xy[0][1] + radius]]
    return box_around(xy)

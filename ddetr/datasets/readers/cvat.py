"""CVAT for images 1.1: one `annotations.xml` with `<image>` elements, the images in `images/` or `images/SUBSET/`, or
where a person has put them.

Subsets are the splits. Boxes turned by an angle, polygons, ellipses and masks become the box around them; lines, points
and cuboids have none. Several exports, each in its folder or beside each other, are a split each. Classes are the
labels in the training split, sorted.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from xml.etree import ElementTree

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import (
    IMAGES_OPTION,
    ImageFolders,
    folded,
    folders_in,
    report_all_missing,
    report_unlisted,
)
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.file_names import images_below
from ddetr.datasets.readers.label_folders import (
    box_around,
    box_around_turned,
    label_files,
    named_splits,
    split_folders,
    without_shared,
)
from ddetr.datasets.readers.reader import WHOLE, LabelledImage, Wanted, number, read_labelled, size_hw, split_kind
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_LABEL_BYTES, MAX_OBJECTS, decode_xml, parse_xml, read_bytes, xml_root_name

_Source = tuple[Path, str | None]  # the XML file, and the subset of it: None for all of it
_NO_SUBSET = "default"  # CVAT's name for it


def cvat_splits(path: Path) -> dict[str, list[_Source]]:
    """Split name -> XML file and subset; {} where there is no CVAT data set.

    Raises:
        InputError: it is one that can't be read, or one of a video.
    """
    files = [path] if path.suffix.lower() == ".xml" and path.is_file() else label_files(path, ".xml")
    files = [file for file in files if xml_root_name(file) == "annotations"]
    if len(files) > 1:
        return named_splits([(file.stem, (file, None)) for file in files if _load(file)])
    file = files[0] if files else None
    if file is None:
        exports = split_folders(folders_in(path), lambda sub: xml_root_name(sub / "annotations.xml") == "annotations")
        files = [(name, sub / "annotations.xml") for name, folders in exports.items() for sub in folders]
        found = [(name, inner) for name, inner in files if _load(inner)]
        if len(found) != 1 or split_kind(found[0][0]):
            return named_splits([(name, (inner, None)) for name, inner in found])
        file = found[0][1]
    subsets = sorted({image.get("subset") or _NO_SUBSET for image in _load(file)})
    return {name: [(file, name)] for name in subsets} if len(subsets) > 1 else {WHOLE: [(file, None)]}


def _load(file: Path) -> list[ElementTree.Element]:
    stat = file.stat()
    return _parse(file, stat.st_mtime_ns, stat.st_size)


@lru_cache(maxsize=64)  # of a whole data set it takes seconds, and each look asks again
def _parse(file: Path, *_version: int) -> list[ElementTree.Element]:
    try:
        tree = parse_xml(decode_xml(read_bytes(file, MAX_LABEL_BYTES))[0])
    except ElementTree.ParseError as error:
        raise InputError(f"{file}: broken XML: {error}; export it again") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {error}") from None
    images = tree.findall("image")
    if not images and tree.find("track") is not None:
        raise InputError(
            f"{file} is an export of a video (CVAT for video 1.1: tracks); export the task as CVAT for images 1.1 or "
            "COCO 1.0, with its images"
        )
    return images


def read_cvat(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    splits = cvat_splits(wanted.path)

    def read(sources: Sequence[_Source], log: FindingLog) -> list[LabelledImage]:
        known = {_name(image).name for sources_of in splits.values() for file, _ in sources_of for image in _load(file)}
        images = [image for file, subset in sources for image in _images(file, subset, wanted, known, log)]
        return without_shared(images, log)

    annotations = read_labelled(wanted, "cvat", splits, read)
    _parse.cache_clear()  # a run of days needs no tree of a million elements
    return annotations


def _images(
    file: Path, subset: str | None, wanted: Wanted, known: Collection[str], log: FindingLog
) -> Iterator[LabelledImage]:
    """known: names of images that any of the files has."""
    all_names = Counter(_name(image) for image in _load(file))
    times = Counter(name.name for name in all_names.elements())
    elements = [image for image in _load(file) if subset in (None, image.get("subset") or _NO_SUBSET)]
    home, folders = file.parent, ImageFolders()
    homes = [home] if wanted.path in (home, file) else [home, home.parent]  # annotations/annotations.xml
    shared = [place for above in homes for place in (above / "images", above)]
    names, paths = [_name(image) for image in elements], []
    for image, name in zip(elements, names, strict=True):
        own = image.get("subset") or _NO_SUBSET
        places = [place for above in homes for place in (above / "images" / own, above / own)]
        places += shared if all_names[name] == 1 else []
        if wanted.image_dir:
            places = [wanted.image_dir]
        tries = [place / name for place in places] + [place / name.name for place in places if times[name.name] == 1]
        paths.append(next((found for one in tries if (found := folders.find(one)) and is_image_name(found.name)), None))
    if None in paths:  # in folders that a person made: those of one name alone
        elsewhere = images_below(wanted.image_dir or home, wanted.split, {folded(path.stem) for path in paths if path})
        for i, name in enumerate(names):
            if paths[i] is None and name.name and times[name.name] == 1:
                paths[i] = elsewhere.find(name.name, any_suffix=False)
    for image, name, path in zip(elements, names, paths, strict=True):
        where = f"{file.name}, image {one_line(name)}"
        if path is None and all_names[name] > 1:
            message = (
                f"{all_names[name]} images have this name: which file is which can't be known. Export their tasks one "
                "by one, or give each a subset of its own in CVAT."
            )
            log.add("ambiguous-image", "refused", where, message)
            continue
        if path is None:
            message = "Its image was not found in images/; it was left out."
            log.add("missing-image", "dropped", where, message, image=str(name))
            continue
        classes, boxes, numbers = _objects(image, where, log)
        declared_hw = size_hw(image.get("height"), image.get("width"))
        yield LabelledImage(path, where, classes, boxes, numbers, declared_hw=declared_hw, unit="shape")
    used = set(filter(None, paths))
    if elements and not used:
        cure = f"Export them too, or name their folder by {IMAGES_OPTION}."
        looked = [wanted.image_dir or home / "images"]
        report_all_missing(log, str(file), str(_name(elements[0])), len(elements), looked, cure)
    report_unlisted(used, folders, log, file.name, known=known)


def _name(image: ElementTree.Element) -> PurePosixPath:
    """An image's path as CVAT shows it, below a folder of images."""
    parts = PurePosixPath((image.get("name") or "").replace("\\", "/")).parts
    return PurePosixPath(*(part for part in parts if part not in ("/", "..") and "\0" not in part))


def _objects(image: ElementTree.Element, where: str, log: FindingLog) -> tuple[list[str], np.ndarray, list[int]]:
    """Labels, corners (n, 4), and the number of each shape."""
    classes, boxes, numbers = [], [], []
    if len(image) > MAX_OBJECTS:
        report_crowd(log, where, len(image))
    for i, shape in enumerate(image[:MAX_OBJECTS], 1):
        if shape.tag == "tag":  # of the whole image
            continue
        box, label = _box(shape), (shape.get("label") or "").strip()
        if box is None or not label:
            message = f"The <{one_line(shape.tag, 40)}> has no {'label' if box else 'box'}; it was left out."
            log.add("missing-name" if box else "missing-box", "dropped", f"{where}, shape {i}", message)
            continue
        classes.append(label)
        boxes.append(box)
        numbers.append(i)
    return classes, np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _box(shape: ElementTree.Element) -> list[float] | None:
    """The box around a shape; None for one without an area."""

    def values(*keys: str) -> list[float]:
        return [number(shape.get(key)) for key in keys]

    angle = math.radians(number(shape.get("rotation") or 0))
    if shape.tag == "box":
        x1, y1, x2, y2 = values("xtl", "ytl", "xbr", "ybr")
        return box_around_turned((x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, angle) if angle else [x1, y1, x2, y2]
    if shape.tag == "polygon":
        points = [point.split(",") for point in (shape.get("points") or "").split(";")]
        return box_around([[number(value) for value in point] for point in points if len(point) == 2])
    if shape.tag == "mask":
        left, top, width, height = values("left", "top", "width", "height")
        return [left, top, left + width, top + height]
    if shape.tag == "ellipse":
        cx, cy, rx, ry = values("cx", "cy", "rx", "ry")
        half_w = math.hypot(rx * math.cos(angle), ry * math.sin(angle))
        half_h = math.hypot(rx * math.sin(angle), ry * math.cos(angle))
        return [cx - half_w, cy - half_h, cx + half_w, cy + half_h]
    return None

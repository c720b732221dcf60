"""Pascal VOC: one XML file per image, splits in `ImageSets/Main/*.txt`.

Classes are the names in the training split, sorted; `category_id` is label + 1 (VOC has no ids of its own). Coordinates
are used as written: VOC's devkit counts pixels from 1 with both corners included, most tools that write its format
count from 0, and nothing in a file tells which; the difference is one pixel. `difficult` objects are ignored, not
dropped; turned boxes and polygons become the box around them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import counted, read_headers
from ddetr.datasets.readers.label_folders import (
    ImagesBeside,
    Source,
    box_around,
    box_around_turned,
    report_images,
    report_in_no_list,
    without_shared,
)
from ddetr.datasets.readers.reader import (
    LabelledImage,
    Wanted,
    is_true,
    number,
    read_labelled,
    size_hw,
)
from ddetr.datasets.readers.voc.layout import layout, listed_files, xml_files
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_LABEL_BYTES, MAX_OBJECTS, decode_xml, parse_xml, read_bytes

_BARE_AMPERSAND = re.compile(r"&(?!(?:[A-Za-z]\w{0,30}|#[0-9]{1,7}|#x[0-9A-Fa-f]{1,6});)")
_FEW_OTHERS, _SHARE_OF_OTHERS = 5, 0.2  # XML files that state another image: fewer are slips of renaming
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))


def read_voc(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    root, splits = layout(wanted.path)
    beside = ImagesBeside(root, wanted.image_dir)
    folders = {source.folder for sources in splits.values() for source in sources}
    known = {file.stem for folder in folders for file in xml_files(folder)}

    def read(sources: Sequence[Source], log: FindingLog) -> list[LabelledImage]:
        files = [f for s in sources for f in (xml_files(s.folder) if s.listing is None else listed_files(s, log))]
        trees = {file: tree for file in counted(files) if (tree := _parse(file, root, log)) is not None}
        images = without_shared(_images(root, trees, beside, log), log)
        report_images(log, wanted, beside, list(trees), images, known)
        if wanted.is_training and all(source.listing for source in sources):
            _report_unlisted(splits, beside, log)
        return images

    return read_labelled(wanted, "voc", splits, read)


def _report_unlisted(splits: dict[str, list[Source]], beside: ImagesBeside, log: FindingLog) -> None:
    """Counts the images with an XML file that are in none of the lists."""
    sources = [source for some in splits.values() for source in some]
    listed = {file for source in sources if source.listing for file in listed_files(source, FindingLog())}
    for folder in sorted({source.folder for source in sources}):
        left = [file for file in xml_files(folder) if file not in listed and beside.find_own(file) is not None]
        report_in_no_list(log, folder, [file.stem for file in left], [source.listing for source in sources])


def _parse(file: Path, root: Path, log: FindingLog) -> ElementTree.Element | None:
    where = str(file.relative_to(root))
    try:
        text, other_encoding = decode_xml(read_bytes(file, MAX_LABEL_BYTES))
        tree = _tree(text, where, log)
    except ElementTree.ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        message = f"The XML is broken ({reason} at line {line}, column {column}); the image was left out."
        log.add("malformed-xml", "dropped", f"{where}, line {line}", message)
        return None
    except (OSError, ValueError, LookupError) as error:
        log.add("malformed-xml", "dropped", where, f"The file can't be read ({error}); the image was left out.")
        return None
    if other_encoding is not None:
        message = f"The text is not in the encoding that the file states; it was read as {other_encoding}."
        log.add("xml-encoding", "repaired", where, message)
    return tree


def _tree(text: str, where: str, log: FindingLog) -> ElementTree.Element:
    """The root element, the names of all in small letters and without namespaces; raises as `parse_xml`."""
    try:
        tree = parse_xml(text)
    except ElementTree.ParseError as error:
        escaped = _BARE_AMPERSAND.sub("&amp;", text)
        try:
            if escaped == text:
                raise error
            tree = parse_xml(escaped)
        except ElementTree.ParseError:
            raise error from None
        log.add("bare-ampersand", "repaired", where, "It has an & where XML wants &amp;; it was read as the letter.")
    for element in tree.iter():
        if not element.tag.islower() or "}" in element.tag:
            element.tag = element.tag.rpartition("}")[2].lower()
    return tree


def _images(
    root: Path, trees: dict[Path, ElementTree.Element], beside: ImagesBeside, log: FindingLog
) -> Iterator[LabelledImage]:
    others: list[_OtherName] = []
    taken: set[Path] = set()  # images of all files
    for file, tree in trees.items():
        where = str(file.relative_to(root))
        if tree.tag != "annotation":
            message = f"Expected <annotation>, found <{one_line(tree.tag)}>: it is no annotation of an image."
            log.add("other-xml", "note", where, message)
            continue
        path = _find_image(file, tree, beside, where, others)
        if path is None:
            message = "Its image was not found in JPEGImages, images or beside it; it was left out."
            log.add("missing-image", "dropped", where, message, image=file.name)
            continue
        taken.add(path)
        names, difficult, boxes, numbers = _objects(tree, where, log)
        declared_hw = _declared_hw(tree)
        if declared_hw is None:
            log.add("missing-size", "repaired", where, "It states no image size; it was read from the image.")
        yield LabelledImage(path, where, names, boxes, numbers, declared_hw=declared_hw, ignore=difficult)
    _report_other_names(others, taken - {one.own for one in others}, len(trees), log)


class _OtherName(NamedTuple):
    """An XML file that states another image than the one that is called as it is; both are there."""

    where: str
    stated: str
    its: Path
    own: Path
    declared_hw: tuple[int, int] | None


def _report_other_names(others: Sequence[_OtherName], settled: set[Path], total: int, log: FindingLog) -> None:
    """Stops where many files state each another image, and the stated sizes don't show that the images of their own
    names are meant. settled: images of files that state no other: of those, others are copies."""
    crossed = [one for one in others if one.its not in settled]
    if len(crossed) >= max(_FEW_OTHERS, _SHARE_OF_OTHERS * total) and len({one.its for one in crossed}) == len(crossed):
        headers = read_headers([path for one in crossed for path in (one.own, one.its)])
        known = [None if isinstance(header, InputError) else header.upright_hw for header in headers]
        telling = [
            (one.declared_hw == own, one.declared_hw == its)
            for one, own, its in zip(crossed, known[::2], known[1::2], strict=True)
            if own != its
        ]
        of_own, of_its = (sum(fits) for fits in zip(*telling, strict=True)) if telling else (0, 0)
        if of_own < _FEW_OTHERS or of_its:
            first = crossed[0]
            message = (
                f"{len(crossed):,} of {total:,} XML files state the file name of another image that is there, such as "
                f"{one_line(first.stated)} for {one_line(first.own.name)}: whose boxes these are can't be known. If "
                "those of the image that is called as the XML file, take <filename> out; if not, rename the XML files."
            )
            log.add("file-names-differ", "refused", first.where, message, count=len(crossed))
            return
    for one in others:
        message = (
            f"It states the file name {one_line(one.stated)}, and {one_line(one.its.name)} is there; "
            f"{one_line(one.own.name)} has its own name and was taken."
        )
        log.add("file-name-differs", "note", one.where, message)


def _find_image(
    file: Path, tree: ElementTree.Element, beside: ImagesBeside, where: str, others: list[_OtherName]
) -> Path | None:
    """By the XML's own name first: <filename> is often wrong after a data set has been renamed. Where it is that of
    another image, that goes to `others`."""
    stated = _text(tree, "filename")
    by_statement = beside.find(file, stated)
    if by_statement is not None and by_statement.stem == file.stem:  # of a.jpg and a.png the one that it names
        return by_statement
    by_name = beside.find_own(file)
    if by_name is None or by_statement in (None, by_name):
        return by_name or by_statement
    others.append(_OtherName(where, stated, by_statement, by_name, _declared_hw(tree)))
    return by_name


def _objects(
    tree: ElementTree.Element, where: str, log: FindingLog
) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """Names, difficult (n,) bool, corners as written (n, 4), and the number of each object that has a box."""
    names, difficult, boxes, numbers = [], [], [], []
    objects = list(tree.iter("object"))
    elsewhere = 0 if objects else sum(1 for _ in tree.iter("bndbox"))
    if elsewhere:
        message = f"It has {elsewhere} bndbox, but no <object> around them; they were left out."
        log.add("missing-object", "dropped", where, message, count=elsewhere)
    total = sum(max(1, len(obj.findall("bndbox"))) for obj in objects)
    if total > MAX_OBJECTS:
        report_crowd(log, where, total)
    for i, obj in enumerate(objects[:MAX_OBJECTS], 1):
        place = f"{where}, object {i}"
        name = _text(obj, "name")
        if is_true(_text(obj, "deleted")):
            log.add("deleted-object", "note", place, "The object is marked as deleted; it was left out.")
            continue
        box = _box(obj, place, log)
        if box is None:
            written = obj.find("bndbox")
            wanted, found = ("bndbox, robndbox or polygon", obj) if written is None else ("xmin ... ymax", written)
            listed = ", ".join(f"<{one_line(child.tag, 40)}>" for child in found[:12]) or "nothing"
            message = f"The {found.tag} has no {wanted}, but {listed}; it was left out."
            log.add("missing-box", "dropped", place, message)
            continue
        if not name:
            log.add("missing-name", "dropped", place, "The object has no name; it was left out.")
            continue
        others = [corners for other in obj.findall("bndbox")[1:] if (corners := _corners(other)) is not None]
        if others:
            message = f"It has {1 + len(others)} boxes; each was read as an object of its own."
            log.add("several-boxes", "repaired", place, message)
        for one in [box, *others][: MAX_OBJECTS - len(names)]:
            names.append(name)
            difficult.append(is_true(_text(obj, "difficult")))
            boxes.append(one)
            numbers.append(i)
    return names, np.array(difficult, dtype=bool), np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _box(obj: ElementTree.Element, place: str, log: FindingLog) -> list[float] | None:
    """An object's corners: its <bndbox>, or what is around its turned box (radians) or its polygon."""
    box, turned, polygon = (obj.find(key) for key in ("bndbox", "robndbox", "polygon"))
    if box is not None:
        return _corners(box)
    if turned is not None:
        around = box_around_turned(*(number(_text(turned, key)) for key in ("cx", "cy", "w", "h", "angle")))
    elif polygon is not None:  # <x1>, <y1>, <x2>, ...; or <pt> of <x> and <y>
        xs, ys = (
            [number(point.text) for point in polygon.iter() if re.fullmatch(rf"{axis}\d*", point.tag)] for axis in "xy"
        )
        around = box_around(list(zip(xs, ys, strict=True)) if len(xs) == len(ys) else [])
    else:
        return None
    log.add("box-from-shape", "note", place, "It has a turned box or a polygon, no bndbox; the box around it was used.")
    return around


def _corners(box: ElementTree.Element) -> list[float] | None:
    """None where it has elements of other names, such as a width: which they mean isn't known."""
    found = {child.tag for child in box}
    keys = next((keys for keys in _CORNERS if found.issuperset(keys)), _CORNERS[0])
    return [number(_text(box, key)) for key in keys] if found.intersection(keys) or not found else None


def _declared_hw(tree: ElementTree.Element) -> tuple[int, int] | None:
    size = tree.find("size")
    return None if size is None else size_hw(_text(size, "height"), _text(size, "width"))


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()

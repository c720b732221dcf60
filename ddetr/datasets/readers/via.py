"""VGG Image Annotator (VIA) 1 and 2: a project, or the annotations that it exports as JSON or CSV.

Rectangles stay; polygons, polylines with an area, circles and ellipses become the box around them, and points have
none. The class is the one attribute that regions have, or that which is called as a class is; regions without any are
all of one class. VIA doesn't tell an image without objects from one that nobody has labelled: it counts as background.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.readers.json_files import file_splits, json_text, start_of
from ddetr.datasets.readers.label_folders import box_around, box_around_ellipse
from ddetr.datasets.readers.named_images import ImageCollector, Place, read_files
from ddetr.datasets.readers.reader import (
    WHOLE,
    LabelledImage,
    Wanted,
    is_true,
    looked_at_once,
    number,
    split_kind,
)
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_ANNOTATION_BYTES, parse_json, read_csv
from ddetr.wording import first_few

_FILES = ("*/via_region_data.json", "*.json", "annotations/*.json", "*/*.json", "*.csv", "annotations/*.csv", "*/*.csv")
_WORDS = ((b'"_via_img_metadata"',), (b'"shape_attributes"',), (b'"regions"', b'"file_attributes"'))
_MOST_COPIES = 4  # files that may say the same
_COLUMNS = ("region_shape_attributes", "region_attributes")
# What the attribute with the class is called, the surer first.
_CLASS = (("class", "classname", "classes", "label", "labels", "category"), ("name", "type", "object"))
# Image -> shape and attributes of each region; None for a shape that can't be read, which is said where it is read.
_Entries = dict[str, list[tuple[Mapping[str, Any] | None, Mapping[str, Any]]]]


@looked_at_once
def via_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its files; {} where there is none. VIA knows no splits: files, folders called train and val do.
    Of a project and its export, which say the same, the first is read."""
    splits = file_splits(path, _FILES, _is_via)
    files = [file for files in splits.values() for file in files]
    if 1 < len(files) <= _MOST_COPIES and not any(map(split_kind, splits)):
        images = [_images_of(file) for file in files]
        if images[0] is not None and all(other == images[0] for other in images):
            return {WHOLE: files[:1]}
    return splits


def _images_of(file: Path) -> Any:
    """What a JSON file says of its images; None for another, or one that can't be read."""
    if file.suffix.lower() != ".json":
        return None
    with suppress(InputError):
        content = parse_json(json_text(file, MAX_ANNOTATION_BYTES, FindingLog(), file.name), str(file))
        return content.get("_via_img_metadata", content) if isinstance(content, dict) else None
    return None


def _is_via(file: Path) -> bool:
    start = start_of(file) if file.suffix.lower() in (".json", ".csv") else b""
    if file.suffix.lower() == ".csv":
        return b"region_shape_attributes" in start.split(b"\n")[0]
    return start[:1] == b"{" and any(all(word in start for word in words) for words in _WORDS)


def read_via(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""

    def read(place: Place, log: FindingLog) -> list[LabelledImage]:
        images = ImageCollector(place, wanted, log, unit="region")
        is_table = place.file.suffix.lower() == ".csv"
        entries, attributes = _rows(place, log) if is_table else _entries(place, log)
        class_of = _classes(entries, attributes, place.shown, log)
        num_empty = 0
        for name, regions in entries.items():
            image = images.of(name)
            for i, (shape, values) in enumerate(regions, 1):
                if shape is None:
                    continue
                where = f"{place.shown}, {one_line(name)}, region {i}"
                box = _box(shape)
                if box is None:
                    kind = one_line(shape.get("name") or "shape without a name", 40)
                    message = f"The region is a {kind} that has no area, no box; it was left out."
                    log.add("missing-box", "dropped", where, message)
                else:
                    image.add(class_of(values, where), box, i)
            num_empty += not regions
        if num_empty:
            message = (
                f"{num_empty:,} of {len(entries):,} images have no region and count as background: VIA doesn't tell "
                "them from images that nobody has labelled. Take those out of the file."
            )
            log.add("images-without-regions", "note", place.shown, message, count=num_empty)
        return images.images()

    return read_files(wanted, "via", via_splits(wanted.path), read)


def _entries(place: Place, log: FindingLog) -> tuple[_Entries, Mapping[str, Any]]:
    """The regions of each image of a JSON file, and what a project says of their attributes."""
    content = parse_json(json_text(place.file, MAX_ANNOTATION_BYTES, log, place.shown), str(place.file))
    if not isinstance(content, dict):
        raise InputError(f"{place.file}: expected an object with an entry for each image")
    images = content.get("_via_img_metadata", content)
    found: _Entries = {}
    for key, entry in images.items() if isinstance(images, dict) else ():
        name, regions = (entry.get("filename"), entry.get("regions")) if isinstance(entry, dict) else (None, None)
        where = f"{place.shown}, {one_line(key)}"
        if not isinstance(name, str) or not isinstance(regions, dict | list):
            log.add("image-entry", "dropped", where, 'An image needs a text "filename" and "regions"; it was left out.')
            continue
        listed = list(regions.values() if isinstance(regions, dict) else regions)
        parts = [region if isinstance(region, dict) else {} for region in listed]
        shapes = [shape if isinstance(shape := region.get("shape_attributes"), dict) else None for region in parts]
        if num_broken := shapes.count(None):
            message = f"{num_broken} of its regions have no shape_attributes; they were left out."
            log.add("missing-box", "dropped", where, message, count=num_broken)
        own = list(zip(shapes, (_mapping(region.get("region_attributes")) for region in parts), strict=True))
        if found.get(name) and own and found[name] != own:
            message = (
                f"Another entry is called {one_line(name)} too, and has other regions: whose they are can't be known. "
                "Give the images different names, or delete the entry that is no longer meant."
            )
            log.add("ambiguous-image", "refused", where, message)
            continue
        found[name] = found.get(name) or own
    return found, _mapping(_mapping(content.get("_via_attributes")).get("region"))


def _rows(place: Place, log: FindingLog) -> tuple[_Entries, Mapping[str, Any]]:
    """The same of a CSV file, which has a row for each region, and one for an image without any."""
    found: _Entries = {}
    try:
        rows = read_csv(place.file, MAX_ANNOTATION_BYTES, errors="replace")
        header = [cell.strip().lstrip("#") for cell in next(rows, [])]
        for line, row in enumerate(rows, 2):
            cells = dict(zip(header, row))
            name = cells.get("filename", "").strip()
            if not name:
                continue
            own = found.setdefault(name, [])
            try:
                shape, values = (parse_json(cells.get(key) or "{}", key) for key in _COLUMNS)
                if not isinstance(shape, dict):
                    raise InputError(f"{_COLUMNS[0]} is no object with a shape")
            except InputError as error:
                log.add("missing-box", "dropped", f"{place.shown}, row {line}", f"{error}; the region was left out.")
                shape, values = None, {}
            own += [] if shape == {} else [(shape, _mapping(values))]
    except (OSError, ValueError) as error:
        raise InputError(f"{place.file} can't be read: {getattr(error, 'strerror', None) or error}") from None
    return found, {}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _box(shape: Mapping[str, Any]) -> list[float] | None:
    """The corners of what is around a shape; None for what has no area. NaN where a coordinate is no number."""
    if "all_points_x" in shape:
        xs, ys = shape["all_points_x"], shape.get("all_points_y")
        are_points = isinstance(xs, list) and isinstance(ys, list) and len(xs) == len(ys) > 2
        return box_around([(number(x), number(y)) for x, y in zip(xs, ys, strict=True)]) if are_points else None
    if "width" in shape:
        x, y, width, height = (number(shape.get(key)) for key in ("x", "y", "width", "height"))
        return [x, y, x + width, y + height]
    radii = [shape[key] for key in ("r", "r", "rx", "ry") if key in shape]
    if len(radii) != 2:
        return None
    numbers = (shape.get("cx"), shape.get("cy"), *radii, shape.get("theta") or 0)
    return box_around_ellipse(*map(number, numbers))


# ---- classes ---------------------------------------------------------------------------------------------------------


def _classes(
    entries: _Entries, attributes: Mapping[str, Any], shown: str, log: FindingLog
) -> Callable[[Mapping[str, Any], str], str]:
    """What tells the class of a region by its attributes, "" where it has none; it also takes where the region is."""
    used = Counter(
        key for regions in entries.values() for _, values in regions for key in values if _words(values[key])
    )
    chosen = _class_attribute(used, shown, log)
    options = _mapping(_mapping(attributes.get(chosen)).get("options"))
    titles = {key: title.strip() for key, title in options.items() if isinstance(title, str)}
    if not (len(titles) == len(options) and all(key.isdecimal() for key in titles) and all(titles.values())):
        titles = {}  # else the numbers are no names

    def class_of(values: Mapping[str, Any], where: str) -> str:
        words = _words(values.get(chosen))
        if len(words) > 1:
            message = f"The region has {len(words)} classes; the first, {one_line(words[0])!r}, was used."
            log.add("several-labels", "repaired", where, message)
        return titles.get(words[0], words[0]) if words else ""

    return class_of


def _class_attribute(used: Mapping[str, int], shown: str, log: FindingLog) -> str | None:
    """used: how many regions have each attribute."""
    if len(used) < 2:
        return next(iter(used), None)
    listed = first_few(map(one_line, used), 6)
    for names in _CLASS:
        fits = [key for key in used if re.sub(r"[\W_]", "", key.lower()).removeprefix("region") in names]
        if len(fits) == 1:
            message = f"Regions have the attributes {listed}: classes are the values of {one_line(fits[0])}."
            log.add("class-attribute", "note", shown, message)
            return fits[0]
    message = (
        f"Regions have the attributes {listed}, and which of them is the class can't be known: call it `class` in VIA "
        "(or in the file), and save it again."
    )
    log.add("class-attribute", "refused", shown, message)
    return max(used, key=used.__getitem__)


def _words(value: Any) -> list[str]:
    """What an attribute says: of checkboxes those that are ticked."""
    values = [key for key, ticked in value.items() if is_true(ticked)] if isinstance(value, dict) else [value]
    return [text for one in values if one is not None and (text := str(one).strip())]

"""Hugging Face `datasets` image folders: a `metadata.jsonl` or `.csv` beside the images, a line for each; or a `.jsonl`
of another name.

`objects` holds lists (`bbox`, `categories`) or a list of objects; boxes are x, y, width, height in pixels, as the
documentation has them. Categories are names, or ids of names in README.md or dataset_infos.json, else called class_N;
without any all boxes are of one class. Classes are the names in the training split, sorted.
"""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import islice, product
from pathlib import Path, PurePosixPath
from typing import Any

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.image_files import found_below
from ddetr.datasets.readers.coco.layout import named_by_split
from ddetr.datasets.readers.named_images import ImageCollector, Place
from ddetr.datasets.readers.reader import (
    WHOLE,
    LabelledImage,
    Wanted,
    box_numbers,
    number,
    read_labelled,
    size_hw,
    split_kind,
)
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import (
    MAX_ANNOTATION_BYTES,
    MAX_LABEL_BYTES,
    MAX_LINE,
    MAX_YAML_BYTES,
    open_file,
    parse_json,
    parse_yaml,
    read_csv,
    read_text,
)

_NAMES = ("metadata.jsonl", "metadata.csv")
_PATTERNS = (_NAMES, ("*.jsonl",))  # those of other names where there is none of these
_SAMPLED = 100  # lines of a file of which one must have objects: the first images may have none
_IMAGE = ("file_name", "image_file_name", "filename", "image", "image_path", "path")
_BOXES = ("bbox", "bboxes", "boxes", "box")
_CLASSES = ("categories", "category", "labels", "label", "category_id", "categories_id", "class", "classes")


def huggingface_splits(path: Path) -> dict[str, tuple[Path, str]]:
    """Split name -> its metadata file, and the folder in it that its images are in ("" for all); {} where there is
    none of objects."""
    if path.is_file():
        is_one = path.name.lower() in _NAMES or path.suffix.lower() == ".jsonl"
        return {WHOLE: (path, "")} if is_one and _has_objects(path) else {}
    for names, place in product(_PATTERNS, ("{}", "*/{}", "data/*/{}", "images/*/{}")):
        files = [file for name in names for file in found_below(path, place.format(name)) if _has_objects(file)]
        if len(files) > 1 and files[0].name.lower() not in _NAMES and len({file.parent for file in files}) == 1:
            return {name: (file, "") for name, file in named_by_split({file.stem: file for file in files}).items()}
        if len(files) == 1 and files[0].parent in (path, path / "data", path / "images"):
            folders = sorted(f.name for f in files[0].parent.iterdir() if split_kind(f.name) and f.is_dir())
            return {name: (files[0], name) for name in folders} or {WHOLE: (files[0], "")}
        if files:
            return {file.parent.name: (file, "") for file in reversed(files)}  # reversed: JSON before CSV
    return {}


def _has_objects(file: Path) -> bool:
    try:
        return any(_image_of(entry) and _objects_of(entry) is not None for entry in islice(_entries(file), _SAMPLED))
    except InputError:
        return file.name.lower() == "metadata.jsonl"  # reading it will say what is wrong


def _image_of(entry: dict[str, Any]) -> str | None:
    return next((entry[key] for key in _IMAGE if isinstance(entry.get(key), str)), None)


def _of_python(text: str) -> Any:
    """A value as Python prints it, and pandas writes into a table; tuples become lists."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # backslashes of Windows' paths
        return json.loads(json.dumps(ast.literal_eval(text)))


def _objects_of(entry: dict[str, Any]) -> Any:
    """What holds the boxes: under `objects`, or lists of the line itself; None where nothing does."""
    value = entry.get("objects", entry.get("annotations"))
    if value is None and any(key in entry for key in _BOXES):
        return entry
    if isinstance(value, str):  # in a CSV
        for parse in (json.loads, _of_python):
            with suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
                value = parse(value)
                break
    return value if isinstance(value, (dict, list)) else None


def _entries(file: Path) -> Iterator[dict[str, Any]]:
    """The object of each line."""
    try:
        if file.suffix.lower() == ".csv":
            rows = read_csv(file, MAX_ANNOTATION_BYTES)
            header = next(rows, [])
            yield from (dict(zip(header, row)) for row in rows if row)
            return
        with open_file(file, MAX_ANNOTATION_BYTES) as stream:
            number_ = 0
            while line := stream.readline(64 * MAX_LINE):
                number_ += 1
                if len(line) == 64 * MAX_LINE:
                    raise ValueError(f"line {number_} has over {64 * MAX_LINE:,} bytes")
                if text := line.decode("utf-8-sig").strip():
                    entry = parse_json(text, f"{file}, line {number_},")
                    yield entry if isinstance(entry, dict) else {}
    except UnicodeDecodeError:
        raise InputError(f"{file} is no UTF-8 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from None


def read_huggingface(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    splits = huggingface_splits(wanted.path)
    names_of_ids = _class_names(wanted.root)

    def read(place: tuple[Path, str], log: FindingLog) -> list[LabelledImage]:
        file, folder = place
        split = next(name for name in splits if splits[name] == place)
        where_it_is = Place(wanted.root, file, split, beside_file=True)
        shown = where_it_is.shown
        images = ImageCollector(where_it_is, wanted, log, form="xywh")
        unnamed: set[str] = set()
        for line, entry in enumerate(_entries(file), 1):
            name, where = _image_of(entry), f"{shown}, line {line}"
            if name is None:
                message = f'The line needs a "file_name"; it has {one_line(list(entry))} and was left out.'
                log.add("image-entry", "dropped", where, message)
                continue
            parts = PurePosixPath(name.replace("\\", "/")).parts
            if folder and folder not in parts[:-1]:
                continue
            image = images.of(name)
            image.declared_hw = size_hw(entry.get("height"), entry.get("width"))
            for box, label in _objects(_objects_of(entry), where, log):
                box = box_numbers(box)
                numbers = [number(value) for value in (box if isinstance(box, list) and len(box) == 4 else [None] * 4)]
                image.add(_name(label, names_of_ids, unnamed), numbers)
        if unnamed:
            message = f"{len(unnamed)} classes have numbers and no names: they are called {min(unnamed)} and so on."
            log.add("unnamed-classes", "note", shown, message, count=len(unnamed))
        return images.images()

    return read_labelled(wanted, "huggingface", splits, read)


def _objects(value: Any, where: str, log: FindingLog) -> Iterator[tuple[Any, Any]]:
    """(box, class) of each object."""
    if isinstance(value, list):
        for entry in value:
            if isinstance(entry, dict):
                yield _first(entry, _BOXES), _first(entry, _CLASSES)
        return
    value = value or {}
    boxes, classes = _first(value, _BOXES), _first(value, _CLASSES)
    if isinstance(boxes, dict) or (isinstance(boxes, list) and boxes and not isinstance(boxes[0], (list, dict))):
        boxes = [boxes]  # of one object
        classes = classes if isinstance(classes, list) else [classes]
    boxes = boxes if isinstance(boxes, list) else []
    if not any(key in value for key in _CLASSES):
        classes = [None] * len(boxes)
    if not isinstance(classes, list) or len(classes) != len(boxes):
        if boxes:
            message = (
                f"It has {len(boxes)} boxes and {len(classes) if isinstance(classes, list) else 'no'} classes: which "
                "belongs to which can't be known. Correct the line."
            )
            log.add("boxes-without-classes", "refused", where, message)
        return
    yield from zip(boxes, classes, strict=True)


def _first(entry: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((entry[key] for key in keys if key in entry), None)


def _name(label: Any, names_of_ids: Sequence[str], unnamed: set[str]) -> str:
    if isinstance(label, str):
        return label.strip()
    if isinstance(label, (int, float)) and label == label and abs(label) < 2**53 and int(label) == label:
        if 0 <= label < len(names_of_ids):
            return names_of_ids[int(label)]
        unnamed.add(f"class_{int(label)}")
        return f"class_{int(label)}"
    return "" if label is None else one_line(label)


def _class_names(root: Path) -> list[str]:
    """The names of the first list of class labels in the data set's description; [] where there is none."""
    for name, parse in (
        ("README.md", _front_matter),
        ("dataset_infos.json", parse_json),
        ("dataset_info.json", parse_json),
    ):
        for folder in (root, root.parent):
            try:
                most = MAX_YAML_BYTES if parse is _front_matter else MAX_LABEL_BYTES
                names = _label_names(parse(read_text(folder / name, most), name))
            except (OSError, ValueError, InputError):
                continue
            if names:
                return names
    return []


def _front_matter(text: str, what: str) -> Any:
    head = text.partition("---\n")[2].partition("\n---")[0] if text.startswith("---\n") else ""
    return parse_yaml(head, what)


def _label_names(content: Any) -> list[str]:
    """Of {"class_label": {"names": ...}} in YAML, or {"_type": "ClassLabel", "names": ...} in JSON, however deep."""
    waiting = [content]
    while waiting:
        value = waiting.pop(0)
        if isinstance(value, dict):
            inner = value.get("class_label", value if value.get("_type") == "ClassLabel" else None)
            names = inner.get("names") if isinstance(inner, dict) else None
            if isinstance(names, dict):
                names = [names[key] for key in sorted(names, key=lambda key: int(key) if str(key).isdecimal() else -1)]
            if isinstance(names, list) and names:
                return [str(name).strip() for name in names]
            waiting += value.values()
        elif isinstance(value, list):
            waiting += value
    return []

"""CSV tables with a row for each box: Roboflow's and TensorFlow's, RetinaNet's without a header, OpenImages' and such.

Columns are known by their names, in any order and case; only what says which corners it holds is read (`xmin`, `x2`,
`bbox_width`), never a bare `x` or `bbox`. Classes are the names in the training split, sorted. OpenImages: fractions of
the image, names by `class-descriptions*.csv` where it is there, boxes around groups are ignored, not dropped.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.image_files import visible
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.coco.layout import split_word
from ddetr.datasets.readers.named_images import ImageCollector, Place
from ddetr.datasets.readers.reader import WHOLE, LabelledImage, Wanted, is_true, number, read_labelled, size_hw
from ddetr.errors import InputError
from ddetr.untrusted import MAX_ANNOTATION_BYTES, MAX_LABEL_BYTES, one_line, read_csv

_PLACES = ("*/_annotations.csv", "*.[ct]sv", "annotations/*.[ct]sv", "*/*.[ct]sv", "*/labels/*.[ct]sv")
_FILE_WORDS = re.compile(
    r"(?:^|[_.-])(?:annotations?|annots?|labels?|bbox(?:es)?|boxes|detections?|oidv\d|csv|data)(?=[_.-]|$)", re.I
)
_COLUMNS = {  # what a column is called; the first that is there
    "image": ("filename", "file_name", "image", "image_name", "imagename", "image_path", "img", "img_name")
    + ("image_id", "imageid", "filepath", "file_path", "path", "file", "frame"),
    "class": ("class", "label", "class_name", "classname", "label_name", "labelname", "category", "category_name")
    + ("class_id", "category_id", "label_id"),
    "x1": ("xmin", "x_min", "x1", "left", "bbox_xmin", "bbox_x1", "xtl", "bbox_x"),
    "y1": ("ymin", "y_min", "y1", "top", "bbox_ymin", "bbox_y1", "ytl", "bbox_y"),
    "x2": ("xmax", "x_max", "x2", "right", "bbox_xmax", "bbox_x2", "xbr"),
    "y2": ("ymax", "y_max", "y2", "bottom", "bbox_ymax", "bbox_y2", "ybr"),
    "w": ("bbox_width", "box_width", "bbox_w"),
    "h": ("bbox_height", "box_height", "bbox_h"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "group": ("isgroupof",),
}
_HEADLESS = (  # RetinaNet, SKU-110K; makesense.ai
    ("image", "x1", "y1", "x2", "y2", "class", "width", "height"),
    ("class", "x1", "y1", "w", "h", "image", "width", "height"),
)


@dataclass(frozen=True)
class _Layout:
    """Which column holds what."""

    columns: Mapping[str, int]
    has_header: bool
    in_fractions: bool
    num_columns: int


def csv_splits(path: Path) -> dict[str, Path]:
    """Split name -> its table, those of the first place that has any; {} where there is none of boxes."""
    if path.is_file():
        is_table = path.suffix.lower() in (".csv", ".tsv") and _layout(path) is not None
        return {_split_name(path, path.parent): path} if is_table else {}
    for pattern in _PLACES:
        files = [file for file in visible(path.glob(pattern), path) if _layout(file) is not None]
        if files:
            return _named(path, files)
    return {}


def _named(root: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Tables by the names of their splits; those that would share one, by their file names, or by their paths where
    they lie in several folders: parts of several data sets are never taken for one."""
    names = [_split_name(file, root) for file in files]
    sharing = Counter(name.lower() for name in names)
    splits = {}
    for name, file in zip(names, files, strict=True):
        if sharing[name.lower()] > 1:
            homes = {f.parent for n, f in zip(names, files, strict=True) if n.lower() == name.lower()}
            name = file.stem if len(homes) == 1 else file.relative_to(root).with_suffix("").as_posix()
        splits[name] = file
    return splits


def _split_name(file: Path, root: Path) -> str:
    """`train` of train_labels.csv, of custom_train.csv, of train/_annotations.csv, of train/labels/detections.csv."""
    names = [file.stem, *reversed(file.relative_to(root).parts[:-1])]
    return next((split_word(word) for name in names if (word := _FILE_WORDS.sub("", name).strip("_.-"))), WHOLE)


def _layout(file: Path) -> _Layout | None:
    """None where it is no table of boxes."""
    try:
        rows = read_csv(file, MAX_ANNOTATION_BYTES, errors="replace")
        first = next(rows, [])
    except (OSError, ValueError):
        return None
    cells = [re.sub(r"[\s-]+", "_", cell.strip().lstrip("#").lower()) for cell in first]
    found = {
        key: next(cells.index(name) for name in names if name in cells)
        for key, names in _COLUMNS.items()
        if any(name in cells for name in names)
    }
    if "image" not in found:  # called otherwise: the only column that holds names of images
        images = [i for i, cell in enumerate(_first_row(rows)[: len(cells)]) if is_image_name(cell.strip())]
        found |= {"image": images[0]} if len(images) == 1 else {}
    if {"image", "class", "x1", "y1"} <= found.keys() and ({"x2", "y2"} <= found.keys() or {"w", "h"} <= found.keys()):
        return _Layout(found, True, {"imageid", "labelname"} <= set(cells), len(first))
    for names in _HEADLESS:
        found = {key: i for i, key in enumerate(names[: len(first)])}
        numbers = [first[i].strip() for key, i in found.items() if key not in ("image", "class")]
        if len(first) in (6, 8) and is_image_name(first[found["image"]].strip()) and _are_numbers(numbers):
            return _Layout(found, False, False, len(first))
    return None


def _first_row(rows: Iterator[list[str]]) -> list[str]:
    try:
        return next(rows, [])
    except (OSError, ValueError):  # reading it will say what is wrong
        return []


def _are_numbers(cells: Sequence[str]) -> bool:
    return not any(cells) or all(np.isfinite(number(cell)) for cell in cells)


def read_csv_boxes(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    splits = csv_splits(wanted.path)

    def read(file: Path, log: FindingLog) -> list[LabelledImage]:
        split = next(name for name in splits if splits[name] == file)
        return _read(Place(wanted.root, file, split), wanted, _class_names(wanted.root, file), log)

    return read_labelled(wanted, "csv", splits, read)


def _read(place: Place, wanted: Wanted, class_names: Mapping[str, str], log: FindingLog) -> list[LabelledImage]:
    file, layout = place.file, _layout(place.file)
    if layout is None:  # it was one when its folder was looked at
        raise InputError(f"{file} is no table of boxes any more")
    by_size = not {"x2", "y2"} <= layout.columns.keys()
    form = "xywh" if by_size else "xyxy"
    images = ImageCollector(place, wanted, log, form=form, in_fractions=layout.in_fractions, unit="row")
    box_columns = [layout.columns[key] for key in ("x1", "y1", *(("w", "h") if by_size else ("x2", "y2")))]
    get = partial(_cell, layout.columns)
    for line, row in _rows(file, layout.has_header):
        beyond = [cell for cell in row[layout.num_columns :] if cell.strip()]
        if beyond:
            message = (
                f"It has {len(row)} cells, the first row {layout.num_columns}; those beyond were left out, such as "
                f"{one_line(beyond[0], 40)}. Write a row for each box."
            )
            log.add("cells-beyond", "dropped", f"{place.shown}, row {line}", message)
        image = images.of(get(row, "image"))
        image.declared_hw = image.declared_hw or size_hw(get(row, "height"), get(row, "width"))
        words = [row[i].strip() if i < len(row) else "" for i in box_columns]
        if not any(words):  # an image without objects
            continue
        name = get(row, "class")
        box = [number(word.replace(",", ".")) for word in words]
        image.add(class_names.get(name, name), box, line, ignore=is_true(get(row, "group")))
    found = images.images()
    ids = {name for image in found for name in image.classes if name.startswith(("/m/", "/g/"))}
    if ids:
        message = f"{len(ids)} classes have ids for names, such as {min(ids)}: no class-descriptions*.csv names them."
        log.add("unnamed-classes", "note", place.shown, message, count=len(ids))
    return found


def _cell(columns: Mapping[str, int], row: Sequence[str], key: str) -> str:
    i = columns.get(key, -1)
    return row[i].strip() if 0 <= i < len(row) else ""


def _rows(file: Path, has_header: bool) -> Iterator[tuple[int, list[str]]]:
    """(number, cells) of each row that is not empty; the first row of the file is 1."""
    try:
        for line, row in enumerate(islice(read_csv(file, MAX_ANNOTATION_BYTES), has_header, None), 1 + has_header):
            if any(row):
                yield line, row
    except UnicodeDecodeError:
        raise InputError(f"{file} is neither UTF-8 nor UTF-16 text; save it as UTF-8") from None
    except (OSError, ValueError) as error:
        raise InputError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _class_names(root: Path, file: Path) -> dict[str, str]:
    """OpenImages' id -> name, of the first file beside the table, or in a folder `metadata`, that tells."""
    for folder in dict.fromkeys((file.parent, file.parent.parent / "metadata", root / "metadata", root)):
        for table in sorted([*folder.glob("*class-descriptions*.csv"), *folder.glob("classes.csv")]):
            try:
                rows = [row for row in read_csv(table, MAX_LABEL_BYTES) if len(row) >= 2 and row[0].startswith("/")]
            except (OSError, ValueError):
                continue
            if rows:
                return {row[0]: row[1].strip() for row in rows}
    return {}

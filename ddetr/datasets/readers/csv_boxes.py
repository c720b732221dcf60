"""CSV tables with a row for each box: Roboflow's and TensorFlow's, RetinaNet's without a header, OpenImages' and such.

Columns are known by their names, in any order and case; a number is read where its column says which it is (`xmin`,
`x2`, `bbox_width`, `width` beside one corner alone; never a bare `x`), or a box of four in one cell (`bbox`), which the
whole table or `--data.boxes` tells. Classes are the names in the training split, sorted; without a column of classes
all boxes are of one. OpenImages: fractions of the image, names by `class-descriptions*.csv` where it is there, boxes
around groups are ignored, not dropped.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.coco.layout import split_word
from ddetr.datasets.readers.json_files import file_splits
from ddetr.datasets.readers.named_images import ImageCollector, Place, read_files
from ddetr.datasets.readers.reader import WHOLE, LabelledImage, Wanted, is_true, number, size_hw
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_ANNOTATION_BYTES, MAX_LABEL_BYTES, read_csv

_PLACES = ("*/_annotations.csv", "*.[ct]sv", "annotations/*.[ct]sv", "*/*.[ct]sv", "*/labels/*.[ct]sv")
_FILE_WORDS = re.compile(
    r"(?:^|[_.-])(?:annotations?|annots?|labels?|bbox(?:es)?|boxes|detections?|oidv\d|csv|data)(?=[_.-]|$)", re.I
)
_COLUMNS = {  # what a column is called; the first that is there
    "image": ("filename", "file_name", "image", "image_name", "imagename", "image_path", "img", "img_name")
    + ("image_id", "imageid", "filepath", "file_path", "path", "file", "frame"),
    "class": ("class", "label", "class_name", "classname", "label_name", "labelname", "category", "category_name")
    + ("class_id", "category_id", "label_id", "labels", "classes", "categories", "object", "object_name"),
    "x1": ("xmin", "x_min", "x1", "left", "bbox_xmin", "bbox_x1", "xtl", "bbox_x"),
    "y1": ("ymin", "y_min", "y1", "top", "bbox_ymin", "bbox_y1", "ytl", "bbox_y"),
    "x2": ("xmax", "x_max", "x2", "right", "bbox_xmax", "bbox_x2", "xbr"),
    "y2": ("ymax", "y_max", "y2", "bottom", "bbox_ymax", "bbox_y2", "ybr"),
    "w": ("bbox_width", "box_width", "bbox_w"),
    "h": ("bbox_height", "box_height", "bbox_h"),
    "width": ("width", "image_width", "img_width"),
    "height": ("height", "image_height", "img_height"),
    "group": ("isgroupof",),
    "box": ("bbox", "bboxes", "box", "boxes", "bounding_box", "bounding_boxes", "boxesstring"),
}
_BARE_SIZES = ("width", "w", "height", "h")  # of a box, or of its image
_CORNERS, _SIZES = ("x1", "y1", "x2", "y2"), ("x1", "y1", "w", "h")
_NO_CLASSES = ("source", "domain", "split", "set", "usage", "url", "image_url", *chain(*_COLUMNS.values()))
_FLAGS = ("true", "false", "yes", "no", "none", "nan", "null")
_LIKE_CLASS = re.compile(r"^(?!.*(?:conf|score|num|count|is_)).*(?:class|label|categor)")  # digitlabel: numbers too
_TIME = re.compile(r"\d{4}-\d\d-\d\d|\d\d:\d\d")  # 2024-01-31T12:30:00Z, 12:30 PM
_MOST_CLASSES = 1000  # different words in a column that may hold classes
_NO_BOX = ("", "[]", "no_box", "none", "nan", "null")
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
    others: Mapping[int, str] = field(default_factory=dict)  # columns that are not read -> their names

    @property
    def numbers(self) -> Sequence[str]:
        """The columns of a box's numbers; () where one cell has all four."""
        return next((keys for keys in (_CORNERS, _SIZES) if self.columns.keys() >= set(keys)), ())


def csv_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its tables, those of the first place that has any; {} where there is none of boxes."""

    def is_ours(file: Path) -> bool:
        return file.suffix.lower() in (".csv", ".tsv") and _layout(file) is not None

    return file_splits(path, _PLACES, is_ours, lambda root, files, _: _named(root, files))


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
    if "image" not in found or "box" in found:
        row = _first_row(rows)[: len(cells)]
        images = [i for i, cell in enumerate(row) if is_image_name(cell.strip())]
        if "image" not in found and len(images) == 1:  # called otherwise: the only column that holds names of images
            found["image"] = images[0]
        if "box" in found and (found["box"] >= len(row) or not np.isfinite(_boxes_of(row[found["box"]])).all()):
            del found["box"]
    found = _with_bare_sizes(found, cells)
    others = {i: cell for i, cell in enumerate(cells) if i not in found.values()}
    layout = _Layout(found, True, {"imageid", "labelname"} <= set(cells), len(first), others)
    if "image" in found and (layout.numbers or "box" in found):
        return layout
    for names in _HEADLESS:
        found = {key: i for i, key in enumerate(names[: len(first)])}
        numbers = [first[i].strip() for key, i in found.items() if key not in ("image", "class")]
        if len(first) in (6, 8) and is_image_name(first[found["image"]].strip()) and _are_numbers(numbers):
            return _Layout(found, False, False, len(first))
    return None


def _with_bare_sizes(found: dict[str, int], cells: Sequence[str]) -> dict[str, int]:
    """The columns `width` and `height` as those of the box, where they stand right behind the only corner that is there
    (`Left,Top,Width,Height`): elsewhere they are the image's."""
    if not {"x1", "y1"} <= found.keys() or found.keys() & {"x2", "y2", "w", "h"}:
        return found
    behind = 1 + max(found["x1"], found["y1"])
    sizes = {name[0]: i for i, name in enumerate(cells) if i in (behind, behind + 1) and name in _BARE_SIZES}
    if sizes.keys() != {"w", "h"} or abs(found["x1"] - found["y1"]) != 1:
        return found
    return {key: i for key, i in found.items() if i not in sizes.values()} | sizes


def _first_row(rows: Iterator[list[str]]) -> list[str]:
    try:
        return next(rows, [])
    except (OSError, ValueError):  # reading it will say what is wrong
        return []


def _are_numbers(cells: Sequence[str]) -> bool:
    return not any(cells) or all(np.isfinite(number(cell)) for cell in cells)


def read_csv_boxes(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""

    def read(place: Place, log: FindingLog) -> list[LabelledImage]:
        return _read(place, wanted, _class_names(wanted.root, place.file), log)

    return read_files(wanted, "csv", csv_splits(wanted.path), read)


def _read(place: Place, wanted: Wanted, class_names: Mapping[str, str], log: FindingLog) -> list[LabelledImage]:
    file, layout = place.file, _layout(place.file)
    if layout is None:  # it was one when its folder was looked at
        raise InputError(f"{file} is no table of boxes any more")
    form = {_CORNERS: "xyxy", _SIZES: "xywh", (): "auto"}[layout.numbers]
    is_of_openimages = layout.in_fractions  # all of whose images hardly anybody has
    images = ImageCollector(
        *(place, wanted, log), form=form, in_fractions=is_of_openimages, unit="row", may_be_part=is_of_openimages
    )
    box_columns = [layout.columns[key] for key in layout.numbers]
    get = partial(_cell, layout.columns)
    words_of: dict[int, set[str]] = {i: set() for i in layout.others if "class" not in layout.columns}
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
        for i, words in words_of.items():
            if i < len(row) and len(words) <= _MOST_CLASSES:
                words.add(row[i].strip())
        name = get(row, "class")
        if layout.numbers:
            words = [row[i].strip() if i < len(row) else "" for i in box_columns]
            boxes = [[number(word.replace(",", ".")) for word in words]] if any(words) else []  # none: without objects
            names = [name]
        else:
            boxes = _boxes_of(get(row, "box"))
            names = _names_of(name, len(boxes))
            if len(names) != len(boxes):
                message = (
                    f"It has {len(boxes)} boxes and {len(names)} classes: which belongs to which can't be known. "
                    "Correct the row."
                )
                log.add("boxes-without-classes", "refused", f"{place.shown}, row {line}", message)
                continue
        for name, box in zip(names, boxes):
            image.add(class_names.get(name, name), box, line, ignore=is_true(get(row, "group")))
    if "class" not in layout.columns:
        _report_other_classes(words_of, layout, place.shown, log)
    found = images.images()
    ids = {name for image in found for name in image.classes if name.startswith(("/m/", "/g/"))}
    if ids:
        message = f"{len(ids)} classes have ids for names, such as {min(ids)}: no class-descriptions*.csv names them."
        log.add("unnamed-classes", "note", place.shown, message, count=len(ids))
    return found


def _boxes_of(cell: str) -> list[list[float]]:
    """The boxes in a cell: `[1, 2, 3, 4]`, `1 2 3 4;5 6 7 8`, `[[1, 2, 3, 4], [5, 6, 7, 8]]`; one of NaN for what is
    none."""
    if cell.strip().lower() in _NO_BOX:
        return []
    boxes = [re.findall(r"[^\s,'\"]+", piece) for piece in re.split(r"[\[\](){};]", cell) if piece.strip(" ,")]
    return [[number(word) for word in box] if len(box) == 4 else [math.nan] * 4 for box in boxes]


def _names_of(cell: str, num_boxes: int) -> list[str]:
    """The class of each box in a row: a list of them, or one for all."""
    if cell.startswith("[") and cell.endswith("]"):
        return [word.strip(" '\"") for word in cell[1:-1].split(",") if word.strip(" '\"")]
    return [cell] * num_boxes


def _report_other_classes(words_of: Mapping[int, set[str]], layout: _Layout, shown: str, log: FindingLog) -> None:
    """Stops where no column is called as one of classes, and another may hold them.

    words_of: column that is not read -> its different words.
    """
    for i, words in words_of.items():
        is_called_so = _LIKE_CLASS.search(layout.others[i]) is not None
        texts = sorted(word for word in words if _may_be_class(word) or (is_called_so and word.isdecimal()))
        if 1 < len(words) <= _MOST_CLASSES and texts and layout.others[i] not in _NO_CLASSES:
            name = one_line(layout.others[i], 60)
            message = (
                f'No column is called class or label; "{name}" has {len(words)} different words, such as '
                f"{one_line(texts[0], 60)}. If they are the classes, call it class; if not, delete it, or call it "
                "source."
            )
            log.add("classes-unknown", "refused", shown, message)
            return


def _may_be_class(word: str) -> bool:
    """Not a number, a date or a time, nor one of a flag's words."""
    has_letters = any(character.isalpha() for character in word)
    return has_letters and not np.isfinite(number(word)) and word.lower() not in _FLAGS and not _TIME.match(word)


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

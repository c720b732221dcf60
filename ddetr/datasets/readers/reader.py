"""What a reader is, and what readers of one label file per image, or of a table, have in common: they find images with
objects by name; sizes, boxes and labels are settled here, by the same rules for all."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from functools import cache, wraps
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from ddetr.datasets.annotations import (
    Annotations,
    Category,
    FindingLog,
    ImageRecord,
    ImageTable,
    check_boxes,
    report_boxes,
    split_error,
    unlike_training,
    whole,
)
from ddetr.datasets.box_form import corners_of, in_pixels, is_relative, put_in_order, read_as
from ddetr.datasets.config import BoxForm
from ddetr.datasets.image_files import Stated, read_headers, settle_sizes
from ddetr.datasets.image_header import ImageHeader
from ddetr.datasets.readers.box_meaning import check_meaning, settled_form
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.wording import first_few

_UNNAMED = ((10, 0.01), (3, 0.2))  # so many objects of ids without a name, and that part of all, are no slip

_BOX_KEYS = (  # what the numbers of a box are called
    *(("x", "y", "width", "height"), ("x", "y", "w", "h"), ("left", "top", "width", "height")),
    *(("xmin", "ymin", "xmax", "ymax"), ("x_min", "y_min", "x_max", "y_max"), ("x1", "y1", "x2", "y2")),
    ("left", "top", "right", "bottom"),
)

T = TypeVar("T")
WHOLE = "all"  # the one split of a data set that has none
_SPLIT_NAME = re.compile(
    r"(?:(train)(?:val|ing)?|(val)(?:id|idate|idation)?|(test)(?:ing)?)(?:[\W_\d]|$)", re.IGNORECASE
)


def split_kind(name: str) -> str | None:
    """ "train", "val" or "test" for the name of a file or folder that begins as a split's does; None for another."""
    found = _SPLIT_NAME.match(name)
    return next(filter(None, found.groups())).lower() if found else None


_layouts: ContextVar[dict[Any, Any] | None] = ContextVar("layouts", default=None)


@contextmanager
def layouts_kept() -> Iterator[None]:
    """In it, a data set doesn't change: where its splits lie is looked for once, not by each part that asks."""
    outer = _layouts.get()
    token = _layouts.set({} if outer is None else outer)
    try:
        yield
    finally:
        _layouts.reset(token)


def looked_at_once(look: Callable[[Path], T]) -> Callable[[Path], T]:
    """For a function that lists a folder, which may hold 100,000 files: within `layouts_kept` it is called once for
    each folder."""

    @wraps(look)
    def kept(path: Path) -> T:
        known = _layouts.get()
        if known is None:
            return look(path)
        if (look, path) not in known:
            known[look, path] = look(path)
        return known[look, path]

    return kept


@dataclass(frozen=True)
class Wanted:
    """What `load_annotations` was asked for; it says what each field means."""

    path: Path
    split: str
    train_split: str | None = None  # whose class names make the labels where `categories` doesn't give them
    image_dir: Path | None = None
    categories: Sequence[Category] | None = None
    check_images: bool = True
    boxes: BoxForm = "auto"

    @property
    def root(self) -> Path:
        """The data set's folder, or that of its file."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def is_training(self) -> bool:
        """Whether it is the training split, or there is none: what is of all splits is said of it alone."""
        return self.train_split in (None, self.split)


@dataclass(frozen=True)
class Reader:
    """A format: how it is recognised, and how a split of it is read."""

    title: str  # "Pascal VOC"
    layout: str  # what is looked for, for people: "Annotations/*.xml"
    splits: Callable[[Path], Mapping[str, Any]]  # split name -> where it lies; {} where there is no such data set
    read: Callable[[Wanted], Annotations]
    description: Callable[[Path], Path | None] = lambda path: None  # the file that says which splits a folder has


_NONE_IGNORED = np.zeros(0, dtype=bool)


@dataclass(frozen=True, slots=True)  # there are hundreds of thousands
class LabelledImage:
    """An image as its labels describe it, before its file is opened; n objects."""

    path: Path
    where: str  # its label file, for people
    classes: Sequence[Any]  # (n,) name of each object's class, or another key of `label_of`
    boxes_xyxy: np.ndarray  # (n, 4) as written
    numbers: Sequence[int]  # (n,) of the objects in the label file
    in_fractions: bool = False  # the boxes are fractions of the image, not pixels
    # What the label file's numbers are: "xywh" where `boxes_xyxy` was made of sizes; "auto" where that is to be found
    # out, and they stand in `boxes_xyxy` as they are.
    form: BoxForm = "xyxy"
    declared_hw: tuple[int, int] | None = None  # size of the image that the labels state
    ignore: np.ndarray = field(default_factory=lambda: _NONE_IGNORED)  # (n,), or (0,) for none
    unit: str = "object"  # what the numbers count: "object", "line", "row"

    def place(self, i: int) -> str:
        return f"{self.where}, {self.unit} {self.numbers[i]}"


def read_labelled(
    wanted: Wanted,
    format: str,
    splits: Mapping[str, Any],
    read: Callable[[Any, FindingLog], list[LabelledImage]],
) -> Annotations:
    """A split of a format that names the class of each object: labels are the training split's names, sorted.

    read: the images of what `splits` holds of a split; what is wrong with them goes to the log.
    """
    if wanted.split not in splits:
        raise split_error(wanted.path, wanted.split, list(splits))
    log = FindingLog()
    images = read(splits[wanted.split], log)

    @cache
    def training() -> list[LabelledImage]:
        return read(splits[wanted.train_split], FindingLog())

    categories = wanted.categories
    if categories is None:
        others = images if wanted.is_training else training()
        names = sorted({name for image in others for name in image.classes})
        categories = [Category(label + 1, name) for label, name in enumerate(names)]
    label_of = {category.name: label for label, category in enumerate(categories)}
    table = table_of(
        images,
        label_of,
        log,
        lambda name: unlike_training(str(name), categories),
        wanted.boxes,
        None if wanted.is_training else training,
    )
    return whole(wanted.path, wanted.split, format, categories, table, log)


def table_of(
    images: Sequence[LabelledImage],
    label_of: Mapping[Any, int],
    log: FindingLog,
    said_of: Callable[[Any], str],
    form: BoxForm = "auto",
    training: Callable[[], Sequence[LabelledImage]] | None = None,
) -> ImageTable:
    """The images that can be read, with the objects that can be used; what is left out, and why, goes to the log.

    label_of: label of each class, -1 or nothing for one that is left out; said_of: why. form: `Wanted.boxes`.
    training: the images of the training split, for another one that is too small to tell what its boxes are.

    Raises:
        InputError: a form is given, and the format holds fractions of the image.
    """
    if form != "auto" and (relative := next((image for image in images if image.in_fractions), None)):
        raise InputError(
            f"--data.boxes (boxes) is for formats in pixels: {relative.where} holds fractions of the image, as its "
            "format says"
        )
    said_of = cache(said_of)
    readable, stated = [], []
    headers = read_headers([image.path for image in images])
    if form == "auto" and any(image.form == "auto" for image in images):
        images = _with_forms(images, headers, log, training)
    for image, header in zip(images, headers, strict=True):
        if isinstance(header, InputError):
            log.add("unreadable-image", "dropped", image.where, f"{str(header).rstrip('.')}; it was left out.")
            continue
        in_fractions = image.in_fractions or is_relative(form)
        boxes = image.boxes_xyxy if image.in_fractions else read_as(image.boxes_xyxy, image.form, form)
        readable.append(image)
        stated.append(Stated(image.path, header, image.declared_hw, boxes, image.where, in_fractions))
    sizes_hw = settle_sizes(stated, len(images), log)
    framed = [
        (image, one, size_hw)
        for image, one, size_hw in zip(readable, stated, sizes_hw, strict=True)
        if size_hw is not None
    ]
    _check_meaning(framed, form, log)
    records = []
    for image, one, size_hw in framed:
        labels = np.array([label_of.get(key, -1) for key in image.classes], dtype=np.int64)
        for i in np.flatnonzero(labels < 0).tolist():
            message = f"{said_of(image.classes[i])}; the object was left out."
            log.add("category-unknown", "dropped", image.place(i), message)
        boxes = in_pixels(one.boxes_xyxy, np.array(size_hw)) if one.in_fractions else one.boxes_xyxy
        check = check_boxes(boxes, size_hw)
        if check.degenerate.any():
            boxes = put_in_order(boxes, size_hw, image.form if form == "auto" else form, log, image.place)
            check = check_boxes(boxes, size_hw)
        report_boxes(log, check, boxes, image.place)
        keep = check.usable & (labels >= 0)
        kept = check.boxes_xyxy[keep]
        records.append(
            ImageRecord(
                image_id=len(records) + 1,
                path=image.path,
                size_hw=size_hw,
                boxes_xyxy=kept,
                labels=labels[keep],
                area=(kept[:, 2:] - kept[:, :2]).prod(axis=1),
                ignore=image.ignore[keep] if len(image.ignore) else np.zeros(len(kept), dtype=bool),
            )
        )
    return ImageTable.from_records(records)


def _with_forms(
    images: Sequence[LabelledImage],
    headers: Sequence[ImageHeader | InputError],
    log: FindingLog,
    training: Callable[[], Sequence[LabelledImage]] | None,
) -> list[LabelledImage]:
    """The images; of those whose boxes don't say what their numbers are, the boxes by the form that fits them all, or
    those of training too where they alone don't tell."""
    where = next(image.where for image in images if image.form == "auto")
    numbers, sizes_hw = _unsettled(images, headers)
    own = FindingLog()
    settled_form(numbers, sizes_hw, own, where)
    if training is not None and any(finding.action == "refused" for finding in own.freeze()):
        others = training()
        more, their_sizes_hw = _unsettled(others, read_headers([image.path for image in others]))
        numbers, sizes_hw = np.concatenate([numbers, more]), np.concatenate([sizes_hw, their_sizes_hw])
    form = settled_form(numbers, sizes_hw, log, f"{where} and on")
    return [
        replace(image, form=form, boxes_xyxy=corners_of(image.boxes_xyxy, form)) if image.form == "auto" else image
        for image in images
    ]


def _unsettled(
    images: Sequence[LabelledImage], headers: Sequence[ImageHeader | InputError]
) -> tuple[np.ndarray, np.ndarray]:
    """(n, 4) numbers that don't say what they are, and (n, 2) sizes of their images."""
    known = [
        (image, image.declared_hw or header.upright_hw)
        for image, header in zip(images, headers, strict=True)
        if image.form == "auto" and not isinstance(header, InputError)
    ]
    numbers = np.concatenate([np.zeros((0, 4)), *(image.boxes_xyxy for image, _ in known)])
    sizes_hw = np.repeat([size_hw for _, size_hw in known], [len(image.boxes_xyxy) for image, _ in known], axis=0)
    return numbers, sizes_hw.reshape(-1, 2)


def _check_meaning(
    framed: Sequence[tuple[LabelledImage, Stated, tuple[int, int]]], form: BoxForm, log: FindingLog
) -> None:
    """Whether the boxes of a split look as if they meant something else; those in fractions are read line by line."""
    said_in_pixels = [entry for entry in framed if len(entry[1].boxes_xyxy) and not entry[0].in_fractions]
    for own in sorted({image.form for image, _, _ in said_in_pixels}):
        mine = [entry for entry in said_in_pixels if entry[0].form == own]
        boxes = [one.boxes_xyxy for _, one, _ in mine]
        sizes_hw = np.repeat([size_hw for _, _, size_hw in mine], list(map(len, boxes)), axis=0)
        check_meaning(np.concatenate(boxes), sizes_hw, own, form, log, f"{mine[0][0].where} and on")


def check_unnamed(unnamed: Mapping[Any, int], total: int, where: str, log: FindingLog) -> None:
    """Whether the objects of class ids without a name are too many for a slip: left out, they would be background.

    unnamed: how many objects each such id has; total: how many objects there are.
    """
    lost = sum(unnamed.values())
    if any(lost >= least and lost > part * total for least, part in _UNNAMED):
        ids = first_few([one_line(class_id, 40) for class_id in sorted(unnamed, key=str)], 5)
        said, cure = f"have class ids that have no name ({ids})", "Name them"
        if list(map(str, unnamed)) == ["None"]:
            said, cure = "have no class id", "Give them one"
        message = (
            f"{lost:,} of {total:,} objects {said}; left out, they would be background. {cure}, or take them out of "
            "the annotations."
        )
        log.add("unnamed-ids", "refused", where, message, count=lost)


def number(value: object) -> float:
    """A number as written, with a decimal comma too, but not `1,234`: it may be a thousand. NaN for what is none."""
    if isinstance(value, str) and "," in value and not re.fullmatch(r"\s*-?\d{1,3}(,\d{3})+\s*", value):
        value = value.replace(",", ".")
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


def box_numbers(box: Any) -> Any:
    """A box that is an object with a name for each number, as [x, y, width, height]; any other value as it is."""
    if isinstance(box, Mapping):
        for keys in _BOX_KEYS:
            if box.keys() >= set(keys):
                x, y, width, height = (number(box[key]) for key in keys)
                return [x, y, width, height] if keys[3] in ("height", "h") else [x, y, width - x, height - y]
    return box


def size_hw(height: object, width: object) -> tuple[int, int] | None:
    """A stated size; None for what is none."""
    sides = number(height), number(width)
    return (round(sides[0]), round(sides[1])) if all(1 <= side < 2**31 for side in sides) else None


def is_true(written: Any) -> bool:
    """Of 1, 1.0, true, and the same as text."""
    text = str(written).strip().lower()
    try:
        value = float(text)
        return value != 0 and not math.isnan(value)
    except ValueError:
        return text in ("true", "yes")

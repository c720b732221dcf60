"""The one in-memory form of a data set: every reader returns it; audit, data set, evaluation and sharding take it.

Arrays are numpy: n objects per image, K categories. A category's place in `Annotations.categories` is its label.
"""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, shortened
from ddetr.untrusted import MAX_CLASSES, MAX_NAME, MAX_OBJECTS, MAX_PLACE, MAX_PLACES
from ddetr.wording import did_you_mean, first_few

ACTIONS = ("note", "repaired", "dropped", "refused")


@dataclass(frozen=True)
class Category:
    """A class; its index in `Annotations.categories` is its label."""

    category_id: int  # the data set's own id (COCO: as in the file; VOC: label + 1; YOLO: the id in the label files)
    name: str


@dataclass(frozen=True)
class ImageRecord:
    """One image with its n objects.

    `size_hw` is the frame that the boxes live in: the upright image (EXIF orientation applied), except where the
    annotations were visibly made on the stored, unrotated pixels; `read_image(path, size_hw)` returns that frame.
    """

    image_id: int
    path: Path
    size_hw: tuple[int, int]
    boxes_xyxy: np.ndarray  # (n, 4) float32, pixels, clipped to the image, never degenerate
    labels: np.ndarray  # (n,) int64, 0..K-1
    area: np.ndarray  # (n,) float32, pixels^2 (from the box where the data set gives none)
    ignore: np.ndarray  # (n,) bool: crowd (COCO) or difficult (VOC): not trained on, an ignore region in evaluation


@dataclass(frozen=True)
class Finding:
    """Something about the data that a person should know, at a place that a person can find.

    `action`: "note", "repaired", "dropped" or "refused" (training must not start). `count` is the number of places
    that the finding stands for: more than 1 where listing each would help nobody.
    """

    kind: str  # stable slug, e.g. "degenerate-box"
    action: str
    where: str  # file + line/index/id: "Annotations/BloodImage_00338.xml, object 12"
    message: str  # one sentence: what is wrong and what was done
    count: int = 1
    image: str | None = None  # of "missing-image": its name, as the data set writes it

    def __post_init__(self) -> None:
        assert self.action in ACTIONS, self.action


# Of findings that are "dropped" or "refused": those that leave out a whole image.
_IMAGE_KINDS = frozenset(
    [
        *("image-entry", "missing-image", "every-image-missing", "unreadable-image", "size-mismatch"),
        *("missing-annotation", "malformed-xml", "malformed-json", "malformed-labels", "image-path-differs"),
        *("duplicate-image-id", "ambiguous-image", "duplicate-file", "image-not-read"),
        *("several-annotations", "labels-without-image", "not-annotated"),
    ]
)
_FEW_LOST = 5  # images: fewer may be lost without a reason


@dataclass(frozen=True)
class Annotations:
    """A split of a data set, read whole."""

    name: str  # for people: "coco_tiny/train2017"
    format: str  # a name of ddetr.datasets.load.FORMATS
    categories: tuple[Category, ...]
    images: Sequence[ImageRecord]
    findings: tuple[Finding, ...] = ()
    split: str = ""  # as the data set calls it
    is_held_back: bool = False  # a part of the training split, kept out of training (`splits.hold_back`)

    @property
    def num_images_left_out(self) -> int:
        """Images that the data set names and `images` lacks."""
        dropped = [finding for finding in self.findings if finding.action in ("dropped", "refused")]
        return sum(finding.count for finding in dropped if finding.kind in _IMAGE_KINDS)


def are_most(num_lost: int, num_left: int) -> bool:
    """Whether so many images that are not there, beside those that are, are no slip: a wrong path, or a download that
    is not finished."""
    return num_lost >= _FEW_LOST and num_lost > num_left


class ImageTable(Sequence[ImageRecord]):
    """Images and objects in a handful of flat arrays; an `ImageRecord` of views is made when one is asked for.

    A list of records for COCO's 118,000 images would be a million small Python objects, which every loader worker
    copies page by page as their reference counts change; the flat arrays stay shared.
    """

    def __init__(
        self,
        image_ids: np.ndarray,  # (I,) int64
        paths: Sequence[str],  # I of them
        sizes_hw: np.ndarray,  # (I, 2)
        image_index: np.ndarray,  # (n,) which image each object belongs to, not descending
        boxes_xyxy: np.ndarray,  # (n, 4)
        labels: np.ndarray,  # (n,)
        area: np.ndarray,  # (n,)
        ignore: np.ndarray,  # (n,)
    ) -> None:
        num_images = len(paths)
        assert len(image_ids) == len(sizes_hw) == num_images
        assert len(image_index) == len(boxes_xyxy) == len(labels) == len(area) == len(ignore)
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._path_bytes = b"".join(encoded)
        self._path_ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self.image_ids = np.ascontiguousarray(image_ids, dtype=np.int64)
        self.sizes_hw = np.ascontiguousarray(sizes_hw, dtype=np.int32).reshape(num_images, 2)
        counts = np.bincount(np.asarray(image_index, dtype=np.int64), minlength=num_images)
        self.offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)  # (I + 1,)
        self.boxes_xyxy = np.ascontiguousarray(boxes_xyxy, dtype=np.float32).reshape(-1, 4)
        self.labels = np.ascontiguousarray(labels, dtype=np.int64)
        self.area = np.ascontiguousarray(area, dtype=np.float32)
        self.ignore = np.ascontiguousarray(ignore, dtype=bool)
        for array in (self.boxes_xyxy, self.labels, self.area, self.ignore):
            array.flags.writeable = False  # records are views: nobody may change the data set through one

    def object_keys(self) -> np.ndarray:
        """(n,) a number for each object, equal for equal classes and boxes, and hardly ever for others."""
        columns = np.stack([self.labels, *self.boxes_xyxy.view(np.uint32).T]).astype(np.uint64)
        return np.random.default_rng(0).integers(1 << 63, size=len(columns), dtype=np.uint64) @ columns

    @classmethod
    def from_records(cls, records: Iterable[ImageRecord]) -> ImageTable:
        """A table of the records; the same one where they are a table already."""
        if isinstance(records, ImageTable):
            return records
        records = list(records)
        counts = [len(record.labels) for record in records]

        def joined(name: str, shape: tuple[int, ...], dtype: type) -> np.ndarray:
            return np.concatenate([np.empty(shape, dtype), *(getattr(record, name) for record in records)])

        return cls(
            image_ids=np.array([record.image_id for record in records], dtype=np.int64),
            paths=[str(record.path) for record in records],
            sizes_hw=np.array([record.size_hw for record in records], dtype=np.int32).reshape(-1, 2),
            image_index=np.repeat(np.arange(len(records)), counts),
            boxes_xyxy=joined("boxes_xyxy", (0, 4), np.float32),
            labels=joined("labels", (0,), np.int64),
            area=joined("area", (0,), np.float32),
            ignore=joined("ignore", (0,), bool),
        )

    def __len__(self) -> int:
        return len(self.image_ids)

    def path(self, index: int) -> Path:
        start = self._path_ends[index - 1] if index else 0
        return Path(self._path_bytes[start : self._path_ends[index]].decode("utf-8", "surrogateescape"))

    def __getitem__(self, index: int | slice) -> ImageRecord | list[ImageRecord]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = int(index)
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"image {index} of {len(self)}")
        objects = slice(self.offsets[index], self.offsets[index + 1])
        height, width = self.sizes_hw[index].tolist()
        return ImageRecord(
            image_id=int(self.image_ids[index]),
            path=self.path(index),
            size_hw=(height, width),
            boxes_xyxy=self.boxes_xyxy[objects],
            labels=self.labels[objects],
            area=self.area[objects],
            ignore=self.ignore[objects],
        )


class UnreadImage(NamedTuple):
    """What stands in the place of the sample of an image that can't be read."""

    image_id: int
    path: str
    reason: str


class FindingLog:
    """Collects a reader's findings; beyond `MAX_PLACES` of a kind only their number is kept."""

    def __init__(self) -> None:
        self._findings: list[Finding] = []
        self._seen: Counter[tuple[str, str]] = Counter()
        self._first_unlisted: dict[tuple[str, str], Finding] = {}
        self._unlisted: Counter[tuple[str, str]] = Counter()  # places

    def add(
        self, kind: str, action: str, where: str, message: str, count: int = 1, *, image: str | None = None
    ) -> None:
        key = (kind, action)
        where, message = shortened(where, MAX_PLACE), shortened(message, MAX_PLACE)
        image = None if image is None else shortened(image, MAX_PLACE)
        self._seen[key] += 1
        if self._seen[key] <= MAX_PLACES:
            self._findings.append(Finding(kind, action, where, message, count, image))
        else:
            self._unlisted[key] += count
            if key not in self._first_unlisted:
                self._first_unlisted[key] = Finding(kind, action, f"{where} and on", message, image=image)

    def freeze(self) -> tuple[Finding, ...]:
        rest = (replace(first, count=self._unlisted[key]) for key, first in self._first_unlisted.items())
        return (*self._findings, *rest)


def clip_boxes(boxes_xyxy: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """(n, 4) corners clipped to images of (n, 2) or (2,) sizes (h, w), in the input's precision."""
    sizes_hw = np.asarray(sizes_hw).reshape(-1, 2)
    limits = np.concatenate([sizes_hw[:, ::-1], sizes_hw[:, ::-1]], axis=1)
    return np.clip(boxes_xyxy, 0, limits)


@dataclass(frozen=True)
class BoxCheck:
    """(n,) masks over boxes as written: which are unusable and which were changed (see `check_boxes`)."""

    boxes_xyxy: np.ndarray  # (n, 4) float32, clipped
    not_finite: np.ndarray
    degenerate: np.ndarray  # no width or no height as written
    outside: np.ndarray  # a real box, but nothing of it lies in the image
    clipped: np.ndarray  # more than a pixel lay outside; less is rounding (VOC's inclusive corners) and not reported

    @property
    def usable(self) -> np.ndarray:
        return ~(self.not_finite | self.degenerate | self.outside)


def check_boxes(boxes_xyxy: np.ndarray, sizes_hw: np.ndarray) -> BoxCheck:
    """The rule of all readers for (n, 4) corners as written in images of (n, 2) or (2,) sizes (h, w)."""
    boxes_xyxy = np.asarray(boxes_xyxy, dtype=np.float64).reshape(-1, 4)
    not_finite = ~np.isfinite(boxes_xyxy).all(axis=1)
    finite = np.where(not_finite[:, None], 0.0, boxes_xyxy)
    clipped = clip_boxes(finite, sizes_hw).astype(np.float32)
    with np.errstate(over="ignore"):  # beyond float32 is outside of any image
        as_used = finite.astype(np.float32)
    degenerate = (as_used[:, 2:] <= as_used[:, :2]).any(axis=1) & ~not_finite
    empty = (clipped[:, 2:] <= clipped[:, :2]).any(axis=1)
    outside = empty & ~degenerate & ~not_finite
    moved = (np.abs(clipped - finite) > 1.0).any(axis=1) & ~(not_finite | degenerate | outside)
    return BoxCheck(clipped, not_finite, degenerate, outside, moved)


def report_boxes(log: FindingLog, check: BoxCheck, boxes_as_written: np.ndarray, where: Callable[[int], str]) -> None:
    """Adds the findings of `check`; `where(i)` names the place of box i."""

    def add(mask: np.ndarray, kind: str, action: str, message: str) -> None:
        for i in np.flatnonzero(mask):
            numbers = ", ".join(f"{value:g}" for value in boxes_as_written[i])
            log.add(kind, action, where(int(i)), message.format(box=f"({numbers})"))

    if not (check.not_finite | check.degenerate | check.outside | check.clipped).any():
        return
    add(check.not_finite, "nan-box", "refused", "The box {box} has a coordinate that is no number; correct it.")
    add(check.degenerate, "degenerate-box", "dropped", "The box {box} has no width or no height; it was left out.")
    add(check.outside, "box-outside-image", "dropped", "The box {box} lies outside its image; it was left out.")
    add(check.clipped, "box-clipped", "repaired", "The box {box} reached out of its image and was clipped to it.")


def match_categories(
    own: Sequence[Category], wanted: Sequence[Category], log: FindingLog, where: str, *, by_id: bool
) -> np.ndarray:
    """(len(own),) label in `wanted` of each own category, -1 for those it does not know.

    With `by_id` the name must agree and so should the id; where only the name does, the name decides, because ids
    are numbered anew by many tools while names are what people mean.
    """
    by_pair = {(category.category_id, category.name): label for label, category in enumerate(wanted)}
    by_name: dict[str, list[int]] = {}
    for label, category in enumerate(wanted):
        by_name.setdefault(category.name, []).append(label)
    labels = np.full(len(own), -1, dtype=np.int64)
    for i, category in enumerate(own):
        same_name = by_name.get(category.name, [])
        if (category.category_id, category.name) in by_pair:
            labels[i] = by_pair[category.category_id, category.name]
        elif len(same_name) == 1:
            labels[i] = same_name[0]
            if by_id:
                theirs = wanted[same_name[0]].category_id
                message = (
                    f"{category.name!r} has id {category.category_id} here and {theirs} in training: matched by name."
                )
                log.add("category-id-differs", "repaired", where, message)
    return labels


def alike(name: str) -> str:
    """The same for class names that people take for one: whatever their capitals, spaces, `_`, `-`, and however their
    accents are composed."""
    return " ".join(unicodedata.normalize("NFKC", name).casefold().replace("_", " ").replace("-", " ").split())


def unlike_training(name: str, categories: Iterable[Category]) -> str:
    """Says that no class of training has this name, and which one's is nearly the same."""
    key = alike(name)
    near = next((category.name for category in categories if alike(category.name) == key), None)
    training = f", which has {shortened(near, SHOWN_NAME)!r}" if near is not None else ""
    return f"{shortened(name, SHOWN_NAME)!r} is no class of the training set{training}"


def _report_alike_names(name: str, categories: Sequence[Category], log: FindingLog) -> None:
    of_key: dict[str, list[Category]] = {}
    for category in categories:
        of_key.setdefault(alike(category.name), []).append(category)
    for group in of_key.values():
        if len(group) > 1:
            listed = first_few((f"{shortened(c.name, SHOWN_NAME)!r} (id {c.category_id})" for c in group), 4)
            same = len({category.name for category in group}) == 1
            message = f"{'One name stands for several classes' if same else 'Class names differ by little'}: {listed}."
            log.add("alike-class-names", "note", name, f"{message} If they are one class, give them one id and name.")


def whole(
    root: Path, split: str, format: str, categories: Sequence[Category], images: ImageTable, log: FindingLog
) -> Annotations:
    """A split as its reader returns it; what no training could take is a refused finding."""
    name = f"{root.name}/{split}"
    if len(categories) > MAX_CLASSES:
        message = f"There are {len(categories):,} classes, more than {MAX_CLASSES:,}: no model here could learn them."
        log.add("too-many-classes", "refused", name, message)
    for category in categories:
        if not -(2**63) <= category.category_id < 2**63:
            message = (
                f"The id of class {shortened(category.name, SHOWN_NAME)!r} has more than 64 bits; give it another."
            )
            log.add("category-id", "refused", name, message)
        if len(category.name) > MAX_NAME:
            message = f"The class name has {len(category.name):,} characters, more than {MAX_NAME:,}; shorten it."
            log.add("class-name", "refused", f"{name}, {shortened(category.name, SHOWN_NAME)}", message)
    _report_alike_names(name, categories, log)
    counts = np.diff(images.offsets)
    for index in np.flatnonzero(counts > MAX_OBJECTS).tolist():
        report_crowd(log, str(images.path(index)), int(counts[index]))
    return Annotations(name, format, tuple(categories), images, log.freeze(), split)


def report_crowd(log: FindingLog, where: str, num_objects: int) -> None:
    """An image has more objects than MAX_OBJECTS: readers read no more of them."""
    message = f"The image has {num_objects:,} objects, more than {MAX_OBJECTS:,}: cut it into parts."
    log.add("too-many-objects", "refused", where, message)


def split_error(path: Path, split: str, known: Sequence[str]) -> InputError:
    listed = ", ".join(known) if known else "none"
    return InputError(f'{path} has no split "{split}"; it has: {listed}{did_you_mean(split, known)}')

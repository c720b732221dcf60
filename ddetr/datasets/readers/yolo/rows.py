"""What the lines of YOLO's label files say: `class x y w h`, perhaps a confidence or a track behind it, a polygon, or a
box with keypoints.

The class is an id, or one of the names, as some write it (`traffic light 0.5 0.5 0.2 0.2`).

Some of it no single line tells: whether 14 numbers are seven corners or a box and five keypoints, whether a sixth word
is a confidence or an angle, whether x and y are the centre. All lines are read, and what the whole data set looks like
decides, or stops.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import FindingLog, alike, report_crowd
from ddetr.datasets.box_form import corners_of
from ddetr.datasets.config import BoxForm
from ddetr.datasets.readers.box_meaning import check_fractions, num_misfits
from ddetr.printable import one_line
from ddetr.untrusted import MAX_OBJECTS

MAX_RELATIVE = 1.5  # beyond it a line holds pixels, not fractions; up to it a box just reaches out of the image
OWN_FORM: BoxForm = "cxcywh-relative"
_FEW = 3  # boxes say nothing of what all boxes are
_MOST_WORDS = 16  # of a class name in a row
_FEW_ODD = 0.05  # of the numbers behind boxes: fewer that are no confidences are mistakes of their own
_ROUNDING = 1e-3  # by which a confidence may be above 1
_LARGEST_ANGLE = 360
_NO_CHANCE = 5  # pairs of equal numbers in a file that chance would make, and none is there
_CLEARER = 20  # times fewer boxes don't fit into their images when they are read by the right numbers
_BOX, _POLYGON, _NEITHER, _TRIANGLE_OR_TRACK = range(4)
Class = int | str  # the id in a row, or the words in its place that are none of the names


@dataclass(frozen=True, slots=True)
class Rows:
    """The n objects of a label file, read both ways; corners are fractions of the image."""

    where: str
    ids: list[Class]
    kinds: list[int]
    numbers: list[int]  # lines of the file
    as_boxes: np.ndarray  # (n, 4) of the first four numbers as centre and size
    as_polygons: np.ndarray  # (n, 4) around all numbers as points


@dataclass
class RowReader:
    """Reads label files one after the other, and keeps count of what their lines look like."""

    log: FindingLog
    keypoint_numbers: int | None = None  # numbers of a keypoint, where the description says that there are keypoints
    polygons: bool = False  # the description says that long rows are polygons
    names: Mapping[str, int] = field(default_factory=dict)  # class names, `alike`, and their ids
    form: BoxForm = "auto"  # what the four numbers of a box are, where somebody has said it
    num_in_pixels: int = 0
    malformed: str = ""  # the first line that is no object, and
    num_malformed: int = 0
    num_boxes: int = 0
    fives: list[list[float]] = field(default_factory=list)  # the numbers of boxes that have one more behind them, and
    files_of_fives: list[int] = field(default_factory=list)  # of which file each is
    num_files: int = 0
    odd: str = ""  # the first line of them whose fifth is no confidence
    num_long: int = 0  # rows of at least seven numbers and a class
    num_like_keypoints: int = 0
    num_tracks: int = 0
    named: str = ""  # the first line with a name in place of an id, and
    num_named: int = 0
    ids: set[Class] = field(default_factory=set)

    def read(self, lines: Sequence[str], where: str) -> Rows:
        """The objects of a label file; what is no object goes to the log."""
        rows = Rows(where, [], [], [], np.empty((0, 4)), np.empty((0, 4)))
        fours, around = [], []
        seen: set[tuple[float, ...]] = set()
        repeated = 0
        self.num_files += 1
        if len(lines) > MAX_OBJECTS:
            report_crowd(self.log, where, len(lines))
        for number, line in enumerate(lines[:MAX_OBJECTS], 1):
            if not line or line.isspace():
                continue
            place = f"{where}, line {number}"
            try:
                class_id, values = self._numbers(line, place)
            except (ValueError, OverflowError):
                message = f"Expected `class x y w h`, found {one_line(line.strip(), 60)!r}; the line was left out."
                self.log.add("malformed-label", "dropped", place, message)
                self.malformed = self.malformed or line
                self.num_malformed += 1
                continue
            if any(abs(value) > MAX_RELATIVE for value in values[:4]):
                message = (
                    f"Expected fractions of the image, found {one_line(line.strip(), 60)!r}; the line was left out."
                )
                self.log.add("not-relative", "dropped", place, message)
                self.num_in_pixels += 1
                continue
            row = (class_id, *values)
            if row in seen:
                repeated += 1
                continue
            seen.add(row)
            kind = self._kind(values)
            x, y, w, h = values[:4]
            is_own = self.form == "auto"
            fours.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2) if is_own else (x, y, w, h))
            if kind == _BOX:
                self._count_box(values, line)
            else:
                xs, ys = values[::2], values[1::2]
                corners = (_least(xs), _least(ys), -_least([-x for x in xs]), -_least([-y for y in ys]))
                around.append((len(fours) - 1, corners))
            rows.ids.append(class_id)
            rows.kinds.append(kind)
            rows.numbers.append(number)
            self.ids.add(class_id)
        as_boxes = as_polygons = np.array(fours, dtype=np.float64).reshape(-1, 4)
        if self.form != "auto":
            as_boxes = as_polygons = corners_of(as_boxes, self.form)
        if around:
            as_polygons = as_boxes.copy()
            as_polygons[[i for i, _ in around]] = [corners for _, corners in around]
        if repeated:
            message = f"{repeated:,} lines say the same as another one of the file; they were used once."
            self.log.add("repeated-line", "repaired", where, message, count=repeated)
        return Rows(where, rows.ids, rows.kinds, rows.numbers, as_boxes, as_polygons)

    def _numbers(self, line: str, place: str) -> tuple[Class, list[float]]:
        has_commas = "," in line or ";" in line
        words = _without_commas(line) if has_commas else line.split()
        class_id = class_id_of(words[0]) if words else None
        try:
            values = [float(word) for word in words[1:]]
        except ValueError:
            class_id = None
        if class_id is None:
            class_id, values = self._named(line, words)
        if len(values) < 4:
            raise ValueError(line)
        if has_commas:
            message = "The numbers are separated by commas or semicolons, or have decimal commas; they were read so."
            self.log.add("commas", "repaired", place, message)
        return class_id, values

    def _named(self, line: str, words: Sequence[str]) -> tuple[Class, list[float]]:
        """The class and the numbers of a row that begins with a name, the longest that is known; words that are no name
        are a class too where fractions follow, but one that nothing names."""
        named = class_words(words)
        most = len(named) + sum(map(_is_number, words[len(named) :])) - 4  # a name may end in numbers
        if not named:
            raise ValueError(line)
        for count in range(min(most, _MOST_WORDS), 0, -1):
            name = " ".join(words[:count]).strip("\"'")
            class_id = self.names.get(alike(name))
            if class_id is not None:
                self.named = self.named or line
                self.num_named += 1
                return class_id, [float(word) for word in words[count:]]
        values = [float(word) for word in words[len(named) :]]
        if any(abs(value) > MAX_RELATIVE for value in values[:4]):
            raise ValueError(line)  # OIDv4 ToolKit's, KITTI's
        return " ".join(named).strip("\"'"), values

    def _kind(self, values: list[float]) -> int:
        count = len(values)
        if count < 6:  # a box, and perhaps a confidence
            return _BOX
        if self.keypoint_numbers is not None:
            return _BOX if (count - 4) % self.keypoint_numbers == 0 else _NEITHER
        inside = all(not abs(value) > MAX_RELATIVE for value in values)  # nan is said later
        if count >= 7:
            self.num_long += 1
            if _like_keypoints(values):
                self.num_like_keypoints += 1
        if count == 6 and values[5] % 1 == 0 and values[5] >= 0 and 0 <= values[4] <= 1:
            self.num_tracks += values[5] > 1
            return _TRIANGLE_OR_TRACK
        return _POLYGON if inside and count % 2 == 0 else _NEITHER

    def _count_box(self, values: list[float], line: str) -> None:
        self.num_boxes += 1
        if len(values) == 5:
            self.fives.append(values)
            self.files_of_fives.append(self.num_files)
            if not self.odd and _is_no_confidence(values[4]):
                self.odd = line

    def settle(self, root: Path, rows: Sequence[Rows], training: Callable[[], RowReader] | None = None) -> bool:
        """What all lines together look like, those of `rows`; True where the long rows are boxes with keypoints.

        training: has read the lines of the training split, for another one that is too small to tell.
        """
        if self.num_in_pixels > self.num_boxes + self.num_long:
            message = (
                f"{self.num_in_pixels:,} lines, more than half, hold no fractions of the image; they look like pixels. "
                "Divide x and width by the image's width, y and height by its height."
            )
            self.log.add("boxes-not-relative", "refused", str(root), message, count=self.num_in_pixels)
        if self.num_malformed > _FEW + self.num_boxes + self.num_long:
            message = (
                f"{self.num_malformed:,} lines, more than half, are no `class x y w h`, such as "
                f"{one_line(self.malformed.strip(), 60)!r}: these are not YOLO's label files. Convert them first."
            )
            self.log.add("not-yolo-rows", "refused", str(root), message, count=self.num_malformed)
        if self.num_named:
            message = (
                f"{self.num_named:,} rows hold the name of a class in place of its id, such as "
                f"{one_line(self.named.strip(), 60)!r}; they were read by the names."
            )
            self.log.add("class-name-in-row", "repaired", str(root), message, count=self.num_named)
        if self.form == "auto":
            boxes = [read.as_boxes[np.array(read.kinds) == _BOX] if any(read.kinds) else read.as_boxes for read in rows]
            if not self._confidences_are_first(root) and self.num_boxes > _FEW:
                check_fractions(np.concatenate(boxes), OWN_FORM, self.log, str(root))
            self._check_confidences(root, training)
        if self.num_tracks:
            message = (
                f"{self.num_tracks:,} rows end in a confidence and the number of a track, which were ignored; they "
                "look like what a detector found, not like what a person drew."
            )
            self.log.add("track-numbers", "note", str(root), message, count=self.num_tracks)
        keypoints = self.num_like_keypoints * 2 > self.num_long and not self.polygons
        if keypoints:
            message = (
                f"{self.num_like_keypoints:,} of {self.num_long:,} long rows look like a box and its keypoints, not "
                "like a polygon. Add kpt_shape: [number of keypoints, 2 or 3] to the data set's YAML, or task: segment "
                "where they are polygons."
            )
            self.log.add("keypoints-or-polygons", "refused", str(root), message, count=self.num_like_keypoints)
        return keypoints

    def _confidences_are_first(self, root: Path) -> bool:
        """Whether boxes of five numbers fit into their images by the last four of them, and not by the first."""
        fives = np.array(self.fives, dtype=np.float64).reshape(-1, 5)
        count = num_misfits(fives[:, :4], OWN_FORM)
        if count <= max(_FEW, _FEW_ODD * len(fives)) or num_misfits(fives[:, 1:], OWN_FORM) * _CLEARER > count:
            return False
        message = (
            f"{count:,} of {len(fives):,} boxes don't fit into their images as `x y w h confidence`, but do as "
            "`confidence x y w h`. If so, take the confidence out, or put it last; if they are right as they are, read "
            f"them by --data.boxes {OWN_FORM}."
        )
        self.log.add("confidence-first", "refused", str(root), message, count=count)
        return True

    def _check_confidences(self, root: Path, training: Callable[[], RowReader] | None) -> None:
        """Whether numbers behind boxes are angles: the boxes that they turn are others."""
        if self._say_nothing_of_boxes():
            return
        if training is not None and (of_training := training()).fives and of_training._say_nothing_of_boxes():
            return
        behind = np.array([values[4] for values in self.fives], dtype=np.float64)
        odd = _is_no_confidence(behind)
        message = (
            f"{odd.sum():,} of {len(behind):,} boxes have a number behind them that is no confidence, such as "
            f"{one_line(self.odd.strip(), 60)!r}. If it is the angle of a rotated box, write the box by its corners "
            "(`class x1 y1 x2 y2 x3 y3 x4 y4`); if it says nothing of the box, as the number of a track does, read "
            f"the boxes by --data.boxes {OWN_FORM}."
        )
        self.log.add("angles-behind-boxes", "refused", str(root), message, count=int(odd.sum()))

    def _say_nothing_of_boxes(self) -> bool:
        """Whether the numbers behind boxes are confidences, or tell tracks apart."""
        behind = np.array([values[4] for values in self.fives], dtype=np.float64)
        odd = _is_no_confidence(behind)
        are_whole = (behind == np.floor(behind)) & (behind >= 0)
        share = 0.5 if (are_whole | ~odd).all() else _FEW_ODD
        if not odd.any() or odd.sum() <= share * len(behind):
            return True
        return bool(are_whole.all()) and _are_tracks(behind, np.array(self.files_of_fives))

    def boxes(self, rows: Rows, keypoints: bool) -> tuple[list[Class], np.ndarray, list[int]]:
        """Classes, corners (n, 4) in fractions of the image, and the line of each object.

        keypoints: what `settle` said.
        """
        if not any(rows.kinds):
            return rows.ids, rows.as_boxes, rows.numbers
        kinds = np.array(rows.kinds, dtype=np.int64)
        is_box = kinds == _BOX
        if keypoints:
            is_box[:] = True
        elif self.num_tracks:
            is_box |= kinds == _TRIANGLE_OR_TRACK
        kept = is_box | (kinds != _NEITHER)
        for i in np.flatnonzero(~kept).tolist():
            message = "Its numbers are neither a box nor the points of a polygon; the line was left out."
            self.log.add("malformed-label", "dropped", f"{rows.where}, line {rows.numbers[i]}", message)
        corners = np.where(is_box[:, None], rows.as_boxes, rows.as_polygons)
        chosen = np.flatnonzero(kept).tolist()
        return [rows.ids[i] for i in chosen], corners[kept], [rows.numbers[i] for i in chosen]


def _is_no_confidence(value: Any) -> Any:
    """Of a number, or of (n,): whether it lies outside of 0..1 by more than rounding, and is no -1, which stands for
    none."""
    return ((value < 0) & (value != -1)) | (value > 1 + _ROUNDING)


def _are_tracks(numbers: np.ndarray, files: np.ndarray) -> bool:
    """Whether (n,) whole numbers are no angles, but tell the objects of an image apart, as the numbers of tracks do:
    none is in a file twice, and that is no chance. files: (n,) of which file each is."""
    _, counts = np.unique(np.stack([files, numbers]), axis=1, return_counts=True)
    if (counts > 1).any() or numbers.max() > _LARGEST_ANGLE:
        return bool((counts == 1).all())
    _, of_file = np.unique(files, return_counts=True)
    _, of_number = np.unique(numbers, return_counts=True)
    pairs = (of_file * (of_file - 1) / 2).sum()
    return bool(pairs * ((of_number / len(numbers)) ** 2).sum() >= _NO_CHANCE)


def class_id_of(word: str) -> int | None:
    """The whole number that a word is, `1.0` too; None where it is none."""
    try:
        value = float(word)
    except ValueError:
        return None
    if math.isinf(value) and word.isdecimal():
        return 2**62  # beyond any class
    return int(value) if math.isfinite(value) and value == math.floor(value) else None


def class_words(words: Sequence[str]) -> Sequence[str]:
    """The words before the last four or more numbers of a row, of which the last is no number; [] where it doesn't end
    in so many."""
    count = len(words)
    while count and _is_number(words[count - 1]):
        count -= 1
    return words[:count] if 0 < count <= min(len(words) - 4, _MOST_WORDS) else []


def _is_number(word: str) -> bool:
    try:
        float(word)
    except ValueError:
        return False
    return True


def _without_commas(line: str) -> list[str]:
    words = line.replace(";", " ").split()
    if len(words) >= 5:  # `0, 0.5, 0.5, 0.1, 0.1` or `0 0,5 0,5 0,1 0,1`
        return [word.rstrip(",").replace(",", ".") for word in words]
    return line.replace(",", " ").replace(";", " ").split()


def _least(values: list[float]) -> float:
    """The least value; nan where one is no number."""
    return math.nan if any(math.isnan(value) for value in values) else min(values)


def _like_keypoints(values: list[float]) -> bool:
    """Whether the numbers look like a box and keypoints in it, with or without a flag each, and not like a polygon,
    whose second point would lie far away from all others."""
    x, y, w, h = values[:4]
    rest = values[4:]
    if len(rest) % 3 == 0 and all(flag in (0, 1, 2) for flag in rest[2::3]):
        points = [(px, py) for px, py, flag in zip(rest[::3], rest[1::3], rest[2::3]) if flag]
        no_polygon = len(values) % 2 or 2 in rest[2::3]
    elif len(rest) % 2 == 0 and len(rest) >= 6:
        points = [(px, py) for px, py in zip(rest[::2], rest[1::2]) if px or py]
        no_polygon = False
    else:
        return False
    if not points:  # none of the keypoints was marked
        return not any(rest)

    def inside(px: float, py: float) -> bool:
        return abs(px - x) <= w * 0.6 + 0.01 and abs(py - y) <= h * 0.6 + 0.01

    return all(inside(*point) for point in points) and (no_polygon or not inside(w, h))

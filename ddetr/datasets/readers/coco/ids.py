"""COCO ids to images and classes: numbers as tables make them of ids, names that stand in their place, ids that are off
by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.readers.coco.content import whole_number
from ddetr.untrusted import one_line
from ddetr.wording import first_few

_FEW_IDS = 3  # fewer that are off by one are so by chance


def is_id(value: Any) -> bool:
    """Whether something can be told apart by it: a number (a table with a gap makes 1.0 of all) or a text."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def integer_ids(ids: Sequence[Any], log: FindingLog, shown: str) -> np.ndarray:
    numbers = [whole_number(i) for i in ids]
    with suppress(OverflowError):
        if None not in numbers and len(set(numbers)) == len(numbers):
            return np.array(numbers, dtype=np.int64)
    message = "Image ids are no whole numbers; the images were numbered from 1 in the file's order."
    log.add("image-id-not-integer", "repaired", shown, message, count=len(ids))
    return np.arange(1, len(ids) + 1)


def look_up(keys: Sequence[Any], index: Mapping[Any, int]) -> np.ndarray:
    """(n,) index of each key, -1 where there is none; "7" and 7.0 find 7, and the other way round."""
    if not set(map(type, keys)) <= {int, float, str}:  # a list or an object stands where an id should
        keys = [key if is_id(key) else None for key in keys]
    found = np.array([index.get(key, -1) for key in keys], dtype=np.int64)
    if (found < 0).any():
        by_number: dict[int | None, int] = {}
        for key, position in index.items():
            number = whole_number(key)
            by_number[number] = -1 if number in by_number else position  # two that fit are none
        by_number[None] = -1
        for i in np.flatnonzero(found < 0):
            found[i] = by_number.get(whole_number(keys[i]), -1)
    return found


def look_up_names(
    image_index: np.ndarray,
    labels: np.ndarray,
    objects: Sequence[dict[str, Any]],
    names: Sequence[str],
    class_names: Sequence[str],
    log: FindingLog,
    shown: str,
) -> None:
    """Fills in images and classes of objects that say a name, one that is the only one of it, where an id should
    stand."""
    files = [name.replace("\\", "/").rpartition("/")[2] for name in names] if (image_index < 0).any() else []
    stems = [file.rpartition(".")[0] for file in files]
    for found, key, kind, listed in (
        (image_index, "image_id", "image-id-is-name", (names, files, stems)),
        (labels, "category_id", "category-id-is-name", (class_names,)),
    ):
        missing = np.flatnonzero(found < 0).tolist()
        words = {i: word.strip() for i in missing if isinstance(word := objects[i].get(key), str)}
        words = {i: word for i, word in words.items() if whole_number(word) is None}
        if not words:
            continue
        for possible in listed:
            count = Counter(possible)
            position = {name: at for at, name in enumerate(possible) if count[name] == 1}
            for i, word in words.items():
                found[i] = position.get(word, -1) if found[i] < 0 else found[i]
        repaired = [i for i in words if found[i] >= 0]
        if repaired:
            example = one_line(words[repaired[0]])
            message = f"The {key} of {len(repaired):,} objects is a name, such as {example}; they were read by it."
            log.add(kind, "repaired", shown, message, count=len(repaired))


def report_classes_off_by_one(
    objects: Sequence[dict[str, Any]], label_of_id: Mapping[int, int], shown: str, log: FindingLog
) -> bool:
    """Whether the objects' category ids, of which some are not listed, would all be after adding or subtracting one."""
    used, unlisted, shift = _off_by_one(objects, "category_id", label_of_id)
    if not shift:
        return False
    change, back = ("Add 1 to", "subtract 1 from") if shift > 0 else ("Subtract 1 from", "add 1 to")
    message = (
        f"The objects' category ids are {_span(used)}, those of the categories {_span(label_of_id)}: it looks as if "
        f"each object had the name of its class's neighbour. {change} the ids of the objects, or {back} those of the "
        f"categories; if they are right, list {_span(unlisted)} among the categories or take these objects out."
    )
    log.add("ids-off-by-one", "refused", shown, message)
    return True


def report_images_off_by_one(
    objects: Sequence[dict[str, Any]], index_of_id: Mapping[Any, int], shown: str, log: FindingLog
) -> None:
    """The same of the objects' image ids: their boxes would lie on the neighbours of their images."""
    listed = {number for image_id in index_of_id if (number := whole_number(image_id)) is not None}
    used, unlisted, shift = _off_by_one(objects, "image_id", listed)
    if shift and len(used) >= _FEW_IDS:
        change, back = ("Add 1 to", "subtract 1 from") if shift > 0 else ("Subtract 1 from", "add 1 to")
        message = (
            f"The objects' image ids are {_span(used)}, those of the images {_span(listed)}: it looks as if each box "
            f"were on the neighbour of its image. {change} the image ids of the objects, or {back} the ids of the "
            f"images; if they are right, take the objects of {_span(unlisted)} out."
        )
        log.add("image-ids-off-by-one", "refused", shown, message)


def _off_by_one(objects: Sequence[dict[str, Any]], key: str, listed: Collection[int]) -> tuple[set[int], set[int], int]:
    """The ids that objects use, those of them that are not listed, and the 1 or -1 after whose addition all are; 0
    where none is missing, or neither helps."""
    used = {number for obj in objects if (number := whole_number(obj.get(key))) is not None}
    unlisted = {i for i in used if i not in listed}
    shift = next((by for by in (1, -1) if all(i + by in listed for i in used)), 0)
    return used, unlisted, shift if unlisted else 0


def _span(ids: Collection[int]) -> str:
    low, high = min(ids), max(ids)
    if len(ids) > 2 and high - low + 1 == len(ids):
        return f"{low} to {high}"
    return first_few(sorted(ids), 5)

"""COCO ids to images and classes: numbers as tables make them of ids, names that stand in their place, ids that are off
by one."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.readers.coco.content import whole_number
from ddetr.printable import one_line
from ddetr.wording import first_few

_OFF_BY_ONE = {  # the last: fewer ids that are off by one are so by chance
    "category_id": ("ids-off-by-one", "category", "categories", "had the name of its class's neighbour", 1),
    "image_id": ("image-ids-off-by-one", "image", "images", "lay on the neighbour of its image", 3),
}


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


def report_off_by_one(
    objects: Sequence[dict[str, Any]], key: str, listed: Iterable[Any], shown: str, log: FindingLog
) -> bool:
    """Whether the ids of classes or of images that objects have, of which some are not listed, would all be after
    adding or subtracting one."""
    kind, noun, nouns, said, fewest = _OFF_BY_ONE[key]
    known = {number for i in listed if (number := whole_number(i)) is not None}
    used = {number for obj in objects if (number := whole_number(obj.get(key))) is not None}
    shift = next((by for by in (1, -1) if all(i + by in known for i in used)), 0)
    if used <= known or not shift or len(used) < fewest:
        return False
    change, back = ("Add 1 to", "subtract 1 from") if shift > 0 else ("Subtract 1 from", "add 1 to")
    message = (
        f"The objects' {noun} ids are {_span(used)}, those of the {nouns} {_span(known)}: it looks as if each object "
        f"{said}. {change} the {noun} ids of the objects, or {back} those of the {nouns}; if they are right, list "
        f"{_span(used - known)} among the {nouns} or take these objects out."
    )
    log.add(kind, "refused", shown, message)
    return True


def _span(ids: Collection[int]) -> str:
    low, high = min(ids), max(ids)
    if len(ids) > 2 and high - low + 1 == len(ids):
        return f"{low} to {high}"
    return first_few(sorted(ids), 5)

"""A COCO annotation file's JSON: fast and small in memory, with errors that name the place."""

from __future__ import annotations

import gc
import json
import mmap
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Category, FindingLog
from ddetr.datasets.readers.json_files import json_text
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_ANNOTATION_BYTES, open_file, parse_json, without_doubles
from ddetr.wording import first_few

_WHOLE = re.compile(r"([+-]?[0-9]{1,20})(?:\.0*)?")
_COMPARED, _COMPARED_STEP = 4_000, 64  # boxes beside which the mask is kept: the first of a file, and every 64th after
_MOST_RUNS = 10_000  # characters or numbers of such a mask
_SINGULAR = {"images": "image", "annotations": "annotation", "categories": "category"}


@contextmanager
def without_collector() -> Iterator[None]:
    """The collector would walk millions of fresh dicts again and again: half of the time, and no garbage to find."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


class NotCoco(InputError):
    """JSON that is whole, and no COCO annotation file."""


def load_json(file: Path, log: FindingLog) -> dict[str, Any]:
    """The content without the masks, which are most of COCO's half gigabyte and no part of detection, but for those of
    some boxes, which `mask.py` compares with them."""
    number = count().__next__

    def without_mask(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        entry = dict(pairs)
        if len(entry) < len(pairs):  # asked here too: a call for each of a million objects takes time
            without_doubles(pairs)
        if "segmentation" in entry:  # without a box, or with an empty one, it stands in for that
            try:
                _, _, width, height = entry["bbox"]
                if width > 0 and height > 0:
                    i = number()
                    kept = _small(entry["segmentation"]) if i < _COMPARED or not i % _COMPARED_STEP else None
                    if kept is None:
                        del entry["segmentation"]
                    else:
                        entry["segmentation"] = kept
            except (KeyError, TypeError, ValueError):
                pass
        return entry

    content = parse_json(json_text(file, MAX_ANNOTATION_BYTES, log, file.name), str(file), without_mask)
    if isinstance(content, dict):
        _settle_keys(content, log, file.name)
    if not isinstance(content, dict) or "images" not in content:
        found = "the keys " + first_few(content, 8) if isinstance(content, dict) else f"a {type(content).__name__}"
        raise NotCoco(
            f'{file} is no COCO annotation file: expected an object with "images", "annotations" and "categories", '
            f"found {found}"
        )
    return content


def _small(segmentation: Any) -> Any:
    """A mask with the same box around it, in little memory; None for one that is none, or is large."""
    try:
        if isinstance(segmentation, dict):
            return segmentation if len(segmentation["counts"]) <= _MOST_RUNS else None
        polygons = segmentation if isinstance(segmentation[0], list) else [segmentation]
        xs, ys = ([value for polygon in polygons for value in polygon[axis::2]] for axis in (0, 1))
        return [[min(xs), min(ys), max(xs), max(ys)]]
    except (TypeError, ValueError, KeyError, IndexError):
        return None


def _settle_keys(content: dict[str, Any], log: FindingLog, shown: str) -> None:
    """A list under another spelling of its key (`annotation`, `Images`) is taken for it, which is said."""
    for key, singular in _SINGULAR.items():
        alike = [other for other in content if other != key and other.casefold() in (key, singular)]
        if key not in content and len(alike) == 1 and isinstance(content[alike[0]], list):
            content[key] = content.pop(alike[0])
            message = f'There is no "{key}", but "{one_line(alike[0])}", which was read as that.'
            log.add("other-key", "repaired", shown, message)


def whole_number(value: Any) -> int | None:
    """7 of 7, 7.0, "7" and "7.0", as tables make them of ids; None of what is no whole number."""
    if isinstance(value, float):
        return int(value) if value.is_integer() else None
    if isinstance(value, str):
        found = _WHOLE.fullmatch(value.strip())
        return int(found[1]) if found else None
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_categories(file: Path) -> tuple[Category, ...] | None:
    """The categories alone, without parsing the rest; None where they can't be found so."""
    try:
        with (
            open_file(file, MAX_ANNOTATION_BYTES) as stream,
            mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data,
        ):
            start = data.rfind(b'"categories"')
            if start < 0:
                return None
            text = data[start : start + (1 << 24)].decode("utf-8", "ignore")
        value = text[len('"categories"') :].lstrip().removeprefix(":").lstrip()
        entries, _ = json.JSONDecoder().raw_decode(value)
        return categories_of({"categories": entries}, [], FindingLog(), "")[0] or None
    except (OSError, ValueError, RecursionError):
        return None


def entries_of(content: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    entries = content[key]
    if isinstance(entries, dict) and all(isinstance(entry, dict) for entry in entries.values()):
        return [{"id": key, **entry} for key, entry in entries.items()]  # LIVECell's annotations are written so
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{file}: "{key}" must be a list of objects')
    return entries


def categories_of(
    content: dict[str, Any], objects: Sequence[dict[str, Any]], log: FindingLog, shown: str
) -> tuple[tuple[Category, ...], dict[int, int]]:
    """The file's categories by ascending id, and the label of each id."""
    entries = content.get("categories")
    if entries and not isinstance(entries, list):
        raise InputError(f'{shown}: "categories" must be a list of objects')
    if not entries:
        ids = {number for obj in objects if (number := whole_number(obj.get("category_id"))) is not None}
        entries = [{"id": i, "name": f"class_{i}"} for i in ids]
        if ids:
            message = f'There is no "categories"; {len(ids)} classes were named after the ids in use.'
            log.add("missing-categories", "repaired", shown, message)
    by_id: dict[int, str] = {}
    unnamed: dict[int, str] = {}
    groups = Counter(str(entry.get("supercategory") or "") for entry in entries if isinstance(entry, dict))
    for position, entry in enumerate(entries):
        where = f"{shown}, category {position}"
        try:
            category_id = whole_number(entry["id"])
            if category_id is None:
                raise ValueError
            name = str(entry.get("name") or "").strip()
            if not name:
                group = str(entry.get("supercategory") or "").strip()
                name = group if groups[group] == 1 and group.lower() not in ("", "none") else f"class_{category_id}"
                unnamed[category_id] = name
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError):
            raise InputError(
                f'{where}: expected an object with an integer "id" and a "name", found {one_line(repr(entry))}.'
            ) from None
        if by_id.setdefault(category_id, name) != name:
            both = f"{one_line(by_id[category_id])!r} and {one_line(name)!r}"
            message = f"Category id {category_id} is both {both}; give one another id."
            log.add("duplicate-category", "refused", where, message)
    if unnamed:
        message = f'{len(unnamed)} categories have no "name"; they are called {first_few(unnamed.values(), 5)}.'
        log.add("missing-category-name", "repaired", shown, message, count=len(unnamed))
    ordered = tuple(Category(category_id, by_id[category_id]) for category_id in sorted(by_id))
    return ordered, {category.category_id: label for label, category in enumerate(ordered)}

"""A COCO annotation file's JSON: fast and small in memory, with errors that name the place."""

from __future__ import annotations

import gc
import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Category, FindingLog
from ddetr.errors import InputError


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


def load_json(file: Path) -> dict[str, Any]:
    """The content without the masks, which are most of COCO's half gigabyte and no part of detection."""

    def without_mask(entry: dict[str, Any]) -> dict[str, Any]:
        if "segmentation" in entry and entry.get("bbox"):  # without a box the polygons stand in for it
            del entry["segmentation"]
        return entry

    try:
        with file.open(encoding="utf-8-sig") as stream:
            content = json.load(stream, object_hook=without_mask)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{file} is broken JSON: {error.msg} at line {error.lineno}, column {error.colno}; restore or re-export it"
        ) from None
    except (OSError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{file} can't be read: {error}") from None
    if not isinstance(content, dict) or "images" not in content:
        found = f"a {type(content).__name__}" if not isinstance(content, dict) else f"the keys {', '.join(content)}"
        raise InputError(
            f'{file} is no COCO annotation file: expected an object with "images", "annotations" and "categories", '
            f"found {found}"
        )
    return content


def read_categories(file: Path) -> tuple[Category, ...] | None:
    """The categories alone, without parsing the rest; None where they can't be found so."""
    try:
        with file.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = data.rfind(b'"categories"')
            if start < 0:
                return None
            text = data[start : start + (1 << 24)].decode("utf-8", "ignore")
        value = text[len('"categories"') :].lstrip().removeprefix(":").lstrip()
        entries, _ = json.JSONDecoder().raw_decode(value)
        return categories_of({"categories": entries}, [], FindingLog(), "")[0] or None
    except (OSError, ValueError, InputError):
        return None


def entries_of(content: dict[str, Any], key: str, file: Path) -> list[dict[str, Any]]:
    entries = content[key]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise InputError(f'{file}: "{key}" must be a list of objects')
    return entries


def categories_of(
    content: dict[str, Any], objects: Sequence[dict[str, Any]], log: FindingLog, shown: str
) -> tuple[tuple[Category, ...], dict[int, int]]:
    """The file's categories by ascending id, and the label of each id."""
    entries = content.get("categories")
    if not entries:
        ids = {obj.get("category_id") for obj in objects if isinstance(obj.get("category_id"), int)}
        entries = [{"id": i, "name": f"class_{i}"} for i in ids]
        if ids:
            message = f'There is no "categories"; {len(ids)} classes were named after the ids in use.'
            log.add("missing-categories", "repaired", shown, message)
    by_id: dict[int, str] = {}
    for position, entry in enumerate(entries):
        where = f"{shown}, category {position}"
        try:
            category_id = int(entry["id"])
            name = str(entry.get("name") or f"class_{category_id}").strip()
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f'{where}: expected an object with an integer "id" and a "name", found {entry!r}.'
            ) from None
        if by_id.setdefault(category_id, name) != name:
            message = f"Category id {category_id} is both {by_id[category_id]!r} and {name!r}; give one another id."
            log.add("duplicate-category", "refused", where, message)
    ordered = tuple(Category(category_id, by_id[category_id]) for category_id in sorted(by_id))
    return ordered, {category.category_id: label for label, category in enumerate(ordered)}

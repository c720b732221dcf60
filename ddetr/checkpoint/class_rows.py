"""Which row of a foreign class head belongs to which class of ours."""

from collections.abc import Sequence
from typing import NamedTuple

from ddetr.checkpoint.class_synonyms import meaning
from ddetr.checkpoint.coco_classes import COCO_CLASSES, NUM_IDS
from ddetr.datasets.annotations import Category, alike
from ddetr.wording import first_few


class RowClass(NamedTuple):
    """What a row of a class head stands for, as far as a file tells; COCO's unused ids have no name."""

    name: str | None
    category_id: int | None


def match_rows(
    classes: Sequence[RowClass] | None, num_rows: int, categories: Sequence[Category] | None, num_classes: int
) -> tuple[list[int | None], str]:
    """For each class of a model the row of the file's class head, or None; and how they were found.

    Args:
        classes: of the file's `num_rows` rows, None where it names none.
        categories: of the model's `num_classes` labels, None where they are not known.
    """
    note = ""
    if classes is None or categories is None:
        if num_rows == num_classes:
            return list(range(num_rows)), "" if categories is None else "in order: the file names no classes"
        if classes is None:
            return [None] * num_classes, f"the file has {num_rows} classes without names, the model {num_classes}"
        categories = _coco_categories(classes, num_classes)
        if categories is None:
            return (
                [None] * num_classes,
                f"the file has {num_rows} classes, the model {num_classes} without names: pass categories",
            )
        note = f"the model's {num_classes} classes taken for COCO's; "
    rows, by = _rows_of(classes, categories)
    if rows == list(range(num_rows)):
        return rows, ""
    if all(row is None for row in rows):
        return rows, f"{note}none of the model's {num_classes} classes is in the file by its {by}"
    new = [category.name for category, row in zip(categories, rows) if row is None and category.name]
    how = f"{note}rows of {sum(row is not None for row in rows)} of {num_classes} classes copied by {by}"
    return rows, how + (f", new: {first_few(new, 5)}" if new else "")


def _rows_of(classes: Sequence[RowClass], categories: Sequence[Category]) -> tuple[list[int | None], str]:
    if any(row.name for row in classes):
        by_name: dict[str, int] = {}
        by_meaning: dict[str, int] = {}
        for index, row in enumerate(classes):
            if row.name:
                by_name.setdefault(alike(row.name), index)
                by_meaning.setdefault(meaning(row.name), index)
        found = (by_name.get(alike(c.name), by_meaning.get(meaning(c.name))) for c in categories)
        return list(found), "name"
    by_id = {row.category_id: index for index, row in enumerate(classes) if row.category_id is not None}
    return [by_id.get(category.category_id) for category in categories], "category id"


def _coco_categories(classes: Sequence[RowClass], num_classes: int) -> tuple[Category, ...] | None:
    """COCO's categories for a model of unnamed classes, where the file is COCO's and the number says so."""
    if {row.name for row in classes if row.name} != set(COCO_CLASSES.values()):
        return None
    if num_classes == len(COCO_CLASSES):
        return tuple(Category(category_id, name) for category_id, name in COCO_CLASSES.items())
    if num_classes == NUM_IDS:
        return tuple(Category(category_id, COCO_CLASSES.get(category_id, "")) for category_id in range(NUM_IDS))
    return None

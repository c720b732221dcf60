"""Class heads with the rows that other projects have for our labels."""

from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from ddetr.checkpoint.coco_classes import COCO_CLASSES, NUM_IDS
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_CLASSES
from ddetr.wording import first_few

# Logit of the rows that no class has, a score of 1e-6: with the prior's 0.01 they would fill the best hundred of an
# image, and lower they would be slow to learn.
_NEVER = -13.8


def rows_at_ids(
    tensors: Mapping[str, Tensor], categories: Sequence[Category], proposals: int | None
) -> dict[str, Tensor]:
    """Each class in the row of its category id, as the official code has them: 91 rows, or as many as the ids need.

    proposals: index of the class head of proposals, None where there is none. Its first row says "any object", and its
    rows keep their order.

    Raises:
        InputError: ids that are no rows.
    """
    ids = [category.category_id for category in categories]
    if len(set(ids)) < len(ids) or min(ids) < 0 or max(ids) >= MAX_CLASSES:
        raise InputError(
            f"the official code has a class row for each category id, which must differ and lie in 0 to "
            f"{MAX_CLASSES - 1}, got {one_line(first_few(ids, 5))}: number the classes of the data anew"
        )
    num_rows = max(NUM_IDS, max(ids) + 1)
    if ids == list(range(num_rows)):
        return dict(tensors)

    def placed(head: Tensor, is_proposal: bool) -> Tensor:
        rows = head.new_full((num_rows, *head.shape[1:]), _NEVER if head.ndim == 1 else 0.0)
        rows[list(range(len(head))) if is_proposal else ids] = head
        return rows

    return _with_heads(tensors, proposals, placed)


def coco_alone(
    tensors: Mapping[str, Tensor], categories: Sequence[Category], proposals: int | None
) -> tuple[dict[str, Tensor], tuple[Category, ...]]:
    """COCO's 80 classes of the 91 rows of official weights, as detrex has them; other classes as they are."""
    names = dict(enumerate(category.name for category in categories))
    if len(names) != NUM_IDS or any(names[row] != name for row, name in COCO_CLASSES.items()):
        return dict(tensors), tuple(categories)
    rows, in_order = list(COCO_CLASSES), list(range(len(COCO_CLASSES)))
    chosen = _with_heads(tensors, proposals, lambda head, is_proposal: head[in_order if is_proposal else rows])
    return chosen, tuple(categories[row] for row in rows)


def _with_heads(
    tensors: Mapping[str, Tensor], proposals: int | None, change: Callable[[Tensor, bool], Tensor]
) -> dict[str, Tensor]:
    """With each class head changed once, whatever it is called."""
    changed: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if name.startswith("class_embed.") and id(tensor) not in changed:
            changed[id(tensor)] = change(tensor, name.startswith(f"class_embed.{proposals}."))
    return {name: changed.get(id(tensor), tensor) for name, tensor in tensors.items()}

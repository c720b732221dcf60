"""What is converted: the splits of a data set, all with the classes of the training split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from ddetr.datasets.annotations import Annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.load import available_splits, default_splits
from ddetr.datasets.readers.reader import layouts_kept
from ddetr.datasets.splits import hold_back, left_unread, load_split
from ddetr.errors import InputError


@dataclass(frozen=True)
class Source:
    """The splits of a data set: all with the classes of the training split."""

    splits: Mapping[str, Annotations]  # by their names, training first, then validation, where they are there
    train: str | None  # the name of the training split, None where it is not converted
    val: str | None
    left_out: tuple[str, ...] = ()  # splits that hold nothing but images of others (VOC's trainval)

    @property
    def first(self) -> Annotations:
        return next(iter(self.splits.values()))

    @property
    def others(self) -> list[str]:
        """The splits beside the first and the validation split."""
        return [name for name in list(self.splits)[1:] if name != self.val]


@layouts_kept()
def read_source(data: TrainingSource, split: str | None = None) -> Source:
    """All splits, or the one called `split`; with `data.val_fraction` the training split in two, called train and val.

    Raises:
        InputError: as `load_annotations` and `hold_back`; no such split; none that is called train, and no
            `train_split`; a fraction to hold back, and a split to convert alone or a validation split that is there.
    """
    if data.val_fraction is not None and split is not None:
        raise InputError("--split converts one split alone, --val_fraction parts the training split: give one of them")
    if data.train_annotations or data.val_annotations:
        train, val, others = data.train_split or "train", data.val_split or "val", []
    else:
        known = available_splits(data.path, data.format)
        train = known[0] if len(known) == 1 and split in (None, *known) else None
        train, val = default_splits(data.path, data.format, data.train_split or train, data.val_split)
        others = [name for name in known if name not in (train, val)]
    annotations = load_split(data, "train", train)
    if not data.train_annotations and split in (None, train):
        notes = left_unread(data, annotations, data.format == "auto")
        annotations = replace(annotations, findings=(*annotations.findings, *notes))
    if data.val_fraction is not None:
        return _parted(annotations, data, [*([val] if val and data.val_split is None else []), *others])
    splits = {train: annotations}
    names = [*([val] if val else []), *others] if split is None else [split] if split != train else []
    for name in names:
        splits[name] = load_split(data, "val", name, categories=annotations.categories)
    if split is not None:
        splits = {split: splits[split]}
    seen: set[str] = set()
    left_out = []
    for name in list(splits):
        paths = {str(record.path) for record in splits[name].images}
        if name not in (train, val, split) and paths and paths <= seen:
            left_out.append(name)
            del splits[name]
        seen |= paths
    return Source(splits, train if train in splits else None, val if val in splits else None, tuple(left_out))


def _parted(annotations: Annotations, data: TrainingSource, others: Sequence[str]) -> Source:
    """The training split in two, and the other splits."""
    if taken := [name for name in others if name.lower().startswith(("train", "val"))]:
        raise InputError(
            f"{data.path} has the split {taken[0]} already: --val_fraction is for data without a validation split"
        )
    train, val = hold_back(annotations, data)
    rest = {name: load_split(data, "val", name, categories=train.categories) for name in others}
    return Source({"train": train, "val": val, **rest}, "train", "val")

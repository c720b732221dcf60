"""Whether the data of a resumed run are still those that it began with.

Kept in the run folder, in data.npz: the classes, and of each image its file name, the size of its file and a hash of
what was annotated. Pixels are not compared: that would be to read every image at each start.
"""

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ddetr.arrays import read_arrays
from ddetr.datasets import Annotations, ImageTable
from ddetr.errors import InputError
from ddetr.files import write_atomically
from ddetr.wording import first_few

logger = logging.getLogger(__name__)

DATA_FILE = "data.npz"
_ARRAYS = ("classes", *(f"{which}_{what}" for which in ("train", "val") for what in ("names", "objects", "sizes")))
_THREADS, _FILES_A_TASK = 8, 256  # they wait for the disk
_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class SplitTraits:
    """The I images of a split: names in their order, `objects` (I,) uint64 hashes, `sizes` (I,) int64 bytes, -1 where
    there is no file."""

    names: list[str]
    objects: np.ndarray
    sizes: np.ndarray

    @classmethod
    def of(cls, annotations: Annotations, root: Path) -> "SplitTraits":
        table = ImageTable.from_records(annotations.images)
        columns = (table.boxes_xyxy, table.labels, table.area, table.ignore)
        # (n, bytes of an object): flat bytes are cut into images without a Python object for each
        rows = np.concatenate([np.ascontiguousarray(c).reshape(len(c), -1).view(np.uint8) for c in columns], axis=1)
        content, ends = rows.tobytes(), (table.offsets * rows.shape[1]).tolist()
        hashes = [
            hashlib.blake2b(content[start:end] + size_hw.tobytes(), digest_size=8).digest()
            for start, end, size_hw in zip(ends, ends[1:], table.sizes_hw)
        ]
        paths = [str(table.path(index)) for index in range(len(table))]
        with ThreadPoolExecutor(_THREADS) as pool:
            sizes = [size for sizes in pool.map(_file_sizes, _chunks(paths)) for size in sizes]
        names = _distinct(path.removeprefix(f"{root}{os.sep}") for path in paths)
        return cls(names, np.frombuffer(b"".join(hashes), np.uint64), np.array(sizes, np.int64))

    def changes(self, now: "SplitTraits") -> str:
        """What is different now, in words; "" where nothing is."""
        before, after = _places(self.names), _places(now.names)
        common = [name for name in self.names if name in after]
        mine, theirs = [before[name] for name in common], [after[name] for name in common]
        found = {
            "added": [name for name in now.names if name not in before],
            "removed": [name for name in self.names if name not in after],
            "with other objects": _where(common, self.objects[mine] != now.objects[theirs]),
            "with a file of another size": _where(common, self.sizes[mine] != now.sizes[theirs]),
        }
        said = [f"{len(names)} {what} ({first_few(names, _SHOWN)})" for what, names in found.items() if names]
        return ", ".join(said + ["in another order"] * (theirs != sorted(theirs)))


@dataclass(frozen=True)
class DataTraits:
    """What a run remembers of its data."""

    classes: list[tuple[int, str]]
    splits: Mapping[str, SplitTraits]  # "train" and "val"

    @classmethod
    def of(cls, train: Annotations, val: Annotations, root: Path) -> "DataTraits":
        splits = {"train": SplitTraits.of(train, root), "val": SplitTraits.of(val, root)}
        return cls([(c.category_id, c.name) for c in train.categories], splits)

    def save(self, folder: Path) -> None:
        arrays: dict[str, np.ndarray] = {"classes": _packed(self.classes)}
        for which, split in self.splits.items():
            arrays |= {f"{which}_names": _packed(split.names)}
            arrays |= {f"{which}_objects": split.objects, f"{which}_sizes": split.sizes}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:  # given a name, NumPy would add a suffix to it
                np.savez(file, **arrays)

        write_atomically(folder / DATA_FILE, write)

    @classmethod
    def load(cls, folder: Path) -> "DataTraits | None":
        """None where an older version left none, or the file is damaged, which is said."""
        if not (folder / DATA_FILE).exists():
            return None
        try:
            arrays = read_arrays(folder / DATA_FILE, _ARRAYS)
            splits = {
                which: SplitTraits(
                    _unpacked(arrays[f"{which}_names"]), arrays[f"{which}_objects"], arrays[f"{which}_sizes"]
                )
                for which in ("train", "val")
            }
            for split in splits.values():
                if not len(split.names) == len(split.objects) == len(split.sizes):
                    raise ValueError("its columns have different lengths")
            return cls([(int(number), str(name)) for number, name in _unpacked(arrays["classes"])], splits)
        except Exception as error:  # a damaged archive raises anything
            logger.warning(
                "%s cannot be read (%s): whether the data are those of the run is not known",
                folder / DATA_FILE, type(error).__name__,
            )  # fmt: skip
            return None

    def changed_classes(self, now: "DataTraits") -> str:
        """How the classes differ now, in words; "" where they do not. The rows of the class heads belong to them."""
        if self.classes == now.classes:
            return ""
        before, after = ([name for _, name in traits.classes] for traits in (self, now))
        added, removed = ([n for n in one if n not in other] for one, other in ((after, before), (before, after)))
        if len(before) == len(after) and (differ := [pair for pair in zip(before, after) if pair[0] != pair[1]]):
            return "class " + first_few((f"{old!r} is now {new!r}" for old, new in differ), _SHOWN)
        words = [f"added {first_few(map(repr, added), _SHOWN)}"] * bool(added)
        words += [f"removed {first_few(map(repr, removed), _SHOWN)}"] * bool(removed)
        return "classes " + (" and ".join(words) or "have other ids")

    def changes(self, now: "DataTraits") -> dict[str, str]:
        """What else is different now, in words, by split; {} where nothing is."""
        kinds = {"train": "training", "val": "validation"}
        found = {which: split.changes(now.splits[which]) for which, split in self.splits.items()}
        return {which: f"{kinds[which]} images: {what}" for which, what in found.items() if what}


def _file_sizes(paths: Sequence[str]) -> list[int]:
    sizes = []
    for path in paths:
        try:
            sizes.append(os.stat(path).st_size)
        except OSError:
            sizes.append(-1)
    return sizes


def _chunks(paths: Sequence[str]) -> Iterator[Sequence[str]]:
    return (paths[i : i + _FILES_A_TASK] for i in range(0, len(paths), _FILES_A_TASK))


def _distinct(names: Iterable[str]) -> list[str]:
    """A file may stand for several images: from its second on they are numbered."""
    seen: Counter[str] = Counter()
    distinct = []
    for name in names:
        seen[name] += 1
        distinct.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return distinct


def _places(names: Sequence[str]) -> dict[str, int]:
    return {name: place for place, name in enumerate(names)}


def _where(names: Sequence[str], differs: np.ndarray) -> list[str]:
    return [names[place] for place in np.flatnonzero(differs)]


def _packed(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), np.uint8)


def _unpacked(array: np.ndarray) -> list:
    return json.loads(array.tobytes())


def check_same_data(run: Path, now: DataTraits, *, accept_changes: bool) -> bool:
    """Holds the data against those that the run in the folder `run` began with; whether its validation images were
    others.

    Raises:
        InputError: the classes are others, or anything is and is not accepted.
    """
    before = DataTraits.load(run)
    if before is None:
        return False
    anew = f"start a new run from its --weights {run / 'last.pth'}"
    if classes := before.changed_classes(now):
        raise InputError(
            f"--resume: the classes are not those that the run in {run} learns: {classes}. Put them back, or {anew}"
        )
    if not (changes := before.changes(now)):
        return False
    said = "; ".join(changes.values())
    if not accept_changes:
        raise InputError(
            f"--resume: the data are not those that the run in {run} began with: {said}. Put them back, or go on "
            f"with these by --accept_changed_data, or {anew}"
        )
    logger.warning("the data are not those that the run began with: %s; that is accepted", said)
    counts = [len(traits.splits["train"].names) for traits in (before, now)]
    if counts[0] != counts[1]:
        logger.warning("epochs may have another number of steps than before: numbers of steps, and rates, follow it")
    return "val" in changes

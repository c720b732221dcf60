"""Any data set folder to `Annotations`: which format lies there, which splits it has, and its reader."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ddetr.datasets.annotations import Annotations, Category, split_error
from ddetr.datasets.readers.coco import read_coco
from ddetr.datasets.readers.coco_layout import coco_splits
from ddetr.datasets.readers.reader import Reader, Wanted
from ddetr.datasets.readers.voc import read_voc, voc_splits
from ddetr.datasets.readers.yolo import read_yolo
from ddetr.datasets.readers.yolo_layout import yolo_splits
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.wording import did_you_mean, first_few

_TRAIN_NAMES = ("train", "train2017", "training", "trainval", "all")
_VAL_NAMES = ("val", "val2017", "valid", "validation", "test", "testing")


def load_annotations(
    path: str | PathLike,
    split: str,
    *,
    format: str = "auto",
    annotation_file: str | PathLike | None = None,
    image_dir: str | PathLike | None = None,
    categories: Sequence[Category] | None = None,
    check_images: bool = True,
) -> Annotations:
    """Reads one split of a data set where it lies. What is wrong with it is in `findings`; only what leaves nothing to
    read (a path that is not there, broken JSON) raises `InputError`.

    Args:
        path: folder of the data set, or its COCO or YOLO file (`*.json`, `data.yaml`).
        split: one of `available_splits(path)`; any name where `annotation_file` is given.
        format: "coco", "voc", "yolo", or "auto": recognised by what lies there.
        annotation_file: a COCO file of any name, relative to `path` or to the working directory.
        image_dir: where the images are, likewise; found by itself in the usual layouts.
        categories: the training set's: labels are mapped on to them, by id and name (COCO) or by name (VOC, YOLO), and
            objects of classes that they lack are left out with a finding.
        check_images: False trusts the width and height of a COCO file and saves reading a header per image.
    """
    path = existing(path)
    images = _inside(path, image_dir, "image_dir") if image_dir is not None else None
    if annotation_file is not None:
        if format not in ("auto", "coco"):
            raise InputError(f"annotation_file is for the COCO format; {format} has none")
        file = _inside(path, annotation_file, "annotation_file")
        root = path if path.is_dir() else _home(file)
        return read_coco(root, split, file, image_dir=images, categories=categories, check_images=check_images)
    format = detect_format(path) if format == "auto" else _known(format)
    train_split = _train_split(list(FORMATS[format].splits(path)))
    return FORMATS[format].read(Wanted(path, split, train_split, images, categories, check_images))


def _read_coco(wanted: Wanted) -> Annotations:
    path, splits = wanted.path, coco_splits(wanted.path)
    if wanted.split not in splits:
        raise split_error(path, wanted.split, list(splits))
    return read_coco(
        path if path.is_dir() else _home(path),
        wanted.split,
        splits[wanted.split],
        image_dir=wanted.image_dir,
        categories=wanted.categories,
        check_images=wanted.check_images,
    )


# In the order in which they are tried: a COCO file says most.
FORMATS: dict[str, Reader] = {
    "coco": Reader("COCO", "annotations/*.json or */_annotations.coco.json", coco_splits, _read_coco),
    "voc": Reader("Pascal VOC", "Annotations/*.xml", voc_splits, read_voc),
    "yolo": Reader("YOLO", "data.yaml, obj.data, or images/ and labels/", yolo_splits, read_yolo),
}


def detect_format(path: str | PathLike) -> str:
    """ "coco", "voc" or "yolo"; `InputError` says what was looked for where none is there."""
    path = existing(path)
    for format, reader in FORMATS.items():
        if reader.splits(path):
            return format
    found = "a file of another kind" if path.is_file() else first_few(sorted(entry.name for entry in path.iterdir()), 8)
    known = [f"{reader.title} ({reader.layout})" for reader in FORMATS.values()]
    raise InputError(
        f"{path} is no data set that is known: expected {', '.join(known[:-1])} or {known[-1]}; found {found}; "
        "files of other names can be given as annotation_file and image_dir"
    )


def available_splits(path: str | PathLike, format: str = "auto") -> list[str]:
    """The names that `load_annotations` takes as `split`."""
    path = existing(path)
    return list(FORMATS[detect_format(path) if format == "auto" else _known(format)].splits(path))


def default_splits(path: str | PathLike, format: str = "auto") -> tuple[str, str | None]:
    """(training split, validation split) by their names; the second is None where there is none."""
    splits = available_splits(path, format)
    if not splits:
        raise InputError(f"{path} holds no {format} data set")
    train = _train_split(splits)
    if train is None:
        raise InputError(f"{path} has the splits {', '.join(splits)}: none is called train; name the one to train on")
    others = [split for split in splits if split not in (train, "trainval")]
    return train, _first(others, _VAL_NAMES, "val")


def _train_split(splits: Sequence[str]) -> str | None:
    return _first(splits, _TRAIN_NAMES, "train") or (splits[0] if len(splits) == 1 else None)


def _first(splits: Sequence[str], names: Sequence[str], stem: str) -> str | None:
    """The first of `names` that is there; before the generic ones, a split that begins with `stem` (train2014)."""
    by_lower = {split.lower(): split for split in splits}
    exact = [by_lower[name] for name in names if name in by_lower]
    alike = sorted(split for lower, split in by_lower.items() if lower.startswith(stem))
    specific = [split for split in exact if split.lower().startswith(stem) and split.lower() != "trainval"]
    return next(iter([*specific, *(split for split in alike if split.lower() != "trainval"), *exact]), None)


def _home(path: Path) -> Path:
    """The folder of a data set, or that of its annotation file."""
    if path.is_dir():
        return path
    parent = path.resolve().parent
    return parent.parent if parent.name == "annotations" else parent


def _inside(path: Path, name: str | PathLike, option: str) -> Path:
    base = _home(path)
    for place in (base / name, Path(name).expanduser()):
        if place.exists():
            return place
    raise InputError(f"{option}: there is no {name} in {base}, nor in the working directory")


def _known(format: str) -> str:
    if format not in FORMATS:
        raise InputError(
            f"the format is one of auto, {', '.join(FORMATS)}, not {format!r}{did_you_mean(format, FORMATS)}"
        )
    return format

"""Any data set folder to `Annotations`: which format lies there, which splits it has, and its reader."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from ddetr.datasets.annotations import Annotations, Category, split_error
from ddetr.datasets.coco_layout import coco_splits
from ddetr.datasets.coco_reader import read_coco
from ddetr.datasets.voc import read_voc, voc_splits
from ddetr.datasets.yolo import read_yolo, yolo_splits
from ddetr.errors import InputError
from ddetr.wording import did_you_mean, first_few

FORMATS = ("coco", "voc", "yolo")  # in the order in which they are tried: a COCO file says most
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
    path = _existing(path)
    if annotation_file is not None:
        if format not in ("auto", "coco"):
            raise InputError(f"annotation_file is for the COCO format; {format} has none")
        file = _inside(path, annotation_file, "annotation_file")
        root = path if path.is_dir() else _coco_root(file)
        return _read_coco(root, split, file, image_dir, categories, check_images)
    format = detect_format(path) if format == "auto" else _known(format)
    if format == "coco":
        splits = coco_splits(path)
        if split not in splits:
            raise split_error(path, split, list(splits))
        root = path if path.is_dir() else _coco_root(path)
        return _read_coco(root, split, splits[split], image_dir, categories, check_images)
    images = _inside(path, image_dir, "image_dir") if image_dir is not None else None
    if format == "voc":
        train_split = default_splits(path, "voc")[0]
        return read_voc(path, split, train_split=train_split, image_dir=images, categories=categories)
    if images is not None:
        raise InputError("image_dir is for COCO and VOC; a YOLO data set names its images in data.yaml")
    return read_yolo(path, split, categories=categories)


def detect_format(path: str | PathLike) -> str:
    """ "coco", "voc" or "yolo"; `InputError` says what was looked for where none is there."""
    path = _existing(path)
    for format in FORMATS:
        if _splits(path, format):
            return format
    found = "a file of another kind" if path.is_file() else first_few(sorted(entry.name for entry in path.iterdir()), 8)
    raise InputError(
        f"{path} is no data set that is known: expected COCO (annotations/*.json or */_annotations.coco.json), "
        f"Pascal VOC (Annotations/*.xml) or YOLO (data.yaml, or images/ and labels/); found {found}; "
        "files of other names can be given as annotation_file and image_dir"
    )


def available_splits(path: str | PathLike, format: str = "auto") -> list[str]:
    """The names that `load_annotations` takes as `split`."""
    path = _existing(path)
    return _splits(path, detect_format(path) if format == "auto" else _known(format))


def default_splits(path: str | PathLike, format: str = "auto") -> tuple[str, str | None]:
    """(training split, validation split) by their names; the second is None where there is none."""
    splits = available_splits(path, format)
    if not splits:
        raise InputError(f"{path} holds no {format} data set")
    train = _first(splits, _TRAIN_NAMES, "train") or (splits[0] if len(splits) == 1 else None)
    if train is None:
        raise InputError(f"{path} has the splits {', '.join(splits)}: none is called train; name the one to train on")
    others = [split for split in splits if split not in (train, "trainval")]
    return train, _first(others, _VAL_NAMES, "val")


def _first(splits: Sequence[str], names: Sequence[str], stem: str) -> str | None:
    """The first of `names` that is there; before the generic ones, a split that begins with `stem` (train2014)."""
    by_lower = {split.lower(): split for split in splits}
    exact = [by_lower[name] for name in names if name in by_lower]
    alike = sorted(split for lower, split in by_lower.items() if lower.startswith(stem))
    specific = [split for split in exact if split.lower().startswith(stem) and split.lower() != "trainval"]
    return next(iter([*specific, *(split for split in alike if split.lower() != "trainval"), *exact]), None)


def _splits(path: Path, format: str) -> list[str]:
    if format == "coco":
        return list(coco_splits(path))
    if format == "voc":
        return list(voc_splits(path)) if path.is_dir() else []
    return list(yolo_splits(path))


def _read_coco(
    root: Path,
    split: str,
    file: Path,
    image_dir: str | PathLike | None,
    categories: Sequence[Category] | None,
    check_images: bool,
) -> Annotations:
    images = _inside(root, image_dir, "image_dir") if image_dir is not None else None
    return read_coco(root, split, file, image_dir=images, categories=categories, check_images=check_images)


def _coco_root(file: Path) -> Path:
    parent = file.resolve().parent
    return parent.parent if parent.name == "annotations" else parent


def _existing(path: str | PathLike) -> Path:
    path = Path(path).expanduser()
    if path.is_dir() or path.is_file():
        return path
    if path.exists():
        raise InputError(f"{path} is neither a folder nor a file: expected the folder of a data set")
    parent = next(parent for parent in path.absolute().parents if parent.is_dir())
    missing = path.absolute().relative_to(parent).parts[0]
    hint = did_you_mean(missing, (entry.name for entry in parent.iterdir()))
    raise InputError(f"there is no {path}: {parent} has no {missing!r}{hint}")


def _inside(root: Path, name: str | PathLike, option: str) -> Path:
    base = root if root.is_dir() else root.parent
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

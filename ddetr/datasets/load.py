"""Any data set folder to `Annotations`: which format lies there, which splits it has, and its reader."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from os import PathLike
from pathlib import Path, PurePath
from typing import Literal, get_args

from ddetr.datasets.annotations import Annotations, Category, Finding, are_most, split_error
from ddetr.datasets.config import BoxForm
from ddetr.datasets.image_files import IMAGES_OPTION, folded, folders_in, visible
from ddetr.datasets.readers.coco.layout import coco_files, coco_splits, part_of
from ddetr.datasets.readers.coco.reader import read_coco
from ddetr.datasets.readers.createml import createml_splits, read_createml
from ddetr.datasets.readers.csv_boxes import csv_splits, read_csv_boxes
from ddetr.datasets.readers.cvat import cvat_splits, read_cvat
from ddetr.datasets.readers.file_names import last_parts, stems_in_other_splits
from ddetr.datasets.readers.foreign import what_it_is
from ddetr.datasets.readers.huggingface import huggingface_splits, read_huggingface
from ddetr.datasets.readers.kitti import kitti_splits, read_kitti
from ddetr.datasets.readers.label_studio import label_studio_splits, read_label_studio
from ddetr.datasets.readers.labelme import labelme_splits, read_labelme
from ddetr.datasets.readers.reader import WHOLE, Reader, Wanted, layouts_kept, split_kind
from ddetr.datasets.readers.side_by_side import NOTHING_SAYS, Neighbours, neighbours, not_read_below, unlike
from ddetr.datasets.readers.split_lists import with_lists
from ddetr.datasets.readers.via import read_via, via_splits
from ddetr.datasets.readers.voc.layout import voc_splits
from ddetr.datasets.readers.voc.reader import read_voc
from ddetr.datasets.readers.yolo.layout import yolo_file, yolo_splits
from ddetr.datasets.readers.yolo.reader import has_label_rows, read_yolo, said_of_unnamed
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.printable import one_line
from ddetr.wording import did_you_mean, first_few

ANNOTATIONS_OPTION = "--data.train_annotations or --data.val_annotations (annotation_file)"
_TRAIN_NAMES = ("train", "train2017", "training", "trainval", "all")
_MOST_FOLDERS = 20  # of a data set without a training split that are looked into
_SAMPLED = 100  # images of a split whose names are held beside those of other splits
_WRAPPERS = 3  # folders one in another, of which each holds only the next, as archives are unpacked
_VAL_NAMES = ("val", "val2017", "valid", "validate", "validation", "dev", "eval", "evaluation", "holdout")
_VAL_NAMES += ("test", "testing")


@layouts_kept()
def load_annotations(
    path: str | PathLike,
    split: str,
    *,
    format: str = "auto",
    annotation_file: str | PathLike | None = None,
    image_dir: str | PathLike | None = None,
    categories: Sequence[Category] | None = None,
    check_images: bool = True,
    boxes: BoxForm = "auto",
    allow_incomplete: bool = False,
) -> Annotations:
    """Reads one split of a data set where it lies. What is wrong with it is in `findings`; only what leaves nothing to
    read (a path that is not there, broken JSON) raises `InputError`.

    Args:
        path: folder of the data set, or its file (`*.json`, `data.yaml`, `*.csv`).
        split: one of `available_splits(path)`; any name where `annotation_file` is given.
        format: a key of `FORMATS` ("coco", "voc", "yolo", ...), or "auto": recognised by what lies there.
        annotation_file: a COCO file of any name, or a table or list of another format, relative to `path` or to the
            working directory.
        image_dir: where the images are, likewise; found by itself in the usual layouts.
        categories: the training set's: labels are mapped on to them, by id and name (COCO) or by name (VOC, YOLO), and
            objects of classes that they lack are left out with a finding.
        check_images: False trusts the width and height of a COCO file and saves reading a header per image.
        boxes: what the four numbers of a box are, where they are not what the format says: "xyxy", "xywh" or "cxcywh"
            (centre and size) in pixels, or with "-relative" in fractions of the image.
        allow_incomplete: whether a split may lack more than half of the images that its annotations name; otherwise a
            finding refuses it.
    """
    if boxes not in (known := get_args(BoxForm)):
        raise InputError(f"--data.boxes is one of {', '.join(known)}, not {boxes!r}{did_you_mean(boxes, known)}")
    path = existing(path)
    images = _inside(path, image_dir, IMAGES_OPTION) if image_dir is not None else None
    annotations = _read(Wanted(path, split, None, images, categories, check_images, boxes), format, annotation_file)
    of_kind: Counter[str] = Counter()
    for finding in annotations.findings:
        of_kind[finding.kind] += finding.count
    lost, left = annotations.num_images_left_out - of_kind["not-annotated"], len(annotations.images)
    if allow_incomplete or not left or not are_most(lost, left):  # where none is left, that is refused
        return annotations
    if not are_most(lost - of_kind["missing-image"], left) and _are_of_other_splits(annotations, split, path):
        return annotations
    message = (
        f"{lost:,} of its {lost + left:,} images are left out, for the reasons in the other rows: that looks like a "
        "wrong path, or a download that is not finished. Restore them, take them out of the annotations, or train on "
        "what is there with --data.allow_incomplete true (allow_incomplete)."
    )
    incomplete = Finding("most-images-left-out", "refused", annotations.name, message, lost)
    return replace(annotations, findings=(*annotations.findings, incomplete))


def _are_of_other_splits(annotations: Annotations, split: str, path: Path) -> bool:
    """Whether the images that a split lacks lie in the folders of other splits: the same annotations stand in the file
    of each, and nothing is lost."""
    missing = [finding.image for finding in annotations.findings if finding.kind == "missing-image"]
    elsewhere = stems_in_other_splits(_home(path), split) if split_kind(split) else set()
    return (
        all(any(folded(PurePath(last).stem) in elsewhere for last in last_parts(name or "")) for name in missing)
        # where images of several splits have one name, it doesn't tell whose they are
        and not any(folded(image.path.stem) in elsewhere for image in annotations.images[:_SAMPLED])
    )


def _read(wanted: Wanted, format: str, annotation_file: str | PathLike | None) -> Annotations:
    """The split, with what its reader found; wanted: of the path that was given, wherever the data set lies in it."""
    path = wanted.path
    if annotation_file is None:
        format, place = _located(path, format)
        train_split = _train_split(list(FORMATS[format].splits(place)))
        return FORMATS[format].read(replace(wanted, path=place, train_split=train_split))
    if format not in ("auto", "coco", *_OF_ONE_FILE):
        raise InputError(f"{ANNOTATIONS_OPTION} is for formats of one file, {format} has one for each image")
    file = _inside(path, annotation_file, ANNOTATIONS_OPTION)
    for one in _OF_ONE_FILE if format == "auto" else [format]:
        if one in _OF_ONE_FILE and (names := list(FORMATS[one].splits(file))):
            places = wanted.image_dir or (path if path.is_dir() and not file.is_relative_to(path) else None)
            return FORMATS[one].read(replace(wanted, path=file, split=names[0], image_dir=places))
    return read_coco(replace(wanted, path=path if path.is_dir() else _home(file)), [file])


def _read_coco(wanted: Wanted) -> Annotations:
    path, splits = wanted.path, coco_splits(wanted.path)
    files = coco_files(splits, wanted.split)
    if not files:
        raise split_error(path, wanted.split, list(splits))
    root = path if path.is_dir() else _home(path)
    return read_coco(replace(wanted, path=root), files)


# In the order in which they are tried: a COCO file says most; KITTI's folders are called as YOLO's; LabelMe's files
# stay where they were when others have been made of them.
_READERS = {
    "coco": Reader("COCO", "annotations/*.json or */_annotations.coco.json", coco_splits, _read_coco),
    "voc": Reader("Pascal VOC", "XML files in Annotations/, or beside the images", voc_splits, read_voc),
    "kitti": Reader("KITTI", "training/image_2 and label_2", kitti_splits, read_kitti),
    "yolo": Reader("YOLO", "data.yaml, obj.data, or images/ and labels/", yolo_splits, read_yolo, yolo_file),
    "cvat": Reader("CVAT", "annotations.xml", cvat_splits, read_cvat),
    "labelme": Reader("LabelMe", "a JSON file for each image", labelme_splits, read_labelme),
    "csv": Reader("CSV", "a table with a row for each box", csv_splits, read_csv_boxes),
    "label_studio": Reader("Label Studio", "its JSON", label_studio_splits, read_label_studio),
    "via": Reader("VIA", "its JSON or CSV", via_splits, read_via),
    "createml": Reader("Create ML", "its JSON", createml_splits, read_createml),
    "huggingface": Reader("Hugging Face", "metadata.jsonl with objects", huggingface_splits, read_huggingface),
}

FORMATS: dict[str, Reader] = {name: with_lists(reader) for name, reader in _READERS.items()}

_OF_ONE_FILE = ("csv", "label_studio", "via", "createml", "huggingface")  # whose splits are single files, as COCO's are


def detect_format(path: str | PathLike) -> str:
    """A key of `FORMATS`; where none is there, `InputError` says what is, and what can be done about it."""
    path = existing(path)
    broken: list[InputError] = []
    place = _place(path, list(FORMATS), broken)
    if place is not None:
        _check_alone(*place)
        return place[0]
    wrong = str(broken[0]) if broken else None
    if said := what_it_is(path, lambda place: _found_in(place, list(FORMATS), []) is not None, wrong):
        raise InputError(said)
    found = "a file of another kind" if path.is_file() else first_few(sorted(entry.name for entry in path.iterdir()), 8)
    known = [f"{reader.title} ({reader.layout})" for reader in FORMATS.values()]
    raise InputError(
        f"{path} is no data set that is known: expected {', '.join(known[:-1])} or {known[-1]}; found {found}; "
        f"files of other names can be given by {ANNOTATIONS_OPTION} and {IMAGES_OPTION}"
    )


def _neighbours(format: str, place: Path) -> Neighbours:
    """Data sets that lie side by side with what a reader finds in a folder; none where a file there describes it."""
    if place.is_file() or FORMATS[format].description(place) is not None:
        return Neighbours()

    def format_in(folder: Path) -> str | None:
        found = _place(folder, list(FORMATS), [])
        return None if found is None else found[0]

    return neighbours(place, FORMATS[format].splits(place).values(), format_in)


def _check_alone(format: str, place: Path) -> None:
    """Of several data sets in one folder the first is not taken for all of it, unless all say the same."""
    found = _neighbours(format, place)
    if not found.others:
        return
    known = [*((folder, format) for folder in found.read), *found.others]
    difference = None
    if len(found.read) == 1:
        difference = next(filter(None, (_unlike(known[0], other) for other in found.others)), None)
        if difference is None:
            return
    listed = first_few([f"{one_line(folder)} ({FORMATS[one].title})" for folder, one in sorted(known)], 6)
    read = first_few([one_line(folder.name) for folder in found.read], 4)
    raise InputError(
        f"{place} holds several data sets, and {difference or NOTHING_SAYS}: {listed}. Give the path of one; "
        f"--data.format {format} (format) reads {read} alone"
    )


def _unlike(one: tuple[Path, str], other: tuple[Path, str]) -> str | None:
    """In what two data sets differ, given by folder and format; None where their usual splits have the same images
    with the same objects, as where one was converted from the other."""
    splits = []
    for folder, format in (one, other):
        try:
            names = default_splits(folder, format)
            read = [load_annotations(folder, n, format=format, check_images=False) for n in names if n is not None]
        except InputError:
            return NOTHING_SAYS
        splits.append(read)
    return unlike(*splits)


def read_together(path: str | PathLike, format: str = "auto") -> tuple[Path, ...]:
    """The folders that could be data sets of their own, where several are read from the folder around them."""
    read = _neighbours(*_located(path, format)).read
    return read if len(read) > 1 else ()


def _only_folder(path: Path) -> Path | None:
    inside = folders_in(path)
    return inside[0] if len(inside) == 1 else None


def _found_in(
    place: Path, formats: Sequence[str], broken: list[InputError] | None = None
) -> tuple[str, list[str]] | None:
    """The format that lies in a folder itself, and its splits. What a reader finds broken ends the search, or goes to
    `broken`: it may be no part of the data."""
    for format in formats:
        try:
            splits = list(FORMATS[format].splits(place))
        except InputError as error:
            if broken is None:
                raise
            broken.append(error)
            continue
        # but not XML files without splits beside a data.yaml that has some: what it was made of
        if splits and not (splits == [WHOLE] and "yolo" in formats and format != "yolo" and yolo_file(place)):
            return format, splits
    return None


def _place(path: Path, formats: Sequence[str], broken: list[InputError] | None = None) -> tuple[str, Path] | None:
    """The format, and the folder that holds it: `path`, or the only one in it, as archives are unpacked; None where
    neither does. broken: as in `_found_in`."""
    for _ in range(_WRAPPERS):
        here, inner = _found_in(path, formats, broken), _only_folder(path)
        if here is not None:
            format, splits = here
            if inner is not None and splits == [inner.name]:  # a split, or a whole data set in a folder of its name
                inside = _found_in(inner, formats, broken)
                if inside is not None and (len(inside[1]) > 1 or formats.index(inside[0]) < formats.index(format)):
                    return inside[0], inner
            if inner is not None and not visible(filter(Path.is_file, path.iterdir()), path):
                inside = _place(inner, formats, broken)  # VOC's reader looks deeper than those before it
                if inside is not None and formats.index(inside[0]) < formats.index(format):
                    return inside
                if inside is not None and _train_split(splits) is None:  # of data/train/0 and data/val, val alone
                    return inside
            return format, path
        if inner is None:
            break
        path = inner
    return None


def _located(path: str | PathLike, format: str) -> tuple[str, Path]:
    """The format, recognised where it is "auto", and the folder or file that holds it."""
    path = existing(path)
    format = detect_format(path) if format == "auto" else _known(format)
    format, place = _place(path, [format]) or (format, path)
    beside = _neighbours(format, place)
    if beside.others and len(beside.read) == 1 and FORMATS[format].splits(beside.read[0]):
        place = beside.read[0]  # with the splits that it has itself
    return format, place


def same_beside(path: str | PathLike, format: str = "auto") -> list[tuple[Path, str]]:
    """The data sets, with their formats, that lie beside the one of this format, where `detect_format` has found that
    they say the same."""
    place = _place(existing(path), list(FORMATS) if format == "auto" else [format], [])
    return list(_neighbours(*place).others) if place is not None else []


def also_there(path: str | PathLike, format: str = "auto") -> list[tuple[str, list[str]]]:
    """The other formats, with their splits, in which the folder holds annotations too."""
    read, place = _located(path, format)
    if not place.is_dir():
        return []
    found = []
    for other, reader in FORMATS.items():
        with suppress(InputError):  # a broken one is no data set
            if other != read and (splits := list(reader.splits(place))) and (other != "yolo" or has_label_rows(place)):
                found.append((other, splits))
    return found


def labels_not_read(path: str | PathLike, format: str = "auto") -> list[Path]:
    """Folders in those of the data set, with labels of the same format that belong to none of its splits."""
    format, place = _located(path, format)
    if not place.is_dir() or format == "yolo":  # of a folder of images YOLO's reader takes all that is below
        return []
    return not_read_below(place, FORMATS[format].splits)


def said_of_not_named(path: str | PathLike, kind: Literal["train", "val"], format: str = "auto") -> str:
    """A sentence on images of a split that lie where the data set's description doesn't say; "" without such."""
    format, place = _located(path, format)
    return said_of_unnamed(place, kind) if format == "yolo" else ""


def available_splits(path: str | PathLike, format: str = "auto") -> list[str]:
    """The names that `load_annotations` takes as `split`."""
    format, place = _located(path, format)
    return list(FORMATS[format].splits(place))


def default_splits(
    path: str | PathLike, format: str = "auto", train_split: str | None = None, val_split: str | None = None
) -> tuple[str, str | None]:
    """(training split, validation split) by their names; the second is None where there is none.

    train_split, val_split: the ones to take, where their names don't say it.
    """
    splits = available_splits(path, format)
    if not splits:
        raise InputError(f"{path} holds no {format} data set")
    train = train_split or _train_split(splits)
    if train is None:
        own = ", or give the path of one, where they are data sets of their own" if read_together(path, format) else ""
        unnamed = said_of_not_named(path, "train", format)
        raise InputError(
            f"{path} has the splits {first_few(splits, 8)}: none is called train; --data.train_split (and "
            f"--data.val_split, or --data.val_fraction 0.1) names the one to train on{own}{unnamed and f'. {unnamed}'}"
            f"{''.join(f'. {sentence}' for sentence in _said_of_others(path, format))}"
        )
    others = [split for split in splits if split not in (train, "trainval")]
    val = val_split or _first(others, _VAL_NAMES, "val")
    for chosen in (None if train_split else train, None if val_split else val):
        if chosen and len(alike := [split for split in splits if split.lower() == chosen.lower()]) > 1:
            raise InputError(
                f"{path} has the splits {first_few(alike, 4)}, which differ in capitals alone: --data.train_split and "
                "--data.val_split name the ones that are meant"
            )
    return train, val


def _said_of_others(path: str | PathLike, format: str) -> Iterator[str]:
    """Sentences on what else lies in the folder of a data set without a training split: that may have been meant."""
    format, place = _located(path, format)
    for other, splits in also_there(path, format):
        if _train_split(splits) is not None:
            listed = first_few(splits, 5)
            yield f"{FORMATS[other].title} annotations lie there too ({listed}): --data.format {other} reads them"
    own = FORMATS[format].splits(place)
    for folder in folders_in(place)[:_MOST_FOLDERS] if place.is_dir() else ():
        found = None if folder.name in own else _place(folder, list(FORMATS), [])
        if found is not None and _train_split(list(FORMATS[found[0]].splits(found[1]))) is not None:
            yield f"{one_line(folder)} is a data set of its own ({FORMATS[found[0]].title}): its path reads it"
        elif found is None and split_kind(folder.name) == "train":
            yield from filter(None, [what_it_is(folder, lambda _: False)])


def check_parts(path: str | PathLike, split: str, splits: Sequence[str], option: str) -> None:
    """Refuses a split that nobody has named, where it is a numbered part of several: the others would be left out.

    Raises:
        InputError: it is.
    """
    parts = [other for other in splits if part_of(other) == part_of(split)] if part_of(split) else []
    if len(parts) > 1:
        raise InputError(
            f"{path} has {first_few(parts, 5)}, which look like parts of one split: put them together, or name the one "
            f"that is meant by {option}"
        )


def _train_split(splits: Sequence[str]) -> str | None:
    only = splits[0] if len(splits) == 1 and split_kind(splits[0]) in (None, "train") else None  # never a test split
    return _first(splits, _TRAIN_NAMES, "train") or only


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

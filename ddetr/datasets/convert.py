"""Any data set that is read, written anew as COCO, YOLO or Pascal VOC: images, boxes and classes.

Images come upright: those that EXIF turns are encoded anew, so that every program sees the same pixels below the boxes;
all others are copied byte by byte. Nothing is written where something is, and never half of it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np
from PIL import ExifTags, Image

from ddetr.datasets.annotations import Annotations, ImageRecord
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.image_header import open_image
from ddetr.datasets.images import image_header, read_image
from ddetr.datasets.load import available_splits, default_splits
from ddetr.datasets.readers.reader import layouts_kept
from ddetr.datasets.splits import hold_back, load_split
from ddetr.errors import InputError
from ddetr.files import remove_leftovers, write_folder_atomically
from ddetr.untrusted import one_line, printable
from ddetr.wording import first_few

Target = Literal["coco", "yolo", "voc"]
Progress = Callable[[int, int], None]  # (done, total)

_JPEG_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")
_NAME_BYTES = 200  # of a file name without its suffix: systems take 255
_NOT_IN_NAMES = re.compile(r"[\s<>:\"/\\|?*%#&;=\x00-\x1f\x7f-\x9f\ud800-\udfff]")
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
_OF_WINDOWS = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\.|$)", re.IGNORECASE)


# ---- what is converted -----------------------------------------------------------------------------------------------


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


# ---- the conversion --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conversion:
    """What was written, and what is not as it was."""

    path: Path
    num_images: Mapping[str, int]  # of each split, by its name in the new data set
    num_objects: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Image:
    """An image in the new data set."""

    record: ImageRecord
    name: str
    turned: bool  # it is encoded anew, upright


def convert(
    source: Source,
    output: str | os.PathLike,
    to: Target,
    *,
    images: Literal["copy", "link"] = "copy",
    progress: Progress | None = None,
) -> Conversion:
    """Writes a data set into a folder that is new or empty.

    Args:
        to: "coco": annotations/instances_SPLIT.json and SPLIT/; "yolo": data.yaml, images/ and labels/ with the splits
            train, val and test; "voc": Annotations/, JPEGImages/ and ImageSets/Main/.
        images: "copy": files of their own. "link": hard links where the disk is the same: no space, but what is changed
            in such a file is changed in the original too.
        progress: called with (done, total) images.

    Raises:
        InputError: the folder holds something, or lies among the data set's images; a finding is refused; an image
            cannot be read.
    """
    path = Path(output).expanduser().resolve()
    _check_empty(path)
    for name, split in source.splits.items():
        refused = [finding for finding in split.findings if finding.action == "refused"]
        if refused:
            raise InputError(f"{name}: {one_line(refused[0].where)}: {refused[0].message} Nothing was written")
        for folder in {record.path.parent for record in split.images}:
            if path.is_relative_to(folder.resolve()):
                raise InputError(f"{output} lies in a folder of the data set's images ({folder}); choose another place")
    notes: Counter[str] = Counter()
    names = _split_names(source, to, notes)
    planned = _plan(source, names, to, notes)
    total = sum(map(len, planned.values()))
    writer = {"coco": _write_coco, "yolo": _write_yolo, "voc": _write_voc}[to]

    def write(folder: Path) -> None:
        done = 0
        for split, of_split in planned.items():
            place = folder / {"coco": split, "yolo": f"images/{split}", "voc": "JPEGImages"}[to]
            place.mkdir(parents=True, exist_ok=True)
            for image in of_split:
                _write_image(image, place / image.name, images, notes)
                done += 1
                if progress is not None:
                    progress(done, total)
        writer(folder, planned, source.first, _class_names(source.first, to, notes), notes)
        if to != "coco":
            _note_lost(planned, to, source.first.format == "coco", notes)
        _check_empty(path)  # it takes minutes: somebody may have put something there

    remove_leftovers(path.parent)
    write_folder_atomically(path, write)
    for name in source.left_out:
        notes[f"the split {one_line(name)} was left out: all its images are in others"] = 0
    return Conversion(
        path=path,
        num_images={split: len(of_split) for split, of_split in planned.items()},
        num_objects=sum(
            len(image.record.labels) if to != "yolo" else int((~image.record.ignore).sum())
            for of_split in planned.values()
            for image in of_split
        ),
        notes=tuple(note if not count else f"{note}: {count:,}" for note, count in notes.items()),
    )


def _check_empty(path: Path) -> None:
    if path == Path.cwd():
        raise InputError(f"{path} is the folder that you are in; give the name of a new one")
    if path.exists() and (not path.is_dir() or next(path.iterdir(), None) is not None):
        what = "is not empty" if path.is_dir() else "is a file"
        raise InputError(f"{path} {what}: expected a new or an empty folder; nothing was written")


def _split_names(source: Source, to: Target, notes: Counter[str]) -> dict[str, str]:
    """Name of each split -> its name in the new data set."""
    if to != "yolo":
        names = {name: _safe_name(name) for name in source.splits}
        names = {name: "all" if safe == "annotations" else safe for name, safe in names.items()}  # COCO's own folder
        if to == "voc":  # where cat_train is what train says of cats
            names = {name: safe.replace("_", "-") for name, safe in names.items()}
    else:
        names = {name: _yolo_split(name, source) for name in source.splits}
    if len(set(names.values())) < len(names):
        raise InputError(
            f"the splits {first_few(names, 8)} would not all have names of their own in {to.upper()}; convert them one "
            "by one, each by --split into a folder of its own"
        )
    for name, new in names.items():
        if name != new:
            notes[f"the split {one_line(name)} is called {new}"] = 0
    return names


def _yolo_split(name: str, source: Source) -> str:
    """data.yaml knows three."""
    if name == source.train:
        return "train"
    if name == source.val:
        return "val"
    return "val" if source.val is None and name.lower().startswith("val") else "test"


def _plan(source: Source, names: Mapping[str, str], to: Target, notes: Counter[str]) -> dict[str, list[_Image]]:
    """New split name -> its images, each with a name that nobody else has."""
    taken: set[str] = set()
    planned: dict[str, list[_Image]] = {}
    for split, found in source.splits.items():
        if to != "voc":
            taken = set()
        planned[names[split]] = []
        for record in found.images:
            turned = _is_turned(record.path)
            suffix = record.path.suffix.lower() if is_image_name(record.path.name) else ".png"
            if turned and suffix not in _JPEG_SUFFIXES:
                suffix = ".png"
            elif not turned:
                suffix = record.path.suffix
            stem = safe = _safe_name(record.path.stem)
            number = 1
            while (key := _key(stem + suffix if to == "coco" else stem)) in taken:
                number += 1
                stem = f"{safe}_{number}"
            taken.add(key)
            if stem != record.path.stem:
                notes["images under other names, as theirs were not unique or not safe on every system"] += 1
            planned[names[split]].append(_Image(record, stem + suffix, turned))
    return planned


def _is_turned(path: Path) -> bool:
    """Whether some program shows it otherwise than another: by an orientation in its header."""
    if path.suffix.lower() not in (".tif", ".tiff"):
        return image_header(path).orientation != 1
    with open_image(path) as image:  # which Pillow turns by itself: its header is the upright one
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def _key(name: str) -> str:
    """The same for names that some system takes for the same."""
    return unicodedata.normalize("NFC", name).casefold()


def _safe_name(name: str) -> str:
    """A file name (without suffix) that every system, list and address takes; letters of all scripts stay."""
    name = _NOT_IN_NAMES.sub("_", printable(name))
    if is_image_name(name) or name.lower().endswith(".xml"):  # a.jpg.png: its stem looks like another image
        name = name.replace(".", "_")
    name = name.encode("utf-8")[:_NAME_BYTES].decode("utf-8", "ignore").rstrip(".")
    if not name or name.startswith((".", "-")) or _OF_WINDOWS.match(name):
        name = f"_{name.lstrip('.-')}"
    return name


def _write_image(image: _Image, place: Path, how: Literal["copy", "link"], notes: Counter[str]) -> None:
    record = image.record
    if image.turned:
        pixels = Image.fromarray(read_image(record.path, record.size_hw).permute(1, 2, 0).numpy())
        pixels.save(place, **({"quality": 95, "subsampling": 0} if place.suffix.lower() != ".png" else {}))
        notes["images that EXIF turns, encoded anew as their boxes see them"] += 1
        return
    try:
        if how == "link":
            try:
                os.link(record.path.resolve(), place)
                return
            except OSError:
                notes["images copied, as they cannot be linked from there"] += 1
        shutil.copyfile(record.path, place)
    except OSError as error:
        if error.errno == errno.ENOENT and not record.path.exists():
            raise InputError(f"{record.path} is gone; nothing was written") from None
        raise


def _class_names(annotations: Annotations, to: Target, notes: Counter[str]) -> list[str]:
    """The name of each label as the format can hold it."""
    names = [category.name.strip() or f"class_{label}" for label, category in enumerate(annotations.categories)]
    if to == "voc":
        names = [" ".join(_NOT_IN_XML.sub(" ", name).split()) or f"class_{i}" for i, name in enumerate(names)]
    for category, name in zip(annotations.categories, names, strict=True):
        if category.name != name:
            notes[f"the class '{one_line(category.name)}' is called '{one_line(name)}'"] = 0
    doubled = sorted(name for name, count in Counter(names).items() if count > 1)
    if to == "voc" and doubled:
        notes[f"classes of one name are one class now: {first_few(map(one_line, doubled), 5)}"] = 0
    return names


def _note_lost(planned: Mapping[str, Sequence[_Image]], to: Target, is_coco: bool, notes: Counter[str]) -> None:
    """What neither YOLO nor VOC has a place for."""
    if is_coco:
        notes[f"ids of images and classes are not kept: {to.upper()} has none of its own"] = 0
    for of_split in planned.values():
        for image in of_split:
            sides = image.record.boxes_xyxy[:, 2:] - image.record.boxes_xyxy[:, :2]
            if (np.abs(image.record.area - sides.prod(axis=1)) > 0.01 * sides.prod(axis=1)).any():
                notes["areas of masks are not kept: AP by size will be by that of the boxes"] = 0
                return


def _numbers(values: Any) -> list[float]:
    """As exact as float32 is, and short: 12.5 and not 12.500000001."""
    return [float(f"{value:.9g}") for value in np.asarray(values, dtype=np.float64).tolist()]


# ---- the formats -----------------------------------------------------------------------------------------------------


def _write_coco(
    folder: Path,
    planned: Mapping[str, Sequence[_Image]],
    annotations: Annotations,
    classes: Sequence[str],
    notes: Counter[str],
) -> None:
    ids = [category.category_id for category in annotations.categories]
    if min(ids, default=1) < 1:
        ids = list(range(1, len(ids) + 1))
        notes["class ids were numbered from 1: in COCO 0 is often taken for the background"] = 0
    (folder / "annotations").mkdir()
    object_id = 0
    for split, images in planned.items():
        objects = []
        for image in images:
            record = image.record
            boxes = record.boxes_xyxy.astype(np.float64)
            boxes[:, 2:] -= boxes[:, :2]
            for i, label in enumerate(record.labels.tolist()):
                object_id += 1
                objects.append(
                    {"id": object_id, "image_id": record.image_id, "category_id": ids[label]}
                    | {"bbox": _numbers(boxes[i]), "area": _numbers(record.area[i : i + 1])[0]}
                    | {"iscrowd": int(record.ignore[i])}
                )
        content = {
            "info": {"description": f"{one_line(annotations.name)}, converted by ddetr"},
            "images": [
                {"id": image.record.image_id, "file_name": image.name}
                | dict(zip(("height", "width"), image.record.size_hw))
                for image in images
            ],
            "annotations": objects,
            "categories": [{"id": i, "name": name} for i, name in zip(ids, classes, strict=True)],
        }
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content), encoding="utf-8")


def _write_yolo(
    folder: Path,
    planned: Mapping[str, Sequence[_Image]],
    annotations: Annotations,
    classes: Sequence[str],
    notes: Counter[str],
) -> None:
    import yaml

    for split, images in planned.items():
        (folder / "labels" / split).mkdir(parents=True)
        for image in images:
            record = image.record
            if record.ignore.any():
                key = "objects to be ignored (crowds, difficult ones) left out, as YOLO has no mark for them"
                notes[key] += int(record.ignore.sum())
            boxes = record.boxes_xyxy[~record.ignore].astype(np.float64)
            sides = np.array(record.size_hw[::-1] * 2)
            fractions = np.concatenate([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], axis=1) / sides
            lines = [
                f"{label} {' '.join(f'{value:.9g}' for value in row)}\n"
                for label, row in zip(record.labels[~record.ignore].tolist(), fractions.tolist(), strict=True)
            ]
            file = (folder / "labels" / split / image.name).with_suffix(".txt")
            file.write_text("".join(lines), encoding="ascii")
    content = {split: f"images/{split}" for split in planned} | {"names": dict(enumerate(classes))}
    readable = all(name.isprintable() for name in classes)  # else by escapes
    text = yaml.safe_dump(content, allow_unicode=readable, sort_keys=False, width=10_000)
    (folder / "data.yaml").write_text(text, encoding="utf-8")
    if "val" not in planned:
        notes["there is no validation split, without which Ultralytics' YOLO doesn't train"] = 0


def _write_voc(
    folder: Path,
    planned: Mapping[str, Sequence[_Image]],
    annotations: Annotations,
    classes: Sequence[str],
    notes: Counter[str],
) -> None:
    (folder / "Annotations").mkdir()
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    for split, images in planned.items():
        stems = [Path(image.name).stem for image in images]
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("".join(f"{s}\n" for s in stems), encoding="utf-8")
        for image, stem in zip(images, stems, strict=True):
            _voc_tree(image, classes, notes).write(folder / "Annotations" / f"{stem}.xml", encoding="utf-8")
    used = {label for image in next(iter(planned.values())) for label in image.record.labels.tolist()}
    unused = [name for label, name in enumerate(classes) if label not in used]
    if unused:
        notes[
            f"classes without an object in {next(iter(planned))} are not kept: {first_few(map(one_line, unused), 5)}"
        ] = 0


def _voc_tree(image: _Image, classes: Sequence[str], notes: Counter[str]) -> ElementTree.ElementTree:
    record = image.record
    height, width = record.size_hw
    root = ElementTree.Element("annotation")
    _fill(root, {"folder": "JPEGImages", "filename": image.name})
    _fill(ElementTree.SubElement(root, "size"), {"width": width, "height": height, "depth": 3})
    _fill(root, {"segmented": 0})
    for label, box, ignore in zip(record.labels.tolist(), record.boxes_xyxy, record.ignore.tolist(), strict=True):
        numbers = [int(value) if value == int(value) else value for value in _numbers(box)]
        if any(isinstance(value, float) for value in numbers):
            notes["boxes with fractions of a pixel, which some readers of Pascal VOC refuse"] += 1
        entry = ElementTree.SubElement(root, "object")
        _fill(entry, {"name": classes[label], "pose": "Unspecified", "truncated": 0, "difficult": int(ignore)})
        _fill(ElementTree.SubElement(entry, "bndbox"), dict(zip(("xmin", "ymin", "xmax", "ymax"), numbers)))
    ElementTree.indent(root)
    return ElementTree.ElementTree(root)


def _fill(element: ElementTree.Element, values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        ElementTree.SubElement(element, key).text = str(value)

"""The annotations of a data set as COCO, YOLO and Pascal VOC have them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from xml.etree import ElementTree

import numpy as np

from ddetr.datasets.annotations import Annotations, ImageRecord
from ddetr.printable import one_line
from ddetr.wording import first_few

Target = Literal["coco", "yolo", "voc"]
_NOT_IN_XML = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")


@dataclass(frozen=True)
class NewImage:
    """An image in the new data set."""

    record: ImageRecord
    name: str
    turned: bool  # it is encoded anew, upright


def class_names(annotations: Annotations, to: Target, notes: Counter[str]) -> list[str]:
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


def note_lost(planned: Mapping[str, Sequence[NewImage]], to: Target, is_coco: bool, notes: Counter[str]) -> None:
    """What neither YOLO nor VOC has a place for."""
    if is_coco:
        notes[f"ids of images and classes are not kept: {to.upper()} has none of its own"] = 0
    for of_split in planned.values():
        for image in of_split:
            sides = image.record.boxes_xyxy[:, 2:] - image.record.boxes_xyxy[:, :2]
            if (np.abs(image.record.area - sides.prod(axis=1)) > 0.01 * sides.prod(axis=1)).any():
                notes["areas of masks are not kept: AP by size will be by that of the boxes"] = 0
                return


def write_coco(
    folder: Path,
    planned: Mapping[str, Sequence[NewImage]],
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


def write_yolo(
    folder: Path,
    planned: Mapping[str, Sequence[NewImage]],
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


def write_voc(
    folder: Path,
    planned: Mapping[str, Sequence[NewImage]],
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


def _voc_tree(image: NewImage, classes: Sequence[str], notes: Counter[str]) -> ElementTree.ElementTree:
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


def _numbers(values: Any) -> list[float]:
    """As exact as float32 is, and short: 12.5 and not 12.500000001."""
    return [float(f"{value:.9g}") for value in np.asarray(values, dtype=np.float64).tolist()]

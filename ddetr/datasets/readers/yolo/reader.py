"""YOLO: one text file of `class x y w h` lines per image, `labels/` mirroring `images/`, classes in a `data.yaml`.

layout.py finds the images, labels.py the label file of each, names.py the classes, rows.py reads the lines; here they
become a split. `category_id` is the id in the label files. An image without a label file is background, as YOLO defines
it, and counted; polygons (segmentation, oriented boxes) become the box around them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from itertools import chain, islice
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import (
    Annotations,
    FindingLog,
    match_categories,
    split_error,
    unlike_training,
    whole,
)
from ddetr.datasets.box_form import is_relative
from ddetr.datasets.image_files import IMAGES_OPTION, ImageFolders, counted
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.label_folders import report_in_no_list
from ddetr.datasets.readers.reader import LabelledImage, Wanted, check_unnamed, table_of
from ddetr.datasets.readers.yolo.labels import LabelFiles, label_folders
from ddetr.datasets.readers.yolo.layout import (
    SAMPLED_LABELS,
    YoloSplit,
    description,
    has_rows,
    image_paths,
    names_file,
    not_named,
    yolo_file,
    yolo_splits,
)
from ddetr.datasets.readers.yolo.names import (
    check_names,
    class_lists,
    classes_of,
    classes_of_rows,
    ids_of_names,
    report_other_lists,
)
from ddetr.datasets.readers.yolo.paths import given
from ddetr.datasets.readers.yolo.rows import Class, RowReader
from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, one_line, shortened
from ddetr.untrusted import MAX_LABEL_BYTES, read_text


def read_yolo(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    if wanted.image_dir is not None:
        raise InputError(f"{IMAGES_OPTION} is for other formats: a YOLO data set names its images in its data.yaml")
    path, split = wanted.path, wanted.split
    splits = yolo_splits(path)
    if split not in splits:
        raise split_error(path, split, list(splits))
    log = FindingLog()
    file = yolo_file(path) or names_file(path)
    content = description(file) if file else {}
    root = path if path.is_dir() else path.absolute().parent
    root = root.absolute()
    for sentence in splits[split].missing:
        log.add("missing-path", "refused", file.name if file else str(root), sentence)
    images = image_paths(splits[split], log)
    if not images and splits[split].sources:
        looked = ", ".join(str(source) for source in splits[split].sources)
        log.add("no-images", "refused", looked, "There is no image in it; correct the split's path.")

    if wanted.boxes != "auto" and not is_relative(wanted.boxes):
        raise InputError(
            f"--data.boxes (boxes) is for formats in pixels without -relative, got {wanted.boxes}: YOLO's boxes are "
            f"fractions of the image, read by --data.boxes {wanted.boxes}-relative"
        )
    labels = LabelFiles()
    files = [labels.find(image) for image in images]
    sources = [source for source in splits[split].sources if source.is_dir()]
    others = [source for other in splits.values() for source in other.sources if source.is_dir()]
    labels.report(sources, [source for source in others if source not in sources], log)
    if wanted.is_training:
        _report_unlisted(splits, images, log)
    lists = class_lists(root, labels.folders) or class_lists(root, chain.from_iterable(map(label_folders, others)))
    named = classes_of(file, content, lists, log)

    polygons = content.get("task") in ("segment", "obb")
    reader = RowReader(log, _keypoint_numbers(content, file), polygons, ids_of_names(named), wanted.boxes)
    rows = []
    for image, label in counted(list(zip(images, files, strict=True))):
        lines = _read_lines(label, log) if label is not None else []
        rows.append(reader.read(lines, _shown(label or image, root)))

    def training() -> RowReader:
        known = RowReader(FindingLog(), reader.keypoint_numbers, polygons, reader.names, wanted.boxes)
        for image in image_paths(splits[wanted.train_split], FindingLog()):
            if (label := labels.find(image)) is not None:
                known.read(_read_lines(label, known.log), "")
        return known

    keypoints = reader.settle(root, rows, None if wanted.is_training else training)
    own = named or classes_of_rows(reader.ids, root, log)
    check_names(own, reader.ids, str(file or root), log)
    report_other_lists(own, reader.ids, file, lists, root, log)

    categories = tuple(own if wanted.categories is None else wanted.categories)
    label_of = match_categories(own, categories, log, str(root), by_id=False)
    label_of_id = {key: label_of[i] for i, category in enumerate(own) for key in (category.category_id, category.name)}
    name_of_id = {key: category.name for category in own for key in (category.category_id, category.name)}

    def said_of(class_id: Class) -> str:
        if isinstance(class_id, str) and class_id not in name_of_id:
            return f"{shortened(class_id, SHOWN_NAME)!r} is no class id and none of the names"
        if class_id not in name_of_id:
            return f"Class id {class_id} has no name"
        return unlike_training(name_of_id[class_id], categories)

    found = []
    for image, read in zip(images, rows, strict=True):
        ids, boxes, numbers = reader.boxes(read, keypoints)
        found.append(
            LabelledImage(image, read.where, ids, boxes, numbers, in_fractions=True, form="cxcywh", unit="line")
        )
    del rows, images
    num_of_id = Counter(class_id for image in found for class_id in image.classes)
    unnamed = {class_id: count for class_id, count in num_of_id.items() if class_id not in name_of_id}
    check_unnamed(unnamed, num_of_id.total(), str(file or root), log)
    table = table_of(found, label_of_id, log, said_of)
    return whole(root, split, "yolo", categories, table, log)


def _report_unlisted(splits: Mapping[str, YoloSplit], images: Sequence[Path], log: FindingLog) -> None:
    """Counts the images with labels beside `images`, those of a split, that are in no list or folder of any split."""
    sources = [source for split in splits.values() for source in split.sources]
    lists = [source for source in sources if source.is_file() and not is_image_name(source.name)]
    if not lists:
        return
    real = cache(os.path.realpath)
    used = {(real(image.parent), image.name) for image in images}
    used |= {(real(path.parent), path.name) for split in splits.values() for path in image_paths(split, FindingLog())}
    folders, labels = ImageFolders(), LabelFiles()
    for folder in sorted({image.parent for image in images}):
        others = [folder / name for name in folders.images(folder) if (real(folder), name) not in used]
        files = ((image.name, labels.find(image)) for image in others)
        names = [name for name, file in files if file is not None and has_rows(file)]
        report_in_no_list(log, folder, names, lists)


def said_of_unnamed(path: Path, kind: str) -> str:
    """A sentence on images of a split that are there and that the description doesn't name; "" without such."""
    file = yolo_file(path)
    place = None if file is None else not_named(file, kind)
    if place is None:
        return ""
    shown = one_line(_shown(place, file.absolute().parent))
    return (
        f"{one_line(file.name)} names no {kind}, but {shown} has images with labels, which are not used: write "
        f"`{kind}: {shown}` into it."
    )


def has_label_rows(path: Path) -> bool:
    """Whether there are label files with rows of YOLO's: folders called images and labels are other formats' too."""
    if yolo_file(path) is not None:
        return True
    for split in yolo_splits(path).values():
        labels = LabelFiles()
        files = (labels.find(image) for image in islice(image_paths(split, FindingLog()), SAMPLED_LABELS))
        if any(file is not None and has_rows(file) for file in files):
            return True
    return False


def _read_lines(file: Path, log: FindingLog) -> list[str]:
    try:
        return read_text(file, MAX_LABEL_BYTES).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        message = f"The label file can't be read ({error}); the image would silently become background. Restore it."
        log.add("unreadable-labels", "refused", str(file), message)
        return []


def _keypoint_numbers(content: dict[str, Any], file: Path | None) -> int | None:
    """How many numbers a keypoint has, by `kpt_shape: [keypoints, numbers]`; None where there are no keypoints."""
    shape = content.get("kpt_shape")
    if not given(shape):
        return None
    if isinstance(shape, list) and len(shape) == 2 and shape[1] in ("2", "3"):
        return int(shape[1])
    raise InputError(f"{file}: kpt_shape must be [number of keypoints, 2 or 3], got {one_line(shape)}")


def _shown(file: Path, root: Path) -> str:
    return str(file).removeprefix(f"{root}{os.sep}")

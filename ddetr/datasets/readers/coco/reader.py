"""COCO annotations: the annotation files of a split, whatever is wrong with them, to `Annotations`.

A category's `category_id` is the file's; labels number the categories in the order of their ids. Shapes: I images,
n objects as they stand in the file, m of them that are used.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import (
    Annotations,
    FindingLog,
    ImageTable,
    check_boxes,
    match_categories,
    report_boxes,
    unlike_training,
    whole,
)
from ddetr.datasets.box_form import corners_of, in_pixels, is_relative, put_in_order
from ddetr.datasets.config import BoxForm
from ddetr.datasets.image_files import ImageFolders, Stated, read_headers, report_unlisted, settle_sizes
from ddetr.datasets.readers.box_meaning import check_meaning
from ddetr.datasets.readers.coco.content import categories_of, entries_of, load_json, whole_number, without_collector
from ddetr.datasets.readers.coco.ids import (
    integer_ids,
    is_id,
    look_up,
    look_up_names,
    report_off_by_one,
)
from ddetr.datasets.readers.coco.layout import image_dirs
from ddetr.datasets.readers.coco.mask import box_of_mask, check_masks
from ddetr.datasets.readers.coco.merge import merged
from ddetr.datasets.readers.file_names import find_files
from ddetr.datasets.readers.reader import Wanted, box_numbers, check_unnamed, is_true
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_PATH
from ddetr.wording import first_few

_NAME_KEYS = ("file_name", "filename", "path", "coco_url")  # the first that an image has; tools write others


def read_coco(wanted: Wanted, files: Sequence[Path]) -> Annotations:
    """One annotation file of the data set at `wanted.path`, a folder, or several that make up a split;
    `load_annotations` says what is wanted."""
    with without_collector():
        log = FindingLog()
        shown = _shown(files[0], wanted.path)
        if len(files) == 1:
            return _read(load_json(files[0], log), wanted, files[0], log, shown)
        shown = f"{shown} and {len(files) - 1:,} more"
        return _read(merged(files, wanted.path, log, shown), wanted, files[0], log, shown)


def _read(content: dict[str, Any], wanted: Wanted, annotation_file: Path, log: FindingLog, shown: str) -> Annotations:
    root, categories, form = wanted.path, wanted.categories, wanted.boxes
    own_form = "xywh" if form == "auto" else form
    images = entries_of(content, "images", annotation_file)
    objects = entries_of(content, "annotations", annotation_file) if "annotations" in content else []
    if "annotations" not in content:
        message = f'There is no "annotations", but {first_few(map(one_line, content), 8)}: every image is background.'
        log.add("missing-annotations", "dropped", shown, message)
    own, label_of_id = categories_of(content, objects, log, shown)
    image_ids, names, declared, index_of_id = _images(images, log, shown)
    del images

    folders = ImageFolders()
    places = [wanted.image_dir] if wanted.image_dir else image_dirs(root, annotation_file, wanted.split)
    paths = find_files(places, names, folders, log, shown, root=wanted.image_dir or root, split=wanted.split)
    report_unlisted(paths, folders, log, shown)
    image_index, labels, usable, boxes_xyxy = _objects(
        objects, index_of_id, label_of_id, [category.name for category in own], names, declared, form, log, shown
    )

    def where(i: int) -> str:
        return _where(objects[i], shown, names, image_index[i])

    _settle_shared_files(paths, names, image_index, labels, boxes_xyxy, log, shown)
    if categories is not None and own:
        label_in_training = match_categories(own, categories, log, shown, by_id=True)
        unknown = usable & (label_in_training[labels] < 0)
        said = {label: unlike_training(own[label].name, categories) for label in np.unique(labels[unknown]).tolist()}
        for i in np.flatnonzero(unknown):
            log.add("category-unknown", "dropped", where(i), f"{said[int(labels[i])]}; left out.")
        labels, usable = label_in_training[labels], usable & ~unknown

    sizes_hw, kept = _sizes(paths, declared, image_index, boxes_xyxy, usable, wanted, log, shown, names)
    selected = np.flatnonzero(usable)
    selected = selected[kept[image_index[selected]]]
    selected = selected[np.argsort(image_index[selected], kind="stable")]
    boxes, sizes_of_boxes = boxes_xyxy[selected], sizes_hw[image_index[selected]]
    is_doubtful = check_meaning(boxes, sizes_of_boxes, "xywh", form, log, shown)
    if is_relative(form):
        boxes = in_pixels(boxes, sizes_of_boxes)
    boxes = put_in_order(boxes, sizes_of_boxes, own_form, log, lambda i: where(selected[i]))
    if form == "auto" and not is_doubtful:
        _compare_with_masks(objects, selected, boxes, sizes_of_boxes, log, where)
    check = check_boxes(boxes, sizes_of_boxes)
    report_boxes(log, check, boxes, lambda i: where(selected[i]))
    boxes, selected = check.boxes_xyxy[check.usable], selected[check.usable]
    del check, boxes_xyxy, sizes_of_boxes  # 70 MB of COCO's, before what follows takes as much

    new_index = np.cumsum(kept) - 1
    table = ImageTable(
        image_ids=image_ids[kept],
        paths=[str(path) for path, keep in zip(paths, kept, strict=True) if keep],
        sizes_hw=sizes_hw[kept],
        image_index=new_index[image_index[selected]],
        boxes_xyxy=boxes,
        labels=labels[selected],
        area=_areas(objects, selected, boxes, is_relative(form), log, shown, where),
        ignore=_crowd(objects, selected, log, shown),
    )
    return whole(root, wanted.split, "coco", categories or own, table, log)


def _images(
    entries: Sequence[dict[str, Any]], log: FindingLog, shown: str
) -> tuple[np.ndarray, list[str], np.ndarray, dict[Any, int]]:
    """Ids (I,), file names, declared sizes (I, 2) as (h, w) with 0 for unknown, and the index of each id in the
    file."""
    index_of_id: dict[Any, int] = {}
    ids: list[Any] = []
    names: list[str] = []
    sizes: list[tuple[Any, Any]] = []
    other_keys: list[str] = []
    for position, entry in enumerate(entries):
        image_id, name = entry.get("id"), entry.get("file_name")
        if isinstance(name, (int, float)) and (number := whole_number(name)) is not None:
            name = str(number)  # of a table: 7 for 7.jpg
        if not name:
            key = next((key for key in _NAME_KEYS if entry.get(key)), "file_name")
            name = entry.get(key)
            other_keys += [key] if name else []
        if not is_id(image_id) or not isinstance(name, str) or not 0 < len(name) <= MAX_PATH:
            found = f"{one_line(repr(image_id))} and {one_line(repr(name))}"
            message = f'An image needs an "id" and a "file_name"; this one has {found} and was left out.'
            log.add("image-entry", "dropped", f"{shown}, image {position}", message)
            continue
        first = index_of_id.setdefault(image_id, len(ids))
        if first < len(ids):
            where = f"{shown}, image id {image_id}"
            if names[first] == name:
                log.add("duplicate-image", "repaired", where, f"{name} is listed twice; the second entry was ignored.")
            else:
                message = f"{names[first]} and {name} share one id: whose boxes are whose can't be known."
                log.add("duplicate-image-id", "refused", where, message)
            continue
        ids.append(image_id)
        names.append(name)
        sizes.append((entry.get("height"), entry.get("width")))
    if other_keys:
        message = f'{len(other_keys)} images have no "file_name", but another key that names the file: {other_keys[0]}.'
        log.add("missing-file-name", "repaired", shown, message, count=len(other_keys))
    numbers = np.nan_to_num(_numbers(sizes, 2), nan=0.0, posinf=0.0, neginf=0.0)
    declared = numbers.clip(0, np.iinfo(np.int32).max).round().astype(np.int64)
    return integer_ids(ids, log, shown), names, declared, index_of_id


def _settle_shared_files(
    paths: list[Path | None],
    names: Sequence[str],
    image_index: np.ndarray,
    labels: np.ndarray,
    boxes_xyxy: np.ndarray,
    log: FindingLog,
    shown: str,
) -> None:
    """One file under several ids: with the same objects, or with objects under one id alone, it is used once; with
    others nobody knows whose are whose (frames of two videos, or one frame labelled twice), and it is left out."""
    found = [path for path in paths if path is not None]
    if len(set(found)) == len(found):
        return
    files: dict[Path, list[int]] = defaultdict(list)
    for i, path in enumerate(paths):
        if path is not None:
            files[path].append(i)
    shared = [indices for indices in files.values() if len(indices) > 1]
    order = np.argsort(image_index, kind="stable")
    ends = np.searchsorted(image_index[order], np.arange(len(paths) + 1))
    again = 0
    for indices in shared:
        contents = {}
        for i in indices:
            mine = order[ends[i] : ends[i + 1]]
            objects = sorted([label, *box] for label, box in zip(labels[mine].tolist(), boxes_xyxy[mine].tolist()))
            contents[i] = repr(objects) if objects else ""
        filled = [i for i in indices if contents[i]]
        if len({contents[i] for i in filled}) > 1:
            message = (
                f"It is listed under {len(indices)} ids with different boxes: whose is which can't be known. If they "
                "are one picture, give them one id; if not, give each its own file_name."
            )
            log.add("duplicate-file", "refused", f"{shown}, {names[indices[0]]}", message, count=len(indices))
            filled = [-1]
        else:
            again += len(indices) - 1
        for i in indices:
            if i != (filled or indices)[0]:
                paths[i] = None
    if again:
        message = f"{again} files are listed again under another id with the same boxes or none; each was used once."
        log.add("duplicate-file", "note", shown, message, count=again)


def _objects(
    objects: Sequence[dict[str, Any]],
    index_of_id: dict[Any, int],
    label_of_id: dict[int, int],
    class_names: Sequence[str],
    names: Sequence[str],
    declared_hw: np.ndarray,
    form: BoxForm,
    log: FindingLog,
    shown: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For n objects: image index (n,), label (n,), usable (n,) bool, corners as written (n, 4)."""
    image_index = look_up([obj.get("image_id") for obj in objects], index_of_id)
    labels = look_up([obj.get("category_id") for obj in objects], label_of_id)
    look_up_names(image_index, labels, objects, names, class_names, log, shown)
    boxes_xywh = _numbers([obj.get("bbox") for obj in objects], 4, named=form.startswith(("auto", "xywh")))
    boxes_xyxy = corners_of(boxes_xywh, "xywh" if form == "auto" else form)
    no_box = np.zeros(len(objects), dtype=bool)

    def around_mask(i: int) -> np.ndarray | None:
        if is_relative(form):
            return None
        size_hw = tuple(declared_hw[image_index[i]].tolist()) if image_index[i] >= 0 else (0, 0)
        box = box_of_mask(objects[i].get("segmentation"), size_hw if min(size_hw) > 0 else None)
        return None if box is None else corners_of(box[None], "xywh")[0]

    is_missing = np.isnan(boxes_xywh).all(axis=1)
    is_empty = (boxes_xyxy[:, 2:] <= boxes_xyxy[:, :2]).any(axis=1)
    is_empty &= ~(boxes_xywh[:, 2:] > 0).all(axis=1)  # as written: masks of others are kept to be compared alone
    for i in np.flatnonzero(is_missing | is_empty):
        box, from_mask = objects[i].get("bbox"), around_mask(i)
        said = 'There is no "bbox"' if box is None else f'Its "bbox" is {one_line(repr(box), 80)}'
        where = _where(objects[i], shown, names, image_index[i])
        if is_empty[i]:
            if from_mask is not None and (from_mask[2:] > from_mask[:2]).all():
                boxes_xyxy[i] = from_mask
                message = f"{said}, which has no area; the one around the mask was used."
                log.add("empty-box", "repaired", where, message)
        elif isinstance(box, list) and len(box) == 4:
            pass  # four numbers that are none: refused with the other boxes
        elif from_mask is None:
            no_box[i] = True
            message = f"{said}; expected [x, y, width, height]. The object was left out."
            log.add("missing-box", "dropped", where, message)
        else:
            boxes_xyxy[i] = from_mask
            log.add("missing-box", "repaired", where, f"{said}; the one around the mask was used.")
    if (image_index < 0).any():
        report_off_by_one(objects, "image_id", index_of_id, shown, log)
    for i in np.flatnonzero(image_index < 0):
        message = f"It belongs to image id {objects[i].get('image_id')!r}, which is not listed; left out."
        log.add("image-unknown", "dropped", _where(objects[i], shown, names, -1), message)
    unnamed = Counter(one_line(repr(objects[i].get("category_id")), 40) for i in np.flatnonzero(labels < 0))
    if not unnamed or not report_off_by_one(objects, "category_id", label_of_id, shown, log):
        check_unnamed(unnamed, len(objects), shown, log)
    for i in np.flatnonzero(labels < 0):
        category_id = objects[i].get("category_id")
        said = f"Its category id {category_id!r} is not among the categories"
        message = f"{'It has no category id' if category_id is None else said}; left out."
        log.add("category-unknown", "dropped", _where(objects[i], shown, names, image_index[i]), message)
    annotation_ids = {obj["id"] for obj in objects if isinstance(obj.get("id"), (int, str))}
    num_without_id = sum(not isinstance(obj.get("id"), (int, str)) for obj in objects)
    if len(annotation_ids) + num_without_id < len(objects):
        repeated = len(objects) - len(annotation_ids) - num_without_id
        message = f"{repeated} annotation ids occur more than once; all objects were kept, ids are not used."
        log.add("duplicate-annotation-id", "note", shown, message, count=repeated)
    return image_index, labels, (image_index >= 0) & (labels >= 0) & ~no_box, boxes_xyxy


def _sizes(
    paths: Sequence[Path | None],
    declared: np.ndarray,
    image_index: np.ndarray,
    boxes_xyxy: np.ndarray,
    usable: np.ndarray,
    wanted: Wanted,
    log: FindingLog,
    shown: str,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (I, 2) as (h, w), and which images are kept (I,) bool."""
    sizes_hw = declared.copy()
    kept = np.array([path is not None for path in paths], dtype=bool)
    unknown = (declared <= 0).any(axis=1)
    to_read = np.flatnonzero(kept if wanted.check_images else kept & unknown)
    num_unknown = int((unknown & kept).sum())
    if num_unknown:
        first = names[np.flatnonzero(unknown & kept)[0]]
        message = f"{num_unknown} images have no width and height, such as {first}; they were read from the files."
        log.add("missing-size", "repaired", shown, message, count=num_unknown)
    headers = read_headers([paths[i] for i in to_read])
    boxes_in_order = np.flatnonzero(usable)[np.argsort(image_index[usable], kind="stable")]
    ends = np.searchsorted(image_index[boxes_in_order], np.arange(len(paths)), side="right")
    odd, stated = {}, declared.tolist()
    for i, header in zip(to_read.tolist(), headers, strict=True):
        declared_hw, where = None if unknown[i] else tuple(stated[i]), f"{shown}, {names[i]}"
        if isinstance(header, InputError):
            kept[i] = False
            message = f"{str(header).rstrip('.')}; it was left out."
            log.add("unreadable-image", "dropped", where, message)
        elif declared_hw == header.upright_hw and header.orientation == 1:  # nearly all
            sizes_hw[i] = header.upright_hw
        else:
            boxes = boxes_xyxy[boxes_in_order[ends[i - 1] if i else 0 : ends[i]]]
            odd[i] = Stated(paths[i], header, declared_hw, boxes, where, is_relative(wanted.boxes))
    for i, size_hw in zip(odd, settle_sizes([*odd.values()], len(to_read), log), strict=True):
        kept[i] = size_hw is not None
        sizes_hw[i] = size_hw or (0, 0)
    return sizes_hw, kept


def _compare_with_masks(
    objects: Sequence[dict[str, Any]],
    selected: np.ndarray,
    boxes_xyxy: np.ndarray,
    sizes_hw: np.ndarray,
    log: FindingLog,
    where: Callable[[int], str],
) -> None:
    """Beside the masks that `load_json` has kept."""
    boxes_of = {}
    for i, place in enumerate(selected.tolist()):
        if "segmentation" in objects[place]:
            box = box_of_mask(objects[place]["segmentation"], tuple(sizes_hw[i].tolist()))
            if box is not None:
                boxes_of[i] = box
    if boxes_of:
        kept = np.array(list(boxes_of))
        masks = corners_of(np.stack(list(boxes_of.values())), "xywh")
        check_masks(boxes_xyxy[kept], masks, sizes_hw[kept], lambda i: where(selected[kept[i]]), log)


def _areas(
    objects: Sequence[dict[str, Any]],
    selected: np.ndarray,
    boxes_xyxy: np.ndarray,
    in_fractions: bool,
    log: FindingLog,
    shown: str,
    where: Callable[[int], str],
) -> np.ndarray:
    """(m,) areas of the selected objects: the mask's where the file gives it in pixels, else the box's."""
    if in_fractions:
        return (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    area = _numbers([(objects[i].get("area"),) for i in selected.tolist()], 1)[:, 0]
    missing = ~((area > 0) & (area < np.finfo(np.float32).max))
    area[missing] = (boxes_xyxy[missing, 2:] - boxes_xyxy[missing, :2]).prod(axis=1)
    if missing.all() and len(missing):
        message = "No object has a usable area; the boxes' were used, so AP by size is not comparable with masks'."
        log.add("missing-area", "repaired", shown, message, count=len(missing))
    else:
        for i in selected[missing].tolist():
            log.add(
                "missing-area", "repaired", where(i), f"Its area is {objects[i].get('area')!r}; the box's was used."
            )
    return area


def _crowd(objects: Sequence[dict[str, Any]], selected: np.ndarray, log: FindingLog, shown: str) -> np.ndarray:
    """(m,) bool: the selected objects that are crowds."""
    missing = sum("iscrowd" not in objects[i] for i in selected.tolist())
    if missing:
        log.add("missing-iscrowd", "repaired", shown, f"{missing} objects have no iscrowd; 0 was taken.", count=missing)
    values = [objects[i].get("iscrowd") for i in selected.tolist()]
    if set(map(type, values)) <= {int, bool, type(None)}:
        return np.array(values, dtype=bool)
    return np.array([is_true(value) for value in values], dtype=bool)


def _numbers(rows: Sequence[Any], width: int, named: bool = False) -> np.ndarray:
    """(n, width) float64 of what should be rows of numbers; NaN where it is not. named: boxes may be objects."""
    try:
        array = np.array(rows, dtype=np.float64)
        if array.shape == (len(rows), width):
            return array
    except (TypeError, ValueError, OverflowError):
        pass
    array = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if isinstance(row, str):  # a list as a table writes it
            row = row.strip().strip("[]()").split(",")
        row = box_numbers(row) if named else row
        if isinstance(row, (list, tuple)) and len(row) == width:
            for j, value in enumerate(row):
                with suppress(TypeError, ValueError, OverflowError):
                    array[i, j] = float(value)
    return array


def _where(obj: dict[str, Any], shown: str, names: Sequence[str], image: int) -> str:
    of_image = f" ({names[image]})" if image >= 0 else ""
    return f"{shown}, annotation id {obj.get('id', 'missing')}{of_image}"


def _shown(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) and file != root else file.name

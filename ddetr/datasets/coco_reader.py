"""COCO annotations: one annotation file, whatever is wrong with it, to `Annotations`.

A category's `category_id` is the file's; labels number the categories in the order of their ids. Shapes: I images,
n objects as they stand in the file, m of them that are used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import (
    Annotations,
    Category,
    FindingLog,
    ImageTable,
    check_boxes,
    match_categories,
    report_boxes,
    whole,
)
from ddetr.datasets.coco_json import categories_of, entries_of, load_json, without_collector
from ddetr.datasets.coco_layout import choose_image_dir, image_dirs, last_part
from ddetr.datasets.image_files import ImageFolders, read_headers, report_unread, settle_size
from ddetr.datasets.image_formats import is_unread_name
from ddetr.errors import InputError
from ddetr.untrusted import MAX_PATH, SHOWN_NAME, one_line, shortened


def read_coco(
    root: Path,
    split: str,
    annotation_file: Path,
    *,
    image_dir: Path | None = None,
    categories: Sequence[Category] | None = None,
    check_images: bool = True,
) -> Annotations:
    """One annotation file; `load_annotations` says what the arguments mean."""
    with without_collector():
        content = load_json(annotation_file)
        return _read(content, root, split, annotation_file, image_dir, categories, check_images)


def _read(
    content: dict[str, Any],
    root: Path,
    split: str,
    annotation_file: Path,
    image_dir: Path | None,
    categories: Sequence[Category] | None,
    check_images: bool,
) -> Annotations:
    log = FindingLog()
    shown = _shown(annotation_file, root)
    images = entries_of(content, "images", annotation_file)
    objects = entries_of(content, "annotations", annotation_file) if "annotations" in content else []
    own, label_of_id = categories_of(content, objects, log, shown)
    image_ids, names, declared, index_of_id = _images(images, log, shown)
    del images

    places = [image_dir] if image_dir else image_dirs(root, annotation_file, split)
    paths = _find_images(places, names, log, shown)
    image_index, labels, usable, boxes_xyxy = _objects(objects, index_of_id, label_of_id, names, log, shown)

    def where(i: int) -> str:
        return _where(objects[i], shown, names, image_index[i])

    if categories is not None and own:
        label_in_training = match_categories(own, categories, log, shown, by_id=True)
        unknown = usable & (label_in_training[labels] < 0)
        for i in np.flatnonzero(unknown):
            name = shortened(own[labels[i]].name, SHOWN_NAME)
            log.add("category-unknown", "dropped", where(i), f"{name!r} is no class of the training set; left out.")
        labels, usable = label_in_training[labels], usable & ~unknown

    sizes_hw, kept = _sizes(paths, declared, image_index, boxes_xyxy, usable, check_images, log, shown, names)
    selected = np.flatnonzero(usable)
    selected = selected[kept[image_index[selected]]]
    selected = selected[np.argsort(image_index[selected], kind="stable")]
    check = check_boxes(boxes_xyxy[selected], sizes_hw[image_index[selected]])
    report_boxes(log, check, boxes_xyxy[selected], lambda i: where(selected[i]))
    boxes, selected = check.boxes_xyxy[check.usable], selected[check.usable]

    new_index = np.cumsum(kept) - 1
    table = ImageTable(
        image_ids=image_ids[kept],
        paths=[str(path) for path, keep in zip(paths, kept, strict=True) if keep],
        sizes_hw=sizes_hw[kept],
        image_index=new_index[image_index[selected]],
        boxes_xyxy=boxes,
        labels=labels[selected],
        area=_areas(objects, selected, boxes, log, shown, where),
        ignore=_crowd(objects, selected, log, shown),
    )
    return whole(f"{root.name}/{split}", "coco", categories or own, table, log)


def _images(
    entries: Sequence[dict[str, Any]], log: FindingLog, shown: str
) -> tuple[np.ndarray, list[str], np.ndarray, dict[Any, int]]:
    """Ids (I,), file names, declared sizes (I, 2) as (h, w) with 0 for unknown, and the index of each id in the
    file."""
    index_of_id: dict[Any, int] = {}
    ids: list[Any] = []
    names: list[str] = []
    sizes: list[tuple[Any, Any]] = []
    for position, entry in enumerate(entries):
        image_id, name = entry.get("id"), entry.get("file_name")
        if not isinstance(image_id, (int, str)) or not isinstance(name, str) or not 0 < len(name) <= MAX_PATH:
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
    numbers = np.nan_to_num(_numbers(sizes, 2), nan=0.0, posinf=0.0, neginf=0.0)
    declared = numbers.clip(0, np.iinfo(np.int32).max).round().astype(np.int64)
    return _integer_ids(ids, log, shown), names, declared, index_of_id


def _integer_ids(ids: Sequence[Any], log: FindingLog, shown: str) -> np.ndarray:
    try:
        numbers = np.array([int(i) for i in ids], dtype=np.int64)
        if len(np.unique(numbers)) == len(numbers):
            return numbers
    except (ValueError, OverflowError):
        pass
    message = "Image ids are no whole numbers; the images were numbered from 1 in the file's order."
    log.add("image-id-not-integer", "repaired", shown, message, count=len(ids))
    return np.arange(1, len(ids) + 1)


def _find_images(places: Sequence[Path], names: Sequence[str], log: FindingLog, shown: str) -> list[Path | None]:
    """The file of each image, None where there is none; also counts the images that the annotations don't list."""
    if not names:
        return []
    chosen = choose_image_dir(places, names)
    if chosen is None:
        looked = ", ".join(str(place) for place in places[:4]) or "no folder"
        message = (
            f"None of its {len(names)} images was found (the first is {names[0]}; looked in {looked}); give image_dir."
        )
        log.add("every-image-missing", "refused", shown, message, count=len(names))
        return [None] * len(names)
    folder, bare = chosen
    if bare:
        message = f"File names carry folders that are not here, such as {names[0]}; only their last part was used."
        log.add("file-name-path", "repaired", shown, message, count=len(names))
    folders = ImageFolders()
    paths: list[Path | None] = []
    for name in names:
        wanted = folder / (last_part(name) if bare else name)
        found = folders.find(wanted)
        if found is None:
            log.add("missing-image", "dropped", f"{shown}, {name}", f"There is no {wanted}; the image was left out.")
        elif found.name != wanted.name:
            log.add(
                "file-name-differs", "repaired", f"{shown}, {name}", f"The file is called {found.name}; it was used."
            )
        paths.append(found)
    listed = {path for path in paths if path is not None}
    repeated = sum(path is not None for path in paths) - len(listed)
    if repeated:
        message = f"{repeated} files are listed again under another id; each entry has only its own boxes."
        log.add("duplicate-file", "note", shown, message, count=repeated)
    for parent in sorted({path.parent for path in listed}):
        unlisted = [name for name in folders.images(parent) if parent / name not in listed]
        if unlisted:
            message = (
                f"{len(unlisted)} images in {parent} are not listed in {shown} and not used, such as {unlisted[0]}."
            )
            log.add("unlisted-images", "note", str(parent), message, count=len(unlisted))
        others = filter(is_unread_name, folders.names(parent))  # first: it is quick
        report_unread((name for name in others if parent / name not in listed), str(parent), log)
    return paths


def _objects(
    objects: Sequence[dict[str, Any]],
    index_of_id: dict[Any, int],
    label_of_id: dict[int, int],
    names: Sequence[str],
    log: FindingLog,
    shown: str,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """For n objects: image index (n,), label (n,), usable (n,) bool, corners as written (n, 4)."""
    image_index = _look_up([obj.get("image_id") for obj in objects], index_of_id)
    labels = _look_up([obj.get("category_id") for obj in objects], label_of_id)
    boxes_xywh = _numbers([obj.get("bbox") for obj in objects], 4)
    no_box = np.zeros(len(objects), dtype=bool)
    for i in np.flatnonzero(np.isnan(boxes_xywh).all(axis=1)):
        if isinstance(objects[i].get("bbox"), list) and len(objects[i]["bbox"]) == 4:
            continue  # four numbers that are none: refused with the other boxes
        from_mask = _box_of_polygons(objects[i].get("segmentation"))
        where = _where(objects[i], shown, names, image_index[i])
        if from_mask is None:
            no_box[i] = True
            log.add("missing-box", "dropped", where, 'There is no "bbox" of four numbers; the object was left out.')
        else:
            boxes_xywh[i] = from_mask
            log.add("missing-box", "repaired", where, 'There is no "bbox"; it was taken from the polygons.')
    for i in np.flatnonzero(image_index < 0):
        message = f"It belongs to image id {objects[i].get('image_id')!r}, which is not listed; left out."
        log.add("image-unknown", "dropped", _where(objects[i], shown, names, -1), message)
    for i in np.flatnonzero(labels < 0):
        message = f"Its category id {objects[i].get('category_id')!r} is not among the categories; left out."
        log.add("category-unknown", "dropped", _where(objects[i], shown, names, image_index[i]), message)
    annotation_ids = {obj["id"] for obj in objects if isinstance(obj.get("id"), (int, str))}
    num_without_id = sum(not isinstance(obj.get("id"), (int, str)) for obj in objects)
    if len(annotation_ids) + num_without_id < len(objects):
        repeated = len(objects) - len(annotation_ids) - num_without_id
        message = f"{repeated} annotation ids occur more than once; all objects were kept, ids are not used."
        log.add("duplicate-annotation-id", "note", shown, message, count=repeated)
    with np.errstate(over="ignore", invalid="ignore"):  # not finite then, which is reported
        boxes_xyxy = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
    return image_index, labels, (image_index >= 0) & (labels >= 0) & ~no_box, boxes_xyxy


def _sizes(
    paths: Sequence[Path | None],
    declared: np.ndarray,
    image_index: np.ndarray,
    boxes_xyxy: np.ndarray,
    usable: np.ndarray,
    check_images: bool,
    log: FindingLog,
    shown: str,
    names: Sequence[str],
) -> tuple[np.ndarray, np.ndarray]:
    """Sizes (I, 2) as (h, w), and which images are kept (I,) bool."""
    sizes_hw = declared.copy()
    kept = np.array([path is not None for path in paths], dtype=bool)
    unknown = (declared <= 0).any(axis=1)
    to_read = np.flatnonzero(kept if check_images else kept & unknown)
    num_unknown = int((unknown & kept).sum())
    if num_unknown:
        first = names[np.flatnonzero(unknown & kept)[0]]
        message = f"{num_unknown} images have no width and height, such as {first}; they were read from the files."
        log.add("missing-size", "repaired", shown, message, count=num_unknown)
    headers = read_headers([paths[i] for i in to_read])
    boxes_in_order = np.flatnonzero(usable)[np.argsort(image_index[usable], kind="stable")]
    ends = np.searchsorted(image_index[boxes_in_order], np.arange(len(paths)), side="right")
    for i, header in zip(to_read.tolist(), headers, strict=True):
        if isinstance(header, InputError):
            kept[i] = False
            log.add("unreadable-image", "dropped", f"{shown}, {names[i]}", f"{header} It was left out.")
        else:
            boxes = boxes_xyxy[boxes_in_order[ends[i - 1] if i else 0 : ends[i]]]
            declared_hw = None if unknown[i] else (int(declared[i, 0]), int(declared[i, 1]))
            size_hw = settle_size(paths[i], header, declared_hw, boxes, log, f"{shown}, {names[i]}")
            kept[i] = size_hw is not None
            sizes_hw[i] = size_hw or (0, 0)
    return sizes_hw, kept


def _areas(
    objects: Sequence[dict[str, Any]],
    selected: np.ndarray,
    boxes_xyxy: np.ndarray,
    log: FindingLog,
    shown: str,
    where: Callable[[int], str],
) -> np.ndarray:
    """(m,) areas of the selected objects: the mask's where the file gives it, else the box's."""
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
    return np.array([bool(objects[i].get("iscrowd")) for i in selected.tolist()], dtype=bool)


def _look_up(keys: Sequence[Any], index: Mapping[Any, int]) -> np.ndarray:
    """(n,) index of each key, -1 where there is none; "7" finds 7 and the other way round."""
    try:
        found = np.array([index.get(key, -1) for key in keys], dtype=np.int64)
    except TypeError:  # a list or an object stands where an id should
        found = np.array([index.get(key, -1) if isinstance(key, (int, str)) else -1 for key in keys], dtype=np.int64)
    if (found < 0).any():
        by_text = {str(key): position for key, position in index.items()}
        for i in np.flatnonzero(found < 0):
            found[i] = by_text.get(str(keys[i]), -1)
    return found


def _numbers(rows: Sequence[Any], width: int) -> np.ndarray:
    """(n, width) float64 of what should be rows of numbers; NaN where it is not."""
    try:
        array = np.array(rows, dtype=np.float64)
        if array.shape == (len(rows), width):
            return array
    except (TypeError, ValueError, OverflowError):
        pass
    array = np.full((len(rows), width), np.nan)
    for i, row in enumerate(rows):
        if isinstance(row, (list, tuple)) and len(row) == width:
            for j, value in enumerate(row):
                with suppress(TypeError, ValueError, OverflowError):
                    array[i, j] = float(value)
    return array


def _box_of_polygons(segmentation: Any) -> np.ndarray | None:
    """(4,) xywh around COCO polygons [[x, y, x, y, ...], ...]; None for anything else."""
    try:
        points = np.concatenate([np.array(polygon, dtype=np.float64).reshape(-1, 2) for polygon in segmentation])
        with np.errstate(over="ignore", invalid="ignore"):
            return np.concatenate([points.min(axis=0), np.ptp(points, axis=0)])
    except (TypeError, ValueError, OverflowError):
        return None


def _where(obj: dict[str, Any], shown: str, names: Sequence[str], image: int) -> str:
    of_image = f" ({names[image]})" if image >= 0 else ""
    return f"{shown}, annotation id {obj.get('id', 'missing')}{of_image}"


def _shown(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) and file != root else file.name

"""Label Studio's exports JSON and JSON-MIN: a list of tasks, boxes in percent of the image as the browser shows it.

Classes are the names in the training split, sorted. A turned rectangle or a polygon becomes the box around it. The
image is known by the last part of its address, with or without the eight digits that an upload gets before its name.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.file_names import last_parts, spellings
from ddetr.datasets.readers.json_files import list_splits, load_list
from ddetr.datasets.readers.label_folders import box_around_ellipse
from ddetr.datasets.readers.named_images import ImageCollector, Objects, Place, read_files
from ddetr.datasets.readers.reader import LabelledImage, Wanted, number, size_hw
from ddetr.printable import one_line
from ddetr.untrusted import MAX_PATH

_LABELS = ("rectanglelabels", "polygonlabels", "ellipselabels", "labels")
_UPLOAD = re.compile(r"(^|/)[0-9a-f]{8}-(?=[^/]+$)")


def label_studio_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its files; {} where there is none. Label Studio knows no splits: files called train and val do."""

    def is_ours(start: bytes) -> bool:
        return b"labels" in start and any(word in start for word in (b'"result"', b'"rectanglelabels"', b'"annotator"'))

    return list_splits(path, ("*.json", "annotations/*.json", "*/*.json"), is_ours)


def read_label_studio(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""

    def read(place: Place, log: FindingLog) -> list[LabelledImage]:
        images = ImageCollector(place, wanted, log, in_fractions=True, spell=_spellings, are_addresses=True)
        for position, task in enumerate(load_list(place.file, log, place.shown)):
            where = f"{place.shown}, task {one_line(task.get('id', position))}"
            name, regions = _image_name(task), _regions(task, where, log)
            if name is None:
                log.add("image-entry", "dropped", where, "The task names no image; it was left out.")
            elif regions is None:
                images.leave_out(name)
            else:
                image = images.of(name)
                for region in regions:
                    _add(image, region, where, log)
        return images.images()

    return read_files(wanted, "label_studio", label_studio_splits(wanted.path), read)


def _image_name(task: dict[str, Any]) -> str | None:
    """The address of an image, or its path."""
    data = task["data"] if isinstance(task.get("data"), dict) else task
    values = [data.get("image"), data.get("img"), *data.values()]
    names = (value for value in values if isinstance(value, str) and len(value) <= MAX_PATH)
    return next((name for name in names if any(map(is_image_name, last_parts(name)))), None)


def _spellings(name: str) -> list[str]:
    """With and without what an upload gets before its name."""
    found = spellings(name)
    return list(dict.fromkeys([*found, *(_UPLOAD.sub(r"\1", one) for one in found)]))


def _regions(task: dict[str, Any], where: str, log: FindingLog) -> list[dict[str, Any]] | None:
    """What was drawn on an image, sizes and labels with it; None where it can't be known whose drawing counts."""
    if not isinstance(task.get("annotations", task.get("completions")), list):  # JSON-MIN
        lists = [value for value in task.values() if isinstance(value, list)]
        return [region for values in lists for region in values if isinstance(region, dict) and "x" in region] or [
            region for values in lists for region in values if isinstance(region, dict) and "points" in region
        ]
    given = [entry for entry in task.get("annotations", task.get("completions")) if isinstance(entry, dict)]
    done = [entry for entry in given if not entry.get("was_cancelled") and isinstance(entry.get("result"), list)]
    done = [entry for entry in done if entry.get("ground_truth") is True] or done
    if not done:
        message = "Its labelling was skipped" if given else "Nobody has labelled it"
        if task.get("predictions"):
            message += ", it has a model's predictions alone; accept them in Label Studio to use them"
        message += ": whether it is background can't be known, and it was left out."
        log.add("not-annotated", "dropped", where, message)
        return None
    if len(done) > 1:
        message = (
            f"{len(done)} people have drawn its boxes; which of them count can't be known. Mark one as ground truth in "
            "Label Studio, or delete the others, and export again."
        )
        log.add("several-annotations", "refused", where, message)
        return None
    by_id: dict[Any, dict[str, Any]] = {}
    for number_, entry in enumerate(done[0]["result"]):
        if isinstance(entry, dict) and isinstance(entry.get("value"), dict):
            key = str(entry.get("id", number_))  # a rectangle and its label may be two entries of one id
            sizes = {k: entry[k] for k in ("original_width", "original_height", "image_rotation") if k in entry}
            by_id[key] = by_id.get(key, {}) | sizes | entry["value"]
    return list(by_id.values())


def _add(image: Objects, region: dict[str, Any], where: str, log: FindingLog) -> None:
    labels = next((region[key] for key in _LABELS if isinstance(region.get(key), list) and region[key]), None)
    is_drawn = "x" in region or "points" in region
    if labels is None or not is_drawn:
        kinds = ", ".join(key for key in region if key.endswith("labels"))
        if is_drawn or kinds:
            message = f"A region {f'of {one_line(kinds)} ' if kinds else 'without a label '}is no box; it was left out."
            log.add("missing-box", "dropped", where, message)
        return
    size = size_hw(region.get("original_height"), region.get("original_width"))
    if number(region.get("image_rotation", 0)) % 360 != 0:
        message = "The image was turned in Label Studio, and its boxes with it: turn the file, and label it as it lies."
        log.add("image-turned", "refused", where, message)
        return
    if len(labels) > 1:
        message = f"A box has {len(labels)} labels; the first, {one_line(labels[0])!r}, was used."
        log.add("several-labels", "repaired", where, message)
    image.declared_hw = image.declared_hw or size
    image.add(str(labels[0] or "").strip(), _box(region, size or (1, 1)))


def _box(region: dict[str, Any], size: tuple[int, int]) -> list[float]:
    """Corners in fractions of the image around a rectangle, which turns clockwise around its first corner, around an
    ellipse or a polygon."""
    scale = np.array([size[1], size[0]], dtype=np.float64) / 100
    if isinstance(region.get("points"), list):
        pairs = [p if isinstance(p, list) and len(p) == 2 else (None, None) for p in region["points"]]
        points = np.array([[number(x), number(y)] for x, y in pairs]).reshape(-1, 2) * scale
        points = points if len(points) else np.full((1, 2), np.nan)
    else:
        x, y, w, h = (number(region.get(key)) for key in ("x", "y", "width", "height"))
        degrees = number(region.get("rotation") or 0)
        angle = math.radians(degrees) if math.isfinite(degrees) else math.nan
        if "radiusX" in region:
            (across, down), radii = scale, (number(region["radiusX"]), number(region.get("radiusY")))
            box = box_around_ellipse(x * across, y * down, radii[0] * across, radii[1] * down, angle)
            return (np.array(box) / np.tile(scale * 100, 2)).tolist()
        cos, sin = (1.0, 0.0) if angle == 0 else (math.cos(angle), math.sin(angle))
        sides = np.array([[0, 0], [w, 0], [w, h], [0, h]]) * scale
        points = np.array([x, y]) * scale + sides @ np.array([[cos, sin], [-sin, cos]])
    points = points / (scale * 100)
    return [*points.min(axis=0).tolist(), *points.max(axis=0).tolist()]

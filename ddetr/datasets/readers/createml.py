"""Create ML's JSON, as Apple documents it and Roboflow exports it: a list of images, boxes by their centre in pixels.

Classes are the names in the training split, sorted.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Annotations, FindingLog
from ddetr.datasets.readers.json_files import list_splits, load_list
from ddetr.datasets.readers.named_images import ImageCollector, Place, read_files
from ddetr.datasets.readers.reader import LabelledImage, Wanted, number
from ddetr.printable import one_line

_PLACES = ("*/_annotations.createml.json", "*.json", "annotations/*.json", "*/*.json")


def createml_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its files; {} where there is none."""
    return list_splits(path, _PLACES, lambda start: b'"coordinates"' in start and b'"label"' in start)


def read_createml(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""

    def read(place: Place, log: FindingLog) -> list[LabelledImage]:
        images = ImageCollector(place, wanted, log, form="cxcywh")
        for position, entry in enumerate(load_list(place.file, log, place.shown)):
            name, objects = _first(entry, *_IMAGE), _first(entry, "annotations", "annotation")
            if isinstance(objects, dict):  # an image's only one, as Turi Create takes it too
                objects = [objects]
            if not isinstance(name, str) or not isinstance(objects, list):
                message = (
                    f'An entry needs a text "image" and a list "annotations", not {type(name).__name__} and '
                    f"{type(objects).__name__}; this one has {one_line(list(entry))}."
                )
                log.add("image-entry", "dropped", f"{place.shown}, image {position}", message)
                continue
            image = images.of(name)
            for obj in objects:
                box, label = (obj.get("coordinates"), obj.get("label")) if isinstance(obj, dict) else (None, None)
                numbers = [number(box.get(key) if isinstance(box, dict) else None) for key in _KEYS]
                image.add(str(label or "").strip(), numbers)
        return images.images()

    return read_files(wanted, "createml", createml_splits(wanted.path), read)


_KEYS = ("x", "y", "width", "height")
_IMAGE = ("image", "imagefilename", "imageURL", "filename", "path")  # Apple's two, and what Turi Create's users have


def _first(entry: dict[str, Any], *keys: str) -> Any:
    return next((entry[key] for key in keys if key in entry), None)

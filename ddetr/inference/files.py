"""Predictions for files and folders: annotated pictures and two JSON files in an output folder."""

from __future__ import annotations

import glob
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.datasets.image_formats import image_suffixes, is_image_name, unread_files
from ddetr.errors import InputError
from ddetr.files import remove_leftovers, write_atomically, write_text
from ddetr.inference.detections import Detections
from ddetr.inference.drawing import draw_boxes
from ddetr.inference.predictor import BadImage, Predictor, check_batch_size

__all__ = ["FileSummary", "find_images", "predict_files"]

log = logging.getLogger(__name__)

ANNOTATED = "annotated"  # the folder of pictures in the output folder


@dataclass(frozen=True)
class FileSummary:
    """What `predict_files` did."""

    num_images: int  # predicted
    num_detections: int
    failures: tuple[tuple[Path, str], ...]  # files that could not be read, with the reason
    annotated: tuple[Path, ...]  # the pictures, in the order of the images
    predictions: Path  # COCO's results format
    predictions_named: Path  # for people


def predict_files(
    predictor: Predictor,
    inputs: Iterable[str | os.PathLike],
    output: str | os.PathLike,
    threshold: float | None = None,
    *,
    batch_size: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> FileSummary:
    """Predicts all images and writes, into `output`, annotated/NAME.jpg, predictions.json and predictions_named.json.

    A file that can not be read is reported and skipped. Image ids are the numbers that the files are named by, as
    COCO's are (000000000139.jpg is 139), or 1, 2, 3... where not every file has a number of its own.

    Args:
        inputs: files, folders (with all folders in them) and glob patterns.
        output: the folder to write to; made if it is not there. Earlier results in it are replaced.
        threshold: least score; by default the predictor's own.
        batch_size: images that run through the model together.
        progress: called with the number of files done and of all files, after each batch.
    """
    check_batch_size(batch_size)
    output = Path(output).expanduser()
    paths = find_images(inputs, skip=output / ANNOTATED)
    image_ids = _image_ids(paths)
    targets = _picture_paths(paths, output / ANNOTATED)
    try:
        (output / ANNOTATED).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Cannot make the output folder {output}: {error.strerror or error}.") from error
    remove_leftovers(output)
    done: list[tuple[Detections, Path]] = []
    failures: list[tuple[Path, str]] = []
    due = zip(paths, image_ids, targets)  # an iterator: each batch goes on where the last one ended
    num_seen = 0
    for batch in predictor.prepare_batches(paths, batch_size):
        for prepared, found, (path, image_id, target) in zip(batch, predictor.predict_prepared(batch, threshold), due):
            if isinstance(found, BadImage):
                log.warning("Skipped: %s", found.reason)
                failures.append((path, found.reason))
                continue
            detections = replace(found, image_id=image_id)
            _write_picture(prepared.image, detections, target)
            done.append((detections, target))
        num_seen += len(batch)
        if progress is not None:
            progress(num_seen, len(paths))
    results = [result for detections, _ in done for result in detections.to_coco()]
    named = {
        "threshold": predictor.threshold if threshold is None else threshold,
        "categories": [
            {"label": label, "category_id": category.category_id, "name": category.name}
            for label, category in enumerate(predictor.categories)
        ],
        "images": [
            {**detections.to_dict(), "annotated": target.relative_to(output).as_posix()} for detections, target in done
        ],
        "failures": [{"path": str(path), "reason": reason} for path, reason in failures],
    }
    _write_json(output / "predictions.json", results, indent=None)
    _write_json(output / "predictions_named.json", named, indent=1)
    return FileSummary(
        num_images=len(done),
        num_detections=len(results),
        failures=tuple(failures),
        annotated=tuple(target for _, target in done),
        predictions=output / "predictions.json",
        predictions_named=output / "predictions_named.json",
    )


def find_images(inputs: Iterable[str | os.PathLike], skip: Path | None = None) -> list[Path]:
    """The image files that files, folders and glob patterns stand for, each once, in the order given.

    Args:
        skip: a folder that is left out of what folders and patterns hold: one's own output.
    """
    skipped = None if skip is None else skip.resolve()
    found: dict[Path, Path] = {}
    for given in [inputs] if isinstance(inputs, (str, os.PathLike)) else inputs:
        path = Path(given).expanduser()
        if path.is_file():
            matches = [path]
        else:
            files = [match for match in _expand(path) if skipped not in match.resolve().parents]
            matches = [match for match in files if is_image_name(match.name)]
            unread = [kind.said for kind in unread_files(map(str, files))]
            if not matches:
                kinds = ", ".join(sorted(image_suffixes()))
                said = "".join(f" {one}." for one in unread)
                raise InputError(f"There are no images in {path}: expected files that end in {kinds}.{said}")
            for one in unread:
                log.warning("%s", one)
        for match in matches:
            found.setdefault(match.resolve(), match)
    if not found:
        raise InputError("Expected files, folders or patterns of images, got none.")
    return list(found.values())


def _expand(path: Path) -> list[Path]:
    if path.is_dir():
        return sorted(match for match in path.rglob("*") if match.is_file())
    if not glob.has_magic(str(path)):
        if path.exists():
            raise InputError(f"{path} is neither a file nor a folder: expected images.")
        raise InputError(f"There is no file or folder {path}.")
    matches = sorted(Path(match) for match in glob.glob(str(path), recursive=True))
    if not matches:
        raise InputError(f"Nothing matches {path}.")
    return [match for match in matches if match.is_file()]


def _image_ids(paths: Sequence[Path]) -> list[int]:
    numbers = [int(path.stem) if path.stem.isascii() and path.stem.isdigit() else None for path in paths]
    if None in numbers or len(set(numbers)) < len(numbers):
        return list(range(1, len(paths) + 1))
    return numbers


def _picture_paths(paths: Sequence[Path], folder: Path) -> list[Path]:
    """A file name for the picture of each image; where names meet, or would meet an input, a number is added."""
    inputs = {path.resolve() for path in paths}
    taken: set[str] = set()
    targets = []
    for path in paths:
        suffix = ".png" if path.suffix.lower() == ".png" else ".jpg"
        target, number = folder / f"{path.stem}{suffix}", 1
        # in lower case, because many file systems take a.jpg and A.jpg for the same file
        while target.name.lower() in taken or target.resolve() in inputs:
            number += 1
            target = folder / f"{path.stem}_{number}{suffix}"
        taken.add(target.name.lower())
        targets.append(target)
    return targets


def _write_picture(image: Tensor, detections: Detections, target: Path) -> None:
    drawn = draw_boxes(image, detections.boxes_xyxy, detections.labels, detections.names, detections.scores)
    picture = to_pil_image(drawn)
    options = {"format": "PNG"} if target.suffix == ".png" else {"format": "JPEG", "quality": 92}
    write_atomically(target, lambda path: picture.save(path, **options))


def _write_json(target: Path, content: Any, indent: int | None) -> None:
    # a file name that is no valid text becomes \udc.. in the file, which is JSON's own way to write it
    write_text(target, json.dumps(content, indent=indent, ensure_ascii=False, allow_nan=False) + "\n")

"""Images of training that are in validation too, or are nearly its images: they make a model look better than it is.

Found by content, by names (`related.py`) and by boxes; the first way that finds them tells."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ddetr.datasets.annotations import Annotations, Category, FindingLog, ImageTable
from ddetr.datasets.related import copied_from, families, looks_numbered
from ddetr.printable import one_line
from ddetr.untrusted import open_file
from ddetr.wording import first_few

_ENDS_BYTES = 8192  # read of each end of a file before whole files are compared
_FEWEST_COPIES = 0.05  # of the validation images: fewer have common names (`images_jpg.rf...`) by chance
_FEWEST_ALIKE = 4  # different validation images that have the boxes of training images by no chance


class ImageFiles(NamedTuple):
    """Of a split."""

    paths: list[Path]
    sizes: list[int]  # bytes, -1 where there is no file


def report_leaks(
    train: Annotations, val: Annotations, train_files: ImageFiles, val_files: ImageFiles, log: FindingLog
) -> None:
    """Adds what training and validation share."""
    files = train_files, val_files
    was_said = _report_duplicates(*files, log) or _report_copies(*files, log) or _report_same_boxes(train, val, log)
    if not was_said and not val.is_held_back:  # what `hold_back` parts it has told of already
        _report_related(*files, train.categories, log)


def _report_duplicates(train: ImageFiles, val: ImageFiles, log: FindingLog) -> bool:
    """The same content in training and validation; True where that is most of validation. Files of one size are
    candidates, of those the ends are compared, and of those the whole: on COCO a few hundred megabytes are read instead
    of 20 GB."""
    shared = set(train.sizes) & set(val.sizes) - {-1, 0}
    of_training: dict[tuple[int, bytes], list[Path]] = defaultdict(list)
    for path, size in zip(train.paths, train.sizes, strict=True):
        if size in shared:
            of_training[size, _hash(path, whole=False)].append(path)
    same_images = 0
    for path, size in zip(val.paths, val.sizes, strict=True):
        alike = of_training.get((size, _hash(path, whole=False)), []) if size in shared else []
        content = _hash(path, whole=True) if alike else b""
        same = next((other for other in alike if other == path or _hash(other, whole=True) == content), None)
        if same is not None:
            same_images += 1
            message = f"It is the same image as {same} of training: validation would flatter the model."
            log.add("duplicate-across-splits", "note", str(path), message)
    if 2 * same_images > len(val.paths):
        message = (
            f"{same_images:,} of the {len(val.paths):,} validation images are training images: the AP will say nothing "
            "about new images. Validate on others, or hold some back with --data.val_fraction 0.1."
        )
        log.add("validation-is-training", "note", str(val.paths[0].parent), message, count=same_images)
        return True
    return False


def _report_copies(train: ImageFiles, val: ImageFiles, log: FindingLog) -> bool:
    """Whether copies of one image, augmented before the splits were made, are in training and validation: by their
    names."""
    copies = [(path, source) for path in val.paths if (source := copied_from(path.name)) is not None]
    if not copies:
        return False
    of_training = {copied_from(path.name): path for path in train.paths}
    pairs = [(path, of_training[source]) for path, source in copies if source in of_training]
    are_some = len(pairs) >= _FEWEST_COPIES * len(val.paths)
    if are_some:
        message = (
            f"{len(pairs):,} validation images look like copies of training images, such as "
            f"{one_line(pairs[0][0].name)} of {one_line(pairs[0][1].name)}: augmented before they were parted, they "
            "flatter the model. Part them anew (--data.val_fraction keeps copies together)."
        )
        log.add("copies-across-splits", "note", str(pairs[0][0].parent), message, count=len(pairs))
    return are_some


def _report_same_boxes(train: Annotations, val: Annotations, log: FindingLog) -> bool:
    """Whether most validation images have the very objects of a training image: copies of it in other files, or its
    labels beside other images."""

    def keys(split: Annotations) -> np.ndarray:
        """Of the images with objects: equal for equal objects, in whatever order."""
        table = ImageTable.from_records(split.images)
        return np.add.reduceat(table.object_keys(), table.offsets[:-1][np.diff(table.offsets) > 0])

    of_val = keys(val)
    same = of_val[np.isin(of_val, keys(train))]
    if 2 * len(same) <= len(of_val) or len(np.unique(same)) < _FEWEST_ALIKE:
        return False
    message = (
        f"{len(same):,} of the {len(of_val):,} validation images with objects have the very classes and boxes of a "
        "training image: are they copies of training images, or are these the labels of others?"
    )
    log.add("same-boxes-across-splits", "note", val.name, message, count=len(same))
    return True


def _report_related(train: ImageFiles, val: ImageFiles, categories: Sequence[Category], log: FindingLog) -> None:
    """Frames of the same videos, or tiles of the same images, in training and validation: by their names. Those of
    numbers alone say nothing."""
    val_names = [path.name for path in val.paths]
    if 2 * sum(map(looks_numbered, val_names)) < max(1, len(val_names)):
        return
    num_train = len(train.paths)
    for found in families([*(path.name for path in train.paths), *val_names], categories):
        shared = {
            family: sum(place >= num_train for place in places)
            for family, places in found.members.items()
            if places[0] < num_train <= places[-1] and re.search(r"[^\W\d_]", family)
        }
        if len(shared) > 1 and 2 * sum(shared.values()) > len(val_names):
            message = (
                f"The image names look like {found.said}, and {sum(shared.values()):,} of the {len(val_names):,} "
                f"validation images are of such that training has too ({one_line(first_few(sorted(shared), 3))}): if "
                "so, validation flatters the model. Part them anew."
            )
            log.add("related-across-splits", "note", str(val.paths[0].parent), message, count=sum(shared.values()))
            return


def _hash(path: Path, whole: bool) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open_file(path) as file:
            if not whole:
                digest.update(file.read(_ENDS_BYTES))
                file.seek(max(0, file.seek(0, 2) - _ENDS_BYTES))
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError:
        return os.fsencode(path)  # like no other
    return digest.digest()

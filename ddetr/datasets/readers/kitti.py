"""KITTI: one text file per image, a line per object of 15 words: `type truncated occluded alpha left top right bottom`
and eight more about its place in space (the last, a score, only in results).

Found as KITTI has it (`training/image_2` and `training/label_2`, splits in `ImageSets/*.txt` where they are) and as its
users do (`images/` and `labels/`, in a folder for each split or with one in each of them). `DontCare` regions are left
out: they are of no class. Classes are the types in the training split, sorted.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import counted, folders_in, listed_lines
from ddetr.datasets.readers.label_folders import (
    ImagesBeside,
    Source,
    folder_named,
    folders_holding,
    label_files,
    named_splits,
    report_images,
    report_in_no_list,
    split_folders,
    without_shared,
)
from ddetr.datasets.readers.reader import (
    WHOLE,
    LabelledImage,
    Wanted,
    looked_at_once,
    number,
    read_labelled,
    split_kind,
)
from ddetr.printable import SHOWN_NAME, shortened
from ddetr.untrusted import MAX_LABEL_BYTES, MAX_OBJECTS, open_file, read_text

_LABELS = ("label_2", "labels", "label")
_NUMBERS = (7, 14, 15)  # after the type: without its place in space, with it, with a score
_FEW = 3  # boxes that lie at the left edge by chance
_SAMPLED = 8  # files of a folder whose first line says what it holds


@looked_at_once
def kitti_splits(path: Path) -> dict[str, list[Source]]:
    """Split name -> where its images come from; {} where there is no KITTI data set."""
    found = []
    for base in (path, *folders_in(path)):
        found += _label_folders(base, WHOLE if base == path else base.name)
    if len(found) != 1:
        return named_splits(found)
    (name, whole), known = found[0], {file.stem for file in label_files(found[0][1].folder, ".txt")}
    sets = folder_named(path, ("ImageSets",))
    sets = sets or [sub for sub in folders_in(path) if sub.name.startswith("ImageSets_")]  # ImageSets_3dop: train_3dop
    lists = [
        (f"{file.stem}{folder.name.removeprefix('ImageSets') if len(sets) > 1 else ''}", file)
        for folder in sets
        for file in label_files(folder, ".txt")
    ]
    listed = {split: [Source(whole.folder, file)] for split, file in lists if known & {*_names(file)}}
    return listed or {name if split_kind(name) else WHOLE: [whole]}


def _label_folders(base: Path, own: str) -> list[tuple[str, Source]]:
    """(name, folder of label files) of those in `base`, which is called `own`."""
    found = []
    for labels in folder_named(base, _LABELS):
        found += [(own, labels)] if _holds_kitti(labels) else []
        for name, folders in split_folders(folders_in(labels), _holds_kitti).items():
            found += [(own if split_kind(own) and not split_kind(name) else name, folder) for folder in folders]
    if not found and split_kind(own):  # train/0/label_2, train/1/label_2
        found = [(own, f) for f in folders_holding(base, lambda f: f.name.lower() in _LABELS and _holds_kitti(f))]
    return [(name, Source(folder)) for name, folder in found]


def _names(listing: Path) -> list[str]:
    return [line.strip() for line in listed_lines(listing) if line.strip()]


def _holds_kitti(folder: Path) -> bool:
    """By the first lines of label files: YOLO's begin with a number."""
    for file in label_files(folder, ".txt", _SAMPLED):
        try:
            with open_file(file) as stream:
                lines = stream.read(1 << 12).decode("utf-8-sig", "replace").split("\n")
        except OSError:
            continue
        if _row(next((line for line in lines if line.strip()), "")) is not None:
            return True
    return False


def _row(line: str) -> tuple[str, list[float]] | None:
    """The type and the numbers of a line; None for another one."""
    words = line.split()
    names = len(words)
    while names > 0 and _is_number(words[names - 1]):
        names -= 1
    numbers = [float(word) for word in words[names:]]
    return (" ".join(words[:names]), numbers) if names and len(numbers) in _NUMBERS else None


def _is_number(word: str) -> bool:
    return word.lower() == "nan" or number(word) == number(word)


def read_kitti(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    splits = kitti_splits(wanted.path)
    beside = ImagesBeside(wanted.path, wanted.image_dir)
    known = {f.stem for sources in splits.values() for s in sources for f in label_files(s.folder, ".txt")}

    def read(sources: Sequence[Source], log: FindingLog) -> list[LabelledImage]:
        files = [file for source in sources for file in _label_files(source, log)]
        images = without_shared(_images(wanted.path, files, beside, log), log)
        report_images(log, wanted, beside, files, images, known)
        lists = [source.listing for some in splits.values() for source in some if source.listing is not None]
        if lists and wanted.is_training:
            listed = {name for listing in lists for name in _names(listing)}
            others = [file for file in label_files(sources[0].folder, ".txt") if file.stem not in listed]
            names = [file.stem for file in others if beside.find_own(file) is not None]
            report_in_no_list(log, sources[0].folder, names, lists)
        return images

    return read_labelled(wanted, "kitti", splits, read)


def _label_files(source: Source, log: FindingLog) -> list[Path]:
    by_name = {file.stem: file for file in label_files(source.folder, ".txt")}
    if source.listing is None:
        return list(by_name.values())
    for name in (names := dict.fromkeys(_names(source.listing))):
        if name not in by_name:
            message = f"The image {shortened(name, SHOWN_NAME)!r} has no label file; it was left out."
            log.add("missing-annotation", "dropped", source.listing.name, message)
    return [by_name[name] for name in names if name in by_name]


def _images(root: Path, files: Sequence[Path], beside: ImagesBeside, log: FindingLog) -> Iterator[LabelledImage]:
    num_regions = 0
    with_score: list[list[float]] = []
    for file in counted(files):
        where = str(file.relative_to(root))
        path = beside.find_own(file)
        if path is None:
            message = "Its image was not found in image_2 or images; it was left out."
            log.add("missing-image", "dropped", where, message, image=file.name)
            continue
        try:
            lines = read_text(file, MAX_LABEL_BYTES).splitlines()
        except (OSError, UnicodeDecodeError) as error:
            log.add("malformed-labels", "dropped", where, f"It can't be read ({error}); the image was left out.")
            continue
        if len(lines) > MAX_OBJECTS:
            report_crowd(log, where, len(lines))
        classes, boxes, numbers = [], [], []
        for i, line in enumerate(lines[:MAX_OBJECTS], 1):
            row = _row(line)
            if row is None:
                if line.strip():
                    message = f"Expected a type and 14 numbers, found {line.strip()[:60]!r}; left out."
                    log.add("malformed-label", "dropped", f"{where}, line {i}", message)
            elif row[0].lower() == "dontcare":
                num_regions += 1
            else:
                classes.append(row[0])
                boxes.append(row[1][3:7])
                with_score += [row[1]] if len(row[1]) == _NUMBERS[-1] else []
                numbers.append(i)
        corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        yield LabelledImage(path, where, classes, corners, numbers, unit="line")
    shifted = [row for row in with_score if row[3] == 0 and row[4] < row[6] and row[5] < row[7]]
    if len(shifted) >= _FEW and len(shifted) == len(with_score):
        message = (
            f"All {len(shifted):,} rows of a type and 15 numbers have 0 for the left side of the box: it seems "
            "there is a number too many before it, as in `type truncated occluded alpha 0 left top right bottom`. Take "
            "it out; if the last number is a score, take that out instead."
        )
        log.add("columns-shifted", "refused", str(root), message, count=len(shifted))
    if num_regions:
        message = f"{num_regions} DontCare regions are of no class; they were left out, and count as background."
        log.add("dontcare-regions", "note", str(root), message, count=num_regions)

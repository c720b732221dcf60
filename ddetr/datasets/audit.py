"""The audit: everything that a person should know about a data set before training on it, in one table.

The readers find what is wrong with single objects and files; the audit adds what only the whole shows (counts, classes,
duplicates between training and validation, files that don't decode) and says whether training may start.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from ddetr.datasets.annotations import (
    Annotations,
    Finding,
    FindingLog,
    ImageTable,
)
from ddetr.datasets.audit_report import AuditReport, SplitSummary
from ddetr.datasets.decoding import DARKEST, Decoded, decode_all, most_unreadable, spread
from ddetr.datasets.image_files import ImageFolders
from ddetr.datasets.leaks import ImageFiles, report_leaks
from ddetr.datasets.readers.box_meaning import check_placement
from ddetr.printable import SHOWN_NAME, one_line, shortened
from ddetr.wording import plural

_DECODED = {"auto": (4_000, 60), "val": (10_000, 120)}  # images of a split and seconds, at most
_THINNEST = 40  # long side by short side: at the paper's size 33 pixels are left of the short one
_FEWEST_DARK = 0.05  # of the images: fewer are black frames of videos, or taken at night
_MOSTLY_EMPTY, _FEW_EMPTY = 0.9, 10  # of the images, and images that show what a data set is like
_SMALLEST = 10  # pixels of the short side

Decode = bool | Literal["auto", "val"]
Progress = Callable[[int, int], None]  # (done, total)


def audit(
    train: Annotations,
    val: Annotations | None = None,
    *,
    num_queries: int = 300,
    max_detections: int = 100,
    decode: Decode = False,
    on_bad_image: Literal["skip", "raise"] = "skip",
    strict: bool = False,
    progress: Progress | None = None,
) -> AuditReport:
    """Looks at the training and the validation split together.

    Args:
        train, val: what `load_annotations` returned, `val` read with `categories=train.categories`.
        num_queries, max_detections: the model's; images with more objects are reported.
        decode: True decodes every image, on all cores, and refuses what can't be. "auto" decodes up to 4,000 of each
            split, for at most a minute, "val" up to 10,000 of the validation split, for at most two; both say what
            they left, and judge a damaged image by what training would do about it. False only looks files up.
        on_bad_image: training's option; with "raise" a damaged image is always refused.
        strict: repairs and drops refuse training too.
        progress: called with (done, total) images while decoding.
    """
    log = FindingLog()
    splits = [split for split in (train, val) if split is not None]
    if val is not None and val.categories != train.categories:
        message = "Validation has other classes than training; read it with categories=train.categories."
        log.add("categories-differ", "refused", val.name, message)
    scans = [_scan(split, log) for split in splits]
    summaries = [_summarise(split, scan) for split, scan in zip(splits, scans, strict=True)]
    for split, scan, summary in zip(splits, scans, summaries, strict=True):
        _report_emptiness(split, summary, split is train, log)
        _report_crowded(scan, num_queries, max_detections, log)
        _report_thin(split, log)
        check_placement(ImageTable.from_records(split.images), split.name, log)
        _report_repeated(split, log)
    _report_classes(train, summaries, log)
    if val is not None:
        report_leaks(train, val, *(scan.files for scan in scans), log)
    if decode:
        _report_decoded(splits, decode, on_bad_image, log, progress)
    of_train = set(train.findings)
    own = [*train.findings, *(found for split in splits[1:] for found in split.findings if found not in of_train)]
    if len(splits) > 1:
        own = list(_used_by_neither(own, [scan.files for scan in scans]))
    return AuditReport(
        train=summaries[0],
        val=summaries[1] if val is not None else None,
        categories=tuple(train.categories),
        findings=(*own, *log.freeze()),
        num_queries=num_queries,
        max_detections=max_detections,
        strict=strict,
    )


@dataclass(frozen=True)
class _Scan:
    """One pass over a split's images."""

    counts: np.ndarray  # (K,) objects of each label
    per_image: np.ndarray  # (I,) objects of each image
    num_ignored: int
    files: ImageFiles


def _scan(split: Annotations, log: FindingLog) -> _Scan:
    labels, per_image, paths, sizes = [], [], [], []
    num_ignored = 0
    for record in split.images:
        counted = record.labels[~record.ignore]
        labels.append(counted)
        per_image.append(len(counted))
        num_ignored += len(record.labels) - len(counted)
        paths.append(record.path)
        try:
            sizes.append(os.stat(record.path).st_size)
        except OSError:
            sizes.append(-1)
            log.add("missing-image", "refused", str(record.path), "The file is gone; restore it or remove its entry.")
    everything = np.concatenate([np.empty(0, np.int64), *labels])
    counts = np.bincount(everything, minlength=len(split.categories))
    assert len(counts) == len(split.categories), f"{split.name}: a label is out of range"
    return _Scan(counts, np.array(per_image, dtype=np.int64), num_ignored, ImageFiles(paths, sizes))


def _used_by_neither(findings: Iterable[Finding], splits: Sequence[ImageFiles]) -> Iterator[Finding]:
    """The findings, of which those on unlisted images leave out what another split uses."""
    used: set[str] = set()
    told: set[str] = set()
    for finding in findings:
        if finding.kind == "unlisted-images" and os.path.isdir(folder := finding.where):
            used = used or {str(path) for split in splits for path in split.paths}
            left = [name for name in ImageFolders().images(Path(folder)) if f"{folder}{os.sep}{name}" not in used]
            if len(left) < finding.count:
                if left and folder not in told:
                    message = f"{len(left):,} images in {folder} are not used, such as {one_line(left[0])}."
                    yield replace(finding, message=message, count=len(left))
                told.add(folder)
                continue
        yield finding


def _summarise(split: Annotations, scan: _Scan) -> SplitSummary:
    per_image = scan.per_image
    p50, p99 = np.percentile(per_image, [50, 99]).tolist() if len(per_image) else (0.0, 0.0)
    return SplitSummary(
        name=split.name,
        format=split.format,
        num_images=len(per_image),
        num_objects=int(per_image.sum()),
        num_ignored=scan.num_ignored,
        num_without_objects=int((per_image == 0).sum()),
        objects_p50=p50,
        objects_p99=p99,
        objects_max=int(per_image.max(initial=0)),
        class_counts=tuple(scan.counts.tolist()),
    )


def _report_emptiness(split: Annotations, summary: SplitSummary, is_train: bool, log: FindingLog) -> None:
    if not split.categories and is_train:
        log.add("no-classes", "refused", split.name, "There is no class: nothing could be learned.")
    if not summary.num_images:
        message = "There is no usable image; correct the path, or what the other rows name."
        log.add("no-images", "refused", split.name, message)
    elif not summary.num_objects and is_train:
        message = f"No image has an object to train on{_ignored(summary)}: nothing could be learned."
        log.add("no-objects", "refused", split.name, message)
    elif not summary.num_objects and (unknown := _num_unknown(split)):
        message = (
            f"None of the classes of its {unknown:,} objects is a class of training: correct the names or the ids of "
            "one of both, or the path. --data.val_split names another split."
        )
        log.add("no-class-of-training", "refused", split.name, message, count=unknown)
    elif not summary.num_objects:
        message = f"No validation image has an object{_ignored(summary)}: there is no AP to measure."
        log.add("no-objects", "note", split.name, message)
    elif summary.num_ignored > summary.num_objects:
        message = (
            f"{summary.num_ignored:,} of {summary.num_ignored + summary.num_objects:,} objects are marked as crowds or "
            "difficult: they are neither trained on nor counted. If they are ordinary objects, take the marks out."
        )
        log.add("mostly-ignored", "note", split.name, message, count=summary.num_ignored)
    elif _are_mostly_empty(split, summary):
        message = (
            f"{summary.num_without_objects:,} of {summary.num_images:,} images have no object and count as background. "
            "If nobody has labelled them, a model learns that nothing is there: take them out "
            "(--data.keep_empty false, in training)."
        )
        log.add("mostly-empty", "note", split.name, message, count=summary.num_without_objects)


def _are_mostly_empty(split: Annotations, summary: SplitSummary) -> bool:
    """Whether nearly all images have no object, and no other finding says why."""
    reasons = ("image-without-labels", "category-unknown", "missing-annotations")
    explained = sum(finding.count for finding in split.findings if finding.kind in reasons)
    is_most = summary.num_without_objects >= _MOSTLY_EMPTY * max(_FEW_EMPTY, summary.num_images)
    return is_most and 2 * explained < summary.num_without_objects


def _ignored(summary: SplitSummary) -> str:
    count = summary.num_ignored
    return f" (all {count:,} are marked as crowds or difficult, which are ignored: take the marks out)" if count else ""


def _report_crowded(scan: _Scan, num_queries: int, max_detections: int, log: FindingLog) -> None:
    for i in np.flatnonzero(scan.per_image > min(num_queries, max_detections)):
        num_objects, where = scan.per_image[i], str(scan.files.paths[i])
        if num_objects > num_queries:
            message = f"{num_objects} objects, {num_queries} queries: some can't be found. Raise --model.num_queries."
            log.add("more-objects-than-queries", "note", where, message)
        else:
            message = (
                f"{num_objects} objects, {max_detections} detections kept: some count as missed. Raise "
                "--max_detections."
            )
            log.add("more-objects-than-detections", "note", where, message)


def _report_thin(split: Annotations, log: FindingLog) -> None:
    images = split.images
    sizes = ImageTable.from_records(images).sizes_hw.reshape(-1, 2)
    short, long = sizes.min(axis=1, initial=2**31 - 1), sizes.max(axis=1, initial=0)
    for i in np.flatnonzero((short < _SMALLEST) | (long > _THINNEST * short)).tolist():
        height, width = sizes[i].tolist()
        size = f"It is {width} x {height} pixels"
        if long[i] > _THINNEST * short[i]:
            message = f"{size}, a strip: resized little or nothing is left of its short side. Cut it into parts."
            log.add("thin-image", "note", str(images[i].path), message)
        else:
            log.add("tiny-image", "note", str(images[i].path), f"{size}: there is little to be seen on it.")


def _report_repeated(split: Annotations, log: FindingLog) -> None:
    """Objects that repeat another one of their image: class and box are the same."""
    table = ImageTable.from_records(split.images)
    index, key = np.repeat(np.arange(len(table)), np.diff(table.offsets)), table.object_keys()
    order = np.lexsort((key, index))
    first, second = order[:-1], order[1:]
    repeated = np.sort(second[(index[first] == index[second]) & (key[first] == key[second])])
    if len(repeated):
        name = one_line(split.categories[table.labels[repeated[0]]].name)
        box = ", ".join(f"{value:g}" for value in table.boxes_xyxy[repeated[0]])
        message = (
            f"{plural(len(repeated), 'object')} with the class and the box of another one in the same image, such as "
            f"the {name} at ({box}): each counts, in training and in evaluation. Take the repetitions out."
        )
        log.add("repeated-object", "note", str(table.path(index[repeated[0]])), message, count=len(repeated))


def _num_unknown(split: Annotations) -> int:
    """How many objects were left out because nobody knows their class."""
    return sum(finding.count for finding in split.findings if finding.kind == "category-unknown")


def _report_classes(train: Annotations, summaries: Sequence[SplitSummary], log: FindingLog) -> None:
    in_train = summaries[0].class_counts
    in_val = summaries[1].class_counts if len(summaries) > 1 else ()
    if not summaries[0].num_objects:
        return  # said already
    for label, category in enumerate(train.categories):
        if in_train[label]:
            continue
        where = f"{train.name}, {shortened(category.name, SHOWN_NAME)} (id {category.category_id})"
        if label < len(in_val) and in_val[label]:
            message = (
                f"It has {in_val[label]} objects in validation and none in training: it can't be learned, its AP is 0."
            )
            log.add("class-only-in-validation", "note", where, message)
        else:
            log.add("class-without-objects", "note", where, "It has no object in training: it can't be learned.")


def _report_decoded(
    splits: Sequence[Annotations], decode: Decode, on_bad_image: str, log: FindingLog, progress: Progress | None
) -> None:
    """Decodes images of the splits, and says which can't be or are nearly black, and how many were not tried."""
    most, seconds = (None, None) if decode is True else _DECODED[decode]
    deadline = None if seconds is None else time.monotonic() + seconds
    wanted = [split if decode != "val" or place else None for place, split in enumerate(splits)]
    chosen = [[] if split is None else spread(len(split.images), most) for split in wanted]
    total, before = sum(map(len, chosen)), 0
    for place in reversed(range(len(splits))):  # validation first: training survives a bad image, at a price
        split, indices = splits[place], chosen[place]
        if wanted[place] is None or not indices:
            continue

        def done(count: int, before: int = before) -> None:
            if progress is not None:
                progress(before + count, total)

        found = decode_all(split.images, indices, deadline=deadline, progress=done)
        before += len(indices)
        _report_problems(split, found, place == 0, decode is True or on_bad_image == "raise", log)
        _report_dark(found, log)
        if found.num_images < len(split.images):
            which = "training" if place == 0 else "validation"
            message = (
                f"Decoded {found.num_images:,} of {len(split.images):,} {which} images, spread evenly; `ddetr data "
                "audit --decode true` decodes all."
            )
            log.add("not-decoded", "note", split.name, message, count=len(split.images) - found.num_images)


def _report_dark(found: Decoded, log: FindingLog) -> None:
    """Says how many images are nearly black. They are not made brighter one by one: each would change by its own
    content, and a model could not tell a bright scene from a dark one."""
    if found.dark and len(found.dark) >= _FEWEST_DARK * found.num_images:
        message = (
            f"{len(found.dark):,} of {found.num_images:,} decoded images are nearly black: no value is above {DARKEST} "
            "of 255. Pixels of 10 or 12 bits in files of 16 look so: multiply them by 64 or 16, in the files to be "
            "predicted too (`mogrify -evaluate multiply 16 *.png`, of ImageMagick)."
        )
        log.add("dark-images", "note", str(found.dark[0].path), message, count=len(found.dark))


def _report_problems(split: Annotations, found: Decoded, is_train: bool, refuse: bool, log: FindingLog) -> None:
    """Says of each image that can't be decoded what training does about it."""
    problems = found.problems
    if is_train:
        too_many = len(problems) > most_unreadable(len(split.images))
        action, fate = "note", "Training lets another image stand in for it; restore it."
    else:
        too_many = len(problems) == found.num_images
        action, fate = "dropped", "It is left out of validation; restore it."
    if refuse or too_many:
        action, fate = "refused", "Restore it or remove its entry."
    for record, problem in problems:
        log.add("unreadable-image", action, str(record.path), f"{problem.rstrip('.')}. {fate}")

"""COCO's detection metrics over any predict function, with per-class rows and the threshold of the best F1 score.

The arithmetic is a library's (hotcoco, faster-coco-eval or pycocotools: they agree to the last digit and differ up to
120-fold in time); this file feeds it and reads the numbers from its precision and recall arrays. Policies:

- Ignore regions (crowd, difficult) are COCO's `iscrowd=1`: a detection inside one counts neither for nor against.
- An undefined number (no ground truth of that class or size; pycocotools says -1) is NaN, and None in `to_dict`.
  Where there are objects and no detections the numbers are 0.
- An image without detections has missed all its objects, whether it was passed with no detections or not at all (a
  results file does not tell these apart). `compute(partial=True)` restricts to the images passed, and an image that
  can't be read (`leave_out`) is in no number.
- The limit on detections is COCO's: the `max_detections` best per image *and class*.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_xyxy_to_xywh
from ddetr.datasets.annotations import Annotations, ImageTable, UnreadImage
from ddetr.errors import InputError
from ddetr.evaluation.backends import BACKENDS, Backend
from ddetr.evaluation.metrics import ClassMetrics, Metrics, best_threshold
from ddetr.evaluation.overlaps import Found, Objects, match_detections
from ddetr.evaluation.results import coco_results
from ddetr.printable import one_line

__all__ = [
    "BACKENDS",
    "ClassMetrics",
    "CocoEvaluator",
    "Metrics",
    "evaluate",
]

log = logging.getLogger(__name__)

_UNREAD_SAID = 3  # images in a message


class CocoEvaluator:
    """Gathers detections image by image, in any order and from any number of processes, and computes the metrics.

    Args:
        annotations: the ground truth; its labels are what detections are labelled with.
        max_detections: best detections per image and class that count (COCO: 100).
        backend: "auto" (the first installed of hotcoco, faster-coco-eval, pycocotools) or one of these by name.
    """

    def __init__(self, annotations: Annotations, max_detections: int = 100, backend: str = "auto"):
        if max_detections < 1:
            raise InputError(f"max_detections must be at least 1, got {max_detections}.")
        self.annotations = annotations
        self.max_detections = max_detections
        self._backend = Backend(backend)
        self.backend = self._backend.name
        self.images = ImageTable.from_records(annotations.images)
        self._index = {image_id: i for i, image_id in enumerate(self.images.image_ids.tolist())}
        if len(self._index) != len(self.images):
            raise InputError(f"Image ids must differ: {annotations.name} has repeated ones.")
        self._found: dict[int, _ImageFound] = {}
        self._unread: dict[int, UnreadImage] = {}

    def leave_out(self, image_id: int, path: str, reason: str) -> None:
        """Takes an image out of the evaluation that can't be read; it is in no number then, as if it were not there."""
        self._unread.setdefault(image_id, UnreadImage(image_id, path, reason))

    @property
    def unread(self) -> list[UnreadImage]:
        """The images that were left out, by image id."""
        return [image for image_id, image in sorted(self._unread.items()) if image_id not in self._found]

    def measured_on(self) -> dict[str, Any]:
        """What is missing from the measurement, in plain values: images and objects that the reader of the data set
        left out, and images that could not be read; {} where nothing is."""
        left_out = [finding for finding in self.annotations.findings if finding.action in ("dropped", "refused")]
        unread = self.unread
        if not left_out and not unread:
            return {}
        counts: dict[str, int] = {}
        for finding in left_out:
            counts[finding.kind] = counts.get(finding.kind, 0) + finding.count
        return {
            "num_images": len(self._index) - len(unread),
            "num_images_listed": len(self._index) + self.annotations.num_images_left_out,
            "left_out": counts,
            "unreadable": [{"path": image.path, "reason": image.reason} for image in unread],
        }

    def update(self, image_ids: Iterable[int], detections: Sequence[dict[str, Tensor]]) -> None:
        """Takes the detections of some images; an image that was seen before keeps its first ones.

        The first ones stay because a sampler that wraps around, to give every process as many images, repeats some.

        Args:
            detections: for each image what PostProcess gives: scores (k,), labels (k,), boxes (k, 4) xyxy in pixels.
        """
        image_ids = [int(image_id) for image_id in image_ids]
        if len(image_ids) != len(detections):
            raise InputError(f"Expected detections for {len(image_ids)} images, got {len(detections)}.")
        for image_id, found in zip(image_ids, _to_found(detections)):
            self._add(image_id, found)

    def coco_results(self) -> list[dict[str, Any]]:
        """All detections so far in COCO's results format, with original category ids, by image id."""
        results = []
        own_ids = [category.category_id for category in self.annotations.categories]
        for image_id, found in sorted(self._found.items()):
            category_ids = [own_ids[label] for label in found.labels.tolist()]
            results.extend(coco_results(image_id, found.boxes_xywh, found.scores, category_ids))
        return results

    def state(self) -> dict[str, Any]:
        """What this process has gathered, as few plain arrays: for `torch.distributed.all_gather_object`."""
        found = list(self._found.values())
        return {
            "image_ids": np.array(list(self._found), dtype=np.int64),
            "num_detections": np.array([len(one.scores) for one in found], dtype=np.int64),
            "num_non_finite": np.array([one.num_non_finite for one in found], dtype=np.int64),
            "boxes_xywh": np.concatenate([_NOTHING.boxes_xywh, *(one.boxes_xywh for one in found)]),
            "scores": np.concatenate([_NOTHING.scores, *(one.scores for one in found)]),
            "labels": np.concatenate([_NOTHING.labels, *(one.labels for one in found)]),
            "unread": [tuple(image) for image in self._unread.values()],
        }

    def merge(self, states: Iterable[dict[str, Any]]) -> None:
        """Adds the states of other processes; an image in several is counted once.

        The first state that has an image wins, also over this process's own: so all processes that merge the same
        list compute the same numbers, bit for bit, and agree on which checkpoint is the best.
        """
        merged: dict[int, _ImageFound] = {}
        for state in states:
            for image in state.get("unread", ()):
                self.leave_out(*image)
            ends = np.cumsum(state["num_detections"])
            for i, image_id in enumerate(state["image_ids"].tolist()):
                if image_id not in merged:
                    rows = slice(ends[i] - state["num_detections"][i], ends[i])
                    columns = (state[name][rows] for name in ("boxes_xywh", "scores", "labels"))
                    merged[image_id] = _ImageFound(*columns, num_non_finite=int(state["num_non_finite"][i]))
        self._found = {**self._found, **merged}

    def reset(self) -> None:
        """Forgets all detections."""
        self._found.clear()
        self._unread.clear()

    def compute(self, partial: bool = False) -> Metrics:
        """The metrics over all images of the annotations, or, if `partial`, over those that were passed.

        Args:
            partial: for a run that meant to see a part only (a sanity check, a limited number of batches).
        """
        num_non_finite = sum(found.num_non_finite for found in self._found.values())
        if num_non_finite:
            log.warning("%d detections were NaN or infinite and were left out.", num_non_finite)
        if unread := self.unread:
            reasons = "; ".join(one_line(image.reason) for image in unread[:_UNREAD_SAID])
            more = f"; and {len(unread) - _UNREAD_SAID:,} more" if len(unread) > _UNREAD_SAID else ""
            log.warning(
                "%d of %d images can't be read and were left out of the evaluation: %s%s",
                len(unread), len(self._index), reasons, more,
            )  # fmt: skip
        missing = len(self._index) - len(self._found) - len(unread)
        if missing and not partial:
            log.warning("%d of %d images got no detections: their objects count as missed.", missing, len(self._index))
        image_ids, objects, found = self.gathered(partial)
        num_classes, most = len(self.annotations.categories), self.max_detections
        limits = (1, min(10, most), most)
        precision, recall = self._backend.accumulate(objects, found, len(image_ids), num_classes, limits)
        return self._summarise(precision, recall, objects, found, len(image_ids))

    def gathered(self, partial: bool = False) -> tuple[np.ndarray, Objects, Found]:
        """(I,) ids of the images in ascending order, without those that could not be read, with all their objects
        and detections."""
        chosen = sorted(self._found if partial else self._index.keys() - {image.image_id for image in self.unread})
        image_ids = np.array(chosen, dtype=np.int64)
        place = np.full(len(self.images), -1, dtype=np.int64)  # of each image of the annotations in `image_ids`
        place[[self._index[image_id] for image_id in chosen]] = np.arange(len(chosen))
        image = np.repeat(place, np.diff(self.images.offsets))
        order = np.argsort(image, kind="stable")
        order = order[image[order] >= 0]
        columns = (self.images.boxes_xyxy, self.images.labels, self.images.area, self.images.ignore)
        objects = Objects(image[order], *(column[order] for column in columns))
        found = [self._found.get(image_id, _NOTHING) for image_id in chosen]
        image = np.repeat(np.arange(len(found)), [len(one.scores) for one in found])
        names = ("boxes_xywh", "scores", "labels")
        columns = (np.concatenate([getattr(one, name) for one in (_NOTHING, *found)]) for name in names)
        return image_ids, objects, Found(image, *columns)

    def _add(self, image_id: int, found: _ImageFound) -> None:
        if image_id not in self._index:
            raise InputError(f"Image id {image_id} is not in {self.annotations.name}: evaluate on its own images.")
        if image_id in self._found:
            return
        num_classes = len(self.annotations.categories)
        if len(found.labels) and not (found.labels.min() >= 0 and found.labels.max() < num_classes):
            raise InputError(
                f"Labels must lie in 0..{num_classes - 1}, the classes of {self.annotations.name}; image {image_id} "
                f"has {found.labels.min()}..{found.labels.max()}: the model was trained on other classes."
            )
        finite = np.isfinite(found.scores) & np.isfinite(found.boxes_xywh).all(axis=1)
        if not finite.all():
            columns = (column[finite] for column in (found.boxes_xywh, found.scores, found.labels))
            found = _ImageFound(*columns, num_non_finite=int((~finite).sum()))
        self._found[image_id] = found

    def _summarise(
        self, precision: np.ndarray, recall: np.ndarray, objects: Objects, found: Found, num_images: int
    ) -> Metrics:
        every, at_50, at_75 = slice(None), 0, 5  # of the IoU thresholds 0.50, 0.55, ... 0.95
        numbers = {
            "AP": _mean(precision[..., 0, -1]),
            "AP50": _mean(precision[at_50, ..., 0, -1]),
            "AP75": _mean(precision[at_75, ..., 0, -1]),
            "AR1": _mean(recall[..., 0, 0]),
            "AR10": _mean(recall[..., 0, 1]),
            "AR100": _mean(recall[..., 0, -1]),
        }
        for area, size in enumerate("sml", start=1):
            numbers[f"AP{size}"] = _mean(precision[..., area, -1])
            numbers[f"AR{size}"] = _mean(recall[..., area, -1])
        num_classes = len(self.annotations.categories)
        num_objects = np.bincount(objects.labels[~objects.ignore], minlength=num_classes)
        per_class = []
        for label, category in enumerate(self.annotations.categories):
            ap, ap50, ap75 = (_mean(precision[ious, :, label, 0, -1]) for ious in (every, at_50, at_75))
            ar = _mean(recall[:, label, 0, -1])
            sizes = (_mean(precision[:, :, label, area, -1]) for area in (1, 2, 3))
            row = (label, category.category_id, category.name, int(num_objects[label]), ap, ap50, ap75, ar)
            per_class.append(ClassMetrics(*row, *sizes))
        counts, correct = match_detections(found, objects)
        columns = (found.scores[counts], found.labels[counts], correct[counts])
        threshold, f1 = best_threshold(*columns, num_objects)
        return Metrics(
            **numbers,
            per_class=per_class,
            threshold=threshold,
            f1=f1,
            num_images=num_images,
            num_objects=int(num_objects.sum()),
            num_detections=len(found.scores),
            max_detections=self.max_detections,
            backend=self.backend,
            curves=precision[[at_50, at_75], :, :, 0, -1],
        )


def evaluate(
    predict_fn: Callable[[Tensor, Tensor, Tensor], list[dict[str, Tensor]]],
    batches: Iterable[tuple[Tensor, Tensor, list[dict[str, Tensor]]]],
    annotations: Annotations,
    *,
    max_detections: int = 100,
    backend: str = "auto",
    partial: bool = False,
    evaluator: CocoEvaluator | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Metrics:
    """Runs `predict_fn` over all batches and computes the metrics.

    Args:
        predict_fn: `predict_fn(images, mask, target_sizes_hw)`, with what `collate` returns and (N, 2) int64 heights
            and widths of the originals, all where the loader left them; gives a dict per image as PostProcess does.
        batches: what a loader over `annotations` with `collate` yields.
        partial: compute over the images seen alone (see `CocoEvaluator.compute`).
        evaluator: where to gather, to have the detections afterwards (`evaluator.coco_results()`), or more batches.
        progress: called with the number of images done and of all images, after each batch.
    """
    evaluator = evaluator or CocoEvaluator(annotations, max_detections, backend)
    num_done = 0
    for images, mask, targets in batches:
        target_sizes_hw = torch.stack([target["orig_size"] for target in targets])  # (N, 2)
        with torch.no_grad():
            detections = predict_fn(images, mask, target_sizes_hw)
        evaluator.update([int(target["image_id"]) for target in targets], detections)
        num_done += len(targets)
        if progress is not None:
            progress(min(num_done, len(annotations.images)), len(annotations.images))
    return evaluator.compute(partial=partial)


class _ImageFound(NamedTuple):
    """The detections of an image: k of them."""

    boxes_xywh: np.ndarray  # (k, 4) float32
    scores: np.ndarray  # (k,) float32
    labels: np.ndarray  # (k,) int64
    num_non_finite: int = 0  # left out of the k


_NOTHING = _ImageFound(np.zeros((0, 4), np.float32), np.zeros(0, np.float32), np.zeros(0, np.int64))


def _to_found(detections: Sequence[dict[str, Tensor]]) -> list[_ImageFound]:
    """Those of several images at once: one copy from the device for all of them, not three for each."""
    for one in detections:
        if (
            one["boxes"].shape != (len(one["scores"]), 4)
            or one["scores"].ndim != 1
            or one["labels"].shape != one["scores"].shape
        ):
            shapes = ", ".join(str(tuple(one[name].shape)) for name in ("boxes", "scores"))
            raise InputError(
                f"Expected boxes (k, 4), scores (k,) and labels (k,), got {shapes} and {tuple(one['labels'].shape)}."
            )
    if not detections:
        return []
    boxes_xyxy, scores, labels = (
        torch.cat([one[name].detach() for one in detections]).cpu() for name in ("boxes", "scores", "labels")
    )
    boxes_xywh = box_xyxy_to_xywh(boxes_xyxy.float()).numpy()
    ends = np.cumsum([len(one["scores"]) for one in detections])[:-1]
    columns = (np.split(column, ends) for column in (boxes_xywh, scores.float().numpy(), labels.long().numpy()))
    return [_ImageFound(*(column.copy() for column in image)) for image in zip(*columns)]


def _mean(values: np.ndarray) -> float:
    defined = values[values > -1]
    return float(defined.mean()) if defined.size else math.nan

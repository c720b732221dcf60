"""Detections against objects, over all images of a validation at once, in flat arrays.

Shapes: k detections and n objects in all images together; p pairs of them that overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

__all__ = ["Found", "Objects", "Pairs", "match_detections", "overlapping_pairs"]

_PAIRS_AT_ONCE = 1_000_000  # bounds the memory, also where every image is crowded


class Objects(NamedTuple):
    """The ground truth of many images."""

    image: np.ndarray  # (n,) int64, position of the image, ascending
    boxes_xyxy: np.ndarray  # (n, 4) pixels
    labels: np.ndarray  # (n,) int64, 0..K-1
    area: np.ndarray  # (n,) pixels^2, a mask's where the data set has masks
    ignore: np.ndarray  # (n,) bool: crowd or difficult


class Found(NamedTuple):
    """The detections in the same images."""

    image: np.ndarray  # (k,) int64, position of the image, ascending
    boxes_xywh: np.ndarray  # (k, 4) float32 pixels
    scores: np.ndarray  # (k,) float32
    labels: np.ndarray  # (k,) int64, 0..K-1

    @property
    def boxes_xyxy(self) -> np.ndarray:
        """(k, 4) float64."""
        left_top, size = self.boxes_xywh[:, :2].astype(np.float64), self.boxes_xywh[:, 2:].astype(np.float64)
        return np.concatenate([left_top, left_top + size], axis=1)

    def kept(self, mask: np.ndarray) -> Found:
        """Those of a mask (k,)."""
        return Found(*(column[mask] for column in self))


class Pairs(NamedTuple):
    """Detections and objects that overlap, by detection, then by object."""

    found: np.ndarray  # (p,) index of the detection
    object: np.ndarray  # (p,) index of the object
    iou: np.ndarray  # (p,) in [0, 1]; 0 for objects that are ignored
    inside: np.ndarray  # (p,) the part of the detection that lies in an ignored object; 0 for the others


def overlapping_pairs(found: Found, objects: Objects, least_iou: float, *, same_class: bool) -> Pairs:
    """The pairs in one image with an IoU of at least `least_iou`, or a detection that lies half in an ignored object.

    Args:
        same_class: only pairs of one label, which are far fewer.
    """
    found_key, object_key = found.image.astype(np.int64), objects.image.astype(np.int64)
    if same_class:
        num_labels = 1 + max(found.labels.max(initial=0), objects.labels.max(initial=0))
        found_key, object_key = found_key * num_labels + found.labels, object_key * num_labels + objects.labels
    order = np.argsort(object_key, kind="stable")
    first = np.searchsorted(object_key[order], found_key, side="left")
    counts = np.searchsorted(object_key[order], found_key, side="right") - first  # (k,) objects to compare with
    found_xyxy = found.boxes_xyxy
    parts = [Pairs(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0), np.zeros(0))]
    ends, start = np.cumsum(counts), 0
    while start < len(counts):
        done = ends[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(ends, done + _PAIRS_AT_ONCE, side="right")))
        number = counts[start:stop]
        of_found = np.repeat(np.arange(start, stop), number)
        within = np.arange(len(of_found)) - np.repeat(np.cumsum(number) - number, number)
        of_object = order[np.repeat(first[start:stop], number) + within]
        iou, inside = _overlap(found_xyxy[of_found], objects.boxes_xyxy[of_object])
        ignored = objects.ignore[of_object]
        iou, inside = np.where(ignored, 0.0, iou), np.where(ignored, inside, 0.0)
        keep = (iou >= least_iou) | (inside >= 0.5)
        parts.append(Pairs(of_found[keep], of_object[keep], iou[keep], inside[keep]))
        start = stop
    return Pairs(*(np.concatenate(columns) for columns in zip(*parts)))


def match_detections(found: Found, objects: Objects) -> tuple[np.ndarray, np.ndarray]:
    """Matches detections with objects of their class at IoU 0.5, for the threshold of the best F1.

    Correct is, of the detections that overlap an object most, the one of the highest score. COCO lets the others try
    the next object; for a threshold the difference is nothing, and this needs no loop over detections.

    Returns which detections count (k,), those in ignore regions do not, and which are correct (k,).
    """
    pairs = overlapping_pairs(found, objects, 0.5, same_class=True)
    hits = pairs.iou >= 0.5
    of_found, of_object, iou = pairs.found[hits], pairs.object[hits], pairs.iou[hits]
    by_overlap = np.lexsort((of_object, -iou, of_found))  # of equal overlaps the first object
    of_found, first = np.unique(of_found[by_overlap], return_index=True)
    of_object = of_object[by_overlap][first]  # the object that each detection overlaps most
    by_score = np.lexsort((of_found, -found.scores[of_found]))
    _, first = np.unique(of_object[by_score], return_index=True)
    correct = np.zeros(len(found.scores), bool)
    correct[of_found[by_score][first]] = True
    in_ignored = np.zeros(len(found.scores), bool)
    in_ignored[pairs.found[pairs.inside >= 0.5]] = True
    return correct | ~in_ignored, correct


def _overlap(boxes_xyxy: np.ndarray, objects_xyxy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """IoU of (p, 4) with (p, 4), and the part of the first that lies in the second, which is COCO's for crowds."""
    sides = np.minimum(boxes_xyxy[:, 2:], objects_xyxy[:, 2:]) - np.maximum(boxes_xyxy[:, :2], objects_xyxy[:, :2])
    both = sides.clip(min=0).prod(axis=1)
    area = (boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1)
    other = (objects_xyxy[:, 2:] - objects_xyxy[:, :2]).prod(axis=1, dtype=np.float64)
    return both / np.maximum(area + other - both, 1e-9), both / np.maximum(area, 1e-9)

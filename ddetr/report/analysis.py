"""Detections against truth at one score threshold: confusion matrix, kinds of errors, a score per image.

A detection that has an object of its class to itself, at an IoU of at least 0.5, is correct; the detections choose in
the order of their scores, as in COCO. What lies in a region to be ignored (crowd, difficult) counts neither for nor
against.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ddetr.evaluation.overlaps import Found, Objects, Pairs, overlapping_pairs

LEAST_IOU = 0.5  # of a match
NEAR_IOU = 0.1  # below it a detection is of the background (as in TIDE, arXiv:2008.08115)

# kind: what it is; of all kinds but the last, the detection's class is counted, of that the object's
ERROR_KINDS = {
    "wrong class": f"on an object (IoU of at least {LEAST_IOU}) of another class",
    "badly localised": f"near an object of its class, but with an IoU below {LEAST_IOU}",
    "duplicate": "on an object that a detection of a higher score has found",
    "both": f"near an object of another class only, with an IoU below {LEAST_IOU}: wrong class and place",
    "background": f"where no object is (IoU below {NEAR_IOU} with all)",
    "missed": "an object without a correct detection, nor one of the wrong class or place",
}


@dataclass(frozen=True)
class Analysis:
    """K classes, I images."""

    # (p, 3) truth, prediction and how often, of the pairs that occur; K stands for nothing there and nothing found
    confused: np.ndarray
    errors: dict[str, np.ndarray]  # kind -> (K,) number
    num_objects: np.ndarray  # (K,)
    num_found: np.ndarray  # (K,) detections that count
    num_correct: np.ndarray  # (K,)
    image_scores: np.ndarray  # (I,) in [0, 1]: F1 times mean IoU of the matches; NaN where there is nothing at all
    image_correct: np.ndarray  # (I,)
    image_false: np.ndarray  # (I,) detections that are not correct
    image_missed: np.ndarray  # (I,) objects that no correct detection has

    @property
    def confusion(self) -> np.ndarray:
        """(K + 1, K + 1) rows: truth, columns: prediction; the last ones: nothing there, nothing found."""
        size = len(self.num_objects) + 1
        matrix = np.zeros((size, size), np.int64)
        matrix[self.confused[:, 0], self.confused[:, 1]] = self.confused[:, 2]
        return matrix


def analyse(found: Found, objects: Objects, threshold: float, num_images: int, num_classes: int) -> Analysis:
    """Looks at the detections with a score of at least `threshold`."""
    found = found.kept(found.scores >= threshold)
    pairs = overlapping_pairs(found, objects, NEAR_IOU, same_class=False)
    same = found.labels[pairs.found] == objects.labels[pairs.object]
    counted = ~objects.ignore

    match = np.full(len(found.labels), -1)  # the object of each detection
    taken = np.zeros(len(objects.labels), bool)
    match_iou = np.zeros(len(found.labels))
    near = same & (pairs.iou >= LEAST_IOU)
    _match(pairs, near, np.lexsort((pairs.object, -pairs.iou, pairs.found, -found.scores[pairs.found])), match, taken)
    correct = match >= 0
    on_match = match[pairs.found] == pairs.object
    match_iou[pairs.found[on_match]] = pairs.iou[on_match]

    ignored = np.zeros(len(found.labels), bool)
    ignored[pairs.found[same & (pairs.inside >= 0.5)]] = True
    counts = correct | ~ignored  # (k,)
    confused = _confused(pairs, found, objects, match.copy(), taken.copy(), counts, num_classes)
    errors = _errors(pairs, same, found, objects, taken, counts & ~correct, num_classes)

    def by_image(image: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
        return np.bincount(image, weights, minlength=num_images)

    image_correct = by_image(found.image[correct])
    image_false = by_image(found.image[counts & ~correct])
    image_missed = by_image(objects.image[counted & ~taken])
    total = image_correct + (image_false + image_missed) / 2
    overlap = by_image(found.image[correct], match_iou[correct])
    return Analysis(
        confused=confused,
        errors=errors,
        num_objects=np.bincount(objects.labels[counted], minlength=num_classes),
        num_found=np.bincount(found.labels[counts], minlength=num_classes),
        num_correct=np.bincount(found.labels[correct], minlength=num_classes),
        image_scores=np.where(total > 0, overlap / np.maximum(total, 0.5), np.nan),
        image_correct=image_correct,
        image_false=image_false,
        image_missed=image_missed,
    )


def _match(pairs: Pairs, allowed: np.ndarray, order: np.ndarray, match: np.ndarray, taken: np.ndarray) -> None:
    """Goes through the allowed pairs in this order and matches what is free, into `match` and `taken`."""
    order = order[allowed[order]]
    for i, j in zip(pairs.found[order].tolist(), pairs.object[order].tolist()):
        if match[i] < 0 and not taken[j]:
            match[i] = j
            taken[j] = True


def _confused(
    pairs: Pairs,
    found: Found,
    objects: Objects,
    match: np.ndarray,
    taken: np.ndarray,
    counts: np.ndarray,
    num_classes: int,
) -> np.ndarray:
    """What is left after the correct ones is matched whatever its class, by overlap."""
    allowed = (pairs.iou >= LEAST_IOU) & counts[pairs.found]
    _match(pairs, allowed, np.lexsort((pairs.object, pairs.found, -pairs.iou)), match, taken)
    matched = match >= 0
    extra, missed = found.labels[counts & ~matched], objects.labels[~objects.ignore & ~taken]
    truth = np.concatenate([objects.labels[match[matched]], np.full(len(extra), num_classes), missed])
    prediction = np.concatenate([found.labels[matched], extra, np.full(len(missed), num_classes)])
    kinds, times = np.unique(truth * (num_classes + 1) + prediction, return_counts=True)
    return np.stack([*np.divmod(kinds, num_classes + 1), times], axis=1)


def _errors(
    pairs: Pairs,
    same: np.ndarray,
    found: Found,
    objects: Objects,
    taken: np.ndarray,
    wrong: np.ndarray,
    num_classes: int,
) -> dict[str, np.ndarray]:
    """Of the wrong detections and of the objects that are not taken, by kind."""
    k = len(found.labels)
    best_same, best_other = np.zeros(k), np.zeros(k)
    np.maximum.at(best_same, pairs.found[same], pairs.iou[same])
    np.maximum.at(best_other, pairs.found[~same], pairs.iou[~same])
    kinds = {
        "duplicate": best_same >= LEAST_IOU,
        "wrong class": best_other >= LEAST_IOU,
        "badly localised": best_same >= NEAR_IOU,
        "both": best_other >= NEAR_IOU,
        "background": np.ones(k, bool),
    }
    is_kind: dict[str, np.ndarray] = {}
    left = wrong.copy()
    for kind, holds in kinds.items():  # each has the first that holds
        is_kind[kind] = left & holds
        left &= ~holds
    of_class = is_kind["wrong class"][pairs.found] & ~same & (pairs.iou == best_other[pairs.found])
    of_place = is_kind["badly localised"][pairs.found] & same & (pairs.iou == best_same[pairs.found])
    missed = ~objects.ignore & ~taken
    missed[pairs.object[of_class | of_place]] = False  # the detection that was meant for it is counted already
    errors = {
        kind: np.bincount(found.labels[is_kind[kind]], minlength=num_classes) for kind in ERROR_KINDS if kind in kinds
    }
    return errors | {"missed": np.bincount(objects.labels[missed], minlength=num_classes)}

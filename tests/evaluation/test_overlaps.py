"""Detections against objects in flat arrays: equal to plain loops."""

import numpy as np
import pytest
import torch
from made_detections import ids_of, make_annotations, make_detections
from torchvision.ops import box_iou

from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.overlaps import Found, Objects, match_detections, overlapping_pairs


def test_match_detections_by_hand():
    objects_xyxy = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 80, 40], [0, 0, 10, 10]])
    boxes_xyxy = np.array(
        [[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [42, 2, 50, 10], [60, 60, 70, 70], [0, 0, 10, 10]]
    )
    found = Found(
        np.array([0, 0, 0, 0, 0, 1]), to_xywh(boxes_xyxy), np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1]), np.zeros(6, int)
    )
    ignore = np.array([False, False, True, False])
    objects = Objects(np.array([0, 0, 0, 1]), objects_xyxy, np.array([0, 1, 0, 0]), np.ones(4), ignore)
    counts, correct = match_detections(found, objects)
    # double of a better one, wrong class, in a crowd, nowhere, the object of another image
    assert correct.tolist() == [True, False, False, False, False, True]
    assert counts.tolist() == [True, True, True, False, True, True]


def to_xywh(boxes_xyxy):
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1).astype(np.float32)


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
@pytest.mark.parametrize("same_class", [True, False])
def test_overlapping_pairs_equal_a_plain_loop(monkeypatch, at_once, same_class):
    monkeypatch.setattr("ddetr.evaluation.overlaps._PAIRS_AT_ONCE", at_once)
    annotations = make_annotations(num_images=8)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids_of(annotations), make_detections(annotations, per_image=10))
    _, objects, found = evaluator.gathered()
    expected = []
    for k, (image, box, label) in enumerate(zip(found.image, found.boxes_xyxy, found.labels)):
        for n in np.flatnonzero((objects.image == image) & ((objects.labels == label) | (not same_class))):
            iou = box_iou(torch.tensor(box)[None], torch.tensor(objects.boxes_xyxy[n]).double()[None]).item()
            sides = np.minimum(box[2:], objects.boxes_xyxy[n, 2:]) - np.maximum(box[:2], objects.boxes_xyxy[n, :2])
            inside = sides.clip(0).prod() / (box[2:] - box[:2]).prod()
            if objects.ignore[n] and inside >= 0.5:
                expected.append((k, n, 0.0, inside))
            elif not objects.ignore[n] and iou >= 0.1:
                expected.append((k, n, iou, 0.0))
    pairs = overlapping_pairs(found, objects, 0.1, same_class=same_class)
    assert len(expected) > 20
    np.testing.assert_allclose(np.column_stack(pairs), expected, rtol=1e-6)

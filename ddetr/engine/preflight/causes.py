"""Preflight, the usual mistakes: which one turns what was annotated into what came out."""

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_iou, box_xywh_to_xyxy, box_xyxy_to_cxcywh
from ddetr.datasets import Annotations
from ddetr.datasets.annotations import ImageRecord
from ddetr.evaluation.evaluator import CocoEvaluator


def explain_boxes(boxes: Tensor, found_xyxy: Tensor, wanted_xyxy: Tensor, size_hw: tuple[int, int]) -> str:
    """Which usual mistake turns the wanted boxes (pixels) into those found; '' where none does.

    Args:
        boxes: (n, 4) of the target, as they are; found_xyxy: what post-processing makes of them, in the same order.
    """
    if len(found_xyxy) < len(wanted_xyxy) or not len(wanted_xyxy):
        return ""
    height, width = size_hw
    found_xyxy, size = found_xyxy[: len(wanted_xyxy)], torch.tensor([width, height, width, height])
    relative = wanted_xyxy / size

    def close(one: Tensor, other: Tensor, unit: float) -> bool:
        return one.shape == other.shape and bool(((one - other).abs() < unit).all())

    if close(boxes, relative, 2e-3):
        return "the boxes are corners (xyxy), where centre and size (cxcywh) are expected"
    if close(found_xyxy / size.roll(1), relative, 2e-3):
        return "height and width are swapped: sizes are (height, width)"
    if close(boxes[:, [1, 0, 3, 2]], box_xyxy_to_cxcywh(relative), 2e-3):
        return "x and y are swapped in the boxes"
    mirrored = torch.stack([1 - relative[:, 2], relative[:, 1], 1 - relative[:, 0], relative[:, 3]], 1)
    if close(found_xyxy / size, mirrored, 2e-3):
        return "the boxes are mirrored, and nothing mirrors them back: no flip belongs into validation"
    if bool((boxes > 2).any()):
        return "the boxes are in pixels: they must be divided by the size of the image"
    ratio = (found_xyxy[:, 2:] - found_xyxy[:, :2]) / (wanted_xyxy[:, 2:] - wanted_xyxy[:, :2])
    if bool((ratio - ratio.mean()).abs().max() < 0.01) and abs(float(ratio.mean()) - 1) > 0.01:
        return f"the boxes are scaled by {float(ratio.mean()):.2f}: pixels of the resized image instead of the original"
    return ""


def explain_labels(labels: np.ndarray, objects: np.ndarray, record: ImageRecord) -> str:
    """A constant step between the labels found and the annotation's, if that explains them."""
    for step in (1, -1):
        for moved in (objects, objects - step):  # where the transform itself does it, it moves the numbers too
            inside = len(moved) == len(labels) and ((moved >= 0) & (moved < len(record.labels))).all()
            if inside and np.array_equal(labels, record.labels[moved] + step):
                return (
                    f"labels are shifted by {step:+d}: ids that count from 1, or a background class that is not there"
                )
    return ""


def explain_evaluation(
    evaluator: CocoEvaluator, records: dict[int, ImageRecord], annotations: Annotations
) -> tuple[str, str]:
    """(the first object that is not found again, the usual mistake that explains it)."""
    label_of = {category.category_id: label for label, category in enumerate(annotations.categories)}
    by_image: dict[int, list[tuple[Tensor, int]]] = {}
    for result in evaluator.coco_results():
        if result["score"] > 0.5:
            box = box_xywh_to_xyxy(torch.tensor(result["bbox"], dtype=torch.float32))
            by_image.setdefault(result["image_id"], []).append((box, label_of[result["category_id"]]))
    for image_id, record in records.items():
        found = by_image.get(image_id, [])
        keep = ~record.ignore
        for number, box, label in zip(np.flatnonzero(keep), record.boxes_xyxy[keep], record.labels[keep].tolist()):
            if _is_among(box, label, found):
                continue
            name = annotations.categories[label].name
            lost = f"{name}, object {number} of image {image_id} ({record.path}), is not found again"
            return lost, _mistake(box, label, found, image_id, by_image, record)
    return "", ""


def _mistake(
    box: np.ndarray,
    label: int,
    found: list[tuple[Tensor, int]],
    image_id: int,
    by_image: dict[int, list[tuple[Tensor, int]]],
    record: ImageRecord,
) -> str:
    for other, theirs in by_image.items():
        if other != image_id and _is_among(box, label, theirs):
            return f"image ids are mixed up: it is found under image {other}"
    same_place = [theirs for one, theirs in found if _iou(one, box) > 0.9]
    if same_place:
        return f"its box is found with label {same_place[0]} instead of {label}: labels are shifted or mapped wrongly"
    height, width = record.size_hw
    left, top, right, bottom = box.tolist()
    swapped = [left / width * height, top / height * width, right / width * height, bottom / height * width]
    if height != width and _is_among(np.array(swapped), label, found):
        return "height and width are swapped in the sizes that boxes are scaled with"
    if found:
        return "its box comes out elsewhere: see the check of the validation targets"
    return "nothing is found in this image: its detections are lost, or under another id"


def _is_among(box: np.ndarray, label: int, found: list[tuple[Tensor, int]]) -> bool:
    return any(theirs == label and _iou(one, box) > 0.95 for one, theirs in found)


def _iou(one: Tensor, other: np.ndarray) -> float:
    return float(box_iou(one[None].float(), torch.as_tensor(other, dtype=torch.float32)[None]))

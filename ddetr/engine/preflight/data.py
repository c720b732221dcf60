"""Preflight, the data's half: what is written in the annotations comes out of the run's own pipeline unchanged.

Labels and boxes go annotation -> transform -> target -> criterion, and -> post-processing -> evaluation. Where they
don't come back, the usual mistakes are tried one by one, to name the one that explains it.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torchvision import tv_tensors

from ddetr.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from ddetr.datasets import Annotations, DetectionDataset
from ddetr.datasets.annotations import ImageRecord
from ddetr.datasets.dataset import seeded
from ddetr.engine.loading.datamodule import DetectionData, collate_micro
from ddetr.engine.module import DetectionModule
from ddetr.engine.preflight.causes import explain_boxes, explain_evaluation, explain_labels
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.inference.detections import Detections
from ddetr.models.criterion import SetCriterion

NUM_IMAGES = 8
PIXELS = 0.5  # that a box may move on its way: rounding
MARKER_PIXELS = 3.0  # the same for a box painted into an image, which is resized with it
SURE = (6.0, 3.0)  # logits of perfect predictions, first to last: far enough from each other to keep their order
ABSENT = -12.0

Status = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at, in words."""

    name: str
    status: Status
    expected: str
    found: str
    cause: str = ""  # the likely one
    next: str = ""  # what to look at next
    facts: dict[str, Any] = field(default_factory=dict)


class _Numbered(Sequence[ImageRecord]):
    """The same images with the number of each object in place of its label: shows which objects a transform keeps."""

    def __init__(self, images: Sequence[ImageRecord]):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> ImageRecord:
        record = self.images[index]
        return replace(record, labels=np.arange(len(record.labels), dtype=np.int64))


def check_training_targets(dataset: DetectionDataset, criterion: SetCriterion, seed: int) -> Check:
    """Through the augmentation: every target's label is its object's, and its box lies on it in the image."""
    name = "training targets"
    expected = "labels of the annotations, boxes inside the image and on the object, through the augmentation"
    skips, dataset = dataset.on_error != "raise", copy.copy(dataset)
    dataset.on_error = "raise"  # no other image may stand in for a damaged one here
    numbered = copy.copy(dataset)
    numbered.annotations = replace(dataset.annotations, images=_Numbered(dataset.annotations.images))
    num_objects, off_marker, num_marked = 0, 0, 0
    places = images_with_objects(dataset.annotations)
    for index in places:
        record = dataset.annotations.images[index]
        where = f"image {record.image_id} ({record.path})"
        try:
            _, target = dataset[index, seed]
        except InputError:
            if not skips:
                raise
            continue  # training reports it, and goes on
        _, numbers = numbered[index, seed]
        labels, objects = target["labels"].numpy(), numbers["labels"].numpy()
        num_objects += len(labels)
        if wrong := _wrong_labels(labels, objects, record, criterion.num_classes):
            advice = "the augmentation and the data set's labels: they count from 0, without a background class"
            return Check(name, "failed", expected, f"{where}: {wrong}", explain_labels(labels, objects, record), advice)
        boxes = target["boxes"]
        corners = box_cxcywh_to_xyxy(boxes)
        bad = (
            ~torch.isfinite(boxes).all(1)
            | (boxes[:, 2:] <= 0).any(1)
            | (corners < -1e-3).any(1)
            | (corners > 1.001).any(1)
        )
        if bad.any():
            first = [round(value, 3) for value in boxes[bad][0].tolist()]
            cause = ""
            if bool((boxes > 2).any()):
                cause = "the boxes are in pixels: they must be divided by the size of the transformed image"
            elif bool((boxes[:, 2:] > boxes[:, :2]).all() & (boxes <= 1).all()):
                cause = "the boxes are corners (xyxy), where centre and size (cxcywh) are expected"
            found = (
                f"{where}: {int(bad.sum())} of {len(boxes)} boxes are not inside, the first is (cx, cy, w, h) = {first}"
            )
            return Check(
                name, "failed", expected, found, cause, "the augmentation, and the conversion of boxes after it"
            )
        on, of = _marker_hits(dataset, record, objects, seed, boxes)
        num_marked, off_marker = num_marked + of, off_marker + of - on
    if not places:
        return Check(name, "warning", expected, "none of the training images looked at has an object")
    if num_marked and off_marker > num_marked / 2:
        found = f"{off_marker} of {num_marked} boxes are not where the transformed image shows the object"
        cause = "image and boxes are transformed differently: flipped, cropped or scaled one without the other"
        return Check(name, "failed", expected, found, cause, "the augmentation (--data.augmentation none to compare)")
    found = f"{num_objects} objects in {len(places)} images: as expected"
    return Check(name, "ok", expected, found, facts={"num_marked": num_marked, "num_off": off_marker})


def check_validation_targets(dataset: DetectionDataset, criterion: SetCriterion, module: DetectionModule) -> Check:
    """Without augmentation: criterion and post-processing give back the annotation's labels, ids, names and boxes."""
    name = "validation targets"
    expected = f"labels, ids, names and boxes of the annotations again, to {PIXELS} pixels, and no loss for perfect predictions"
    categories = dataset.annotations.categories
    truth = module.evaluator.annotations.categories
    if categories != truth:
        found = f"the model's classes are {_names(categories)}, the evaluation's {_names(truth)}"
        return Check(
            name, "failed", expected, found, "the two splits number their classes differently", "the categories"
        )
    places = images_with_objects(dataset.annotations)
    num_objects = 0
    for index in places:
        record = dataset.annotations.images[index]
        where = f"image {record.image_id} ({record.path})"
        _, target = dataset[index]
        keep = ~record.ignore
        labels, wanted = target["labels"].numpy(), record.labels[keep]
        objects = np.flatnonzero(keep)
        num_objects += len(labels)
        if wrong := _wrong_labels(labels, objects, record, criterion.num_classes):
            advice = "the data set's labels: they count from 0, without a background class"
            return Check(name, "failed", expected, f"{where}: {wrong}", explain_labels(labels, objects, record), advice)
        detected = module.postprocess(
            perfect_outputs([target], len(labels), criterion.num_classes), target["orig_size"][None]
        )[0]
        found = Detections.from_labels(detected, categories, record.size_hw)
        boxes_xyxy = torch.from_numpy(record.boxes_xyxy[keep])
        if len(found) >= len(labels) and (wrong := _unlike(found, boxes_xyxy, wanted, categories)):
            cause = explain_boxes(target["boxes"], detected["boxes"], boxes_xyxy, record.size_hw)
            return Check(name, "failed", expected, f"{where}: {wrong}", cause, "the transform and the post-processing")
        height, width = record.size_hw
        annotated = {
            "labels": torch.from_numpy(wanted),
            "boxes": box_xyxy_to_cxcywh(boxes_xyxy) / torch.tensor([width, height, width, height]),
        }
        losses = criterion(
            perfect_outputs([annotated], len(labels), criterion.num_classes), [target], float(len(labels))
        )
        if float(losses["loss_bbox"]) > 0.02 or float(losses["loss_ce"]) > 0.01:
            said = f"{where}: perfect predictions have loss_bbox {losses['loss_bbox']:.3f}, loss_ce {losses['loss_ce']:.3f}"
            cause = explain_boxes(target["boxes"], detected["boxes"], boxes_xyxy, record.size_hw)
            return Check(name, "failed", expected, said, cause, "what the criterion makes of labels and boxes")
    if not places:
        return Check(name, "warning", expected, "none of the validation images looked at has an object")
    return Check(name, "ok", expected, f"{num_objects} objects in {len(places)} images: as expected")


def check_evaluation(module: DetectionModule, data: DetectionData, num_queries: int) -> Check:
    """The ground truth as perfect predictions, through the run's own validation step and evaluator."""
    name, expected = "evaluation", "AP 1.000 for the ground truth given as predictions"
    dataset, evaluator = data.val_set, module.evaluator
    annotations = dataset.annotations
    places = images_with_objects(annotations, crowded=True)
    if not places:
        return Check(name, "warning", expected, "no validation image has an object: AP is undefined")
    oracle = _Oracle(num_queries, len(annotations.categories))
    probe = copy.copy(module)  # the run's validation step on another model and evaluator; the run's own are not touched
    probe._modules = dict(module._modules)
    probe.model = oracle
    probe.evaluator = fresh = _emptied(evaluator)
    records = {}
    for start in range(0, len(places), data.device_batch_size):
        chunk = places[start : start + data.device_batch_size]
        [batch] = collate_micro([dataset[index] for index in chunk], len(chunk))
        oracle.targets = batch[2]
        probe.validation_step(batch, start)
        records |= {annotations.images[index].image_id: annotations.images[index] for index in chunk}
    metrics = fresh.compute(partial=True)
    lost_images = set(records) - set(fresh.state()["image_ids"].tolist())
    if lost_images:
        found = f"{len(lost_images)} of {len(places)} images are lost on the way, such as {min(lost_images)}"
        return Check(name, "failed", expected, found, "image ids are mixed up or left out", "the ids of the targets")
    facts = {"AP": metrics.AP, "images": list(records)}
    if metrics.AP > 0.9995:
        return Check(name, "ok", expected, f"AP {metrics.AP:.3f} over {len(places)} images", facts=facts)
    low = [row.name for row in metrics.per_class if row.AP < 0.9995]
    found = f"AP {metrics.AP:.3f} over {len(places)} images; below 1: {', '.join(low[:5]) or 'no class, but images are missing'}"
    lost, cause = explain_evaluation(fresh, records, annotations)
    if lost:
        found += f"; {lost}"
    most, limit = max(records.values(), key=lambda r: int((~r.ignore).sum())), evaluator.max_detections
    count = int((~most.ignore).sum())
    if count > min(limit, num_queries):
        option = "--max_detections" if limit < num_queries else "--model.num_queries"
        cause = f"image {most.image_id} has {count} objects: {limit} detections count, and the model has {num_queries} queries"
        return Check(name, "warning", expected, found, cause, f"a larger {option}", facts)
    return Check(name, "failed", expected, found, cause, "image ids, sizes and labels of the validation targets", facts)


def images_with_objects(annotations: Annotations, *, crowded: bool = False) -> list[int]:
    """Indices of a handful of images with objects, spread over the split; with `crowded` the fullest one among them."""
    total = len(annotations.images)

    def count(index: int) -> int:
        return int((~annotations.images[index].ignore).sum())

    spread = (
        np.unique(np.linspace(0, total - 1, min(total, 16 * NUM_IMAGES)).round().astype(int)).tolist() if total else []
    )
    having = [index for index in spread if count(index)]
    chosen = [
        having[i] for i in np.unique(np.linspace(0, len(having) - 1, min(len(having), NUM_IMAGES)).round().astype(int))
    ]
    if crowded and total and count(fullest := max(range(total), key=count)) and fullest not in chosen:
        chosen.append(fullest)
    return chosen


def perfect_outputs(targets: Sequence[dict[str, Tensor]], num_queries: int, num_classes: int) -> dict[str, Tensor]:
    """The outputs of a model that finds exactly these objects: one query each, as far as queries go."""
    logits = torch.full((len(targets), max(num_queries, 1), num_classes), ABSENT)
    boxes = torch.full((len(targets), max(num_queries, 1), 4), 0.5)
    for row, target in enumerate(targets):
        count = min(len(target["labels"]), num_queries)
        labels = target["labels"][:count].cpu().clamp(0, num_classes - 1)
        logits[row, torch.arange(count), labels] = torch.linspace(*SURE, count)
        boxes[row, :count] = target["boxes"][:count].cpu()
    return {"pred_logits": logits, "pred_boxes": boxes}


class _Oracle(nn.Module):
    """A model that knows the answer."""

    def __init__(self, num_queries: int, num_classes: int):
        super().__init__()
        self.num_queries, self.num_classes = num_queries, num_classes
        self.targets: Sequence[dict[str, Tensor]] = ()

    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        return perfect_outputs(self.targets, self.num_queries, self.num_classes)


def _emptied(evaluator: CocoEvaluator) -> CocoEvaluator:
    """The run's evaluator as it is, with a memory of its own."""
    fresh = copy.copy(evaluator)
    fresh._found = {}
    return fresh


def _wrong_labels(labels: np.ndarray, objects: np.ndarray, record: ImageRecord, num_classes: int) -> str:
    if len(labels) and (labels.min() < 0 or labels.max() >= num_classes):
        return f"labels {labels.min()} to {labels.max()}, but the model has the classes 0 to {num_classes - 1}"
    if len(labels) != len(objects):
        return f"{len(labels)} labels for {len(objects)} objects"
    is_known = (objects >= 0) & (objects < len(record.labels))
    wanted = record.labels[np.where(is_known, objects, 0)]
    if not is_known.all() or not np.array_equal(labels, wanted):
        return f"labels {labels.tolist()[:8]} for the annotation's {record.labels[~record.ignore].tolist()[:8]}"
    return ""


def _unlike(found: Detections, boxes_xyxy: Tensor, labels: np.ndarray, categories: Sequence[Any]) -> str:
    """What differs between detections and annotation, both in the same order; '' where nothing does."""
    for number, (one, box, label) in enumerate(zip(found, boxes_xyxy, labels.tolist())):
        wanted = (label, categories[label].category_id, categories[label].name)
        if (one.label, one.category_id, one.name) != wanted:
            return f"object {number} comes out as {(one.label, one.category_id, one.name)}, annotated is {wanted}"
        off = float((torch.tensor(one.box_xyxy) - box).abs().max())
        if not off <= PIXELS:
            got, want = ([round(value, 1) for value in corners] for corners in (one.box_xyxy, box.tolist()))
            return f"object {number} ({one.name}) comes out at {got}, annotated is {want}: {off:.1f} pixels off"
    return ""


def _marker_hits(
    dataset: DetectionDataset, record: ImageRecord, objects: np.ndarray, seed: int, boxes: Tensor
) -> tuple[int, int]:
    """(hits, tries): a white rectangle painted where the object is must be, transformed, where its box is.

    One object an image is tried, whose box is large enough to be measured; not where the transform needs more than an
    image (mosaics and the like).
    """
    transformed_sizes = boxes[:, 2:].amin(1)
    candidates = [row for row in range(len(objects)) if float(transformed_sizes[row]) > 0.08]
    if not candidates or dataset.transform is None:
        return 0, 0
    row = max(candidates, key=lambda one: float(boxes[one, 2:].prod()))
    number = int(objects[row])
    height, width = record.size_hw
    left, top, right, bottom = record.boxes_xyxy[number].round().astype(int).tolist()
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, top:bottom, left:right] = 255
    keep = ~record.ignore
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.from_numpy(record.boxes_xyxy[keep]), format="XYXY", canvas_size=(height, width)
        ),
        "labels": torch.from_numpy(record.labels[keep]),
        "area": torch.from_numpy(record.area[keep]),
        "iscrowd": torch.zeros(int(keep.sum()), dtype=torch.int64),
    }
    try:
        with seeded(seed):
            shown, _ = dataset.transform(tv_tensors.Image(image), target)
    except Exception:  # a transform that wants more than this
        return 0, 0
    shown = torch.as_tensor(shown).as_subclass(Tensor).float().mean(0)
    bright = shown > (shown.max() + shown.min()) / 2
    if shown.max() <= shown.min() or bright.all():
        return 0, 0
    rows, columns = bright.any(1).nonzero().flatten(), bright.any(0).nonzero().flatten()
    seen = torch.tensor([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]).float()
    size = torch.tensor([shown.shape[1], shown.shape[0]] * 2)
    off = float((box_cxcywh_to_xyxy(boxes[row]) * size - seen).abs().max())
    return int(off <= MARKER_PIXELS), 1


def _names(categories: Sequence[Any]) -> str:
    return ", ".join([*(category.name for category in categories[:5]), *["..."] * (len(categories) > 5)])

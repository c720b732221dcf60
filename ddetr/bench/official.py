"""A training step as the official recipe has it, read plainly: what ours is measured against.

Written from the recipe (arXiv:2010.04159 and its published settings), not from its code: each decoder layer is matched
by itself, from a cost matrix of all predictions of the batch against all objects of the batch; the operator is
grid_sample; images are normalised on the CPU and always have a mask; AdamW runs without fused kernels. The network is
ours, whose outputs and gradients are the official ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.boxes import box_cxcywh_to_xyxy, generalized_iou
from ddetr.datasets import normalize_images
from ddetr.engine.config import OptimConfig
from ddetr.engine.step import MicroBatch
from ddetr.models import attention
from ddetr.models.criterion import LossWeights, sigmoid_focal_loss
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.matcher import linear_sum_assignment
from ddetr.ops.reference import attention_step_reference

Targets = Sequence[Mapping[str, Tensor]]
Pairs = list[tuple[Tensor, Tensor]]  # an image each: predictions, objects


def cross_image_match(outputs: Mapping[str, Tensor], targets: Targets, weights: LossWeights = LossWeights()) -> Pairs:
    """The assignment from one (N*Q, all objects) matrix, of which each image uses its own part; int64 on the CPU."""
    n, q, _ = outputs["pred_logits"].shape
    with torch.no_grad():
        p = outputs["pred_logits"].flatten(0, 1).sigmoid()
        boxes = outputs["pred_boxes"].flatten(0, 1)
        labels = torch.cat([target["labels"] for target in targets])
        wanted = torch.cat([target["boxes"] for target in targets])
        negative = (1 - weights.focal_alpha) * p**2 * -(1 - p + 1e-8).log()
        positive = weights.focal_alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        class_cost = positive[:, labels] - negative[:, labels]
        l1 = torch.cdist(boxes, wanted, p=1)
        giou = generalized_iou(box_cxcywh_to_xyxy(boxes)[:, None], box_cxcywh_to_xyxy(wanted)[None])
        cost = weights.set_cost_bbox * l1 + weights.set_cost_class * class_cost - weights.set_cost_giou * giou
        parts = cost.view(n, q, -1).cpu().split([len(target["labels"]) for target in targets], dim=-1)
        found = [linear_sum_assignment(part[image]) for image, part in enumerate(parts)]
    return [(torch.as_tensor(queries), torch.as_tensor(objects)) for queries, objects in found]


class LayerByLayerCriterion:
    """The weighted losses of every set of predictions, each matched and computed by itself."""

    def __init__(self, weights: LossWeights, match: Callable[..., Pairs] = cross_image_match):
        self.weights, self.match = weights, match

    def __call__(self, outputs: Mapping[str, Any], targets: Targets) -> Tensor:
        """The total, a scalar."""
        num_boxes = max(1.0, float(sum(len(target["labels"]) for target in targets)))
        total = self._set(outputs, targets, num_boxes)
        for layer in outputs.get("aux_outputs", ()):
            total = total + self._set(layer, targets, num_boxes)
        if "enc_outputs" in outputs:
            objects = [{**target, "labels": torch.zeros_like(target["labels"])} for target in targets]
            total = total + self._set(outputs["enc_outputs"], objects, num_boxes)
        return total

    def _set(self, outputs: Mapping[str, Tensor], targets: Targets, num_boxes: float) -> Tensor:
        pairs = self.match(outputs, targets, self.weights)
        logits, boxes = outputs["pred_logits"], outputs["pred_boxes"]
        images = torch.cat([torch.full_like(queries, image) for image, (queries, _) in enumerate(pairs)])
        queries = torch.cat([queries for queries, _ in pairs])
        labels = torch.cat([target["labels"][objects] for target, (_, objects) in zip(targets, pairs)])
        wanted = torch.cat([target["boxes"][objects] for target, (_, objects) in zip(targets, pairs)])
        one_hot = torch.zeros_like(logits)
        one_hot[images, queries, labels] = 1.0
        predicted = boxes[images, queries]
        focal = sigmoid_focal_loss(logits, one_hot, self.weights.focal_alpha).sum()
        l1 = F.l1_loss(predicted, wanted, reduction="sum")
        giou = (1 - generalized_iou(box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(wanted))).sum()
        weights = self.weights
        return (weights.cls_loss_coef * focal + weights.bbox_loss_coef * l1 + weights.giou_loss_coef * giou) / num_boxes


@contextmanager
def grid_sample_operator() -> Iterator[None]:
    """Inside the block our network attends by grid_sample, softmax and locations outside of it."""
    ours = attention.ms_deform_attn_step
    attention.ms_deform_attn_step = attention_step_reference
    try:
        yield
    finally:
        attention.ms_deform_attn_step = ours


def official_step(
    model: DeformableDETR, weights: LossWeights, groups: list[dict[str, Any]], optim: OptimConfig, device: torch.device
) -> Callable[[list[MicroBatch]], float]:
    """A step on micro-batches as they come from our loader: one is a step there; several are summed as ours are.

    Images are normalised before they go to the device, which its loader does on the CPU too.
    """
    criterion = LayerByLayerCriterion(weights)
    optimizer = torch.optim.AdamW(groups, lr=optim.lr, foreach=False, fused=False)

    def step(batch: list[MicroBatch]) -> float:
        optimizer.zero_grad()
        num_objects = [sum(len(target["labels"]) for target in targets) for _, _, targets in batch]
        loss = 0.0
        with grid_sample_operator():
            for (images, mask, targets), count in zip(batch, num_objects):
                mask = torch.zeros(len(images), *images.shape[-2:], dtype=torch.bool) if mask is None else mask
                images = normalize_images(images, mask, model.image_mean, model.image_std)
                inputs = images.to(device), mask.to(device)
                targets = [{name: target[name].to(device) for name in ("labels", "boxes")} for target in targets]
                total = criterion(model(*inputs), targets) * (max(count, 1) / max(sum(num_objects), 1))
                total.backward()
                loss += total.item()
        if optim.clip_max_norm > 0:
            nn.utils.clip_grad_norm_(model.parameters(), optim.clip_max_norm)
        optimizer.step()
        return loss

    return step

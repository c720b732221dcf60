"""One-to-one assignment of predictions to objects (arXiv:2005.12872, sec. 3.1; focal class cost as in the official
Deformable DETR).

Shapes: N batch, Q predictions of a set, K classes, T the most objects an image of the batch, G sets.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy, generalized_iou

logger = logging.getLogger(__name__)


class PaddedTargets(NamedTuple):
    """Objects of a batch in one tensor each: labels (N, T), boxes (N, T, 4); `sizes` is the number an image."""

    labels: Tensor
    boxes: Tensor
    sizes: list[int]

    @classmethod
    def of(cls, targets: Sequence[dict[str, Tensor]], device: torch.device) -> "PaddedTargets":
        sizes = [len(target["labels"]) for target in targets]
        labels = torch.zeros(len(targets), max(sizes, default=0), dtype=torch.long, device=device)
        boxes = torch.full((*labels.shape, 4), 0.5, dtype=torch.float32, device=device)
        for index, (target, size) in enumerate(zip(targets, sizes)):
            labels[index, :size] = target["labels"]
            boxes[index, :size] = target["boxes"]
        return cls(labels, boxes, sizes)


class Matches(NamedTuple):
    """Matched pairs of one set of predictions, all images of the batch behind one another: (n,) each."""

    images: Tensor
    queries: Tensor
    objects: Tensor


class HungarianMatcher:
    """Assigns to each object the prediction that fits it best, one to one.

    The cost of a pair is `set_cost_class` * focal-style class cost + `set_cost_bbox` * L1 + `set_cost_giou` * (-GIoU).
    """

    def __init__(
        self,
        set_cost_class: float = 2.0,
        set_cost_bbox: float = 5.0,
        set_cost_giou: float = 2.0,
        focal_alpha: float = 0.25,
    ):
        self.set_cost_class, self.set_cost_bbox, self.set_cost_giou = set_cost_class, set_cost_bbox, set_cost_giou
        self.focal_alpha = focal_alpha
        self.num_repaired = 0  # costs that were not finite, since the matcher was made

    @torch.no_grad()
    def match_sets(
        self, sets: Sequence[tuple[dict[str, Any], PaddedTargets]], device: torch.device | None = None
    ) -> list[Matches]:
        """Match several sets of predictions (decoder layers, proposals) with one copy to the host.

        Args:
            sets: (outputs, targets) pairs; outputs hold `pred_logits` (N, Q, K) and `pred_boxes` (N, Q, 4).
            device: where the index tensors shall lie; that of the predictions by default.

        Returns:
            `Matches` of each set; every object is matched where there are as many predictions.
        """
        costs = [self._cost(outputs, targets) for outputs, targets in sets]  # G x (N, T, Q)
        device = device or costs[0].device
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        matches, start = [], 0
        for cost, (_, targets) in zip(costs, sets):
            host = flat[start : start + cost.numel()].reshape(cost.shape)
            start += cost.numel()
            assigned, num_repaired = _assign(host, targets.sizes, device)
            self.num_repaired += num_repaired
            matches.append(assigned)
        return matches

    def __call__(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The official interface: for each image (indices of predictions, indices of objects), int64 on the CPU."""
        padded = PaddedTargets.of(targets, outputs["pred_logits"].device)
        matches = self.match_sets([(outputs, padded)], device=torch.device("cpu"))[0]
        return [
            (matches.queries[matches.images == i], matches.objects[matches.images == i]) for i in range(len(targets))
        ]

    def _cost(self, outputs: dict[str, Any], targets: PaddedTargets) -> Tensor:
        """(N, T, Q) in float32; the columns of padding objects mean nothing."""
        logits = outputs["pred_logits"].float().transpose(1, 2)  # (N, K, Q)
        boxes = outputs["pred_boxes"].float()
        num_queries = boxes.shape[1]
        # Only the columns of the classes at hand: the class cost of the others is never read.
        p = logits.gather(1, targets.labels[..., None].expand(-1, -1, num_queries)).sigmoid()  # (N, T, Q)
        negative = (1 - self.focal_alpha) * p**2 * -(1 - p + 1e-8).log()
        positive = self.focal_alpha * (1 - p) ** 2 * -(p + 1e-8).log()
        l1 = torch.cdist(targets.boxes, boxes, p=1)
        giou = generalized_iou(
            box_cxcywh_to_xyxy(targets.boxes)[:, :, None], box_cxcywh_to_xyxy(boxes)[:, None]
        )  # (N, T, Q)
        return self.set_cost_class * (positive - negative) + self.set_cost_bbox * l1 - self.set_cost_giou * giou


def _assign(cost: np.ndarray, sizes: Sequence[int], device: torch.device) -> tuple[Matches, int]:
    """The pairs, and how many of their costs were not finite."""
    from scipy.optimize import linear_sum_assignment  # here, since `ddetr train --help` has no use for it

    images, queries, objects = [], [], []
    num_repaired = 0
    for index, size in enumerate(sizes):
        pairs = cost[index, :size]  # (T_i, Q), contiguous
        finite = np.isfinite(pairs)
        if not finite.all():
            logger.warning(
                "matcher: %d of %d costs of image %d in the batch are not finite: the model predicted NaN or infinity; "
                "they count as the worst",
                finite.size - finite.sum(),
                finite.size,
                index,
            )
            pairs = np.where(finite, pairs, 1e9)
            num_repaired += int(finite.size - finite.sum())
        matched_objects, matched_queries = linear_sum_assignment(pairs)
        images.append(np.full(len(matched_objects), index))
        queries.append(matched_queries)
        objects.append(matched_objects)
    index_rows = np.stack([np.concatenate(rows) for rows in (images, queries, objects)]).astype(np.int64)
    return Matches(*torch.from_numpy(index_rows).to(device)), num_repaired

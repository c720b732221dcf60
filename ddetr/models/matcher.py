"""One-to-one assignment of predictions to objects (arXiv:2005.12872, sec. 3.1; focal class cost as in the official
Deformable DETR).

Shapes: N batch, Q predictions of a set, K classes, T the most objects per image of the batch, M objects of all images,
    G sets.
"""

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy, broadcast_iou
from ddetr.runtime.transfer import sent

logger = logging.getLogger(__name__)


class PaddedTargets(NamedTuple):
    """Objects of a batch in one tensor each: labels (N, T), boxes (N, T, 4); `sizes` is the number per image."""

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

    def indices(self) -> tuple[Tensor, Tensor]:
        """Image and place in it of every object, (M,) each."""
        pairs = [(image, place) for image, size in enumerate(self.sizes) for place in range(size)]
        images, places = sent(torch.tensor(pairs, dtype=torch.long).view(-1, 2), self.labels.device).unbind(1)
        return images, places


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
        device = device or sets[0][0]["pred_logits"].device
        costs = self._costs(sets)
        flat = torch.cat([cost.flatten() for cost in costs]).cpu()
        host = flat.split([cost.numel() for cost in costs])
        pairs = [
            self._assign(cost.view_as(like).numpy(), targets.sizes)
            for cost, like, (_, targets) in zip(host, costs, sets)
        ]  # (3, n) of each set
        on_device = sent(torch.from_numpy(np.concatenate(pairs, axis=1)), device)
        return [Matches(*rows) for rows in on_device.split([rows.shape[1] for rows in pairs], dim=1)]

    def __call__(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The official interface: for each image (indices of predictions, indices of objects), int64 on the CPU."""
        padded = PaddedTargets.of(targets, outputs["pred_logits"].device)
        matches = self.match_sets([(outputs, padded)], device=torch.device("cpu"))[0]
        return [
            (matches.queries[matches.images == i], matches.objects[matches.images == i]) for i in range(len(targets))
        ]

    def _costs(self, sets: Sequence[tuple[dict[str, Any], PaddedTargets]]) -> list[Tensor]:
        """(M, Q) of each set. Those of the same objects and shape are computed at once: launches are what a GPU waits
        for."""
        groups: dict[Any, list[int]] = {}
        for index, (outputs, targets) in enumerate(sets):
            groups.setdefault((id(targets), outputs["pred_logits"].shape), []).append(index)
        costs: dict[int, Tensor] = {}
        for group in groups.values():
            costs |= zip(group, self._cost([sets[index][0] for index in group], sets[group[0]][1]))
        return [costs[index] for index in range(len(sets))]

    def _cost(self, group: Sequence[dict[str, Any]], targets: PaddedTargets) -> Tensor:
        """(G, M, Q) in float32, of G sets of one shape and the M objects of all images, one image after the other."""
        images, places = targets.indices()
        labels, wanted = targets.labels[images, places], targets.boxes[images, places]
        # Only the columns of the classes at hand: the class cost of the others is never read.
        p = torch.stack([one["pred_logits"].transpose(1, 2)[images, labels] for one in group]).float().sigmoid_()
        positive = (p + 1e-8).log_().neg_().mul_((1 - p).square_().mul_(self.focal_alpha))
        negative = (1 - p).add_(1e-8).log_().neg_().mul_(p.square_().mul_(1 - self.focal_alpha))
        cost = positive.sub_(negative).mul_(self.set_cost_class)

        boxes = torch.stack([one["pred_boxes"] for one in group]).float()  # (G, N, Q, 4)
        # Planes of one number each, cx, cy, w, h, left, top, right, bottom: of predictions (G, M, Q), of objects (M,
        # 1).
        planes = torch.cat((boxes, box_cxcywh_to_xyxy(boxes)), dim=-1).permute(3, 0, 1, 2).contiguous()
        a = [plane.index_select(1, images) for plane in planes]
        b = torch.cat((wanted, box_cxcywh_to_xyxy(wanted)), dim=-1).t()[..., None]
        distance = sum(predicted.sub_(side).abs_() for predicted, side in zip(a[:4], b[:4]))
        cost.add_(distance, alpha=self.set_cost_bbox)
        return cost.sub_(_generalized_iou(a[4:], b[4:]), alpha=self.set_cost_giou)

    def _assign(self, cost: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
        """Costs (M, Q) of images with `sizes` objects -> rows of image, query and object of each pair, (3, n) int64."""
        found = []
        for index, pairs in enumerate(np.split(cost, np.cumsum(sizes)[:-1])):  # (T_i, Q), contiguous
            finite = np.isfinite(pairs)
            if not finite.all():
                num_repaired = int(finite.size - finite.sum())
                logger.warning(
                    "matcher: %d of %d costs of image %d in the batch are not finite: the model predicted NaN "
                    "or infinity; "
                    "they count as the worst",
                    num_repaired,
                    finite.size,
                    index,
                )
                pairs = np.where(finite, pairs, 1e9)
                self.num_repaired += num_repaired
            objects, queries = linear_sum_assignment(pairs)
            found.append(np.stack([np.full(len(objects), index), queries, objects]))
        return np.concatenate(found, axis=1).astype(np.int64)


@torch.no_grad()
def match_one_to_many(
    outputs: dict[str, Any], targets: PaddedTargets, most: int, *, threshold: float = 0.4, iou_share: float = 0.7
) -> Matches:
    """Several predictions for an object (arXiv:2401.03989, sec. 3.2, with the numbers of its code).

    A prediction's value for an object is 0.7 * IoU + 0.3 * probability of its class. An object has the `most` of the
    highest value, as far as they are above the threshold, and the best one in any case; a prediction that several
    objects would have goes to the one of the highest value.
    """
    images, places = targets.indices()
    labels, wanted = targets.labels[images, places], targets.boxes[images, places]  # (M,), (M, 4)
    p = outputs["pred_logits"].float().transpose(1, 2)[images, labels].sigmoid()  # (M, Q)
    boxes = box_cxcywh_to_xyxy(outputs["pred_boxes"].float())[images]  # (M, Q, 4)
    value = iou_share * broadcast_iou(boxes, box_cxcywh_to_xyxy(wanted)[:, None]) + (1 - iou_share) * p
    n, t, q = len(targets.sizes), targets.labels.shape[1], value.shape[1]
    if not t:
        return Matches(images, images, places)
    best, queries = value.topk(min(most, q), dim=1)
    best[:, 1:] = best[:, 1:].masked_fill(best[:, 1:] <= threshold, -1.0)
    chosen = value.new_full((n, t, q), -1.0)
    chosen[images, places] = torch.full_like(value, -1.0).scatter_(1, queries, best)
    value_of_query, place_of_query = chosen.max(dim=1)  # (N, Q)
    images, queries = (value_of_query >= 0).nonzero(as_tuple=True)
    return Matches(images, queries, place_of_query[images, queries])


def _generalized_iou(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """`ddetr.boxes.generalized_iou` of left, top, right, bottom that broadcast: as planes, which are read in one go."""
    tiny = torch.finfo(a[0].dtype).tiny
    width = torch.minimum(a[2], b[2]).sub_(torch.maximum(a[0], b[0])).clamp_(min=0)
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1])).clamp_(min=0)
    intersection = width.mul_(height)
    union = (a[2] - a[0]).mul_(a[3] - a[1]).add_((b[2] - b[0]) * (b[3] - b[1])).sub_(intersection).clamp_(min=tiny)
    hull_height = torch.maximum(a[3], b[3]).sub_(torch.minimum(a[1], b[1])).clamp_(min=0)
    hull = torch.maximum(a[2], b[2]).sub_(torch.minimum(a[0], b[0])).clamp_(min=0).mul_(hull_height).clamp_(min=tiny)
    return intersection.div_(union).sub_((hull - union).div_(hull))


def linear_sum_assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one assignment of least total cost: row and column indices (scipy's, which is slow to import and which
    `ddetr train --help` has no use for)."""
    from scipy.optimize import linear_sum_assignment as solve

    return solve(cost)

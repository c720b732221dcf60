"""One-to-one assignment of predictions to objects (arXiv:2005.12872, sec. 3.1; focal class cost as in the official
Deformable DETR).

Shapes: N batch, Q predictions of a set, K classes, T the most objects an image of the batch, G sets.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy

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

    def is_compact(self) -> bool:
        """Whether so little is padding that leaving it out would cost more than computing it."""
        return len(self.sizes) * self.labels.shape[1] <= 1.25 * sum(self.sizes)

    def starts(self) -> list[int]:
        """Row of each image's first object: with padding where that `is_compact`, and without it elsewhere."""
        if self.is_compact():
            return (
                list(range(0, self.labels.numel(), self.labels.shape[1]))
                if self.labels.numel()
                else [0] * len(self.sizes)
            )
        return list(itertools.accumulate(self.sizes, initial=0))[:-1]

    def indices(self) -> tuple[Tensor, Tensor]:
        """Image and place in it of every object, (M,) each."""
        pairs = [(image, place) for image, size in enumerate(self.sizes) for place in range(size)]
        images, places = torch.tensor(pairs, dtype=torch.long, device=self.labels.device).view(-1, 2).unbind(1)
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
        groups = _groups(sets)
        costs = [self._cost(*_stacked([sets[index] for index in group])) for group in groups]  # each (G*R, Q)
        flat = torch.cat([cost.flatten() for cost in costs]).cpu().numpy()
        found: dict[int, np.ndarray] = {}  # (3, n) of each set
        start = 0
        for cost, group in zip(costs, groups):
            host = flat[start : start + cost.numel()].reshape(len(group), -1, cost.shape[-1])  # (G, R, Q)
            start += cost.numel()
            for index, rows in zip(group, host):
                found[index], num_repaired = _assign(rows, sets[index][1])
                self.num_repaired += num_repaired
        pairs = [found[index] for index in range(len(sets))]
        on_device = torch.from_numpy(np.concatenate(pairs, axis=1)).to(device)
        return [Matches(*rows) for rows in on_device.split([rows.shape[1] for rows in pairs], dim=1)]

    def __call__(self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """The official interface: for each image (indices of predictions, indices of objects), int64 on the CPU."""
        padded = PaddedTargets.of(targets, outputs["pred_logits"].device)
        matches = self.match_sets([(outputs, padded)], device=torch.device("cpu"))[0]
        return [
            (matches.queries[matches.images == i], matches.objects[matches.images == i]) for i in range(len(targets))
        ]

    def _cost(self, outputs: dict[str, Any], targets: PaddedTargets) -> Tensor:
        """(R, Q) in float32; R are the rows of `targets.starts()`, of which those of padding objects mean nothing.

        Written for few and contiguous temporaries: each is as large as the result, and on a CPU they are what it costs.
        """
        logits, boxes = outputs["pred_logits"].float(), outputs["pred_boxes"].float()
        n, q, _ = logits.shape
        # Eight rows of numbers a prediction or object: cx, cy, w, h, left, top, right, bottom.
        predicted = torch.cat((boxes, box_cxcywh_to_xyxy(boxes)), dim=-1).transpose(1, 2).contiguous()  # (N, 8, Q)
        wanted = torch.cat((targets.boxes, box_cxcywh_to_xyxy(targets.boxes)), dim=-1)  # (N, T, 8)
        # Only the columns of the classes at hand: the class cost of the others is never read.
        if targets.is_compact():
            p = logits.transpose(1, 2).gather(1, targets.labels[..., None].expand(-1, -1, q)).sigmoid_()  # (N, T, Q)
            predicted = predicted[:, :, None]  # (N, 8, 1, Q)
        else:
            images, objects = targets.indices()
            p = logits.transpose(1, 2)[images, targets.labels[images, objects]].sigmoid_()  # (M, Q)
            predicted = predicted[images]  # (M, 8, Q)
            wanted = wanted[images, objects]  # (M, 8)
        predicted, wanted = predicted.unbind(1), wanted[..., None].unbind(-2)

        scratch = torch.empty_like(p)
        cost = self._class_cost(p, scratch).mul_(self.set_cost_class)
        distance = (predicted[0] - wanted[0]).abs_()
        for side in (1, 2, 3):
            distance += torch.sub(predicted[side], wanted[side], out=scratch).abs_()
        cost.add_(distance, alpha=self.set_cost_bbox)
        giou = _generalized_iou(predicted[4:], wanted[4:], distance, scratch)
        return cost.sub_(giou, alpha=self.set_cost_giou).view(-1, q)

    def _class_cost(self, p: Tensor, scratch: Tensor) -> Tensor:
        """Focal-style cost of probabilities, which are overwritten with it."""
        other = 1 - p
        negative = (other + 1e-8).log_().neg_().mul_(torch.mul(p, p, out=scratch).mul_(1 - self.focal_alpha))
        return p.add_(1e-8).log_().neg_().mul_(other.square_().mul_(self.focal_alpha)).sub_(negative)


def _generalized_iou(a: Sequence[Tensor], b: Sequence[Tensor], out: Tensor, scratch: Tensor) -> Tensor:
    """`ddetr.boxes.generalized_iou` of left, top, right, bottom that broadcast to `out`, which is overwritten with it."""
    tiny = torch.finfo(out.dtype).tiny
    torch.minimum(a[2], b[2], out=out).sub_(torch.maximum(a[0], b[0], out=scratch)).clamp_(min=0)
    height = torch.minimum(a[3], b[3]).sub_(torch.maximum(a[1], b[1], out=scratch)).clamp_(min=0)
    intersection = out.mul_(height)
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in (a, b)]
    union = torch.add(*areas, out=height).sub_(intersection).clamp_(min=tiny)
    hull = torch.maximum(a[2], b[2], out=scratch).sub_(torch.minimum(a[0], b[0])).clamp_(min=0)
    hull_height = torch.maximum(a[3], b[3]).sub_(torch.minimum(a[1], b[1])).clamp_(min=0)
    hull.mul_(hull_height).clamp_(min=tiny)
    return intersection.div_(union).sub_(torch.sub(hull, union, out=hull_height).div_(hull))


def _groups(sets: Sequence[tuple[dict[str, Any], PaddedTargets]]) -> list[list[int]]:
    """Which sets are computed at once.

    A GPU takes those of one shape together: its time is that of the launches. A CPU takes one after the other, whose
    costs fit into its cache.
    """
    if sets[0][0]["pred_logits"].device.type == "cpu":
        return [[index] for index in range(len(sets))]
    return _alike(sets)


def _alike(sets: Sequence[tuple[dict[str, Any], PaddedTargets]]) -> list[list[int]]:
    """Sets of the same objects and the same shape."""
    groups: dict[Any, list[int]] = {}
    for index, (outputs, targets) in enumerate(sets):
        logits = outputs["pred_logits"]
        groups.setdefault((id(targets), logits.shape, logits.dtype), []).append(index)
    return list(groups.values())


def _stacked(group: Sequence[tuple[dict[str, Any], PaddedTargets]]) -> tuple[dict[str, Any], PaddedTargets]:
    """Sets of the same objects as one of G*N images."""
    if len(group) == 1:
        return group[0]
    count, targets = len(group), group[0][1]
    outputs = {name: torch.cat([outputs[name] for outputs, _ in group]) for name in ("pred_logits", "pred_boxes")}
    repeated = PaddedTargets(targets.labels.repeat(count, 1), targets.boxes.repeat(count, 1, 1), targets.sizes * count)
    return outputs, repeated


def _assign(cost: np.ndarray, targets: PaddedTargets) -> tuple[np.ndarray, int]:
    """Costs (R, Q) -> rows of image, query and object of each pair, (3, n) int64, and how many costs were not finite."""
    images, queries, objects = [], [], []
    num_repaired = 0
    for index, (start, size) in enumerate(zip(targets.starts(), targets.sizes)):
        pairs = cost[start : start + size]  # (T_i, Q), contiguous
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
    return np.stack([np.concatenate(rows) for rows in (images, queries, objects)]).astype(np.int64), num_repaired


def linear_sum_assignment(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one-to-one assignment of least total cost: row and column indices (scipy's, which is slow to import and which
    `ddetr train --help` has no use for)."""
    from scipy.optimize import linear_sum_assignment as solve

    return solve(cost)

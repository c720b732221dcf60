"""The set-prediction loss (arXiv:2005.12872, sec. 3.1, with the focal loss of the official Deformable DETR).

Shapes: N batch, Q predictions of a set, K classes, G sets (decoder layers), n matched pairs of a set.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.boxes import box_cxcywh_to_xyxy, broadcast_iou, generalized_iou
from ddetr.models.matcher import HungarianMatcher, Matches, PaddedTargets, match_one_to_many
from ddetr.runtime.transfer import sent

Classification = Literal["focal", "ia_bce", "mal"]
DENOISING, ONE_TO_MANY = "_dn", "_o2m"  # end the names of the losses of these passes


@dataclass(frozen=True)
class LossWeights:
    """Weights of the losses and of the matching costs, under the official flag names."""

    cls_loss_coef: float = 2.0
    """Weight of the focal class loss."""
    bbox_loss_coef: float = 5.0
    """Weight of the L1 loss of (cx, cy, w, h)."""
    giou_loss_coef: float = 2.0
    """Weight of the generalised-IoU loss."""
    focal_alpha: float = 0.25
    """Weight of the positive class in the focal loss."""
    classification: Classification = "focal"
    """What a matched query's score shall be: "focal", 1, as published; "ia_bce" (Align-DETR) and "mal" (DEIM), the more
    the better its box is."""
    set_cost_class: float = 2.0
    """Weight of the class in the matching cost."""
    set_cost_bbox: float = 5.0
    """Weight of the L1 distance in the matching cost."""
    set_cost_giou: float = 2.0
    """Weight of the generalised IoU in the matching cost."""

    def weight_dict(self, num_aux: int, two_stage: bool, auxiliary: Sequence[str] = ()) -> dict[str, float]:
        """Weight of every key that `SetCriterion` returns and that is a loss: last layer, aux layers, proposals, and
        the layers of the auxiliary passes, whose names have these ends."""
        weights = {
            "loss_ce": self.cls_loss_coef,
            "loss_bbox": self.bbox_loss_coef,
            "loss_giou": self.giou_loss_coef,
        }
        layers = [""] + [f"_{layer}" for layer in range(num_aux)]
        suffixes = layers + ["_enc"] * two_stage + [end + layer for end in auxiliary for layer in layers]
        return {name + suffix: weight for suffix in suffixes for name, weight in weights.items()}


class SetCriterion(nn.Module):
    """Losses of the predictions after a one-to-one matching, each decoder layer matched by itself."""

    def __init__(
        self,
        num_classes: int,
        loss_weights: LossWeights = LossWeights(),
        *,
        num_aux: int = 0,
        two_stage: bool = False,
        class_aware: bool = False,
        denoising: bool = False,
        one_to_many: int = 0,
        region: Callable[[str], AbstractContextManager] = nullcontext,
    ):
        """num_aux: decoder layers but the last that get a loss; two_stage: proposals get one, for "any object", or
        class_aware for each class; denoising, one_to_many: so do these passes, the second with up to so many queries
        per object. They set `weight_dict`.
        region: is entered with "matching" around that part, for whoever measures times."""
        super().__init__()
        self.num_classes = num_classes
        self.loss_weights = loss_weights
        self.region = region
        self.num_aux, self.one_to_many, self.class_aware = num_aux, one_to_many, class_aware
        ends = [DENOISING] * denoising + [ONE_TO_MANY] * bool(one_to_many)
        self.weight_dict = loss_weights.weight_dict(num_aux, two_stage, ends)
        self.matcher = HungarianMatcher(
            loss_weights.set_cost_class,
            loss_weights.set_cost_bbox,
            loss_weights.set_cost_giou,
            loss_weights.focal_alpha,
        )

    def forward(
        self, outputs: dict[str, Any], targets: Sequence[dict[str, Tensor]], num_boxes: float | None = None
    ) -> dict[str, Tensor]:
        """Unweighted losses under the official keys, in float32; `weight_dict` weighs them, `total` adds them up.

        Args:
            outputs: what `DeformableDETR` returns, and beside it in training what `Auxiliary` does.
            targets: for each image `labels` (t,) int64 in 0..K-1 and `boxes` (t, 4) cxcywh in [0, 1]; t may be 0.
            num_boxes: what the sums are divided by, where the batch is a part of a larger one; by default the number
                of objects of the batch, averaged over all processes, at least 1.

        Returns:
            `loss_ce`, `loss_bbox`, `loss_giou` of the last layer, the same with `_0`, `_1`, ... for the other layers,
            with `_enc` for two-stage proposals, and with `_dn`, `_dn_0`, ... and `_o2m`, `_o2m_0`, ... for the layers
            of the auxiliary passes; `class_error` (percent) and `cardinality_error`, to look at.
        """
        with torch.autocast(outputs["pred_logits"].device.type, enabled=False):
            device = outputs["pred_logits"].device
            if num_boxes is None:
                num_boxes = global_num_boxes(sum(len(target["labels"]) for target in targets), device)
            padded = PaddedTargets.of(targets, device)
            layers = [outputs, *outputs.get("aux_outputs", [])]
            sets = [(layer, padded) for layer in layers]
            proposals = outputs.get("enc_outputs")
            if proposals is not None:
                # They know one class, an object, or all.
                labels = padded.labels if self.class_aware else torch.zeros_like(padded.labels)
                proposed = padded._replace(labels=labels)
                sets.append((proposals, proposed))
            with self.region("matching"):
                matches = self.matcher.match_sets(sets)

            losses: dict[str, Tensor] = {}
            decoder_losses = self._losses(layers, padded, matches[: len(layers)], num_boxes)
            for name, values in decoder_losses.items():
                for layer, value in enumerate(values):
                    losses[name if layer == 0 else f"{name}_{layer - 1}"] = value
            losses.update(self._diagnostics(outputs, padded, matches[0]))
            if proposals is not None:
                for name, values in self._losses([proposals], proposed, matches[-1:], num_boxes).items():
                    losses[f"{name}_enc"] = values[0]
            losses.update(self._auxiliary_losses(outputs, padded, num_boxes))
            return losses

    def total(self, losses: dict[str, Tensor]) -> Tensor:
        """The weighted sum, a scalar."""
        return sum(losses[name] * weight for name, weight in self.weight_dict.items() if name in losses)

    def _auxiliary_losses(self, outputs: dict[str, Any], targets: PaddedTargets, num_boxes: float) -> dict[str, Tensor]:
        """Of the passes that exist in training alone, of as many layers as have a loss in the network itself."""
        losses: dict[str, Tensor] = {}
        numbers = [*(f"_{layer}" for layer in range(self.num_aux)), ""]  # the last layer has none, as everywhere
        if (denoising := outputs.get("denoising")) is not None:
            layers = denoising.layers[-len(numbers) :]
            # An object counts once, in however many groups it is.
            found = self._losses(layers, targets, [denoising.matches] * len(layers), num_boxes * denoising.num_groups)
            for name, values in found.items():
                losses |= {f"{name}{DENOISING}{number}": value for number, value in zip(numbers, values)}
        for number, layer in zip(numbers, outputs.get("one_to_many", [])[-len(numbers) :]):
            with self.region("matching"):
                matches = match_one_to_many(layer, targets, self.one_to_many)
            found = self._losses([layer], targets, [matches], num_boxes, self._shares(matches, targets))
            losses |= {f"{name}{ONE_TO_MANY}{number}": values[0] for name, values in found.items()}
        return losses

    @staticmethod
    def _shares(matches: Matches, targets: PaddedTargets) -> Tensor:
        """(N,) what an image counts, whose objects have several queries: as if they had one each on average. A rule of
        each image by itself, so that how a step is cut into micro-batches changes nothing."""
        num_objects = sent(torch.tensor(targets.sizes, dtype=torch.float32), matches.images.device)
        num_pairs = torch.zeros_like(num_objects).index_add_(0, matches.images, torch.ones_like(matches.images).float())
        return torch.where(num_pairs > 0, num_objects / num_pairs.clamp(min=1), 1.0)

    def _losses(
        self,
        sets: Sequence[dict[str, Any]],
        targets: PaddedTargets,
        matches: Sequence[Matches],
        num_boxes: float,
        shares: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """(G,) losses by name. Every set has as many pairs as every other, so that they lie in one tensor.

        shares: (N,) what each image counts; by default all the same.
        """
        logits = torch.stack([outputs["pred_logits"].float() for outputs in sets])  # (G, N, Q, K)
        boxes = torch.stack([outputs["pred_boxes"].float() for outputs in sets])  # (G, N, Q, 4)
        images = torch.stack([match.images for match in matches])  # (G, n)
        queries = torch.stack([match.queries for match in matches])
        objects = torch.stack([match.objects for match in matches])
        group = torch.arange(len(sets), device=logits.device)[:, None].expand_as(images)

        predicted, wanted = boxes[group, images, queries], targets.boxes[images, objects]  # (G, n, 4)
        corners, wanted_corners = box_cxcywh_to_xyxy(predicted), box_cxcywh_to_xyxy(wanted)
        loss_bbox = F.l1_loss(predicted, wanted, reduction="none")  # (G, n, 4)
        loss_giou = 1 - generalized_iou(corners, wanted_corners)  # (G, n)

        positive = (group, images, queries, targets.labels[images, objects])
        if self.loss_weights.classification == "focal":
            # Not `one_hot[...] = 1.0`: on a GPU that is a number of the host's, for which it would wait.
            one_hot = torch.zeros_like(logits).index_put_(positive, logits.new_ones(()))
            loss_ce = sigmoid_focal_loss(logits, one_hot, self.loss_weights.focal_alpha)  # (G, N, Q, K)
        else:
            ious = broadcast_iou(corners, wanted_corners).detach()
            loss_ce = _IOU_AWARE[self.loss_weights.classification](logits, positive, ious)
        if shares is not None:
            loss_ce = loss_ce * shares[:, None, None]
            loss_bbox, loss_giou = loss_bbox * shares[images][..., None], loss_giou * shares[images]
        loss_ce, loss_bbox, loss_giou = loss_ce.sum((1, 2, 3)), loss_bbox.sum((1, 2)), loss_giou.sum(1)
        return {
            "loss_ce": loss_ce / num_boxes,
            "loss_bbox": loss_bbox / num_boxes,
            "loss_giou": loss_giou / num_boxes,
        }

    @torch.no_grad()
    def _diagnostics(self, outputs: dict[str, Any], targets: PaddedTargets, match: Matches) -> dict[str, Tensor]:
        """Share of matched predictions with another best class, in percent; and the mean miscount of objects."""
        logits = outputs["pred_logits"]
        best = logits[match.images, match.queries].argmax(-1)
        right = (best == targets.labels[match.images, match.objects]).float()
        # A query counts as an object where its best class is more likely than not; the official code compares the best
        # class with the last one, which in a head without a background class is an ordinary class.
        counted = (logits.amax(-1) > 0).float().sum(1)
        true = sent(torch.tensor(targets.sizes, dtype=torch.float32), logits.device)
        return {
            "class_error": 100 - 100 * right.mean() if len(right) else logits.new_zeros(()).float(),
            "cardinality_error": (counted - true).abs().mean(),
        }


def ia_bce_loss(logits: Tensor, positive: tuple[Tensor, ...], ious: Tensor, alpha: float = 0.25) -> Tensor:
    """Element-wise IoU-aware cross entropy (Align-DETR, arXiv:2304.07527, eq. 4 to 6): a matched prediction's target is
    p^alpha * IoU^(1 - alpha), at least 0.01; all others are negative with weight p^2.

    Args:
        logits: any shape.
        positive: indices of the matched predictions' own class.
        ious: of their boxes with the objects'.
    """
    p = logits.sigmoid()
    target = (p[positive].detach() ** alpha * ious ** (1 - alpha)).clamp(min=0.01)
    negative = p**2 * F.softplus(logits)  # -log(1 - p)
    matched = F.binary_cross_entropy_with_logits(logits[positive], target, reduction="none")
    return negative.index_put(positive, matched)


def mal_loss(logits: Tensor, positive: tuple[Tensor, ...], ious: Tensor, gamma: float = 1.5) -> Tensor:
    """Element-wise matchability-aware loss (DEIM, arXiv:2412.04234, eq. 4): a matched prediction's target is IoU^gamma;
    all others are negative with weight p^gamma. Arguments as of `ia_bce_loss`."""
    negative = logits.sigmoid().detach() ** gamma * F.softplus(logits)
    matched = F.binary_cross_entropy_with_logits(logits[positive], ious**gamma, reduction="none")
    return negative.index_put(positive, matched)


_IOU_AWARE = {"ia_bce": ia_bce_loss, "mal": mal_loss}


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Element-wise focal loss (arXiv:1708.02002, eq. 5) of logits against 0/1 targets of the same shape."""
    p = logits.sigmoid()
    cross_entropy = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    p_t = p * targets + (1 - p) * (1 - targets)
    alpha_t = alpha * targets + (1 - alpha) * (1 - targets)
    return alpha_t * (1 - p_t) ** gamma * cross_entropy


def global_num_boxes(num_boxes: int, device: torch.device) -> float:
    """Objects per process, averaged over all processes, at least 1. Every process must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return max(float(num_boxes), 1.0)
    total = sent(torch.tensor([float(num_boxes)]), device)
    dist.all_reduce(total)
    return max(total.item() / dist.get_world_size(), 1.0)

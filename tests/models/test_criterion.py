"""The losses: against values worked out by hand, and against the formulas written again in float64 numpy."""

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddetr.models.criterion import (
    LossWeights,
    SetCriterion,
    global_num_boxes,
    ia_bce_loss,
    mal_loss,
    sigmoid_focal_loss,
)
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

Targets = list[dict[str, Tensor]]


def target(labels: list[int], boxes: list[list[float]]) -> dict[str, Tensor]:
    return {
        "labels": torch.tensor(labels, dtype=torch.long),
        "boxes": torch.tensor(boxes, dtype=torch.float32).view(-1, 4),
    }


def random_outputs(n: int, q: int, k: int, *, aux: int = 0, cells: int = 0) -> dict[str, Any]:
    def layer(q: int) -> dict[str, Tensor]:
        centres, sizes = torch.rand(n, q, 2) * 0.6 + 0.2, torch.rand(n, q, 2) * 0.3 + 0.05
        return {"pred_logits": torch.randn(n, q, k), "pred_boxes": torch.cat((centres, sizes), -1)}

    outputs: dict[str, Any] = layer(q)
    if aux:
        outputs["aux_outputs"] = [layer(q) for _ in range(aux)]
    if cells:
        outputs["enc_outputs"] = layer(cells)
    return outputs


def random_targets(counts: list[int], k: int) -> Targets:
    return [
        target(
            torch.randint(k, (count,)).tolist(),
            torch.cat((torch.rand(count, 2) * 0.6 + 0.2, torch.rand(count, 2) * 0.3 + 0.05), -1).tolist(),
        )
        for count in counts
    ]


# --- the formulas once more, in float64, one number at a time ---------------------------------------------------------


def iou_of(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2), np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    intersection = float(np.prod(np.maximum(high - low, 0)))
    return intersection / float(np.prod(a[2:]) + np.prod(b[2:]) - intersection)


def giou_of(a: np.ndarray, b: np.ndarray) -> float:
    (ax1, ay1), (ax2, ay2) = a[:2] - a[2:] / 2, a[:2] + a[2:] / 2
    (bx1, by1), (bx2, by2) = b[:2] - b[2:] / 2, b[:2] + b[2:] / 2
    intersection = max(0.0, min(ax2, bx2) - max(ax1, bx1)) * max(0.0, min(ay2, by2) - max(ay1, by1))
    union = (ax2 - ax1) * (ay2 - ay1) + (bx2 - bx1) * (by2 - by1) - intersection
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return intersection / union - (hull - union) / hull


def losses_by_the_book(layer: dict[str, Tensor], targets: Targets, pairs: list, num_boxes: float) -> dict[str, float]:
    logits, boxes = layer["pred_logits"].double().numpy(), layer["pred_boxes"].double().numpy()
    focal = l1 = giou = 0.0
    for image, ((queries, objects), objects_of_image) in enumerate(zip(pairs, targets)):
        class_of_query = {
            int(q): int(objects_of_image["labels"][int(o)]) for q, o in zip(queries.tolist(), objects.tolist())
        }
        for query, row in enumerate(logits[image]):
            for label, logit in enumerate(row):
                p = 1 / (1 + math.exp(-logit))
                if class_of_query.get(query) == label:
                    focal += 0.25 * (1 - p) ** 2 * -math.log(p)
                else:
                    focal += 0.75 * p**2 * -math.log(1 - p)
        for query, index in zip(queries.tolist(), objects.tolist()):
            wanted = objects_of_image["boxes"][index].double().numpy()
            l1 += np.abs(boxes[image, query] - wanted).sum()
            giou += 1 - giou_of(boxes[image, query], wanted)
    return {"loss_ce": focal / num_boxes, "loss_bbox": l1 / num_boxes, "loss_giou": giou / num_boxes}


def test_losses_equal_the_formulas() -> None:
    """Last layer, every other layer, and proposals, each with its own matching and one class for proposals."""
    torch.manual_seed(0)
    k = 4
    outputs = random_outputs(3, 9, k, aux=2, cells=25)
    targets = random_targets([3, 0, 5], k)
    criterion = SetCriterion(k, num_aux=2, two_stage=True)
    losses = criterion(outputs, targets)

    any_object = [{**t, "labels": torch.zeros_like(t["labels"])} for t in targets]
    sets = [("", outputs, targets), ("_enc", outputs["enc_outputs"], any_object)]
    sets += [(f"_{i}", layer, targets) for i, layer in enumerate(outputs["aux_outputs"])]
    for suffix, layer, wanted in sets:
        expected = losses_by_the_book(layer, wanted, criterion.matcher(layer, wanted), num_boxes=8)
        for name, value in expected.items():
            assert losses[name + suffix].item() == pytest.approx(value, rel=1e-5), name + suffix
    assert set(criterion.weight_dict) == set(losses) - {"class_error", "cardinality_error"}


def test_losses_by_hand() -> None:
    """One query on one object, half a box beside it; all values from pencil and paper."""
    outputs = {
        "pred_logits": torch.tensor([[[0.0, math.log(3)]]]),
        "pred_boxes": torch.tensor([[[0.5, 0.5, 0.2, 0.4]]]),
    }
    losses = SetCriterion(2)(outputs, [target([1], [[0.6, 0.5, 0.2, 0.4]])])
    # Probabilities 1/2 (not the class) and 3/4 (the class).
    assert losses["loss_ce"].item() == pytest.approx(0.75 / 4 * math.log(2) + 0.25 / 16 * math.log(4 / 3), rel=1e-5)
    assert losses["loss_bbox"].item() == pytest.approx(0.1, rel=1e-5)
    # Intersection 0.1*0.4, union and hull 0.3*0.4: a third, and nothing of the hull is empty.
    assert losses["loss_giou"].item() == pytest.approx(1 - 1 / 3, rel=1e-5)
    assert losses["class_error"].item() == 0
    assert losses["cardinality_error"].item() == 0


def test_weights_of_losses() -> None:
    weights = SetCriterion(3, num_aux=5, two_stage=True).weight_dict
    assert len(weights) == 3 * 7
    for suffix in ("", "_0", "_4", "_enc"):
        assert weights["loss_ce" + suffix] == 2
        assert weights["loss_bbox" + suffix] == 5
        assert weights["loss_giou" + suffix] == 2
    assert set(SetCriterion(3).weight_dict) == {"loss_ce", "loss_bbox", "loss_giou"}


def test_total_weighs_every_loss_and_nothing_else() -> None:
    criterion = SetCriterion(2, LossWeights(cls_loss_coef=1, bbox_loss_coef=10, giou_loss_coef=100), num_aux=1)
    losses = {name: torch.tensor(1.0) for name in [*criterion.weight_dict, "class_error", "cardinality_error"]}
    assert criterion.total(losses) == 2 * 111


def test_keys_fit_the_model(small_variant: dict[str, Any]) -> None:
    model = DeformableDETR(**small_variant)
    criterion = build_criterion(model)
    losses = criterion(model(torch.rand(1, 3, 64, 64)), [target([1], [[0.5, 0.5, 0.3, 0.3]])])
    assert set(criterion.weight_dict) == set(losses) - {"class_error", "cardinality_error"}
    num_sets = small_variant["dec_layers"] + small_variant.get("two_stage", False)
    assert len(criterion.weight_dict) == 3 * num_sets


def test_batch_without_any_object() -> None:
    torch.manual_seed(0)
    outputs = random_outputs(2, 6, 3, aux=1, cells=10)
    for layer in [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]:
        layer["pred_logits"].requires_grad_()
        layer["pred_boxes"].requires_grad_()
    criterion = SetCriterion(3, num_aux=1, two_stage=True)
    losses = criterion(outputs, [target([], [])] * 2)
    expected = losses_by_the_book(
        {name: tensor.detach() for name, tensor in outputs.items() if name.startswith("pred_")},
        [target([], [])] * 2,
        [(torch.zeros(0), torch.zeros(0))] * 2,
        num_boxes=1,
    )
    assert losses["loss_ce"].item() == pytest.approx(expected["loss_ce"], rel=1e-5)
    assert losses["loss_bbox"] == losses["loss_giou"] == losses["loss_bbox_enc"] == 0
    criterion.total(losses).backward()
    for layer in [outputs, *outputs["aux_outputs"], outputs["enc_outputs"]]:
        assert layer["pred_logits"].grad.any()
        assert not layer["pred_boxes"].grad.any(), "a gradient, of zeros: other processes wait for it"


def test_more_objects_than_queries() -> None:
    """The best pairs count, the other objects cannot be predicted; the number of objects still divides."""
    torch.manual_seed(0)
    outputs, targets = random_outputs(1, 3, 2), random_targets([7], 2)
    criterion = SetCriterion(2)
    losses = criterion(outputs, targets)
    pairs = criterion.matcher(outputs, targets)
    assert sorted(pairs[0][0].tolist()) == [0, 1, 2]
    expected = losses_by_the_book(outputs, targets, pairs, num_boxes=7)
    for name, value in expected.items():
        assert losses[name].item() == pytest.approx(value, rel=1e-5)


def test_num_boxes_of_a_larger_batch() -> None:
    torch.manual_seed(0)
    outputs, targets = random_outputs(1, 5, 2), random_targets([2], 2)
    whole, part = SetCriterion(2)(outputs, targets), SetCriterion(2)(outputs, targets, num_boxes=8)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert part[name].item() == pytest.approx(whole[name].item() / 4, rel=1e-5)
    assert global_num_boxes(0, torch.device("cpu")) == 1
    assert global_num_boxes(5, torch.device("cpu")) == 5


def test_num_boxes_is_averaged_over_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three processes of which the others have 1 and 4 objects; a process without any takes part all the same."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 3)
    monkeypatch.setattr("torch.distributed.all_reduce", lambda total: total.add_(5))
    assert global_num_boxes(4, torch.device("cpu")) == 3
    assert global_num_boxes(0, torch.device("cpu")) == pytest.approx(5 / 3)


def test_loss_does_not_depend_on_the_batch_of_an_image() -> None:
    """Sums over images that are divided by all objects: no image sees the padding of another's targets."""
    torch.manual_seed(0)
    outputs, targets = random_outputs(3, 8, 4), random_targets([1, 6, 0], 4)
    criterion = SetCriterion(4)
    together = criterion(outputs, targets, num_boxes=1)
    apart = [
        criterion({name: tensor[i : i + 1] for name, tensor in outputs.items()}, targets[i : i + 1], num_boxes=1)
        for i in range(3)
    ]
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert together[name].item() == pytest.approx(sum(losses[name].item() for losses in apart), rel=1e-5)


def test_non_finite_predictions_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    outputs, targets = random_outputs(2, 4, 2), random_targets([2, 1], 2)
    outputs["pred_boxes"][0, 1] = float("nan")
    outputs["pred_logits"][0, 2] = float("inf")
    with caplog.at_level(logging.WARNING):
        losses = SetCriterion(2)(outputs, targets)
    assert "image 0 in the batch are not finite" in caplog.text
    assert "image 1" not in caplog.text
    assert set(losses) >= {"loss_ce", "loss_bbox", "loss_giou"}


def test_half_precision_outputs_give_float32_losses() -> None:
    torch.manual_seed(0)
    outputs, targets = random_outputs(1, 5, 3), random_targets([2], 3)
    outputs["pred_logits"] = outputs["pred_logits"].bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = SetCriterion(3)(outputs, targets)
    exact = SetCriterion(3)({**outputs, "pred_logits": outputs["pred_logits"].float()}, targets)
    for name in ("loss_ce", "loss_bbox", "loss_giou"):
        assert losses[name].dtype == torch.float32
        assert losses[name].item() == exact[name].item()


def test_diagnostics() -> None:
    logits = torch.full((1, 4, 3), -5.0)
    logits[0, 0, 1] = logits[0, 1, 2] = logits[0, 2, 1] = 5.0
    boxes = torch.tensor([[[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1], [0.5, 0.2, 0.1, 0.1], [0.2, 0.8, 0.1, 0.1]]])
    targets = [target([1, 0], [[0.2, 0.2, 0.1, 0.1], [0.8, 0.8, 0.1, 0.1]])]
    losses = SetCriterion(3)({"pred_logits": logits, "pred_boxes": boxes}, targets)
    assert losses["class_error"] == 50
    assert losses["cardinality_error"] == 1


def test_focal_loss_elementwise() -> None:
    logits = torch.tensor([-40.0, -1.0, 0.0, 2.0, 40.0], dtype=torch.float64)
    p = logits.sigmoid()
    positive = sigmoid_focal_loss(logits, torch.ones_like(logits))
    negative = sigmoid_focal_loss(logits, torch.zeros_like(logits))
    torch.testing.assert_close(positive[1:], -0.25 * (1 - p[1:]) ** 2 * p[1:].log())
    torch.testing.assert_close(negative[:-1], -0.75 * p[:-1] ** 2 * (1 - p[:-1]).log())
    assert positive[0].item() == pytest.approx(10), "no overflow for a logit that float cannot tell from certainty"
    assert negative[-1].item() == pytest.approx(30)


@pytest.mark.parametrize("kind", ["ia_bce", "mal"])
def test_iou_aware_class_losses_equal_their_formulas(kind: str) -> None:
    """Align-DETR: target p^0.25 * IoU^0.75, others weigh p^2. DEIM: target IoU^1.5, others weigh p^1.5."""
    torch.manual_seed(3)
    outputs, targets = random_outputs(2, 6, 3), random_targets([2, 1], 3)
    criterion = SetCriterion(3, LossWeights(classification=kind))
    pairs = criterion.matcher(outputs, targets)
    found = criterion(outputs, targets, num_boxes=3.0)
    p = 1 / (1 + np.exp(-outputs["pred_logits"].double().numpy()))
    boxes = outputs["pred_boxes"].double().numpy()
    expected, positive = 0.0, set()
    for image, (queries, objects) in enumerate(pairs):
        for query, place in zip(queries.tolist(), objects.tolist()):
            label = int(targets[image]["labels"][place])
            positive.add((image, query, label))
            iou = iou_of(boxes[image, query], targets[image]["boxes"][place].double().numpy())
            score = p[image, query, label]
            wanted = max(0.01, score**0.25 * iou**0.75) if kind == "ia_bce" else iou**1.5
            expected -= wanted * math.log(score) + (1 - wanted) * math.log(1 - score)
    for place in np.ndindex(p.shape):
        if place not in positive:
            expected -= p[place] ** (2.0 if kind == "ia_bce" else 1.5) * math.log(1 - p[place])
    assert found["loss_ce"].item() == pytest.approx(expected / 3, rel=1e-5)
    for name, value in SetCriterion(3)(outputs, targets, num_boxes=3.0).items():
        if name != "loss_ce":
            assert torch.equal(found[name], value)  # boxes and matching are as ever


@pytest.mark.parametrize("kind", ["ia_bce", "mal"])
def test_iou_aware_targets_are_constants(kind: str) -> None:
    """No gradient flows through the target: into the score of the matched query there flows p - target."""
    logits = torch.randn(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)
    positive = tuple(torch.tensor([[i]]) for i in (0, 0, 1, 0))
    ious = torch.tensor([[0.6]], dtype=torch.float64, requires_grad=True)
    loss = (ia_bce_loss if kind == "ia_bce" else mal_loss)(logits, positive, ious.detach())
    loss.sum().backward()
    p = logits.detach().sigmoid()[0, 0, 1, 0]
    wanted = p**0.25 * 0.6**0.75 if kind == "ia_bce" else 0.6**1.5
    assert logits.grad[0, 0, 1, 0].item() == pytest.approx(float(p - wanted), rel=1e-9)
    assert logits.grad.abs().min() > 0

"""The assignment: against all permutations, and against the plain formula an image at a time."""

import itertools
import logging

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from ddetr.models.matcher import HungarianMatcher, PaddedTargets


def random_case(seed: int, counts: list[int], q: int, k: int) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)

    def boxes(*shape: int) -> Tensor:
        return torch.rand(*shape, 4, generator=generator) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + 0.1

    n = len(counts)
    outputs = {"pred_logits": torch.randn(n, q, k, generator=generator) * 3, "pred_boxes": boxes(n, q)}
    targets = [{"labels": torch.randint(k, (c,), generator=generator), "boxes": boxes(c)} for c in counts]
    return outputs, targets


def plain_cost(logits: Tensor, boxes: Tensor, labels: Tensor, wanted: Tensor) -> np.ndarray:
    """(Q, T) of one image, as the official code writes it, in float64."""
    p = logits.double().sigmoid()
    positive = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log()
    negative = 0.75 * p**2 * -(1 - p + 1e-8).log()
    class_cost = (positive - negative)[:, labels]
    a, b = boxes.double()[:, None], wanted.double()[None]
    l1 = (a - b).abs().sum(-1)
    a1, a2, b1, b2 = (box[..., :2] + sign * box[..., 2:] / 2 for box in (a, b) for sign in (-1, 1))
    intersection = (torch.minimum(a2, b2) - torch.maximum(a1, b1)).clamp(min=0).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - intersection
    hull = (torch.maximum(a2, b2) - torch.minimum(a1, b1)).prod(-1)
    giou = intersection / union - (hull - union) / hull
    return (2 * class_cost + 5 * l1 - 2 * giou).numpy()


@pytest.mark.parametrize("seed", range(6))
def test_equals_the_best_of_all_permutations(seed: int) -> None:
    outputs, targets = random_case(seed, [3, 4, 1], q=5, k=3)
    for image, (queries, objects) in enumerate(HungarianMatcher()(outputs, targets)):
        t = targets[image]
        cost = plain_cost(outputs["pred_logits"][image], outputs["pred_boxes"][image], t["labels"], t["boxes"])
        count = len(t["labels"])
        best = min(cost[list(order), range(count)].sum() for order in itertools.permutations(range(5), count))
        assert cost[queries, objects].sum() == pytest.approx(best, abs=1e-5)
        assert sorted(objects.tolist()) == list(range(count))
        assert len(set(queries.tolist())) == count


def test_equals_scipy_on_the_plain_formula() -> None:
    outputs, targets = random_case(0, [20, 0, 7, 33], q=60, k=11)
    matches = HungarianMatcher()(outputs, targets)
    for image, (queries, objects) in enumerate(matches):
        t = targets[image]
        cost = plain_cost(outputs["pred_logits"][image], outputs["pred_boxes"][image], t["labels"], t["boxes"])
        expected = dict(zip(*(index.tolist() for index in linear_sum_assignment(cost))))
        assert dict(zip(queries.tolist(), objects.tolist())) == expected
        assert queries.dtype == objects.dtype == torch.int64


def test_several_sets_equal_each_alone() -> None:
    first, targets = random_case(1, [4, 2], q=9, k=3)
    second, _ = random_case(2, [4, 2], q=30, k=3)
    padded = PaddedTargets.of(targets, torch.device("cpu"))
    one_class = padded._replace(labels=torch.zeros_like(padded.labels))
    matcher = HungarianMatcher()
    together = matcher.match_sets([(first, padded), (second, one_class)])
    alone = [matcher.match_sets([(first, padded)])[0], matcher.match_sets([(second, one_class)])[0]]
    for got, expected in zip(together, alone):
        assert all(a.equal(b) for a, b in zip(got, expected))
    assert together[0].images.tolist() == [0, 0, 0, 0, 1, 1]


@pytest.mark.parametrize("counts", [[4, 4], [40, 3, 0, 1], [0, 0]])
def test_sets_of_one_shape_computed_at_once_are_the_same(counts: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers are stacked, proposals are by themselves; their order is kept."""
    layers = [random_case(seed, counts, q=50, k=4)[0] for seed in (1, 2, 3)]
    proposals, targets = random_case(4, counts, q=90, k=4)
    padded = PaddedTargets.of(targets, torch.device("cpu"))
    one_class = padded._replace(labels=torch.zeros_like(padded.labels))
    sets = [(layers[0], padded), (proposals, one_class), (layers[1], padded), (layers[2], padded)]
    expected = [HungarianMatcher().match_sets([one])[0] for one in sets]
    stacked: list[int] = []
    original = HungarianMatcher._cost

    def cost(self: HungarianMatcher, group: list[dict[str, Tensor]], targets: PaddedTargets) -> Tensor:
        stacked.append(len(group))
        return original(self, group, targets)

    monkeypatch.setattr(HungarianMatcher, "_cost", cost)
    for got, wanted in zip(HungarianMatcher().match_sets(sets), expected):
        assert all(a.equal(b) for a, b in zip(got, wanted))
        assert len(got.images) == sum(counts)
    assert stacked == [3, 1]


def test_padding_is_not_computed() -> None:
    """One crowded image among many: the costs have as many rows as there are objects, not as many as images times
    most."""
    for counts in ([10, 10, 9], [100, 1, 2, 0]):
        outputs, targets = random_case(0, counts, q=120, k=5)
        outputs["pred_logits"] /= 3  # float32 keeps few digits of 1 - p where p is nearly 1
        padded = PaddedTargets.of(targets, torch.device("cpu"))
        cost = HungarianMatcher()._cost([outputs, outputs], padded)
        assert cost.shape == (2, sum(counts), 120)
        for image, (rows, t) in enumerate(zip(cost[1].split(counts), targets)):
            plain = plain_cost(outputs["pred_logits"][image], outputs["pred_boxes"][image], t["labels"], t["boxes"])
            assert np.allclose(rows.numpy(), plain.T, atol=1e-4)


def test_images_without_objects() -> None:
    outputs, targets = random_case(0, [0, 0], q=4, k=2)
    assert [(len(q), len(o)) for q, o in HungarianMatcher()(outputs, targets)] == [(0, 0), (0, 0)]
    outputs, targets = random_case(0, [0, 2, 0], q=4, k=2)
    assert [len(q) for q, _ in HungarianMatcher()(outputs, targets)] == [0, 2, 0]


def test_more_objects_than_queries() -> None:
    outputs, targets = random_case(0, [9], q=4, k=2)
    ((queries, objects),) = HungarianMatcher()(outputs, targets)
    assert sorted(queries.tolist()) == [0, 1, 2, 3]
    assert len(set(objects.tolist())) == 4


def test_weights_of_the_costs() -> None:
    """Each cost alone decides where the others weigh nothing."""
    outputs = {
        "pred_logits": torch.tensor([[[4.0, -4.0], [-4.0, 4.0], [0.0, 0.0]]]),
        "pred_boxes": torch.tensor([[[0.9, 0.9, 0.1, 0.1], [0.3, 0.3, 0.04, 0.04], [0.3, 0.3, 0.5, 0.5]]]),
    }
    targets = [{"labels": torch.tensor([0]), "boxes": torch.tensor([[0.3, 0.3, 0.2, 0.2]])}]
    assert HungarianMatcher(1, 0, 0)(outputs, targets)[0][0].item() == 0
    assert HungarianMatcher(0, 1, 0)(outputs, targets)[0][0].item() == 1  # off by 0.32, the other by 0.6
    assert HungarianMatcher(0, 0, 1)(outputs, targets)[0][0].item() == 2  # IoU 0.16, the other 0.04


def test_non_finite_predictions_match_last(caplog: pytest.LogCaptureFixture) -> None:
    outputs, targets = random_case(0, [3], q=4, k=2)
    outputs["pred_boxes"][0, 2] = float("nan")
    with caplog.at_level(logging.WARNING):
        ((queries, objects),) = HungarianMatcher()(outputs, targets)
    assert sorted(queries.tolist()) == [0, 1, 3]
    assert sorted(objects.tolist()) == [0, 1, 2]
    assert "3 of 12 costs of image 0" in caplog.text

    outputs["pred_boxes"][:] = float("nan")
    ((queries, _),) = HungarianMatcher()(outputs, targets)
    assert len(queries) == 3


def test_padded_targets() -> None:
    _, targets = random_case(0, [2, 0, 3], q=1, k=5)
    padded = PaddedTargets.of(targets, torch.device("cpu"))
    assert padded.labels.shape == (3, 3)
    assert padded.boxes.shape == (3, 3, 4)
    assert padded.sizes == [2, 0, 3]
    assert padded.labels[0, :2].equal(targets[0]["labels"])
    assert padded.boxes[2].equal(targets[2]["boxes"])

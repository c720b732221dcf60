"""What trains beside the network: denoising queries, the one-to-many route, and their losses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy, box_iou
from ddetr.checkpoint import Checkpoint
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.auxiliary import Auxiliary, AuxiliaryConfig, attach_auxiliary, keeping_encoded
from ddetr.models.criterion import LossWeights, SetCriterion, sigmoid_focal_loss
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.models.matcher import PaddedTargets, match_one_to_many

ALL = AuxiliaryConfig(denoising=6, one_to_many=3)
VARIANTS: dict[str, dict[str, Any]] = {
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
TARGETS = [
    {"labels": torch.tensor([0, 4]), "boxes": torch.tensor([[0.3, 0.4, 0.2, 0.3], [0.6, 0.5, 0.5, 0.9]])},
    {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])},
]
EMPTY = [{"labels": torch.zeros(0, dtype=torch.long), "boxes": torch.zeros(0, 4)}] * 2


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


def make(small: dict[str, Any], variant: dict[str, Any], config: AuxiliaryConfig = ALL) -> DeformableDETR:
    torch.manual_seed(0)
    model = DeformableDETR(**small | {"dropout": 0.0}, **variant).train()
    for head in model.bbox_embed:  # that start as zero, through which no gradient would come
        torch.nn.init.normal_(head.layers[-1].weight, std=0.05)
    attach_auxiliary(model, config)
    return model


def images(n: int = 2) -> Tensor:
    return torch.rand(n, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def outputs_and_losses(
    model: DeformableDETR, targets: list[dict[str, Tensor]], num_boxes: float | None = None
) -> tuple[dict[str, Any], dict[str, Tensor], SetCriterion]:
    outputs = keeping_encoded(model)(images(len(targets)), None)
    outputs |= model.auxiliary(model, outputs.pop("encoded"), targets)
    criterion = build_criterion(model)
    return outputs, criterion(outputs, targets, num_boxes), criterion


# --- denoising queries ------------------------------------------------------------------------------------------------


def noised(config: AuxiliaryConfig, targets: list[dict[str, Tensor]] = TARGETS) -> Any:
    model = DeformableDETR.__new__(DeformableDETR)
    torch.nn.Module.__init__(model)
    model.config = {"num_classes": 5, "hidden_dim": 8, "dim_feedforward": 8, "dropout": 0.0, "dec_layers": 1}
    model.two_stage = True
    return Auxiliary(model, config).noised(PaddedTargets.of(targets, torch.device("cpu")))


def test_groups_of_denoising_queries_by_hand() -> None:
    """7 // 2 = 3 groups of two objects, each to be found again and to be refused; the second image has one object."""
    found = noised(AuxiliaryConfig(denoising=7, label_noise=0.0, box_noise=0.0))
    assert found.num_groups == 3
    assert found.labels.shape == (2, 12)
    assert found.labels[0].tolist() == [0, 4] * 6
    torch.testing.assert_close(found.boxes[0], TARGETS[0]["boxes"].repeat(6, 1))
    assert found.is_used.tolist() == [[True] * 12, [True, False] * 6]
    assert found.labels[1, ::2].tolist() == [2] * 6
    pairs = list(zip(*[row.tolist() for row in found.matches]))
    assert pairs == [(i, g * 4 + o, o) for g in range(3) for i, o in ((0, 0), (0, 1), (1, 0))]


def test_groups_do_not_see_each_other_nor_queries_that_are_none() -> None:
    unseen = noised(AuxiliaryConfig(denoising=7)).unseen
    for image, used in enumerate([[True] * 12, [True, False] * 6]):
        for query in range(12):
            for other in range(12):
                sees = query == other or (query // 4 == other // 4 and used[other])
                assert unseen[image, query, other] == (not sees)


def test_noise_is_as_large_as_it_says() -> None:
    """Sides move by less than half of the box where it is to be found again, by more where it is to be refused."""
    torch.manual_seed(0)
    target = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.1, 0.2]])}]
    found = noised(AuxiliaryConfig(denoising=2000, box_noise=0.8), target)
    corners = box_cxcywh_to_xyxy(found.boxes[0]).unflatten(0, (2000, 2))  # (groups, to be found or refused, 4)
    halves = torch.tensor([0.05, 0.1, 0.05, 0.1])
    moved = (corners - box_cxcywh_to_xyxy(target[0]["boxes"])).abs() / halves
    assert moved[:, 0].max() <= 0.8 + 1e-4
    assert moved[:, 0].mean() == pytest.approx(0.4, abs=0.02)
    assert (moved[:, 1] >= 0.8 - 1e-4).float().mean() > 0.6  # not all: sides that cross change places
    assert found.boxes[0, :, 2:].min() >= 1e-3 - 1e-6
    assert corners.min() >= -1e-3
    assert corners.max() <= 1 + 1e-3
    is_other = (found.labels != 1).float().mean()
    assert is_other == pytest.approx(0.25 * 4 / 5, abs=0.03)  # half of the label noise; a fifth of them draws class 1


def test_more_objects_than_denoising_queries_make_one_group() -> None:
    found = noised(AuxiliaryConfig(denoising=1))
    assert (found.num_groups, found.labels.shape) == (1, (2, 4))


def test_no_object_makes_queries_that_are_none() -> None:
    found = noised(ALL, EMPTY)
    assert not found.is_used.any()
    assert len(found.matches.images) == 0
    assert not found.unseen.all(-1).any()  # each sees itself: softmax over nothing is NaN


# --- the network beside them ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_training", [True, False])
def test_outputs_and_losses_of_the_network_do_not_change_by_a_bit(
    small: dict[str, Any], variant: dict[str, Any], is_training: bool
) -> None:
    plain, beside = (make(small, variant, config).train(is_training) for config in (AuxiliaryConfig(), ALL))
    assert plain.auxiliary is None
    expected = plain(images())
    outputs, losses, criterion = outputs_and_losses(beside, TARGETS)
    for name in ("pred_logits", "pred_boxes"):
        assert torch.equal(outputs[name], expected[name])
        for ours, theirs in zip(outputs["aux_outputs"], expected["aux_outputs"]):
            assert torch.equal(ours[name], theirs[name])
    for name, value in build_criterion(plain)(expected, TARGETS).items():
        assert torch.equal(losses[name], value)
    assert set(criterion.weight_dict) <= set(losses)


def test_every_parameter_gets_a_gradient(small: dict[str, Any], variant: dict[str, Any]) -> None:
    model = make(small, variant)
    _, losses, criterion = outputs_and_losses(model, TARGETS)
    criterion.total(losses).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad(set_to_none=True)
    sum(losses_of(model, TARGETS, ("_dn", "_o2m"))).backward()
    reached = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert {n for n, _ in model.named_parameters() if n.startswith("auxiliary.")} <= reached
    assert any(n.startswith("backbone.") for n in reached)


def losses_of(model: DeformableDETR, targets: list[dict[str, Tensor]], ends: tuple[str, ...]) -> list[Tensor]:
    _, losses, _ = outputs_and_losses(model, targets)
    return [value for name, value in losses.items() if any(end in name for end in ends)]


def test_a_batch_without_objects_reaches_the_same_parameters(small: dict[str, Any], variant: dict[str, Any]) -> None:
    """DistributedDataParallel waits for the gradient of every parameter, on every process."""
    model = make(small, variant)
    _, losses, criterion = outputs_and_losses(model, EMPTY)
    assert all(losses[name] == 0 for name in losses if name.startswith("loss") and "_dn" in name)
    total = criterion.total(losses)
    total.backward()
    assert total.isfinite()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_the_published_network_is_the_plain_one(small: dict[str, Any], variant: dict[str, Any]) -> None:
    model, plain = make(small, variant), make(small, variant, AuxiliaryConfig())
    categories = [Category(i, str(i)) for i in range(5)]
    published = Checkpoint.of(model, categories)
    assert list(published.model) == list(plain.state_dict())
    assert published.config == Checkpoint.of(plain, categories).config
    plain.load_state_dict(published.model)
    with torch.no_grad():
        assert torch.equal(model.eval()(images())["pred_boxes"], plain.eval()(images())["pred_boxes"])


# --- losses -----------------------------------------------------------------------------------------------------------


def test_denoising_losses_by_their_formula(small: dict[str, Any]) -> None:
    """An object counts once, however many groups it is in; queries that are none count nothing."""
    model = make(small, VARIANTS["two_stage"], AuxiliaryConfig(denoising=6))
    outputs, losses, _ = outputs_and_losses(model, TARGETS, num_boxes=3.0)
    denoising = outputs["denoising"]
    assert denoising.num_groups == 3
    for number, layer in zip(("_0", "_1", ""), denoising.layers):
        logits, boxes = layer["pred_logits"].double(), layer["pred_boxes"].double()
        ce = l1 = 0.0
        for image, target in enumerate(TARGETS):
            for group in range(3):
                for place in range(len(target["labels"])):
                    query = group * 4 + place
                    l1 += (boxes[image, query] - target["boxes"][place]).abs().sum() / 9
                    for negative in (0, 2):  # the one to be found again, and the one to be refused
                        wanted = torch.zeros(5, dtype=torch.float64)
                        wanted[target["labels"][place]] = float(negative == 0)
                        ce += sigmoid_focal_loss(logits[image, query + negative], wanted).sum() / 9
        assert losses[f"loss_ce_dn{number}"].item() == pytest.approx(ce.item(), rel=1e-4)
        assert losses[f"loss_bbox_dn{number}"].item() == pytest.approx(l1.item(), rel=1e-4)


def test_one_to_many_matching_against_brute_force() -> None:
    torch.manual_seed(0)
    q, k, most = 30, 3, 4
    centres = torch.rand(2, q, 2)
    outputs = {
        "pred_logits": torch.randn(2, q, k),
        "pred_boxes": torch.cat((0.4 + 0.2 * centres, 0.3 + 0.1 * torch.rand(2, q, 2)), dim=-1),
    }
    targets = [
        {
            "labels": torch.tensor([0, 1, 1]),
            "boxes": torch.tensor([[0.5, 0.5, 0.3, 0.3]] * 2 + [[0.1, 0.1, 0.05, 0.05]]),
        },
        {"labels": torch.tensor([2]), "boxes": torch.tensor([[0.45, 0.5, 0.3, 0.4]])},
    ]
    found = match_one_to_many(outputs, PaddedTargets.of(targets, torch.device("cpu")), most)
    expected = set()
    for image, target in enumerate(targets):
        ious = box_iou(*[box_cxcywh_to_xyxy(b) for b in (target["boxes"], outputs["pred_boxes"][image])])
        value = 0.7 * ious + 0.3 * outputs["pred_logits"][image].sigmoid()[:, target["labels"]].t()
        wishes: dict[int, tuple[float, int]] = {}
        for place, row in enumerate(value.tolist()):
            order = sorted(range(q), key=lambda query: -row[query])[:most]
            for rank, query in enumerate(order):
                if rank == 0 or row[query] > 0.4:
                    wishes[query] = max(wishes.get(query, (-1.0, 0)), (row[query], place))
        expected |= {(image, query, place) for query, (_, place) in wishes.items()}
    assert set(zip(*[row.tolist() for row in found])) == expected
    assert len(expected) > 6
    assert any(place == 2 for _, _, place in expected)  # though it is far from all: the best one in any case


def test_one_to_many_losses_by_their_formula(small: dict[str, Any]) -> None:
    """The objects of an image count as if each had one query."""
    model = make(small, VARIANTS["refine"], AuxiliaryConfig(one_to_many=3))
    outputs, losses, criterion = outputs_and_losses(model, TARGETS, num_boxes=3.0)
    layer = outputs["one_to_many"][-1]
    matches = match_one_to_many(layer, PaddedTargets.of(TARGETS, torch.device("cpu")), 3)
    ce = l1 = 0.0
    for image, target in enumerate(TARGETS):
        mine = matches.images == image
        share = len(target["labels"]) / int(mine.sum())
        wanted = torch.zeros(12, 5, dtype=torch.float64)
        wanted[matches.queries[mine], target["labels"][matches.objects[mine]]] = 1
        ce += share * sigmoid_focal_loss(layer["pred_logits"][image].double(), wanted).sum() / 3
        difference = layer["pred_boxes"][image, matches.queries[mine]] - target["boxes"][matches.objects[mine]]
        l1 += share * difference.abs().sum() / 3
    assert losses["loss_ce_o2m"].item() == pytest.approx(ce.item(), rel=1e-4)
    assert losses["loss_bbox_o2m"].item() == pytest.approx(l1.item(), rel=1e-4)
    assert criterion.weight_dict["loss_giou_o2m_1"] == LossWeights().giou_loss_coef


def test_cutting_up_a_step_changes_no_loss(small: dict[str, Any]) -> None:
    config = AuxiliaryConfig(denoising=2, one_to_many=3, box_noise=0.0, label_noise=0.0)  # one group either way
    model = make(small, VARIANTS["two_stage"], config).eval()  # batch norms would see another batch
    _, whole, criterion = outputs_and_losses(model, TARGETS, num_boxes=3.0)
    encoded = [keeping_encoded(model)(images()[i : i + 1], None) for i in range(2)]
    parts = []
    for outputs, target in zip(encoded, TARGETS):
        outputs |= model.auxiliary(model, outputs.pop("encoded"), [target])
        groups = outputs["denoising"].num_groups
        assert groups == (1 if len(target["labels"]) == 2 else 2)
        parts.append(criterion(outputs, [target], 3.0))
    for name in criterion.weight_dict:
        assert sum(part[name] for part in parts).item() == pytest.approx(whole[name].item(), rel=1e-3, abs=1e-5)


def test_passes_share_what_they_sample(small: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A memory is projected once for all passes, with the losses and gradients of passes that each do it."""
    found = []
    for shares in (True, False):
        torch.manual_seed(0)
        model = make(small, VARIANTS["two_stage"], AuxiliaryConfig(denoising=2, one_to_many=3))
        calls = []
        for layer in model.transformer.decoder.layers:
            layer.cross_attn.value_proj.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        if not shares:
            monkeypatch.setattr(type(model.transformer.decoder), "values", lambda *_: None)
        torch.manual_seed(1)
        _, losses, criterion = outputs_and_losses(model, TARGETS)
        assert len(calls) == len(model.transformer.decoder.layers) * (1 if shares else 3)
        criterion.total(losses).backward()
        found.append(losses | {name: p.grad for name, p in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(value, found[1][name], rtol=1e-4, atol=1e-5)


# --- look forward twice -----------------------------------------------------------------------------------------------


def test_look_forward_twice_changes_gradients_alone(small: dict[str, Any]) -> None:
    """The last layer's loss also reaches the correction of the layer before it, and no further back."""
    reached, boxes = [], []
    for twice in (False, True):
        model = make(small, VARIANTS["two_stage"], AuxiliaryConfig(look_forward_twice=twice))
        boxes.append(model(images())["pred_boxes"])
        boxes[-1].sum().backward()
        reached.append([i for i, head in enumerate(model.bbox_embed) if head.layers[0].weight.grad is not None])
    assert torch.equal(*boxes)
    assert reached == [[2], [1, 2]]


def test_options_that_cannot_be(small: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="look_forward_twice needs with_box_refine"):
        make(small, VARIANTS["base"], AuxiliaryConfig(look_forward_twice=True))
    with pytest.raises(InputError, match="label_noise"):
        AuxiliaryConfig(label_noise=1.5)
    with pytest.raises(InputError, match="denoising"):
        AuxiliaryConfig(denoising=-1)

"""Which encoder proposals become queries."""

import pytest
import torch
from torch import Tensor, nn

from ddetr.boxes import box_cxcywh_to_xyxy, box_iou
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.models.query_selection import MOST_OVERLAP, ROUNDS, QuerySelection, ranked_scores

TWO_STAGE = {"with_box_refine": True, "two_stage": True}
SELECTIONS: tuple[QuerySelection, ...] = ("topk", "peaks", "distinct")
SHAPES = [(6, 8), (3, 4)]


def some_proposals(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Scores (2, S), boxes (2, S, 4) of which many overlap, and no invalid cell."""
    torch.manual_seed(seed)
    num_cells = sum(h * w for h, w in SHAPES)
    centres = torch.randint(1, 4, (2, num_cells, 2)) / 4 + 0.02 * torch.rand(2, num_cells, 2)
    boxes = torch.cat((centres, 0.2 + 0.02 * torch.rand(2, num_cells, 2)), dim=-1)
    return torch.randn(2, num_cells), boxes, torch.zeros(2, num_cells, dtype=torch.bool)


def test_topk_is_the_official_choice() -> None:
    scores, boxes, invalid = some_proposals()
    assert ranked_scores("topk", scores, boxes, SHAPES, invalid, 5) is scores


def test_peaks_come_before_all_others_in_the_order_of_their_scores() -> None:
    scores, boxes, invalid = some_proposals()
    ranked = ranked_scores("peaks", scores, boxes, SHAPES, invalid, 5)
    for row in range(2):
        peaks, start = [], 0
        for h, w in SHAPES:
            grid = scores[row, start : start + h * w].reshape(h, w)
            for y in range(h):
                for x in range(w):
                    if grid[y, x] == grid[max(y - 1, 0) : y + 2, max(x - 1, 0) : x + 2].max():
                        peaks.append(start + y * w + x)
            start += h * w
        peaks.sort(key=lambda cell: -scores[row, cell])
        others = sorted(set(range(start)) - set(peaks), key=lambda cell: -scores[row, cell])
        assert ranked[row].argsort(descending=True).tolist() == peaks + others
        assert len(peaks) < start // 4


def test_distinct_ones_are_those_of_greedy_suppression() -> None:
    scores, boxes, invalid = some_proposals()
    num_queries = 10  # of which each compares 4: fewer than there are cells
    ranked = ranked_scores("distinct", scores, boxes, SHAPES, invalid, num_queries)
    for row in range(2):
        ious = box_iou(*[box_cxcywh_to_xyxy(boxes[row])] * 2)
        order = scores[row].argsort(descending=True).tolist()
        kept: list[int] = []
        for cell in order[: 4 * num_queries]:
            if all(ious[cell, better] <= MOST_OVERLAP for better in kept):
                kept.append(cell)
        assert 3 < len(kept) < 4 * num_queries
        assert ranked[row].argsort(descending=True).tolist() == kept + [cell for cell in order if cell not in kept]


def test_distinct_ones_of_a_long_chain() -> None:
    """Each covers the next: greedy suppression takes every second one, and never two that cover each other."""
    num_cells = 48
    centres = 0.2 + torch.arange(num_cells) * 0.004
    boxes = torch.stack((centres, *[torch.full((num_cells,), value) for value in (0.5, 0.02, 0.02)]), dim=1)[None]
    scores = -torch.arange(num_cells)[None].float()
    assert box_iou(*[box_cxcywh_to_xyxy(boxes[0])] * 2)[0, 1] > MOST_OVERLAP
    ranked = ranked_scores("distinct", scores, boxes, [(6, 8)], torch.zeros(1, num_cells, dtype=torch.bool), 12)
    first = (ranked[0] == scores[0]).nonzero().flatten().tolist()
    assert first == list(range(0, ROUNDS + 1, 2))


@pytest.mark.parametrize("selection", ["peaks", "distinct"])
def test_padding_is_never_first(selection: QuerySelection) -> None:
    """Cells of padding have one score, and none of them is lower than its neighbours."""
    scores, boxes, invalid = some_proposals()
    invalid[1, 10:30] = True
    scores[invalid], boxes[invalid] = 9.0, 1.0
    best = ranked_scores(selection, scores, boxes, SHAPES, invalid, 5).topk(5, dim=1).indices
    assert not invalid.gather(1, best).any()
    assert ranked_scores(selection, scores, boxes, SHAPES, invalid[1:], 5).isfinite().all()  # one row for all images


@pytest.mark.parametrize("selection", SELECTIONS)
def test_there_are_always_as_many_queries(selection: QuerySelection, small: dict) -> None:
    model = DeformableDETR(**small | {"num_queries": 70}, **TWO_STAGE, query_selection=selection).eval()
    with torch.no_grad():
        assert model(torch.rand(2, 3, 96, 96))["pred_boxes"].shape == (2, 70, 4)
        mask = torch.zeros(1, 64, 64, dtype=torch.bool)
        mask[:, 30:] = True
        few = model(torch.rand(1, 3, 64, 64), mask)["pred_boxes"]  # 64 + 16 + 4 + 1 cells, most of them padding
    assert few.shape == (1, 70, 4)
    assert few.isfinite().all()


@pytest.mark.parametrize("selection", ["peaks", "distinct"])
def test_it_trains(selection: QuerySelection, small: dict) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**small, **TWO_STAGE, query_selection=selection)
    criterion = build_criterion(model)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    criterion.total(criterion(model(torch.rand(2, 3, 96, 96)), targets)).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize("selection", ["peaks", "distinct"])
def test_it_exports(selection: QuerySelection) -> None:
    class Selection(nn.Module):
        def forward(self, scores: Tensor, boxes: Tensor, invalid: Tensor) -> Tensor:
            return ranked_scores(selection, scores, boxes, SHAPES, invalid, 5).topk(5, dim=1).indices

    exported = torch.export.export(Selection(), some_proposals(0)).module()
    assert torch.equal(exported(*some_proposals(1)), Selection()(*some_proposals(1)))


@pytest.mark.parametrize("selection", ["peaks", "distinct"])
def test_it_compiles_as_one_graph(selection: QuerySelection) -> None:
    scores, boxes, invalid = some_proposals()

    def best(scores: Tensor, boxes: Tensor) -> Tensor:
        return ranked_scores(selection, scores, boxes, SHAPES, invalid, 10).topk(10, dim=1).indices

    compiled = torch.compile(best, fullgraph=True, backend="eager")
    assert torch.equal(compiled(scores, boxes), best(scores, boxes))
    torch._dynamo.reset()


def test_learned_queries_are_not_selected(small: dict) -> None:
    with pytest.raises(InputError, match="query_selection peaks is about queries that are chosen among proposals"):
        DeformableDETR(**small, query_selection="peaks")
    with pytest.raises(InputError, match="query_selection: expected one of topk, peaks, distinct, got best"):
        DeformableDETR(**small, **TWO_STAGE, query_selection="best")
    for name in ("class_aware", "mixed_selection"):
        with pytest.raises(InputError, match=f"{name} is about queries that are chosen among proposals"):
            DeformableDETR(**small, **{name: True})


def test_a_proposal_that_knows_classes_counts_by_its_best(small: dict) -> None:
    """Of two networks of the same weights, the one ranks by the first column and the other by the best of all."""
    torch.manual_seed(0)
    model = DeformableDETR(**small, **TWO_STAGE, class_aware=True).eval()
    head = model.class_embed[-1]
    with torch.no_grad():
        head.weight.normal_()
        for is_aware in (True, False):
            model.transformer.class_aware = is_aware
            encoded = model.encode(torch.rand(2, 3, 64, 64))
            logits, boxes = encoded.proposals
            score = logits.amax(-1) if is_aware else logits[..., 0]
            best = score.topk(model.num_queries, dim=1).indices
            assert encoded.queries.references.equal(boxes.gather(1, best[..., None].expand(-1, -1, 4)))


@pytest.mark.parametrize("class_aware", [False, True])
def test_what_proposals_learn(class_aware: bool, small: dict) -> None:
    """Only the column of "any object", or that of each object's class, has a loss that raises it."""
    torch.manual_seed(0)
    model = DeformableDETR(**small, **TWO_STAGE, class_aware=class_aware)
    targets = [{"labels": torch.tensor([2]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    losses = build_criterion(model)(model(torch.rand(2, 3, 96, 96)), targets)
    losses["loss_ce_enc"].backward()
    raised = model.class_embed[-1].bias.grad < 0
    assert raised.nonzero().flatten().tolist() == [2 if class_aware else 0]


def test_mixed_queries_have_a_learned_content_and_a_proposed_box(small: dict) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**small, **TWO_STAGE, mixed_selection=True)
    plain = DeformableDETR(**small, **TWO_STAGE)
    state = model.state_dict()
    assert model.query_embed.weight.shape == (model.num_queries, small["hidden_dim"])
    assert state.keys() - plain.state_dict().keys() == {"query_embed.weight"}  # H-DETR's name and shape
    plain.load_state_dict({name: value for name, value in state.items() if name != "query_embed.weight"})
    images = torch.rand(2, 3, 96, 96)
    mixed, made = (network.eval().encode(images).queries for network in (model, plain))
    assert mixed.content.equal(model.query_embed.weight.expand(2, -1, -1))
    assert mixed.position.equal(made.position)
    assert mixed.references.equal(made.references)
    targets = [{"labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}] * 2
    criterion = build_criterion(model)
    criterion.total(criterion(model.train()(images), targets)).backward()
    assert not [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_fewer_cells_than_mixed_queries(small: dict) -> None:
    """The best proposal has the first content in every image."""
    model = DeformableDETR(**small | {"num_queries": 90}, **TWO_STAGE, mixed_selection=True).eval()
    with torch.no_grad():
        queries = model.encode(torch.rand(1, 3, 64, 64)).queries
    assert queries.content[0].equal(model.query_embed.weight[: queries.content.shape[1]])
    assert queries.content.shape[1] < 90

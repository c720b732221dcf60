"""Which of the encoder's proposals become queries (two-stage, arXiv:2010.04159, sec. A.4).

The proposals of neighbouring cells of an object are nearly the same box. Where all of them become queries, one-to-one
matching must teach the decoder to keep one of each heap; where one of each heap does, there is little left to teach.

Shapes: N batch, S = sum_l H_l*W_l cells, one proposal each, Q queries.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy, broadcast_iou

QuerySelection = Literal["topk", "peaks", "distinct"]

# IoU above which "distinct" takes two proposals for one. Dense Distinct Queries (arXiv:2303.12776) has 0.7; with 0.5 a
# small network finds more: BCCD's AP50 0.900 for 0.827 (benchmarks/results/2026-11-29-convergence-parts.md).
MOST_OVERLAP = 0.5
CANDIDATES_PER_QUERY = 4  # that "distinct" compares with each other: its time grows with their square
ROUNDS = 9  # of "distinct": longest chain of boxes, each covering the next, for which it is exact; odd
_BEHIND = 100.0  # logits are far smaller, so that what has this subtracted comes after all that has not


def ranked_scores(
    selection: QuerySelection,
    scores: Tensor,
    boxes: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    invalid: Tensor,
    num_queries: int,
) -> Tensor:
    """Scores by which the best `num_queries` proposals are taken, (N, S). What is passed over lies behind all others,
    in its own order, so that there are always enough.

    Args:
        selection: "topk", the scores as they are (the official code); "peaks", first the cells that score highest
            among their eight neighbours in their level; "distinct", first those that no better proposal covers with an
            IoU above 0.5 (non-maximum suppression without classes, after Dense Distinct Queries, arXiv:2303.12776,
            among the best `4 * num_queries`).
        scores: (N, S) logits of "any object".
        boxes: (N, S, 4) cxcywh in [0, 1].
        spatial_shapes: (H_l, W_l) of each level.
        invalid: (N, S) or (1, S), True = padding, or too near to the border for a proposal.
    """
    if selection == "topk":
        return scores
    scores = scores.detach().float()
    valid = scores.masked_fill(invalid, -_BEHIND)
    if selection == "peaks":
        first = _peaks(valid, spatial_shapes)
    else:
        first = _distinct(valid, boxes.detach().float(), num_queries)
    return torch.where(first & ~invalid, scores, scores - _BEHIND)


def _peaks(scores: Tensor, spatial_shapes: Sequence[tuple[int, int]]) -> Tensor:
    """(N, S) bool: no neighbour in the same level has a higher score."""
    levels = []
    for level, (h, w) in zip(scores.split([h * w for h, w in spatial_shapes], dim=1), spatial_shapes):
        grid = level.unflatten(1, (h, w))[:, None]  # (N, 1, H, W)
        levels.append((F.max_pool2d(grid, kernel_size=3, stride=1, padding=1) == grid).flatten(1))
    return torch.cat(levels, dim=1)


def _distinct(scores: Tensor, boxes: Tensor, num_queries: int) -> Tensor:
    """(N, S) bool: among the best, and no better one that is distinct itself overlaps it by more than `MOST_OVERLAP`.

    Greedy suppression without a loop over boxes (Cluster-NMS, arXiv:2005.03572, sec. 3.3), as a graph that exports and
    does not wait for a GPU. Each round is right for one more box of a chain in which each covers the next. Of a longer
    chain an odd number of rounds keeps a part of what greedy suppression keeps, and never two that cover each other.
    """
    best = scores.topk(smaller(CANDIDATES_PER_QUERY * num_queries, scores.shape[1]), dim=1).indices  # (N, B)
    corners = box_cxcywh_to_xyxy(boxes.gather(1, best[..., None].expand(-1, -1, 4)))
    covers = (broadcast_iou(corners[:, :, None], corners[:, None]) > MOST_OVERLAP).float().triu(1)  # by rows, (N, B, B)
    kept = torch.ones_like(covers[:, :1])
    for _ in range(ROUNDS):
        kept = (kept @ covers == 0).float()
    return torch.zeros_like(scores, dtype=torch.bool).scatter(1, best, kept[:, 0] > 0)


def smaller(a: int, b: int) -> int:
    """The smaller of two sizes, also of such as an exported graph leaves open. Dynamo knows Python's `min` alone before
    PyTorch 2.7."""
    return min(a, b) if torch.compiler.is_dynamo_compiling() else torch.sym_min(a, b)

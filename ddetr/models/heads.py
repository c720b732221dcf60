"""Prediction heads: class logits and box corrections, with the initial values of the official code."""

import math

import torch
from torch import Tensor, nn

PRIOR_PROBABILITY = 0.01  # focal loss starts from rare objects (arXiv:1708.02002, sec. 4.1)
PRIOR_BIAS = -math.log((1 - PRIOR_PROBABILITY) / PRIOR_PROBABILITY)


def class_head(hidden_dim: int, num_classes: int) -> nn.Linear:
    """Linear (..., hidden_dim) -> (..., num_classes) logits that start at a probability of 0.01."""
    head = nn.Linear(hidden_dim, num_classes)
    nn.init.constant_(head.bias, PRIOR_BIAS)
    return head


class BoxHead(nn.Module):
    """Three-layer perceptron (..., hidden_dim) -> (..., 4) box corrections before the sigmoid, in float32.

    It starts as zero, but for `initial_size_unact` on width and height.
    """

    def __init__(self, hidden_dim: int, initial_size_unact: float):
        super().__init__()
        sizes = [hidden_dim, hidden_dim, hidden_dim, 4]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in zip(sizes, sizes[1:]))
        nn.init.zeros_(self.layers[-1].weight)
        nn.init.zeros_(self.layers[-1].bias)
        nn.init.constant_(self.layers[-1].bias[2:], initial_size_unact)

    def forward(self, x: Tensor) -> Tensor:
        """Runs outside autocast: a correction rounded to bfloat16 moves a box by a pixel of a large image."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(self.layers[0].weight.dtype)
            for layer in self.layers[:-1]:
                x = layer(x).relu()
            return self.layers[-1](x).float()


def refine_boxes(corrections: Tensor, reference_points: Tensor) -> Tensor:
    """Boxes from corrections before the sigmoid and references in [0, 1] (sec. A.4).

    Args:
        corrections: (N, Q, 4) float32.
        reference_points: (N, Q, 2) points, that correct (cx, cy) alone, or (N, Q, 4) boxes.

    Returns:
        (N, Q, 4) cxcywh in [0, 1].
    """
    references_unact = torch.logit(reference_points, eps=1e-5)
    if references_unact.shape[-1] == 4:
        return (corrections + references_unact).sigmoid()
    return torch.cat((corrections[..., :2] + references_unact, corrections[..., 2:]), dim=-1).sigmoid()

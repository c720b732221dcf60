"""The multi-scale deformable attention module (arXiv:2010.04159, sec. 4.1).

Shapes: N batch, Q queries, S = sum_l H_l*W_l, C embed dim, M heads, L levels, P points.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ddetr.ops import ms_deform_attn_step
from ddetr.ops.reference import sampling_locations_reference


class MSDeformAttn(nn.Module):
    """Each query looks at P points per level and head, at learned offsets around its reference."""

    def __init__(self, d_model: int, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        if d_model % n_heads:
            raise ValueError(f"hidden_dim must be divisible by nheads, got {d_model} and {n_heads}")
        self.n_levels, self.n_heads, self.n_points = n_levels, n_heads, n_points
        self.sampling_offsets = nn.Linear(d_model, n_heads * n_levels * n_points * 2)
        self.attention_weights = nn.Linear(d_model, n_heads * n_levels * n_points)
        self.value_proj = nn.Linear(d_model, d_model)
        self.output_proj = nn.Linear(d_model, d_model)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Offsets start as rings: head h looks in direction 2*pi*h/M, point i at a distance of i+1 cells."""
        directions = torch.arange(self.n_heads, dtype=torch.float32) * (2 * math.pi / self.n_heads)
        ring = torch.stack((directions.cos(), directions.sin()), dim=-1)
        ring = ring / ring.abs().amax(-1, keepdim=True)  # (M, 2)
        distances = torch.arange(1, self.n_points + 1, dtype=torch.float32)
        offsets = ring[:, None, None, :] * distances[:, None]  # (M, 1, P, 2)
        nn.init.zeros_(self.sampling_offsets.weight)
        with torch.no_grad():
            self.sampling_offsets.bias.copy_(offsets.expand(-1, self.n_levels, -1, -1).reshape(-1))
        nn.init.zeros_(self.attention_weights.weight)
        nn.init.zeros_(self.attention_weights.bias)
        for projection in (self.value_proj, self.output_proj):
            nn.init.xavier_uniform_(projection.weight)
            nn.init.zeros_(projection.bias)

    def forward(
        self,
        query: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """One attention step.

        Args:
            query: (N, Q, C).
            reference_points: (N, Q, L, 2) as (x, y), or (N, Q, L, 4) as (cx, cy, w, h), in [0, 1] of the padded level.
            memory: (N, S, C), level after level, row-major.
            spatial_shapes: (H, W) of each level, Python ints.
            padding_mask: (N, S), True = padding, sampled as zero; None where nothing is padded.
            value: what `project` makes of the memory, where several sets of queries look at one.

        Returns:
            (N, Q, C).
        """
        n, q, _ = query.shape
        if value is None:
            value = self.project(memory, padding_mask)
        grid = (n, q, self.n_heads, self.n_levels, self.n_points)
        output = ms_deform_attn_step(
            value.unflatten(-1, (self.n_heads, -1)),
            spatial_shapes,
            self.sampling_offsets(query).view(*grid, 2),
            self.attention_weights(query).view(grid),
            reference_points,
        )
        return self.output_proj(output)

    def project(self, memory: Tensor, padding_mask: Tensor | None) -> Tensor:
        """What is sampled of a memory, (N, S, C)."""
        value = self.value_proj(memory)
        return value if padding_mask is None else value.masked_fill(padding_mask[..., None], 0.0)

    def sampling(
        self, query: Tensor, reference_points: Tensor, spatial_shapes: Sequence[tuple[int, int]]
    ) -> tuple[Tensor, Tensor]:
        """Where the queries look and how much that counts: what `forward` does inside the operator, to be looked at.

        Args: as of `forward`.

        Returns:
            Locations (N, Q, M, L, P, 2) as (x, y) in [0, 1] of the padded level, which may lie outside; and weights
            (N, Q, M, L, P), whose sum over levels and points is 1. Both float32 or wider.
        """
        grid = (*query.shape[:2], self.n_heads, self.n_levels, self.n_points)
        logits = self.attention_weights(query).view(grid)
        dtype = torch.promote_types(logits.dtype, torch.float32)
        weights = logits.to(dtype).flatten(3).softmax(-1).view(grid)
        offsets = self.sampling_offsets(query).view(*grid, 2)
        return sampling_locations_reference(offsets, reference_points, spatial_shapes), weights

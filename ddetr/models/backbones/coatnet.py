"""The attention of timm's CoAtNet (arXiv:2106.04803) at any image size: its own has a table of positions for one.

It compares all cells of the maps of strides 16 and 32: with the square of the image's area in time and, for the bias of
each pair and head, in memory.

Shapes: N batch, h and w cells, C channels, M heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def free_attention_of_size(network: nn.Module) -> None:
    """Replace the attention over whole maps by one of the same parameters and names, for maps of any size."""
    from timm.models.maxxvit import TransformerBlock2d

    for block in list(network.modules()):
        if isinstance(block, TransformerBlock2d):
            block.attn = _Attention(block.attn)


class _Attention(nn.Module):
    def __init__(self, fixed: nn.Module):
        super().__init__()
        self.num_heads, self.head_first = fixed.num_heads, fixed.head_first
        self.qkv, self.rel_pos, self.proj = fixed.qkv, fixed.rel_pos, fixed.proj
        self.attn_drop, self.proj_drop = fixed.attn_drop, fixed.proj_drop

    def forward(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        """(N, C, h, w) -> (N, C', h, w). shared_rel_pos: of timm's interface, for networks without a table."""
        height, width = x.shape[-2:]
        qkv = self.qkv(x).flatten(2)  # (N, 3 C', h*w)
        if self.head_first:
            parts = qkv.unflatten(1, (self.num_heads, 3, -1)).unbind(2)
        else:
            parts = qkv.unflatten(1, (3, self.num_heads, -1)).unbind(1)
        query, key, value = (part.mT for part in parts)  # (N, M, h*w, C'/M)
        bias = shared_rel_pos if self.rel_pos is None else _bias(self.rel_pos, height, width).to(query)
        dropout = self.attn_drop.p if self.training else 0.0
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout)
        return self.proj_drop(self.proj(x.mT.flatten(1, 2).unflatten(2, (height, width))))


def _bias(rel_pos: nn.Module, height: int, width: int) -> Tensor:
    """(1, M, h*w, h*w) of each pair of cells."""
    from timm.layers import RelPosMlp
    from timm.layers.pos_embed_rel import gen_relative_log_coords

    rows, columns = rel_pos.window_size
    if isinstance(rel_pos, RelPosMlp):  # positions of any size through a small network
        coordinates = gen_relative_log_coords((height, width), mode=rel_pos.mode)
        table = rel_pos.bias_act(rel_pos.mlp(coordinates.to(rel_pos.mlp.fc1.weight.device))).permute(2, 0, 1)
    else:
        table = rel_pos.relative_position_bias_table.mT.unflatten(1, (2 * rows - 1, 2 * columns - 1))
        if (height, width) != (rows, columns):
            size = (2 * height - 1, 2 * width - 1)
            table = F.interpolate(table[None], size=size, mode="bicubic", align_corners=False)[0]
    return _of_pairs(_of_pairs(table, 1, height), 3, width).permute(0, 1, 3, 2, 4).flatten(3).flatten(1, 2)[None]


def _of_pairs(table: Tensor, axis: int, count: int) -> Tensor:
    """An axis of 2 * count - 1 differences -> two, of count places each, first less second."""
    places = torch.arange(count, device=table.device)
    differences = places[:, None] - places[None, :] + count - 1
    return table.index_select(axis, differences.flatten()).unflatten(axis, (count, count))

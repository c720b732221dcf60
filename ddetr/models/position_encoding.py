"""Position encodings of feature maps (arXiv:2010.04159, sec. A.4; arXiv:2005.12872, sec. A.4).

Shapes: N batch, C hidden_dim, H and W of one feature map.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sine_embedding(positions: Tensor, num_features: int, temperature: float = 10000.0) -> Tensor:
    """Interleaved sine and cosine of `positions` (...), in radians -> (..., num_features), in float32."""
    index = torch.arange(num_features, dtype=torch.float32, device=positions.device)
    frequencies = temperature ** (2 * torch.div(index, 2, rounding_mode="floor") / num_features)
    angles = positions.float()[..., None] / frequencies
    return torch.stack((angles[..., 0::2].sin(), angles[..., 1::2].cos()), dim=-1).flatten(-2)


class PositionEmbeddingSine(nn.Module):
    """Sine encoding of the relative position of each cell within the unpadded part of the image.

    Always float32: a cumulative sum in half precision loses whole cells, and its normalisation overflows on padding.
    """

    def __init__(self, num_features: int):
        """num_features: features an axis, hidden_dim / 2."""
        super().__init__()
        self.num_features = num_features

    def forward(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        """feature (N, C, H, W), mask (N, H, W) True = padding or None -> (N or 1, C, H, W) float32, order (y, x)."""
        h, w = feature.shape[-2:]
        with torch.autocast(feature.device.type, enabled=False):
            if mask is None:
                ys = (torch.arange(h, dtype=torch.float32, device=feature.device) + 0.5) / (h + 1e-6)
                xs = (torch.arange(w, dtype=torch.float32, device=feature.device) + 0.5) / (w + 1e-6)
                y, x = ys[None, :, None].expand(1, h, w), xs[None, None, :].expand(1, h, w)
            else:
                valid = ~mask
                # Whole numbers: PyTorch 2.6 refuses to add up floats in this way on CUDA under --deterministic.
                y, x = (valid.cumsum(axis, dtype=torch.int32).float() for axis in (1, 2))
                # -0.5 is the official code's, and puts a position at the centre of its cell.
                y = (y - 0.5) / (y[:, -1:, :] + 1e-6)
                x = (x - 0.5) / (x[:, :, -1:] + 1e-6)
            y_embedding = sine_embedding(y * (2 * math.pi), self.num_features)
            x_embedding = sine_embedding(x * (2 * math.pi), self.num_features)
            return torch.cat((y_embedding, x_embedding), dim=-1).permute(0, 3, 1, 2)


class PositionEmbeddingLearned(nn.Module):
    """Learned encoding of rows and columns, 50 of each as in the official code, stretched to larger maps."""

    num_positions = 50

    def __init__(self, num_features: int):
        """num_features: features an axis, hidden_dim / 2."""
        super().__init__()
        self.row_embed = nn.Embedding(self.num_positions, num_features)
        self.col_embed = nn.Embedding(self.num_positions, num_features)
        nn.init.uniform_(self.row_embed.weight)
        nn.init.uniform_(self.col_embed.weight)

    def forward(self, feature: Tensor, mask: Tensor | None) -> Tensor:
        """feature (N, C, H, W) -> (1, C, H, W), order (x, y) as in the official code; the mask is not used."""
        h, w = feature.shape[-2:]
        x = self._rows(self.col_embed.weight, w)[None, :, :].expand(h, -1, -1)
        y = self._rows(self.row_embed.weight, h)[:, None, :].expand(-1, w, -1)
        return torch.cat((x, y), dim=-1).permute(2, 0, 1)[None]

    def _rows(self, table: Tensor, count: int) -> Tensor:
        """The first `count` rows of the table (50, F), or the table stretched to `count` rows -> (count, F)."""
        if count <= self.num_positions:
            return table[:count]
        return F.interpolate(table.t()[None], size=count, mode="linear", align_corners=True)[0].t()

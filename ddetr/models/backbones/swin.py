"""The shifted windows of timm's Swin (arXiv:2103.14030, arXiv:2111.09883) on maps that are no whole windows.

timm shifts such a map before it fills it up, so that its first rows and columns come to lie beside its last ones, where
the mask does not part them. Here it is filled up first, as in Swin's own detectors and in torchvision.

Shapes: N batch, H and W cells, C channels, s cells a side of a window.
"""

import torch
import torch.nn.functional as F
from timm.models.swin_transformer import SwinTransformerBlock
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from torch import Tensor, nn


def fill_up_before_shift(network: nn.Module) -> None:
    """Give the blocks of Swin and Swin V2 the attention of this file; parameters and names stay."""
    for block in network.modules():
        if type(block) is SwinTransformerBlock:
            block.__class__ = _SwinBlock
        elif type(block) is SwinTransformerV2Block:
            block.__class__ = _SwinV2Block


class _Filled:
    def _attn(self, x: Tensor) -> Tensor:
        """(N, H, W, C) -> (N, H, W, C)."""
        height, width = x.shape[1:3]
        (rows, columns), (down, right) = self.window_size, self.shift_size
        x = F.pad(x, (0, 0, 0, -width % columns, 0, -height % rows))
        mask = self.get_attn_mask(x)
        x = torch.roll(x, (-down, -right), (1, 2))
        windows = x.unflatten(2, (-1, columns)).unflatten(1, (-1, rows)).transpose(2, 3)  # (N, ., ., s, s, C)
        seen = self.attn(windows.flatten(3, 4).flatten(0, 2), mask=mask).view(windows.shape)
        x = seen.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return torch.roll(x, (down, right), (1, 2))[:, :height, :width]


class _SwinBlock(_Filled, SwinTransformerBlock):
    pass


class _SwinV2Block(_Filled, SwinTransformerV2Block):
    pass

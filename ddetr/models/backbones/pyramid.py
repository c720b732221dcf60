"""Maps of several strides from the one map of a plain vision transformer: ViTDet's simple feature pyramid
(arXiv:2203.16527, sec. 3).

Shapes: N batch, C channels of the transformer, P channels of the pyramid, h and w cells of stride 16.
"""

from collections.abc import Sequence

from torch import Tensor, nn

CHANNELS = 256  # the paper's


class SimpleFeaturePyramid(nn.Module):
    """From the map of stride 16: deconvolutions to strides 4 and 8, itself for 16, max-pooling for 32; then a 1x1 and a
    3x3 convolution, with a layer norm over channels after both.

    Names in the state dict: `stride4.*` to `stride32.*`, of each map that there is: `resize` holds the deconvolutions,
    `convs.0` and `convs.2` the convolutions (without biases), `convs.1` and `convs.3` the norms.
    """

    def __init__(self, channels: int, strides: Sequence[int]):
        """
        Args:
            channels: C.
            strides: of the maps to make, of 4, 8, 16 and 32.
        """
        super().__init__()
        self.strides = tuple(strides)
        for stride in strides:
            self.add_module(f"stride{stride}", _Level(channels, stride))

    def forward(self, tokens: Tensor) -> list[Tensor]:
        """(N, C, h, w) -> for each stride (N, P, h * 16 / stride, w * 16 / stride), rounded up."""
        return [self.get_submodule(f"stride{stride}")(tokens) for stride in self.strides]


class _Level(nn.Module):
    def __init__(self, channels: int, stride: int):
        super().__init__()
        half, quarter = channels // 2, channels // 4
        layers, width = {
            4: (
                [
                    nn.ConvTranspose2d(channels, half, 2, stride=2),
                    ChannelNorm(half, eps=1e-6),
                    nn.GELU(),
                    nn.ConvTranspose2d(half, quarter, 2, stride=2),
                ],
                quarter,
            ),
            8: ([nn.ConvTranspose2d(channels, half, 2, stride=2)], half),
            16: ([], channels),
            32: ([nn.MaxPool2d(2, ceil_mode=True)], channels),
        }[stride]
        self.resize = nn.Sequential(*layers)
        self.convs = nn.Sequential(
            nn.Conv2d(width, CHANNELS, 1, bias=False),
            ChannelNorm(CHANNELS, eps=1e-6),
            nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False),
            ChannelNorm(CHANNELS, eps=1e-6),
        )

    def forward(self, tokens: Tensor) -> Tensor:
        return self.convs(self.resize(tokens))


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of each cell of a map (N, C, H, W)."""

    def forward(self, maps: Tensor) -> Tensor:
        return super().forward(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

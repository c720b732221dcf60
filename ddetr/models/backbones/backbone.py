"""Backbones from timm under the official parameter names (`backbone.0.body.*`).

timm is imported where it is used: it takes seconds, which `ddetr train --help` has no use for.
"""

import math
import re
from collections.abc import Iterable, Sequence
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.errors import InputError
from ddetr.models.backbones.coatnet import free_attention_of_size
from ddetr.models.backbones.families import ALTERNATIVES
from ddetr.models.backbones.hiera import hiera_maps
from ddetr.models.backbones.plain_vit import last_map
from ddetr.models.backbones.pretrained import check_is_of, create, find_start, load_file, size_arguments
from ddetr.models.backbones.pyramid import CHANNELS, SimpleFeaturePyramid

FreezeBackbone = Literal["none", "norm", "stem", "all"]


class Backbone(nn.Module):
    """Feature maps of the last stages of a model of timm, at any image size.

    A map has ceil(H / stride) x ceil(W / stride) cells, or what the network's own convolutions give (all but a few old
    ones round up). Networks that need sizes of some multiple get the image padded with zeros, right and at the bottom,
    and their maps cropped. A plain vision transformer has one map, of stride 16, from which a feature pyramid makes the
    others (`pyramid.py`); with one feature it is the pyramid's of stride 32, with dilation that of stride 16.

    Names in the state dict: `body.*` are timm's names of the model, as its `features_only` changes them ("stages_0" for
    "stages.0"); `pyramid.*` is the feature pyramid, of plain vision transformers alone.

    Attributes:
        num_channels, strides: of each feature map that `forward` returns, fine to coarse.
        mean, std: what images are normalised with, R, G and B of [0, 1]: those of the weights that it starts from, and
            of timm's usual ones where it starts from nothing or from a file.
    """

    def __init__(
        self,
        name: str,
        num_features: int,
        *,
        pretrained: bool | str = False,
        dilation: bool = False,
        freeze: FreezeBackbone = "none",
        window: int | None = None,
    ):
        """
        Args:
            name: a timm model name, e.g. "resnet50".
            num_features: how many of the last stages to return, 1 to 4.
            pretrained: True for ImageNet weights (downloaded by timm), a name of timm with its tag, an address of the
                hub ("hf-hub:org/name"), or the path of a file of weights (`pretrained.py`).
            dilation: stride 1 and dilation 2 in the last stage (DC5).
            freeze: "norm" freezes batch norms, statistics and parameters (layer norms, which have no statistics,
                train); "stem" them and all that leads to the map of stride 4, in ResNets the stem and the first stage,
                as the official code does, in plain vision transformers the embedding of patches and positions; "all"
                freezes every parameter but those of a feature pyramid, which starts from nothing.
            window: of plain vision transformers: patches a side of the windows that all but four blocks attend in
                (ViTDet's 14), for large images; None for attention over the whole image.

        Raises:
            InputError: unknown model, unsuitable strides or sizes, weights that cannot be had or do not fit.
        """
        super().__init__()
        start = find_start(name, pretrained)
        family, arguments = size_arguments(name)
        check_is_of(start, name)
        self.window, self._kind = window, family.kind
        self.pyramid: SimpleFeaturePyramid | None = None
        self.strides: list[int] = [16 if dilation else 32] if num_features == 1 else [4, 8, 16, 32][-num_features:]
        if family.kind == "plain":
            self.body = create(start, num_classes=0, **arguments)
        else:
            if window is not None:
                raise InputError(f"backbone_window is for plain vision transformers, and {name!r} has other attention")
            strides = {"output_stride": 16} if dilation else {}
            indices = tuple(range(-num_features, 0))
            self.body = create(start, features_only=True, out_indices=indices, **arguments, **strides)
            self.num_channels: list[int] = self.body.feature_info.channels()
            found = self.body.feature_info.reduction()
            if found != self.strides:
                raise InputError(
                    f"backbone {name!r}: expected feature maps of strides {self.strides}, got {found}. {ALTERNATIVES}"
                )
        if start.file is not None:
            load_file(self.body, start, arguments)
        self.mean, self.std = (_three_floats(self.body.pretrained_cfg[key]) for key in ("mean", "std"))
        if family.kind == "plain":
            self.body.prune_intermediate_layers(1)  # what comes after the last norm
            self.pyramid = SimpleFeaturePyramid(self.body.embed_dim, self.strides)
            self.num_channels = [CHANNELS] * num_features
        elif family.kind == "swin":
            from ddetr.models.backbones.swin import fill_up_before_shift

            fill_up_before_shift(self.body)
        elif family.kind == "coatnet":
            free_attention_of_size(self.body)
        self._multiple = math.lcm(family.multiple, *_partitions(self.body))
        self._is_nhwc = family.kind != "plain" and str(getattr(self.body, "output_fmt", "NCHW")).endswith("NHWC")
        self._freeze(freeze)

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W) -> maps (N, C_l, H/stride_l, W/stride_l), fine to coarse."""
        height, width = images.shape[-2:]
        if self._multiple == 1:
            return self._maps(images)
        images = F.pad(images, (0, -width % self._multiple, 0, -height % self._multiple))
        return [
            maps[..., : -(-height // stride), : -(-width // stride)]
            for maps, stride in zip(self._maps(images), self.strides)
        ]

    def stages(self) -> dict[str, int]:
        """Name of every parameter of `body` -> the stage that it belongs to, as timm counts its feature maps: 0 is all
        that leads to the first one (in a ResNet the stem), the last is the coarsest. In a plain vision transformer 0 is
        the embedding of patches and positions, and each block is a stage."""
        if self._kind == "plain":
            return {f"body.{name}": self._block(name) for name, _ in self.body.named_parameters()}
        first, *others = (name for name, _ in self.body.named_children())
        prefix = "" if others else f"{first}."  # of the whole model inside timm's reader of features
        ends = [f"{prefix}{info['module']}.".replace(".", "_") for info in self.body.feature_info.info]
        ends = [re.sub(r"^model_block_(?=\d_$)", "model_blocks_", end) for end in ends]  # Twins' are called blocks
        stages: dict[str, int] = {}
        stage, is_inside = 0, False
        for name, module in self.body.named_modules():
            if not name:
                continue
            flat = f"{name}.".replace(".", "_")  # timm names the same module stages.0 or stages_0
            found = next((i for i in range(stage, len(ends)) if flat.startswith(ends[i])), None)
            if found is not None:
                stage, is_inside = found, True
            elif is_inside:
                stage, is_inside = min(stage + 1, len(ends) - 1), False
            stages |= {f"body.{name}.{parameter}": stage for parameter, _ in module.named_parameters(recurse=False)}
        return stages

    def _block(self, name: str) -> int:
        """The stage of a parameter of a plain vision transformer."""
        first, second, *_ = f"{name}..".split(".")
        if first == "blocks":
            return int(second) + 1
        return len(self.body.blocks) if first == "norm" else 0

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.pyramid is not None:
            return self.pyramid(last_map(self.body, images, self.window))
        if self._kind == "hiera":
            return hiera_maps(self.body.model, images, list(range(4 - len(self.strides), 4)))
        maps = self.body(images)
        return [one.permute(0, 3, 1, 2) for one in maps] if self._is_nhwc else maps

    def _freeze(self, freeze: FreezeBackbone) -> None:
        if freeze == "none":
            return
        from timm.layers import freeze_batch_norm_2d

        # A batch norm inside a whole model turns into one with fixed statistics; its parameters become buffers.
        self.body = freeze_batch_norm_2d(self.body)
        num_frozen = 0
        if freeze == "all":
            num_frozen = math.inf
        elif freeze == "stem":
            infos = [] if self._kind == "plain" else self.body.feature_info.info
            num_frozen = sum(info["reduction"] <= 4 for info in infos) or 1
        stages = self.stages()
        for name, parameter in self.named_parameters():
            if stages.get(name, math.inf) < num_frozen:
                parameter.requires_grad_(False)


def _partitions(body: nn.Module) -> Iterable[int]:
    """What an image must be a multiple of so that maps down to stride 32 are of whole windows: of MaxViT."""
    return {32 * module.partition_size[0] for module in body.modules() if hasattr(module, "partition_size")}


def _three_floats(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)

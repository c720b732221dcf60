"""Backbones from timm under the official parameter names (`backbone.0.body.*`).

timm is imported where it is used: it takes seconds, which `ddetr train --help` has no use for.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ddetr.arrays import load_tensors
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.wording import did_you_mean

logger = logging.getLogger(__name__)

FreezeBackbone = Literal["none", "norm", "stem", "all"]

# The paper's recipe starts from torchvision's first ImageNet weights, which timm keeps under these tags.
IMAGENET_V1 = {"resnet50": "resnet50.tv_in1k", "resnet101": "resnet101.tv_in1k"}


class Backbone(nn.Module):
    """Feature maps of the last stages of any timm model that offers `features_only`.

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
    ):
        """
        Args:
            name: a timm model name, e.g. "resnet50".
            num_features: how many of the last stages to return, 1 to 4.
            pretrained: True for ImageNet weights (downloaded by timm), or the path of a file of weights in
                torchvision's names.
            dilation: stride 1 and dilation 2 in the last stage (DC5).
            freeze: "norm" freezes batch norms, statistics and parameters; "stem" them and, in ResNets, the stem and the
                first stage, as the official code does; "all" freezes every parameter.

        Raises:
            InputError: unknown model, unsuitable strides, weights that cannot be had or do not fit.
        """
        super().__init__()
        self.body = _create(name, num_features, pretrained is True, dilation)
        self.num_channels: list[int] = self.body.feature_info.channels()
        self.strides: list[int] = self.body.feature_info.reduction()
        self.mean, self.std = (_three_floats(self.body.pretrained_cfg[key]) for key in ("mean", "std"))
        expected = [16 if dilation else 32] if num_features == 1 else [4, 8, 16, 32][-num_features:]
        if self.strides != expected:
            raise InputError(f"backbone {name!r}: expected feature maps of strides {expected}, got {self.strides}")
        if isinstance(pretrained, str):
            self._load(Path(pretrained))
        if freeze != "none":
            from timm.layers import freeze_batch_norm_2d

            # A batch norm inside a whole model turns into one with fixed statistics; its parameters become buffers.
            self.body = freeze_batch_norm_2d(self.body)
            if freeze != "norm" and hasattr(self.body, "layer1"):
                _freeze(
                    p for key, p in self.body.named_parameters() if not key.startswith(("layer2", "layer3", "layer4"))
                )
        if freeze == "all":
            _freeze(self.body.parameters())

    def forward(self, images: Tensor) -> list[Tensor]:
        """images (N, 3, H, W) -> maps (N, C_l, H/stride_l, W/stride_l), fine to coarse."""
        return self.body(images)

    def stages(self) -> dict[str, int]:
        """Name of every parameter -> the stage that it belongs to, counted as timm counts its feature maps: 0 is all
        that leads to the first one (in a ResNet the stem), the last is the coarsest."""
        ends = [f"{info['module']}.".replace(".", "_") for info in self.body.feature_info.info]
        stages: dict[str, int] = {}
        stage, is_inside = 0, False
        for name, module in self.body.named_modules():
            if not name:
                continue
            flat = f"{name}.".replace(".", "_")  # timm names the same module stages.0 or stages_0
            if is_inside and not flat.startswith(ends[stage]):
                stage, is_inside = min(stage + 1, len(ends) - 1), False
            is_inside = is_inside or flat.startswith(ends[stage])
            stages |= {f"body.{name}.{parameter}": stage for parameter, _ in module.named_parameters(recurse=False)}
        return stages

    def _load(self, path: Path) -> None:
        if not path.is_file():
            raise InputError(f"pretrained_backbone: expected True, False or the path of a file, got {str(path)!r}")
        try:
            weights = load_tensors(path)
        except Exception as error:  # a damaged pickle raises anything
            reason = str(error) if type(error) is ValueError else getattr(error, "strerror", None)
            raise InputError(
                f"{path}: expected the weights of this backbone, as torch.save writes a state dict, but it cannot be "
                f"read ({one_line(reason or type(error).__name__)}): another kind of file, or a damaged one"
            ) from error
        own = self.body.state_dict()
        weights = {name: t for name, t in weights.items() if torch.is_tensor(t)} if isinstance(weights, dict) else {}
        missing = [key for key in own if key not in weights and not key.endswith("num_batches_tracked")]
        wrong = [key for key in own if key in weights and weights[key].shape != own[key].shape]
        if missing or wrong:
            raise InputError(
                f"{path}: expected the weights of this backbone in torchvision's names; "
                f"{len(missing)} are missing and {len(wrong)} have other shapes, first {(missing + wrong)[0]!r}"
            )
        self.body.load_state_dict({key: weights[key] for key in own if key in weights}, strict=False)


def _create(name: str, num_features: int, pretrained: bool, dilation: bool) -> nn.Module:
    import timm

    if not timm.is_model(name):
        hint = did_you_mean(name, timm.list_models(), most=3)
        raise InputError(f"unknown backbone {name!r}: expected a timm model name{hint}")
    if pretrained:
        name = IMAGENET_V1.get(name, name)
        logger.info("ImageNet weights of %s: from timm's cache, or downloaded", name)
    kwargs = {"output_stride": 16} if dilation else {}
    try:
        return timm.create_model(
            name, features_only=True, out_indices=tuple(range(-num_features, 0)), pretrained=pretrained, **kwargs
        )
    except OSError as error:
        raise InputError(
            f"the ImageNet weights of {name!r} could not be downloaded ({type(error).__name__}). Without a network, "
            "pass pretrained_backbone=FILE (torchvision's names), --weights CHECKPOINT, or pretrained_backbone=false "
            "to start from random values (which needs far more data)"
        ) from error


def _three_floats(values: Sequence[float]) -> tuple[float, float, float]:
    red, green, blue = values
    return float(red), float(green), float(blue)


def _freeze(parameters) -> None:
    for parameter in parameters:
        parameter.requires_grad_(False)

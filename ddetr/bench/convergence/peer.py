"""What a network of other people is here: a loss, detections, and our backbone."""

from abc import abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddetr.engine.config import TrainConfig
from ddetr.engine.step import MicroBatch
from ddetr.models.backbones import Backbone


class Peer(nn.Module):
    """A network of other people behind what training needs of it."""

    body: Backbone

    @abstractmethod
    def loss(self, batch: MicroBatch) -> Tensor:
        """The total of a micro-batch, a scalar."""

    @abstractmethod
    def detect(self, batch: MicroBatch) -> list[dict[str, Tensor]]:
        """As `PostProcess`: for each image `scores` (k,), `labels` (k,), `boxes` (k, 4) xyxy in pixels of the original
        image."""


def make_body(config: TrainConfig, num_features: int, *, dilation: bool = False) -> Backbone:
    """The backbone that ours has, with its weights and what is frozen of it."""
    model = config.model
    pretrained = model["pretrained_backbone"]
    freeze = model["freeze_backbone"] or ("stem" if pretrained else "none")
    return Backbone(model["backbone"], num_features, pretrained=pretrained, dilation=dilation, freeze=freeze)


def target_sizes(targets: list[Mapping[str, Tensor]], device: torch.device) -> Tensor:
    """(N, 4) width, height, width, height of the original images."""
    return torch.stack([target["orig_size"] for target in targets]).flip(1).repeat(1, 2).to(device)

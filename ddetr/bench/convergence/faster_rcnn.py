"""Faster R-CNN (arXiv:1506.01497) with a feature pyramid (arXiv:1612.03144): torchvision's, over the maps of our
backbone. Anchors, pooling and widths are the published ones, in proportion to image_size 800 and hidden_dim 256."""

import torch
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import FeaturePyramidNetwork, MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from ddetr.bench.convergence.peer import Peer, make_body, target_sizes
from ddetr.boxes import box_cxcywh_to_xyxy
from ddetr.engine.config import TrainConfig
from ddetr.engine.step import MicroBatch
from ddetr.models.backbones import Backbone

_LEVELS = ("0", "1", "2", "3")  # strides 4, 8, 16, 32; torchvision adds "pool", of 64


class FasterRcnn(Peer):
    """Images are cut out of their padding: torchvision normalises and pads them itself, and does not resize them."""

    def __init__(self, config: TrainConfig, num_classes: int):
        super().__init__()
        scale, width = config.data.image_size / 800, config.model["hidden_dim"]
        self.body = make_body(config, len(_LEVELS))
        pool = MultiScaleRoIAlign(_LEVELS, output_size=7, sampling_ratio=2, canonical_scale=max(1, round(224 * scale)))
        self.net = FasterRCNN(
            _Pyramid(self.body, width),
            rpn_anchor_generator=AnchorGenerator(
                tuple((32 * 2**level * scale,) for level in range(5)), ((0.5, 1.0, 2.0),) * 5
            ),
            box_roi_pool=pool,
            box_head=TwoMLPHead(width * 7**2, 4 * width),
            box_predictor=FastRCNNPredictor(4 * width, num_classes + 1),  # 0 is the background
            box_detections_per_img=config.max_detections,
        )
        self.net.transform = _Unresized(0, 0, list(self.body.mean), list(self.body.std))

    def loss(self, batch: MicroBatch) -> Tensor:
        images = _images(batch)
        targets = []
        for image, target in zip(images, batch[2]):
            height, width = image.shape[-2:]
            boxes = box_cxcywh_to_xyxy(target["boxes"]) * target["boxes"].new_tensor([width, height, width, height])
            is_box = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)  # others are refused by torchvision
            targets.append({"boxes": boxes[is_box], "labels": target["labels"][is_box] + 1})
        return torch.stack(list(self.net(images, targets).values())).sum()

    def detect(self, batch: MicroBatch) -> list[dict[str, Tensor]]:
        images = _images(batch)
        sizes = target_sizes(batch[2], images[0].device)
        found = []
        for image, one, size in zip(images, self.net(images), sizes):
            height, width = image.shape[-2:]
            boxes = one["boxes"].float() * (size / size.new_tensor([width, height, width, height]))
            found.append({"scores": one["scores"].float(), "labels": one["labels"] - 1, "boxes": boxes})
        return found


class _Unresized(GeneralizedRCNNTransform):
    """Images have their size. (torchvision's own option for it, `_skip_resize`, is for training alone.)"""

    def resize(self, image: Tensor, target: dict[str, Tensor] | None = None) -> tuple[Tensor, dict[str, Tensor] | None]:
        return image, target


class _Pyramid(nn.Module):
    def __init__(self, body: Backbone, width: int):
        super().__init__()
        self.body, self.out_channels = body, width
        self.fpn = FeaturePyramidNetwork(body.num_channels, width, LastLevelMaxPool())

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return self.fpn(dict(zip(_LEVELS, self.body(images))))


def _images(batch: MicroBatch) -> list[Tensor]:
    """(3, h, w) in [0, 1], each without its padding."""
    images, mask, _ = batch
    if mask is None:
        return [image.float() / 255 for image in images]
    sides = [((~one[:, 0]).sum().item(), (~one[0]).sum().item()) for one in mask]
    return [image[:, :h, :w].float() / 255 for image, (h, w) in zip(images, sides)]

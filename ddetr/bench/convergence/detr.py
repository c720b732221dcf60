"""DETR (arXiv:2005.12872) and DETR-DC5: transformers' network and loss, of the sizes of ours, with our backbone in the
place of its own: the same weights, and norms that train where they start from nothing."""

import torch
from torch import Tensor, nn
from transformers import DetrConfig, DetrForObjectDetection, TimmBackboneConfig

from ddetr.bench.convergence.peer import Peer, make_body, target_sizes
from ddetr.bench.convergence.sides import DETR_SIZES
from ddetr.bench.sides import UnavailableError
from ddetr.boxes import box_cxcywh_to_xyxy
from ddetr.datasets import normalize_images
from ddetr.engine.config import TrainConfig
from ddetr.engine.step import MicroBatch
from ddetr.models.backbones import Backbone


class Detr(Peer):
    """One object query makes one detection, of the class that it finds most likely."""

    def __init__(self, config: TrainConfig, num_classes: int, *, dilation: bool):
        super().__init__()
        size = {name: config.model[name] for name in DETR_SIZES}
        self.net = DetrForObjectDetection(
            DetrConfig(
                backbone_config=TimmBackboneConfig(
                    backbone=config.model["backbone"],
                    features_only=True,
                    out_indices=[-1],
                    use_pretrained_backbone=False,
                ),
                num_labels=num_classes,
                num_queries=size["num_queries"],
                d_model=size["hidden_dim"],
                encoder_layers=size["enc_layers"],
                decoder_layers=size["dec_layers"],
                encoder_ffn_dim=size["dim_feedforward"],
                decoder_ffn_dim=size["dim_feedforward"],
                encoder_attention_heads=size["nheads"],
                decoder_attention_heads=size["nheads"],
                dropout=size["dropout"],
                auxiliary_loss=True,
            )
        )
        if not hasattr(self.net.model, "position_embedding"):
            raise UnavailableError("it needs transformers 5 or later")
        self.net.model.backbone = _Encoder(make_body(config, 1, dilation=dilation))

    @property
    def body(self) -> Backbone:
        return self.net.model.backbone.body

    def loss(self, batch: MicroBatch) -> Tensor:
        labels = [{"class_labels": target["labels"], "boxes": target["boxes"]} for target in batch[2]]
        return self.net(**self._inputs(batch), labels=labels).loss

    def detect(self, batch: MicroBatch) -> list[dict[str, Tensor]]:
        outputs = self.net(**self._inputs(batch))
        scores, labels = outputs.logits.float().softmax(-1)[..., :-1].max(-1)  # the last is "no object"
        sizes = target_sizes(batch[2], scores.device)
        boxes = box_cxcywh_to_xyxy(outputs.pred_boxes.float()) * sizes[:, None]
        return [{"scores": s, "labels": label, "boxes": b} for s, label, b in zip(scores, labels, boxes)]

    def _inputs(self, batch: MicroBatch) -> dict[str, Tensor]:
        images, mask, _ = batch
        inside = torch.ones_like(images[:, 0]).long() if mask is None else (~mask).long()
        return {"pixel_values": normalize_images(images, mask, self.body.mean, self.body.std), "pixel_mask": inside}


class _Encoder(nn.Module):
    """As transformers' own: a feature map, and where in it the image is."""

    def __init__(self, body: Backbone):
        super().__init__()
        self.body = body

    def forward(self, pixel_values: Tensor, pixel_mask: Tensor) -> list[tuple[Tensor, Tensor]]:
        (features,) = self.body(pixel_values)
        mask = nn.functional.interpolate(pixel_mask[None].float(), size=features.shape[-2:])[0]
        return [(features, mask.to(torch.bool))]

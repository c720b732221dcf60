"""Hugging Face transformers' Deformable DETR of the sizes of ours: the network, and a training step with its own
loss."""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, TimmBackboneConfig

from ddetr.datasets import normalize_images
from ddetr.engine.config import OptimConfig
from ddetr.engine.step import MicroBatch
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.precision import PRECISIONS


def network_like(detector: DeformableDETR) -> DeformableDetrForObjectDetection:
    """Its network of the sizes of ours with random weights, in training mode; the stem is frozen where ours is.

    Raises:
        InputError: it has none that is like ours.
    """
    config = detector.config
    if config["dilation"]:
        raise InputError("its dilated backbone is another one")
    num_features = len(detector.backbone[0].num_channels)
    backbone = TimmBackboneConfig(
        backbone=config["backbone"],
        features_only=True,
        out_indices=list(range(-num_features, 0)),
        use_pretrained_backbone=False,
    )
    model = DeformableDetrForObjectDetection(
        DeformableDetrConfig(
            backbone_config=backbone,
            num_labels=config["num_classes"],
            num_queries=config["num_queries"],
            d_model=config["hidden_dim"],
            encoder_layers=config["enc_layers"],
            decoder_layers=config["dec_layers"],
            encoder_ffn_dim=config["dim_feedforward"],
            decoder_ffn_dim=config["dim_feedforward"],
            encoder_attention_heads=config["nheads"],
            decoder_attention_heads=config["nheads"],
            num_feature_levels=config["num_feature_levels"],
            encoder_n_points=config["enc_n_points"],
            decoder_n_points=config["dec_n_points"],
            dropout=config["dropout"],
            with_box_refine=config["with_box_refine"],
            two_stage=config["two_stage"],
            two_stage_num_proposals=config["num_queries"],
            auxiliary_loss=True,
        )
    )
    if not all(parameter.requires_grad for parameter in detector.parameters()):  # as ours: the stem is frozen
        for name, parameter in model.named_parameters():
            if "backbone" in name and any(f".{part}." in name for part in ("conv1", "bn1", "layer1")):
                parameter.requires_grad_(False)
    return model.train()


def transformers_step(
    detector: DeformableDETR, optim: OptimConfig, precision: str, device: torch.device
) -> Callable[[list[MicroBatch]], float]:
    """A step on micro-batches as they come from our loader, which returns the mean of their losses.

    detector: ours, whose sizes are taken; its frozen stem too.
    """
    model = network_like(detector).to(device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=optim.lr, weight_decay=optim.weight_decay)
    dtype = PRECISIONS[precision].autocast
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")

    def step(batch: list[MicroBatch]) -> float:
        optimizer.zero_grad()
        loss = 0.0
        for images, mask, targets in batch:
            images = images.to(device)
            mask = None if mask is None else mask.to(device)
            labels = [{"class_labels": t["labels"].to(device), "boxes": t["boxes"].to(device)} for t in targets]
            with torch.autocast(device.type, dtype=dtype) if dtype else nullcontext():
                outputs = model(
                    pixel_values=normalize_images(images, mask),
                    pixel_mask=torch.ones_like(images[:, 0]).long() if mask is None else (~mask).long(),
                    labels=labels,
                )
            scaler.scale(outputs.loss / len(batch)).backward()
            loss += outputs.loss.item() / len(batch)
        scaler.unscale_(optimizer)
        if optim.clip_max_norm > 0:
            nn.utils.clip_grad_norm_(trained, optim.clip_max_norm)
        scaler.step(optimizer)
        scaler.update()
        return loss

    return step

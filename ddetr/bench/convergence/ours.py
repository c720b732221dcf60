"""A side of ours: `ddetr train` into a folder of its own, which goes on where it was."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from ddetr.bench.convergence.points import Curve
from ddetr.datasets import Annotations
from ddetr.engine.callbacks import Clock, seconds_of
from ddetr.engine.config import TrainConfig
from ddetr.engine.fit import run_steps
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.train import build_detector, train
from ddetr.evaluation import CocoEvaluator, Metrics
from ddetr.models.auxiliary import attach_auxiliary
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.runtime.precision import PRECISIONS, numerics
from ddetr.weight_files.sources import find_weights


def check_ours(config: TrainConfig, num_classes: int) -> int:
    """The parameters of the network that is deployed.

    Raises:
        InputError: settings that do not go together.
    """
    with torch.device("meta"):
        model = DeformableDETR(**dict(config.model, pretrained_backbone=False), num_classes=num_classes)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        attach_auxiliary(model, config.auxiliary)
    return parameters


def train_ours(config: TrainConfig, curve: Curve, file: Path, folder: Path) -> None:
    """From where it was to its last epoch.

    Args:
        file: where the points of `curve` go after each validation.
        folder: of the run.
    """

    def reached(epoch: int, step: int, seconds: float, metrics: Metrics) -> None:
        curve.add(epoch, step, seconds, metrics)
        curve.save(file)

    train(replace(config, output=str(folder), resume="auto"), Clock(reached))


def time_ours(config: TrainConfig, train_set: Annotations, device: torch.device, warmup: int, steps: int) -> float:
    """Seconds of a training step, the loading of its images included."""
    torch.manual_seed(config.seed)
    weights = None if config.weights is None else find_weights(config.weights)
    model = build_detector(config, train_set, weights, is_resumed=False)
    model.transformer.set_activation_checkpointing(config.activation_checkpointing)
    data = DetectionData(
        train_set,
        train_set,
        config.data,
        batch_size=config.batch_size,
        device_batch_size=config.device_batch_size,
        seed=config.seed,
    )
    module = DetectionModule(
        model,
        build_criterion(model, config.loss),
        config.optim,
        CocoEvaluator(train_set),
        backbone_pretrained=config.starts_from_weights,
        steps_per_epoch=data.steps_per_epoch,
        total_steps=warmup + steps,
        seed=config.seed,
    )
    times: list[float] = []

    def after_step(number: int, outputs: dict[str, Any]) -> None:
        times.append(seconds_of(device))

    with numerics(deterministic=config.deterministic, tf32=config.tf32):
        run_steps(
            module,
            data,
            steps=warmup + steps,
            precision=PRECISIONS[config.precision].lightning,
            device=device.type,
            after_step=after_step,
        )
    return (times[-1] - times[warmup - 1]) / steps

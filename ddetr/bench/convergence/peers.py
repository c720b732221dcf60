"""The training of other people's networks: our loader, schedule, clipping and evaluation, their losses.

A state is saved after each epoch. A step draws its random numbers from (seed, step), so that a run which goes on is the
one that was not interrupted.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ddetr.arrays import load_tensors
from ddetr.bench.convergence.peer import Peer
from ddetr.bench.convergence.points import Curve
from ddetr.bench.convergence.sides import Side
from ddetr.datasets import Annotations, sample_seed
from ddetr.engine.callbacks import seconds_of
from ddetr.engine.config import TrainConfig
from ddetr.engine.ema import exchange, trained_tensors, update_average
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.optimizer import build_optimizer, lr_factor
from ddetr.engine.step import MicroBatch, on_device
from ddetr.errors import InputError
from ddetr.evaluation import CocoEvaluator, Metrics
from ddetr.files import make_folder
from ddetr.runtime.precision import PRECISIONS, numerics, onednn_matmuls
from ddetr.weight_files.files import write_file

STATE_FILE = "state.pth"


def make_peer(side: Side, config: TrainConfig, num_classes: int) -> Peer:
    """The network of one of the others, of the sizes of ours, with the backbone's weights that ours starts from.

    Raises:
        ImportError, UnavailableError, InputError: it cannot be had.
    """
    kind = side.name.partition("+")[0]
    if kind == "faster-rcnn":
        from ddetr.bench.convergence.faster_rcnn import FasterRcnn

        return FasterRcnn(config, num_classes)
    from ddetr.bench.convergence.detr import Detr

    return Detr(config, num_classes, dilation=kind == "detr-dc5")


class PeerTraining:
    """What trains one of them, from nothing or from a saved state."""

    def __init__(self, side: Side, config: TrainConfig, train: Annotations, val: Annotations, device: torch.device):
        self.config, self.device = config, device
        torch.manual_seed(config.seed)
        self.peer = make_peer(side, config, len(train.categories)).to(device)
        self.peer.body.to(memory_format=torch.channels_last)
        self.evaluator = CocoEvaluator(val, config.max_detections)
        self.data = DetectionData(
            train,
            val,
            config.data,
            batch_size=config.batch_size,
            device_batch_size=config.device_batch_size,
            seed=config.seed,
            epochs=config.epochs,
            leave_out=self.evaluator.leave_out,
        )
        self.data.trainer = SimpleNamespace(
            world_size=1, global_rank=0, num_devices=1, strategy=SimpleNamespace(root_device=device)
        )
        lr, lr_backbone = side.rates(config)
        body = {id(parameter) for parameter in self.peer.body.parameters()}
        trained = [parameter for parameter in self.peer.parameters() if parameter.requires_grad]
        groups = [
            {"params": [p for p in trained if (id(p) in body) == is_body], "rate": rate, "lr": rate}
            for is_body, rate in ((False, lr), (True, lr_backbone))
        ]
        groups = [group | {"weight_decay": config.optim.weight_decay} for group in groups if group["params"]]
        self.optimizer = build_optimizer(groups, config.optim, fused=True)
        self.factor = lr_factor(
            config.optim,
            steps_per_epoch=self.data.steps_per_epoch,
            total_steps=self.data.steps_per_epoch * config.epochs,
        )
        # Where weights are averaged, the averages are validated in their place.
        self.weights = trained_tensors(self.peer) if config.optim.ema_decay is not None else {}
        self.average = {name: tensor.clone() for name, tensor in self.weights.items()}
        self.epoch, self.step, self.seconds = 0, 0, 0.0

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.peer.parameters())

    def train_epoch(self) -> None:
        """The seconds of what follows the last step are validation's."""
        self.peer.train()
        start = seconds_of(self.device)
        for batch in self._batches():
            self.take_step(batch)
        self.epoch += 1
        self.seconds += seconds_of(self.device) - start

    def _batches(self) -> Iterator[list[MicroBatch]]:
        self.data.start = (self.epoch, 0)
        yield from self.data.train_dataloader()

    def take_step(self, batch: list[MicroBatch]) -> None:
        """One that is not finite changes nothing."""
        torch.manual_seed(sample_seed(self.config.seed, self.step, 0))
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * self.factor(self.step)
        self.optimizer.zero_grad()
        num_images = sum(len(targets) for _, _, targets in batch)
        for micro in batch:
            with self._autocast():
                loss = self.peer.loss(on_device(micro, self.device))
            (loss * (len(micro[2]) / num_images)).backward()
        norm = nn.utils.clip_grad_norm_(self.peer.parameters(), self.config.optim.clip_max_norm or float("inf"))
        if norm.isfinite():
            self.optimizer.step()
            if self.config.optim.ema_decay is not None:
                update_average(self.average, self.weights, self.config.optim.ema_decay, self.step)
        self.step += 1

    @torch.no_grad()
    def validate(self) -> Metrics:
        exchange(self.average, self.weights)
        self.peer.eval()
        self.evaluator.reset()
        for batch in self.data.val_dataloader():
            with self._autocast():
                found = self.peer.detect(on_device(batch, self.device))
            self.evaluator.update([int(target["image_id"]) for target in batch[2]], found)
        exchange(self.average, self.weights)
        return self.evaluator.compute()

    def time_steps(self, warmup: int, steps: int) -> float:
        """Seconds of a training step, the loading of its images included."""
        self.peer.train()
        batches = self._endless()
        for index in range(warmup + steps):
            if index == warmup:
                start = seconds_of(self.device)
            self.take_step(next(batches))
        return (seconds_of(self.device) - start) / steps

    def _endless(self) -> Iterator[list[MicroBatch]]:
        while True:
            yield from self._batches()

    def save(self, path: Path) -> None:
        state: dict[str, Any] = {"epoch": self.epoch, "step": self.step, "seconds": self.seconds}
        state |= {"peer": self.peer.state_dict(), "average": self.average, "optimizer": self.optimizer.state_dict()}
        write_file(path, state)

    def load(self, path: Path) -> None:
        """
        Raises:
            InputError: it is not a state of this training.
        """
        try:
            state = load_tensors(path)
            self.peer.load_state_dict(state["peer"])
            for name, tensor in self.average.items():
                tensor.copy_(state["average"][name])
            self.optimizer.load_state_dict(state["optimizer"])
            self.epoch, self.step = int(state["epoch"]), int(state["step"])
            self.seconds = float(state["seconds"])
        except Exception as error:  # a damaged file raises anything
            raise InputError(
                f"{path}: expected a state that ddetr bench convergence saved, but it cannot be read "
                f"({type(error).__name__}): remove {path.parent} to train this side anew"
            ) from error

    def _autocast(self) -> Any:
        dtype = PRECISIONS[self.config.precision].autocast
        return torch.autocast(self.device.type, dtype=dtype) if dtype else nullcontext()


def train_peer(training: PeerTraining, curve: Curve, file: Path, folder: Path) -> None:
    """From where it was to its last epoch.

    Args:
        file: where the points of `curve` go after each validation.
        folder: holds its state.
    """
    config = training.config
    state = make_folder(folder, "--output") / STATE_FILE
    if state.exists():
        training.load(state)
    with onednn_matmuls(), numerics(deterministic=config.deterministic, tf32=config.tf32):
        while training.epoch < config.epochs:
            training.train_epoch()
            if training.epoch % config.val_every == 0 or training.epoch == config.epochs:
                curve.add(training.epoch, training.step, training.seconds, training.validate())
                curve.save(file)
            training.save(state)

"""Annotations to batches: the same global batches whatever the number of processes, decided by (seed, epoch, index)."""

import os
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler

from ddetr.datasets import Annotations, DetectionDataset, build_transform, collate
from ddetr.datasets.dataset import sample_seed
from ddetr.engine.config import DataConfig
from ddetr.errors import InputError

MicroBatch = tuple[Tensor, Tensor | None, list[dict[str, Tensor]]]  # images uint8 (n, 3, H, W), mask or None, targets


class EpochOrder(Sampler[tuple[int, int]]):
    """(index, seed) pairs of this process for one epoch: its share of every global batch of a seeded permutation.

    What is left of the last, incomplete global batch is dropped, as in the official recipe.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        *,
        seed: int,
        epoch: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: tuple[int, int] = (0, 0),
    ):
        """start: (epoch, global batch): that epoch begins there, as if the batches before it had been taken already; its
        length stays that of a whole epoch, by which Lightning counts."""
        self.num_images, self.batch_size, self.seed, self.epoch = num_images, batch_size, seed, epoch
        self.rank, self.world_size, self.start = rank, world_size, start

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.num_images // self.batch_size * self.batch_size // self.world_size

    def __iter__(self) -> Iterator[tuple[int, int]]:
        generator = torch.Generator().manual_seed(sample_seed(self.seed, self.epoch, self.num_images))
        order = torch.randperm(self.num_images, generator=generator)
        order = order[: self.num_images // self.batch_size * self.batch_size]
        share = order.view(-1, self.world_size, self.batch_size // self.world_size)[:, self.rank].flatten()
        first = self.start[1] * self.batch_size // self.world_size if self.epoch == self.start[0] else 0
        for index in share[first:].tolist():
            yield index, sample_seed(self.seed, self.epoch, index)


def collate_whole(samples: Sequence[tuple[Tensor, dict[str, Any]]]) -> MicroBatch:
    """A batch of validation; its mask is None where nothing is padded, as in training."""
    return _without_idle_mask(collate(samples))


def collate_micro(samples: Sequence[tuple[Tensor, dict[str, Any]]], size: int) -> list[MicroBatch]:
    """Samples of one optimisation step -> micro-batches of at most `size`, each padded by itself."""
    return [collate_whole(samples[i : i + size]) for i in range(0, len(samples), size)]


def _without_idle_mask(batch: tuple[Tensor, Tensor, list[dict[str, Tensor]]]) -> MicroBatch:
    images, mask, targets = batch
    return images, mask if mask.any() else None, targets


class DetectionData(pl.LightningDataModule):
    """Loaders of the two splits."""

    def __init__(
        self,
        train: Annotations,
        val: Annotations,
        data: DataConfig,
        *,
        batch_size: int,
        device_batch_size: int,
        seed: int,
    ):
        """batch_size: images an optimisation step, over all processes; device_batch_size: images a forward pass."""
        super().__init__()
        self.train_set = DetectionDataset(
            train, build_transform(data.augmentation, train=True, image_size=data.image_size), normalize=False
        )
        self.val_set = DetectionDataset(
            val,
            build_transform(data.augmentation, train=False, image_size=data.image_size),
            normalize=False,
            train=False,
        )
        self.batch_size, self.device_batch_size, self.seed = batch_size, device_batch_size, seed
        self.start = (0, 0)  # epoch and batch that the run goes on from
        cores = os.cpu_count() or 1
        self.num_workers = (min(4, cores) if cores >= 4 else 0) if data.num_workers is None else data.num_workers
        if len(self.train_set) < batch_size:
            raise InputError(
                f"{train.name} has {len(self.train_set)} images, fewer than one batch of {batch_size}: "
                f"choose a smaller one, for instance --batch_size {max(1, len(self.train_set) // 2)}"
            )

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_set) // self.batch_size

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        if self.batch_size % trainer.world_size:
            raise InputError(f"batch_size {self.batch_size} must be divisible by the {trainer.world_size} processes")
        order = EpochOrder(
            len(self.train_set),
            self.batch_size,
            seed=self.seed,
            epoch=trainer.current_epoch,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.start,
        )
        return DataLoader(
            self.train_set,
            batch_sampler=BatchSampler(order, self.batch_size // trainer.world_size, drop_last=True),
            collate_fn=partial(collate_micro, size=self.device_batch_size),
            **self._loader_options(),
        )

    def state_dict(self) -> dict[str, int]:
        """The position in the epoch, for Lightning to keep in a run's state."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        return {"epoch": self.trainer.current_epoch, "batch": done % self.steps_per_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = (state["epoch"], state["batch"])

    def val_dataloader(self) -> DataLoader:
        # A plain stride: the shares may differ by one image, since validation waits for the others only at its end. A
        # process without a share repeats the first image, which the evaluator counts once: none at all would skip the end.
        share = range(self.trainer.global_rank, len(self.val_set), self.trainer.world_size) or range(1)
        return DataLoader(
            self.val_set,
            sampler=share,
            batch_size=self.device_batch_size,
            collate_fn=collate_whole,
            **self._loader_options(),
        )

    def _loader_options(self) -> dict[str, Any]:
        workers = {"persistent_workers": True, "prefetch_factor": 2} if self.num_workers else {}
        return {"num_workers": self.num_workers, "pin_memory": torch.cuda.is_available(), **workers}

"""Annotations to batches: the same global batches whatever the number of processes, decided by (seed, epoch, index)."""

import logging
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, get_worker_info

from ddetr.datasets import (
    Annotations,
    DetectionDataset,
    build_transform,
    collate,
    padded_shapes,
    training_set,
    worst_padded_hw,
)
from ddetr.datasets.annotations import UnreadImage
from ddetr.datasets.config import DataConfig
from ddetr.datasets.dataset import ReadableImages, readable
from ddetr.datasets.decoding import most_unreadable
from ddetr.engine.loading.sampler import EpochOrder
from ddetr.engine.loading.workers import PREFETCH, default_num_workers, explained, start_worker, workers_that_fit
from ddetr.engine.step import MicroBatch, Region, no_region, on_device
from ddetr.errors import InputError
from ddetr.runtime.limits import allow_open_files, free_shared_memory

logger = logging.getLogger(__name__)

Shapes = Sequence[tuple[int, int]]


def collate_micro(samples: Sequence[tuple[Tensor, dict[str, Any]]], size: int, shapes: Shapes = ()) -> list[MicroBatch]:
    """Samples of one optimisation step -> micro-batches of at most `size`, each padded by itself, to the smallest of
    `shapes` (H, W) where some are given; the mask is None where nothing is padded."""
    batches = [collate(samples[i : i + size], shapes) for i in range(0, len(samples), size)]
    return [(images, mask if mask.any() else None, targets) for images, mask, targets in batches]


class Unreadable:
    """Training files that could not be read, since `take` was last called: filled by the data set, wherever it runs."""

    def __init__(self) -> None:
        self._found: list[tuple[str, str]] = []

    def __call__(self, path: str, reason: str) -> None:
        self._found.append((path, reason))

    def take(self) -> list[tuple[str, str]]:
        found, self._found = self._found, []
        return found


class Loaded(NamedTuple):
    """What a loader process sends: micro-batches whose targets are arrays, and the files that it could not read, as
    what `Loader` is to report.

    Arrays go through the pipe with the rest. Tensors would each take a file descriptor and a piece of shared memory of
    its own: seven per image, which by itself can pass the limit of open files.
    """

    batch: list[MicroBatch]
    unreadable: list[tuple[Any, ...]]


class PackingCollate:
    """Collates, then packs what is collated for its way into the training process."""

    def __init__(self, collate_fn: Callable[..., list[MicroBatch]], unreadable: Unreadable):
        self.collate_fn, self.unreadable = collate_fn, unreadable

    def __call__(self, samples: Sequence[tuple[Tensor, dict[str, Any]] | UnreadImage]) -> Loaded:
        samples, unread = readable(samples)
        batch = self.collate_fn(samples)
        if get_worker_info() is not None:
            batch = [
                (images, mask, [{name: values.numpy() for name, values in target.items()} for target in targets])
                for images, mask, targets in batch
            ]
        return Loaded(batch, [*self.unreadable.take(), *map(tuple, unread)])


class Loader(DataLoader):
    """A DataLoader of lists of micro-batches, or of single ones, that unpacks them and hands unreadable files to
    `report`.

    It enters the `region` "data wait" while somebody waits for it.
    """

    def __init__(
        self,
        *args: Any,
        report: Callable[..., None],
        single: bool = False,
        region: Region = no_region,
        **options: Any,
    ):
        super().__init__(*args, **options)
        self.report, self.single, self.region = report, single, region

    def __iter__(self) -> Iterator[Any]:
        with self.region("data wait"):
            iterator = super().__iter__()  # the workers start now, not when the first batch is asked for
        return self._unpacked(iterator)

    def _unpacked(self, iterator: Iterator[Loaded]) -> Iterator[Any]:
        while True:
            with self.region("data wait"):
                with explained():
                    loaded = next(iterator, None)
                if loaded is None:
                    return
                for unreadable in loaded.unreadable:
                    self.report(*unreadable)
                batch = [
                    (images, mask, [{name: torch.as_tensor(values) for name, values in one.items()} for one in targets])
                    for images, mask, targets in loaded.batch
                ]
            if self.single:
                yield from batch  # none where no image of it can be read
            else:
                yield batch


class _TimedTransfer(pl.LightningDataModule):
    """Enters its `region` "host to device" while a batch goes there."""

    region: Region = no_region

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        with self.region("host to device"):
            is_step = isinstance(batch, list)
            return [on_device(micro, device) for micro in batch] if is_step else on_device(batch, device)


class BatchesInMemory(_TimedTransfer):
    """Training batches that are there, for measurements."""

    def __init__(self, batches: Sequence[list[MicroBatch]], region: Region = no_region):
        super().__init__()
        self.batches, self.region = batches, region

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)


class DetectionData(_TimedTransfer):
    """Loaders of the two splits.

    `start` is (epoch, batch): where a resumed run goes on. The epoch of that number begins with that global batch,
    without loading those before it, though its loader's length stays that of the whole epoch. Set it before the loader
    is asked for.

    `unreadable` are the training files that could not be read so far, in this process: path -> reason.
    """

    def __init__(
        self,
        train: Annotations,
        val: Annotations,
        data: DataConfig,
        *,
        batch_size: int,
        device_batch_size: int,
        seed: int,
        epochs: int | None = None,
        region: Region = no_region,
        leave_out: Callable[[int, str, str], None] | None = None,
    ):
        """batch_size: images per optimisation step, over all processes; device_batch_size: images per forward pass;
        epochs: of the whole run, for what is off in the last ones; without it, it stays on; region: is entered where
        training waits for a batch, and where one goes to the device; leave_out(image id, path, reason) hears of each
        validation image that cannot be read, which is in no batch then. Without it, or where `on_bad_image` is "raise",
        such an image stops validation."""
        super().__init__()
        self.start = (0, 0)
        self.unreadable: dict[str, str] = {}
        self._found = Unreadable()
        self.train_set = training_set(train, data, "raise" if data.on_bad_image == "raise" else self._found)
        self.val_set = DetectionDataset(
            val,
            build_transform(data.augmentation, train=False, image_size=data.image_size),
            normalize=False,
            train=False,
        )
        self._leave_out = None if data.on_bad_image == "raise" else leave_out
        self.batch_size, self.device_batch_size, self.seed, self.region = batch_size, device_batch_size, seed, region
        self.shapes = () if data.padded_shapes is None else padded_shapes(data.image_size, data.padded_shapes)
        self.largest_hw = self.shapes[0] if self.shapes else worst_padded_hw(data.image_size)
        self.buckets, self.num_workers = data.buckets, data.num_workers
        self.strong_epochs = None if epochs is None else max(0, epochs - data.augmentation_off_epochs)
        if len(self.train_set) < batch_size:
            raise InputError(
                f"{train.name} has {len(self.train_set)} images, fewer than one batch of {batch_size}: "
                f"choose a smaller one, for instance --batch_size {max(1, len(self.train_set) // 2)}"
            )

    @property
    def survives_bad_images(self) -> bool:
        """Whether a validation image that cannot be read costs that image alone."""
        return self._leave_out is not None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.train_set) // self.batch_size

    def set_device_batch_size(self, size: int) -> None:
        """For a number that is only found at the start of a fit: before a loader is asked for."""
        self.device_batch_size = size

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        if self.batch_size % trainer.world_size:
            raise InputError(f"batch_size {self.batch_size} must be divisible by the {trainer.world_size} processes")
        order = EpochOrder(
            len(self.train_set),
            self.batch_size,
            seed=self.seed,
            epoch=self.start[0],
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            start=self.start,
            device_batch_size=self.device_batch_size,
            size_of=self.size_of if self.buckets else None,
            strong_epochs=self.strong_epochs,
        )
        return Loader(
            self.train_set,
            batch_sampler=BatchSampler(order, self.batch_size // trainer.world_size, drop_last=True),
            collate_fn=PackingCollate(self._collate(), self._found),
            report=self._report,
            region=self.region,
            **self._loader_options(),
        )

    def state_dict(self) -> dict[str, int]:
        """Where the next batch is, for Lightning to keep in a run's state."""
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.ready
        # Not `current_epoch`, which at the end of an epoch is still that one: processes that load images begin before
        # Lightning tells the number of the new one.
        epoch = self.trainer.fit_loop.epoch_progress.current.processed
        return {"epoch": epoch, "batch": done % self.steps_per_epoch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.start = (state["epoch"], state["batch"])
        if state["batch"] >= self.steps_per_epoch:  # accepted data of fewer images
            raise InputError(
                f"--resume: the run was stopped at batch {state['batch']} of an epoch, and an epoch of these data has "
                f"{self.steps_per_epoch}: put the images back until the epoch is done, or start a new run from its "
                "--weights last.pth"
            )

    def val_dataloader(self) -> DataLoader:
        # A plain stride: the shares may differ by one image, since validation waits for the others only at its end. A
        # process without a share repeats the first image, which the evaluator counts once: none at all would skip the
        # end.
        share = range(self.trainer.global_rank, len(self.val_set), self.trainer.world_size) or range(1)
        return Loader(
            self.val_set if self._leave_out is None else ReadableImages(self.val_set),
            sampler=share,
            batch_size=self.device_batch_size,
            collate_fn=PackingCollate(self._collate(), Unreadable()),
            report=self._leave_out or self._report,
            single=True,
            **self._loader_options(),
        )

    def _collate(self) -> Callable[..., list[MicroBatch]]:
        return partial(collate_micro, size=self.device_batch_size, shapes=self.shapes)

    def size_of(self, index: int, seed: int) -> tuple[int, int]:
        """(h, w) that the recipe will give an image, whatever augmentation adds to it; nothing is loaded."""
        size_hw = self.train_set.annotations.images[index].size_hw
        return self.train_set.transform.draw(size_hw, torch.Generator().manual_seed(seed)).out_hw

    def _report(self, path: str, reason: str) -> None:
        """Says each file once, and refuses when they are too many."""
        if path in self.unreadable:
            return
        self.unreadable[path] = reason
        num_images = len(self.train_set)
        allowed = most_unreadable(num_images)
        if len(self.unreadable) > allowed:
            raise InputError(
                f"{len(self.unreadable)} of the {num_images} training images can't be read, more than {allowed}; the "
                f"last: {reason}; `ddetr data audit --decode true` lists all that are damaged: restore them, or remove "
                "their entries"
            )
        logger.warning(
            "%s; another image stands in for it (unreadable so far: %d of %d; --data.on_bad_image raise stops "
            "instead)",
            reason, len(self.unreadable), num_images,
        )  # fmt: skip

    def _loader_options(self) -> dict[str, Any]:
        num_workers = self._default_num_workers if self.num_workers is None else self.num_workers
        options = {"num_workers": num_workers, "pin_memory": self._is_for_gpu, "worker_init_fn": start_worker}
        if num_workers:
            allow_open_files()
            options |= {"persistent_workers": True, "prefetch_factor": PREFETCH}
        return options

    @property
    def _is_for_gpu(self) -> bool:
        """Where nobody trains, but the loaders are measured: whether there is one."""
        strategy = getattr(self.trainer, "strategy", None)
        return torch.cuda.is_available() if strategy is None else strategy.root_device.type == "cuda"

    @cached_property
    def _default_num_workers(self) -> int:
        processes = _processes_here(self.trainer)
        wanted = default_num_workers(on_gpu=self._is_for_gpu, processes=processes)
        height, width = self.largest_hw
        batch_bytes = self.batch_size // self.trainer.world_size * height * width * 4  # 8-bit colours and the mask
        free = free_shared_memory()
        fitting = workers_that_fit(wanted, batch_bytes, None if free is None else free // processes)
        if fitting < wanted:
            logger.warning(
                "/dev/shm has %.0f MiB free, and a batch may take %.0f MiB of it: %s. Give it room (docker run "
                "--shm-size 8g; compose: shm_size; Kubernetes: an emptyDir in memory); --data.num_workers insists on "
                "a number",
                free / 2**20, batch_bytes / 2**20,
                f"{fitting} instead of {wanted} processes load images" if fitting
                else f"the training process loads images itself, instead of {wanted} others",
            )  # fmt: skip
        return fitting


def _processes_here(trainer: pl.Trainer) -> int:
    """Training processes on this machine."""
    return max(1, getattr(trainer, "num_devices", 1))

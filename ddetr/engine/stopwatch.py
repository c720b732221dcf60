"""Where the time of a training step goes: a stop watch whose regions the engine enters.

On a GPU the marks are CUDA events, which cost no waiting: what a region gets is the time of the device between them,
gaps included in which the device waits for Python.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.step import REGIONS, MicroBatch, Region
from ddetr.runtime.precision import onednn_matmuls


class StopWatch:
    """Time by region; a region inside of another one is not counted in that one."""

    def __init__(self, device: torch.device):
        self.device = device
        self._open = ["the rest"]
        self._marks: list[tuple[str, Any]] = [("the rest", self._now())]  # a region and when a stretch of it ended
        self._steps: list[list[tuple[str, Any]]] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def end_step(self) -> None:
        """What comes now belongs to the next step."""
        self._mark()
        self._steps.append(self._marks)
        self._marks = [self._marks[-1]]

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each region in each step that has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for marks in self._steps:
            row = dict.fromkeys(REGIONS, 0.0)
            for (_, start), (name, end) in zip(marks, marks[1:]):
                row[name] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) / 1e6
            found.append(row)
        return found

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event


class Split(Callback):
    """The stop watch of a run: give its `watch.region` to the criterion, the module and the data."""

    def __init__(self, device: torch.device, warmup: int, on_measure: Callable[[], None] = lambda: None):
        """on_measure: called when the warm-up is over."""
        self.watch, self.warmup, self.on_measure = StopWatch(device), warmup, on_measure
        self.last_loss = float("nan")

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: DetectionModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.watch.end_step()
        if trainer.global_step == self.warmup:
            self.on_measure()
        elif trainer.global_step == trainer.max_steps:
            self.last_loss = float(outputs["loss"])

    def rows(self) -> list[dict[str, float]]:
        """Of the measured steps."""
        return self.watch.steps()[self.warmup :]


class InMemory(pl.LightningDataModule):
    """Batches that are there, in place of `DetectionData`."""

    def __init__(self, batches: Sequence[list[MicroBatch]], region: Region):
        super().__init__()
        self.batches, self.region = batches, region

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.batches, batch_size=None, collate_fn=lambda batch: batch)

    def transfer_batch_to_device(self, batch: list[MicroBatch], device: torch.device, dataloader_idx: int) -> Any:
        with self.region("host to device"):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)


def run_steps(
    module: DetectionModule,
    data: DetectionData | InMemory,
    split: Split,
    *,
    steps: int,
    precision: str,
    device: str,
) -> None:
    """Train for so many steps under a stop watch, on one device.

    Args:
        module: what is trained.
        data: the batches.
        split: the watch, which has the times afterwards.
        steps: with those of the warm-up.
        precision: Lightning's name.
        device: "cpu" or "cuda".
    """
    with warnings.catch_warnings(), _quiet(), onednn_matmuls():
        warnings.simplefilter("ignore")
        trainer = pl.Trainer(
            accelerator=device,
            devices=1,
            precision=precision,
            max_steps=steps,
            max_epochs=-1,
            limit_val_batches=0,
            num_sanity_val_steps=0,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            callbacks=[split],
        )
        trainer.fit(module, datamodule=data)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Lightning's tips and greetings."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero")]
    levels = [one.level for one in loggers]
    try:
        for one in loggers:
            one.setLevel(logging.ERROR)
        yield
    finally:
        for one, level in zip(loggers, levels):
            one.setLevel(level)

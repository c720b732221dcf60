"""Where the time of a training step goes: a stop watch on the engine's own functions.

On a GPU the marks are CUDA events, which cost no waiting: what a region gets is the time of the device between them,
gaps included in which the device waits for Python.
"""

import logging
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback

from ddetr.engine.module import DetectionModule
from ddetr.runtime.precision import onednn_matmuls

DATA_WAIT, TO_DEVICE, FORWARD, MATCHING = "data wait", "host to device", "forward", "matching"
LOSSES, BACKWARD, OPTIMIZER, REST = "losses", "backward", "optimiser", "the rest"
REGIONS = (DATA_WAIT, TO_DEVICE, FORWARD, MATCHING, LOSSES, BACKWARD, OPTIMIZER, REST)


class StopWatch:
    """Time by region; a region inside of another one is not counted in that one."""

    def __init__(self, device: torch.device):
        self.device = device
        self._open = [REST]
        self._marks: list[tuple[str, Any]] = [(REST, self._now())]  # a region and when a stretch of it ended
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

    def wrap(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed as a region."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self.region(name):
                return function(*args, **kwargs)

        return timed

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
    """Puts a stop watch on a run: the functions that Lightning and `DetectionModule.training_step` call are timed."""

    def __init__(self, warmup: int, on_measure: Callable[[], None] = lambda: None, keep: int = 0):
        """on_measure: called when the warm-up is over; keep: batches of the loader to remember, in `kept`."""
        self.warmup, self.on_measure, self.keep = warmup, on_measure, keep
        self.watch: StopWatch | None = None
        self.kept: list[Any] = []
        self.last_loss = float("nan")

    def on_fit_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        watch = self.watch = StopWatch(module.device)
        trainer.strategy.batch_to_device = watch.wrap(TO_DEVICE, trainer.strategy.batch_to_device)
        module.run_model = watch.wrap(FORWARD, module.run_model)
        module.criterion.matcher.match_sets = watch.wrap(MATCHING, module.criterion.matcher.match_sets)
        module.criterion.forward = watch.wrap(LOSSES, module.criterion.forward)
        module.manual_backward = watch.wrap(BACKWARD, module.manual_backward)
        optimizer_step = trainer.strategy.optimizer_step

        def step(optimizer: Any, closure: Callable[[], Any], *args: Any, **kwargs: Any) -> Any:
            with watch.region(OPTIMIZER):
                return optimizer_step(optimizer, watch.wrap(REST, closure), *args, **kwargs)

        trainer.strategy.optimizer_step = step

    def loader(self, batches: Any) -> Any:
        """The loader, whose waits are timed."""
        return _TimedLoader(batches, self)

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


class _TimedLoader:
    def __init__(self, batches: Any, split: Split):
        self.batches, self.split = batches, split

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        with self.split.watch.region(DATA_WAIT):
            iterator = iter(self.batches)
        while True:
            with self.split.watch.region(DATA_WAIT):
                batch = next(iterator, None)
            if batch is None:
                return
            if len(self.split.kept) < self.split.keep:
                self.split.kept.append(batch)
            yield batch


class _Batches(pl.LightningDataModule):
    def __init__(self, make_loader: Callable[[pl.Trainer], Any], split: Split):
        super().__init__()
        self.make_loader, self.split = make_loader, split

    def train_dataloader(self) -> Any:
        return self.split.loader(self.make_loader(self.trainer))


def run_steps(
    module: DetectionModule,
    make_loader: Callable[[pl.Trainer], Any],
    split: Split,
    *,
    steps: int,
    precision: str,
    device: str,
) -> None:
    """Train for so many steps under a stop watch, on one device.

    Args:
        module: what is trained.
        make_loader: trainer -> batches as a training loader gives them.
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
        trainer.fit(module, datamodule=_Batches(make_loader, split))


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

"""What watches a run: progress bar, tables, published checkpoints. All of it on the first process alone."""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from ddetr import console
from ddetr.checkpoint.published import Checkpoint, contents
from ddetr.engine.loading.data_wait import DataWait
from ddetr.engine.module import DetectionModule
from ddetr.engine.run.folder import RunFolder
from ddetr.evaluation.metrics import Metrics
from ddetr.weight_files.files import write_file

logger = logging.getLogger(__name__)

Send = Callable[[Literal["train", "val"], int, Mapping[str, float | None]], None]  # see `Loggers.send`

BEST = "best.pth"
LOSSES = ("loss", "loss_ce", "loss_bbox", "loss_giou")


class Watch(Callback):
    """Looks at the losses every few steps: feeds bar and train.csv."""

    def __init__(
        self,
        run: RunFolder,
        *,
        batch_size: int,
        total_steps: int,
        log_every: int,
        data_wait: DataWait,
        send: Send = lambda *_: None,
    ):
        """data_wait: has its region in the loader; send("train", step, values) hears of every row of train.csv."""
        self.run, self.batch_size, self.total_steps, self.log_every = run, batch_size, total_steps, log_every
        self.data_wait, self.send = data_wait, send
        self._progress: Progress | None = None
        self._since = (time.perf_counter(), 0)  # when the speed was last measured, and at which step
        self._said = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._measure_from(trainer)
        if not trainer.is_global_zero:
            return
        for name in ("train.csv", "val.csv"):
            with self.run.going_on_without(name):
                self.run.table(name).drop_after(trainer.global_step)
        if console.err.is_terminal:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[said]}"),
                console=console.err,  # the one that messages go to: they appear above the bar
            )
            self._progress.start()
            self._task = self._progress.add_task(
                "train", total=self.total_steps, completed=trainer.global_step, said=""
            )

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: DetectionModule, outputs: dict[str, Any], batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        if self._progress is not None:
            self._progress.update(self._task, completed=step)
        if step % self.log_every and step != 1 and not trainer.is_last_batch:
            return
        values = _numbers(outputs)
        now, (then, step_then) = time.perf_counter(), self._since
        speed = (step - step_then) * self.batch_size / (now - then)
        data_wait = self.data_wait.share(now - then)
        memory = _peak_memory_mb(trainer)
        if step_then > 0 and trainer.is_global_zero:  # the first batch waits for the loaders to start
            self.data_wait.warn(data_wait, now - then, getattr(trainer.datamodule, "num_workers", None))
        self._measure_from(trainer)
        if not trainer.is_global_zero:
            return
        row = {"epoch": trainer.current_epoch, "images_per_second": round(speed, 3), "data_wait": round(data_wait, 4)}
        row |= {"gpu_memory_mb": memory}
        self.run.append_row(
            "train.csv",
            {"step": step} | row | {name: f"{value:.6g}" for name, value in sorted(values.items())},
        )
        self.send("train", step, row | values)
        said = "  ".join(f"{name} {values[name]:.3f}" for name in LOSSES)
        said += f"  {speed:.1f} images/s  data {100 * data_wait:.0f} %"
        said += "" if memory is None else f"  {memory / 1024:.1f} GB"
        if self._progress is not None:
            self._progress.update(self._task, said=said)
        elif now - self._said > 20 or step == self.total_steps:
            self._said = now
            left = (self.total_steps - step) * self.batch_size / max(speed, 1e-9)
            logger.info("step %d of %d  %s  %d:%02d left", step, self.total_steps, said, left // 60, left % 60)

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        module: DetectionModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if self._progress is not None:
            self._progress.update(self._task, said=f"validation {batch_idx + 1} of {trainer.num_val_batches[0]}")

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._measure_from(trainer)  # the speed is training's alone

    def _measure_from(self, trainer: pl.Trainer) -> None:
        """Speed, waits and peak of memory are measured from here to the next row."""
        self._since = (time.perf_counter(), trainer.global_step)
        self.data_wait.restart()
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def teardown(self, trainer: pl.Trainer, module: DetectionModule, stage: str) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


def _numbers(outputs: Mapping[str, Tensor | float]) -> dict[str, float]:
    """The scalars among them by one copy to the host."""
    scalars = {name: value for name, value in outputs.items() if isinstance(value, Tensor)}
    return {**outputs, **dict(zip(scalars, torch.stack(list(scalars.values())).tolist()))}


def _peak_memory_mb(trainer: pl.Trainer) -> int | None:
    """What PyTorch has held on the GPU at most since the last row; None on other devices."""
    on_gpu = trainer.strategy.root_device.type == "cuda"
    return round(torch.cuda.max_memory_allocated() / 2**20) if on_gpu else None


class Clock(Callback):
    """Counts the seconds of a run's training, validation left out: of the process's CPU time, on a GPU of wall time. A
    run that is resumed goes on counting."""

    def __init__(self, reached: Callable[[int, int, float, Metrics], None]):
        """reached(epoch, step, seconds, metrics) hears of every validation; epoch and step are how many are done."""
        self.reached, self.seconds, self._since = reached, 0.0, None

    def state_dict(self) -> dict[str, Any]:
        return {"seconds": self.seconds + self._running()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seconds = state["seconds"]

    def on_train_epoch_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._device = trainer.strategy.root_device
        self._since = seconds_of(self._device)

    def on_validation_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._stop()

    def on_train_epoch_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._stop()

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        if trainer.is_global_zero and module.metrics is not None:
            self.reached(trainer.current_epoch + 1, trainer.global_step, self.seconds, module.metrics)

    def _stop(self) -> None:
        self.seconds, self._since = self.seconds + self._running(), None

    def _running(self) -> float:
        return 0.0 if self._since is None else seconds_of(self._device) - self._since


def seconds_of(device: torch.device) -> float:
    """The clock of training on a device: the CPU time of this process, wall time with all work done on a GPU."""
    if device.type != "cuda":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.perf_counter()


class Publish(Callback):
    """After every validation: a row in val.csv, metrics.json, last.pth, and best.pth where the AP is the best so far.

    A best checkpoint that finds no room on the disk is kept, in memory and in the run's state, until there is room.
    """

    def __init__(
        self,
        run: RunFolder,
        checkpoint_of: Callable[[DetectionModule, Metrics], Checkpoint],
        send: Send = lambda *_: None,
        *,
        forget_best: bool = False,
    ):
        """checkpoint_of(module, metrics) is what is published; send("val", step, values) hears of every row of val.csv;
        forget_best: the state of a resumed run is of other validation images."""
        self.run, self.checkpoint_of, self.send, self.forget_best = run, checkpoint_of, send, forget_best
        self.best_ap, self.best_metrics = -math.inf, {}
        self._best_due: dict[str, Any] | None = None  # what best.pth is to hold, while it could not be written

    def state_dict(self) -> dict[str, Any]:
        return {"best_ap": self.best_ap, "best_metrics": self.best_metrics, "best_due": self._best_due}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.forget_best:
            logger.warning("the validation images are others: the best of them from here on is best.pth")
            return
        self.best_ap, self.best_metrics = state["best_ap"], state["best_metrics"]
        self._best_due = state.get("best_due")

    def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        if not trainer.is_global_zero:
            self._best_due = None  # it came with the state, and is the first process's to write
            return
        self._write_best()
        if self.best_metrics and not self._best_due and not (self.run.path / BEST).is_file():
            logger.warning("%s is not there any more: the best validation from here on takes its place", BEST)
            self.best_ap = -math.inf

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        metrics = module.metrics
        assert metrics is not None
        ap = -1.0 if math.isnan(metrics.AP) else metrics.AP
        place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
        measured_on = module.evaluator.measured_on()
        content = place | metrics.to_dict() | ({"measured_on": measured_on} if measured_on else {})
        is_best = ap > self.best_ap
        if is_best:
            self.best_ap, self.best_metrics = ap, content
        if not trainer.is_global_zero:
            return
        row = place | {name: round(value, 6) for name, value in metrics.numbers().items()}
        if unread := module.evaluator.unread:  # a column of runs that had one
            row |= {"images_left_out": len(unread)}
        self.run.append_row("val.csv", row)
        self.send("val", trainer.global_step, {"epoch": trainer.current_epoch, **metrics.numbers()})
        with self.run.going_on_without("metrics.json"):
            self.run.write_json("metrics.json", {"last": content, "best": self.best_metrics})
        published = contents(self.checkpoint_of(module, metrics))
        with self.run.going_on_without("last.pth"):
            write_file(self.run.path / "last.pth", published)
        if is_best:
            self._best_due = published
        self._write_best()
        if self._best_due is published:  # its tensors are the model's own, which trains on
            self._best_due = copy.deepcopy(published)
        logger.info(
            "epoch %d, step %d: AP %.3f  AP50 %.3f  AP75 %.3f%s",
            trainer.current_epoch,
            trainer.global_step,
            metrics.AP,
            metrics.AP50,
            metrics.AP75,
            "  (best so far)" if is_best else "",
        )

    def on_train_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._write_best()

    def on_exception(self, trainer: pl.Trainer, module: DetectionModule, exception: BaseException) -> None:
        self._write_best()

    def _write_best(self) -> None:
        if self._best_due is None:
            return
        with self.run.going_on_without(BEST):
            write_file(self.run.path / BEST, self._best_due)
        with self.run.going_on_without("per_class.csv"):
            self.run.write_csv("per_class.csv", self.best_metrics["per_class"])
        if not {BEST, "per_class.csv"} & self.run.unwritten.keys():
            self._best_due = None

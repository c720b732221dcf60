"""Lightning's loop, with its ways of ending told as a person would, and without what it says that does not apply
here."""

import logging
import signal
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import LambdaCallback

from ddetr.engine.loading.datamodule import BatchesInMemory, DetectionData
from ddetr.engine.loading.workers import explained
from ddetr.engine.module import DetectionModule
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.run.states import RESUME_FILE
from ddetr.engine.saving import Stopped
from ddetr.runtime.precision import onednn_matmuls

logger = logging.getLogger(__name__)


class Trainer(pl.Trainer):
    """Lightning's, but that the last epoch is always validated, whatever `check_val_every_n_epoch` says of the
    others."""

    @property
    def check_val_every_n_epoch(self) -> int | None:
        return 1 if self.current_epoch + 1 == self.max_epochs else self._check_val_every_n_epoch

    @check_val_every_n_epoch.setter
    def check_val_every_n_epoch(self, epochs: int | None) -> None:
        self._check_val_every_n_epoch = epochs


def fit(
    trainer: pl.Trainer,
    module: DetectionModule,
    datamodule: DetectionData,
    run: RunFolder,
    resume_file: Path | None,
) -> None:
    """Training; Ctrl+C stops it as it stops anything else in Python."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        with explained():  # the death of a loader is told wherever the training process is
            trainer.fit(module, datamodule=datamodule, ckpt_path=resume_file, weights_only=True)
    except Stopped as stop:
        saved = "no state is saved yet: the same command with --resume starts anew"
        if stop.saved_step is not None:
            saved = f"the state of step {stop.saved_step} is saved, and the same command with --resume goes on from it"
        logger.info("stopped by %s at step %d: %s", signal.Signals(stop.signum).name, trainer.global_step, saved)
        if stop.signum == signal.SIGINT and stop.code:
            raise KeyboardInterrupt from None
        raise
    except (RuntimeError, ConnectionError) as error:
        if trainer.world_size > 1 and (died := died_process(trainer, error)):
            raise ChildProcessError(died) from error
        raise
    except SystemExit:  # Lightning's answer to Ctrl+C, which it also switches off
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        if (run.path / RESUME_FILE).is_file():
            logger.info("stopped; the same command with --resume goes on from the last saved state")
        raise KeyboardInterrupt from None


def run_steps(
    module: DetectionModule,
    data: DetectionData | BatchesInMemory,
    *,
    steps: int,
    precision: str,
    device: str,
    after_step: Callable[[int, dict[str, Any]], None],
) -> None:
    """So many steps on one device, without validation, files and messages, for measurements.

    Args:
        precision: Lightning's name.
        device: "cpu" or "cuda".
        after_step: called with the step's number, from 1, and what `training_step` returned.
    """
    with warnings.catch_warnings(), onednn_matmuls():
        quiet_lightning()
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
            callbacks=[
                LambdaCallback(
                    on_train_batch_end=lambda trainer, _, outputs, *__: after_step(trainer.global_step, outputs)
                )
            ],
        )
        trainer.fit(module, datamodule=data)


def quiet_lightning() -> None:
    """What Lightning says that does not apply here: the folder, the workers and the logger are chosen by ddetr."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # It alone says which process has died where the others wait for it, before it ends them.
    logging.getLogger("lightning.fabric.strategies.launchers.subprocess_script").setLevel(logging.INFO)
    for message in (
        "Checkpoint directory .* exists and is not empty",
        "The '.*_dataloader' does not have many workers",
        "You're resuming from a checkpoint that ended before the epoch ended",  # DetectionData knows the position
        "Grad strides do not match bucket view strides",  # of 1 x 1 convolutions, whose channels-last strides are any
        "Found .* in eval mode at the start of training",  # the batch norms that optim.freeze names
        "Detected call of `lr_scheduler.step",  # of the first step, where fp16's scaler leaves it out
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of PyTorch
    ):
        warnings.filterwarnings("ignore", message)


# How the backends say that there is nobody at the other end: gloo's and NCCL's messages, PyTorch's store.
_LOST = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe", "socket", "store")
_SECONDS_TO_DIE = 3


def died_process(trainer: pl.Trainer, error: Exception) -> str | None:
    """A sentence that names the process which has died, where that is what `error` comes from; None where it is not."""
    if not any(word in str(error).lower() for word in _LOST):
        return None
    rank, size = trainer.global_rank, trainer.world_size
    reason = str(error).strip().splitlines()[0]
    children = getattr(trainer.strategy.launcher, "procs", [])
    give_up = time.monotonic() + _SECONDS_TO_DIE
    while children and time.monotonic() < give_up:
        for number, child in enumerate(children, start=1):
            if child.poll():
                return (
                    f"process {number} of {size} (pid {child.pid}) has ended with exit code {child.returncode}, a "
                    "negative one is a signal (-9: killed, often for lack of memory): the run is stopped. What it "
                    "said stands above; the same command with --resume goes on from the last saved state"
                )
        time.sleep(0.1)
    return (
        f"process {rank} of {size} has lost another one ({reason}): the run is stopped. The launcher (torchrun, Slurm) "
        "names the process that ended first; the same command with --resume goes on from the last saved state"
    )

"""The state of a run on disk: when it is saved, how it is found again, and what happens when the run is told to stop.

A state is last.ckpt; the one before it stays as previous.ckpt. Both are written under another name first, so that a run
killed at any moment leaves a whole one. A step draws its random numbers from (seed, step, process), a sample its own
from (seed, epoch, index): with weights, optimiser, schedule, scaler and the position in the epoch that is all the
state.
"""

import _thread
import logging
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import lightning.pytorch as pl
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback

from ddetr import console
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.run.states import PREVIOUS_FILE, RESUME_FILE
from ddetr.runtime.signals import STOP_SIGNALS
from ddetr.weight_files.files import write_file

logger = logging.getLogger(__name__)

MINUTES_BETWEEN_SAVES = 10
PATIENCE = 2.5  # seconds that somebody waits, after Ctrl+C, for a step to end; then its work is given up


class Stopped(SystemExit):
    """A signal has ended the run after its state was saved. The exit code is 128 + signal, as a shell would report
    it."""

    def __init__(self, signum: int, trainer: pl.Trainer, saved_step: int | None):
        # Lightning kills the whole run where a process that it has started fails; this one has done as it was told.
        environment = getattr(trainer.strategy, "cluster_environment", None)
        is_lightnings = environment is not None and not environment.creates_processes_externally
        super().__init__(0 if is_lightnings and not trainer.is_global_zero else 128 + signum)
        self.signum, self.saved_step = signum, saved_step

    def __str__(self) -> str:
        return signal.Signals(self.signum).name


@dataclass
class Requests:
    """What is wished to happen after the step. `SaveState` and the module share one: the first fills in what this
    process wishes, each step exchanges it with the others' wishes, and what they `agree` on the first then does."""

    save: bool = False
    stop: int = 0  # the signal
    agreed_save: bool = False
    agreed_stop: int = 0

    def own(self) -> tuple[int, int]:
        """The wishes of this process, as numbers that the processes add up in `agree`'s order."""
        return int(self.save), self.stop

    def agree(self, num_save: float, sum_stop: float) -> None:
        self.agreed_save = num_save > 0
        self.agreed_stop = self.stop or int(sum_stop > 0) * signal.SIGTERM


class StateFiles(TorchCheckpointIO):
    """Lightning's reader and writer of a run's state. A state that cannot be written is reported, and the run goes
    on."""

    def __init__(self, run: RunFolder):
        self.run = run

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        path = Path(path)
        with self.run.going_on_without(path.name):
            write_file(path, checkpoint, keep_as=path.with_name(PREVIOUS_FILE))


class SaveState(Callback):
    """Saves the run's state every so often, at the end of an epoch, before a validation, and when it is told to
    stop."""

    def __init__(self, run: RunFolder, requests: Requests, *, every: int | None):
        """requests: also the module's; every: steps between saves, None is `MINUTES_BETWEEN_SAVES`."""
        self.run, self.file, self.requests, self.every = run, run.path / RESUME_FILE, requests, every
        self.saved_step: int | None = None  # of the state on disk; None where there is none
        self._saved_at = time.monotonic()
        self._give_up = threading.Timer(PATIENCE, self._interrupt)
        self._is_overdue = self._is_interrupted = False

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:
        """A stop signal is a request from now on, answered at the end of the step. It takes the place of Lightning's
        own handler, which would exchange tensors from within the signal; Lightning puts back the ones before at the
        end."""
        if trainer.ckpt_path is not None:
            self.saved_step = trainer.global_step

        def handle(signum: int, frame: FrameType | None) -> None:
            self.requests.stop = self.requests.stop or signum
            if self._is_overdue:
                self._is_overdue = False
                raise self._stopped(trainer)
            if signum == signal.SIGHUP:
                _leave_terminal()
            if signum == signal.SIGINT:
                if self._is_interrupted:
                    _end_at_once()
                self._is_interrupted = True
                if trainer.is_global_zero:
                    logger.info("stopping after this step; Ctrl+C again ends at once, without saving")
                self._give_up.daemon = True
                self._give_up.start()

        if threading.current_thread() is threading.main_thread():
            for signum in STOP_SIGNALS:
                if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup has it for SIGHUP
                    signal.signal(signum, handle)

    def _interrupt(self) -> None:
        """From the timer's thread: `handle` is called in the main one, which is called back from whatever it waits
        for."""
        self._is_overdue = True
        if hasattr(signal, "pthread_kill"):
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        else:
            _thread.interrupt_main()

    def _stopped(self, trainer: pl.Trainer) -> Stopped:
        self._give_up.cancel()  # what is done now ends soon
        return Stopped(self.requests.agreed_stop or self.requests.stop, trainer, self.saved_step)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if self.every:
            is_time = (trainer.global_step + 1) % self.every == 0
        else:
            is_time = trainer.is_global_zero and time.monotonic() - self._saved_at > MINUTES_BETWEEN_SAVES * 60
        # Lightning takes a state of an epoch's last step for that of a complete epoch, and would skip its validation.
        # So the step before it is always saved: a run that ends in its validation loses one step.
        is_second_to_last = batch_idx + 2 == trainer.num_training_batches
        self.requests.save = bool(is_time or is_second_to_last)

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        is_last = batch_idx + 1 == trainer.num_training_batches
        if is_last:
            return
        if self.requests.agreed_stop:
            self._give_up.cancel()  # a state that is half written is worth more than these seconds
        if self.requests.agreed_save or self.requests.agreed_stop:
            self.save(trainer)
        if self.requests.agreed_stop:
            raise self._stopped(trainer)

    def on_validation_batch_start(
        self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self.requests.stop:
            raise self._stopped(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: Any) -> None:
        self.save(trainer)

    def on_train_end(self, trainer: pl.Trainer, module: Any) -> None:
        self._give_up.cancel()  # Ctrl+C came in the last moment: there is nothing left to be stopped

    def save(self, trainer: pl.Trainer) -> None:
        trainer.save_checkpoint(self.file)
        if self.file.name not in self.run.unwritten:
            self.saved_step = trainer.global_step
        self._saved_at = time.monotonic()


def _end_at_once() -> NoReturn:
    """Files are whole or absent at any moment, and the processes that load images end with this one."""
    with suppress(OSError):  # a closed terminal, a pipe that nobody reads
        console.err.show_cursor()
        os.write(2, b"\nddetr: interrupted; the same command with --resume goes on from the last saved state\n")
    os._exit(128 + signal.SIGINT)


def _leave_terminal() -> None:
    """What is said from now on has nobody to hear it: a terminal that was closed refuses every word. (A pipe whose
    reader has gone with it is `console`'s to notice.)"""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):
        try:
            os.write(descriptor, b"")
        except OSError:
            os.dup2(nowhere, descriptor)
    os.close(nowhere)

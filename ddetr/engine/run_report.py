"""The run report while training: what each session and each validation leaves, and report.html after every validation.

Nothing here ever stops a run: a report that cannot be made is a warning with its reason.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ddetr.engine.callbacks import Publish
from ddetr.engine.module import DetectionModule
from ddetr.engine.run.folder import RunFolder
from ddetr.report import RunFiles, Validation, best_or_last, draw_curves, draw_pictures, write_report
from ddetr.report.validation import BEST_FILE, LAST_FILE
from ddetr.runtime.distributed import is_first_process
from ddetr.runtime.environment import environment
from ddetr.untrusted import MAX_RUN_BYTES, parse_json, read_text

logger = logging.getLogger(__name__)

SESSIONS_FILE = "environment.json"


class Report(Callback):
    """Stands behind `Publish`, whose files it reads. All of it on the first process alone.

    environment.json holds a session per start of the run: what it ran on, from which weights or which step, when it
    gave the last sign of life, and how it ended.
    """

    def __init__(self, run: RunFolder, publish: Publish, weights: Mapping[str, Any] | None = None):
        """
        Args:
            weights: what the run starts from: "source" as it was given, "is_public" (it is no path on this machine) and
                "sha256"; None where it starts from none, or goes on.
        """
        self.run, self.publish, self.weights, self._has_begun = run, publish, weights, False
        self._sessions: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: DetectionModule, batch: Any, batch_idx: int) -> None:
        """Not before: a run that was complete when it was resumed has no session."""
        if not self._has_begun:
            self._begin(trainer, module)

    def _begin(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._has_begun = True
        if not trainer.is_global_zero:
            return
        with harmless(SESSIONS_FILE):
            self._sessions = self._earlier_sessions()
            found = environment(trainer.strategy.root_device) | {"devices": trainer.world_size}
            now = round(time.time(), 1)
            steps = {"from_step": trainer.global_step, "step": trainer.global_step, "total_steps": module.total_steps}
            session = {"state": "running", "reason": None, "began": now, "seen": now, **steps}
            if self.weights is not None:
                session["weights"] = dict(self.weights)
            session["environment"] = found
            self._sessions.append(session)
            self._write()

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        if not trainer.is_global_zero or module.metrics is None:
            return
        with harmless(LAST_FILE):
            place = {"step": trainer.global_step, "epoch": trainer.current_epoch}
            validation = Validation.of(module.evaluator, module.metrics, **place)
            validation.save(self.run.path / LAST_FILE)
            if self.publish.best_metrics.get("step") == trainer.global_step:
                validation.save(self.run.path / BEST_FILE)
        self._note(trainer)
        with harmless("report.html"):
            write_report(RunFiles.read(self.run.path))

    def on_train_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        is_whole = trainer.fit_loop.epoch_progress.current.processed >= trainer.max_epochs
        self._note(trainer, "finished" if is_whole else "stopped", None if is_whole else "it was told to stop")

    def on_exception(self, trainer: pl.Trainer, module: DetectionModule, exception: BaseException) -> None:
        if not self._has_begun:
            self._begin(trainer, module)
        first_line = (str(exception).strip().splitlines() or [""])[0]
        self._note(trainer, "stopped", f"{type(exception).__name__}: {first_line}".removesuffix(": "))

    def _note(self, trainer: pl.Trainer, state: str = "running", reason: str | None = None) -> None:
        """A sign of life."""
        if trainer.is_global_zero and self._sessions:
            seen = {"step": trainer.global_step, "seen": round(time.time(), 1)}
            self._sessions[-1].update(state=state, reason=reason, **seen)
            with harmless(SESSIONS_FILE):
                self._write()

    def _write(self) -> None:
        self.run.write_json(SESSIONS_FILE, {"sessions": self._sessions})

    def _earlier_sessions(self) -> list[dict[str, Any]]:
        try:
            sessions = parse_json(read_text(self.run.path / SESSIONS_FILE, MAX_RUN_BYTES), SESSIONS_FILE)["sessions"]
            return [session for session in sessions if isinstance(session, dict)]
        except (OSError, ValueError, KeyError, TypeError):
            return []


def finish(run: RunFolder, num_pictures: int) -> None:
    """What the end of a run, or of a part of it, leaves to look at: curves.png, pictures/, report.html."""

    def pictures() -> None:
        if (validation := best_or_last(run.path)) is not None:
            draw_pictures(run.path, validation, num_pictures)

    steps: dict[str, Callable[[], object]] = {
        "curves.png": lambda: draw_curves(RunFiles.read(run.path)),
        "pictures": pictures,
        "report.html": lambda: write_report(RunFiles.read(run.path)),
    }
    for what, step in steps.items():
        with harmless(what):
            step()


@contextmanager
def last_word(run: RunFolder) -> Iterator[None]:
    """A run that is stopped in the block, by an error or by hand, says so in its report. The checkpoint of the end is
    written by then."""
    try:
        yield
    except BaseException:
        if is_first_process():
            with harmless("report.html"):
                write_report(RunFiles.read(run.path))
        raise


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """An error in the block is a warning: a disk that is full must not cost the run."""
    try:
        yield
    except Exception as error:
        logger.warning("%s could not be written: %s: %s", what, type(error).__name__, error)
        logger.debug("", exc_info=True)

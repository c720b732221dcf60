"""The end of a run whose AP no longer rises."""

import logging
import math
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback

from ddetr.engine.module import DetectionModule

logger = logging.getLogger(__name__)


class EarlyStopping(Callback):
    """Ends the run after `patience` validations in a row whose AP is not more than `min_delta` above the best before.

    The count is a part of the resume file: a resumed run ends where the uninterrupted one would have, and one that has
    ended so takes no further step unless its patience is raised.
    """

    def __init__(self, patience: int, min_delta: float = 0.0, *, forget_best: bool = False):
        """forget_best: the state of a resumed run is of other validation images."""
        self.patience, self.min_delta, self.forget_best = patience, min_delta, forget_best
        self.best_ap, self.num_worse = -math.inf, 0

    def state_dict(self) -> dict[str, Any]:
        return {"best_ap": self.best_ap, "num_worse": self.num_worse}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self.forget_best:
            self.best_ap, self.num_worse = state["best_ap"], state["num_worse"]

    def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._decide(trainer)

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        assert module.metrics is not None
        ap = -1.0 if math.isnan(module.metrics.AP) else module.metrics.AP
        if ap > self.best_ap + self.min_delta:
            self.best_ap, self.num_worse = ap, 0
        else:
            self.num_worse += 1
        self._decide(trainer)

    def _decide(self, trainer: pl.Trainer) -> None:
        # One process that stopped alone would leave the others waiting for it: the first decides for all.
        is_over = trainer.is_global_zero and self.num_worse >= self.patience
        if not trainer.strategy.reduce_boolean_decision(is_over, all=False):
            return
        trainer.should_stop = True
        if trainer.is_global_zero:
            logger.info(
                "the AP has not risen above %.3f for %d validations: the run ends here (--patience %d; with a larger "
                "one "
                "--resume goes on)", max(self.best_ap, 0.0), self.num_worse, self.patience,
            )  # fmt: skip

"""The black-box recorder: what is done about a training step that fails, and what is kept of it.

A step whose loss or gradient is not finite is skipped: no update, and the batch norms' statistics are put back. A step
that raises ends the run. Both leave a bundle (bundle.py) that `ddetr replay` computes again.
"""

import logging
import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ddetr.datasets import Annotations
from ddetr.engine.blackbox.bundle import module_of, write_bundle
from ddetr.engine.blackbox.trace import NormStatistics, NotFinite, find_non_finite, non_finite_parameters
from ddetr.engine.step import Step
from ddetr.errors import InputError
from ddetr.runtime.distributed import agree, gathered

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 3  # as many different batches in a row are not at fault: the weights are
LEAST_LOSS_SCALE = 1.0  # of a gradient scaler: above it overflow is its way of finding the scale, and no bad step


class StepGuard(Callback):
    """Skips the steps that are not finite, up to a bound, and records them and every crash.

    `skipped` says whether the last step left the weights as they were.
    """

    def __init__(
        self,
        run: Path | None = None,
        *,
        max_bad_steps: int = 10,
        config: Mapping[str, Any] | None = None,
        annotations: Annotations | None = None,
        last_checkpoint: Path | None = None,
    ):
        """
        Args:
            run: run folder for the bundles; None keeps none.
            max_bad_steps: steps of the whole run, resumed or not, that may be skipped; the next one stops it, and so
                does the third in a row.
            config: settings of the run, written into the bundles.
            annotations: of the training images, to name their files and classes.
            last_checkpoint: where the run's last checkpoint is once there is one, to name it.
        """
        self.run, self.max_bad_steps, self.config = run, max_bad_steps, dict(config or {})
        self.annotations, self.last_checkpoint = annotations, last_checkpoint
        self.total, self.in_a_row, self.skipped = 0, 0, False
        self._bad: _BadStep | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"total": self.total, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state["total"], state["in_a_row"]

    @contextmanager
    def step(self, now: Step) -> Iterator[None]:
        """Around forward, backward and update of one step, in which `check` is called once the gradient is there.

        Raises:
            FloatingPointError: too many bad steps; on all processes alike.
        """
        self._bad, self.skipped = None, False
        norms, matcher = NormStatistics(now.model), now.criterion.matcher
        repaired_before = matcher.num_repaired
        try:
            yield
        except Exception as error:
            self._record_crash(now, norms, error)
            raise
        repaired = matcher.num_repaired - repaired_before
        if self._bad is not None:
            norms.restore()
            self._settle(now, norms, self._bad, repaired)
            return
        self.in_a_row = 0
        if repaired:
            logger.warning(
                "step %d: %d matching costs of images %s were not finite and counted as the worst, though the "
                "loss is finite",
                now.number, repaired, ", ".join(map(str, now.image_ids)),
            )  # fmt: skip

    def check(
        self,
        loss: Tensor,
        grad_norm: Tensor,
        optimizer: torch.optim.Optimizer,
        scaler: torch.amp.GradScaler | None,
    ) -> None:
        """After the backward pass, before the update: takes the gradient away where the step must be skipped.

        One all-reduce and one copy to the host, so that all processes decide alike.
        """
        is_bad_loss, is_bad_gradient = agree(torch.stack([~torch.isfinite(loss), ~torch.isfinite(grad_norm)]))
        if not (is_bad_loss or is_bad_gradient):
            return
        self.skipped = True
        if scaler is not None and not is_bad_loss and scaler.get_scale() > LEAST_LOSS_SCALE:
            return  # the scaler skips the update itself, and halves its scale
        self._bad = _BadStep(float(loss), float(grad_norm), None if scaler is None else scaler.state_dict())
        optimizer.zero_grad()  # without gradients the update changes nothing, neither weights nor moments

    def on_validation_start(self, trainer: pl.Trainer, module: Any) -> None:
        self._refuse_broken_weights(module.model, trainer.global_step)

    def on_save_checkpoint(self, trainer: pl.Trainer, module: Any, checkpoint: dict[str, Any]) -> None:
        self._refuse_broken_weights(module.model, trainer.global_step)

    def _refuse_broken_weights(self, model: nn.Module, step: int) -> None:
        """A finite gradient can still lead to weights that are not: they must not replace the last good ones."""
        if broken := non_finite_parameters(model):
            raise FloatingPointError(
                f"step {step} left weights that are not finite, {broken[0]} first: the run is stopped before "
                f"they are saved. {self._advice()}"
            )

    def _settle(self, now: Step, norms: NormStatistics, bad: "_BadStep", repaired: int) -> None:
        """Diagnose, record, report, and stop the run where it cannot go on. Every process comes here together."""
        self.total += 1
        self.in_a_row += 1
        # Every process looks at its own share: the exchange has spread what one of them brought in.
        scale = bad.scaler["scale"] if bad.scaler else 1.0
        found, why_not = _diagnosed(now, norms, scale)
        own = {
            "rank": now.rank,
            "loss": bad.loss,
            "image_ids": now.image_ids,
            "repaired": repaired,
            "found": None if found is None else asdict(found),
        }
        everyone = gathered(own)
        guilty = next((one for one in everyone if not math.isfinite(one["loss"])), None)
        guilty = guilty or next((one for one in everyone if one["found"]), everyone[0])
        if guilty["found"]:
            first = guilty["found"]["message"]
        else:
            first = why_not or "computed again, the step is finite: the failure does not repeat"
        losses = f"loss {guilty['loss']} and gradient norm {bad.grad_norm}"
        if guilty["repaired"]:
            losses += f"; {guilty['repaired']} matching costs were not finite"
        place = f" on process {guilty['rank']}" if len(everyone) > 1 else ""
        said = f"step {now.number} has {losses}{place}, images {', '.join(map(str, guilty['image_ids']))}: {first}"
        broken = non_finite_parameters(now.model)
        bundle = None
        if now.rank == guilty["rank"]:
            bundle = self._record(now, said, found, loss=bad.loss, grad_norm=bad.grad_norm, scaler=bad.scaler)
        bundle = next((path for path in gathered(bundle) if path), None)
        recorded = f". Recorded: ddetr replay {bundle}" if bundle else ""
        if broken:
            why = "the weights themselves are not finite, which no skipping repairs"
        elif self.total > self.max_bad_steps:
            why = f"{self.total} bad steps are more than --max_bad_steps {self.max_bad_steps} allows"
        elif self.in_a_row >= MAX_IN_A_ROW:
            why = f"{self.in_a_row} bad steps in a row are more than bad luck with the images"
        else:
            if now.rank == 0:
                logger.warning("%s. Skipped, %d of at most %d%s", said, self.total, self.max_bad_steps, recorded)
            return
        raise FloatingPointError(f"{said}. The run is stopped: {why}. {self._advice()}{recorded}")

    def _advice(self) -> str:
        place = self.last_checkpoint
        if place is not None and place.is_file():
            intact = f"its last checkpoint is intact: {place}, from which the same command with --resume goes on"
        else:
            intact = "it has no checkpoint yet"
        return (
            "A lower --optim.lr, --optim.warmup_steps or --precision 32 usually helps; `ddetr data audit` "
            "checks the boxes; "
            f"{intact}"
        )

    def _record_crash(self, now: Step, norms: NormStatistics, error: Exception) -> None:
        """Never raises: the error itself is what must reach the user."""
        if self.run is None:
            return
        if isinstance(error, InputError) and isinstance(error.__cause__, Exception):
            error = error.__cause__  # what happened, in place of what is said of it
        try:
            norms.restore()
            place = module_of(error.__traceback__, now.model)
            said = f"step {now.number} failed{f' in {place}' if place else ''}: {type(error).__name__}: {error}"
            found = None
            # A GPU that is out of memory, or in an unknown state, is not asked to compute the step again.
            if not isinstance(error, torch.cuda.OutOfMemoryError) and "CUDA" not in str(error):
                found, _ = _diagnosed(now, norms, 1.0)
            if found is not None:
                said += f". Before that, {found.message}"
            words = "".join(traceback.format_exception(error))
            bundle = self._record(
                now, said, found, error={"type": type(error).__name__, "module": place, "traceback": words}
            )
            if bundle:
                logger.error("%s. Recorded: ddetr replay %s", said, bundle)
        except Exception:
            logger.exception("the failed step could not be recorded")

    def _record(self, now: Step, said: str, found: NotFinite | None, **facts: Any) -> str | None:
        if self.run is None:
            return None
        return write_bundle(self.run, now, said, found, config=self.config, annotations=self.annotations, **facts)


@dataclass(frozen=True)
class _BadStep:
    loss: float
    grad_norm: float
    scaler: dict[str, Any] | None  # before it has reacted


def _diagnosed(now: Step, norms: NormStatistics, loss_scale: float) -> tuple[NotFinite | None, str]:
    """What is not finite first, or why nothing is known about it."""
    try:
        found = find_non_finite(
            now.model, now.criterion, now.batch, now.num_boxes, seed=now.seed, loss_scale=loss_scale
        )
        return found, ""
    except Exception as error:  # whatever a broken step does when it is computed again
        return None, f"computing the step again to find the place failed ({type(error).__name__}: {error})"
    finally:
        norms.restore()

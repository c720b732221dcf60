"""Preflight: the set-up of a run is tried on a handful of its own images before the run spends days on it.

a. training images  a handful can be read, and goes through the augmentation
b. evaluation       the ground truth, given as predictions to the run's own evaluation, has AP 1
c. first loss       the class loss is the one that the prior of the class heads predicts; every term is finite
d. learning         the loss on one fixed batch falls
e. gradients        they reach every trainable parameter

That labels and boxes make the round trip through transforms, criterion and post-processing is for our tests: no user
can break it.

All of it works on copies: weights, statistics and random states of the run are the same afterwards, bit for bit.
"""

import copy
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ddetr.engine.blackbox.trace import eager
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.preflight.data import Check, check_evaluation, check_training_images
from ddetr.engine.preflight.model import MAX_SECONDS, check_model, fixed_batch
from ddetr.runtime.precision import onednn_matmuls

if TYPE_CHECKING:
    from rich.console import RenderableType


@dataclass(frozen=True)
class PreflightReport:
    """What was looked at before the first step."""

    checks: tuple[Check, ...]
    seconds: float

    @property
    def failed(self) -> list[Check]:
        return [check for check in self.checks if check.status == "failed"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "passed": not self.failed,
            "seconds": round(self.seconds, 1),
            "checks": [asdict(c) for c in self.checks],
        }

    def render(self) -> "RenderableType":
        from rich.table import Table
        from rich.text import Text

        table = Table(title="Preflight", title_style="bold", header_style="bold", expand=False)
        colours = {"ok": "green", "warning": "yellow", "failed": "red"}
        for column in ("", "check", "found", "what to do"):
            table.add_column(column, no_wrap=column in ("", "check"), overflow="fold")
        for name, status, found, advice in _rows(self.checks):
            table.add_row(Text(status, style=colours[status]), Text(name), Text(found), Text(advice))
        return table

    def refusal(self) -> str:
        """One sentence for whoever sees no table."""
        first, others = self.failed[0], len(self.failed) - 1
        words = f"preflight: {first.name}: expected {first.expected}; found {first.found}"
        words += f"; likely {first.cause}" if first.cause else ""
        words += f"; look at {first.next}" if first.next else ""
        words += f" (and {others} more failed checks in the table above)" if others else ""
        return f"{words}. Train all the same: --preflight false"


def run_preflight(
    module: DetectionModule,
    data: DetectionData,
    *,
    from_nothing: bool,
    autocast: torch.dtype | None = None,
    device: str = "cpu",
    max_seconds: float = MAX_SECONDS,
) -> PreflightReport:
    """Try the set-up of a run.

    Args:
        module, data: the run's own, before it has started; they are left as they are.
        from_nothing: whether the heads have their initial weights, so that the first loss is known.
        autocast: the type that the run computes in, where it is not float32.
        device: where the run will be.
        max_seconds: about as long as one batch may be learnt.
    """
    start = time.perf_counter()
    with _random_states_kept(device):
        criterion = copy.deepcopy(module.criterion)
        checks = [
            _guarded("training images", lambda: check_training_images(data.train_set, module.seed)),
            _guarded("evaluation", lambda: check_evaluation(module, data, module.model.num_queries)),
        ]
        batch = fixed_batch(data)
        if batch is None:
            nothing = "none of the training images looked at has an object"
            checks.append(Check("learning", "warning", "a batch to learn", nothing))
        else:
            if any(check.status == "failed" for check in checks):
                max_seconds = min(max_seconds, MAX_SECONDS / 10)  # wrong targets are not learnt, however long one waits
            with eager(), onednn_matmuls():
                checks += check_model(module, criterion, batch, from_nothing, autocast, device, max_seconds)
    return PreflightReport(tuple(checks), time.perf_counter() - start)


def _guarded(name: str, check: Any) -> Check:
    """The check, or its failure where it cannot even be made: the run could not either."""
    try:
        return check()
    except Exception as error:
        return Check(
            name, "failed", "a pipeline that works", f"{type(error).__name__}: {error}", "", "what the error says"
        )


@contextmanager
def _random_states_kept(device: str) -> Iterator[None]:
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([torch.cuda.current_device()] if torch.device(device).type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _rows(checks: Sequence[Check]) -> Iterator[tuple[str, str, str, str]]:
    """What the table shows of each check: name, status, finding, what to do about it."""
    for check in checks:
        advice = [f"likely: {check.cause}"] * bool(check.cause) + [f"look at {check.next}"] * bool(check.next)
        found = check.found if check.status == "ok" else f"expected {check.expected}; found {check.found}"
        yield check.name, check.status, found, "; ".join(advice)

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ddetr.datasets.config import DataConfig
from ddetr.engine.blackbox.guard import StepGuard
from ddetr.engine.step import Step
from ddetr.models.criterion import SetCriterion


@pytest.fixture
def settings(short_run: dict[str, Any], shapes: Path, tmp_path: Path) -> dict[str, Any]:
    """Eight steps of two micro-batches with batch norms and dropout."""
    data = DataConfig(str(shapes), augmentation="plain", image_size=64, num_workers=0)
    return short_run | {"data": data, "batch_size": 2, "device_batch_size": 1, "output": str(tmp_path / "run")}


@pytest.fixture
def break_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Multiply the total loss of these steps by NaN."""

    def arrange(steps: set[int]) -> None:
        now = [0]
        begun, original = StepGuard.step, SetCriterion.total

        def step(self: StepGuard, step: Step) -> Any:
            now[:] = [step.number]
            return begun(self, step)

        monkeypatch.setattr(StepGuard, "step", step)
        monkeypatch.setattr(
            SetCriterion,
            "total",
            lambda self, losses: original(self, losses) * (float("nan") if now[0] in steps else 1),
        )

    return arrange

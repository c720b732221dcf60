"""A run whose AP no longer rises ends, properly, and at the same validation when it was interrupted before."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.early_stopping import EarlyStopping
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.train import train
from ddetr.errors import InputError


def stops_after(aps: list[float], patience: int, min_delta: float = 0.0) -> int | None:
    """The number of the validation after which the run ends."""
    stopping = EarlyStopping(patience, min_delta)
    strategy = SimpleNamespace(reduce_boolean_decision=lambda decision, all: decision)
    trainer = SimpleNamespace(strategy=strategy, should_stop=False, is_global_zero=True)
    for number, ap in enumerate(aps, 1):
        stopping.on_validation_end(trainer, SimpleNamespace(metrics=SimpleNamespace(AP=ap)))
        if trainer.should_stop:
            return number
    return None


@pytest.mark.parametrize(
    ("aps", "patience", "min_delta", "expected"),
    [
        ([0.1, 0.2, 0.2, 0.19], 2, 0.0, 4),
        ([0.1, 0.2, 0.2, 0.21, 0.2], 2, 0.0, None),
        ([0.1, 0.105, 0.109, 0.2], 2, 0.01, 3),  # creeping is not rising
        ([0.1, 0.105, 0.12, 0.12], 2, 0.01, None),
        ([0.3, 0.1, 0.2, 0.29], 3, 0.0, 4),  # rising again is not better than the best
        ([float("nan"), float("nan")], 1, 0.0, 2),
        ([0.0], 1, 0.0, None),
    ],
)
def test_when_a_run_ends(aps: list[float], patience: int, min_delta: float, expected: int | None) -> None:
    assert stops_after(aps, patience, min_delta) == expected


@pytest.fixture
def settings(short_run: dict[str, Any], tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Nothing is learnt: every validation is as good as the first one."""
    return short_run | {
        "model": tiny_model | {"freeze_backbone": "norm"},
        "optim": OptimConfig(lr=0.0, weight_decay=0.0),
        "epochs": 4,
        "patience": 1,
        "batch_size": 8,
        "device_batch_size": 8,
        "num_pictures": 1,
    }


def steps(run: Path) -> list[str]:
    return [row["step"] for row in RunFolder(run).table("val.csv").rows()]


def test_the_run_ends_whole_and_can_go_on_with_more_patience(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(TrainConfig(**settings, output=str(tmp_path / "run")))
    run = result.path
    assert steps(run) == ["1", "2"]
    assert (run / "curves.png").is_file()
    assert list((run / "pictures").iterdir())
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2

    again = train(TrainConfig(**settings, resume=str(run)))  # as it ended so, it takes no further step
    assert steps(run) == ["1", "2"]
    assert again.metrics.to_dict() == result.metrics.to_dict()

    original = RunFolder.append_row

    def interrupted(self: RunFolder, name: str, row: dict[str, Any]) -> None:
        original(self, name, row)
        if (name, row["step"]) == ("train.csv", 3):
            raise KeyboardInterrupt

    patient = settings | {"patience": 2, "resume": str(run)}
    monkeypatch.setattr(RunFolder, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**patient))
    monkeypatch.undo()
    train(TrainConfig(**patient))  # the count of worse validations was kept over both
    assert steps(run) == ["1", "2", "3"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"patience": 0}, "patience must be at least 1"), ({"min_delta": -0.1}, "min_delta must be at least 0")],
)
def test_settings_that_cannot_work_are_refused(
    settings: dict[str, Any], tmp_path: Path, wrong: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        train(TrainConfig(**settings | wrong, output=str(tmp_path / "run")))

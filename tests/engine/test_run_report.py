"""The report while training: it follows the run, and never stops it."""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.datasets.config import DataConfig
from ddetr.engine import run_report as reporting
from ddetr.engine.config import TrainConfig
from ddetr.engine.train import train
from ddetr.report import REPORT_FILE, RunFiles
from ddetr.report.validation import BEST_FILE, LAST_FILE, Validation
from ddetr.runtime import environment


@pytest.fixture
def start(shapes: Path, tiny_model: dict[str, Any], tmp_path: Path) -> Callable[..., Path]:
    def start(**options: Any) -> Path:
        """A run of two steps per epoch; returns its folder."""
        settings = {"epochs": 2, "batch_size": 4, "device_batch_size": 4, "log_every": 1, "num_pictures": 1} | options
        data = DataConfig(str(shapes), augmentation="none", image_size=64, num_workers=0)
        return train(TrainConfig(data, tiny_model, output=str(tmp_path / "run"), **settings)).path

    return start


def sessions(run: Path) -> list[dict[str, Any]]:
    return json.loads((run / "environment.json").read_text())["sessions"]


def test_a_run_leaves_its_environment_and_detections(start: Callable[..., Path]) -> None:
    run = start()
    (session,) = sessions(run)
    assert (session["state"], session["from_step"], session["step"], session["total_steps"]) == ("finished", 0, 4, 4)
    assert session["seen"] >= session["began"]
    found = session["environment"]
    assert found["process"] == os.getpid()
    assert {
        "processor",
        "torch",
        "python",
        "ddetr",
        "commit",
        "backend",
        "command",
        "host",
        "packages",
        "devices",
    } <= set(found)
    assert found["packages"]["numpy"]
    last = Validation.load(run / LAST_FILE)
    assert (last.step, last.epoch) == (4, 1)
    assert Validation.load(run / BEST_FILE).step == json.loads((run / "metrics.json").read_text())["best"]["step"]
    assert RunFiles.read(run).state == ("finished", "step 4 of 4")


def test_a_run_that_fails_says_why_and_a_resumed_one_counts_on(
    start: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from ddetr.engine.callbacks import Publish

    run, original = tmp_path / "run", Publish.on_validation_end

    def fail_late(self: Publish, trainer: Any, module: Any) -> None:
        if trainer.global_step > 2:
            raise RuntimeError("<the disk> is gone\nand more")
        original(self, trainer, module)

    monkeypatch.setattr(Publish, "on_validation_end", fail_late)
    with pytest.raises(RuntimeError, match="the disk"):
        start()
    assert RunFiles.read(run).state == ("stopped", "step 4 of 4; RuntimeError: <the disk> is gone")
    assert "RuntimeError: &lt;the disk&gt; is gone" in (run / REPORT_FILE).read_text()
    monkeypatch.setattr(Publish, "on_validation_end", original)
    first = sessions(run)[0]
    start(resume=str(run))
    assert sessions(run)[0] == first
    assert [s["state"] for s in sessions(run)] == ["stopped", "finished"]
    assert (sessions(run)[1]["from_step"], sessions(run)[1]["step"]) == (3, 4)  # the step before a validation is saved
    assert RunFiles.read(run).seconds >= 0
    assert "in 2 sessions" in (run / REPORT_FILE).read_text()


@pytest.mark.parametrize("broken", ["write_report", "draw_curves", "draw_pictures", "environment"])
def test_what_cannot_be_made_is_said_and_stops_nothing(
    start: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reporting, broken, fail)
    with caplog.at_level(logging.WARNING):
        run = start()
    assert "could not be written: OSError: [Errno 28] No space left on device" in caplog.text
    assert (run / "best.pth").is_file()
    assert (run / REPORT_FILE).exists() == (broken != "write_report")
    assert not list(run.glob(".*"))


def test_the_model_is_not_run_for_the_report(start: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures and report come from the boxes of the validation: as many forward passes as steps and validation
    batches."""
    from ddetr.models.deformable_detr import DeformableDETR

    calls = []
    forward = DeformableDETR.forward

    def counted(self: DeformableDETR, images: Any, *arguments: Any) -> Any:
        if type(images) is torch.Tensor:  # not those of the estimate of the memory
            calls.append(1)
        return forward(self, images, *arguments)

    monkeypatch.setattr(DeformableDETR, "forward", counted)
    start(num_pictures=4, preflight=False)
    assert len(calls) == 4 + 2  # two epochs of two steps, and one batch of validation each


def test_a_run_that_was_killed_is_told_from_one_that_runs(start: Callable[..., Path]) -> None:
    run = start()
    content = json.loads((run / "environment.json").read_text())
    session = content["sessions"][-1]

    def state(**changes: Any) -> tuple[str, str]:
        session.update(state="running", reason=None)
        session["environment"].update(changes)
        (run / "environment.json").write_text(json.dumps(content))
        return RunFiles.read(run).state

    if session["environment"]["process_start"] is None:
        pytest.skip("this system has no /proc to tell whether a process runs")
    assert state() == ("running", "step 4 of 4")  # this very process
    assert environment.is_running(session["environment"])
    assert state(process_start="1")[0] == "stopped"  # another process of the same number
    assert "its process is gone" in state(process_start="1")[1]
    assert "on another machine; last sign of life 2" in state(host="elsewhere")[1]

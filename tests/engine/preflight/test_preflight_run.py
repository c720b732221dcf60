"""Preflight as part of a run: a set-up that works passes, and the run is as it was."""

import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from preflight_parts import CHECKS, SetUp, looked_at, statuses

from ddetr.cli import main as cli
from ddetr.datasets.config import DataConfig
from ddetr.datasets.splits import load_splits
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.preflight.data import Check
from ddetr.engine.preflight.model import fixed_batch
from ddetr.engine.preflight.run import PreflightReport, run_preflight
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.deformable_detr import DeformableDETR


@pytest.mark.parametrize("augmentation", ["official", "plain", "none"])
@pytest.mark.parametrize("changes", [{}, {"two_stage": True}, {"with_box_refine": False}])
def test_a_set_up_that_works_passes(set_up: Callable[..., SetUp], augmentation: str, changes: dict[str, Any]) -> None:
    checks = looked_at(set_up(augmentation=augmentation, **changes))
    assert list(checks) == CHECKS
    assert statuses(checks) == {}, checks
    assert checks["evaluation"].facts["AP"] == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("name", ["cells", "drawn_coco"])
def test_data_as_one_meets_it_pass(request: pytest.FixtureRequest, set_up: Callable[..., SetUp], name: str) -> None:
    """Crowds, degenerate boxes, greyscale images, ids with gaps."""
    config = DataConfig(str(request.getfixturevalue(name)), image_size=128, num_workers=0)
    train_set, val_set = load_splits(config)
    data = DetectionData(train_set, val_set, config, batch_size=4, device_batch_size=2, seed=1)
    module, _ = set_up(num_classes=len(train_set.categories), num_queries=60)
    module.evaluator = CocoEvaluator(val_set)
    assert statuses(looked_at((module, data))) == {}


def test_the_batch_that_is_learned_is_not_augmented(oblong: Path) -> None:
    batches = []
    for options in ({}, {"mosaic": 1.0, "mixup": 1.0, "color_jitter": 1.0}):
        config = DataConfig(str(oblong), image_size=64, num_workers=0, **options)
        data = DetectionData(*load_splits(config), config, batch_size=4, device_batch_size=2, seed=1)
        batches.append(fixed_batch(data))
    (images, _, targets), (other_images, _, other_targets) = batches
    assert torch.equal(images, other_images)
    assert all(torch.equal(one["boxes"], other["boxes"]) for one, other in zip(targets, other_targets, strict=True))


def test_the_run_is_as_it_was_bit_for_bit(set_up: Callable[..., SetUp]) -> None:
    """Weights, batch norms, random states, the evaluator, the mode of the model and the criterion's counter."""
    module, data = set_up()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    torch.manual_seed(9)
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    module.model.eval()
    run_preflight(module, data, from_nothing=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.array_equal(np.random.get_state()[1], drawn[2])
    assert not module.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.evaluator.coco_results() == []
    assert isinstance(module.model, DeformableDETR)
    assert module.model.config["dropout"] == 0.1
    assert module.model.transformer.encoder.layers[0].dropout1.p == 0.1


@pytest.fixture
def settings(short_run: dict[str, Any], oblong: Path, tmp_path: Path) -> dict[str, Any]:
    data = DataConfig(str(oblong), image_size=64, num_workers=0)
    return short_run | {"data": data, "epochs": 1, "batch_size": 2, "preflight": True, "output": str(tmp_path / "run")}


def test_a_run_with_preflight_is_the_run_without(settings: dict[str, Any], tmp_path: Path) -> None:
    from ddetr.checkpoint import load_checkpoint

    with_it = train(TrainConfig(**settings))
    without = train(TrainConfig(**settings | {"preflight": False, "output": str(tmp_path / "other")}))
    one, other = (load_checkpoint(run.path / "last.pth").model for run in (with_it, without))
    assert all(torch.equal(one[name], other[name]) for name in one)
    content = json.loads((with_it.path / "preflight.json").read_text())
    assert content["passed"]
    assert [check["name"] for check in content["checks"]] == CHECKS
    assert not (without.path / "preflight.json").exists()
    written = (with_it.path / "preflight.json").stat().st_mtime_ns
    train(TrainConfig(**settings | {"epochs": 1, "resume": "auto"}))
    assert (with_it.path / "preflight.json").stat().st_mtime_ns == written  # a resumed run has had it


def test_a_failed_check_stops_the_run_before_it_begins(settings: dict[str, Any], tmp_path: Path) -> None:
    broken = settings | {"optim": OptimConfig(lr=0.0, weight_decay=0.0)}
    with pytest.raises(InputError, match="preflight: learning: .*no parameter moves.*--preflight false"):
        train(TrainConfig(**broken))
    run = tmp_path / "run"
    assert not json.loads((run / "preflight.json").read_text())["passed"]
    assert [path.name for path in run.iterdir()] == ["preflight.json"]
    train(TrainConfig(**broken | {"preflight": False}))  # in the same folder
    assert (run / "last.ckpt").is_file()


def options(settings: dict[str, Any]) -> list[str]:
    listed = [
        "--data",
        settings["data"].path,
        "--data.image_size",
        "64",
        "--data.num_workers",
        "0",
        "--batch_size",
        "2",
    ]
    listed += ["--optim.lr", "1e-3", "--output", settings["output"], "--device", "cpu", "--epochs", "1"]
    return listed + [text for n, v in settings["model"].items() for text in (f"--model.{n}", str(v).lower())]


def test_the_command_tries_and_trains_nothing(settings: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["preflight", *options(settings)]) == 0
    shown = capsys.readouterr().out
    for name in CHECKS:
        assert name in shown
    assert [path.name for path in Path(settings["output"]).iterdir()] == ["preflight.json"]
    assert cli.main(["preflight", *options(settings), "--optim.lr", "0"]) == 2
    captured = capsys.readouterr()
    assert "ddetr: error: preflight: learning" in captured.err
    assert "failed" in captured.out


def test_the_command_leaves_nothing_where_no_folder_is_named(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """A folder of the next run's name would give that one another."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = options(settings)
    place = words.index("--output")
    assert cli.main(["preflight", *words[:place], *words[place + 2 :]]) == 0
    assert list((tmp_path / "here").iterdir()) == []
    capsys.readouterr()
    assert cli.main(["preflight", "--data", settings["data"].path, "--resume"]) == 2
    assert "leave --resume out" in capsys.readouterr().err


def test_the_table_shows_brackets_as_they_are() -> None:
    from rich.console import Console

    check = Check("labels", "failed", "[1, 2]", "[bold]", "cause", "place")
    console = Console(record=True, width=120)
    console.print(PreflightReport((check,), 1.0).render())
    shown = console.export_text()
    assert "[1, 2]" in shown
    assert "[bold]" in shown
    assert "likely: cause; look at place" in shown


@pytest.mark.slow
def test_two_processes_end_together(settings: dict[str, Any]) -> None:
    """The first one finds the mistake; the second, which waits for it, must not wait for ever."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddetr", "train"]
    command += [*options(settings), "--optim.lr", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("ddetr: error: preflight: learning") == 1
    assert not (Path(settings["output"]) / "config.yaml").exists()

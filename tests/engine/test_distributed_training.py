"""Two processes are one: the same weights and the same AP as a single process with the same global batches."""

import json
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from forks import Forks

import ddetr
from ddetr.checkpoint import load_checkpoint
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.loading.sampler import EpochOrder
from ddetr.engine.train import train
from ddetr.models.auxiliary import AuxiliaryConfig

SEED, BATCH = 5, 4


def write_data(shapes: Path, folder: Path) -> DataConfig:
    """Eight images, of which the second process has, in the first step, two without an object; seven to validate on,
    which two processes cannot share evenly."""
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    order = [turn.index for turn in EpochOrder(8, BATCH, seed=SEED, rank=1, world_size=2)]
    empty = {content["images"][index]["id"] for index in order[: BATCH // 2]}
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).symlink_to(shapes / "train")
        images = content["images"] if split == "train" else content["images"][:7]
        kept = {image["id"] for image in images} - (empty if split == "train" else set())
        objects = [annotation for annotation in content["annotations"] if annotation["image_id"] in kept]
        file = folder / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"images": images, "annotations": objects}))
    return DataConfig(str(folder), augmentation="none", image_size=64, num_workers=0)


def test_two_processes_under_torchrun(
    shapes: Path, tiny_run: Any, tiny_model: dict[str, Any], tmp_path: Path, forks: Forks
) -> None:
    alone = train(
        TrainConfig(
            write_data(shapes, tmp_path / "data"),
            tiny_model | {"dropout": 0.0},
            # not Adam, whose first steps have the size of the rate however small the gradient: noise alike
            optim=OptimConfig(lr=0.1, sgd=True, ema_decay=0.5),
            auxiliary=AuxiliaryConfig(denoising=4, one_to_many=3, label_noise=0.0, box_noise=0.0),
            epochs=2,
            batch_size=BATCH,
            device_batch_size=1,  # so that gradients are summed up before they are exchanged
            seed=SEED,
            weights=str(tiny_run.path / "last.pth"),
            output=str(tmp_path / "alone"),
            log_every=1,
            num_pictures=0,
            preflight=False,
        )
    )
    assert alone.metrics.AP > 0.1
    options = [
        "--config",
        alone.path / "config.yaml",
        "--output",
        tmp_path / "both",
        "--log_every",
        "1",
        "--num_pictures",
        "1",
        "--preflight",
        "false",
    ]
    program = Path(ddetr.__file__).with_name("__main__.py")
    done = forks(program, "train", *options, processes=2, DDETR_RUN=str(alone.path))
    assert done.returncode == 0, done.stderr

    both = tmp_path / "both"
    first, second = (load_checkpoint(run / "last.pth").model for run in (alone.path, both))
    start = load_checkpoint(tiny_run.path / "last.pth").model
    moved = max(float((first[name] - start[name]).abs().max()) for name in first)
    assert moved > 1e-3
    for name in first:
        assert torch.allclose(first[name], second[name], rtol=0, atol=1e-5), name

    states = [torch.load(run / "last.ckpt", weights_only=True) for run in (alone.path, both)]
    for trained in zip(*(state["state_dict"].values() for state in states)):  # what is published is their average
        assert torch.allclose(*trained, rtol=0, atol=1e-5)

    metrics = json.loads((both / "metrics.json").read_text())
    expected = json.loads((alone.path / "metrics.json").read_text())
    assert metrics["last"]["num_images"] == 7
    for name, value in alone.metrics.numbers().items():
        assert metrics["last"][name] == expected["last"][name], f"{name}: {value}"
    assert yaml.safe_load((both / "config.yaml").read_text()) == yaml.safe_load(
        (alone.path / "config.yaml").read_text()
    )
    assert len((both / "train.csv").read_text().splitlines()) == 1 + 2 * 2
    assert len((both / "val.csv").read_text().splitlines()) == 1 + 2
    assert len(list((both / "pictures").iterdir())) == 1
    assert len(list((both / "tensorboard").glob("events*"))) == 1
    # the first process alone speaks
    assert done.stdout.count("Data audit") == 1
    assert done.stdout.count("What next:") == 1


KILL, TERM = int(signal.SIGKILL), int(signal.SIGTERM)
Launch = Callable[..., subprocess.CompletedProcess]


@pytest.fixture
def launch(forks: Forks, two_process_config: Path) -> Launch:
    return launcher(forks, two_process_config)


def launcher(forks: Forks, two_process_config: Path) -> Launch:
    """`launch(RUN, DISTURBANCE, *options, processes=2)`: two processes, by default under torchrun, of which one may be
    disturbed on its way: see disturbed.py."""

    def start(run: Path, disturbance: list[Any] | None, *options: str, processes: int = 2) -> Any:
        command = ["train", "--config", str(two_process_config), "--output", str(run), *options]
        program = Path(__file__).with_name("disturbed.py")
        return forks(program, json.dumps([[command, disturbance]]), processes=processes, DDETR_TEST_LAUNCHES="1")

    return start


@pytest.fixture(scope="module")
def two_process_config(shapes: Path, tiny_run: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {
        "data": {"path": str(shapes), "image_size": 64, "num_workers": 0},
        "model": yaml.safe_load((tiny_run.path / "config.yaml").read_text())["model"] | {"dropout": 0.1},
        "epochs": 2,
        "batch_size": 2,
        "device_batch_size": 1,
        "log_every": 1,
        "num_pictures": 0,
    }
    file = tmp_path_factory.mktemp("two") / "config.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


WORKERS = ("--data.num_workers", "2")


@pytest.fixture(scope="module")
def whole(forks: Forks, two_process_config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of two processes that nothing disturbs."""
    run = tmp_path_factory.mktemp("whole") / "run"
    done = launcher(forks, two_process_config)(run, None)
    assert done.returncode == 0, done.stderr
    return run


def assert_same_end(run: Path, whole: Path) -> None:
    first, second = (torch.load(path / "last.ckpt", weights_only=True) for path in (whole, run))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name
    assert (whole / "val.csv").read_text() == (run / "val.csv").read_text()


def test_a_signal_to_one_process_stops_both_and_they_resume_exactly(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopped = launch(run, ["at_step", 6, TERM, 1])
    assert stopped.returncode != 0
    assert "stopped by SIGTERM at step 6" in stopped.stderr
    assert f"exitcode  : {128 + TERM}" in stopped.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 6
    resumed = launch(run, None, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(run, whole)


def test_torchrun_names_the_process_that_died_and_both_resume_exactly(
    launch: Launch, whole: Path, tmp_path: Path
) -> None:
    """From the state of an epoch's end, with processes that load images."""
    run = tmp_path / "run"
    done = launch(run, ["at_step", 5, KILL, 1], *WORKERS)
    assert done.returncode != 0
    # The other process says so too, unless torchrun, which sees it first on a busy machine, has ended it by then.
    assert "process 0 of 2 has lost another one" in done.stderr or "Sending process" in done.stderr, done.stderr
    assert "rank      : 1 (local_rank: 1)" in done.stderr
    assert "exitcode  : -9" in done.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 4
    resumed = launch(run, None, "--resume", *WORKERS)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_end(run, whole)


def test_without_a_launcher_the_message_names_the_process_that_died(launch: Launch, tmp_path: Path) -> None:
    """Lightning starts the second process itself. Every five seconds it looks after it, and may be the first to see."""
    done = launch(tmp_path / "run", ["at_step", 3, KILL, 1], "--devices", "2", processes=0)
    if done.returncode == -KILL:
        assert re.search(r"\[rank: 1\] Child process with PID \d+ terminated with code -9", done.stderr), done.stderr
    else:
        assert done.returncode == 1, done.stderr
        assert "ddetr: error: process 1 of 2 (pid " in done.stderr
        assert "has ended with exit code -9" in done.stderr


def test_without_a_launcher_both_stop_at_a_signal_to_the_first(launch: Launch, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = launch(run, ["at_step", 3, TERM, 0], "--devices", "2", processes=0)
    assert done.returncode == 128 + TERM, done.stderr
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 3

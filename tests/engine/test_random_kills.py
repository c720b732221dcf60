"""Two processes with processes that load images, killed at random moments: minutes, and left out by default."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddetr"]
KILL = int(signal.SIGKILL)


@pytest.fixture
def two_processes(shapes: Path, tiny_model: dict[str, Any], tmp_path: Path) -> Any:
    """`two_processes(RUN, *options)` starts them."""
    settings = {
        "data": {"path": str(shapes), "image_size": 64, "num_workers": 2},
        "model": tiny_model | {"dropout": 0.1},
        "optim": {"ema_decay": 0.9},
        "epochs": 40,
        "batch_size": 2,
        "device_batch_size": 1,
        "log_every": 1,
        "num_pictures": 0,
        "preflight": False,
    }
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(settings))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}

    def start(run: Path, *options: str) -> subprocess.Popen:
        command = [*TORCHRUN, "train", "--config", str(config), "--output", str(run), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)

    return start


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_two_processes_killed_at_twenty_random_moments_resume_exactly(two_processes: Any, tmp_path: Path) -> None:
    """With processes that load images: one of the two is killed, or all at once as where a machine goes down."""
    draw = random.Random(0)
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert two_processes(whole).wait(600) == 0
    for number in range(20):
        every = ["--checkpoint_every", "1"] * (draw.random() < 0.5)
        resume = ["--resume"] * (run / "config.yaml").exists()
        with two_processes(run, *every, *resume) as process:
            if draw.random() < 0.8:  # in its training, otherwise anywhere
                began = (run / "train.csv").stat().st_mtime if (run / "train.csv").exists() else 0.0
                while process.poll() is None and not (
                    (run / "train.csv").exists() and (run / "train.csv").stat().st_mtime > began
                ):
                    time.sleep(0.05)
                time.sleep(draw.uniform(0, 1.5))
            else:
                time.sleep(draw.uniform(0.5, 10))
            if process.poll() is not None:
                pass
            elif number % 2:
                for child in children_of(process.pid)[: draw.choice((1, 2))]:
                    kill(child)
            else:  # torchrun first; its processes have sessions of their own and would go on
                children = children_of(process.pid)
                for one in (process.pid, *children):
                    kill(one)
            assert process.wait(120) != 0 or state_step(run) == state_step(whole)
    assert two_processes(run, "--resume").wait(600) == 0
    first, second = (torch.load(path / "last.ckpt", weights_only=True) for path in (whole, run))
    for state in (first, second):
        state["average"] = state["weight_average"]["tensors"]
    for kind in ("state_dict", "average"):
        assert [name for name, value in first[kind].items() if not torch.equal(value, second[kind][name])] == []
    assert (whole / "val.csv").read_text() == (run / "val.csv").read_text()


def children_of(pid: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, KILL)


def state_step(run: Path) -> int:
    file = run / "last.ckpt"
    return torch.load(file, weights_only=True)["global_step"] if file.exists() else 0

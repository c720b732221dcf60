"""What a run was made with, as its report tells it."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from ddetr.runtime import environment
from ddetr.runtime.nvidia import kernel_module


def test_it_is_plain_and_names_what_matters() -> None:
    found = environment.environment(torch.device("cpu"))
    assert json.loads(json.dumps(found)) == found
    assert found["torch"] == torch.__version__
    assert {"torch", "numpy", "timm", "lightning"} <= set(found["packages"])
    assert "gpu" not in found
    assert environment.describe(found).count(found["torch"]) == 1


@pytest.mark.parametrize(
    ("text", "driver"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\nGCC "
            "version: 12\n",
            "535.104.05",
        ),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.10  Release Build\n", "570.86.10"),
        ("", None),
        (None, None),
    ],
)
def test_a_gpu_is_named_with_its_driver(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, text: str | None, driver: str | None
) -> None:
    """On a machine whose CUDA is made up."""
    if text is not None:
        (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
        (tmp_path / "proc/driver/nvidia/version").write_text(text)
    monkeypatch.setattr(environment, "kernel_module", partial(kernel_module, tmp_path))
    gpu = SimpleNamespace(name="NVIDIA H100", total_memory=80 * 2**30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(environment, "backends", list)
    found = environment.environment(torch.device("cuda"))
    assert (found["gpu"], found["gpus"], found["driver"]) == ("NVIDIA H100, 80 GiB", 4, driver)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["/usr/local/bin/ddetr", "train", "--data", "my data"], "ddetr train --data 'my data'"),
        (["/x/site-packages/ddetr/__main__.py", "demo"], "python -m ddetr demo"),
        (["tool.py"], "tool.py"),
    ],
)
def test_the_command_can_be_typed_again(monkeypatch: pytest.MonkeyPatch, arguments: list[str], expected: str) -> None:
    monkeypatch.setattr(sys, "argv", arguments)
    assert environment.environment(torch.device("cpu"))["command"] == expected


def test_a_process_that_is_gone_is_known_to_be_gone() -> None:
    here = environment.environment(torch.device("cpu"))
    if here["process_start"] is None:
        pytest.skip("this system has no /proc")
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    described = here | {"process": child.pid, "process_start": environment._process_start(child.pid)}
    assert environment.is_running(described) is True
    child.kill()
    child.wait()
    child.stdin.close()
    assert environment.is_running(described) is False
    assert environment.is_running(described | {"host": "elsewhere"}) is None
    assert environment.is_running({}) is None

"""What the driver's libraries say, from a pretended driver: through ctypes, and through the whole command."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_facts import gpu_facts

from ddetr.cli import main as cli
from ddetr.doctor import children, diagnosis, driver
from ddetr.doctor.facts import Driver, Gpu


def test_a_driver_is_asked_by_its_libraries(fake_driver: Callable[..., Path]) -> None:
    fake_driver(GPUS=2, MAJOR=8, MINOR=6)
    gpu = Gpu(name="NVIDIA Pretender 9000", capability="8.6", memory_total=24 * 2**30, memory_free=20 * 2**30)
    assert driver.look() == Driver(libcuda=True, cuda="12.4", cu_init=0, nvml=0, version="550.54.15", gpus=[gpu, gpu])


def test_a_mismatch_of_module_and_libraries(fake_driver: Callable[..., Path]) -> None:
    fake_driver(NVML_INIT=18, CU_INIT=803)
    found = driver.look()
    assert (found.nvml, found.nvml_error, found.cu_init) == (18, "Driver/library version mismatch", 803)


def test_one_library_without_the_other(fake_driver: Callable[..., Path]) -> None:
    fake_driver(libraries=("libcuda.so.1",))
    found = driver.look()
    assert (found.libcuda, found.cuda, found.nvml, found.version) == (True, "12.4", None, None)
    assert "libnvidia-ml.so.1" in (found.nvml_error or "")


def test_what_was_found_before_a_crash_stays(fake_driver: Callable[..., Path]) -> None:
    fake_driver(CRASH=1)
    found = driver.look()
    assert found.version == "550.54.15"
    assert found.problem is not None
    assert found.problem.startswith("the process died (SIGABRT)")


def test_eight_gpus_have_time_to_wake_up(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def run(module: str, *, timeout: float) -> children.Outcome:
        given.append(timeout)
        return children.Outcome([], None)

    monkeypatch.setattr(driver.children, "run", run)
    driver.look()
    assert given[0] >= 90


def test_a_library_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if sys.platform != "linux":
        pytest.skip("by the library path of Linux")
    for name in ("libcuda.so.1", "libnvidia-ml.so.1"):
        (tmp_path / name).write_text("no library")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    found = driver.look()
    assert found.problem is None
    assert not found.libcuda
    assert found.libcuda_error
    assert found.nvml_error


@pytest.mark.skipif(torch.cuda.is_available(), reason="the real driver would answer to PyTorch")
def test_a_driver_too_old_end_to_end(fake_driver: Callable[..., Path], doctor: Callable[..., Any]) -> None:
    """PyTorch loads the pretended driver as well, and refuses it."""
    if not torch.version.cuda:
        pytest.skip("this PyTorch asks no driver")
    fake_driver(DRIVER_VERSION="418.87.00", CUDA_VERSION=10010)
    done = doctor("--brief")
    assert done.code == 16, done
    assert done.err == ""
    assert "driver 418.87.00, supports CUDA 10.1; this PyTorch was built for CUDA" in done.out
    assert "update the driver on the host to" in done.out
    assert "NVIDIA Pretender 9000" in done.out
    assert "Exit code 16 (driver-too-old)" in done.out


@pytest.mark.parametrize(
    ("answers", "name"),
    [
        ({"NVML_INIT": 18, "CU_INIT": 803}, "driver-mismatch"),
        ({"CU_INIT": 802}, "cuda-fails"),
        ({"CRASH": 1}, "cuda-fails"),
        ({"DRIVER_VERSION": "470.57.02", "CUDA_VERSION": 11040}, "driver-too-old"),
        ({"MAJOR": 12}, "gpu-too-new"),
        ({"MAJOR": 3, "MINOR": 7}, "gpu-too-old"),
        ({}, "ok"),
    ],
)
def test_a_driver_through_the_whole_command(
    fake_driver: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    tmp_path: Path,
    answers: dict[str, Any],
    name: str,
) -> None:
    """Beside the PyTorch of our image, which is written down."""
    fake_driver(**answers)
    torch_there = gpu_facts().pytorch
    torch_there.gpus, torch_there.available = [], not {"CU_INIT", "CRASH"} & set(answers)
    monkeypatch.setattr(diagnosis.pytorch, "look", lambda: torch_there)
    code = cli.main(["doctor", "--json", "--brief", "--output", str(tmp_path)])
    found = json.loads(capsys.readouterr().out)
    assert found["exit_name"] == name, found["rows"]
    assert code == found["exit_code"]


@pytest.mark.gpu
def test_a_real_driver() -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    found = driver.look()
    assert found.problem is None
    assert (found.cu_init, found.nvml) == (0, 0)
    assert torch.cuda.get_device_name(0) in {gpu.name for gpu in found.gpus}

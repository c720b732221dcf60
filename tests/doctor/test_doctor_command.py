"""`ddetr doctor` as it is typed: what it prints, its exit code, and that nothing about PyTorch can stop it."""

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from doctor_facts import gpu_facts, without_gpu

from ddetr.cli import main as cli
from ddetr.doctor import diagnosis, rendering
from ddetr.doctor.causes import Cause
from ddetr.doctor.diagnosis import Diagnosis, check
from ddetr.doctor.facts import Gpu

BROKEN_TORCH = {
    "missing": ("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')", 10, "not installed for "),
    "needs another": ("import no_such_module", 11, "No module named 'no_such_module'"),
    "library": ("raise OSError('libcudnn.so.9: cannot open shared object file')", 11, "OSError: libcudnn.so.9"),
    "crash": ("import ctypes; ctypes.string_at(0)", 11, "segmentation fault"),
    "exit": ("raise SystemExit(3)", 11, "SystemExit: 3"),
}


@pytest.mark.parametrize("fault", BROKEN_TORCH)
def test_a_pytorch_that_is_not_there_or_broken(doctor: Callable[..., Any], tmp_path: Path, fault: str) -> None:
    source, code, said = BROKEN_TORCH[fault]
    (tmp_path / "shadow" / "torch").mkdir(parents=True)
    (tmp_path / "shadow" / "torch" / "__init__.py").write_text(source)
    done = doctor("--cpu", "--output", str(tmp_path), shadow=tmp_path / "shadow")
    assert done.code == code, done
    assert done.err == ""
    assert said in done.out
    assert "Traceback" not in done.out
    assert "  ok       system" in done.out  # everything else is checked
    assert re.search(r"^  (ok|warning)  +output ", done.out, re.MULTILINE), done.out  # a warning where little is free


def test_the_command_line_reaches_the_doctor_without_pytorch() -> None:
    code = """
import sys
from ddetr.cli.main import main
import ddetr.doctor.diagnosis, ddetr.doctor.rendering
try:
    main(["doctor", "--help"])
except SystemExit:
    pass
heavy = {"torch", "torchvision", "numpy", "matplotlib"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "exit codes (the lowest of those that apply):" in done.stdout
    for cause in Cause:
        assert f"{cause.code}  {cause.title} " in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without GPU")
def test_this_machine_in_one_screen(doctor: Callable[..., Any], tmp_path: Path) -> None:
    done = doctor("--output", str(tmp_path))
    assert done.err == ""
    if done.code == 13:
        assert "no NVIDIA GPU" in done.out
        assert "Fit for work on the CPU" in done.out
    lines = done.out.splitlines()
    assert lines[0] == "PyTorch's own answer"
    assert len(lines) <= 40
    assert any(line.startswith("  ok       cpu                operator (") for line in lines)
    assert "ddetr data audit PATH" in lines[-1]


def test_json_is_for_programs(doctor: Callable[..., Any], tmp_path: Path) -> None:
    done = doctor("--json", "--cpu", "--brief", "--output", str(tmp_path))
    assert done.err == ""
    assert set(done.found) == {"exit_code", "exit_name", "rows", "facts"}
    assert (done.code, done.found["exit_code"], done.found["exit_name"]) == (0, 0, "ok")
    assert done.found["facts"]["pytorch"]["version"] == torch.__version__
    assert set(done.found["rows"][0]) == {"section", "name", "state", "text", "to_do", "cause"}


def test_folders_are_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(diagnosis.pytorch, "look", lambda: gpu_facts().pytorch)
    assert cli.main(["doctor", "--cpu", "--brief", "--data", str(tmp_path / "nowhere")]) == 30
    assert f"there is no folder {tmp_path / 'nowhere'}" in capsys.readouterr().out
    (tmp_path / "file").touch()
    assert cli.main(["doctor", "--cpu", "--brief", "--output", str(tmp_path / "file")]) == 31
    assert "expected a folder" in capsys.readouterr().out


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple[int, str]]:
    """The command on a machine that is written down."""

    def run(facts: Any, *arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(diagnosis, "examine", lambda **options: Diagnosis(facts, check(facts)))
        capsys.readouterr()
        return cli.main(["doctor", *arguments]), capsys.readouterr().out

    return run


def test_a_broken_row_names_cause_and_cure(command: Callable[..., tuple[int, str]]) -> None:
    facts = gpu_facts()
    facts.driver.version, facts.driver.cuda = "470.57.02", "11.4"
    code, out = command(facts)
    assert code == 16
    (number,) = [number for number, line in enumerate(out.splitlines()) if line.startswith("  broken ")]
    assert "driver 470.57.02, supports CUDA 11.4" in out.splitlines()[number]
    assert out.splitlines()[number + 1].strip().startswith("to do: update the driver on the host to 550.54.15")
    assert "Not fit: 1 broken, 0 warnings. First of all: the driver is too old" in out


def test_warnings_alone_exit_with_0(command: Callable[..., tuple[int, str]]) -> None:
    facts = gpu_facts()
    facts.limits.shared_memory = 64 * 2**20
    code, out = command(facts, "--brief")
    assert code == 0
    lines = out.splitlines()
    assert lines[0].startswith(
        "ddetr doctor: Debian GNU/Linux 13 (trixie), x86_64; Python 3.13.5; PyTorch 2.6.0+cu124; "
    )
    assert lines[0].endswith("driver 570.86.10; 1 GPU: NVIDIA A100-SXM4-80GB")
    assert lines[1] == "Limits"
    assert lines[2].startswith("  warning  shared memory")
    assert lines[-1].startswith("Fit for work: 0 broken, 1 warning. Exit code 0 (ok).")
    assert len(lines) == 5


def test_json_of_a_fault(command: Callable[..., tuple[int, str]]) -> None:
    code, out = command(without_gpu(), "--json")
    found = json.loads(out)
    assert (code, found["exit_code"], found["exit_name"]) == (13, 13, "no-gpu")
    assert [row["cause"] for row in found["rows"] if row["state"] == "broken"] == ["no-gpu"]


def test_a_terminal_gets_a_table_that_fits() -> None:
    from rich.console import Console

    facts = gpu_facts(count=2)
    facts.limits.shared_memory = 64 * 2**20
    out = io.StringIO()
    console = Console(width=80, force_terminal=True, color_system=None, file=out)
    for renderable in rendering.shown(Diagnosis(facts, check(facts)), as_json=False, brief=False, terminal=True):
        console.print(renderable)
    text = out.getvalue()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "PyTorch's own answer" in text
    assert "to do: docker run --shm-size=8g" in text


def test_wrong_input_is_2(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["doctor", "--timeout", "soon"]) == 2
    assert "--timeout: expected a number, got 'soon'" in capsys.readouterr().err
    assert cli.main(["doctor", "--datta", "x"]) == 2
    assert "unknown option --datta (did you mean --data?)" in capsys.readouterr().err


def test_gathering_that_raises_is_a_row(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail() -> None:
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")

    monkeypatch.setattr(diagnosis.pytorch, "look", lambda: gpu_facts().pytorch)
    monkeypatch.setattr(diagnosis.machine, "look_at_limits", fail)
    found = diagnosis.examine(cpu=True, compute=False, output=str(tmp_path))
    (row,) = [row for row in found.rows if row.state == "broken"]
    assert (row.name, row.cause) == ("limits", Cause.CHECK_FAILED)
    assert "invalid start byte" in row.text


@pytest.mark.parametrize("driver", ["470.57.02", "570.86.10"])
def test_gpus_are_tried_only_where_they_can_work(monkeypatch: pytest.MonkeyPatch, driver: str) -> None:
    facts = gpu_facts(count=2)
    facts.driver.version, facts.driver.cuda = driver, None
    monkeypatch.setattr(diagnosis.pytorch, "look", lambda: facts.pytorch)
    monkeypatch.setattr(diagnosis.driver, "look", lambda: facts.driver)
    tried = []
    monkeypatch.setattr(diagnosis.trial, "try_devices", lambda gpus, timeout: tried.append(gpus) or [])
    diagnosis.examine()
    assert tried == [[] if driver == "470.57.02" else [0, 1]]


@pytest.mark.parametrize(("names", "tried"), [("gag", [0, 2]), ("ga", [0]), ("ag", [1]), ("aa", []), ("gg", [0, 1])])
def test_the_gpus_that_are_served_are_tried(monkeypatch: pytest.MonkeyPatch, names: str, tried: list[int]) -> None:
    """g: a GPU that this PyTorch has kernels for; a: an ancient one."""
    facts = gpu_facts(count=len(names))
    facts.pytorch.gpus = [Gpu(name=name, capability="8.6" if name == "g" else "3.0") for name in names]
    monkeypatch.setattr(diagnosis.pytorch, "look", lambda: facts.pytorch)
    monkeypatch.setattr(diagnosis.driver, "look", lambda: facts.driver)
    given = []
    monkeypatch.setattr(diagnosis.trial, "try_devices", lambda gpus, timeout: given.append(list(gpus)) or [])
    found = diagnosis.examine()
    assert given == [tried]
    assert (Cause.GPU_TOO_OLD in {row.cause for row in found.rows}) is (not tried)


@pytest.mark.gpu
def test_a_real_gpu(doctor: Callable[..., Any]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    done = doctor("--json")
    states = {row["name"]: row["state"] for row in done.found["rows"] if row["section"] == "Tried"}
    assert {f"cuda:{index}" for index in range(torch.cuda.device_count())} <= set(states)
    assert set(states.values()) == {"ok"}

"""`ddetr bench gpu`: the rehearsal on a CPU with nothing but what the kit has, and what becomes of a stage that
crashes, hangs or comes too late."""

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.bench.gpu import command, marked, network, official, runs, training
from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.gpu.stages import STAGES
from ddetr.cli import main as cli

ROOT = Path(__file__).parents[2]
# What the machine has (issue 11), as distributions.
BASE = ("torch", "triton", "torchvision", "scipy", "timm", "lightning", "transformers", "setuptools", "pip")

# In a child, before anything else: every package that is neither in the base nor in the kit is not there.
HIDE = """
import functools, json, os
from importlib.machinery import PathFinder
HIDDEN = frozenset(json.loads(os.environ["HIDDEN"]))
find = PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.partition(".")[0] in HIDDEN else find(name, path, target)
PathFinder.find_spec = functools.partial(find_spec)  # pytest makes a method of a function
"""
# A stage's process with another function in it: what the test writes into BODY.
STAGE = """
import sys, json, types, os, time, signal
from ddetr.bench.gpu import stages
def run(sheet, place):
    sheet.say("begun")
    {body}
for name in set(stage.module for stage in stages.STAGES.values()):
    module = types.ModuleType(name)
    module.run = run if name == {broken!r} else lambda sheet, place: sheet.check("fine", True)
    sys.modules["ddetr.bench.gpu." + name] = module
stages.main(sys.argv[1], json.loads(sys.argv[2]))
"""


def kit() -> set[str]:
    lines = (ROOT / "requirements" / "gpu-kit.in").read_text().splitlines()
    return {line.strip() for line in lines if line.strip() and not line.startswith("#")}


def with_what_they_bring(names: tuple[str, ...]) -> set[str]:
    """Distributions that an installation of these has, by normalised name."""
    found: set[str] = set()
    todo = list(names)
    while todo:
        name = re.sub(r"[-_.]+", "-", todo.pop()).lower()
        if name in found:
            continue
        try:
            requires = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(name)
        todo += [re.match(r"[\w.-]+", line)[0] for line in requires if "extra ==" not in line]
    return found


def hidden_modules() -> list[str]:
    there = with_what_they_bring(BASE) | kit()
    hidden = []
    for module, distributions in importlib.metadata.packages_distributions().items():
        owners = {re.sub(r"[-_.]+", "-", name).lower() for name in distributions}
        if not owners & (there | {"ddetr"}):
            hidden.append(module)
    return hidden


def test_the_list_of_the_kit_has_all_that_ddetr_needs() -> None:
    needed = {re.match(r"[\w-]+", line)[0] for line in importlib.metadata.requires("ddetr") if "extra" not in line}
    optional = {"tensorboard"}  # a run without it has no event files
    assert needed - with_what_they_bring(BASE) - kit() - optional == set()
    locked = re.findall(r"^([\w.-]+)==", (ROOT / "requirements" / "gpu-kit.lock").read_text(), re.MULTILINE)
    assert set(locked) == kit()


def test_a_rehearsal_with_hidden_packages(tmp_path: Path) -> None:
    """The first stages; `test_the_stages_that_take_minutes` has the others."""
    hidden = hidden_modules()
    assert {"tensorboard", "hypothesis", "pycocotools"} <= set(hidden)
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    path = os.pathsep.join([str(tmp_path), str(ROOT), os.environ.get("PYTHONPATH", "")])
    stages = list(STAGES)[:3]
    arguments = ["--device", "cpu", "--small", "true", "--output", str(tmp_path / "out"), "--only", ",".join(stages)]
    done = subprocess.run(
        [sys.executable, "-m", "ddetr", "bench", "gpu", *arguments],
        env={**os.environ, "PYTHONPATH": path, "HIDDEN": json.dumps(hidden)},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    file = tmp_path / "out" / "gpu.log"
    log = file.read_text() if file.exists() else ""
    assert done.returncode == 0, done.stdout + done.stderr + log
    report = json.loads((tmp_path / "out" / "gpu.json").read_text())
    states = {sheet["stage"]: sheet["state"] for sheet in report["stages"]}
    assert states == dict.fromkeys(stages, "done"), log
    found = {sheet["stage"]: sheet for sheet in report["stages"]}
    assert len(found["checks"]["data"]["errors"]) == 3 + 3 + 1 + 3
    assert [check["detail"] for check in found["sweep"]["checks"]] == ["5 of 5 are right"] * 2
    assert found["sweep"]["data"]["host_us"]["forward"] > 0
    assert {row["side"] for row in found["operator"]["data"]["rows"]} >= {"ours", "grid_sample", "transformers"}
    text = (tmp_path / "out" / "gpu.md").read_text()
    for name in stages:
        assert f"## {name}: {STAGES[name].what}" in text
    assert report["command"] == f"ddetr bench gpu --only {','.join(stages)} --device cpu --small true"
    assert "| tiny" in text
    assert "tiny" in done.stdout


@pytest.mark.slow
def test_the_stages_that_take_minutes(tmp_path: Path) -> None:
    """The detector and its step; real runs, killed and resumed, twice the same, poisoned, the batch size found by
    itself; and the marked tests, which skip themselves without a GPU."""
    place = Place(torch.device("cpu"), small=True, scratch=tmp_path)
    steps, detector = (Sheet(name, ends=time.monotonic() + 250) for name in ("training", "network"))
    training.run(steps, place)
    assert {row["side"] for row in steps.data["sides"]} == {"ours", "official", "transformers"}
    assert steps.data["rows"][0]["estimate_bytes"] > 0
    network.run(detector, place)
    assert {row["network"] for row in detector.data["rows"]} == {"plain", "two-stage"}
    assert ["TF32, CUDA graphs, torch.compile", "they are for GPUs"] in detector.skipped
    assert steps.checks == detector.checks == []
    real = Sheet("runs", ends=time.monotonic() + 250)
    runs.run(real, place)
    assert [check for check in real.checks if not check.ok] == []
    assert len(real.checks) == 4
    tests = Sheet("tests", ends=time.monotonic() + 250)
    marked.run(tests, place)
    assert tests.checks == []
    assert "there is no GPU: all" in tests.skipped[0][1]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., Any]:
    """`ddetr bench gpu` with a first stage that does what `body` says, and others that are fine."""

    def call(body: str, *arguments: str) -> tuple[int, dict[str, Any], str]:
        program = tmp_path / "stage.py"
        program.write_text(STAGE.format(body=body, broken="checks"))
        monkeypatch.setattr(command, "PROCESS", [str(program)])
        code = cli.main(["bench", "gpu", "--device", "cpu", "--output", str(tmp_path / "out"), *arguments])
        captured = capsys.readouterr()
        file = tmp_path / "out" / "gpu.json"
        return code, json.loads(file.read_text()) if file.exists() else {}, captured.out + captured.err

    return call


@pytest.mark.parametrize(
    ("body", "state", "reason"),
    [
        ("raise RuntimeError('no such kernel')", "failed", "RuntimeError: no such kernel"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", "failed", "its process ended with code -11: see gpu.log"),
    ],
    ids=["raises", "dies"],
)
def test_a_stage_that_breaks_leaves_what_it_had_and_the_next_begins(
    run: Callable[..., Any], body: str, state: str, reason: str
) -> None:
    code, report, out = run(body, "--only", "checks,tests")
    assert code == 1
    broken, fine = report["stages"]
    assert (broken["state"], broken["reason"]) == (state, reason)
    assert broken["lines"] == ["begun"]
    assert fine["state"] == "done"
    assert reason in out


def test_a_stage_that_hangs_is_cut_off(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_LEAST_SECONDS", 1)
    monkeypatch.setitem(STAGES, "tests", STAGES["tests"]._replace(seconds=10 * STAGES["checks"].seconds))
    body = "import subprocess; subprocess.Popen(['sleep', '600']); time.sleep(600)"
    began = time.monotonic()
    code, report, _ = run(body, "--only", "checks,tests", "--minutes", "4")
    assert time.monotonic() - began < 200
    assert code == 0
    assert [sheet["state"] for sheet in report["stages"]] == ["cut off", "done"]
    assert report["stages"][0]["reason"] == "its time was up"
    assert report["stages"][0]["lines"] == ["begun"]


def test_a_check_that_does_not_hold_is_the_exit_code(run: Callable[..., Any]) -> None:
    code, report, out = run("sheet.check('two is two', 2 == 3, 'it is not')", "--only", "checks")
    assert code == 1
    assert report["stages"][0]["state"] == "done"
    assert "WRONG: two is two: it is not" in out


def test_a_signal_ends_it_with_what_was_found_written_down(tmp_path: Path) -> None:
    program = tmp_path / "stage.py"
    program.write_text(STAGE.format(body="time.sleep(600)", broken="checks"))
    code = f"from ddetr.bench.gpu import command; from ddetr.cli import main; command.PROCESS = [{str(program)!r}]; "
    code += f"main.main(['bench', 'gpu', '--device', 'cpu', '--output', {str(tmp_path / 'out')!r}])"
    process = subprocess.Popen([sys.executable, "-c", code])
    file = tmp_path / "out" / "gpu.json"
    while not file.exists() or "begun" not in file.read_text():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 128 + signal.SIGTERM
    (sheet,) = json.loads(file.read_text())["stages"]
    assert (sheet["state"], sheet["lines"]) == ("cut off", ["begun"])
    assert "not begun" in (tmp_path / "out" / "gpu.md").read_text()


def test_without_time_nothing_begins(run: Callable[..., Any]) -> None:
    code, report, _ = run("pass", "--minutes", "0.01")
    assert code == 0
    assert {sheet["state"] for sheet in report["stages"]} == {"skipped"}
    assert "no time left" in report["stages"][0]["reason"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--minutes", "-1"], "--minutes: expected more than 0, got -1"),
        (["--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--official", "nowhere"], "--official: there is no folder nowhere"),
        (["--only", "opreator"], "did you mean operator?"),
    ],
)
def test_what_cannot_be_is_said_at_once(run: Callable[..., Any], arguments: list[str], message: str) -> None:
    code, report, out = run("pass", *arguments)
    assert code == 2
    assert message in out
    assert report == {}


def test_the_official_operator_is_waited_for_and_left_out_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    sheet = Sheet("operator")

    def comes(built: Path | None) -> bool:
        return official.wait_for(sheet, Place(torch.device("cpu"), False, tmp_path, built=built and str(built)), 0.1)

    assert not comes(None)
    assert not comes(tmp_path)
    (tmp_path / official.FAILED).write_text("error: no such header")
    assert not comes(tmp_path)
    (tmp_path / "MultiScaleDeformableAttention.so").touch()
    assert comes(tmp_path)
    assert sys.path[0] == str(tmp_path)
    reasons = [why for _, why in sheet.skipped]
    assert [next(word for word in ("--official", "in time", "no such header") if word in why) for why in reasons] == [
        "--official",
        "in time",
        "no such header",
    ]


def test_a_source_that_does_not_build_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils import cpp_extension

    def load(name: str, sources: list[str], **options: Any) -> None:
        (source,) = (Path(file) for file in sources if file.endswith(".cu"))
        assert source.read_text() == "AT_DISPATCH_FLOATING_TYPES(value.scalar_type(), f);"
        raise RuntimeError("[1/3] nvcc ...\na.cu:3: error: no such thing\nninja: stopped")

    monkeypatch.setattr(cpp_extension, "load", load)
    (tmp_path / "ops" / "src" / "cuda").mkdir(parents=True)
    (tmp_path / "ops" / "src" / "cuda" / "a.cu").write_text("AT_DISPATCH_FLOATING_TYPES(value.type(), f);")
    (tmp_path / "built").mkdir()
    with pytest.raises(RuntimeError):
        official.build(tmp_path / "ops", tmp_path / "built")
    assert (tmp_path / "built" / official.FAILED).read_text() == "a.cu:3: error: no such thing"


def test_a_part_that_fails_or_comes_too_late_leaves_the_rest() -> None:
    sheet = Sheet("checks", ends=time.monotonic() + 5)
    with sheet.part("too long", seconds=1000) as go:
        assert not go
    with sheet.part("broken") as go:
        assert go
        raise ValueError("a wrong number")
    assert sheet.skipped[0][0] == "too long"
    assert "no time left" in sheet.skipped[0][1]
    (check,) = sheet.checks
    assert (check.what, check.ok, check.detail) == ("broken", False, "ValueError: a wrong number")

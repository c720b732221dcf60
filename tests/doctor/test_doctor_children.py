"""Work in child processes: whatever happens there becomes a sentence."""

import sys

import pytest

from ddetr.doctor import children, trial
from ddetr.doctor.children import Outcome
from ddetr.doctor.facts import Step


@pytest.fixture(autouse=True)
def _modules_of_the_tests(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(request.path.parent))


def run(what: str, timeout: float = 60) -> Outcome:
    return children.run("doctor_child", [what], timeout=timeout)


def test_what_a_library_prints_is_no_finding() -> None:
    assert run("print") == Outcome([{"before": "print"}, {"after": "print"}], None)


def test_a_child_has_the_modules_of_its_parent() -> None:
    assert run("path").events[1] == {"path": sys.path}


@pytest.mark.parametrize(
    ("what", "problem"),
    [
        ("raise", "the process ended with code 1: second line"),
        ("crash", "the process died (segmentation fault)"),
        ("killed", "the process died (killed, often for lack of memory)"),
    ],
)
def test_how_a_child_ended(what: str, problem: str) -> None:
    assert run(what) == Outcome([{"before": what}], problem)


def test_a_child_that_hangs_is_killed_with_its_children() -> None:
    assert run("hang", timeout=3) == Outcome([{"before": "hang"}], "no answer within 3 s")


def test_a_python_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert run("print") == Outcome([], "no process could be started (No such file or directory)")


@pytest.mark.parametrize(
    ("device", "problem"),
    [("cuda:0", "segmentation fault"), ("cuda:1", "no answer within 5 s"), ("cuda:2", "killed")],
)
def test_the_step_in_which_a_device_died_has_failed(device: str, problem: str) -> None:
    passed, failed = trial.try_device(device, module="doctor_child", timeout=5)
    assert passed == Step(device=device, name="allocation", passed=True, detail="256 MiB")
    assert (failed.device, failed.name, failed.passed) == (device, "operator", False)
    assert problem in failed.detail


def test_long_errors_are_cut() -> None:
    assert children.sentence(ValueError("a\nb")) == "ValueError: a"
    assert children.sentence(KeyError()) == "KeyError"
    assert len(children.sentence(ValueError("x" * 1000))) == 300

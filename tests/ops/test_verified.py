"""Passed self-tests are remembered across processes: on CUDA, in the user's cache folder, for what they depend on."""

import ctypes
import json
import sys
from types import SimpleNamespace

import pytest
import torch

from ddetr.ops import verified
from ddetr.ops.self_test import SelfTestError

CUDA = torch.device("cuda", 0)
CARD = "NVIDIA H100 80GB HBM3"


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """A card that isn't there, an empty cache folder, and the self-tests that ran: their devices."""
    card = SimpleNamespace(name=CARD, major=9, minor=0)
    state = SimpleNamespace(card=card, driver="580.65.06", ran=[], error=None)

    def run(module, device):
        state.ran.append(str(device))
        if state.error:
            raise state.error

    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.setenv(variable, str(tmp_path / "cache"))
    monkeypatch.delenv("DDETR_OPS_SELF_TEST", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: state.card)
    monkeypatch.setattr(verified, "_driver_version", lambda: state.driver)
    monkeypatch.setattr(verified, "self_test", run)
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(__version__="3.8.0"))
    state.file = tmp_path / "cache" / "ddetr" / "ops-self-test.json"
    return state


def test_a_pass_is_remembered(machine):
    verified.verify(None, CUDA)
    verified.verify(None, CUDA)
    assert machine.ran == ["cuda:0"]
    (identity,) = json.loads(machine.file.read_text())
    for part in (CARD, "9.0", torch.__version__, "580.65.06", "3.8.0", verified._sources()):
        assert part in identity
    assert [path.name for path in machine.file.parent.iterdir()] == [machine.file.name], "nothing is left beside it"


CHANGES = {
    "card": lambda machine, patch: setattr(machine.card, "name", "NVIDIA L4"),
    "capability": lambda machine, patch: setattr(machine.card, "minor", 1),
    "driver": lambda machine, patch: setattr(machine, "driver", "580.95.05"),
    "PyTorch": lambda machine, patch: patch.setattr(torch, "__version__", "2.99.0"),
    "Triton": lambda machine, patch: patch.setitem(sys.modules, "triton", SimpleNamespace(__version__="9.9.0")),
    "sources": lambda machine, patch: patch.setattr(verified, "_sources", lambda: "0" * 16),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_whatever_changes_is_tested_again(machine, monkeypatch, change):
    verified.verify(None, CUDA)
    change(machine, monkeypatch)
    verified.verify(None, CUDA)
    verified.verify(None, CUDA)
    assert len(machine.ran) == 2
    assert len(json.loads(machine.file.read_text())) == 2, "the first is still known"


def test_failures_are_not_remembered(machine):
    machine.error = SelfTestError("the output is off")
    for _ in range(2):
        with pytest.raises(SelfTestError):
            verified.verify(None, CUDA)
    assert len(machine.ran) == 2
    assert not machine.file.exists()


def test_always(machine, monkeypatch):
    monkeypatch.setenv("DDETR_OPS_SELF_TEST", "always")
    verified.verify(None, CUDA)
    verified.verify(None, CUDA)
    assert len(machine.ran) == 2
    monkeypatch.setenv("DDETR_OPS_SELF_TEST", "never")
    with pytest.raises(ValueError, match="DDETR_OPS_SELF_TEST=never: choose auto .* or always"):
        verified.verify(None, CUDA)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_what_is_not_remembered(machine, device):
    machine.driver = None if device == "cuda" else machine.driver  # as on AMD's cards, which have no such driver
    for _ in range(2):
        verified.verify(None, torch.device(device))
    assert len(machine.ran) == 2
    assert not machine.file.exists()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"3", b'{"passed": true}', b"[[], 3, null]"])
def test_a_file_that_says_nothing(machine, content):
    machine.file.parent.mkdir(parents=True)
    machine.file.write_bytes(content)
    verified.verify(None, CUDA)
    verified.verify(None, CUDA)
    assert len(machine.ran) == 1


def test_no_place_to_write(machine, monkeypatch, tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be, which stops even root")
    for _ in range(2):
        verified.verify(None, CUDA)
    assert len(machine.ran) == 2


def test_no_home(machine, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(variable)
    monkeypatch.setattr(verified.Path, "home", no_home)
    for _ in range(2):
        verified.verify(None, CUDA)
    assert len(machine.ran) == 2


def test_the_latest_are_kept(machine):
    for number in range(verified._MOST + 3):
        machine.driver = f"driver {number}."
        verified.verify(None, CUDA)
    kept = json.loads(machine.file.read_text())
    assert len(kept) == verified._MOST
    assert "driver 34." in kept[-1]


def test_nothing_half_written(machine, monkeypatch):
    """The file is only ever replaced as a whole; where that fails, the old one stays and nothing lies beside it."""

    def full(*_):
        raise OSError("No space left on device")

    verified.verify(None, CUDA)
    before = machine.file.read_bytes()
    machine.driver = "another"
    with monkeypatch.context() as patch:
        patch.setattr(verified.os, "replace", full)
        verified.verify(None, CUDA)
    assert machine.ran == ["cuda:0"] * 2
    assert machine.file.read_bytes() == before
    assert [path.name for path in machine.file.parent.iterdir()] == [machine.file.name]


class Nvml:
    """The functions that are used of NVIDIA's library; `codes` are what they return."""

    def __init__(self, init=0, version=0):
        self.codes = init, version

    def nvmlInitWithFlags(self, flags):
        return self.codes[0]

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"580.65.06"
        assert length.value == len(text)
        return self.codes[1]

    def nvmlShutdown(self):
        return 0


@pytest.mark.parametrize(
    ("library", "expected"),
    [(Nvml(), "580.65.06"), (Nvml(init=9), None), (Nvml(version=3), None), (object(), None), (None, None)],
    ids=["found", "no driver", "no answer", "another library", "no library"],
)
def test_driver_version(monkeypatch, library, expected):
    def load(name):
        if library is None:
            raise OSError(f"{name}: cannot open shared object file")
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert verified._driver_version.__wrapped__() == expected


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip, reason="needs NVIDIA's driver")
def test_driver_version_of_this_machine():
    assert verified._driver_version()[0].isdigit()

"""PyTorch as a child sees it: the real one, and some that break in one place."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torchvision

from ddetr.doctor import pytorch

FAKE = """
import ctypes
__version__ = "2.6.0+cu124"
class version:
    cuda, hip = "12.4", None
class _C:
    _cuda_getArchFlags = staticmethod(lambda: "sm_80 compute_80")
class backends:
    class cudnn:
        version = staticmethod(lambda: 90100)
class cuda:
    get_arch_list = staticmethod(lambda: [])
    is_available = staticmethod(lambda: False)
    device_count = staticmethod(lambda: 0)
    class nccl:
        version = staticmethod(lambda: (2, 21, 5))
    @staticmethod
    def init():
        raise RuntimeError("No CUDA GPUs are available")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """A torch for the child, from its source."""

    def make(source: str) -> None:
        (tmp_path / "torch").mkdir()
        (tmp_path / "torch" / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path))

    return make


def test_the_pytorch_that_is_here() -> None:
    found = pytorch.look()
    assert (found.state, found.error, found.version, found.cuda) == (
        "works",
        None,
        torch.__version__,
        torch.version.cuda,
    )
    assert (found.available, found.count) == (torch.cuda.is_available(), torch.cuda.device_count())
    assert found.torchvision == torchvision.__version__
    assert (found.torchvision_fits, found.torchvision_error, found.nms_error) == (True, None, None)
    if torch.version.cuda:
        assert found.architectures
        assert found.cudnn
        assert found.nccl
    if not torch.cuda.is_available() and torch.version.cuda:
        assert found.cuda_error


def test_what_is_told(fake: Callable[[str], None]) -> None:
    fake(FAKE)
    found = pytorch.look()
    assert (found.state, found.version, found.cuda) == ("works", "2.6.0+cu124", "12.4")
    assert found.architectures == ["sm_80", "compute_80"]
    assert (found.cudnn, found.nccl) == ("9.1.0", "2.21.5")
    assert found.cuda_error == "RuntimeError: No CUDA GPUs are available"


@pytest.mark.parametrize(
    ("sound", "broken", "where"),
    [
        ("version = staticmethod(lambda: 90100)", "version = staticmethod(lambda: ctypes.string_at(0))", "cudnn_error"),
        (
            "is_available = staticmethod(lambda: False)",
            "is_available = staticmethod(lambda: ctypes.string_at(0))",
            "cuda_error",
        ),
    ],
)
def test_a_crash_in_one_part_leaves_the_others(
    fake: Callable[[str], None], sound: str, broken: str, where: str
) -> None:
    assert sound in FAKE
    fake(FAKE.replace(sound, broken))
    found = pytorch.look()
    assert (found.state, found.nccl) == ("works", "2.21.5")
    assert "segmentation fault" in (getattr(found, where) or "")
    assert found.cudnn == (None if where == "cudnn_error" else "9.1.0")
    assert (found.cuda_error or "").startswith("the process died" if where == "cuda_error" else "RuntimeError: No CUDA")


def test_an_import_that_hangs(fake: Callable[[str], None]) -> None:
    fake("import time; time.sleep(600)")
    found = pytorch.look(timeout=3)
    assert (found.state, found.error) == ("fails", "no answer within 3 s")


def test_an_import_that_crashes(fake: Callable[[str], None]) -> None:
    fake("import ctypes; ctypes.string_at(0)")
    found = pytorch.look()
    assert (found.state, found.error) == ("fails", "the process died (segmentation fault)")


@pytest.mark.parametrize(
    ("number", "version"), [(90100, "9.1.0"), (92400, "9.24.0"), (8902, "8.9.2"), (8500, "8.5.0"), (None, None)]
)
def test_cudnn_versions(monkeypatch: pytest.MonkeyPatch, number: int | None, version: str | None) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert pytorch._cudnn() == {"cudnn": version}

"""The CUDA allocator's segments grow, unless somebody has chosen otherwise."""

import os
import subprocess
import sys

import pytest
import torch

from ddetr.runtime import allocator


def test_segments_expand_unless_the_user_has_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr(allocator, "version", lambda _: "2.6.0+cu124")
    assert allocator.use_expandable_segments()
    assert os.environ["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert not allocator.use_expandable_segments()  # set now

    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    monkeypatch.setattr(allocator, "version", lambda _: "2.14.1")
    assert allocator.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"

    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "max_split_size_mb:128")
    assert not allocator.use_expandable_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "max_split_size_mb:128"
    monkeypatch.delenv("PYTORCH_ALLOC_CONF")
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)  # too late
    assert not allocator.use_expandable_segments()


@pytest.mark.skipif(not hasattr(torch._C, "_accelerator_getAllocatorSettings"), reason="PyTorch before 2.10")
def test_pytorch_reads_the_setting_after_the_device_was_chosen() -> None:
    code = (
        "import torch; from ddetr.runtime.allocator import use_expandable_segments; "
        "from ddetr.runtime.device import choose_device; choose_device('auto'); use_expandable_segments(); "
        "print(torch._C._accelerator_getAllocatorSettings())"
    )
    rest = {name: value for name, value in os.environ.items() if "ALLOC_CONF" not in name}
    done = subprocess.run([sys.executable, "-c", code], env=rest, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ("expandable_segments:True" if sys.platform == "linux" else "")

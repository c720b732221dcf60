"""The one choice of a device, on machines that are made up."""

import pytest
import torch

from ddetr.errors import InputError
from ddetr.runtime.device import choose_device


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> int:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: request.param > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: request.param)
    return request.param


@pytest.mark.parametrize(
    ("gpus", "wanted", "chosen"),
    [
        (0, "auto", "cpu"),
        (2, "auto", "cuda"),
        (2, None, "cuda"),
        (2, "cpu", "cpu"),
        (2, "cuda:1", "cuda:1"),
        (2, torch.device("cuda", 1), "cuda:1"),
        (0, torch.device("cpu"), "cpu"),
    ],
    indirect=["gpus"],
)
def test_what_is_chosen(gpus: int, wanted: str | torch.device | None, chosen: str) -> None:
    assert choose_device(wanted) == torch.device(chosen)


@pytest.mark.parametrize(
    ("gpus", "wanted", "sees"),
    [
        (0, "cuda", r"no GPU here \(torch.cuda.is_available\(\) is False\); use cpu"),
        (2, "cuda:2", "2 GPUs here"),
        (2, "gpu", "2 GPUs here"),
        (2, "", "2 GPUs here"),
    ],
    indirect=["gpus"],
)
def test_what_is_not_there_is_refused(gpus: int, wanted: str, sees: str) -> None:
    message = f"^device {wanted}: expected auto, cpu, cuda or cuda:N, and PyTorch sees {sees}$"
    with pytest.raises(InputError, match=message):
        choose_device(wanted)

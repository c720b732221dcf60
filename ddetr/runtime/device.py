"""The one choice of a device."""

import torch

from ddetr.errors import InputError


def choose_device(wanted: str | torch.device | None = "auto") -> torch.device:
    """The device to compute on. CUDA is asked what is there and not started: its allocator can still be set.

    Args:
        wanted: "auto" or None for a GPU if there is one and the CPU otherwise; "cpu", "cuda", "cuda:N" or a
            torch.device.

    Raises:
        InputError: no such device, or none here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted in ("auto", None):
        return torch.device("cuda" if num_gpus else "cpu")
    try:
        device = torch.device(wanted)
        if device.type != "cuda":
            torch.empty(0, device=device)  # "meta", "mps", ... wherever PyTorch really has them
        elif (device.index or 0) >= num_gpus:
            raise RuntimeError("no such GPU")
    except (RuntimeError, AssertionError) as error:
        sees = f"{num_gpus} GPUs here" if num_gpus else "no GPU here (torch.cuda.is_available() is False); use cpu"
        raise InputError(f"device {wanted}: expected auto, cpu, cuda or cuda:N, and PyTorch sees {sees}") from error
    return device

"""Copies from the host to a device that wait for nothing."""

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor


def sent(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on `device`, without waiting for what a GPU still has to do: the host runs ahead of it.

    From memory that is not pinned PyTorch waits until the GPU has done everything that it was told before. Pinned
    memory is PyTorch's own, which keeps it from being used again before the copy is done. To the host the copy waits.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return tensor.to(device)
    if tensor.device.type == "cpu" and not isinstance(tensor, FakeTensor):  # one without data has nothing to pin
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)

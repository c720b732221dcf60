"""What the processes of a run tell each other, and what is said when one of them is gone."""

import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ddetr.runtime.transfer import sent


def summed(values: Sequence[float], device: torch.device) -> tuple[list[float], int]:
    """The sums of `values` over all processes, by one exchange, and the number of processes. All must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [float(value) for value in values], 1
    total = sent(torch.tensor([float(value) for value in values], dtype=torch.float64), device)
    dist.all_reduce(total)
    return total.tolist(), dist.get_world_size()


def agree(flags: Tensor) -> list[bool]:
    """Element by element, whether any process says so: (n,) bool, with one exchange and one copy to the host. All must
    call it."""
    if dist.is_available() and dist.is_initialized():
        flags = flags.to(torch.int32)
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return [bool(flag) for flag in flags.tolist()]


def gathered(value: Any) -> list[Any]:
    """Every process's value, in the order of their ranks. All must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def is_first_process() -> bool:
    """Whether this process prints and writes, known before any process group is there."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0

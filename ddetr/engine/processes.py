"""What the processes of a run tell each other, and what is said when one of them is gone."""

import time
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor


def summed(values: Sequence[float], device: torch.device) -> tuple[list[float], int]:
    """The sums of `values` over all processes, by one exchange, and the number of processes. All must call it."""
    if not (dist.is_available() and dist.is_initialized()):
        return [float(value) for value in values], 1
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
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


# How the backends say that there is nobody at the other end: gloo's and NCCL's messages, PyTorch's store.
_LOST = ("connection closed by peer", "connection reset by peer", "gloo", "nccl", "broken pipe", "socket", "store")
_SECONDS_TO_DIE = 3


def died_process(trainer: pl.Trainer, error: Exception) -> str | None:
    """A sentence that names the process which has died, where that is what `error` comes from; None where it is not."""
    if not any(word in str(error).lower() for word in _LOST):
        return None
    rank, size = trainer.global_rank, trainer.world_size
    reason = str(error).strip().splitlines()[0]
    children = getattr(trainer.strategy.launcher, "procs", [])
    give_up = time.monotonic() + _SECONDS_TO_DIE
    while children and time.monotonic() < give_up:
        for number, child in enumerate(children, start=1):
            if child.poll():
                return (
                    f"process {number} of {size} (pid {child.pid}) has ended with exit code {child.returncode}, a negative "
                    "one is a signal (-9: killed, often for lack of memory): the run is stopped. What it said stands above; "
                    "the same command with --resume goes on from the last saved state"
                )
        time.sleep(0.1)
    return (
        f"process {rank} of {size} has lost another one ({reason}): the run is stopped. The launcher (torchrun, Slurm) names "
        "the process that ended first; the same command with --resume goes on from the last saved state"
    )

"""What the processes of a run tell each other: every process must call these, at the same point of the run."""

from collections.abc import Sequence

import torch
import torch.distributed as dist


def summed(values: Sequence[float], device: torch.device) -> tuple[list[float], int]:
    """The sums of `values` over all processes, by one exchange, and the number of processes."""
    if not (dist.is_available() and dist.is_initialized()):
        return [float(value) for value in values], 1
    total = torch.tensor([float(value) for value in values], dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist(), dist.get_world_size()

"""A sum over all GPUs, a process each: what training on several GPUs does at every step. Runs in a child."""

import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from ddetr.doctor import children

_SECONDS = 120


def main(arguments: Sequence[str]) -> None:
    backend, *devices = arguments
    from torch import multiprocessing

    with tempfile.TemporaryDirectory() as folder:
        store = Path(folder, "store")
        try:
            multiprocessing.spawn(_process, (backend, tuple(devices), str(store)), nprocs=len(devices))
        except Exception as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            children.tell(failed=lines[-1][:300] if lines else type(error).__name__)
            return
    what = f"{backend}, {len(devices)} processes"
    children.tell(device=f"{len(devices)} devices", name="all-reduce", passed=True, detail=what)


def _process(rank: int, backend: str, devices: Sequence[str], store: str) -> None:
    import torch
    import torch.distributed as dist

    device = torch.device(devices[rank])
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=len(devices),
        timeout=timedelta(seconds=_SECONDS),
        device_id=device if device.type == "cuda" else None,  # as in training: NCCL connects now, on this device
    )
    try:
        # Large enough for the ring that gradients take: 4 MiB.
        total = torch.full((2**20,), float(rank + 1), device=device)
        dist.all_reduce(total)
        expected = len(devices) * (len(devices) + 1) / 2
        if not bool((total == expected).all()):
            raise ValueError(f"the sum over {len(devices)} processes is {total[0].item()}, right is {expected}")
    finally:
        dist.destroy_process_group()

"""The most memory that a piece of a program holds."""

from pathlib import Path

import torch

from ddetr.engine.memory import readable

_PROCESS = Path("/proc/self")


class Peak:
    """Bytes from `start` to `bytes`: what PyTorch allocates on a GPU, what the whole process holds on the CPU
    (Linux)."""

    def __init__(self, device: torch.device):
        self.device = device

    def start(self) -> None:
        """Forget what was before."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
        elif (_PROCESS / "clear_refs").exists():
            (_PROCESS / "clear_refs").write_text("5")  # sets VmHWM back to what is held now

    def bytes(self) -> int | None:
        """None where the system does not say."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        try:
            lines = (_PROCESS / "status").read_text().splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def in_words(num_bytes: int | None) -> str:
    return "-" if num_bytes is None else readable(num_bytes)

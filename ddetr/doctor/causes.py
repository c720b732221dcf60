"""Why a machine is not fit, and the exit code of each cause. The most fundamental comes first: where several are found,
`ddetr doctor` exits with the lowest, since repairing that one often repairs the others.

Codes 1 and 2 are those of every command: the program failed, the input is wrong.
"""

from enum import Enum


class Cause(Enum):
    """An exit code, its name in `--json`, and what it means."""

    PYTORCH_MISSING = 10, "pytorch-missing", "PyTorch is not installed"
    PYTORCH_IMPORT = 11, "pytorch-import", "PyTorch is installed, but cannot be imported"
    CONTAINER_WITHOUT_GPUS = 12, "container-without-gpus", "the machine has GPUs, this container was started without"
    NO_GPU = 13, "no-gpu", "there is no NVIDIA GPU; --cpu says that none is expected"
    NO_DRIVER = 14, "no-driver", "there is a GPU, but no working driver"
    DRIVER_MISMATCH = 15, "driver-mismatch", "the driver's kernel module and its libraries have different versions"
    DRIVER_TOO_OLD = 16, "driver-too-old", "the driver is too old for the CUDA version of this PyTorch"
    CPU_ONLY_BUILD = 17, "cpu-only-build", "there is a GPU, but this PyTorch was built without CUDA"
    GPUS_HIDDEN = 18, "gpus-hidden", "CUDA_VISIBLE_DEVICES hides all GPUs"
    CUDA_FAILS = 19, "cuda-fails", "driver and PyTorch fit, but CUDA does not start"
    GPU_TOO_NEW = 20, "gpu-too-new", "this PyTorch has no kernels for a GPU that is newer"
    GPU_TOO_OLD = 21, "gpu-too-old", "this PyTorch has no kernels for a GPU that is older"
    TORCHVISION = 22, "torchvision", "torchvision is missing, does not match PyTorch, or does not work"
    COMPUTATION = 23, "computation", "a computation on a device fails, hangs or is wrong"
    OPERATOR = 24, "operator", "the deformable attention operator fails, hangs or is wrong"
    NCCL = 25, "nccl", "the GPUs cannot exchange data through NCCL"
    DATA = 30, "data", "the data folder is missing or cannot be read"
    OUTPUT = 31, "output", "the output folder cannot be written to, or its disk is full"
    CHECK_FAILED = 40, "check-failed", "a check itself failed, and nothing else was found broken"

    def __init__(self, code: int, title: str, meaning: str):
        self.code, self.title, self.meaning = code, title, meaning


def table() -> str:
    """All exit codes, as text for `--help`."""
    common = [(0, "ok", "nothing is broken; there may be warnings"), (1, "", "the program failed")]
    common += [(2, "", "the input is wrong")]
    rows = common + [(cause.code, cause.title, cause.meaning) for cause in Cause]
    return "\n".join(f"  {code:>3}  {title:<22}  {meaning}" for code, title, meaning in rows)

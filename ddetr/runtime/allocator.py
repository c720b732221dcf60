"""Memory allocators: what the process keeps of the memory that it frees, and how the CUDA one grows."""

import ctypes
import os
import sys
from importlib.metadata import version

import torch


def keep_freed_memory() -> bool:
    """Let the process keep the memory that tensors free (glibc), instead of giving it back and asking for it again.

    Fresh pages cost about 1 ms/MB in virtual machines, which is a third of the time of a detector that works in large
    temporaries; the process holds 10 to 25 % more memory. It counts for the whole process and can't be undone, so
    nothing here calls it by itself, but for `ddetr predict --optimize` and the processes that load training images.

    Returns:
        Whether the system has such a setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
    return bool(mallopt(mmap_threshold, 1 << 30) and mallopt(trim_threshold, 0x7FFFFFFF))


def use_expandable_segments() -> bool:
    """Let the CUDA allocator grow its segments: batches of changing shapes fragment fixed ones.

    Before CUDA starts, where the user has not set the allocator himself, and on Linux, which alone can do it. Processes
    started from this one inherit it. Returns whether it was set.
    """
    if allocator_settings() or torch.cuda.is_initialized() or sys.platform != "linux":
        return False
    os.environ[_allocator_variable()] = "expandable_segments:True"
    return True


def allocator_settings() -> str:
    """What the user, or `use_expandable_segments`, has set, under the new name or the old one."""
    return os.environ.get("PYTORCH_ALLOC_CONF") or os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or ""


def _allocator_variable() -> str:
    """PyTorch 2.9 gave the variable a new name, and warns of the old one."""
    major, minor = (int(part) for part in version("torch").split(".")[:2])
    return "PYTORCH_ALLOC_CONF" if (major, minor) >= (2, 9) else "PYTORCH_CUDA_ALLOC_CONF"

"""How exact the arithmetic of a run is: the choices that PyTorch leaves to hidden switches, made in the open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exactness(*, deterministic: bool, tf32: bool) -> Iterator[None]:
    """Within it, products follow the settings of the run; afterwards PyTorch's switches are as before.

    Args:
        deterministic: algorithms that give the same bits in every run; one that has no such form raises.
        tf32: float32 products on GPUs may round their factors to TF32. PyTorch's own default allows it for convolutions
            and not for matrices; here it is one choice for both.
    """
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    before = (
        products.allow_tf32,
        convolutions.allow_tf32,
        convolutions.benchmark,
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    products.allow_tf32 = convolutions.allow_tf32 = tf32
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts; it refuses without
        convolutions.benchmark = False
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a check for programs that read it, at a cost
    try:
        yield
    finally:
        products.allow_tf32, convolutions.allow_tf32, convolutions.benchmark = before[:3]
        torch.use_deterministic_algorithms(before[3])
        torch.utils.deterministic.fill_uninitialized_memory = before[4]

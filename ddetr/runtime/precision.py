"""How exact the arithmetic of a run is: the choices that PyTorch leaves to hidden switches, made in the open."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch


class Precision(NamedTuple):
    """What a --precision is to others."""

    lightning: str  # Lightning's name
    autocast: torch.dtype | None  # dtype inside `torch.autocast`; None where there is none


PRECISIONS = {
    "32": Precision("32-true", None),
    "bf16": Precision("bf16-mixed", torch.bfloat16),
    "fp16": Precision("16-mixed", torch.float16),
}


@contextmanager
def numerics(*, deterministic: bool, tf32: bool) -> Iterator[None]:
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


@contextmanager
def onednn_matmuls() -> Iterator[None]:
    """Inside the block, float32 matrix products on the CPU are oneDNN's, with their gradients.

    PyTorch takes MKL's, which take twice the time on AMD processors, unless it may round to bfloat16. oneDNN makes use
    of that permission only where the processor has matrix units (AMX): whether products are still exact is looked at
    here, on numbers, and where they are not, or PyTorch has no such switch, the block changes nothing. The answer does
    not depend on timing, so that a run that goes on after a stop computes the same bits.
    """
    switch = getattr(torch.backends.mkldnn, "matmul", None)
    before = getattr(switch, "fp32_precision", None)
    if before != "none":  # no such switch, or somebody else's choice
        yield
        return
    try:
        switch.fp32_precision = "bf16"
        if not _products_are_exact():
            switch.fp32_precision = before
        yield
    finally:
        switch.fp32_precision = before


def _products_are_exact() -> bool:
    """Rounded to bfloat16 they would be off by a thousandth."""
    generator = torch.Generator().manual_seed(0)
    for rows, size in ((64, 64), (2048, 512)):
        x = torch.randn(rows, size, generator=generator, dtype=torch.float32, device="cpu")
        expected = x.double() @ x.double().T
        if (x @ x.T - expected).abs().max() > 1e-5 * expected.abs().max():
            return False
    return True

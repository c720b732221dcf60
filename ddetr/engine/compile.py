"""torch.compile of the training step's forward pass, on a fixed set of padded shapes.

Every new shape of a batch costs a compilation of a minute or more, so that there must be few: batches are padded to the
shapes of `ddetr.datasets.padded_shapes`. What fits into none of them (an image of extreme proportions) runs eagerly.
"""

import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr.errors import InputError
from ddetr.padding import padded_hw

logger = logging.getLogger(__name__)

BACKEND: str | Callable[..., Any] = "inductor"
BATCH_SIZES = 2  # that the micro-batches of a run have: full ones, and what is left at the end of a step


class CompiledForward:
    """`model(images, mask)` in training, compiled as one graph for each shape; the model itself stays as it is.

    Not a module: names of parameters, copies of the model (EMA) and evaluation know nothing of it. A batch is padded
    further to the smallest shape that holds it, and always has a mask: none would be one more graph per shape.
    """

    def __init__(self, model: Callable[..., dict[str, Any]], shapes_hw: Sequence[tuple[int, int]]):
        """shapes_hw: the (H, W) that are compiled, each for up to `BATCH_SIZES` batch sizes."""
        self.model, self.shapes_hw = model, tuple(shapes_hw)
        self.limit = len(self.shapes_hw) * BATCH_SIZES
        self.seen: set[tuple[int, ...]] = set()  # (n, H, W) that were compiled
        self._eager: set[tuple[int, ...]] = set()
        _prepare_dynamo(self.limit)

        def run(images: Tensor, mask: Tensor) -> dict[str, Any]:  # compiling a module leaves attributes on it
            return model(images, mask)

        self._compiled = torch.compile(run, fullgraph=True, dynamic=False, backend=BACKEND)

    def __call__(self, images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        """images (N, 3, H, W) normalised, mask (N, H, W) or None -> the model's outputs.

        Raises:
            InputError: the compiler failed, or would have compiled more often than there are shapes.
        """
        n, _, h, w = images.shape
        size = (n, *padded_hw([(h, w)], self.shapes_hw))
        if size not in self.seen:
            if size[1:] not in self.shapes_hw or len(self.seen) == self.limit:
                if size not in self._eager:
                    self._eager.add(size)
                    logger.info("batches of %d x %d x %d are none of those compiled and run eagerly", *size)
                return self.model(images, mask)
            logger.info("compiling for batches of %d x %d x %d: this step takes a minute or more", *size)
            self.seen.add(size)
        if mask is None:
            mask = torch.zeros(n, h, w, dtype=torch.bool, device=images.device)
        if size[1:] != (h, w):
            margins = (0, size[2] - w, 0, size[1] - h)
            images, mask = F.pad(images, margins), F.pad(mask, margins, value=True)
        try:
            return self._compiled(images, mask)
        except _compiler_errors() as error:
            logger.debug("torch.compile failed", exc_info=error)
            said = " ".join(str(error).split("\n\n")[0].split())  # the reason, before pages of advice
            raise InputError(
                f"--compile: PyTorch {torch.__version__} could not compile the model for batches of "
                f"{' x '.join(map(str, size))} ({type(error).__name__}: {said[:500]}); train without --compile"
            ) from error


def check_compiler(device_type: str) -> None:
    """Raises `InputError` where torch.compile has no compiler to work with."""
    if device_type == "cuda":
        from torch.utils._triton import has_triton  # slow to import

        if not has_triton():
            raise InputError("--compile needs Triton for this GPU (pip install triton); train without --compile")
    else:
        from torch._inductor import cpp_builder

        try:
            cpp_builder.get_cpp_compiler()
        except Exception as error:  # of a private class, another in each version
            raise InputError(
                "--compile on the CPU needs a C++ compiler, and none was found (install g++, or set CXX); train "
                "without --compile"
            ) from error
    if sys.platform != "win32" and not any(map(shutil.which, ("cc", "gcc", "clang"))):
        raise InputError("--compile needs a C compiler, and none was found (install gcc); train without --compile")


def _prepare_dynamo(limit: int) -> None:
    """For the whole process: room for as many graphs as there are shapes, and whole ones under DDP.

    PyTorch counts the graphs of all models of the process that a run may have had before together. DDP's own splitting
    of graphs, which lets it exchange gradients during the backward pass, refuses activation checkpointing; the exchange
    takes a small part of a step of this model.
    """
    config = torch._dynamo.config
    name = "recompile_limit" if hasattr(config, "recompile_limit") else "cache_size_limit"  # the second before 2.7
    setattr(config, name, max(getattr(config, name), 4 * limit))
    config.optimize_ddp = False


def _compiler_errors() -> tuple[type[Exception], ...]:
    from torch._dynamo import exc

    return exc.TorchDynamoException, getattr(exc, "FailOnRecompileLimitHit", exc.TorchDynamoException)

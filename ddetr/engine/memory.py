"""Memory of a training step: what it will take, what the device has, and what to say when it was not enough.

The estimate runs the step on fake tensors, which have shapes and no data: a second or two, on any machine. It counts
what PyTorch's operations return; working space inside of them (convolutions) and fragmentation come on top.
"""

import copy
import logging
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ddetr.engine.step import MicroBatch, step_losses
from ddetr.errors import InputError
from ddetr.models.criterion import SetCriterion
from ddetr.models.matcher import HungarianMatcher, Matches, PaddedTargets
from ddetr.runtime.allocator import allocator_settings
from ddetr.runtime.limits import free_and_total
from ddetr.runtime.precision import PRECISIONS

logger = logging.getLogger(__name__)

CURES = (
    "a smaller --device_batch_size (or auto), --activation_checkpointing true, --precision bf16 or a smaller "
    "--data.image_size needs less"
)

# What those who allocate beside PyTorch's own allocator say: the CPU's, cuBLAS, cuDNN, CUDA itself, Triton.
_NO_MEMORY = (
    "DefaultCPUAllocator",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a step on micro-batches of `batch` images of height x width, padding included."""

    batch: int
    height: int
    width: int
    parameters: int  # with buffers
    gradients: int
    optimizer: int
    copies: int  # of parameters or gradients, for EMA and for the exchange between processes
    activations: int  # kept for the backward pass
    peak: int  # activations and what the step computes with, at most

    @property
    def total(self) -> int:
        return self.lasting + self.peak

    @property
    def lasting(self) -> int:
        """What stays from step to step, whatever the batch."""
        return self.parameters + self.gradients + self.optimizer + self.copies

    def describe(self) -> str:
        """In a line."""
        parts = {
            "parameters": self.parameters,
            "gradients": self.gradients,
            "optimiser": self.optimizer,
            "copies (EMA, exchange)": self.copies,
            f"activations of {self.batch} x {self.height} x {self.width} px": self.activations,
            "working space": self.peak - self.activations,
        }
        listed = ", ".join(f"{name} {readable(size)}" for name, size in parts.items() if size)
        return f"memory of a step with the largest images, estimated: {readable(self.total)} ({listed})"


def estimate_memory(
    model: nn.Module,
    criterion: SetCriterion,
    *,
    batch: int,
    size_hw: tuple[int, int],
    num_objects: int = 100,
    precision: str = "32",
    optimizer_states: int = 2,
    copies: int = 0,
) -> MemoryEstimate:
    """What a training step takes, by running it on fake tensors.

    Args:
        model: the detector, in training, on its device, with activation checkpointing as it shall be; it is not
            changed.
        criterion: its losses.
        batch: images of a micro-batch.
        size_hw: its padded (H, W).
        num_objects: objects per image.
        precision: "32", "bf16" or "fp16".
        optimizer_states: tensors that the optimiser keeps for each parameter; AdamW two.
        copies: whole copies of the trained parameters beside that: one for EMA, one of the gradients for DDP.
    """
    device = next(model.parameters()).device
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with FakeTensorMode():
        stand_ins = {id(t): _without_data(t) for t in (*model.parameters(), *model.buffers())}
        fake = copy.deepcopy(model, stand_ins)  # which takes them for copies that it has made
        criterion = copy.copy(criterion)
        criterion.matcher = _AnyMatch()  # the right one needs numbers
        for parameter in fake.parameters():
            parameter.grad = torch.empty_like(parameter) if parameter.requires_grad else None  # of a micro-batch before
        own = [*fake.parameters(), *fake.buffers(), *(p.grad for p in fake.parameters() if p.grad is not None)]
        dtype = PRECISIONS[precision].autocast
        # On the CPU there are no rules for float16; those for bfloat16 keep as many bytes.
        dtype = torch.bfloat16 if device.type == "cpu" and dtype is not None else dtype
        with LiveBytes(own) as live, torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
            made = make_batch(batch, size_hw, num_objects, device)
            total = criterion.total(step_losses(fake, criterion, made, num_boxes=1.0))
            activations = live.now
            with torch.autograd.set_multithreading_enabled(False):
                total.backward()
    return MemoryEstimate(
        batch,
        *size_hw,
        parameters=sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers())),
        gradients=trained,
        optimizer=optimizer_states * trained,
        copies=copies * trained,
        activations=activations,
        peak=live.peak,
    )


def make_batch(n: int, size_hw: tuple[int, int], num_objects: int, device: torch.device) -> MicroBatch:
    """A micro-batch as it comes from the loader."""
    images = torch.zeros(n, 3, *size_hw, dtype=torch.uint8, device=device)
    mask = torch.zeros(n, *size_hw, dtype=torch.bool, device=device)
    labels = torch.zeros(num_objects, dtype=torch.long, device=device)
    boxes = torch.full((num_objects, 4), 0.5, device=device)
    return images, mask, [{"labels": labels, "boxes": boxes} for _ in range(n)]


def _without_data(tensor: Tensor) -> Tensor:
    fake = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
    return nn.Parameter(fake, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fake


class LiveBytes(TorchDispatchMode):
    """Inside the block: bytes of the tensors that operations have made and that are still there (`now`), and their
    peak."""

    def __init__(self, uncounted: Iterable[Tensor] = ()):
        """uncounted: tensors that were there before; operations may return views of them."""
        super().__init__()
        self.now = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}  # by address: views share one
        self._uncounted = {tensor.untyped_storage()._cdata for tensor in uncounted}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._add(result.untyped_storage())
        return results

    def _add(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address in self._storages or address in self._uncounted:
            return

        def gone(_: weakref.ref) -> None:
            self.now -= size
            del self._storages[address]

        self._storages[address] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


class _AnyMatch(HungarianMatcher):
    """Gives each object a prediction, after computing the costs for nothing but their memory."""

    @torch.no_grad()
    def match_sets(
        self, sets: Sequence[tuple[dict[str, Any], PaddedTargets]], device: torch.device | None = None
    ) -> list[Matches]:
        self._costs(sets)
        matches = []
        for outputs, targets in sets:
            device = outputs["pred_logits"].device
            counts = [min(size, outputs["pred_logits"].shape[1]) for size in targets.sizes]
            images = torch.cat([torch.full((count,), i, device=device) for i, count in enumerate(counts)])
            order = torch.cat([torch.arange(count, device=device) for count in counts])
            matches.append(Matches(images, order, order))
        return matches


@contextmanager
def explained_out_of_memory(images: Tensor, targets: Sequence[dict[str, Tensor]]) -> Iterator[None]:
    """Turns PyTorch's error into one that says what did not fit and what helps.

    Raises:
        InputError: the block ran out of memory; PyTorch's error is its cause, and its first line in the log.
    """
    try:
        yield
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not is_out_of_memory(error):
            raise
        logger.error("%s: %s", type(error).__name__, str(error).strip().partition("\n")[0])
        logger.debug("where the memory ran out:", exc_info=error)
        n, _, height, width = images.shape
        num_objects = sum(len(target["labels"]) for target in targets)
        memory = free_and_total(images.device)
        used = f", {readable(memory[1] - memory[0])} of {readable(memory[1])} in use" if memory else ""
        fragments = ""
        if images.device.type == "cuda" and "expandable_segments:True" not in allocator_settings():
            fragments = "; against fragmentation set PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True"
        raise InputError(
            f"out of memory on {images.device} with a batch of {n} images of {height} x {width} px and {num_objects} "
            f"objects{used}: {CURES}{fragments}"
        ) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether PyTorch could not allocate, on a GPU or on the CPU."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in _NO_MEMORY)


def readable(num_bytes: int) -> str:
    """1.5 GiB, 312 MiB."""
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.0f} MiB"

"""`--device_batch_size auto`: as many images at a time as the device's memory holds, with the largest images there can
be.

On a GPU it is tried out, before the first step; on the CPU, where running out of memory ends the process, it is
estimated.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn

from ddetr.engine.memory import CURES, MemoryEstimate, estimate_memory, is_out_of_memory, make_batch, readable
from ddetr.engine.module import DetectionModule
from ddetr.engine.step import step_losses
from ddetr.errors import InputError
from ddetr.runtime.distributed import gathered
from ddetr.runtime.limits import free_and_total

logger = logging.getLogger(__name__)

SHARE = 0.9  # of the memory that is free before the first step; the rest is for what a probe does not see
CPU_MOST = 8  # images at a time: more make a CPU no faster


class MemoryPlan(Callback):
    """Before the first step: settles an automatic `device_batch_size`, and says what a step will take."""

    def __init__(
        self,
        size_hw: tuple[int, int],
        *,
        num_objects: int,
        precision: str,
        optimizer_states: int,
        copies: int = 0,
        settle: Callable[[int], None] | None = None,
    ):
        """
        Args:
            size_hw: the largest padded (H, W) that a batch can have.
            num_objects: the most objects of an image.
            precision: "32", "bf16" or "fp16".
            optimizer_states: tensors that the optimiser keeps for each parameter.
            copies: copies of the parameters beside it (EMA).
            settle: called on each process with the number of images at a time; None where it was chosen.
        """
        self.size_hw, self.num_objects, self.precision = size_hw, num_objects, precision
        self.optimizer_states, self.copies, self.settle = optimizer_states, copies, settle

    def on_fit_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        if self.settle is not None:
            share = trainer.datamodule.batch_size // trainer.world_size
            limit = min(gathered(self._limit(trainer, module, share)))  # all cut their batches alike
            if limit < 1:
                raise InputError(
                    f"device_batch_size auto: not even one image of {self.size_hw[0]} x {self.size_hw[1]} px fits into "
                    f"the memory of {module.device}: {CURES}"
                )
            size = even_size(share, limit)
            trainer.datamodule.set_device_batch_size(size)
            self.settle(size)
            if trainer.is_global_zero:
                logger.info("device_batch_size auto: %d images at a time, of %d that would fit", size, limit)
        if trainer.is_global_zero:
            self._say(trainer, module)

    def _limit(self, trainer: pl.Trainer, module: DetectionModule, most: int) -> int:
        """Images that fit on this process's device, at most `most`."""
        memory = free_and_total(module.device)
        if memory is None:
            raise InputError("device_batch_size auto: this system does not say how much memory is free; give a number")
        free, total = memory
        if module.device.type != "cuda":
            estimates = [self._estimate(trainer, module, batch) for batch in (1, 2)]
            here = int(os.environ.get("LOCAL_WORLD_SIZE", trainer.num_devices))
            one, two = (estimate.lasting - estimate.parameters + estimate.peak for estimate in estimates)
            return min(most, CPU_MOST, int((SHARE * free / here - (2 * one - two)) // max(two - one, 1)))
        reserved = torch.cuda.memory_reserved(module.device)
        # A probe has the weights and makes gradients; what lasts beside them comes with the first steps.
        trained = sum(p.numel() * p.element_size() for p in module.model.parameters() if p.requires_grad)
        lasting = trained * (1 + self.optimizer_states + self.copies + (trainer.world_size > 1))
        allowed = torch.cuda.get_per_process_memory_fraction(module.device) * total
        budget = int(SHARE * min(free + reserved, allowed)) - lasting

        def used(batch: int) -> int:
            return probe_step(trainer, module, batch, self.size_hw, self.num_objects)

        return largest_that_fits(used, budget, most)

    def _estimate(self, trainer: pl.Trainer, module: DetectionModule, batch: int) -> MemoryEstimate:
        return estimate_memory(
            module.model,
            module.criterion,
            batch=batch,
            size_hw=self.size_hw,
            num_objects=self.num_objects,
            precision=self.precision,
            optimizer_states=self.optimizer_states,
            copies=self.copies + (trainer.world_size > 1),
        )

    def _say(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        try:
            estimate = self._estimate(trainer, module, trainer.datamodule.device_batch_size)
        except Exception as error:  # a model from anywhere, on tensors without data: no estimate must stop no run
            logger.debug("no estimate of the memory", exc_info=error)
            return
        memory = free_and_total(module.device)
        free = (
            "" if memory is None else f"; {module.device} has {readable(memory[1])}, {readable(memory[0])} of it free"
        )
        logger.info("%s%s", estimate.describe(), free)
        if memory is not None and estimate.total - estimate.parameters > memory[0]:
            logger.warning("that is more than is free: %s", CURES)


def largest_that_fits(used: Callable[[int], int], budget: int, most: int) -> int:
    """The largest batch of at most `most` images that stays within the budget: doubling, then halving the gap.

    Args:
        used: bytes that a step on so many images takes at its peak; raises torch.OutOfMemoryError where it can't be
            had.
        budget: bytes.
        most: images, at least 1.

    Returns:
        0 where not even one image fits.
    """

    def fits(batch: int) -> bool:
        try:
            peak = used(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            logger.info("device_batch_size auto: %d images at a time are too many for the memory", batch)
            return False
        logger.info(
            "device_batch_size auto: %d images at a time take %s of %s", batch, readable(peak), readable(budget)
        )
        return peak <= budget

    good, bad = 0, most + 1
    while good + 1 < bad:
        batch = min(max(1, 2 * good), most) if bad == most + 1 else (good + bad) // 2
        if fits(batch):
            good = batch
        else:
            bad = batch
    return good


def even_size(share: int, limit: int) -> int:
    """Images at a time that take `share` images in as few turns as `limit` allows, the turns as even as can be."""
    turns = math.ceil(share / min(limit, share))
    return math.ceil(share / turns)


def probe_step(
    trainer: pl.Trainer, module: DetectionModule, batch: int, size_hw: tuple[int, int], num_objects: int
) -> int:
    """Bytes that the process holds on its GPU at the peak of a forward and backward pass of random images.

    Not compiled, which would take minutes for each number of images and needs less memory.

    Raises:
        torch.OutOfMemoryError: it did not fit.
    """
    device = module.device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    with undisturbed(module), trainer.precision_plugin.train_step_context():
        made = make_batch(batch, size_hw, num_objects, device)
        total = module.criterion.total(step_losses(module.model, module.criterion, made, float(batch * num_objects)))
        # Not `backward`: gradients stay out of the parameters, and DDP's hooks, which wait for other processes, asleep.
        torch.autograd.grad(total, [p for p in module.model.parameters() if p.requires_grad], allow_unused=True)
        del total
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_reserved(device)


@contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """In training mode, and afterwards with the statistics of its norms, its mode and all random states as before."""
    was_training = {child: child.training for child in module.modules()}
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    device = next(module.parameters()).device
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        try:
            module.train()
            yield
        finally:
            with torch.no_grad():
                for buffer, before in buffers:
                    buffer.copy_(before)
            for child, training in was_training.items():
                child.training = training

"""A training step: what it is made of, and the one place where its losses are computed.

Training, the estimate of its memory, the search for a batch size, preflight and the black box all call `step_losses`:
what one of them finds out about a step holds for the others.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddetr.datasets import normalize_images
from ddetr.engine.config import OptimConfig
from ddetr.models.auxiliary import keeping_encoded
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.transfer import sent

# Of each image: labels (t,), boxes (t, 4) cxcywh in [0, 1]; and on the host image_id, orig_size, ...
Targets = list[dict[str, Tensor]]
MicroBatch = tuple[Tensor, Tensor | None, Targets]  # images uint8 (n, 3, H, W), mask (n, H, W) or None, targets
Model = Callable[[Tensor, Tensor | None], dict[str, Any]]  # normalised images and mask -> outputs

# Where the time of a step goes. Who runs a part of it enters the region of that name: a stop watch's, or none.
REGIONS = ("data wait", "host to device", "forward", "matching", "losses", "backward", "optimiser", "the rest")
Region = Callable[[str], AbstractContextManager]
no_region: Region = nullcontext


@dataclass(frozen=True)
class Step:
    """A step as it starts: with the random numbers of its seed, all that computing it needs."""

    model: DeformableDETR
    criterion: SetCriterion
    optimizer: torch.optim.Optimizer
    optim: OptimConfig
    batch: Sequence[MicroBatch]
    num_boxes: float  # what losses are divided by: objects of the whole step for each process, at least 1
    number: int  # 1 for the first of a run, as in train.csv
    epoch: int
    seed: int  # of this step on this process
    run_seed: int
    rank: int
    world_size: int

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def image_ids(self) -> list[int]:
        """Of all images that are seen in the batch, in its order."""
        return [image_id for _, _, targets in self.batch for target in targets for image_id in ids_of(target)]


def ids_of(target: dict[str, Tensor]) -> list[int]:
    """The ids of the images that a sample was made of, its own first."""
    others = target.get("other_image_ids")
    return [int(target["image_id"]), *([] if others is None else others.tolist())]


def step_losses(
    model: DeformableDETR,
    criterion: SetCriterion,
    batch: MicroBatch,
    num_boxes: float,
    region: Region = no_region,
    forward: Model | None = None,
) -> dict[str, Tensor]:
    """The unweighted losses of one micro-batch of a step.

    The only place where model and targets meet: what trains with the targets beside the network gets them here.

    Args:
        batch: as `on_device` gives it.
        num_boxes: what the sums are divided by: the objects of the whole step, of which this is a part.
        forward: what `training_forward(model)` does, in another way: compiled.
    """
    outputs = model_outputs(model, batch, region, forward or training_forward(model))
    if model.auxiliary is not None:
        with region("forward"):
            outputs |= model.auxiliary(model, outputs.pop("encoded"), batch[2])
    with region("losses"):
        return criterion(outputs, batch[2], num_boxes)


def training_forward(model: DeformableDETR) -> Model:
    """The pass of a training step that needs the images alone: what trains beside the network goes on from there."""
    return model if model.auxiliary is None else keeping_encoded(model)


def model_outputs(
    model: DeformableDETR, batch: MicroBatch, region: Region = no_region, forward: Model | None = None
) -> dict[str, Any]:
    """What the model makes of the images of a micro-batch, normalised as it wants them.

    Args:
        forward: what the model does, or another model of images that are normalised so.
    """
    images, mask, _ = batch
    images = normalize_images(images, mask, model.image_mean, model.image_std)
    with region("forward"):
        return (forward or model)(images, mask)


def count_objects(batch: Sequence[MicroBatch]) -> int:
    return sum(len(target["labels"]) for _, _, targets in batch for target in targets)


def on_device(batch: MicroBatch, device: torch.device | str) -> MicroBatch:
    """Images, mask and what losses are made from, by a copy each that waits for nothing; the rest of the targets is for
    the host, and stays there."""
    images, mask, targets = batch
    learnt = {
        name: sent(torch.cat([target[name] for target in targets]), device).split(
            [len(target[name]) for target in targets]
        )
        for name in ("labels", "boxes")
    }
    return (
        sent(images, device),
        None if mask is None else sent(mask, device),
        [target | dict(zip(learnt, tensors)) for target, tensors in zip(targets, zip(*learnt.values()))],
    )

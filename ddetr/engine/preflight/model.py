"""Preflight, the model's half: the first loss is the expected one, a batch can be learnt, gradients reach
everything."""

import copy
import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import clip_grad_norm_

from ddetr.datasets import DetectionDataset
from ddetr.engine.blackbox.bundle import module_of
from ddetr.engine.loading.datamodule import DetectionData, collate_micro
from ddetr.engine.module import DetectionModule
from ddetr.engine.optimizer import build_optimizer, parameter_groups
from ddetr.engine.preflight.data import Check, images_with_objects
from ddetr.engine.step import MicroBatch, count_objects, on_device, step_losses
from ddetr.models.criterion import DENOISING, ONE_TO_MANY, SetCriterion
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.heads import PRIOR_BIAS
from ddetr.wording import first_few

MAX_SECONDS, MAX_STEPS = 60.0, 200  # of learning one batch
MIN_STEPS = 4  # the first correction of a box head that starts as zero reaches no layer behind it
LEARNT = 0.8  # of the first loss: the batch is being learnt
NOT_LEARNT = 0.97
FIRST_LOSS_BAND = (0.6, 1.6)  # times the expected class loss: which query is matched is not known beforehand
PROPOSAL_BAND = (0.4, 3.0)  # the same for two-stage proposals, whose many padding cells all have one value
_LOGIT_DEVIATION = math.sqrt(1 / 3)  # of PyTorch's linear layer on what a layer norm puts out


def expected_class_loss(num_predictions: int, num_objects: int, num_matched: int, alpha: float) -> float:
    """The class loss of heads that start from the focal prior, divided by the number of objects.

    The logits are normal around the prior's bias (-4.595); one of them belongs to each matched object, all others are
    negative.

    Args:
        num_predictions: (query, class) pairs of all images.
        num_matched: objects that have a query: all, but where an image has more objects than queries.
    """
    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    weights = weights / weights.sum()
    logits = PRIOR_BIAS + _LOGIT_DEVIATION * nodes
    p = 1 / (1 + np.exp(-logits))
    positive = float((weights * alpha * (1 - p) ** 2 * np.logaddexp(0, -logits)).sum())
    negative = float((weights * (1 - alpha) * p**2 * np.logaddexp(0, logits)).sum())
    return (num_matched * positive + (num_predictions - num_matched) * negative) / num_objects


@dataclass
class _Learning:
    """What came of some steps on one batch."""

    losses: list[float] = field(default_factory=list)
    first: dict[str, float] = field(default_factory=dict)  # the terms of the first loss
    num_proposals: int = 0  # cells of the two-stage encoder
    without_gradient: list[str] = field(default_factory=list)
    only_zeros: list[str] = field(default_factory=list)
    seconds: float = 0.0
    is_out_of_time: bool = False


def check_model(
    module: DetectionModule,
    criterion: SetCriterion,
    batch: MicroBatch,
    from_nothing: bool,
    autocast: torch.dtype | None,
    device: str,
    max_seconds: float,
) -> list[Check]:
    model = copy.deepcopy(module.model).to(device).train()
    model.backbone.to(memory_format=torch.channels_last)
    try:
        learning = _learn(model, criterion, on_device(batch, device), module, autocast, max_seconds)
    except Exception as error:
        place = module_of(error.__traceback__, model)
        found = f"{type(error).__name__}{f' in {place}' if place else ''}: {error}"
        is_memory = isinstance(error, torch.cuda.OutOfMemoryError)
        advice = "a smaller --device_batch_size or --data.image_size" if is_memory else "what the error says"
        return [Check("first step", "failed", "a step that can be computed", found, "", advice)]
    unmoved = [
        name
        for (name, before), after in zip(module.model.named_parameters(), model.parameters())
        if after.requires_grad and torch.equal(before.detach().cpu(), after.detach().cpu())
    ]
    del model
    if torch.device(device).type == "cuda":
        torch.cuda.empty_cache()
    return [
        _check_first_loss(learning, module, batch, from_nothing),
        _check_learning(learning, module, unmoved),
        _check_gradients(learning, module, from_nothing),
    ]


def _learn(
    model: DeformableDETR,
    criterion: SetCriterion,
    batch: MicroBatch,
    module: DetectionModule,
    autocast: torch.dtype | None,
    max_seconds: float,
) -> _Learning:
    """Steps of the run's own optimiser on one batch, without dropout, at the rates that the run has after its
    warm-up."""
    _switch_off_dropout(model)
    optim, kind = module.optim, batch[0].device.type
    groups = parameter_groups(model, optim, backbone_pretrained=module.backbone_pretrained)
    optimizer = build_optimizer(groups, optim, fused=False)
    scaler = torch.amp.GradScaler(kind) if autocast is torch.float16 else None
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    num_boxes = float(max(1, count_objects([batch])))
    has_gradient: dict[str, bool] = {}  # missing: none; False: only zeros
    learning, start = _Learning(), time.perf_counter()
    tokens = _count_proposals(model, learning)
    try:
        for step in range(MAX_STEPS):
            optimizer.zero_grad()
            with torch.autocast(kind, autocast, cache_enabled=False) if autocast else nullcontext():
                losses = step_losses(model, criterion, batch, num_boxes)
                total = criterion.total(losses)
            if step == 0:
                learning.first = {name: float(value.detach()) for name, value in losses.items()}
            learning.losses.append(float(total.detach()))
            if not math.isfinite(learning.losses[-1]):
                break
            (total if scaler is None else scaler.scale(total)).backward()
            if scaler is not None:
                scaler.unscale_(optimizer)
            if step < 2 * MIN_STEPS:
                for name, parameter in trainable.items():
                    if parameter.grad is not None and not has_gradient.get(name):
                        has_gradient[name] = bool((parameter.grad != 0).any())
            clip_grad_norm_(model.parameters(), optim.clip_max_norm or math.inf)
            if scaler is None:
                optimizer.step()
            else:
                scaler.step(optimizer)
                scaler.update()
            learning.seconds = time.perf_counter() - start
            done = step + 1
            has_seen_all = done >= 2 * MIN_STEPS or (done >= MIN_STEPS and all(has_gradient.values()))
            if has_seen_all and learning.losses[-1] <= LEARNT * learning.losses[0]:
                break
            if done >= 2 * MIN_STEPS and min(learning.losses) == max(learning.losses):
                break  # nothing moves
            if done >= 2 and learning.seconds * (done + 1) / done > max_seconds:
                learning.is_out_of_time = True
                break
    finally:
        tokens.remove()
    learning.without_gradient = [name for name in trainable if name not in has_gradient]
    if len(learning.losses) >= MIN_STEPS:
        learning.only_zeros = [name for name, is_some in has_gradient.items() if not is_some]
    return learning


def _check_first_loss(learning: _Learning, module: DetectionModule, batch: MicroBatch, from_nothing: bool) -> Check:
    name = "first loss"
    broken = {key: value for key, value in learning.first.items() if not math.isfinite(value)}
    if broken:
        listed = ", ".join(f"{key} {value}" for key, value in broken.items())
        advice = "--precision 32, and weights and images: `ddetr data audit --decode`"
        return Check(
            name, "failed", "finite terms", listed, "numbers too large for the precision, or broken weights", advice
        )
    num_objects = count_objects([batch])
    config, alpha = module.model.config, module.criterion.loss_weights.focal_alpha
    num_images, num_classes = len(batch[2]), config["num_classes"]
    facts: dict[str, Any] = {"losses": learning.first, "num_objects": num_objects}
    if not from_nothing or module.criterion.loss_weights.classification != "focal":
        found = f"all terms are finite, loss_ce is {learning.first['loss_ce']:.3f}"
        unknown = "IoU-aware classes" if from_nothing else "heads with trained weights"
        return Check(name, "ok", f"finite terms ({unknown} have no known loss)", found, facts=facts)
    for key, value in learning.first.items():
        if not key.startswith("loss_ce") or DENOISING in key or ONE_TO_MANY in key:
            continue  # of the auxiliary passes it is not known how many queries an object has
        is_proposal = key.endswith("_enc")
        num_queries = learning.num_proposals if is_proposal else config["num_queries"]
        num_matched = sum(min(num_queries, len(target["labels"])) for target in batch[2])
        num_predictions = num_images * num_queries * num_classes
        expected = expected_class_loss(num_predictions, num_objects, num_matched, alpha)
        low, high = (expected * factor for factor in (PROPOSAL_BAND if is_proposal else FIRST_LOSS_BAND))
        facts[f"expected_{key}"] = expected
        if low <= value <= high:
            continue
        biases = torch.cat([head.bias.detach().flatten().float().cpu() for head in module.model.class_embed])
        wanted = f"{key} of about {expected:.2f} ({low:.2f} to {high:.2f}) from the prior of 0.01 an object"
        cause = ""
        if abs(float(biases.mean()) - PRIOR_BIAS) > 0.5:
            cause = f"the class heads have a bias of {float(biases.mean()):.2f} instead of {PRIOR_BIAS:.2f}"
        elif value > high:
            cause = "logits spread too far: weights or features of the heads are too large at the start"
        return Check(name, "failed", wanted, f"{key} {value:.2f}", cause, "the initial weights of class_embed", facts)
    limits = {"loss_bbox": 4.0, "loss_giou": 2.0}
    for key, value in learning.first.items():
        most = next((limit for start, limit in limits.items() if key.startswith(start)), math.inf)
        if value > most * 1.01:
            wanted = f"{key} of at most {most}, which no boxes inside the image exceed"
            return Check(name, "failed", wanted, f"{key} {value:.2f}", "boxes outside the image", "the targets", facts)
    found = (
        f"loss_ce {learning.first['loss_ce']:.2f}, the prior predicts {facts['expected_loss_ce']:.2f}; all terms finite"
    )
    return Check(name, "ok", "the class loss of the focal prior", found, facts=facts)


def _check_learning(learning: _Learning, module: DetectionModule, unmoved: Sequence[str]) -> Check:
    name, expected = "learning", f"the loss on one fixed batch to fall below {LEARNT:.0%} of its first value"
    first, last, steps = learning.losses[0], learning.losses[-1], len(learning.losses)
    facts = {"losses": learning.losses, "seconds": round(learning.seconds, 1)}
    found = f"{first:.3f} to {last:.3f} in {steps} steps, {learning.seconds:.0f} s"
    trainable = [n for n, p in module.model.named_parameters() if p.requires_grad]
    rates = {group["name"]: group["lr"] for group in parameter_groups(
        module.model, module.optim, backbone_pretrained=module.backbone_pretrained
    )}  # fmt: skip
    if not math.isfinite(last):
        cause = "the learning rate is too high" if math.isfinite(first) else ""
        return Check(name, "failed", expected, f"{found}: it is no number any more", cause, "--optim.lr", facts)
    if not trainable or len(unmoved) == len(trainable):
        cause = "every parameter is frozen" if not trainable else f"the learning rates are {rates}"
        return Check(name, "failed", expected, f"{found}: no parameter moves", cause, "--optim.lr", facts)
    if last <= LEARNT * first:
        return Check(name, "ok", expected, found, facts=facts)
    falls = min(learning.losses[1:], default=first) < NOT_LEARNT * first
    if learning.is_out_of_time and (falls or steps < 2 * MIN_STEPS):
        why = "steps are slow here"
        return Check(name, "warning", expected, f"{found}: time ran out", why, "train.csv, after an hour", facts)
    if not falls or last > first:
        low = "too low" if last <= 1.05 * first else "too high"
        cause = f"the learning rate {module.optim.lr:g} is {low}, or the targets contradict the images"
        return Check(name, "failed", expected, found, cause, "--optim.lr, and the other checks", facts)
    return Check(
        name, "warning", expected, f"{found}: slowly", f"a low learning rate ({module.optim.lr:g})", "--optim.lr", facts
    )


def _check_gradients(learning: _Learning, module: DetectionModule, from_nothing: bool) -> Check:
    name, expected = "gradients", "gradients in every trainable parameter, and heads that can learn"
    named = dict(module.model.named_parameters())
    facts = {"without_gradient": learning.without_gradient, "only_zeros": learning.only_zeros}
    if learning.without_gradient:
        found = f"none reaches {first_few(learning.without_gradient, 4)}"
        if not module.model.aux_loss and all(
            key.startswith(("class_embed.", "bbox_embed.")) for key in learning.without_gradient
        ):
            cause = "without --model.aux_loss the heads of all layers but the last have no loss"
            return Check(name, "warning", expected, found, cause, "--model.aux_loss true, unless this is meant", facts)
        cause = "a part of the model does not lead to the loss (a detached output), or is not used"
        advice = "what becomes of these modules' outputs; several processes would stop at it"
        return Check(name, "failed", expected, found, cause, advice, facts)
    frozen = [key for key, p in named.items() if not p.requires_grad and not key.startswith("backbone.")]
    if frozen:
        status = "failed" if from_nothing else "warning"
        cause = "they keep their initial, random values" if from_nothing else "they keep the values that they came with"
        return Check(
            name, status, expected, f"frozen: {first_few(frozen, 4)}", cause, "which parameters are frozen", facts
        )
    if learning.only_zeros:
        found = f"only zeros reach {first_few(learning.only_zeros, 4)}"
        cause = "dead units, or inputs that are all zero"
        return Check(name, "warning", expected, found, cause, "these modules' inputs", facts)
    backbone = [p for key, p in named.items() if key.startswith("backbone.")]
    if backbone and not module.backbone_pretrained and not any(p.requires_grad for p in backbone):
        cause = "--model.freeze_backbone all without --model.pretrained_backbone true or --weights"
        return Check(
            name, "warning", expected, "the backbone is frozen with random weights", cause, "these options", facts
        )
    return Check(name, "ok", expected, f"{sum(p.requires_grad for p in named.values())} tensors", facts=facts)


def fixed_batch(data: DetectionData) -> MicroBatch | None:
    """One or two training images with objects, without augmentation; more would only take longer."""
    train = data.train_set
    still: DetectionDataset = copy.copy(train)
    still.transform, still.augmentation = data.val_set.transform, None
    places = images_with_objects(train.annotations)[: min(2, data.device_batch_size)]
    return collate_micro([still[index] for index in places], len(places))[0] if places else None


def _switch_off_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.p = 0.0
        elif isinstance(module, nn.MultiheadAttention):
            module.dropout = 0.0
        elif hasattr(module, "drop_prob"):  # timm's stochastic depth
            module.drop_prob = 0.0


def _count_proposals(model: DeformableDETR, learning: _Learning) -> Any:
    """A hook that notes how many cells propose a box."""

    def note(_: nn.Module, args: Any, outputs: dict[str, Any]) -> None:
        if "enc_outputs" in outputs:
            learning.num_proposals = outputs["enc_outputs"]["pred_logits"].shape[1]

    return model.register_forward_hook(note)

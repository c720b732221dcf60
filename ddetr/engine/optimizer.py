"""Parameter groups and schedule of the official recipe."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ddetr.engine.config import OptimConfig

BACKBONE_NAMES = ("backbone.0",)
LINEAR_PROJ_NAMES = ("reference_points", "sampling_offsets")


def parameter_groups(model: nn.Module, config: OptimConfig, *, backbone_pretrained: bool) -> list[dict]:
    """Three disjoint groups with their rates: backbone, linear projections, everything else; empty ones are left out.

    Each is {"name", "params", "lr", "weight_decay"}; every trainable parameter is in exactly one.
    """
    lr_backbone = config.lr_backbone
    if lr_backbone is None:
        lr_backbone = config.lr * 0.1 if backbone_pretrained else config.lr
    rates = {"rest": config.lr, "backbone": lr_backbone, "linear_proj": config.lr * config.lr_linear_proj_mult}
    members: dict[str, list[nn.Parameter]] = {name: [] for name in rates}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in BACKBONE_NAMES):
            members["backbone"].append(parameter)
        elif any(part in name for part in LINEAR_PROJ_NAMES):
            members["linear_proj"].append(parameter)
        else:
            members["rest"].append(parameter)
    return [
        {"name": name, "params": params, "lr": rates[name], "weight_decay": config.weight_decay}
        for name, params in members.items()
        if params
    ]


def describe_groups(groups: list[dict], model: nn.Module) -> list[str]:
    """A line a group, and one for what is frozen: tensors, parameters, rate, weight decay."""
    lines = [
        f"{group['name']:<12} {len(group['params']):>4} tensors {sum(p.numel() for p in group['params']):>12,} parameters  "
        f"lr {group['lr']:g}  weight decay {group['weight_decay']:g}"
        for group in groups
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        lines.append(f"{'frozen':<12} {len(frozen):>4} tensors {sum(p.numel() for p in frozen):>12,} parameters")
    return lines


def build_optimizer(groups: list[dict], config: OptimConfig, *, fused: bool = True) -> torch.optim.Optimizer:
    """fused: one kernel for all parameters; not with a gradient scaler, which it would undo after the clipping."""
    if config.sgd:
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9)
    return torch.optim.AdamW(groups, lr=config.lr, fused=fused)


def lr_factor(config: OptimConfig, *, steps_per_epoch: int, total_steps: int) -> Callable[[int], float]:
    """Factor on the rates after a number of optimisation steps."""

    def factor(step: int) -> float:
        warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
        if config.schedule == "cosine":
            return warmup * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * min(1.0, step / total_steps))))
        return warmup * 0.1 ** (step // steps_per_epoch // config.lr_drop)

    return factor

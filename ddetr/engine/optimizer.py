"""Parameter groups and schedule of the official recipe."""

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ddetr.engine.config import OptimConfig
from ddetr.models.deformable_detr import DeformableDETR

BACKBONE_NAMES = ("backbone.0.body",)  # a feature pyramid starts from nothing, so its rate is that of the rest
LINEAR_PROJ_NAMES = ("reference_points", "sampling_offsets")
NORMS = ".norms"  # ends the name of a group without weight decay


def parameter_groups(model: DeformableDETR, config: OptimConfig, *, backbone_pretrained: bool) -> list[dict]:
    """Disjoint groups with their rates: backbone, linear projections, everything else; empty ones are left out.

    With layer_decay the backbone is a group per stage, "backbone.stage4" the last; without decay_norms the
    normalisation layers of a group are one of their own, "rest.norms".

    Each is {"name", "params", "lr", "weight_decay"}; every trainable parameter is in exactly one.
    """
    lr_backbone = config.lr_backbone
    if lr_backbone is None:
        lr_backbone = config.lr * 0.1 if backbone_pretrained else config.lr
    rates = {"rest": config.lr, "backbone": lr_backbone, "linear_proj": config.lr * config.lr_linear_proj_mult}
    stages = {}
    if config.layer_decay != 1:
        stages = {f"backbone.0.{name}": stage for name, stage in model.backbone[0].stages().items()}
        last = max(stages.values())
        by_stage = {f"backbone.stage{s}": lr_backbone * config.layer_decay ** (last - s) for s in range(last + 1)}
        rates = {"rest": config.lr, **by_stage, "linear_proj": rates["linear_proj"]}
    norms = set() if config.decay_norms else _norm_parameters(model)
    members: dict[str, list[nn.Parameter]] = {name + suffix: [] for name in rates for suffix in ("", NORMS)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if any(part in name for part in BACKBONE_NAMES):
            group = f"backbone.stage{stages[name]}" if stages else "backbone"
        else:
            group = "linear_proj" if any(part in name for part in LINEAR_PROJ_NAMES) else "rest"
        members[group + NORMS * (name in norms)].append(parameter)
    groups = [
        {
            "name": name,
            "params": params,
            "lr": rates[name.removesuffix(NORMS)],
            "weight_decay": 0.0 if name.endswith(NORMS) else config.weight_decay,
        }
        for name, params in members.items()
        if params
    ]
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    assert len(grouped) == len(trainable)
    assert set(grouped) == trainable
    return groups


def _norm_parameters(model: nn.Module) -> set[str]:
    """Names of scales and shifts of normalisation layers."""
    kinds = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    return {
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for parameter, _ in module.named_parameters(recurse=False)
    }


def describe_groups(groups: list[dict], model: nn.Module) -> list[str]:
    """A line a group, and one for what is frozen: tensors, parameters, rate, weight decay."""
    width = max(12, *(len(group["name"]) for group in groups))
    lines = [
        f"{group['name']:<{width}} {len(group['params']):>4} tensors {sum(p.numel() for p in group['params']):>12,} "
        f"parameters  lr {group['lr']:g}  weight decay {group['weight_decay']:g}"
        for group in groups
    ]
    frozen = [p for p in model.parameters() if not p.requires_grad]
    if frozen:
        lines.append(f"{'frozen':<{width}} {len(frozen):>4} tensors {sum(p.numel() for p in frozen):>12,} parameters")
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

"""Settings of a run that are not the model's: read by the command line, written into the run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ddetr.errors import InputError

BatchSize = int | Literal["auto"]
PAPER_BATCH_SIZE = 32


@dataclass(frozen=True)
class OptimConfig:
    """AdamW as in the official recipe, under the official flag names."""

    lr: float = 2e-4
    """Learning rate of transformer and heads."""
    lr_backbone: float | None = None
    """Learning rate of the backbone; by default lr / 10 where it starts from trained weights, otherwise lr."""
    lr_linear_proj_mult: float = 0.1
    """Factor on lr for sampling offsets and reference points."""
    layer_decay: float = 1.0
    """Factor on lr_backbone a stage: the last stage has lr_backbone, the one before it lr_backbone * layer_decay, ..."""
    freeze: list[str] = field(default_factory=list)
    """Parts that do not train: glob patterns of the official parameter names, e.g. backbone.*,transformer.encoder.*"""
    weight_decay: float = 1e-4
    """Decoupled weight decay, of every parameter but for decay_norms."""
    decay_norms: bool = True
    """Weight decay of normalisation layers too, as in the official code."""
    clip_max_norm: float = 0.1
    """Largest L2 norm of the whole gradient; 0 switches clipping off."""
    schedule: Literal["step", "cosine"] = "step"
    """"step" multiplies the rates by 0.1 after lr_drop epochs; "cosine" lets them fall to a hundredth."""
    lr_drop: int = 40
    """Epochs before the rates drop, for "step"."""
    warmup_steps: int = 0
    """Steps over which the rates rise from zero."""
    sgd: bool = False
    """SGD with momentum 0.9 instead of AdamW."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then what is validated and published, e.g. 0.9998; by default
    none is kept."""

    def __post_init__(self) -> None:
        for name in ("lr", "lr_backbone", "lr_linear_proj_mult", "weight_decay", "clip_max_norm", "warmup_steps"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must lie in (0, 1], 1 for the same rate everywhere, got {self.layer_decay}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, for instance 0.9998, got {self.ema_decay}")
        if self.lr_drop < 1:
            raise InputError(f"lr_drop must be at least 1 epoch, got {self.lr_drop}")


def resolve_batch_sizes(
    batch_size: BatchSize, device_batch_size: BatchSize, resumed: Path | None
) -> tuple[int, BatchSize]:
    """The sizes of a run: the paper's batch where it is "auto", whose micro-batches then are too.

    resumed: settings of the run that is continued, which hold the sizes that "auto" once was.

    Raises:
        InputError: a number below 1.
    """
    before: dict[str, Any] = yaml.safe_load(resumed.read_text()) if resumed is not None and resumed.is_file() else {}
    if batch_size == "auto":
        batch_size, device_batch_size = before.get("batch_size", PAPER_BATCH_SIZE), "auto"
    if device_batch_size == "auto":
        device_batch_size = before.get("device_batch_size", "auto")
    for name, value in (("batch_size", batch_size), ("device_batch_size", device_batch_size)):
        if value != "auto" and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    return batch_size, device_batch_size

"""Settings of a run that are not the model's: read by the command line, written into the run folder."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from ddetr.errors import InputError

BatchSize = int | Literal["auto"]
PAPER_BATCH_SIZE = 32


@dataclass(frozen=True)
class DataConfig:
    """Where the images and annotations are, and how they are read."""

    path: str
    """Folder of the data set: COCO, Pascal VOC or YOLO, read as it lies there."""
    format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    """What the folder holds; "auto" recognises it."""
    train_split: str | None = None
    """Name of the training split; by default the first of train, train2017, ... that is there."""
    val_split: str | None = None
    """Name of the validation split; by default the first of val, val2017, valid, test, ... that is there."""
    train_annotations: str | None = None
    """COCO annotation file of the training split, where it has another place or name."""
    train_images: str | None = None
    """Folder of the training images, where it has another place or name."""
    val_annotations: str | None = None
    """COCO annotation file of the validation split."""
    val_images: str | None = None
    """Folder of the validation images."""
    augmentation: Literal["official", "plain", "none"] = "official"
    """Training recipe: the paper's flips, scales and crops; a flip alone; or nothing."""
    image_size: int = 800
    """Short side in pixels; the paper's scales, crops and longest side (1333) follow in proportion."""
    keep_empty: bool = True
    """Train on images without an object too, as the official code does."""
    buckets: bool = False
    """Sort the images of each step into micro-batches of similar shape, to save padding; a step has the same images. It
    helps where --device_batch_size is at least 2 and well below --batch_size."""
    padded_shapes: int | None = None
    """Pad batches to one of so many shapes (1 to 12), for torch.compile and cuDNN; by default to their largest sides."""
    num_workers: int | None = None
    """Processes that load images; by default up to 4, as many as there are cores to spare, and 0 for training on a
    processor with fewer than 4."""
    on_bad_image: Literal["skip", "raise"] = "skip"
    """A training image that cannot be read: "skip" reports it and lets another one stand in, up to 1 % of the images;
    "raise" stops. Validation always stops."""
    strict: bool = False
    """Refuse to train where the audit repaired or dropped anything."""

    def __post_init__(self) -> None:
        if self.num_workers is not None and self.num_workers < 0:
            raise InputError(f"num_workers must be at least 0, got {self.num_workers}")
        if self.padded_shapes is not None:
            from ddetr.datasets.transforms import padded_shapes  # slow to import

            padded_shapes(self.image_size, self.padded_shapes)  # refuses a number that is out of range


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

"""Settings of a run: read by the command line, by YAML files and by the run folder, and by nothing copied by hand."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddetr.datasets.config import DataConfig
from ddetr.errors import InputError
from ddetr.models.auxiliary import AuxiliaryConfig
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.settings import check_ranges, option
from ddetr.wording import did_you_mean

BatchSize = int | Literal["auto"]
PAPER_BATCH_SIZE = 32
DEFAULT_SHAPES = 3  # of `padded_shapes`, for torch.compile, where the user names no number

# What training starts from where nothing else is said: the strongest published variant, on an ImageNet backbone.
DEFAULT_MODEL = {"pretrained_backbone": True, "with_box_refine": True, "two_stage": True}


@dataclass(frozen=True)
class OptimConfig:
    """AdamW as in the official recipe, under the official flag names."""

    lr: float = option(2e-4, at_least=0)
    """Learning rate of transformer and heads."""
    lr_backbone: float | None = option(None, at_least=0)
    """Learning rate of the backbone; by default lr / 10 where it starts from trained weights, otherwise lr."""
    lr_linear_proj_mult: float = option(0.1, at_least=0)
    """Factor on lr for sampling offsets and reference points."""
    layer_decay: float = 1.0
    """Factor on lr_backbone per stage: the last stage has lr_backbone, the one before it lr_backbone * layer_decay,
    ..."""
    freeze: list[str] = option(list)
    """Parts that do not train: glob patterns of the official parameter names, e.g. backbone.*,transformer.encoder.*"""
    weight_decay: float = option(1e-4, at_least=0)
    """Decoupled weight decay, of every parameter but for decay_norms."""
    decay_norms: bool = True
    """Weight decay of normalisation layers too, as in the official code."""
    clip_max_norm: float = option(0.1, at_least=0)
    """Largest L2 norm of the whole gradient; 0 switches clipping off."""
    schedule: Literal["step", "cosine"] = "step"
    """"step" multiplies the rates by 0.1 after lr_drop epochs; "cosine" lets them fall to a hundredth."""
    lr_drop: int = option(40, at_least=1)
    """Epochs before the rates drop, for "step"."""
    warmup_steps: int = option(0, at_least=0)
    """Steps over which the rates rise from zero."""
    sgd: bool = False
    """SGD with momentum 0.9 instead of AdamW."""
    ema_decay: float | None = None
    """Decay of a moving average of the weights, which is then what is validated and published, e.g. 0.9998; by default
    none is kept."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"layer_decay must lie in (0, 1], 1 for the same rate everywhere, got {self.layer_decay}")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise InputError(f"ema_decay must lie between 0 and 1, for instance 0.9998, got {self.ema_decay}")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of a training run."""

    data: DataConfig
    """Where the data set is, and how it is loaded."""
    model: Mapping[str, Any] = option(dict)
    """Arguments of `DeformableDETR`; `num_classes` comes from the data. What is left out is as in the file of `weights`
    where there is one (the training fills it in), else as in `DEFAULT_MODEL`, else the constructor's default."""
    loss: LossWeights = LossWeights()
    """Weights of losses and matching costs."""
    auxiliary: AuxiliaryConfig = AuxiliaryConfig()
    """Queries and losses that exist in training alone."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and schedule."""
    epochs: int = option(50, at_least=1, resume="grows")
    """Passes over the training images. A run that is resumed may be given more."""
    batch_size: BatchSize = option(PAPER_BATCH_SIZE, at_least=1)
    """Images per optimisation step, over all devices; the paper's is 32, which "auto" is too, with
    device_batch_size auto."""
    device_batch_size: BatchSize = option(2, at_least=1)
    """Images that a device takes at a time; a step takes as many turns as it needs. "auto" tries out how many fit
    into its memory, with the largest images that there can be."""
    val_every: int = option(1, at_least=1)
    """Epochs between validations; the last epoch always has one."""
    patience: int | None = option(None, at_least=1, resume="free")
    """Validations without a better AP after which the run ends; by default it runs to its last epoch."""
    min_delta: float = option(0.0, at_least=0, resume="free")
    """By how much an AP (0 to 1) must exceed the best one to be better."""
    output: str | None = option(None, resume="session")
    """Run folder; by default runs/ and the name of the data set, numbered."""
    weights: str | None = None
    """Weights to start from: a name of `ddetr weights list`, a hub id (org/name), an https address or a file (ours,
    official, transformers, detrex, mmdetection), or a run's last.ckpt, of which the averaged weights are taken if it
    has them; unlike resume with a new schedule."""
    verbose: bool = option(False, resume="session")
    """Name every parameter that did not come from weights as it is, instead of the first of each reason."""
    resume: str | None = option(None, resume="session")
    """A run folder or its last.ckpt: continue that run exactly. Alone ("last") the run in output, else the newest
    of the data set. "auto": the same where there is one, otherwise a new run, as a job that is started anew after
    each failure wants it."""
    seed: int = option(42, at_least=0, at_most=2**32 - 1)
    """Decides initial weights, order and augmentation."""
    precision: Literal["32", "bf16", "fp16"] = "32"
    """"32", or "bf16" or "fp16" mixed with 32: sampling locations, position encoding, matching and losses are
    float32 in all of them."""
    activation_checkpointing: bool = option(False, resume="free")
    """Compute the layers of encoder and decoder twice instead of keeping what they computed: less memory, more
    time, the same gradients."""
    compile: bool = False
    """Use torch.compile for the model, for a few padded shapes; the first steps of each take minutes."""
    device: Literal["auto", "cpu", "cuda"] = option("auto", resume="session")
    """"auto" takes CUDA where it is available."""
    devices: int | None = option(None, at_least=1, resume="session")
    """Processes; by default all GPUs, or one on the CPU; under torchrun its number."""
    accept_changed_data: bool = option(False, resume="session")
    """Go on with a resumed run whose images or annotations are not those that it began with; other classes are never
    accepted."""
    checkpoint_every: int | None = option(None, at_least=1, resume="session")
    """Steps between saves of last.ckpt, which --resume continues from; by default every ten minutes. An epoch's
    end and a stop signal (Ctrl+C, SIGTERM, SIGUSR1, SIGHUP) save in any case."""
    deterministic: bool = False
    """Only algorithms whose results have the same bits in every run; slower on GPUs."""
    tf32: bool = False
    """On GPUs, float32 products with 10 instead of 23 bits behind the point: faster, less exact."""
    max_detections: int = option(100, at_least=1)
    """Detections per image that the evaluation counts."""
    log_every: int = option(10, at_least=1, resume="session")
    """Steps between rows of train.csv."""
    num_pictures: int = option(12, at_least=0, resume="session")
    """Validation images that are drawn at the end, truth beside prediction."""
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] | None = option(None, resume="free")
    """What follows the run beside its tables; by default TensorBoard, which reads the run folder."""
    max_bad_steps: int = option(10, at_least=0, resume="free")
    """Steps of the run that may be skipped, and recorded in blackbox/, since their loss or gradient is not
    finite; one more, or three in a row, stop it."""
    preflight: bool = option(True, resume="session")
    """First try data, evaluation and one batch for about a minute, and stop where one of them cannot work; a
    resumed run has had it."""

    def __post_init__(self) -> None:
        check_ranges(self)
        complete = complete_model(self.model)  # with weights it is complete once these are read
        object.__setattr__(self, "model", complete if self.weights is None else dict(self.model))
        if self.compile and self.data.padded_shapes is None:
            object.__setattr__(self, "data", replace(self.data, padded_shapes=DEFAULT_SHAPES))

    @property
    def starts_from_weights(self) -> bool:
        """Whether the backbone comes from a file, or from ImageNet."""
        return bool(self.weights or self.model["pretrained_backbone"])

    def with_network_of(self, model: Mapping[str, Any]) -> "TrainConfig":
        """The same with a complete network: what is left out as in `model`, a network's arguments, some or all.

        Raises:
            InputError: a name that is no argument.
        """
        return replace(self, model=complete_model({**model, **self.model}))

    def with_batch_sizes(self, before: Mapping[str, Any]) -> "TrainConfig":
        """The same with the paper's batch where it is "auto", whose micro-batches then are too.

        before: settings of the run that is continued, which hold the sizes that "auto" once was; empty for a new run.
        """
        batch_size, device_batch_size = self.batch_size, self.device_batch_size
        if batch_size == "auto":
            batch_size, device_batch_size = before.get("batch_size", PAPER_BATCH_SIZE), "auto"
        if device_batch_size == "auto":
            device_batch_size = before.get("device_batch_size", "auto")
        return replace(self, batch_size=batch_size, device_batch_size=device_batch_size)


def complete_model(model: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the network but the number of classes, so that the run folder does not depend on defaults.

    Raises:
        InputError: a name that is no argument, with the nearest one that is.
    """
    defaults = {name: parameter.default for name, parameter in inspect.signature(DeformableDETR).parameters.items()}
    del defaults["num_classes"]
    for name in model:
        if name not in defaults:
            why = ": it comes from the data" if name == "num_classes" else did_you_mean(name, defaults)
            raise InputError(f"model: {name!r} is no setting that can be made{why}")
    return defaults | DEFAULT_MODEL | dict(model)

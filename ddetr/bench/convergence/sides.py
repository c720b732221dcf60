"""Who is compared: ours are settings over one base, the others are networks of other people.

`fast+model.query_selection=peaks` is a side too: the one of that name with other settings, so that each part of a
recipe can be measured alone, the others with the rates that suit them (`detr+optim.lr=0.002`), and each over as many
epochs as its recipe has (`detr+epochs=50`).
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from ddetr.engine.config import TrainConfig
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.settings import flat, kept
from ddetr.untrusted import parse_yaml
from ddetr.wording import did_you_mean

# What all sides share where the command line says nothing else: small enough for hours on two cores.
BASE: dict[str, Any] = {
    "data.augmentation": "plain",
    "data.image_size": 160,
    "model.backbone": "regnetx_002",
    "model.pretrained_backbone": False,
    "model.hidden_dim": 128,
    "model.num_queries": 100,
    "model.num_feature_levels": 3,
    "model.enc_layers": 1,
    "model.dec_layers": 3,
    "model.dim_feedforward": 256,
    "model.dropout": 0.0,
    "optim.lr": 1e-3,
    "optim.lr_linear_proj_mult": 1.0,
    "optim.clip_max_norm": 1.0,
    "optim.schedule": "cosine",
    "optim.warmup_steps": 50,
    "batch_size": 8,
    "device_batch_size": 8,
}

_PUBLISHED: dict[str, Any] = {
    "model.query_selection": "topk",
    "auxiliary.denoising": 0,
    "auxiliary.one_to_many": 0,
    "auxiliary.look_forward_twice": False,
    "loss.classification": "focal",
}


@dataclass(frozen=True, eq=False)
class Side:
    """One that is compared."""

    name: str
    about: str
    options: Mapping[str, Any] = field(default_factory=dict)  # dotted, over the base
    # Of others: their published rate beside ours, which is 2e-4 there, and their backbone's beside their own where it
    # starts from trained weights and no other is given.
    lr_factor: float = 1.0
    backbone_factor: float = 1.0
    most_lr: float = math.inf  # above it, it does not learn; its backbone's rate goes with it
    sizes: tuple[str, ...] = ()  # options of the network that others have too
    is_ours: bool = True

    @property
    def folder(self) -> str:
        """Its name as a part of a file's."""
        return re.sub(r"[^\w.+=-]", "_", self.name)

    def config(self, base: TrainConfig) -> TrainConfig:
        """The settings that it trains with.

        Raises:
            InputError: settings that there are not, or that do not go together.
        """
        try:
            return with_options(base, self.options)
        except InputError as error:
            raise InputError(f"--sides {one_line(self.name)}: {error}") from None

    def rates(self, config: TrainConfig) -> tuple[float, float]:
        """Of the others: the learning rate of the network and of its backbone. What is given to the side itself is
        taken as it is."""

        factor = self.lr_factor
        if "optim.lr" not in self.options and factor * config.optim.lr > self.most_lr:
            factor = self.most_lr / config.optim.lr

        def of_side(name: str, rate: float) -> float:
            return rate if name in self.options else rate * factor

        lr = of_side("optim.lr", config.optim.lr)
        if config.optim.lr_backbone is not None:
            return lr, of_side("optim.lr_backbone", config.optim.lr_backbone)
        return lr, lr * (self.backbone_factor if config.starts_from_weights else 1)


_TWO_STAGE = _PUBLISHED | {"model.with_box_refine": True, "model.two_stage": True}
_FAST = _TWO_STAGE | {
    "model.query_selection": "distinct",
    "auxiliary.denoising": 100,
    "auxiliary.look_forward_twice": True,
    "loss.classification": "ia_bce",
}
_OURS = (
    Side(
        "plain", "Deformable DETR as published", _PUBLISHED | {"model.with_box_refine": False, "model.two_stage": False}
    ),
    Side(
        "refine",
        "+ iterative bounding box refinement",
        _PUBLISHED | {"model.with_box_refine": True, "model.two_stage": False},
    ),
    Side("two-stage", "++ two-stage", _TWO_STAGE),
    Side(
        "fast",
        "++ two-stage with distinct queries; denoising, looking forward twice and IoU-aware classes in training",
        _FAST,
    ),
    Side(
        "fast-stride4",
        "fast with levels of strides 4 to 32, for small objects",
        _FAST | {"model.num_feature_levels": 4, "model.num_backbone_levels": 4},
    ),
)
DETR_SIZES = ("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "dropout", "num_queries")
# At 5e-4, half of the base's, after 12 epochs of large drawn shapes DETR's backbone gave the same features for every
# image, and its AP had gone from .018 to .005. At 2e-4 it learns.
_DETR: dict[str, Any] = {
    "lr_factor": 0.5,
    "backbone_factor": 0.1,
    "most_lr": 2e-4,
    "sizes": tuple(f"model.{name}" for name in DETR_SIZES),
    "is_ours": False,
}
_PEERS = (
    Side("detr", "DETR: transformers' network and loss", **_DETR),
    Side("detr-dc5", "DETR with a dilated last stage: transformers' network and loss", **_DETR),
    Side(
        "faster-rcnn",
        "Faster R-CNN with a feature pyramid: torchvision's, trained with AdamW",
        sizes=("model.hidden_dim",),
        is_ours=False,
    ),
)
SIDES = {side.name: side for side in (*_OURS, *_PEERS)}
DEFAULT_SIDES = "plain,refine,two-stage,fast,detr,faster-rcnn"


def chosen_sides(text: str) -> list[Side]:
    """By their names, each once.

    Raises:
        InputError: a name of none.
    """
    return list({name: _side(name) for name in map(str.strip, text.split(","))}.values())


def _side(name: str) -> Side:
    known, *changes = name.split("+")
    if known not in SIDES:
        raise InputError(
            f"--sides: expected some of {', '.join(SIDES)}, got {one_line(name)!r}{did_you_mean(known, SIDES)}"
        )
    side = SIDES[known]
    if not changes:
        return side
    where, options = f"--sides {one_line(name)}", {}
    for change in changes:
        option, equals, value = change.partition("=")
        if not equals or not value:
            raise InputError(f"{where}: expected {known}+OPTION=VALUE, got {one_line(change)!r}")
        if option.split(".")[0] in _SHARED:
            raise InputError(f"{where}: {one_line(option)} is the same for all sides: give it as an option")
        if option in NOT_OPTIONS and option != "epochs":
            raise InputError(f"{where}: {option} cannot be chosen in a comparison")
        if not side.is_ours and option not in (*_OTHERS_TAKE, *side.sizes):
            raise InputError(f"{where}: {one_line(option)} changes nothing of {known}: leave it out")
        value = parse_yaml(value, where)
        if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?e[-+]?\d+", value, re.IGNORECASE):
            value = float(value)  # YAML 1.1 takes 1e-4 and 1.5e4 for text
        options[option] = value
    about = ", ".join(f"{option} {value}" for option, value in options.items())
    return replace(side, name=name, about=f"{side.about}; {about}", options={**side.options, **options})


def with_options(config: TrainConfig, options: Mapping[str, Any]) -> TrainConfig:
    """The same with other values of dotted options.

    Raises:
        InputError: an option that there is not, a value of another kind, or ones that do not go together.
    """
    known = flat(kept(config))
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in options.items():
        if name not in known:
            raise InputError(f"{one_line(name)!r} is no option of training{did_you_mean(name, known)}")
        before = known[name]
        kinds = {bool: (bool,), int: (int,), float: (int, float)}.get(type(before))
        if kinds is not None and type(value) not in kinds:
            raise InputError(f"{name}: expected a value such as {before}, got {one_line(value)!r}")
        group, _, option = name.rpartition(".")
        (groups.setdefault(group, {}) if group else top)[option] = value
    for group, values in groups.items():
        now = getattr(config, group)
        top[group] = {**now, **values} if isinstance(now, Mapping) else replace(now, **values)
    return replace(config, **top)


# Of training, what the networks of others are trained with too.
_OTHERS_TAKE = (
    *("epochs", "precision", "deterministic", "tf32"),
    *("model.backbone", "model.pretrained_backbone", "model.freeze_backbone"),
    *("optim.lr", "optim.lr_backbone", "optim.weight_decay", "optim.clip_max_norm", "optim.schedule", "optim.sgd"),
    *("optim.lr_drop", "optim.warmup_steps", "optim.ema_decay"),
)

_SHARED = ("data", "batch_size", "val_every", "max_detections", "device")

# Settings of a run that a comparison decides itself.
NOT_OPTIONS = (
    *("output", "epochs", "resume", "seed", "weights", "verbose", "patience", "min_delta", "devices", "loggers"),
    *("num_pictures", "preflight", "accept_changed_data", "checkpoint_every", "log_every", "max_bad_steps"),
)
assert set(NOT_OPTIONS) <= {f.name for f in fields(TrainConfig)}

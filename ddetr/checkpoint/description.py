"""What a file of weights is, for people and for programs."""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddetr.checkpoint.coco_classes import is_unused
from ddetr.checkpoint.detectors import Recognised, recognise
from ddetr.checkpoint.published import Checkpoint, is_checkpoint
from ddetr.printable import one_line
from ddetr.weight_files.architectures import Architecture, architecture_of
from ddetr.weight_files.folders import read_files
from ddetr.weight_files.state_dicts import tensor_names
from ddetr.wording import first_few

if TYPE_CHECKING:
    from rich.table import Table

_PARTS = (
    ("backbone", r"backbone\.0\."),
    ("projections", r"input_proj\."),
    ("encoder", r"transformer\.encoder\."),
    ("heads", r"(?:class|bbox)_embed\."),
    ("decoder and queries", r""),
)
_SIZES = ("hidden_dim", "nheads", "enc_layers", "dec_layers", "dim_feedforward", "num_queries", "num_feature_levels")
_SIZES += ("num_backbone_levels", "enc_n_points", "dec_n_points", "position_embedding")
_CLASSES_SHOWN, _VALUES_SHOWN = 8, 20


@dataclass(frozen=True)
class Description:
    """A trained detector. Lists and dicts hold plain values.

    Attributes:
        file: its name.
        project: whose names the file has; "ddetr" is ours.
        where: under which keys of the file the weights lie, "" for its outermost names.
        variant: in the paper's words: "two-stage, box refinement (++)".
        config: the arguments of `DeformableDETR`.
        classes: of each label the `category_id` and the `name`.
        parameters: of each part of the network how many; "all" is their sum.
        precision: of the numbers, as PyTorch calls it: ["float32"].
        input: how images reach the network, as in `Checkpoint`.
        threshold: score from which detections are shown.
        left_out: what the file holds for training alone -> number of tensors.
        notes: what was assumed, or is computed otherwise than where the weights come from.
        metrics, training: what our own files say of how good they are, and how they were made.
        ddetr_version: that wrote the file; None where another project did.
    """

    file: str
    project: str
    where: str
    variant: str
    config: dict[str, Any]
    classes: list[dict[str, Any]]
    parameters: dict[str, int]
    precision: list[str]
    input: dict[str, Any]
    threshold: float
    left_out: dict[str, int]
    notes: list[str]
    metrics: dict[str, Any]
    training: dict[str, Any]
    ddetr_version: str | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN."""
        return _finite({"kind": "detector", **asdict(self)})

    def render(self) -> "Table":
        """Two columns for the terminal."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(one_line(self.file)), title_justify="left", show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        where = f", in its {one_line(self.where)!r}" if self.where else ""
        written = f"ddetr {one_line(self.ddetr_version)}" if self.ddetr_version else f"{self.project}{where}"
        used = [one_line(one["name"]) for one in self.classes if not is_unused(one["name"])]
        unused = len(self.classes) - len(used)
        names = first_few(used, _CLASSES_SHOWN) + (f"; {unused} rows of ids that are not used" if unused else "")
        rows = {
            "written by": written,
            "variant": self.variant,
            "backbone": one_line(self.config.get("backbone")),
            "sizes": ", ".join(f"{name} {one_line(self.config.get(name))}" for name in _SIZES),
            "classes": f"{len(used):,}: {names}",
            "parameters": ", ".join(f"{part} {count:,}" for part, count in self.parameters.items()),
            "precision": ", ".join(self.precision),
            "images": _shown(self.input),
            "threshold": f"{self.threshold:.3g}" if math.isfinite(self.threshold) else "none found anything",
            "metrics": _shown(self.metrics),
            "training": _shown(self.training),
            "of training alone": ", ".join(
                f"{what} ({count} tensor{'s' * (count > 1)})" for what, count in self.left_out.items()
            ),
            "note": "\n".join(self.notes),
        }
        for name, value in rows.items():
            if value:
                table.add_row(name, Text(value))
        return table


@dataclass(frozen=True)
class OtherWeights:
    """Weights that are no detector of ours: in one sentence."""

    file: str
    architecture: Architecture

    def to_dict(self) -> dict[str, Any]:
        kind = "backbone" if self.architecture.is_backbone else "other detector"
        return {"kind": kind, "file": self.file, "architecture": self.architecture.name}

    def render(self) -> str:
        if self.architecture.is_backbone:
            return (
                f"{self.file}: a backbone alone ({self.architecture.name}): start from it with "
                "--model.pretrained_backbone FILE"
            )
        return f"{self.file}: another detector, {self.architecture.name}; its own program runs it"


def describe(path: str | Path) -> Description | OtherWeights:
    """What the weights in a file or folder are.

    Raises:
        InputError: as `read_detector`, but for other networks that are known.
    """
    path = Path(path)
    weights = read_files(path)
    is_ours = is_checkpoint(weights.content, weights.metadata)
    if not is_ours and (other := architecture_of(tensor_names(weights.content))) is not None:
        return OtherWeights(path.name, other)
    return _described(path, recognise(path, weights))


def _described(path: Path, found: Recognised) -> Description:
    checkpoint = found.checkpoint
    left_out: dict[str, int] = {}
    for _, why in found.left_out:
        left_out[why] = left_out.get(why, 0) + 1
    return Description(
        file=path.name or str(path),
        project=found.project,
        where=found.where,
        variant=variant_of(checkpoint.config),
        config=checkpoint.config,
        classes=[{"category_id": c.category_id, "name": c.name} for c in checkpoint.categories],
        parameters=_parameters(checkpoint),
        precision=sorted({str(t.dtype).removeprefix("torch.") for t in checkpoint.model.values() if t.ndim}),
        input=checkpoint.input,
        threshold=checkpoint.threshold,
        left_out=left_out,
        notes=list(found.notes),
        metrics=checkpoint.metrics,
        training=checkpoint.training,
        ddetr_version=checkpoint.ddetr_version if found.project == "ddetr" else None,
    )


def variant_of(config: Mapping[str, Any]) -> str:
    """The network of a configuration in the paper's words."""
    kind = "plain"
    if config.get("two_stage"):
        kind = "two-stage, box refinement (++)"
    elif config.get("with_box_refine"):
        kind = "box refinement (+)"
    scale = "single scale" if config.get("num_feature_levels") == 1 else ""
    more = {"DC5": config.get("dilation"), "mixed selection": config.get("mixed_selection")}
    more |= {"class-aware proposals": config.get("class_aware")}
    return ", ".join(filter(None, (kind, scale, *(name for name, value in more.items() if value))))


def _parameters(checkpoint: Checkpoint) -> dict[str, int]:
    """Weights and biases, those of frozen norms too; a head that all layers share counts once."""
    counts = {part: 0 for part, _ in _PARTS}
    is_shared = not checkpoint.config.get("with_box_refine")
    for name, tensor in checkpoint.model.items():
        is_again = is_shared and re.match(r"(?:class|bbox)_embed\.[1-9]", name)
        if not is_again and not re.search(r"\.(?:running_\w+|num_batches_tracked)$", name):
            counts[next(part for part, pattern in _PARTS if re.match(pattern, name))] += tensor.numel()
    return {**counts, "all": sum(counts.values())}


def _shown(values: Mapping[str, Any]) -> str:
    """The first of the plain values in a line: anybody can write a file. Long lists are for programs."""
    return ", ".join(islice((f"{one_line(name)} {value}" for name, value in _plain(values)), _VALUES_SHOWN))


def _plain(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _plain(value, f"{prefix}{name}.")
        elif not isinstance(value, list):
            yield f"{prefix}{name}", one_line(f"{value:.4g}" if isinstance(value, float) else value)
        elif len(value) <= 3:
            yield f"{prefix}{name}", " ".join(one_line(item) for item in value)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value

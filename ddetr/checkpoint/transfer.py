"""Any weights into any model of ours: what fits is copied, what nearly fits is adapted, and all of it is reported."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddetr.checkpoint.class_rows import match_rows
from ddetr.checkpoint.foreign import BODY, COUNTER, SourceWeights, num_class_rows, read_weights
from ddetr.checkpoint.heads import HeadMap
from ddetr.checkpoint.report import ClassOrigin, LoadReport, Remark
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.heads import class_head

QUERY_NOISE = 0.1  # of the spread of the queries: copies of a query must differ, or they would learn the same


def load_weights(
    model: DeformableDETR, path: str | Path, *, categories: Sequence[Category] | None = None
) -> LoadReport:
    """Start `model` from the weights of a file, whichever project wrote it and whatever classes it was trained for.

    Args:
        model: changed in place.
        path: a file of ours, of the official code, of H-DETR, of detrex, of Mr.DETR, of mmdetection (2 or 3) or of
            transformers, or a transformers folder. Images are then normalised as the file's were (`model.image_mean`,
            `image_std`).
        categories: the classes of `model` in the order of its labels: rows of the class head are copied by name, by
            category id where the file has no names. Without them, rows are copied in order where there are as many.

    Returns:
        The report: nothing is left out silently.

    Raises:
        InputError: not a file of weights; another hidden size; values that are NaN or infinite; less than half of the
            model would come from the file.
    """
    if categories is not None and len(categories) != model.config["num_classes"]:
        raise InputError(f"expected {model.config['num_classes']} categories, as the model has, got {len(categories)}")
    source = read_weights(Path(path))
    transfer = _Transfer(model, source, categories)
    report = transfer.plan(Path(path))
    if report.share < 0.5:
        first = ", ".join(remark.name for remark in report.initialised[:3])
        raise InputError(
            f"{path}: only {report.share:.0%} of the model's parameters would come from this {source.kind} file, "
            f"missing {first} and others: it belongs to another architecture. Nothing was changed; set the model's "
            "options (backbone, layers, levels) to those of the file"
        )
    transfer.apply()
    return report


class _Adaptation(NamedTuple):
    """The new value of a parameter; `how` is empty where it is the file's as it stands."""

    value: Tensor
    how: str


class _Transfer:
    """Finds, for each tensor of the model, its value in the file."""

    def __init__(self, model: DeformableDETR, source: SourceWeights, categories: Sequence[Category] | None):
        self.model, self.source, self.config = model, source, model.config
        self.own = _each_tensor_once(model)
        self.heads = HeadMap(source, model)
        # Levels correspond by stride: a single-scale model has the coarsest backbone level alone.
        self.level_shift = len(model.backbone[0].strides) - source.num_backbone_levels
        num_rows = num_class_rows(source.tensors)
        self.categories = categories
        self.rows, self.rows_how = match_rows(source.classes, num_rows, categories, model.config["num_classes"])
        self.fresh_class_head = class_head(model.config["hidden_dim"], model.config["num_classes"]).state_dict()
        self.used: set[str] = set()  # names in the file
        self.refused: dict[str, str] = {}  # names in the file that the model has too, and why they do not fit
        self.values: dict[str, Tensor] = {}

    def plan(self, path: Path) -> LoadReport:
        """Decide on everything, change nothing."""
        hidden_dim = self.source.tensors["transformer.level_embed"].shape[1]
        if hidden_dim != self.config["hidden_dim"]:
            raise InputError(
                f"{path}: expected weights of hidden_dim {self.config['hidden_dim']}, as the model has, got "
                f"{hidden_dim}: set hidden_dim={hidden_dim}"
            )
        report = LoadReport(path, self.source.kind, self.source.where)
        for name, own in self.own.items():
            found = self._value_of(name, own)
            if isinstance(found, str):
                report.initialised.append(Remark(name, found))
                continue
            self.values[name] = found.value
            if found.how:
                report.adapted.append(Remark(name, found.how))
            else:
                report.loaded.append(name)
        self._check_backbone(path)
        for name, value in self.values.items():
            if not value.isfinite().all():
                raise InputError(
                    f"{path}: {name} holds values that are NaN or infinite, as a diverged run leaves them. Nothing was "
                    "changed; take an earlier file"
                )
        own_parameters = {name: own.numel() for name, own in self.own.items() if isinstance(own, torch.nn.Parameter)}
        report.share = sum(own_parameters.get(name, 0) for name in self.values) / sum(own_parameters.values())
        report.skipped = [
            Remark(name, self._why_skipped(name)) for name in self.source.tensors if name not in self.used
        ]
        report.skipped += self.source.left_out
        report.classes = self._classes()
        report.skipped += [Remark(name, "beside the detector, not of it") for name in self.source.others]
        return report

    def _check_backbone(self, path: Path) -> None:
        """Raises `InputError` where the file has another backbone: trained blocks between random ones learn nothing."""
        own = [name for name in self.own if name.startswith(BODY) and not name.endswith(COUNTER)]
        missing = [name for name in own if name not in self.values]
        if missing:
            first = self.refused.get(missing[0], "not in the file")
            raise InputError(
                f"{path}: expected weights of the backbone {self.config['backbone']}, as the model has, but "
                f"{len(missing)} of its {len(own)} tensors do not come from this {self.source.kind} file, first "
                f"{missing[0]} ({first}): it has another backbone. Nothing was changed; set the model's backbone to "
                "that of the file"
            )

    @torch.no_grad()
    def apply(self) -> None:
        for name, value in self.values.items():
            self.own[name].copy_(value)
        if any(name.startswith("backbone.0.") for name in self.values):
            self.model.image_mean, self.model.image_std = self.source.image_mean, self.source.image_std

    def _value_of(self, name: str, own: Tensor) -> _Adaptation | str:
        """The value of a parameter, or why there is none."""
        head = re.match(r"(class_embed|bbox_embed)\.(\d+)\.", name)
        source_name = self.heads.source_name(name) if head else self._level_name(name)
        if source_name is None or source_name not in self.source.tensors:
            if name.endswith(COUNTER):
                return "a counter of trainable norms, which the file does not have"
            return self.heads.why_missing(name) if head else "not in the file"
        value = self.source.tensors[source_name]
        adapt = self._adapter(name)
        if value.is_floating_point() != own.is_floating_point() or value.is_complex():
            found = f"{value.dtype} in the file, {own.dtype} in the model"
        elif value.ndim != own.ndim or (value.shape[1:] != own.shape[1:] and adapt != self._feed_forward):
            found = _shapes(value, own)
        elif adapt is not None:
            found = adapt(name, own, value)
        elif value.shape != own.shape:
            found = _shapes(value, own)
        else:
            found = _Adaptation(value, self.heads.how(name) if head else self._moved(name, source_name))
        names = self.heads.twins(source_name) if head else [source_name]
        if isinstance(found, str):
            self.refused.update(dict.fromkeys(names, found))
        else:
            self.used.update(names)
        return found

    def _adapter(self, name: str) -> Callable[[str, Tensor, Tensor], _Adaptation | str] | None:
        if name.startswith("class_embed."):
            return self._class_rows
        if re.match(r"bbox_embed\.\d+\.layers\.2\.", name):
            return self._box_output
        if re.search(r"\.linear[12]\.", name):
            return self._feed_forward
        if name == "query_embed.weight":
            return self._queries
        if name == "transformer.level_embed":
            return self._levels
        if re.search(r"\.(?:sampling_offsets|attention_weights)\.", name):
            return self._sampling
        return None

    def _level_name(self, name: str) -> str | None:
        """The name in the file of a parameter of the model; None where the file's level is of another kind."""
        level = re.match(r"input_proj\.(\d+)\.", name)
        if level is None:
            return name
        source_level = int(level[1]) - self.level_shift
        return f"input_proj.{source_level}.{name[level.end() :]}" if source_level >= 0 else None

    def _moved(self, name: str, source_name: str) -> str:
        return f"level {source_name.split('.')[1]} of the file, of the same stride" if name != source_name else ""

    def _class_rows(self, name: str, own: Tensor, value: Tensor) -> _Adaptation | str:
        how = self.heads.how(name)
        fresh = self.fresh_class_head[name.split(".")[-1]].to(value)
        if self.heads.is_proposal(name) and not (self.config["class_aware"] and self.source.config.get("class_aware")):
            return self._any_object_rows(own, value, fresh, how)
        how = "; ".join(filter(None, (self.rows_how, how)))
        if self.rows == list(range(len(value))):
            return _Adaptation(value, how)
        kept = [(row, source_row) for row, source_row in enumerate(self.rows) if source_row is not None]
        if not kept:
            return self.rows_how
        if max(source_row for _, source_row in kept) >= len(value):
            return f"{_shapes(value, own)}: its rows are not those of the file's other class heads"
        rows = fresh.clone()
        rows[[row for row, _ in kept]] = value[[source_row for _, source_row in kept]]
        return _Adaptation(rows, how)

    def _classes(self) -> list[ClassOrigin]:
        names = [c.name for c in self.categories] if self.categories is not None else [""] * len(self.rows)
        row_names = [row.name for row in self.source.classes or ()]
        return [
            ClassOrigin(name, row, None if row is None or row >= len(row_names) else row_names[row])
            for name, row in zip(names, self.rows)
        ]

    def _any_object_rows(self, own: Tensor, value: Tensor, fresh: Tensor, how: str) -> _Adaptation | str:
        """The class head of proposals, where its first row says "any object" and the others nothing (facts of the
        two-stage variant): in the file, in the model, or in both."""
        if self.source.config.get("class_aware"):
            return "the file's proposals have a score for each class, the model's one for any object (class_aware)"
        if self.config["class_aware"] and self.source.kind == "ddetr":
            return _Adaptation(value[:1].expand_as(own), "the score for any object is that of each class")
        if value.shape == own.shape:
            return _Adaptation(value, how)
        common = min(len(value), len(own))
        return _Adaptation(
            torch.cat((value[:common], fresh[common:])), "rows of the class-agnostic proposal head kept in order"
        )

    def _box_output(self, name: str, own: Tensor, value: Tensor) -> _Adaptation | str:
        """The last layer of a box head corrects a point or a box: one trained for the other is worse than none."""
        if value.shape != own.shape:
            return _shapes(value, own)
        if self.heads.same_reference(name):
            return _Adaptation(value, self.heads.how(name))
        fresh = torch.zeros_like(own)
        if name.endswith("bias") and self.heads.corrects_point(name):
            fresh[2:] = -2.0
        return _Adaptation(fresh, "no correction: the file's corrects another kind of reference")

    def _queries(self, name: str, own: Tensor, value: Tensor) -> _Adaptation | str:
        if value.shape == own.shape:
            return _Adaptation(value, "")
        num_queries, num_source = len(own), len(value)
        if num_queries < num_source:
            return _Adaptation(value[:num_queries], f"the first {num_queries} of {num_source} queries")
        copies = value.repeat(num_queries // num_source + 1, 1)[:num_queries].clone()
        extra = copies[num_source:]
        extra += torch.randn(extra.shape).to(extra) * (QUERY_NOISE * value.std())
        return _Adaptation(copies, f"{num_source} queries, and copies of them with small noise to make {num_queries}")

    def _feed_forward(self, name: str, own: Tensor, value: Tensor) -> _Adaptation | str:
        """Of fewer hidden units those that matter most; of more, the new ones start without a say."""
        if value.shape == own.shape:
            return _Adaptation(value, "")
        layer = name.rpartition(".linear")[0]
        first, second = (self.source.tensors.get(f"{layer}.linear{part}.weight") for part in (1, 2))
        num_units, hidden_dim = self.config["dim_feedforward"], self.config["hidden_dim"]
        if first is None or second is None or first.shape != second.shape[::-1] or first.shape[1:] != (hidden_dim,):
            return _shapes(value, own)
        num_source = len(first)
        axis = 1 if ".linear2." in name else 0
        if name.endswith(".linear2.bias") or value.shape[axis] != num_source:
            return _shapes(value, own)
        if num_units < num_source:
            strength = first.float().norm(dim=1) * second.float().norm(dim=0)
            units = strength.topk(num_units).indices.sort().values
            return _Adaptation(
                value.index_select(axis, units), f"the {num_units} strongest of {num_source} hidden units"
            )
        new = torch.zeros_like(own, dtype=value.dtype) if axis == 1 else own.detach().to(value, copy=True)
        new.narrow(axis, 0, num_source).copy_(value)
        return _Adaptation(new, f"{num_source} hidden units, and new ones that add nothing yet to make {num_units}")

    def _levels(self, name: str, own: Tensor, value: Tensor) -> _Adaptation:
        if value.shape == own.shape:
            return _Adaptation(value, "")
        levels = own.detach().clone()
        targets, sources = self._common_levels()
        levels[targets] = value[sources].to(levels)
        return _Adaptation(levels, f"{len(targets)} of {len(own)} levels, by stride; the others as initialised")

    def _sampling(self, name: str, own: Tensor, value: Tensor) -> _Adaptation | str:
        """Offsets (M*L*P*2, ...) or logits (M*L*P, ...) of common levels and points; the others as initialised."""
        num_levels = self.config["num_feature_levels"]
        points_flag = "enc_n_points" if ".encoder." in name else "dec_n_points"
        heads, points = self.config["nheads"], self.config[points_flag]
        source_heads = self.source.config.get("nheads", heads)
        last = 2 if ".sampling_offsets." in name else 1
        source_points, rest = divmod(len(value), source_heads * self.source.num_levels * last)
        if source_heads != heads or rest or value.shape[1:] != own.shape[1:]:
            return f"{_shapes(value, own)}: another number of heads"
        if (source_points, self.source.num_levels) == (points, num_levels):
            return _Adaptation(value, "")
        new = own.detach().clone().view(heads, num_levels, points, last, *own.shape[1:])
        old = value.to(new).view(heads, self.source.num_levels, source_points, last, *own.shape[1:])
        targets, sources = self._common_levels()
        common = min(points, source_points)
        for target, level in zip(targets, sources):
            new[:, target, :common] = old[:, level, :common]
        how = f"{len(targets)} of {num_levels} levels, {common} of {points} points; the others as initialised"
        return _Adaptation(new.view(own.shape), how)

    def _common_levels(self) -> tuple[list[int], list[int]]:
        """Levels of the model that the file has, and what those are in the file."""
        levels = range(self.config["num_feature_levels"])
        targets = [level for level in levels if 0 <= level - self.level_shift < self.source.num_levels]
        return targets, [level - self.level_shift for level in targets]

    def _why_skipped(self, name: str) -> str:
        if name.endswith(COUNTER):
            return "a counter of trainable norms, which the model does not have"
        if name == "query_embed.weight" and self.source.two_stage and self.config["two_stage"]:
            return "the learned content of queries: set mixed_selection to have it"
        return self.refused.get(name, "not in the model")


def _each_tensor_once(model: DeformableDETR) -> dict[str, Tensor]:
    """Parameters and buffers under the first of their names: the layers of a plain model share their heads."""
    names: dict[int, str] = {}
    state_dict = model.state_dict(keep_vars=True)
    for name, tensor in state_dict.items():
        names.setdefault(id(tensor), name)
    return {name: state_dict[name] for name in names.values()}


def _shapes(value: Tensor, own: Tensor) -> str:
    return f"{tuple(value.shape)} in the file, {tuple(own.shape)} in the model"

"""What an audit found, as a table and as plain values, and whether training may start."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ddetr.datasets.annotations import ACTIONS, Category, Finding
from ddetr.printable import one_line
from ddetr.untrusted import MAX_MESSAGE
from ddetr.wording import plural

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

PLACES_SHOWN = 3
CLASSES_SHOWN, RAREST_SHOWN = 20, 8  # of more classes: the 12 most frequent and the 8 rarest
# Kinds of findings that stop nothing, and that somebody should read all the same: they stand in the verdict too.
_DOUBTFUL = ("validation-is-training", "split-not-named", "read-together")


@dataclass(frozen=True)
class SplitSummary:
    """What was read of one split."""

    name: str
    format: str
    num_images: int
    num_objects: int  # those that count: trained on in training, ground truth in evaluation
    num_ignored: int  # crowd, difficult
    num_without_objects: int
    objects_p50: float  # per image
    objects_p99: float
    objects_max: int
    class_counts: tuple[int, ...]  # (K,) objects of each label


@dataclass(frozen=True)
class AuditReport:
    """What the audit found; `refused` empty means that training may start."""

    train: SplitSummary
    val: SplitSummary | None
    categories: tuple[Category, ...]
    findings: tuple[Finding, ...]
    num_queries: int
    max_detections: int
    strict: bool = False

    @property
    def refused(self) -> tuple[Finding, ...]:
        """The findings for which training must not start; with `strict` also all repairs and drops."""
        actions = ("refused", "repaired", "dropped") if self.strict else ("refused",)
        return tuple(finding for finding in self.findings if finding.action in actions)

    @property
    def groups(self) -> dict[tuple[str, str], list[Finding]]:
        """(action, kind) -> its findings; refusals first, notes last."""
        return _grouped(self.findings)

    def to_dict(self) -> dict[str, Any]:
        """All of it in plain values, every place included, for JSON."""
        return {
            "ok": not self.refused,
            "strict": self.strict,
            "num_queries": self.num_queries,
            "max_detections": self.max_detections,
            "train": asdict(self.train),
            "val": asdict(self.val) if self.val else None,
            "categories": [asdict(category) for category in self.categories],
            "findings": [
                {
                    "action": action,
                    "kind": kind,
                    "count": sum(finding.count for finding in group),
                    "places": [{"where": f.where, "message": f.message, "count": f.count} for f in group],
                }
                for (action, kind), group in self.groups.items()
            ],
        }

    def render(self) -> RenderableType:
        """The table, for `rich`."""
        from rich.text import Text

        table = _table("Data audit")
        for split in filter(None, (self.train, self.val)):
            for row in self._split_rows(split):
                table.add_row("read", *map(Text, row))  # Text: a name may hold what rich takes for markup
            table.add_section()
        for row in self._class_rows():
            table.add_row("classes", *map(Text, row))
        table.add_section()
        _add_findings(table, self.findings, self.refused)
        if not self.findings:
            table.add_row(Text("ok", style="green"), "nothing to repair, drop or refuse", "", "")
        table.caption = self._verdict()
        return table

    def _split_rows(self, split: SplitSummary) -> Iterator[tuple[str, str, str]]:
        role = "training" if split is self.train else "validation"
        yield f"{role} images", f"{split.num_images:,}", f"{one_line(split.name)} ({split.format})"
        ignored = f"; {split.num_ignored:,} more are crowds or difficult: ignored" if split.num_ignored else ""
        per_image = (
            f"per image: {split.objects_p50:g} (median), {split.objects_p99:g} (p99), {split.objects_max} (most)"
        )
        yield (
            f"{role} objects",
            f"{split.num_objects:,}",
            f"{per_image}; {self.num_queries} queries, {self.max_detections} detections{ignored}",
        )
        if split.num_without_objects:
            yield "without objects", f"{split.num_without_objects:,}", "images kept as background"

    def _class_rows(self) -> Iterator[tuple[str, str, str]]:
        """All classes, or the most and the least frequent ones: what is rare is what somebody should see."""
        order = np.argsort([-count for count in self.train.class_counts], kind="stable").tolist()
        hidden = range(CLASSES_SHOWN - RAREST_SHOWN, len(order) - RAREST_SHOWN if len(order) > CLASSES_SHOWN else 0)
        total = max(1, self.train.num_objects)
        for place, label in enumerate(order):
            if place in hidden:
                if place == hidden[0]:
                    count = sum(self.train.class_counts[order[i]] for i in hidden)
                    yield f"{len(hidden)} more classes", f"{count:,}", f"{count / total:.1%} of the training objects"
                continue
            count = self.train.class_counts[label]
            in_val = f", {self.val.class_counts[label]:,} in validation" if self.val else ""
            yield (
                one_line(self.categories[label].name),
                f"{count:,}",
                f"{count / total:.1%} of the training objects{in_val}",
            )

    def _verdict(self) -> str:
        if self.refused:
            strictly = " (--strict counts repairs and drops)" if self.strict else ""
            return f"Refused: {things(self.refused)} must be put right first{strictly}."
        doubtful = [f" {finding.message}" for finding in self.findings if finding.kind in _DOUBTFUL]
        if self.val is None:
            start = "with a validation split: --data.val_fraction 0.1 holds a tenth of the images back."
            return f"Training may start {start}{''.join(doubtful)}"
        return f"Training may start.{''.join(doubtful)}"


def render_findings(findings: Sequence[Finding]) -> RenderableType:
    """The table of what a reader found, for `rich`; without counts, and without a verdict on training."""
    table = _table("What was found in the data set")
    _add_findings(table, findings, ())
    return table


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_style="bold", header_style="bold", expand=False)
    for header, justify in (("", "left"), ("what", "left"), ("count", "right"), ("details", "left")):
        table.add_column(header, justify=justify, overflow="fold")
    return table


def _add_findings(table: Table, findings: Sequence[Finding], refused: Sequence[Finding]) -> None:
    from rich.text import Text

    styles = {"refused": "bold red", "dropped": "yellow", "repaired": "cyan", "note": "dim"}
    for (action, kind), group in _grouped(findings).items():
        style = "bold red" if group[0] in refused else styles[action]
        said = (one_line(f"{finding.where}: {finding.message}", MAX_MESSAGE) for finding in group[:PLACES_SHOWN])
        details = Text("\n".join(said))
        if len(group) > PLACES_SHOWN:
            details.append(f"\nand {len(group) - PLACES_SHOWN:,} more places", style="dim")
        count = f"{sum(finding.count for finding in group):,}"
        table.add_row(Text(action, style=style), Text(kind, style=style), count, details)


def _grouped(findings: Sequence[Finding]) -> dict[tuple[str, str], list[Finding]]:
    groups: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for action in reversed(ACTIONS):
        for finding in findings:
            if finding.action == action:
                groups[action, finding.kind].append(finding)
    return dict(groups)


def things(findings: Sequence[Finding]) -> str:
    """ "1 thing" or "1,234 things": what the findings stand for, as the table counts it."""
    return plural(sum(finding.count for finding in findings), "thing")

"""What became of every tensor when weights were loaded."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from rich.table import Table


class Remark(NamedTuple):
    """A parameter (official name) and what became of it."""

    name: str
    why: str


@dataclass
class LoadReport:
    """What `load_weights` did with every tensor of the file and of the model.

    Attributes:
        path, kind: the file, and "ddetr", "official", "transformers", "detrex", "mmdetection" or "mmdetection 2".
        where: under which keys of the file the weights lie: "ema.module"; "" for its outermost names.
        loaded: names copied as they are.
        adapted: copied in part or changed, and how.
        skipped: in the file, not in the model.
        initialised: in the model, not in the file: as the constructor left it.
        share: loaded and adapted share of the model's parameters, 0 to 1.
    """

    path: Path
    kind: str
    where: str = ""
    loaded: list[str] = field(default_factory=list)
    adapted: list[Remark] = field(default_factory=list)
    skipped: list[Remark] = field(default_factory=list)
    initialised: list[Remark] = field(default_factory=list)
    share: float = 0.0

    def __str__(self) -> str:
        return (
            f"{self.path.name} ({self.kind}): {len(self.loaded)} tensors loaded, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped, {len(self.initialised)} left as initialised; "
            f"{self.share:.1%} of the model's parameters come from the file"
        )

    def render(self) -> "Table":
        """A table for the terminal, like names on one line."""
        from rich.table import Table

        table = Table(title=str(self), title_justify="left")
        for column in ("", "tensors", "parameters", "why"):
            table.add_column(column, justify="right" if column == "tensors" else "left", overflow="fold")
        table.add_row("loaded", str(len(self.loaded)), "", "same shape and meaning")
        for title, remarks in (
            ("adapted", self.adapted),
            ("skipped", self.skipped),
            ("left as initialised", self.initialised),
        ):
            groups = Counter((_family(name), why) for name, why in remarks)
            for (names, why), count in groups.items():
                table.add_row(title, str(count), names, why)
        return table


def _family(name: str) -> str:
    """The same for weight and bias of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", re.sub(r"\.(weight|bias)$", "", name))

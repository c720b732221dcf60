"""What became of every tensor when weights were loaded."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ddetr.wording import first_few

if TYPE_CHECKING:
    from rich.table import Table

NAMES_SHOWN = 3


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
        where = f", from its {self.where!r}" if self.where else ""
        return (
            f"{self.path.name} ({self.kind}): {len(self.loaded)} tensors loaded, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped, {len(self.initialised)} left as initialised; "
            f"{self.share:.1%} of the model's parameters come from the file{where}"
        )

    def render(self, verbose: bool = False) -> "Table":
        """A table for the terminal: a line per reason, with the first names of each; `verbose` has all names, like
        ones on one line."""
        from rich.table import Table
        from rich.text import Text

        table = Table(title=Text(str(self)), title_justify="left")
        for column in ("", "tensors", "why", "parameters"):
            table.add_column(column, justify="right" if column == "tensors" else "left", overflow="fold")
        table.add_row("loaded", str(len(self.loaded)), "same shape and meaning", "")
        for title, remarks in (
            ("adapted", self.adapted),
            ("skipped", self.skipped),
            ("left as initialised", self.initialised),
        ):
            for why, names in _by_reason(remarks).items():
                shown = "\n".join(names) if verbose else first_few(names, NAMES_SHOWN)
                table.add_row(title, str(sum(names.values())), Text(why), Text(shown))
        if not verbose and any(len(_by_reason(remarks)) for remarks in (self.adapted, self.skipped, self.initialised)):
            table.caption = "--verbose names all parameters"
        return table


def _by_reason(remarks: Iterable[Remark]) -> dict[str, Counter[str]]:
    """The names, like ones under one, and how many tensors each stands for."""
    groups: dict[str, Counter[str]] = {}
    for name, why in remarks:
        groups.setdefault(why, Counter())[_family(name)] += 1
    return groups


def _family(name: str) -> str:
    """The same for weight and bias of all layers."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", re.sub(r"\.(weight|bias)$", "", name))

"""What became of every tensor when weights were loaded."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ddetr.datasets.annotations import alike
from ddetr.wording import first_few

if TYPE_CHECKING:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

NAMES_SHOWN, CLASSES_SHOWN = 3, 8


class Remark(NamedTuple):
    """A parameter (official name) and what became of it."""

    name: str
    why: str


class ClassOrigin(NamedTuple):
    """A class of the model ("" where it is not named), and the row of the file's class head that it starts from."""

    name: str
    row: int | None  # None for a new class
    row_name: str | None  # what the file calls it

    @property
    def is_renamed(self) -> bool:
        """Whether the file has another word for it, not just other capitals."""
        return bool(self.name and self.row_name) and alike(self.name) != alike(self.row_name)


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
        classes: of each label of the model, where its rows of the class heads come from.
    """

    path: Path
    kind: str
    where: str = ""
    loaded: list[str] = field(default_factory=list)
    adapted: list[Remark] = field(default_factory=list)
    skipped: list[Remark] = field(default_factory=list)
    initialised: list[Remark] = field(default_factory=list)
    share: float = 0.0
    classes: list[ClassOrigin] = field(default_factory=list)

    def __str__(self) -> str:
        where = f", from its {self.where!r}" if self.where else ""
        share = self.share if self.share == 1 else min(self.share, 0.999)  # class heads are small, and not all is all
        return (
            f"{self.path.name} ({self.kind}): {len(self.loaded)} tensors loaded, {len(self.adapted)} adapted, "
            f"{len(self.skipped)} skipped, {len(self.initialised)} left as initialised; "
            f"{share:.1%} of the model's parameters come from the file{where}"
        )

    def render(self, verbose: bool = False) -> "Group":
        """For the terminal: a table with a line per reason and the first names of each, and what became of the classes;
        `verbose` has all names, like ones on one line, and a line for each class."""
        from rich.console import Group

        return Group(self._tensors(verbose), *([self._classes(verbose)] if self.classes else []))

    def _tensors(self, verbose: bool) -> "Table":
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
            table.caption = "--verbose names all parameters and classes"
        return table

    def _classes(self, verbose: bool) -> "Table | Text":
        from rich.table import Table
        from rich.text import Text

        kept = [one for one in self.classes if one.row is not None]
        new = [one.name for one in self.classes if one.row is None]
        title = Text(f"classes: {len(kept)} of {len(self.classes)} start from the file's, new: {len(new)}")
        if not verbose:
            renamed = [f"{one.name} <- {one.row_name}" for one in kept if one.is_renamed]
            for what, names in (
                ("kept", [one.name for one in kept if one.name]),
                ("other names", renamed),
                ("new", new),
            ):
                if any(names):
                    title.append(f"\n  {what}: {first_few(names, CLASSES_SHOWN)}")
            return title
        table = Table(title=title, title_justify="left")
        for column in ("class", "row of the file", "its name there"):
            table.add_column(column, justify="right" if column == "row of the file" else "left", overflow="fold")
        for label, one in enumerate(self.classes):
            row = ("new", "") if one.row is None else (str(one.row), one.row_name or "")
            table.add_row(Text(one.name or f"class {label}"), row[0], Text(row[1]))
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

"""What an output folder compares, in `plan.json`: what goes on there has the same settings, data and budget."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ddetr.bench.convergence.points import damaged, read_json
from ddetr.bench.convergence.sides import Side, chosen_sides
from ddetr.bench.record import save_json
from ddetr.engine.config import TrainConfig
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.settings import flat, kept, names_with
from ddetr.wording import first_few

PLAN_FILE = "plan.json"
_CURE = "choose another --output"  # the curves beside it are of settings that nobody knows without it


@dataclass
class Plan:
    """Settings that all sides share, and what was settled for each."""

    settings: dict[str, Any]
    epochs: dict[str, int] = field(default_factory=dict)  # of a side: all its seeds train so long
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, folder: Path, config: TrainConfig, **more: Any) -> "Plan":
        """The folder's, or a new one.

        Args:
            more: what else must stay as it was: data and budget.

        Raises:
            InputError: the folder compares something else.
        """
        free = names_with(config, "free")
        now = {name: value for name, value in flat(kept(config)).items() if name not in free and name != "epochs"}
        now = {**now, "data.path": more.pop("data"), **more}
        content = read_json(folder / PLAN_FILE, _CURE)
        if content is None:
            if curves := sorted(folder.glob("*-seed*.json")):
                raise InputError(
                    f"{folder} holds {curves[0].name} of a comparison whose {PLAN_FILE} is gone, and with it the "
                    f"settings: {_CURE}"
                )
            return cls(now)
        try:
            plan = cls(**content)
            before = dict(plan.settings)
            plan.epochs = {chosen_sides(side)[0].name: int(epochs) for side, epochs in plan.epochs.items()}
            plan.options = {side: dict(options) for side, options in plan.options.items()}
            plan.commands = [*map(str, plan.commands)]
        except (TypeError, ValueError, AttributeError, InputError):
            raise damaged(folder / PLAN_FILE, _CURE) from None
        if other := [name for name in {**before, **now} if before.get(name) != now.get(name)]:
            words = [f"--{one_line(n)} {one_line(before.get(n))} there, {one_line(now.get(n))} here" for n in other]
            raise InputError(
                f"{folder} holds a comparison with other settings ({first_few(words, 3)}): give the same ones to go "
                "on with it, or another --output"
            )
        return plan

    def check(self, side: Side) -> None:
        """Raises `InputError` where a side of this name was something else when it trained here."""
        if self.options.get(side.name, dict(side.options)) != dict(side.options):
            raise InputError(
                f"the side {side.name} had other settings when it trained here (of another version of ddetr?): choose "
                "another --output"
            )

    def save(self, folder: Path) -> None:
        save_json(folder / PLAN_FILE, asdict(self))

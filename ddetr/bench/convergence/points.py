"""The AP of a side and a seed after each epoch, in a file that is written whole after each."""

from dataclasses import asdict, dataclass, field
from math import isnan
from pathlib import Path
from typing import Any

from ddetr.bench.record import save_json
from ddetr.errors import InputError
from ddetr.evaluation import Metrics
from ddetr.untrusted import MAX_RUN_BYTES, parse_json, read_text


@dataclass(frozen=True)
class Point:
    """What is known after a validation."""

    epoch: float  # that are done
    step: float
    images: float
    seconds: float  # of training: CPU time of the process, on a GPU wall time
    AP: float
    AP50: float


START = Point(0, 0, 0, 0, 0, 0)


@dataclass
class Curve:
    """The points of a side and a seed."""

    side: str
    seed: int
    epochs: int  # that it is to train
    batch_size: int
    parameters: int  # of the network that is deployed
    machine: str = ""
    points: list[Point] = field(default_factory=list)

    @property
    def is_finished(self) -> bool:
        return bool(self.points) and self.points[-1].epoch >= self.epochs

    @property
    def last(self) -> Point:
        return self.points[-1]

    def add(self, epoch: int, step: int, seconds: float, metrics: Metrics) -> None:
        """In the place of what an interrupted run had from there on."""
        ap, ap50 = (0.0 if isnan(value) else float(value) for value in (metrics.AP, metrics.AP50))
        point = Point(epoch, step, step * self.batch_size, seconds, ap, ap50)
        self.points = [*(before for before in self.points if before.step < step), point]

    def save(self, path: Path) -> None:
        save_json(path, asdict(self))

    @classmethod
    def read(cls, path: Path) -> "Curve | None":
        """None where there is no such file.

        Raises:
            InputError: it is damaged.
        """
        cure = f"remove it and {path.with_suffix('').name} beside it to train this side anew"
        content = read_json(path, cure)
        if content is None:
            return None
        try:
            return cls.of(content)
        except (TypeError, ValueError, AttributeError, KeyError):
            raise damaged(path, cure) from None

    @classmethod
    def of(cls, content: dict[str, Any]) -> "Curve":
        """From what `dataclasses.asdict` made of one."""
        points = [Point(**{name: float(value) for name, value in point.items()}) for point in content["points"]]
        numbers = {name: int(content[name]) for name in ("seed", "epochs", "batch_size", "parameters")}
        return cls(**content | numbers | {"points": points})


def read_json(path: Path, cure: str) -> dict[str, Any] | None:
    """What is in a file of a comparison; None where there is no such file.

    cure: what to do where it is damaged, in words.

    Raises:
        InputError: it is damaged.
    """
    try:
        content = parse_json(read_text(path, MAX_RUN_BYTES), path.name)
    except FileNotFoundError:
        return None
    except ValueError:
        raise damaged(path, cure) from None
    if not isinstance(content, dict):
        raise damaged(path, cure)
    return content


def damaged(path: Path, cure: str) -> InputError:
    return InputError(f"{path}: expected what ddetr bench convergence wrote, but it is damaged: {cure}")

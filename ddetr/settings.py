"""One option, one place: default, range and what becomes of it on resume stand beside the field of a dataclass.

The text under a field is its help. The command line, YAML files, the run folder and the check of a resumed run all read
the fields; nothing lists them a second time.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, get_args

from ddetr.errors import InputError
from ddetr.printable import one_line

Resume = Literal["same", "grows", "free", "session"]


def option(
    default: Any, *, at_least: float | None = None, at_most: float | None = None, resume: Resume = "same"
) -> Any:
    """A field of a frozen dataclass of settings.

    Args:
        default: a value, or for lists and dicts the type that makes an empty one.
        at_least, at_most: limits of a number; None and words such as "auto" have none. `check_ranges` holds them.
        resume: "same": a resumed run must have the same value; "grows": that or a larger one; "free": it decides
            nothing about the outcome but when it is reached and who hears of it, so it may change; "session": it
            concerns one start of a run and is not kept.
    """
    kind = {"default_factory": default} if isinstance(default, type) else {"default": default}
    return dataclasses.field(**kind, metadata={"at_least": at_least, "at_most": at_most, "resume": resume})


def check_ranges(settings: Any) -> None:
    """Raises `InputError` where a number of a dataclass lies outside of its field's limits (NaN lies outside of any),
    or is a text that the field's type does not name."""
    for field in dataclasses.fields(settings):
        value, low, high = getattr(settings, field.name), field.metadata.get("at_least"), field.metadata.get("at_most")
        if isinstance(value, str) and (low, high) != (None, None):
            words = [word for kind in get_args(field.type) for word in get_args(kind)]  # of a Literal
            if value not in words:
                raise InputError(f"{field.name} must be {' or '.join(['a number', *words])}, got {one_line(value)!r}")
        if not isinstance(value, int | float):
            continue
        if low is not None and high is not None and not low <= value <= high:
            raise InputError(f"{field.name} must lie in {low} to {high}, got {value}")
        if low is not None and not value >= low:
            raise InputError(f"{field.name} must be at least {low}, got {value}")
        if high is not None and not value <= high:
            raise InputError(f"{field.name} must be at most {high}, got {value}")


def kept(settings: Any) -> dict[str, Any]:
    """The settings that belong to a run, as config.yaml has them: all but those of a session, in plain values."""
    values = {f.name: getattr(settings, f.name) for f in dataclasses.fields(settings) if _resume(f) != "session"}
    return plain({name: kept(value) if dataclasses.is_dataclass(value) else value for name, value in values.items()})


def names_with(settings: Any, resume: Resume, group: str = "") -> set[str]:
    """Names, such as "data.num_workers", of the settings of this kind."""
    names = set()
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if dataclasses.is_dataclass(value):
            names |= names_with(value, resume, f"{group}{field.name}.")
        elif _resume(field) == resume:
            names.add(f"{group}{field.name}")
    return names


def flat(config: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """{"optim": {"lr": 1}} -> {"optim.lr": 1}"""
    values: dict[str, Any] = {}
    for key, value in config.items():
        values |= flat(value, f"{group}{key}.") if isinstance(value, Mapping) else {f"{group}{key}": value}
    return values


def plain(value: Any) -> Any:
    """The same in what YAML and JSON know: lists for tuples."""
    return json.loads(json.dumps(value))


def _resume(field: dataclasses.Field) -> Resume:
    return field.metadata.get("resume", "same")

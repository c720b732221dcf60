"""A line of the doctor's table."""

from dataclasses import dataclass
from typing import Any, Literal

from ddetr.doctor.causes import Cause

State = Literal["ok", "warning", "broken"]


@dataclass(frozen=True)
class Row:
    """What was looked at and what was found; where it is not well, the cause and what to do about it."""

    section: str
    name: str
    state: State
    text: str
    to_do: str = ""
    cause: Cause | None = None  # of a broken row

    def to_dict(self) -> dict[str, Any]:
        found = {"section": self.section, "name": self.name, "state": self.state, "text": self.text}
        found["to_do"] = self.to_do or None
        found["cause"] = self.cause.title if self.cause else None
        return found


def ok(section: str, name: str, text: str) -> Row:
    return Row(section, name, "ok", text)


def warning(section: str, name: str, text: str, to_do: str) -> Row:
    return Row(section, name, "warning", text, to_do)


def broken(section: str, name: str, text: str, to_do: str, cause: Cause) -> Row:
    return Row(section, name, "broken", text, to_do, cause)

"""What of settings and command lines may leave the machine: a path keeps its last part alone."""

import re
import shlex
from collections.abc import Mapping
from typing import Any

from ddetr.printable import one_line
from ddetr.untrusted import MAX_MESSAGE

_PATTERNS = ("group_pattern",)  # settings that are regular expressions over paths: a part of one means something else


def without_paths(value: Any, keep: str | None = None, name: str = "") -> Any:
    """Settings as plain values, without folders of this machine.

    Args:
        value: dicts, lists and plain values.
        keep: a text that stays though it looks like a path: ORG/NAME of the hub, an address.
        name: of the setting.
    """
    if isinstance(value, Mapping):
        return {one_line(key): without_paths(item, keep, str(key)) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [without_paths(item, keep, name) for item in value]
    if not isinstance(value, str):
        return value
    if name in _PATTERNS:
        return "(left out)" if _has_folders(value) else value
    return value if value == keep else last_part(value)


def public_command(command: Any, keep: str | None = None) -> str | None:
    """A command line without folders of this machine; None for what is none."""
    try:
        words = shlex.split(command) if isinstance(command, str) else []
    except ValueError:
        return None
    shown = []
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if not (option.startswith("-") and equals):
            option, value = "", word
        is_pattern = (option or (words[place - 1] if place else "")).endswith(_PATTERNS)
        if is_pattern and _has_folders(value):
            value = "(left out)"
        elif value != keep:
            value = last_part(value)
        shown.append(f"{option}={value}" if option else value)
    return one_line(shlex.join(shown), MAX_MESSAGE) or None


def last_part(text: str) -> str:
    """ "/data/of/me/birds/" -> "birds"."""
    if not _has_folders(text):
        return text
    parts = [part for part in re.split(r"[/\\]", text) if part not in ("", ".", "..", "~")]
    return parts[-1] if parts else "."


def _has_folders(text: str) -> bool:
    return "/" in text or "\\" in text

"""What stands beside every figure: the machine (`ddetr.runtime.environment`), the command; and the files."""

import inspect
import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from ddetr import console
from ddetr.files import write_text
from ddetr.runtime.environment import commit, describe, machine

__all__ = ["command_line", "commit", "describe", "machine", "save", "save_json"]


def command_line(name: str, function: Callable[..., Any], settings: Mapping[str, Any]) -> str:
    """The shortest command with these settings; where the results went is left out."""
    defaults = {key: value.default for key, value in inspect.signature(function).parameters.items()}
    chosen = {key: value for key, value in settings.items() if value != defaults[key] and key != "output"}
    data = chosen.pop("data", None)
    if is_dataclass(data):  # --data PATH, and its other settings where they were changed
        changed = {f"data.{f.name}": getattr(data, f.name) for f in fields(data) if getattr(data, f.name) != f.default}
        chosen = {"data": changed.pop("data.path"), **changed, **chosen}
    words = [word for key, value in chosen.items() for word in (f"--{key}", spelled(value))]
    return shlex.join(["ddetr", *name.split(), *words])


def save(folder: Path, name: str, content: Mapping[str, Any], markdown: str) -> None:
    """What was measured, for programs and for people, and where it lies."""
    save_json(folder / f"{name}.json", content)
    write_text(folder / f"{name}.md", markdown)
    console.show(f"saved in {folder}: {name}.json, {name}.md")


def save_json(path: Path, content: Mapping[str, Any]) -> None:
    """Whole or not at all."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def spelled(value: Any) -> str:
    """A value as one types it."""
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) else str(value)

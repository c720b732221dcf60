"""The command line's parser: jsonargparse with messages for people.

`--batch-size` is `--batch_size`, `--data PATH` is `--data.path PATH`, `--data.strict` is `--strict` where a command is
on data alone, `--resume` alone is `--resume last`, `--optimize` alone is `--optimize float32`, a switch alone is
`true`, and a list may be written `a,b`.
"""

import difflib
import json
import os
import re
from argparse import SUPPRESS
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, get_args, get_origin

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from ddetr.errors import InputError
from ddetr.untrusted import MAX_YAML_BYTES, parse_yaml, read_text
from ddetr.wording import did_you_mean

SHORT = {"--data": "--data.path"}
RENAMED = {"--data.num_workers": "--num_workers"}  # of `ddetr eval`, by its old name
ALONE = {"--resume": "last", "--optimize": "float32"}
SWITCH_VALUES = ("true", "false", "yes", "no", "1", "0")
NOT_AN_OPTION = {"num_classes": "the number of classes comes from the data set"}
_KINDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false", NoneType: "null"}


class Parser(ArgumentParser):
    """Every mistake is an `InputError` of one sentence that names the option or the file, and the nearest known
    name."""

    def __init__(self, command: str, description: str):
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        # Without allow_abbrev=False a mistyped option could be silently taken for another.
        super().__init__(prog=f"ddetr {command}", description=description, allow_abbrev=False)
        self._from_file: dict[str, tuple[str, Any]] = {}  # option -> the file that sets it and the value there
        self._arguments: list[str] = []
        self._groups: set[str] = set()  # options that jsonargparse takes a file for, such as --optim
        self.after_help = ""  # text for the end of --help, as it stands

    def read(self, arguments: Sequence[str]) -> Namespace:
        """Arguments -> settings, dataclasses made."""
        arguments = self._spelled_out(arguments)
        for option, value in zip(arguments, [*arguments[1:], ""]):
            name, _, given = option.partition("=")
            if name == "--config":
                self._check_file(given or value)
            elif name in self._groups and os.path.exists(given or value):
                self._parse_file(name, given or value)
        self._arguments = arguments
        return self.instantiate(self.parse_args(arguments))

    @property
    def said(self) -> set[str]:
        """The options that were given to `read`, there or in a file: "model.num_queries"."""
        return {*self.parse_args(self._arguments, defaults=False).keys()}

    def add_group_of_options(self, *names: str) -> None:
        """Hide jsonargparse's `--GROUP FILE` from the help, where `--config` does the same; `--data` is a path here."""
        for name in names:
            action = self._option_string_actions[f"--{name}"]
            self._groups.add(f"--{name}")
            action.help = SUPPRESS
            if f"--{name}" in SHORT:
                action.metavar, action.help = "PATH", f"the same as {SHORT[f'--{name}']} PATH"

    def format_help(self) -> str:
        return super().format_help() + (f"\n{self.after_help}\n" if self.after_help else "")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(self._explained(message)) from ex

    def _spelled_out(self, arguments: Sequence[str]) -> list[str]:
        switches = {f"--{action.dest}" for action in self._actions if _is_switch(_type_of(action))}
        choices = {f"--{action.dest}": _described(_type_of(action))[1] for action in self._actions}
        lists = {f"--{action.dest}" for action in self._actions if _is_list(_type_of(action))}
        out: list[str] = []
        for argument, following in zip(arguments, [*arguments[1:], "--"]):
            if not re.match(r"--[a-zA-Z]", argument):
                out.append(_as_list(argument) if out and out[-1] in lists else argument)
                continue
            name, equals, value = argument.partition("=")
            name = "--" + name[2:].replace("-", "_")
            if name not in self._option_string_actions:
                name = RENAMED.get(name, name)
            if name not in self._option_string_actions and name.startswith("--data."):
                alone = f"--{name.removeprefix('--data.')}"  # as it is called where a command is on data alone
                name = alone if alone in self._option_string_actions else name
            if SHORT.get(name) in self._option_string_actions:
                name = SHORT.get(name, name)
            value = _as_list(value) if name in lists else value
            out.append(name + equals + value)
            values = {*SWITCH_VALUES, *(choices.get(name) or ())}
            if name in switches and not equals and following.lower() not in values:
                out.append("true")
            no_value = following.startswith("--") or (choices.get(name) and following not in choices[name])
            if name in ALONE and not equals and no_value:
                out.append(ALONE[name])
        return out

    def _explained(self, message: str) -> str:
        """jsonargparse's message in our words; as it stands, on one line, where it is of an unknown kind."""
        if found := re.match(r"the following arguments are required: (.+)", message):
            needed = " and ".join(map(self._shown, found[1].split(", ")))
            return f"{self.prog} needs {needed}; {self.prog} --help lists all options"
        if found := re.match(r"[Uu]nrecognized arguments: (.+)", message):
            words = found[1].split()
            option = next((word.partition("=")[0] for word in words if word.startswith("-")), None)
            if option is None:
                return f"unexpected argument {words[0]!r}; {self.prog} --help lists all options"
            return f"unknown option {option}{self._hint(option.lstrip('-'), '--')}"
        if found := re.match(r"argument ([^\s/:]+)\S*: expected (?:at least )?one argument", message):
            return f"{self._shown(found[1].lstrip('-')).split()[0]}: expected a value, got none"
        found = re.match(r'Parser key "([^"]+)":', message)
        values = re.findall(r"(?:Got|Given) value: (.*)", message)
        if found and values:
            return self._wrong_type(found[1], values[-1].strip())
        return " ".join(message.split())

    def _wrong_type(self, key: str, value: str) -> str:
        action = next((action for action in self._actions if action.dest == key), None)
        file, in_file = self._from_file.get(key, ("", None))
        where = f"{file}: {key}" if file and str(in_file) == value else self._shown(key).split()[0]
        expected, choices = _described(_type_of(action))
        if _is_list(_type_of(action)):  # ['a', 'b'], as jsonargparse shows it
            value = ",".join(re.findall(r"'([^']*)'", value)) or value
        return f"{where}: expected {expected}, got {value!r}{did_you_mean(value, choices)}"

    def _shown(self, dest: str) -> str:
        """An option as a person would type it."""
        action = next((action for action in self._actions if action.dest == dest), None)
        if action is not None and not action.option_strings:
            return dest.upper()
        option = next((short for short, long in SHORT.items() if long == f"--{dest}"), f"--{dest}")
        return f"{option} {dest.split('.')[-1].upper()}"

    def _check_file(self, name: str) -> None:
        """The mistakes in a YAML file that can be named better here than after everything is merged."""
        content = self._parse_file("--config", name)
        if not isinstance(content, Mapping):
            got = "nothing" if content is None else f"a {type(content).__name__}"
            raise InputError(f"{name}: expected options with values, such as `epochs: 50`, got {got}")
        self._check_keys(name, content, "")

    def _parse_file(self, option: str, name: str) -> Any:
        try:
            text = read_text(name, MAX_YAML_BYTES)
        except FileNotFoundError:
            hint = did_you_mean(Path(name).name, (path.name for path in Path(name).parent.glob("*")))
            raise InputError(f"{option} {name}: there is no such file{hint}") from None
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is no text"
            raise InputError(f"{option} {name}: expected a YAML file, but it cannot be read ({reason})") from None
        return parse_yaml(text, name)

    def _check_keys(self, file: str, content: Mapping[Any, Any], group: str) -> None:
        options = self._options()
        for key, value in content.items():
            full = f"{group}{key}"
            if full in options:
                self._from_file[full] = (file, value)
                continue
            members = [option.removeprefix(f"{full}.") for option in options if option.startswith(f"{full}.")]
            if not members:
                raise InputError(f"{file}: unknown key {full!r}{self._hint(full, '')}")
            if not isinstance(value, Mapping):
                got = "nothing" if value is None else repr(value)
                raise InputError(f"{file}: {full}: expected a group of options, such as `{members[0]}: ...`, got {got}")
            self._check_keys(file, value, f"{full}.")

    def _options(self) -> list[str]:
        """All names but those that name a group, a file or the help."""
        dests = [action.dest for action in self._actions if _type_of(action) is not None]
        return [dest for dest in dests if not any(other.startswith(f"{dest}.") for other in dests)]

    def _hint(self, name: str, prefix: str) -> str:
        """' (did you mean --epochs?)': the option whose last part is most like that of `name`; '' where none is."""
        group, _, last = name.rpartition(".")
        if last in NOT_AN_OPTION:
            return f" ({NOT_AN_OPTION[last]})"

        def likeness(option: str) -> float:
            other_group, _, other = option.rpartition(".")
            return difflib.SequenceMatcher(None, last, other).ratio() + 0.1 * (group == other_group)

        best = max([*self._options(), *(short[2:] for short in SHORT)], key=likeness, default="")
        return f" (did you mean {prefix}{best}?)" if best and likeness(best) >= 0.65 else ""


def _type_of(action: Any) -> Any:
    """An option's type hint; None for what has none, such as --help."""
    return getattr(action, "_typehint", None) or getattr(action, "type", None)


def _described(hint: Any) -> tuple[str, list[str]]:
    """What a type hint takes, in words, and the names to choose from where it is a choice."""
    if get_origin(hint) is Literal:
        choices = [str(choice) for choice in get_args(hint)]
        return f"one of {', '.join(choices)}", choices
    if get_origin(hint) is list:
        words, choices = _described(*get_args(hint))
        return words.replace("one of", "any of"), choices
    if parts := _flat(get_args(hint)):
        described = [_described(part) for part in parts]
        return " or ".join(words for words, _ in described), [name for _, choices in described for name in choices]
    return _KINDS.get(hint, "another type"), []


def _is_switch(hint: Any) -> bool:
    """Whether an option means true where it has no value."""
    return hint is bool or (
        bool in get_args(hint) and all(p is bool or get_origin(p) is Literal for p in get_args(hint))
    )


def _is_list(hint: Any) -> bool:
    return get_origin(hint) is list or any(get_origin(part) is list for part in get_args(hint))


def _as_list(value: str) -> str:
    """a,b -> ["a", "b"]; what is written as a list already, or is no value, stays."""
    if not value or value.startswith("[") or value in ("null", "None"):
        return value
    return json.dumps([part.strip() for part in value.split(",") if part.strip()])


def _flat(parts: Iterable[Any]) -> list[Any]:
    """null last: it is the least likely wish."""
    return sorted(parts, key=lambda part: part is NoneType)

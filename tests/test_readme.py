"""The README's commands are real ones."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ddetr.cli import main as cli
from ddetr.report.run_files import FILES

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"


def shell_lines() -> Iterator[str]:
    """The lines of all ```sh blocks, continued ones joined, without prompts."""
    for block in re.findall(r"^```sh\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE):
        for line in block.replace("\\\n", " ").splitlines():
            yield line.strip().removeprefix("$ ")


def ddetr_commands() -> list[list[str]]:
    """Arguments of each `ddetr ...`, also behind a launcher, `-m ddetr` or a path to the script."""
    commands = []
    for line in shell_lines():
        for part in re.split(r"&&|\|\||;|\|", line):
            words = shlex.split(part, comments=True)
            place = next((i for i, word in enumerate(words) if re.fullmatch(r"(.*/)?ddetr", word)), None)
            if (
                place is not None
                and "docker" not in words[:place]
                and "git" not in words[:place]
                and "cd" not in words[:place]
            ):
                commands.append(words[place + 1 :])
    return commands


def make_targets() -> set[str]:
    """What `make ...` is told to do, in blocks and in the text."""
    text = (
        "\n".join(shell_lines()) + "\n" + "\n".join(re.findall(r"`(make [^`\n]*)`", README.read_text(encoding="utf-8")))
    )
    targets = set()
    for line in re.findall(r"^make ([^#\n]*)", text, re.MULTILINE):
        targets |= {word for word in shlex.split(line) if re.fullmatch(r"[a-z][a-z-]*", word)}
    return targets


def test_there_are_commands_to_check() -> None:
    assert {"train", "eval", "predict", "data"} <= {command[0] for command in ddetr_commands() if command}
    assert {"demo", "test"} <= make_targets()


@pytest.mark.parametrize("command", ddetr_commands(), ids=" ".join)
def test_the_command_parses(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    if "--help" in command:
        with pytest.raises(SystemExit) as done:
            cli.parse(command)
        assert done.value.code == 0
    else:
        assert callable(cli.parse(command))


def test_the_make_targets_exist() -> None:
    known = set(re.findall(r"^([a-z][a-z-]*):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert make_targets() <= known


def test_a_run_folder_holds_what_is_listed(tiny_run: Any) -> None:
    """README, report and a run agree on the names."""
    table = README.read_text(encoding="utf-8").partition("## What a run folder holds")[2]
    names = [name for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE) for name in re.findall(r"`(.*?)`", row)]
    assert sorted(name.rstrip("/") for name in names) == sorted(FILES)
    assert {path.name for path in tiny_run.path.iterdir()} <= set(FILES)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("block", python_blocks(), ids=range(len(python_blocks())))
def test_the_python_runs(block: str, tiny_run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a folder with the checkpoint and the image that the examples speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "best.pth").symlink_to(tiny_run.path / "best.pth")
    (tmp_path / "image.jpg").symlink_to(tiny_run.image_example)
    exec(compile(block, str(README), "exec"), {"__name__": "readme"})

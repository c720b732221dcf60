# ruff: noqa: E501
"""What goes where: results to standard output, everything else to standard error."""

import io
import os
import re
import subprocess
import sys
import time

import pytest
from rich.console import Console
from rich.table import Table

from ddetr import console


def test_results_are_plain_text_on_standard_output(capsys: pytest.CaptureFixture) -> None:
    path = "runs/" + "long/" * 40 + "[red]best.pth"
    console.show(path)
    console.show(Table("a [b]"))
    out, err = capsys.readouterr()
    assert out.splitlines()[0] == path  # neither wrapped nor read as markup: it is to be copied
    assert err == ""


def test_progress_is_silent_where_nobody_watches(capsys: pytest.CaptureFixture) -> None:
    with console.progress("work") as update:
        update(1, 2)
        update(2, 2)
    assert capsys.readouterr() == ("", "")


def test_reading_says_so_after_a_while_where_nobody_watches(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.reading("reading data", "image headers") as update:
        update(256, 1000)
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    with console.reading("reading data", "image headers") as update:
        while "reading data" not in (begun := capsys.readouterr().err):
            time.sleep(0.01)
        for done in (256, 512, 118287):
            update(done, 118287)
    assert begun.splitlines() == ["reading data"]
    assert capsys.readouterr().err.splitlines() == ["reading data: 118,287 image headers"]


def test_reading_says_how_far_it_is_from_time_to_time(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(console, "AGAIN_SECONDS", -1.0)
    with console.reading("reading data", "image headers") as update:
        while "reading data" not in capsys.readouterr().err:
            time.sleep(0.01)
        for done in (256, 512, 1000):
            update(done, 1000, unit="label files")
        for done in (256, 512, 1000):
            update(done, 1000)
    assert capsys.readouterr().err.splitlines() == [
        "reading data: 1,000 label files",
        "reading data: 512 of 1,000 label files",
        "reading data: 1,000 image headers",
        "reading data: 512 of 1,000 image headers",
    ]


def test_a_bar_says_what_is_read_where_somebody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    monkeypatch.setattr(console, "err", Console(file=screen, force_terminal=True, width=100))
    with console.reading("reading set[/b]", "image headers") as update:  # brackets are no markup
        update(256, 1000, unit="label files")
    assert "reading set[/b], label files" in screen.getvalue()
    assert "256/1000" in screen.getvalue()


def test_messages_go_to_standard_error_one_a_line() -> None:
    code = """
import logging
from ddetr import console
console.set_up_logging()
logging.getLogger("ddetr.engine").info("a message of %s", "ninety characters, [which] is longer than a narrow terminal would be, on one line")
logging.getLogger("ddetr.engine").debug("a detail")
logging.getLogger("other").info("chatter")
logging.getLogger("other").warning("a warning")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == ""
    lines = [line.strip() for line in done.stderr.splitlines()]
    assert len(lines) == 2
    assert lines[0].endswith("[which] is longer than a narrow terminal would be, on one line")
    assert lines[1].endswith("a warning")


def test_a_notebook_gets_tables_and_no_warnings() -> None:
    """Rich's spinner wants widgets there; tables and messages are shown without."""
    code = """
import logging, warnings
from IPython.testing.globalipapp import start_ipython
start_ipython().__class__.__name__ = "ZMQInteractiveShell"  # what Rich looks at
warnings.simplefilter("error")
from ddetr import console
console.set_up_logging()
with console.waiting("working"):
    logging.getLogger("ddetr.engine").info("a message")
console.show("a result")
assert console.err.is_jupyter
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "a message" in done.stdout
    assert "a result" in done.stdout


def test_names_of_others_do_nothing_to_a_terminal() -> None:
    """Whatever leaves for the screen: results, tables, errors, messages, what is waited for; rich's own colours stay."""
    code = r"""
import logging
from rich.console import Console
from rich.table import Table
from rich.text import Text
from ddetr import console
evil = "a\x1b[2J\x1b]0;t\x07\u202eb\nc"
console.set_up_logging()
table = Table(evil)
table.add_row(Text(evil, style="red"))
console.show(table)
console.show(evil)
console.show_error(f"error: {evil}" + "x" * 1_000_000)
logging.getLogger("ddetr.engine").info("read %s", evil)
logging.getLogger("other").warning("read %s", evil)
with console.waiting("[/] " + evil):
    pass
"""
    for color, is_colored in (("0", False), ("1", True)):
        env = {name: value for name, value in os.environ.items() if name != "FORCE_COLOR"}
        env |= {"FORCE_COLOR": "1"} if is_colored else {}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, env=env | {"TERM": "xterm"}, check=True
        )
        out, err = done.stdout.decode(), done.stderr.decode()
        own = re.compile(r"\x1b\[(\?25[lh]|[\d;]*[mKA])")  # colours, the cursor of what is waited for
        assert bool(own.search(out)) == is_colored, color
        assert not set(own.sub("", out + err).replace("\r", "")) & set("\x1b\x07\u202e")
        assert r"a\x1b[2J\x1b]0;t\x07\u202eb" in own.sub("", out)
        message = next(line for line in own.sub("", err).splitlines() if "read" in line)
        assert r"\u202eb\nc" in message  # a line a message: none can be made up
        assert len(err) < 10_000


def test_a_reader_who_goes_away_ends_nothing() -> None:
    """`ddetr train | tee log`: Ctrl+C ends tee first, and the state of the run is not saved yet."""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as file:
        out = console._console(file=file)
        out.print("into the void")
        out.print("again")
        assert out.quiet

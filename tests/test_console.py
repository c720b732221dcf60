# ruff: noqa: E501
"""What goes where: results to standard output, everything else to standard error."""

import subprocess
import sys

import pytest
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

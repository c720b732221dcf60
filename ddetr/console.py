"""The terminal: results go to standard output, progress and messages to standard error."""

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_out = Console()
err = Console(stderr=True)
if not err.is_terminal:
    err.width = 120  # a log file has no edge to wrap at


def show(renderable: Any) -> None:
    """A table or a text on standard output."""
    _out.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))


def is_terminal() -> bool:
    """Whether standard output goes to somebody who watches, not to a file or a program."""
    return _out.is_terminal


def set_up_logging() -> None:
    """ddetr's messages on standard error, one per line."""
    handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("ddetr").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries per file, before our own error says why


def waiting(what: str) -> AbstractContextManager[Any]:
    """A context that shows, to whoever watches a terminal, what is being done while it takes its time."""
    return err.status(what) if err.is_terminal else nullcontext()  # a notebook would want widgets for it, and warn


@contextmanager
def progress(description: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar where somebody watches; yields `update(done, total)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)

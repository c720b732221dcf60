"""The terminal: results go to standard output, progress and messages to standard error.

Names of files and classes may come from anybody and say anything to a terminal: whatever leaves through here is made
harmless, at the one place where it leaves.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from rich.console import Console, ConsoleOptions, ConsoleRenderable, RenderHook, RenderResult
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.segment import Segment
from rich.text import Text

from ddetr.printable import one_line, printable, shortened
from ddetr.untrusted import MAX_MESSAGE

QUIET_SECONDS = 1.0  # that something may take without a word where nobody watches
AGAIN_SECONDS = 15.0  # after which it is said how far it is


class _Harmless:
    """What something looks like, without what it would do to a terminal; rich's own colours stay."""

    def __init__(self, renderable: Any) -> None:
        self.renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        for text, style, control in console.render(self.renderable, options):
            yield Segment(text if control else printable(text), style, control)


class _Guard(RenderHook):
    def process_renderables(self, renderables: list[ConsoleRenderable]) -> list[ConsoleRenderable]:
        return [_Harmless(renderable) for renderable in renderables]


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Who listened has gone, as `tee` does at Ctrl+C: what is done is done in silence. rich would end the
        program."""
        self.quiet = True
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self.file.fileno())
        os.close(nowhere)


def _console(**options: Any) -> Console:
    console = _Console(**options)
    console.push_render_hook(_Guard())
    return console


_out = _console()
err = _console(stderr=True)
if not err.is_terminal:
    err.width = 120  # a log file has no edge to wrap at


def show(renderable: Any) -> None:
    """A table or a text on standard output."""
    if isinstance(renderable, str):
        renderable = printable(renderable)
    _out.print(renderable, markup=False, highlight=False, soft_wrap=isinstance(renderable, str))


def show_error(message: str) -> None:
    """Why a command ends, on one line of standard error."""
    err.print(one_line(message, MAX_MESSAGE), markup=False, highlight=False, soft_wrap=True)


def is_terminal() -> bool:
    """Whether standard output goes to somebody who watches, not to a file or a program."""
    return _out.is_terminal


class _Formatter(logging.Formatter):
    """ddetr's messages have a line each, whatever the names in them hold."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        message = super().formatMessage(record)
        if record.name.partition(".")[0] == "ddetr":
            return one_line(message, MAX_MESSAGE)
        return printable(shortened(message, MAX_MESSAGE))


def set_up_logging() -> None:
    """ddetr's messages on standard error, one per line."""
    handler = RichHandler(console=err, show_path=False, show_level=False, log_time_format="%H:%M:%S", markup=False)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.getLogger("ddetr").setLevel(logging.INFO)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # five retries per file, before our own error says why


def waiting(what: str) -> AbstractContextManager[Any]:
    """A context that shows, to whoever watches a terminal, what is being done while it takes its time."""
    # a notebook would want widgets for it, and warn
    return err.status(Text(one_line(what))) if err.is_terminal else nullcontext()


@contextmanager
def reading(what: str, unit: str) -> Iterator[Callable[..., None]]:
    """Shows that something is being read: a bar where somebody watches, elsewhere a line once it has taken a second,
    one more with the number of `unit` once that is known, and then how far it is from time to time. Yields
    `update(done, total)`, which takes another `unit` too."""
    if err.is_terminal:
        with progress(what) as update:
            yield lambda done, total, unit=unit: update(done, total, f"{what}, {unit}")
        return
    began, said = time.monotonic(), dict[str, float]()  # when what was said

    def say(text: str, key: str) -> None:
        said[key] = time.monotonic()
        err.print(one_line(text), markup=False, highlight=False, soft_wrap=True)

    def update(done: int, total: int, unit: str = unit) -> None:
        now = time.monotonic()
        if done >= total or now - began <= QUIET_SECONDS:
            return
        if unit not in said:
            say(f"{what}: {total:,} {unit}", unit)
        elif now - max(said.values()) > AGAIN_SECONDS:
            say(f"{what}: {done:,} of {total:,} {unit}", unit)

    timer = threading.Timer(QUIET_SECONDS, say, [what, ""])
    timer.daemon = True
    timer.start()
    try:
        yield update
    finally:
        timer.cancel()


@contextmanager
def progress(description: str) -> Iterator[Callable[..., None]]:
    """A progress bar where somebody watches; yields `update(done, total)`, which takes another description too."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(description, total=None)
        yield lambda done, total, now=description: bar.update(task, completed=done, total=total, description=now)

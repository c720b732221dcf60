"""Where the time of a training step goes: a stop watch whose regions the engine enters (`ddetr.engine.step.REGIONS`).

On a GPU the marks are CUDA events, which cost no waiting: what a region gets is the time of the device between them,
gaps included in which the device waits for Python.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ddetr.engine.step import REGIONS


class StopWatch:
    """Time by region; a region inside of another one is not counted in that one."""

    def __init__(self, device: torch.device):
        self.device = device
        self._open = ["the rest"]
        self._marks: list[tuple[str, Any]] = [("the rest", self._now())]  # a region and when a stretch of it ended
        self._steps: list[list[tuple[str, Any]]] = []

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def end_step(self) -> None:
        """What comes now belongs to the next step."""
        self._mark()
        self._steps.append(self._marks)
        self._marks = [self._marks[-1]]

    def steps(self) -> list[dict[str, float]]:
        """Milliseconds of each region in each step that has ended."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        found = []
        for marks in self._steps:
            row = dict.fromkeys(REGIONS, 0.0)
            for (_, start), (name, end) in zip(marks, marks[1:]):
                row[name] += start.elapsed_time(end) if self.device.type == "cuda" else (end - start) / 1e6
            found.append(row)
        return found

    def _mark(self) -> None:
        self._marks.append((self._open[-1], self._now()))

    def _now(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter_ns()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

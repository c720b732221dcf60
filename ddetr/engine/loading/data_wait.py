"""How long training waits for its next batch."""

import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger(__name__)

MUCH, LONG_ENOUGH = 0.3, 30.0  # share of the time, and seconds over which it is measured


class DataWait:
    """Adds up the time in the region "data wait", which the training loader enters while it waits; no other one counts.

    On a GPU this is the process's time, not the device's: a device that still has work to do loses less by it.
    """

    def __init__(self) -> None:
        self._seconds = 0.0
        self._waited = self._measured = 0.0  # seconds, until the next look at whether a warning is due
        self._has_warned = False

    @contextmanager
    def region(self, name: str) -> Iterator[None]:
        since = time.perf_counter()
        yield
        if name == "data wait":
            self._seconds += time.perf_counter() - since

    def restart(self) -> None:
        self._seconds = 0.0

    def share(self, seconds: float) -> float:
        """What part of the `seconds` since `restart` was spent waiting, 0 to 1."""
        return min(1.0, self._seconds / seconds)

    def warn(self, share: float, seconds: float, num_workers: int | None) -> None:
        """Counts a stretch of training; says once, with the cure, when much of half a minute was waited for."""
        self._waited += share * seconds
        self._measured += seconds
        if self._has_warned or self._measured < LONG_ENOUGH:
            return
        if self._waited > MUCH * self._measured:
            self._has_warned = True
            logger.warning(
                "%.0f %% of the time is spent waiting for images: raise --data.num_workers (now %s, this machine has "
                "%s cores), or let them come from a faster disk or in smaller files",
                100 * self._waited / self._measured, num_workers, os.cpu_count(),
            )  # fmt: skip
        self._waited = self._measured = 0.0

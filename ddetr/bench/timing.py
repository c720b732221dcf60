"""Times that can be compared: sides take turns, each on the clock that fits the device, and medians are taken."""

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

Call = Callable[[], object]

_COPY_BYTES = 2**28
_LEAST_MS = 5
_FLUSH_BYTES = 3 * 2**30  # about a millisecond of a large GPU


class Clock(NamedTuple):
    """What is counted, in words; a function that times some calls in a row, in milliseconds; how long it should."""

    counts: str
    milliseconds: Callable[[Call, int], float]
    least_ms: float


def cpu_clock(threads: int) -> Clock:
    """For one thread its own CPU time, which others on the machine disturb little; for more, wall time."""
    counter = time.thread_time_ns if threads == 1 else time.perf_counter_ns

    def milliseconds(call: Call, times: int) -> float:
        start = counter()
        for _ in range(times):
            call()
        return (counter() - start) / 1e6

    counted = "CPU time of the thread" if threads == 1 else f"wall time of {threads} threads"
    return Clock(f"{counted}, short calls repeated for {_LEAST_MS} ms", milliseconds, _LEAST_MS)


def cuda_clock(device: torch.device) -> Clock:
    """Time between two CUDA events, with nothing of the inputs left in the L2 cache before a single call.

    The flush keeps the device busy for so long that the launches of a short call are queued before it starts: the time
    is the device's, not the time that Python takes to launch.
    """
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(4 * l2, 2**26), dtype=torch.uint8, device=device)
    passes = math.ceil(_FLUSH_BYTES / buffer.numel())

    def milliseconds(call: Call, times: int) -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        for _ in range(passes):
            buffer.zero_()
        start.record()
        for _ in range(times):
            call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end)

    return Clock("time between CUDA events, L2 cache flushed before each call", milliseconds, 0)


def interleaved(calls: Mapping[str, Call], clock: Clock, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each call in each round.

    Before its turn each runs unmeasured, once or for as long as the clock asks: the caches and the allocator's pages
    are its own again. A short call needs several times for that, and is then measured as often in a row.
    """
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            repeats, warm_ms = 1, clock.milliseconds(call, 1)
            while warm_ms < clock.least_ms:
                warm_ms += clock.milliseconds(call, 1)
                repeats += 1
            times[name].append(clock.milliseconds(call, repeats) / repeats)
    return times


def in_inference_mode(function: Call) -> Call:
    """The same call without what autograd would record."""

    def call() -> None:
        with torch.inference_mode():
            function()

    return call


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """GB/s that a large `copy_` reads and writes together: what the memory gives to the simplest of programs."""
    source = torch.ones(_COPY_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, clock, rounds=5)["copy"]
    return gigabytes_per_second(2 * _COPY_BYTES, statistics.median(times))


def gigabytes_per_second(num_bytes: int, milliseconds: float) -> float:
    """10^9 bytes per second."""
    return num_bytes / milliseconds / 1e6


@contextmanager
def fixed_threads(count: int) -> Iterator[None]:
    """In it, PyTorch works with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)

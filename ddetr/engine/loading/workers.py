"""The processes that load images: how many, how they start, and what is said when one dies."""

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from ddetr.errors import InputError
from ddetr.runtime.allocator import keep_freed_memory
from ddetr.runtime.limits import available_cores
from ddetr.runtime.signals import STOP_SIGNALS

MOST_WORKERS = 4  # each loads some 200 images per second at 800 pixels: no detector here trains as fast as four do
PREFETCH = 2  # batches that each has ready
GRACE_SECONDS = 30


def default_num_workers(*, on_gpu: bool, processes: int = 1, cores: int | None = None) -> int:
    """Loader processes for each of `processes` training processes on this machine.

    A GPU leaves the processor to them, but for one core that drives it. Training on the processor needs the cores
    itself: there they are worth it from four cores on.
    """
    cores = (available_cores() if cores is None else cores) // processes
    if on_gpu:
        return min(MOST_WORKERS, max(1, cores - 1))
    return min(MOST_WORKERS, cores) if cores >= 4 else 0


def workers_that_fit(num_workers: int, batch_bytes: int, free_bytes: int | None) -> int:
    """At most `num_workers`, as many as have room for their batches in shared memory: each keeps `PREFETCH` of them
    ready, and one more is in use. A loader that finds no room is killed by the system ("Bus error").

    Args:
        free_bytes: of shared memory; None where there is no such limit.
    """
    if free_bytes is None:
        return num_workers
    return max(0, min(num_workers, (free_bytes // batch_bytes - 1) // PREFETCH))


def start_worker(worker_id: int) -> None:
    """Called in each loader process first. (PyTorch sets its threads to one itself.)

    Images of some megabytes come and go: the process keeps what they free, instead of asking for fresh pages.
    Ctrl+C, a closed terminal's SIGHUP, a scheduler's SIGTERM and its warning before it go to all processes of a job,
    but what becomes of it is the training process's to say: a loader that died at once would stop it before it has
    saved. So SIGTERM ends a loader at once only if the training process sent it, and otherwise after a grace; the
    others do not end it.
    """
    keep_freed_memory()
    for signum in STOP_SIGNALS:
        if signum != signal.SIGTERM:
            signal.signal(signum, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_wait_for_sigterm, daemon=True).start()


def _wait_for_sigterm() -> None:
    while True:
        sender = signal.sigwaitinfo({signal.SIGTERM}).si_pid
        if sender == os.getppid():
            os._exit(0)
        timer = threading.Timer(GRACE_SECONDS, os._exit, (0,))
        timer.daemon = True
        timer.start()


@contextmanager
def explained() -> Iterator[None]:
    """In it, what goes wrong in a loader process is said as if it had gone wrong here, and a death with its cures."""
    try:
        yield
    except InputError as error:
        message = str(error)
        if "in DataLoader worker process" not in message:
            raise
        raise InputError(message.rpartition(f"{InputError.__name__}: ")[2].strip()) from None
    except RuntimeError as error:
        if not re.search(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", str(error), re.DOTALL):
            raise
        how = re.search(r"killed by signal: ([\w ]+)", str(error))
        word = how[1].strip() if how else "without a word"
        raise InputError(
            f"a process that loads images died ({word}): usually the memory, or the shared memory (/dev/shm; Docker "
            "gives 64 MB unless told --shm-size 8g or --ipc host), is full. Use fewer --data.num_workers (0 loads in "
            "the training process), a smaller --batch_size, or give the machine more"
        ) from error

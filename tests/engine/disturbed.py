"""Runs `ddetr` commands in processes that are disturbed on the way; for test_resume.py.

python disturbed.py JSON: [[ARGUMENTS, DISTURBANCE], ...], one after the other. A disturbance is null, ["seconds", t]:
SIGKILL after that time, or [NAME, ...]: one of the functions below, called in the process before it starts. Prints the
list of exit codes, negative for a signal. Everything is imported once; the processes are forks. Where a launcher runs
several of this program, each takes the part of a process: one command, no fork, and its exit code is the program's.
"""

import io
import json
import os
import resource
import signal
import sys
import time
import warnings

import torch

import ddetr.engine.train  # noqa: F401  the slow part
from ddetr import files as atomic
from ddetr.cli import main as cli
from ddetr.engine.callbacks import Watch


def at_step(step: int, signum: int, rank: int = 0, to_all: bool = False) -> None:
    """The signal comes to process `rank` in the midst of the step that is to be number `step`; `to_all`: also to the
    processes that load its images, as a terminal and a scheduler send it."""
    original = Watch.on_train_batch_start
    if to_all:
        os.setpgid(0, 0)

    def send(self, trainer, module, batch, batch_idx):
        original(self, trainer, module, batch, batch_idx)
        if trainer.global_step + 1 == step and trainer.global_rank == rank:
            os.killpg(0, signum) if to_all else os.kill(os.getpid(), signum)

    Watch.on_train_batch_start = send


def endless_step(step: int) -> None:
    """Ctrl+C in a step that does not end."""
    original = Watch.on_train_batch_start

    def hang(self, trainer, module, batch, batch_idx):
        original(self, trainer, module, batch, batch_idx)
        if trainer.global_step + 1 == step:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1000)

    Watch.on_train_batch_start = hang


def interrupted_twice(step: int) -> None:
    at_step(step, signal.SIGINT)
    at_step(step, signal.SIGINT)


def in_validation(number: int, signum: int) -> None:
    """The signal comes in the midst of the validation of that number, counted from 0."""
    original = Watch.on_validation_batch_end

    def send(self, trainer, *arguments):
        original(self, trainer, *arguments)
        if trainer.current_epoch == number:
            os.kill(os.getpid(), signum)

    Watch.on_validation_batch_end = send


def writing_state(number: int) -> None:
    """Killed when half of the state of that number, counted from 1, is on disk."""
    original, calls = torch.save, []

    def half(content, file, *arguments, **options):
        if os.path.basename(file.name).startswith(".last.ckpt"):
            calls.append(1)
            if len(calls) == number:
                whole = io.BytesIO()
                original(content, whole)
                file.write(whole.getvalue()[: whole.tell() // 2])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)
        return original(content, file, *arguments, **options)

    torch.save = half


def between_renamings(number: int) -> None:
    """Killed when the state before has got its other name, and the new one of that number not yet its own."""
    original, calls = os.replace, []

    def replace(source, target):
        if str(target).endswith("last.ckpt"):
            calls.append(1)
            if len(calls) == number:
                os.kill(os.getpid(), signal.SIGKILL)
        return original(source, target)

    atomic.os.replace = replace


def full_disk(most: int) -> None:
    """No file may grow beyond `most` bytes: the error is another than that of a full disk, its way the same."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def run(arguments: list[str], disturbance: list | None) -> int:
    pid = os.fork()
    if pid == 0:
        code = 1
        warnings.simplefilter("error")
        if "--compile" in arguments:  # PyTorch's compiler looks at every name that is loaded, deprecated ones too
            warnings.simplefilter("ignore", DeprecationWarning)
        try:
            if disturbance and disturbance[0] != "seconds":
                globals()[disturbance[0]](*disturbance[1:])
            code = cli.main(arguments)
        except SystemExit as stop:
            code = stop.code
        finally:
            sys.stderr.flush()
            os._exit(code)
    if disturbance and disturbance[0] == "seconds":
        time.sleep(disturbance[1])
        os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


if __name__ == "__main__" and {"RANK", "LOCAL_RANK", "DDETR_TEST_LAUNCHES"} & set(os.environ):
    [[arguments, disturbance]] = json.loads(sys.argv[1])
    if disturbance:
        globals()[disturbance[0]](*disturbance[1:])
    sys.exit(cli.main(arguments))
elif __name__ == "__main__":
    print(json.dumps([run(*one) for one in json.loads(sys.argv[1])]))

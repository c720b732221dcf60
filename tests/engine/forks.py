"""Starts programs as torchrun does, in forks of a process that has imported PyTorch and Lightning: in each process of
its own that takes ten seconds of a core.

The agent is torchrun's own, and so are the variables that it sets and what it says; only the processes that it starts
are forks. `python forks.py` is the process that forks: it reads jobs, a line of JSON each, and answers with exit codes.
"""

import contextlib
import json
import os
import runpy
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


class Forks:
    """The process that forks; started by the first call."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.server: subprocess.Popen | None = None

    def __call__(
        self, script: Path, *arguments: Any, processes: int, seconds: float = 200, **environment: str
    ) -> subprocess.CompletedProcess:
        """Run the script in so many processes of torchrun; with 0 without it, in one. Like `subprocess.run`; what takes
        longer than `seconds` is killed with all that it started."""
        if self.server is None:
            variables = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
            variables.pop("DDETR_RUN", None)
            self.server = subprocess.Popen(
                [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=variables
            )
        outputs = [self.folder / "stdout", self.folder / "stderr"]
        job = {
            "script": str(script),
            "arguments": [str(argument) for argument in arguments],
            "processes": processes,
            "seconds": seconds,
            "environment": environment,
            "outputs": [str(path) for path in outputs],
        }
        self.server.stdin.write(json.dumps(job) + "\n")
        self.server.stdin.flush()
        code = json.loads(self.server.stdout.readline())
        return subprocess.CompletedProcess(job["arguments"], code, *(path.read_text() for path in outputs))

    def close(self) -> None:
        if self.server is not None:
            self.server.stdin.close()  # it ends at the end of its input
            self.server.wait()
            self.server.stdout.close()


def run_script(script: str, arguments: list[str]) -> None:
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def exit_code(function: Callable[..., Any], *arguments: Any) -> int:
    """Of a process that calls the function and ends."""
    try:
        function(*arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return 0


class Fork(subprocess.Popen):
    """In the place of the processes that torchrun starts: `python -u SCRIPT ...`."""

    def __init__(self, args: Sequence[str], env: dict[str, str]) -> None:
        self.variables = env
        super().__init__(args)

    def _execute_child(self, args: Sequence[str], *_: Any) -> None:
        self._child_created = True
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            os.environ.update(self.variables)
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT):  # torchrun's own ways
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            os._exit(exit_code(run_script, args[2], list(args[3:])))


def perform(job: dict[str, Any]) -> int:
    """The exit code of the job, in this process."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    for number, path in enumerate(job["outputs"], start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(job["environment"])
    if not job["processes"]:
        return exit_code(run_script, job["script"], job["arguments"])
    SubprocessHandler._popen = lambda _, args, env: Fork(args, env)
    processes = str(job["processes"])
    return exit_code(run.main, ["--standalone", "--nproc-per-node", processes, job["script"], *job["arguments"]])


def serve() -> None:
    """Jobs, one after the other."""
    import ddetr.cli.main
    import ddetr.engine.train  # noqa: F401  the slow part

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                os.setpgid(0, 0)
                code = perform(job)
            finally:
                os._exit(code)
        end = time.monotonic() + job["seconds"]
        while not (done := os.waitpid(pid, os.WNOHANG))[0]:
            if time.monotonic() > end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(pid, signal.SIGKILL)
            time.sleep(0.02)
        print(os.waitstatus_to_exitcode(done[1]), flush=True)


if __name__ == "__main__":
    serve()

"""`ddetr bench gpu`: stages one after the other, each in a process of its own with its share of the time.

A stage that crashes, hangs or poisons the GPU's context ends by itself: what it had found stays, and the next begins.
"""

import datetime
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from ddetr import console
from ddetr.bench import record
from ddetr.bench.gpu import page
from ddetr.bench.gpu.official import BUILDER, MODULE
from ddetr.bench.gpu.sheet import Sheet
from ddetr.bench.gpu.stages import STAGES
from ddetr.errors import InputError
from ddetr.files import make_folder, write_text
from ddetr.runtime.device import choose_device

StageName = Literal["checks", "operator", "sweep", "network", "training", "runs", "tests"]

PROCESS = ["-m", "ddetr.bench.gpu.stages"]  # of a stage
_LEAST_SECONDS = 10  # a stage is not begun with less: loading PyTorch takes most of it


def bench_gpu(
    *,
    output: str,
    minutes: float = 9,
    only: list[StageName] | None = None,
    device: Literal["cuda", "cpu"] = "cuda",
    small: bool = False,
    data: str | None = None,
    official: str | None = None,
) -> int:
    """Prove and measure everything on a GPU, in minutes and without a network.

    Args:
        output: folder for gpu.md, gpu.json (both renewed with every finding) and gpu.log.
        minutes: for all stages together; what one leaves over the later ones get.
        only: these stages; by default all, in the order of their worth.
        device: cpu is for a rehearsal.
        small: a rehearsal: every stage on sizes that take seconds, and what needs a GPU says so.
        data: data set of the real training (COCO, Pascal VOC or YOLO); by default drawn shapes.
        official: folder with the source of the official operator (models/ops of Deformable-DETR), which is built for
            this GPU while the first stage runs, or with the module already built.

    Returns:
        0 if every check held, 1 if one did not or a stage failed.

    Raises:
        InputError: no such device, folder or data, or no time.
    """
    settings = dict(locals())
    choose_device(device)
    if not minutes > 0:
        raise InputError(f"--minutes: expected more than 0, got {minutes}")
    for name in ("data", "official"):
        if settings[name] and not Path(settings[name]).is_dir():
            raise InputError(f"--{name}: there is no folder {settings[name]}")
    folder = make_folder(Path(output), "--output").resolve()
    chosen = [stage for stage in STAGES if not only or stage in only]
    report = {
        "command": record.command_line("bench gpu", bench_gpu, settings),
        "date": datetime.date.today().isoformat(),
        "device": device,
        "small": small,
        "minutes": minutes,
        "chosen": chosen,
    }
    ends = time.time() + 60 * minutes
    with tempfile.TemporaryDirectory(prefix="ddetr-gpu-") as scratch, _stopped_by_signal():
        run = _Run(report, folder, Path(scratch))
        place = {"device": device, "small": small, "data": data and str(Path(data).resolve())}
        place["built"] = run.start_build(official) if official and device == "cuda" else None
        try:
            for index, name in enumerate(chosen):
                shares = [STAGES[stage].seconds for stage in chosen[index:]]
                share = (ends - time.time()) * shares[0] / sum(shares)
                run.stage(name, place, share)
        finally:
            run.end()
    console.show(f"\nsaved in {folder}: gpu.md, gpu.json, gpu.log")
    return 1 if run.is_wrong() else 0


class _Run:
    """The sheets so far, and the processes that are at work."""

    def __init__(self, report: Mapping[str, Any], folder: Path, scratch: Path):
        self.report, self.folder, self.scratch = report, folder, scratch
        self.sheets: dict[str, Sheet] = {}
        self.processes: list[subprocess.Popen] = []
        (folder / "gpu.log").write_text("")
        self.save()

    def start_build(self, official: str) -> str:
        """The official operator, beside the first stages; returns the folder where it will be."""
        if list(Path(official).glob(f"{MODULE}*.so")):
            return str(Path(official).resolve())
        built = self.scratch / "official"
        built.mkdir()
        self._start([sys.executable, "-m", BUILDER, str(Path(official).resolve()), str(built)], self.scratch)
        return str(built)

    def stage(self, name: str, place: Mapping[str, Any], seconds: float) -> None:
        """One stage, to its end or to the end of its time."""
        if seconds < _LEAST_SECONDS:
            self.sheets[name] = Sheet(name, state="skipped", reason=f"no time left for it ({max(seconds, 0):.0f} s)")
            self._tell(name)
            return
        file, ends, started = self.scratch / f"{name}.json", time.time() + seconds, time.monotonic()
        scratch = self.scratch / name
        scratch.mkdir()
        order = {"place": {**place, "scratch": str(scratch)}, "file": str(file), "ends": ends}
        variables = STAGES[name].on_cpu if place["device"] == "cpu" else {}
        child = self._start([sys.executable, *PROCESS, name, json.dumps(order)], scratch, variables)
        seen = 0.0
        with console.waiting(f"{name}: {STAGES[name].what} ({seconds:.0f} s at most)"):
            while child.poll() is None and time.time() < ends:
                time.sleep(0.2)
                if file.exists() and file.stat().st_mtime > seen:
                    seen = file.stat().st_mtime
                    self.sheets[name] = Sheet.read(file)
                    self.save()
        is_late = child.poll() is None
        _end(child)
        sheet = self.sheets[name] = Sheet.read(file) if file.exists() else Sheet(name)
        if sheet.state == "running":
            code = child.returncode
            sheet.state = "cut off" if is_late else "failed"
            sheet.reason = "its time was up" if is_late else f"its process ended with code {code}: see gpu.log"
            sheet.seconds = time.monotonic() - started
        self._tell(name)

    def end(self) -> None:
        """Nothing of it runs on, and all that was found is written."""
        for process in self.processes:
            _end(process)
        for name, sheet in self.sheets.items():
            if sheet.state == "running":
                sheet.state, sheet.reason = "cut off", f"{name} was interrupted"
        self.save()

    def save(self) -> None:
        content = {**self.report, "stages": [sheet.to_dict() for sheet in self.sheets.values()]}
        write_text(self.folder / "gpu.json", json.dumps(content, indent=1) + "\n")
        write_text(self.folder / "gpu.md", page.markdown(self.report, self.sheets))

    def is_wrong(self) -> bool:
        sheets = self.sheets.values()
        return any(sheet.state == "failed" or not all(check.ok for check in sheet.checks) for sheet in sheets)

    def _tell(self, name: str) -> None:
        self.save()
        for renderable in page.shown(self.sheets[name]):
            console.show(renderable)

    def _start(
        self, command: Sequence[str], folder: Path, variables: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        # Nothing asks the network; what would wait for it in vain fails at once.
        own = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TMPDIR": str(folder)}
        with (self.folder / "gpu.log").open("a") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **own, **(variables or {})},
                start_new_session=True,
            )
        self.processes.append(child)
        return child


def _end(child: subprocess.Popen) -> None:
    """It and all its children, who are of its group."""
    for signum in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signum)
        with suppress(subprocess.TimeoutExpired):
            child.wait(timeout=2)


@contextmanager
def _stopped_by_signal() -> Iterator[None]:
    """SIGTERM, as `timeout` sends it, ends the run as Ctrl+C does: with what was found written down."""

    def stop(signum: int, frame: Any) -> None:
        raise SystemExit(128 + signum)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

"""Stage 6: real runs of `ddetr train`, each in a process of its own and all at once: a detector that learns, the same
run twice, killed and resumed, out of memory, poisoned with numbers that are not finite, the batch size found by itself.
"""

import csv
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddetr import console
from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.record import spelled
from ddetr.checkpoint import load_checkpoint
from ddetr.datasets import draw_shapes
from ddetr.demo import MODEL
from ddetr.engine.run.states import RESUME_FILE

# In the process: no more than this share of the GPU's memory may be taken.
_LIMITED = (
    "import sys, torch; torch.cuda.set_per_process_memory_fraction({share}); from ddetr.cli.main import main; "
    "sys.exit(main(sys.argv[1:]))"
)
_END_SECONDS = 12  # before the end of the stage the long run is stopped
_TINY = {"backbone": "test_resnet", "hidden_dim": 32, "nheads": 4, "dim_feedforward": 64}


@dataclass(frozen=True)
class Runner:
    """Starts `ddetr` on the device of the stage."""

    place: Place
    ends: float  # of `time.monotonic`

    def start(self, name: str, arguments: Sequence[str], *, share: float | None = None) -> subprocess.Popen:
        """share: of the GPU's memory. Its output goes to NAME.log in the stage's folder."""
        limited = ["-c", _LIMITED.format(share=share)] if share is not None else ["-m", "ddetr"]
        with self.log(name).open("a") as log:
            return subprocess.Popen(
                [sys.executable, *limited, *arguments],
                cwd=self.place.scratch,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def run(self, name: str, arguments: Sequence[str], *, share: float | None = None) -> int:
        """Exit code; killed when the time of the stage is up."""
        process = self.start(name, arguments, share=share)
        try:
            return process.wait(max(self.ends - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            raise TimeoutError(f"{name} did not come to its end in time") from None

    def tell(self, name: str) -> None:
        """The end of what it printed, into this stage's own log: the folder of the runs is removed afterwards."""
        for log in sorted(self.place.scratch.glob(f"{name}.log")):
            lines = log.read_text("utf-8", "replace").splitlines()
            console.show("\n".join([f"--- {log.name}", *lines[-200:]]))

    def log(self, name: str) -> Path:
        return self.place.scratch / f"{name}.log"

    def said(self, name: str) -> str:
        """What it printed at last, on one line: its error, where it had one."""
        text = " ".join(self.log(name).read_text("utf-8", "replace").split())
        return text[text.rfind("ddetr: error") :] if "ddetr: error" in text else text[-300:]

    def folder(self, name: str) -> Path:
        return self.place.scratch / name

    def train(self, name: str, data: Path, **options: Any) -> list[str]:
        """Words of `ddetr train` for a small detector."""
        small, device = self.place.small, self.place.device.type
        words = ["train", "--data", str(data), "--output", str(self.folder(name)), "--device", device]
        chosen = {f"model.{key}": value for key, value in (MODEL | (_TINY if small else {})).items()}
        chosen |= {"data.image_size": 64 if small else 160, "data.augmentation": "plain", "devices": 1}
        chosen |= {"batch_size": 8, "device_batch_size": 4, "num_pictures": 0, "preflight": False, "log_every": 1}
        chosen |= {"precision": "bf16", "data.num_workers": 2} if device == "cuda" else {"data.num_workers": 0}
        return words + _options(chosen | {"optim.lr": 1e-3} | {k.replace("__", "."): v for k, v in options.items()})


def run(sheet: Sheet, place: Place) -> None:
    """The stage."""
    runner = Runner(place, sheet.ends - _END_SECONDS)
    shapes = draw_shapes(place.scratch / "shapes", *((24, 4, 64) if place.small else (48, 8, 160)))
    trials: dict[str, Callable[[], tuple[bool, str]]] = {
        "out of memory: the error names the flags": lambda: out_of_memory(runner, shapes),
        "not finite on purpose: recorded, and the bundle replays": lambda: not_finite(runner, shapes),
        "--device_batch_size auto settles below the limit": lambda: automatic_batch(runner, shapes),
    }
    with ThreadPoolExecutor(8 if place.on_gpu else 2) as pool:
        learning = pool.submit(learn, runner) if place.on_gpu or place.data else None
        same = ("first", "second", "killed")
        weights = {name: pool.submit(_weights, runner, name, shapes, name == "killed") for name in same}
        futures = {pool.submit(trial): what for what, trial in trials.items()}
        for future in as_completed(futures):
            _note(sheet, futures[future], future)
        _note(sheet, "the same bits twice with --deterministic", pool.submit(_equal, weights, "first", "second"))
        _note(sheet, "killed and resumed: the same bits as without", pool.submit(_equal, weights, "first", "killed"))
        if learning is None:
            sheet.skip("a run that learns", "it takes a GPU, or --data")
        else:
            _tell_learning(sheet, learning, place)
            runner.tell("learning")
    if not all(check.ok for check in sheet.checks):
        runner.tell("*")


def _note(sheet: Sheet, what: str, future: "Future[tuple[bool, str]]") -> None:
    try:
        ok, detail = future.result()
    except (NotHereError, TimeoutError) as error:
        sheet.skip(what, str(error))
    except Exception as error:
        sheet.check(what, False, f"{type(error).__name__}: {error}"[:300])
    else:
        sheet.check(what, ok, detail)


class NotHereError(Exception):
    """Something that this device can't be asked; the message says why."""


def _weights(runner: Runner, name: str, data: Path, is_killed: bool) -> dict[str, torch.Tensor]:
    """Those at the end of a short run, if wished after a SIGKILL in its midst and a resume."""
    words = runner.train(name, data, deterministic=True, epochs=2, checkpoint_every=2, val_every=2)
    if is_killed:
        process = runner.start(name, words)
        state = runner.folder(name) / RESUME_FILE
        while process.poll() is None and not state.exists() and time.monotonic() < runner.ends:
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if (runner.folder(name) / "metrics.json").exists() or not state.exists():
            raise RuntimeError(f"it could not be killed in its midst: {runner.said(name)}")
        words += ["--resume"]
    if code := runner.run(name, words):
        raise RuntimeError(f"{name} ended with exit code {code}: {runner.said(name)}")
    return load_checkpoint(runner.folder(name) / "last.pth").model


def _equal(weights: dict[str, "Future[dict[str, torch.Tensor]]"], one: str, other: str) -> tuple[bool, str]:
    first, second = weights[one].result(), weights[other].result()
    differ = [name for name, tensor in first.items() if not torch.equal(tensor, second[name])]
    return not differ, f"{len(first) - len(differ)} of {len(first)} tensors are equal"


def out_of_memory(runner: Runner, data: Path) -> tuple[bool, str]:
    """A batch for which the process may not take enough."""
    if not runner.place.on_gpu:
        raise NotHereError("only a GPU's memory can be limited for a process of PyTorch")
    total = torch.cuda.get_device_properties(runner.place.device).total_memory
    words = runner.train("memory", data, data__image_size=1024, batch_size=32, device_batch_size=32, epochs=1)
    code = runner.run("memory", words, share=2 * 2**30 / total)
    said = runner.said("memory")
    ok = code == 2 and "out of memory on cuda" in said and "--activation_checkpointing" in said
    return ok, said if ok else f"exit code {code}: {said}"


def not_finite(runner: Runner, data: Path) -> tuple[bool, str]:
    """A learning rate that no network survives; the bundle of the failed step is computed again."""
    words = runner.train("poisoned", data, optim__lr=1e30, optim__warmup_steps=0, epochs=1 if runner.place.small else 2)
    runner.run("poisoned", words)
    bundles = sorted((runner.folder("poisoned") / "blackbox").glob("step-*"))
    if not bundles:
        return False, f"no bundle was left: {runner.said('poisoned')}"
    code = runner.run("replay", ["replay", str(bundles[0]), "--device", runner.place.device.type])
    said = " ".join(runner.log("replay").read_text("utf-8", "replace").split())
    return code == 0 and "not finite" in said, f"{bundles[0].name}: exit code {code}"


def automatic_batch(runner: Runner, data: Path) -> tuple[bool, str]:
    """The size is found within a part of the memory, and the run with it does not run out."""
    options = {"batch_size": 16 if runner.place.small else 32, "device_batch_size": "auto", "epochs": 1}
    share = None
    if runner.place.on_gpu:
        total = torch.cuda.get_device_properties(runner.place.device).total_memory
        share, options["data__image_size"] = 2 * 2**30 / total, 640
    code = runner.run("auto", runner.train("auto", data, **options), share=share)
    lines = runner.log("auto").read_text("utf-8", "replace").splitlines()
    settled = next((line for line in lines if "images at a time, of" in line), "")
    return code == 0 and bool(settled), " ".join(settled.split()) or f"exit code {code}: {runner.said('auto')}"


def learn(runner: Runner) -> list[dict[str, Any]]:
    """A full-size network from nothing until the time is up: AP by step and second."""
    place, name = runner.place, "learning"
    data = Path(place.data) if place.data else draw_shapes(place.scratch / "many shapes", 2000, 100, 480)
    options = {"data.image_size": 480, "batch_size": 16, "device_batch_size": 16, "epochs": 40, "precision": "bf16"}
    options |= {"optim.lr": 2e-4, "optim.schedule": "cosine", "optim.warmup_steps": 100, "preflight": False}
    options |= {"model.pretrained_backbone": False, "model.two_stage": False, "data.num_workers": 6, "devices": 1}
    if place.small:
        options |= {f"model.{key}": value for key, value in _TINY.items()}
        options |= {"data.image_size": 64, "epochs": 1, "precision": "32", "data.num_workers": 0}
    words = ["train", "--data", str(data), "--output", str(runner.folder(name)), "--device", place.device.type]
    begin, rows = time.monotonic(), []
    process = runner.start(name, words + _options(options))

    def look() -> None:
        seconds = time.monotonic() - begin
        rows.extend({"seconds": seconds, **row} for row in _rows(runner.folder(name) / "val.csv")[len(rows) :])

    while process.poll() is None and time.monotonic() < runner.ends:
        time.sleep(0.5)
        look()
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_END_SECONDS / 2)
        except subprocess.TimeoutExpired:
            process.kill()
    look()
    if not rows:
        raise RuntimeError(f"no validation came to its end: {runner.said(name)}")
    return rows


def _tell_learning(sheet: Sheet, learning: "Future[list[dict[str, Any]]]", place: Place) -> None:
    try:
        rows = learning.result()
    except Exception as error:
        sheet.check("a run that learns", False, f"{type(error).__name__}: {error}"[:300])
        return
    sheet.data["learning"] = rows
    columns = ("seconds", "step", "AP", "AP50")
    cells = [[f"{row['seconds']:.0f}", row["step"], row["AP"], row["AP50"]] for row in rows]
    sheet.table("A full-size network from nothing, while all other runs go on beside it", columns, cells)
    losses = [float(row["loss"]) for row in _rows(place.scratch / "learning" / "train.csv")]
    if not place.small:  # the AP of a detector that starts from nothing may stay 0 for minutes
        detail = f"loss {losses[0]:.2f}, then {losses[-1]:.2f}"
        sheet.check("a run that learns", len(losses) > 5 and losses[-1] < losses[0], detail)


def _rows(file: Path) -> list[dict[str, str]]:
    if not file.exists():
        return []
    with file.open(newline="", encoding="utf-8") as lines:
        return list(csv.DictReader(lines))


def _options(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", spelled(value))]

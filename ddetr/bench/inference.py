"""`ddetr bench inference`: the whole detector on a CPU beside transformers', with the same weights.

Sides: transformers' eager, ours as it is, ours with each `optimize`, on one image; then a training step (forward, a
plain loss on the outputs, backward) of transformers' and of ours as `ddetr train` runs it: backbone channels-last,
matrix products by oneDNN. Wall time, interleaved, medians.
"""

import math
import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ddetr import console
from ddetr.bench import record
from ddetr.bench.timing import cpu_clock, fixed_threads, in_inference_mode, interleaved
from ddetr.checkpoint import load_weights
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.inference.optimize import TOLERANCES, optimize_model
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime import allocator
from ddetr.runtime.precision import onednn_matmuls

IMAGE_HW = (800, 1066)
TRAINING_HW = (480, 640)
MODEL = {"num_classes": 91, "pretrained_backbone": False, "freeze_backbone": "stem"}  # the paper's, with ResNet-50
BASE = "transformers"

Rows = dict[str, dict[str, float]]


def bench_inference(
    *,
    threads: int = 2,
    rounds: int = 7,
    compile: bool = False,
    keep_freed_memory: bool = False,
    output: str | None = None,
) -> None:
    """Time the R50 detector on one image of 800x1066, and a training step at 480x640, beside transformers'.

    Args:
        threads: of the CPU; one is timed by its own CPU time, more by the wall clock.
        rounds: turns of each side, of which the median counts.
        compile: measure `optimize="compile"` too, which takes minutes to compile.
        keep_freed_memory: let the process keep the memory that it frees, as `ddetr predict --optimize` does, for all
            sides.
        output: folder for inference.json and inference.md.

    Raises:
        InputError: transformers is not installed, or a number below 1.
    """
    settings = dict(locals())
    for name, number in (("threads", threads), ("rounds", rounds)):
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")
    folder = make_folder(Path(output), "--output") if output else None
    theirs, ours = make_models()
    report: dict[str, Any] = {
        "machine": record.machine(torch.device("cpu")),
        "command": record.command_line("bench inference", bench_inference, settings),
        "threads": threads,
        "rounds": rounds,
        "clock": cpu_clock(threads).counts,
        "freed_memory_is_kept": keep_freed_memory and allocator.keep_freed_memory(),
    }
    console.show("\n".join(header(report)))
    with fixed_threads(threads):
        report["inference"] = inference(theirs, ours, threads, rounds, compile)
        report["training"] = training(theirs, ours, threads, rounds)
    for title, rows in _tables(report):
        console.show("\n".join(["", title, "", *rows]))
    if folder:
        record.save(folder, "inference", report, markdown(report))


def make_models() -> tuple[nn.Module, DeformableDETR]:
    """transformers' network with random weights that make the queries differ, and ours with the same.

    Both are in evaluation mode, also for the training step: without dropout both compute the same.
    """
    try:
        from ddetr.bench.huggingface import network_like
    except ModuleNotFoundError as error:
        raise InputError(f"bench inference needs the package {error.name}: pip install {error.name}") from error
    torch.manual_seed(0)
    ours = DeformableDETR(**MODEL).eval()
    theirs = network_like(ours).eval()
    with torch.no_grad():
        for name, tensor in theirs.state_dict().items():
            if name.endswith(("sampling_offsets.weight", "attention_weights.weight")):
                tensor.normal_(0, 0.02)
            elif "reference_points.weight" in name:
                tensor.normal_(0, 0.3)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(theirs.state_dict(), Path(folder, "pytorch_model.bin"))
        load_weights(ours, Path(folder, "pytorch_model.bin"))
    return theirs, ours


def inference(theirs: nn.Module, ours: DeformableDETR, threads: int, rounds: int, compile: bool = False) -> Rows:
    """Seconds of each side on one image, and by how much its logits differ from transformers'.

    Raises:
        RuntimeError: a side gives other logits.
    """
    images, mask = torch.randn(1, 3, *IMAGE_HW), torch.ones(1, *IMAGE_HW, dtype=torch.long)
    models: dict[str, nn.Module] = {"ours": ours}
    for optimization in ("float32", "bfloat16") + (("compile",) if compile else ()):
        with console.waiting(f"optimize={optimization}"):
            models[f"ours, optimize={optimization}"] = optimize_model(ours, optimization)
    found: dict[str, Tensor] = {}

    def run_theirs() -> None:
        found[BASE] = theirs(pixel_values=images, pixel_mask=mask).logits

    def run_ours(name: str) -> None:
        found[name] = models[name](images)["pred_logits"]

    sides: dict[str, Callable[[], None]] = {BASE: run_theirs}
    sides |= {name: lambda name=name: run_ours(name) for name in models}
    with console.waiting("inference"):
        seconds = _medians({name: in_inference_mode(side) for name, side in sides.items()}, threads, rounds)
    expected = found[BASE]
    rows = {}
    for name in sides:
        differ = (found[name] - expected).abs().max().item()
        allowed = TOLERANCES[name.partition("=")[2] or "float32"] * expected.abs().max().item()
        if not differ <= allowed:
            raise RuntimeError(f"the logits of {name} differ from those of {BASE} by {differ:.1e}")
        rows[name] = {"seconds": seconds[name], "logits_differ_by": differ}
    return rows


def training(theirs: nn.Module, ours: DeformableDETR, threads: int, rounds: int) -> Rows:
    """Seconds of a step of all weights that the published recipe trains, and the norm of its gradients.

    Raises:
        RuntimeError: the gradients differ.
    """
    images, mask = torch.randn(1, 3, *TRAINING_HW), torch.ones(1, *TRAINING_HW, dtype=torch.long)
    norms: dict[str, float] = {}

    def step(name: str, model: nn.Module, outputs: Callable[[], tuple[Tensor, Tensor]]) -> None:
        model.zero_grad(set_to_none=True)
        logits, boxes = outputs()
        (logits.square().mean() + boxes.square().mean()).backward()
        norms[name] = sum(p.grad.square().sum().item() for p in model.parameters() if p.grad is not None) ** 0.5

    def their_outputs() -> tuple[Tensor, Tensor]:
        out = theirs(pixel_values=images, pixel_mask=mask)
        return out.logits, out.pred_boxes

    def our_outputs() -> tuple[Tensor, Tensor]:
        out = ours(images)
        return out["pred_logits"], out["pred_boxes"]

    def our_step() -> None:
        with onednn_matmuls():
            step("ours", ours, our_outputs)

    with _channels_last(ours.backbone), console.waiting("training"):
        sides = {BASE: lambda: step(BASE, theirs, their_outputs), "ours": our_step}
        seconds = _medians(sides, threads, rounds)
    if not math.isclose(norms["ours"], norms[BASE], rel_tol=1e-3):
        raise RuntimeError(f"the gradients differ: their norms are {norms}")
    return {name: {"seconds": seconds[name], "gradient_norm": norms[name]} for name in seconds}


def header(report: Mapping[str, Any]) -> list[str]:
    """Machine, command and what was counted."""
    kept = "; freed memory is kept" if report["freed_memory_is_kept"] else ""
    counted = f"{report['clock']}, median of {report['rounds']} interleaved rounds{kept}"
    return [record.describe(report["machine"]), f"{report['command']}: {counted}"]


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machine, command = header(report)
    lines = [
        f"# The whole detector on a CPU, against transformers with the same weights, {report['machine']['date']}",
        "",
        f"- Machine: {machine}.",
        f"- Command: `{command.replace(': ', '`. ', 1)}. Random weights, the same on all sides.",
    ]
    for title, rows in _tables(report):
        lines += ["", f"## {title}", "", *rows]
    return "\n".join(lines) + "\n"


def _tables(report: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    for kind, (h, w), column in (
        ("inference", IMAGE_HW, "logits_differ_by"),
        ("training", TRAINING_HW, "gradient_norm"),
    ):
        rows = report[kind]
        lines = [f"| side | seconds | ratio | {column.replace('_', ' ')} |", "|---|---|---|---|"]
        for name, row in rows.items():
            ratio = rows[BASE]["seconds"] / row["seconds"]
            lines.append(f"| {name} | {row['seconds']:.3f} | {ratio:.2f}x | {row[column]:.1e} |")
        yield f"{kind}, one image of {h}x{w}", lines


def _medians(sides: Mapping[str, Callable[[], None]], threads: int, rounds: int) -> dict[str, float]:
    times = interleaved(sides, cpu_clock(threads), rounds)
    return {name: statistics.median(values) / 1000 for name, values in times.items()}


@contextmanager
def _channels_last(module: nn.Module) -> Iterator[None]:
    module.to(memory_format=torch.channels_last)
    try:
        yield
    finally:
        module.to(memory_format=torch.contiguous_format)

"""`ddetr bench matcher`: matching the predictions of 7 layers with the objects of a batch.

Sides: the formulation of the official code (for each layer one cost matrix of all predictions of the batch against all
objects of the batch, copied to the host, solved image by image; written anew in official.py), and ours
(`HungarianMatcher.match_sets`). Both must assign the same before they are timed.
What part of a whole training step the matching is, `ddetr bench train` shows.
"""

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddetr import console
from ddetr.bench import record
from ddetr.bench.official import cross_image_match
from ddetr.bench.timing import Call, Clock, cpu_clock, fixed_threads, interleaved
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.models.matcher import HungarianMatcher, PaddedTargets

LAYERS, CLASSES = 7, 91  # six decoder layers and the proposals' or a last one; COCO's ids


class Size(NamedTuple):
    """Images, predictions per image, and objects of each image."""

    batch: int
    queries: int
    objects: list[int]

    def __str__(self) -> str:
        few, many = min(self.objects), max(self.objects)
        return f"batch {self.batch}, {self.queries} queries, {few if few == many else f'{few} to {many}'} objects"


SIZES = [
    Size(2, 300, [30] * 2),
    Size(4, 300, [10] * 4),
    Size(16, 300, [30] * 16),
    Size(16, 300, [100] * 16),
    Size(16, 300, [100, 50, 30, 20, 15, 12, 10, 8, 7, 6, 5, 4, 3, 2, 1, 0]),  # as uneven as photographs are
    Size(4, 900, [30] * 4),
]


def make(size: Size, device: torch.device) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Random predictions of each layer, and objects; the same on every device."""
    generator = torch.Generator().manual_seed(0)

    def boxes(*shape: int) -> Tensor:
        return torch.rand(*shape, 4, generator=generator) * torch.tensor([0.6, 0.6, 0.3, 0.3]) + 0.1

    layers = []
    for _ in range(LAYERS):
        logits = torch.randn(size.batch, size.queries, CLASSES, generator=generator) - 4
        layers.append({"pred_logits": logits.to(device), "pred_boxes": boxes(size.batch, size.queries).to(device)})
    targets = []
    for count in size.objects:
        labels = torch.randint(CLASSES, (count,), generator=generator)
        targets.append({"labels": labels.to(device), "boxes": boxes(count).to(device)})
    return layers, targets


def make_sides(size: Size, device: torch.device) -> dict[str, Call]:
    """Both, after their assignments were found equal.

    Raises:
        RuntimeError: they differ.
    """
    layers, targets = make(size, device)
    matcher = HungarianMatcher()

    def official() -> list[list[tuple[Tensor, Tensor]]]:
        return [cross_image_match(layer, targets) for layer in layers]

    def ours() -> list:
        padded = PaddedTargets.of(targets, device)  # the criterion's, once for all layers
        return matcher.match_sets([(layer, padded) for layer in layers])

    for layer, (theirs, found) in enumerate(zip(official(), ours())):
        expected = {
            (image, query, place)
            for image, pairs in enumerate(theirs)
            for query, place in zip(*(index.tolist() for index in pairs))
        }
        if expected != set(zip(*(index.tolist() for index in found))):
            raise RuntimeError(f"{size}: the assignments of layer {layer} differ")
    return {"official": official, "ours": ours}


def clock_of(device: torch.device) -> Clock:
    """On a CPU the time of one thread; on a GPU the wall time, since the assignment is solved on the host."""
    if device.type == "cpu":
        return cpu_clock(1)

    def milliseconds(call: Call, times: int) -> float:
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(times):
            call()
        torch.cuda.synchronize(device)
        return (time.perf_counter() - start) * 1000

    return Clock("wall time, device and host, short calls repeated for 20 ms", milliseconds, 20)


def bench_matcher(
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    sizes: int = len(SIZES),
    rounds: int = 7,
    output: str | None = None,
) -> None:
    """Time the matching of a training step beside the formulation of the official code.

    Args:
        device: where the predictions are; on the CPU one thread is timed, by its own CPU time.
        sizes: how many of the sizes of batches, in their order.
        rounds: turns of each side, of which the median counts.
        output: folder for matcher.json and matcher.md.

    Raises:
        InputError: no such device, or a number that can not be.
    """
    settings = dict(locals())
    if rounds < 1:
        raise InputError(f"--rounds: expected at least 1, got {rounds}")
    if not 1 <= sizes <= len(SIZES):
        raise InputError(f"--sizes: expected 1 to {len(SIZES)}, got {sizes}")
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch sees no CUDA device here; --device cpu measures on the processor")
    folder = make_folder(Path(output), "--output") if output else None
    where = torch.device(device)
    clock = clock_of(where)
    report: dict[str, Any] = {
        "machine": record.machine(where),
        "command": record.command_line("bench matcher", bench_matcher, settings),
        "clock": clock.counts,
        "rounds": rounds,
        "layers": LAYERS,
        "classes": CLASSES,
        "rows": [],
    }
    console.show("\n".join(header(report)))
    with fixed_threads(1 if device == "cpu" else torch.get_num_threads()):
        for size in SIZES[:sizes]:
            with console.waiting(str(size)):
                times = interleaved(make_sides(size, where), clock, rounds)
            medians = {name: statistics.median(values) for name, values in times.items()}
            ratio = medians["official"] / medians["ours"]
            report["rows"].append({"size": str(size), **medians, "ratio": ratio, "rounds_ms": times})
    console.show("\n".join(["", *table(report), "", "its share of a whole training step: ddetr bench train"]))
    if folder:
        record.save(folder, "matcher", report, markdown(report))


def header(report: Mapping[str, Any]) -> list[str]:
    """Machine, command and what was counted."""
    counted = f"{report['clock']}, median of {report['rounds']} interleaved rounds"
    return [
        record.describe(report["machine"]),
        f"{report['command']}: {counted}; {report['layers']} layers, {report['classes']} classes",
    ]


def table(report: Mapping[str, Any]) -> list[str]:
    """Markdown: a row for each size."""
    lines = ["| size | official ms | ours ms | ratio |", "|---|---|---|---|"]
    for row in report["rows"]:
        lines.append(f"| {row['size']} | {row['official']:.2f} | {row['ours']:.2f} | {row['ratio']:.1f}x |")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machine, command = header(report)
    lines = [
        f"# The matcher, {report['machine']['date']}",
        "",
        f"- Machine: {machine}.",
        f"- Command: `{command.replace(': ', '`. ', 1)}.",
        "- Both sides assign the same, which is checked before they are timed. What part of a training step "
        "the matching is,",
        "  `ddetr bench train` shows.",
        "",
        *table(report),
    ]
    return "\n".join(lines) + "\n"

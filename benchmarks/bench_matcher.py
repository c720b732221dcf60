"""Matching of the predictions of 7 layers with the objects of a batch: `python benchmarks/bench_matcher.py`.

Sides: the formulation of the official code (for each layer one cost matrix of all predictions of the batch against all
objects of the batch, copied to the host, solved image by image; written anew in ddetr/bench/official.py), and ours
(`HungarianMatcher.match_sets`). Both must assign the same before they are timed; interleaved, medians, on one thread
the CPU time of that thread, on CUDA the wall time with waiting. `--save FILE` writes the figures, `--device cuda` measures
on a GPU.
"""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "2000")  # before PyTorch loads, as the command line sets it

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ddetr.bench.official import cross_image_match
from ddetr.bench.record import describe, machine
from ddetr.bench.timing import Call, Clock, cpu_clock, interleaved
from ddetr.files import write_text
from ddetr.models.matcher import HungarianMatcher, PaddedTargets

LAYERS, CLASSES = 7, 91  # six decoder layers and the proposals' or a last one; COCO's ids


class Size(NamedTuple):
    """Images, predictions an image, and objects of each image."""

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--sizes", type=int, default=len(SIZES), help="how many of the sizes, in their order")
    parser.add_argument("--save", type=Path)
    options = parser.parse_args()
    device, threads = torch.device(options.device), torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    clock = clock_of(device)
    here = machine(device)
    print(f"{describe(here)}; {clock.counts}; {LAYERS} layers, {CLASSES} classes, median of {options.rounds} rounds")
    print(f"{'':48s} {'official ms':>12s} {'ours ms':>9s} {'ratio':>7s}")
    rows = []
    for size in SIZES[: options.sizes]:
        times = interleaved(make_sides(size, device), clock, options.rounds)
        row = {name: statistics.median(values) for name, values in times.items()}
        print(
            f"{size!s:48s} {row['official']:12.2f} {row['ours']:9.2f} {row['official'] / row['ours']:6.1f}x", flush=True
        )
        rows.append({"size": str(size), **row, "ratio": row["official"] / row["ours"], "rounds_ms": times})
    torch.set_num_threads(threads)
    if options.save:
        report = {"machine": here, "clock": clock.counts, "layers": LAYERS, "classes": CLASSES, "rows": rows}
        write_text(options.save, json.dumps(report, indent=1) + "\n")
        print(f"saved in {options.save}")


if __name__ == "__main__":
    main()

"""Time the operator against grid_sample and transformers' function: `python benchmarks/bench_op.py [--save]`.

One thread, CPU time of the thread (others may share the machine), sides interleaved, medians. Each side starts from
what the model has, raw offsets, logits and reference points, so softmax and location arithmetic are in all of them:
ours fused, the others' as they are written. `--save` writes benchmarks/results/op-<date>-<machine>.json.
"""

import argparse
import datetime
import json
import logging
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ddetr.ops import backends, embedding_bag, ms_deform_attn_step
from ddetr.ops.reference import ms_deform_attn_reference

IMAGE_800 = [(100, 134), (50, 67), (25, 34), (13, 17)]  # 800x1066
IMAGE_160 = [(20, 20), (10, 10), (5, 5)]  # the demo's
RESULTS = Path(__file__).parent / "results"


class Size(NamedTuple):
    """An attention layer's inputs; `queries` 0 = one per cell (encoder)."""

    batch: int
    shapes: list[tuple[int, int]]
    heads: int
    head_size: int
    points: int
    queries: int


SIZES = {
    "encoder 800x1066": Size(1, IMAGE_800, 8, 32, 4, 0),
    "decoder 800x1066": Size(1, IMAGE_800, 8, 32, 4, 300),
    "encoder demo": Size(16, IMAGE_160, 8, 16, 4, 0),
    "decoder demo": Size(16, IMAGE_160, 8, 16, 4, 100),
}


def make_inputs(size: Size) -> list[Tensor]:
    """Value, offsets, logits, reference points: offsets as at initialisation (1 to P cells outwards) plus noise."""
    generator = torch.Generator().manual_seed(0)
    cells = sum(h * w for h, w in size.shapes)
    queries, num_levels = size.queries or cells, len(size.shapes)
    angles = torch.arange(size.heads) * 2 * math.pi / size.heads
    directions = torch.stack([angles.cos(), angles.sin()], -1)
    directions = directions / directions.abs().amax(-1, keepdim=True)
    steps = torch.arange(1, size.points + 1).view(size.points, 1)
    noise = torch.randn(size.batch, queries, size.heads, num_levels, size.points, 2, generator=generator)
    offsets = directions.view(size.heads, 1, 1, 2) * steps + noise * 0.5
    if size.queries:
        centres = torch.rand(queries, 2, generator=generator)
    else:
        grids = [
            torch.meshgrid((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w, indexing="ij")
            for h, w in size.shapes
        ]
        centres = torch.cat([torch.stack([x, y], -1).flatten(0, 1) for y, x in grids])
    references = centres[None, :, None].repeat(size.batch, 1, num_levels, 1)
    value = torch.randn(size.batch, cells, size.heads, size.head_size, generator=generator)
    logits = torch.randn(size.batch, queries, size.heads, num_levels, size.points, generator=generator)
    return [value, offsets, logits, references]


def plain_step(
    core: Callable, shapes: list, value: Tensor, offsets: Tensor, logits: Tensor, references: Tensor
) -> Tensor:
    """Softmax and locations as the official module and transformers write them, then `core`."""
    weights = F.softmax(logits.flatten(3), -1).view(logits.shape)
    normalizer = torch.tensor([(w, h) for h, w in shapes], dtype=torch.float32)
    locations = references[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
    return core(value, shapes, locations, weights)


def sides(size: Size) -> dict[str, Callable]:
    """Name -> function of the inputs."""
    flat = [length for hw in size.shapes for length in hw]
    found: dict[str, Callable] = {
        "ours": lambda *t: ms_deform_attn_step(t[0], size.shapes, *t[1:]),
        "embedding_bag": _embedding_bag(flat),
        "grid_sample": lambda *t: plain_step(ms_deform_attn_reference, size.shapes, *t),
    }
    try:
        from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention
    except ImportError:
        logging.getLogger(__name__).warning("transformers is not installed: left out")
        return found
    module = MultiScaleDeformableAttention()

    def transformers_core(value: Tensor, shapes: list, locations: Tensor, weights: Tensor) -> Tensor:
        return module(value, torch.tensor(shapes), shapes, None, locations, weights, 64)

    found["transformers"] = lambda *t: plain_step(transformers_core, size.shapes, *t)
    return found


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx, flat, *tensors):
        ctx.flat = flat
        ctx.save_for_backward(*tensors)
        return embedding_bag.forward(tensors[0], flat, *tensors[1:])

    @staticmethod
    def backward(ctx, grad):
        value, *rest = ctx.saved_tensors
        return (None, *embedding_bag.backward(grad, value, ctx.flat, *rest, False))


def _embedding_bag(flat: list[int]) -> Callable:
    return lambda *tensors: _EmbeddingBag.apply(flat, *tensors)


def measure(size: Size, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of CPU time of each side: forward, and forward + backward (reference points held fixed)."""
    inputs = make_inputs(size)
    functions = sides(size)
    with torch.inference_mode():
        expected = functions["grid_sample"](*inputs)
        grad = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
        for name, function in functions.items():
            difference = ((function(*inputs) - expected).abs().max() / expected.abs().max()).item()
            assert difference < 1e-4, f"{name} is off by {difference:.1e}"
    leaves = [t.clone().requires_grad_() for t in inputs[:3]] + [inputs[3]]

    def forward(function: Callable) -> None:
        with torch.inference_mode():
            function(*inputs)

    def both(function: Callable) -> None:
        torch.autograd.grad(function(*leaves), leaves[:3], grad.clone())

    results: dict[str, dict[str, float]] = {name: {} for name in functions}
    for kind, run in (("forward", forward), ("forward + backward", both)):
        times: dict[str, list[float]] = {name: [] for name in functions}
        for _ in range(rounds):
            for name, function in functions.items():
                run(function)  # after the side before it: its caches and the allocator's pages are its own again
                start = time.thread_time_ns()
                run(function)
                times[name].append((time.thread_time_ns() - start) / 1e6)
        for name, values in times.items():
            results[name][kind] = statistics.median(values)
    return results


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--save", action="store_true", help="write the figures to benchmarks/results/")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of all sides (default: %(default)s)")
    parser.add_argument("--size", choices=SIZES, action="append", help="default: all")
    options = parser.parse_args()
    torch.set_num_threads(1)  # backward runs in the calling thread on the CPU, so its time is counted
    active = next(row for row in backends() if row.active and row.device == "cpu")
    report = {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "torch": torch.__version__,
        "backend": f"{active.name}: {active.detail}",
        "unit": "ms of CPU time, 1 thread, median",
        "sizes": {},
    }
    print(f"{report['processor']}, torch {torch.__version__}, {report['backend']}; {report['unit']}")
    for name in options.size or SIZES:
        results = measure(SIZES[name], options.rounds)
        report["sizes"][name] = results
        print(f"\n{name:18s} {'forward':>20s} {'forward + backward':>24s}")
        for side, times in results.items():
            cells = [f"{times[k]:10.2f} ({results['grid_sample'][k] / times[k]:5.1f}x)" for k in times]
            print(f"  {side:16s} {cells[0]:>20s} {cells[1]:>24s}")
    if options.save:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"op-{report['date']}-{active.detail.split(', ')[-1]}.json"
        path.write_text(json.dumps(report, indent=1) + "\n")
        print(f"\n{path}")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = dict(line.partition("\t")[::2] for line in lines[:30] if "\t" in line)
    family = [fields.get(key, "").strip(": \t") for key in ("cpu family", "model")]
    return f"{fields.get('model name', '').strip(': ')} (family {family[0]}, model {family[1]})"


if __name__ == "__main__":
    main()

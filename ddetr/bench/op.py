"""`ddetr bench op`: the operator against other implementations, checked before they are timed."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ddetr import console
from ddetr.bench import growth as growth_curves
from ddetr.bench import record, tables
from ddetr.bench.sides import BASE, DESCRIPTIONS, Setting, Step, prepare, reason_of
from ddetr.bench.sizes import CPU_DEFAULT, CUDA_DEFAULT, Inputs, Size, chosen_sizes, compulsory_bytes, make_inputs
from ddetr.bench.timing import (
    Clock,
    copy_bandwidth,
    cpu_clock,
    cuda_clock,
    fixed_threads,
    gigabytes_per_second,
    in_inference_mode,
    interleaved,
)
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.ops.reference import attention_step_reference
from ddetr.runtime.device import choose_device

FORWARD, BOTH = tables.KINDS
COMPARED = ("output", "gradient of value", "gradient of offsets", "gradient of logits")

# Of the largest value. In bfloat16 the results alone are rounded by up to 2^-9 of theirs; locations rounded to bfloat16
# are wrong by a fifth.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}
_DTYPES = {
    "auto": {"cpu": [torch.float32], "cuda": [torch.float32, torch.bfloat16]},
    "float32": [torch.float32],
    "bfloat16": [torch.bfloat16],
    "both": [torch.float32, torch.bfloat16],
}
_ROUNDS = {"cpu": 5, "cuda": 30}


class Truth(NamedTuple):
    """What a layer's step should give, in float64: output, gradients of value, offsets, logits; and their cause."""

    compared: tuple[Tensor, ...]
    grad_output: Tensor


def bench_op(
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    sizes: str = "default",
    dtype: Literal["auto", "float32", "bfloat16", "both"] = "auto",
    threads: int = 1,
    rounds: int | None = None,
    growth: bool = False,
    output: str | None = None,
) -> None:
    """Time the operator, forward and with its backward, against grid_sample and every other one that is here.

    Args:
        device: where to measure.
        sizes: names or patterns with commas between, such as "decoder-demo,encoder-*-b1"; "*" is all, "none" no table,
            and a wrong name lists them.
        dtype: of values, offsets and logits; "auto" is float32 on the CPU, both on CUDA.
        threads: on the CPU; one is timed by its own CPU time, more by the wall clock.
        rounds: turns of each side, of which the median counts; by default 5 on the CPU, 30 on CUDA.
        growth: measure as well how the cost grows with queries, points, levels and image size.
        output: folder for op.json and op.md, growth.json and growth.png.

    Raises:
        InputError: no such size or device, or a number below 1.
    """
    settings = dict(locals())
    where, rounds = choose_device(device), _ROUNDS[device] if rounds is None else rounds
    for name, number in (("threads", threads), ("rounds", rounds)):
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")
    default = CPU_DEFAULT if device == "cpu" else CUDA_DEFAULT
    chosen = chosen_sizes(default if sizes == "default" else sizes)
    if not chosen and not growth:
        raise InputError("--sizes none leaves nothing to measure: add --growth, or name some sizes")
    dtypes = _DTYPES["auto"][device] if dtype == "auto" else _DTYPES[dtype]
    folder = make_folder(Path(output), "--output") if output else None
    with fixed_threads(threads):
        clock = cpu_clock(threads) if device == "cpu" else cuda_clock(where)
        report: dict[str, Any] = {
            "machine": record.machine(where),
            "command": record.command_line("bench op", bench_op, settings),
            "device": device,
            "threads": threads if device == "cpu" else None,
            "clock": clock.counts,
            "rounds": rounds,
            "copy_gb_per_s": copy_bandwidth(where, clock),
            "sides": DESCRIPTIONS,
            "rows": [],
            "left_out": [],
        }
        console.show("\n".join(tables.header(report)))
        for kind in dtypes:
            for name, size in chosen.items():
                with console.waiting(f"{name}, {name_of(kind)}"):
                    rows, left_out = measure(name, size, where, kind, clock, rounds)
                report["rows"] += rows
                report["left_out"] += left_out
                console.show("")
                console.show(tables.of_size(name, name_of(kind), rows))
        console.show("\n".join(["", *tables.footer(report)]) if chosen else "")
        if chosen and folder:
            record.save(folder, "op", report, tables.markdown(report))
        if growth:
            with console.progress("growth") as update:
                curves = growth_curves.measure(where, dtypes[0], clock, rounds, update)
            console.show(growth_curves.table(curves))
            if folder:
                report_of_growth = {key: report[key] for key in ("machine", "command", "device", "clock", "rounds")}
                growth_curves.save(folder, curves, report_of_growth, name_of(dtypes[0]))
                console.show(f"saved in {folder}: growth.json, growth.png")


def measure(
    name: str,
    size: Size,
    device: torch.device,
    dtype: torch.dtype,
    clock: Clock,
    rounds: int,
    names: Iterable[str] | None = None,
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Rows of one size, a side each (by default all), and the sides that are left out with the reason.

    A side is timed only if it gives the reference's output and gradients.
    """
    inputs = make_inputs(size, device, dtype)
    truth = true_step(size, inputs)
    steps, reasons = prepare(Setting(size.shapes, device, dtype), names)
    leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in inputs[:3]), inputs.references)
    errors: dict[str, dict[str, float]] = {}
    for side, step in steps.items():
        try:
            errors[side] = errors_of(step, leaves, truth)
        except Exception as error:  # others' kernels fail in every way there is
            reasons[side] = reason_of(error)
            continue
        worst = max(errors[side], key=lambda what: _nan_last(errors[side][what]))
        if not errors[side][worst] <= TOLERANCE[dtype]:
            reasons[side] = f"wrong: its {worst} is off by {errors[side][worst]:.1e} of the largest value"
    steps = {side: step for side, step in steps.items() if side not in reasons}
    grad_output = truth.grad_output
    del truth
    times = {
        FORWARD: interleaved(
            {side: in_inference_mode(lambda step=step: step(*inputs)) for side, step in steps.items()}, clock, rounds
        ),
        BOTH: interleaved({side: _both(step, leaves, grad_output) for side, step in steps.items()}, clock, rounds),
    }
    rows = [
        {"size": name, "dtype": name_of(dtype), **row, "error": errors[row["side"]]}
        for row in figures(times, dict(zip((FORWARD, BOTH), compulsory_bytes(size, inputs))))
    ]
    return rows, [{"size": name, "dtype": name_of(dtype), "side": s, "reason": reason} for s, reason in reasons.items()]


def figures(times: Mapping[str, Mapping[str, Sequence[float]]], num_bytes: Mapping[str, int]) -> list[dict[str, Any]]:
    """Milliseconds of kind -> side -> rounds, made into a row per side: medians, ratios to grid_sample's, GB/s."""
    rows = []
    for side in times[FORWARD]:
        row: dict[str, Any] = {"side": side}
        for kind, of_sides in times.items():
            median = statistics.median(of_sides[side])
            row[kind] = {
                "ms": median,
                "ratio": statistics.median(of_sides[BASE]) / median if BASE in of_sides else None,
                "gb_per_s": gigabytes_per_second(num_bytes[kind], median),
                "rounds_ms": list(of_sides[side]),
            }
        rows.append(row)
    return rows


def true_step(size: Size, inputs: Inputs) -> Truth:
    """The reference in float64, an image at a time: all at once would hold several GB."""
    n, _, m, d = inputs.value.shape
    shape = (n, size.num_queries, m * d)
    grad_output = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(inputs.value)
    images = []
    for i in range(n):
        value, offsets, logits, references = (tensor[i : i + 1].double() for tensor in inputs)
        leaves = [tensor.requires_grad_() for tensor in (value, offsets, logits)]
        result = attention_step_reference(value, size.shapes, offsets, logits, references)
        grads = torch.autograd.grad(result, leaves, grad_output[i : i + 1].double())
        images.append((result.detach(), *grads))
    return Truth(tuple(torch.cat(parts) for parts in zip(*images)), grad_output)


def errors_of(step: Step, leaves: Inputs, truth: Truth) -> dict[str, float]:
    """Largest error of output and gradients, relative to the largest value of each."""
    result = step(*leaves)
    grads = torch.autograd.grad(result, leaves[:3], truth.grad_output)
    return {
        what: ((got.double() - want).abs().max() / want.abs().max()).item()
        for what, got, want in zip(COMPARED, (result.detach(), *grads), truth.compared)
    }


def _both(step: Step, leaves: Inputs, grad_output: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(step(*leaves), leaves[:3], grad_output)


def name_of(dtype: torch.dtype) -> str:
    """ "float32"."""
    return str(dtype).removeprefix("torch.")


def _nan_last(error: float) -> float:
    return error if error == error else float("inf")

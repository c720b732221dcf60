"""Stage 1: doctor, self-test, values and gradients of the operator against float64, the same bits twice, the memory
checker."""

import os
import shutil
import subprocess
import sys

import torch

from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.op import COMPARED, TOLERANCE, errors_of, name_of, true_step
from ddetr.bench.sides import Setting, prepare
from ddetr.bench.sizes import SIZES, Inputs, Size, make_inputs
from ddetr.doctor.diagnosis import examine
from ddetr.ops.backends import chosen_backend, verified_backend
from ddetr.runtime.precision import numerics

_SIZES = {
    name: SIZES[name] for name in ("encoder-800x1066-b1", "decoder-800x1066-b4", "encoder-demo", "decoder-demo")
} | {
    "head size 64": Size(2, [(25, 34), (13, 17)], 65, 4, 64, 8),
    "odd": Size(3, [(7, 5), (3, 2), (1, 1)], 13, 3, 7, 5),
    "one query": Size(1, [(4, 5), (3, 3)], 1, 2, 8, 2),
}
_SMALL = ("head size 64", "odd", "one query")
# Each is a kernel more to compile, for seconds.
_IN_FLOAT16 = _PLAIN = ("encoder-800x1066-b1", "odd")
# A program under the checker is many times as slow: the smallest thing that runs every kernel.
_SANITIZED = (
    "import torch; from ddetr.ops import triton_kernels; from ddetr.ops.self_test import self_test; "
    "self_test(triton_kernels, torch.device('cuda'))"
)


def run(sheet: Sheet, place: Place) -> None:
    """The stage."""
    with sheet.part("self-test of the operator"):
        _self_test(sheet, place)
    with sheet.part("doctor"):
        _doctor(sheet, place)
    with sheet.part("values and gradients"):
        _values(sheet, place)
    with sheet.part("compute-sanitizer", seconds=15) as go:
        if go:
            _sanitizer(sheet, place)


def _self_test(sheet: Sheet, place: Place) -> None:
    os.environ["DDETR_OPS_SELF_TEST"] = "always"
    kind = place.device.type
    first = chosen_backend(kind)
    verified_backend(place.device)
    sheet.check("the operator's self-test", chosen_backend(kind) == first, f"{first} on {place.device}")
    if place.on_gpu:
        sheet.check("the fused kernels are what computes", first == "triton", first)


def _values(sheet: Sheet, place: Place) -> None:
    """Every size and dtype; the backward with the same bits twice where that is asked for."""
    rows, raw, before = [], [], len(sheet.checks)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        kind = name_of(dtype)
        for name in _SMALL if place.small else _SIZES:
            if (dtype == torch.float16 and name not in _IN_FLOAT16) or sheet.left() < 2:
                continue
            size = _SIZES[name]
            inputs = make_inputs(size, place.device, dtype)
            truth = true_step(size, inputs)
            leaves = Inputs(*(tensor.clone().requires_grad_() for tensor in inputs[:3]), inputs.references)
            steps, reasons = prepare(
                Setting(size.shapes, place.device, dtype), ["ours", "ours, plain"] if name in _PLAIN else ["ours"]
            )
            for side, reason in reasons.items():
                sheet.check(f"{side}, {name}, {kind}", False, reason)
            for side, step in steps.items():
                with sheet.part(f"{side}, {name}, {kind}"):
                    errors = errors_of(step, leaves, truth)
                    raw.append({"side": side, "size": name, "dtype": kind, "errors": errors})
                    rows.append([name, kind, side, *(f"{errors[what]:.1e}" for what in COMPARED)])
                    worst = max(errors.values())
                    if not worst <= TOLERANCE[dtype]:
                        sheet.check(f"{side}, {name}, {kind}", False, f"off by {worst:.1e} of the largest value")
            if "ours" in steps:
                with sheet.part(f"deterministic backward, {name}, {kind}"), numerics(deterministic=True, tf32=False):
                    first, second = (
                        torch.autograd.grad(steps["ours"](*leaves), leaves[:3], truth.grad_output) for _ in range(2)
                    )
                    if not all(map(torch.equal, first, second)):
                        sheet.check(f"the deterministic backward gives the same bits twice, {name}, {kind}", False)
            sheet.data["errors"] = raw
            columns = ["size", "dtype", "side", *COMPARED]
            sheet.table("Largest error against float64, relative to the largest value", columns, rows)
    said = ", ".join(f"{name_of(d)} {limit:.0e}" for d, limit in TOLERANCE.items())
    if len(sheet.checks) == before:  # only what is wrong was written down so far
        sheet.check(f"values and gradients within {said}, the deterministic backward the same twice", bool(rows))


def _doctor(sheet: Sheet, place: Place) -> None:
    found = examine(cpu=not place.on_gpu, timeout=min(max(sheet.left() - 5, 5), 40), output=str(place.scratch))
    rows = [[row.section, row.name, row.state, row.text] for row in found.rows if row.state != "ok"]
    if rows:
        sheet.table("What the doctor finds not well", ["section", "what", "state", "found"], rows)
    sheet.check("ddetr doctor", found.exit_code == 0, found.cause.title if found.cause else f"{len(found.rows)} rows")


def _sanitizer(sheet: Sheet, place: Place) -> None:
    program = shutil.which("compute-sanitizer")
    if program is None or not place.on_gpu:
        sheet.skip("compute-sanitizer", "it is not installed" if place.on_gpu else "it is for GPUs")
        return
    command = [program, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", _SANITIZED]
    # An allocation for each tensor, so that its end is known.
    env = {name: value for name, value in os.environ.items() if not name.endswith("ALLOC_CONF")}
    env["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=max(sheet.left() - 2, 1))
    except subprocess.TimeoutExpired:
        sheet.skip("compute-sanitizer", "it did not come to its end in time")
        return
    lines = (done.stdout + done.stderr).strip().splitlines() or ["it said nothing"]
    if "not supported" in " ".join(lines).lower():
        sheet.skip("compute-sanitizer", lines[-1])
    else:
        sheet.check("compute-sanitizer finds nothing", done.returncode == 0, lines[-1])

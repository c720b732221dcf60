"""The Triton kernels without a GPU: values in Triton's interpreter, and compilation for GPUs that are not here.

Subprocesses, since TRITON_INTERPRET must be set before Triton is imported.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

pytest.importorskip("triton")

# ruff: noqa: E501
VALUES = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from attention_inputs import make_inputs, relative_error, truth
from ddetr.ops import triton_kernels
from ddetr.ops.self_test import self_test
self_test(triton_kernels, torch.device("cpu"))
# The interpreter truncates to bfloat16 where a GPU rounds.
for d, dtype, tolerance, kinds in (
    (7, torch.float32, 2e-5, (0, 2, 4)), (64, torch.float32, 2e-5, (2,)), (16, torch.bfloat16, 9e-3, (0, 4)), (16, torch.float16, 1e-3, (2,))
):
    for reference in kinds:
        inputs = make_inputs(n=2, m=2, d=d, q=5, p=3, reference=reference, dtype=torch.bfloat16)
        output, grad_output, grads = truth(inputs)
        value, points, weights, references = inputs.cast(dtype)[1:]
        arguments = (value, inputs.flat, points, weights, references)
        assert relative_error(triton_kernels.forward(*arguments), output) < tolerance
        got = triton_kernels.backward(grad_output.to(dtype), *arguments)
        assert all(a.dtype == t.dtype for a, t in zip(got, (value, points, weights, references)) if a is not None)
        assert max(relative_error(a, b) for a, b in zip(got, grads)) < tolerance, (d, dtype, reference)
inputs = make_inputs(reference=0, q=3, p=1).cast(torch.float32)
for bad in (float("nan"), float("inf"), -3e38):
    inputs.points[0, 1, 0, 0, 0, 0] = bad
    got = triton_kernels.forward(inputs.value, inputs.flat, inputs.points, inputs.weights, None)
    assert got.isfinite().all(), bad
torch.use_deterministic_algorithms(True)
again = [triton_kernels.backward(grad_output.to(dtype), *arguments)[0] for _ in range(2)]
assert torch.equal(*again)
empty = triton_kernels.forward(value, [6, 5, 3, 2], points[:, :0], weights[:, :0], references[:, :0])
assert empty.shape == (2, 0, 32)
"""

CUTS = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from attention_inputs import make_inputs, relative_error, truth
from ddetr.bench.gpu import ideas
from ddetr.bench.gpu.sweep import candidates
from ddetr.ops import triton_kernels
from ddetr.ops.triton_kernels import LAUNCHES, Launch
launches = {{False: [Launch(2, 2, 1), Launch(4, 4, 8, stages=2), Launch(8, 4, evict="evict_last")]}}
launches[True] = list(launches[False])
for kind, launch in LAUNCHES.items():
    launches[kind.backward].append(launch)
for reference in (0, 2, 4):
    shapes = [(6, 5), (3, 2), (2, 2)] if reference == 2 else [(6, 5)]
    inputs = make_inputs(d=16, q=5, p=3, reference=reference, shapes=shapes, dtype=torch.bfloat16)
    output, grad_output, grads = truth(inputs)
    value, points, weights, references = inputs.cast(torch.float32)[1:]
    arguments = (value, inputs.flat, points, weights, references)
    few = None if reference == 2 else 2
    for launch in launches[False][:few]:
        assert relative_error(triton_kernels.forward(*arguments, launch), output) < 2e-5, launch
    for launch in launches[True][:few]:
        got = triton_kernels.backward(grad_output.float(), *arguments, launch=launch)
        assert max(relative_error(a, b) for a, b in zip(got, grads)) < 2e-5, launch
    if reference == 2:
        for launch in (Launch(8, 1), Launch(4, 4)):
            for split in (False, True):
                assert relative_error(ideas.packed_forward(*arguments, launch, split), output) < 2e-5
            got = ideas.backward_in_copies(grad_output.float(), *arguments, launch, copies=2)
            assert max(relative_error(a, b) for a, b in zip(got, grads)) < 2e-5
# As if an image had 2^31 values.
triton_kernels._is_wide = lambda *sizes: True
assert relative_error(triton_kernels.forward(*arguments), output) < 2e-5
got = triton_kernels.backward(grad_output.float(), *arguments)
assert max(relative_error(a, b) for a, b in zip(got, grads)) < 2e-5
"""

TARGETS = (80, 90, 100, 120)  # A100; H100, H200; B200; RTX 50
OFFLINE = Path(__file__).with_name("offline.py")


def run(*arguments, stdin=None, timeout=200, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=environment, input=stdin, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("code", [VALUES, CUTS], ids=["values", "cuts"])
def test_values_in_the_interpreter(code):
    done = run("-c", code, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


class Case(NamedTuple):
    kernel: str  # or the name of an idea
    target: int
    dtype: str
    launch: tuple
    d: int = 32
    reference: int = 2


def default_cases():
    """What is used: on Hopper every head size and dtype, on the other cards the usual one; and the ideas once."""
    from ddetr.ops.triton_kernels import LAUNCHES, Launch, default_launch

    for target in TARGETS:
        for kernel in ("forward", "backward"):
            for d in (16, 32, 64) if target == 90 else (32,):
                for dtype in ("fp32", "bf16"):
                    yield Case(kernel, target, dtype, default_launch(d), d)
    for kernel in ("packed", "split", "copies"):
        yield Case(kernel, 90, "bf16", Launch(8, 4))
    for kind, launch in LAUNCHES.items():
        kernel = "backward" if kind.backward else "forward"
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[kind.dtype]
        yield Case(kernel, 90, dtype, launch, kind.channels)


def all_cases(target):
    """Every cut that the sweep tries, with all kinds of reference points for the usual one."""
    from ddetr.bench.gpu.sweep import candidates
    from ddetr.ops.triton_kernels import Launch, default_launch

    for dtype in ("fp32", "bf16"):
        for kernel in ("forward", "backward"):
            for launch in candidates(kernel == "backward", 32):
                yield Case(kernel, target, dtype, launch)
            for reference in (0, 4):
                for d in (16, 32, 64):
                    yield Case(kernel, target, dtype, default_launch(d), d, reference)
        for kernel in ("packed", "split", "copies"):
            yield Case(kernel, target, dtype, Launch(8, 4))


def allowed_spill(result):
    """None; on sm_120 a few kernels spill two registers, among them the float32 forward for boxes, on sm_100 one does."""
    return 8 if result["target"] >= 100 else 0


def compile_and_check(cases):
    cases = [json.dumps(case._asdict()) for case in cases]
    done = run(OFFLINE, stdin="\n".join(cases), timeout=1500, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(results) == len(cases)
    for result in results:
        assert result["spilled"] <= allowed_spill(result), result
        assert 16 <= result["registers"] <= 255, result
        assert result["loads"] + result["copies"] >= 4, f"rows of values must be read 16 bytes at a time: {result}"
        if result["kernel"] in ("backward", "copies"):
            # sm_80 has no additions of 16 bytes.
            assert (result["additions"] >= 4) == (result["target"] >= 90), result
    return results


needs_offline_compiler = pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="Triton before 3.3 compiles by another interface"
)


@needs_offline_compiler
def test_what_is_used_compiles_without_spills():
    results = compile_and_check(default_cases())
    assert {result["target"] for result in results} == set(TARGETS)


@needs_offline_compiler
@pytest.mark.slow
@pytest.mark.timeout(1600)
@pytest.mark.parametrize("target", TARGETS)
def test_what_the_sweep_tries_compiles_without_spills(target):
    compile_and_check(all_cases(target))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_the_device():
    from ddetr.ops import triton_kernels
    from ddetr.ops.self_test import self_test

    self_test(triton_kernels, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("reference", [0, 2, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.bfloat16, 4e-3), (torch.float16, 4e-3)], ids=str
)
@pytest.mark.parametrize(("n", "d"), [(1, 32), (154, 8), (65, 7), (2, 64)])
def test_values_on_the_device(n, d, dtype, tolerance, reference):
    from attention_inputs import make_inputs, relative_error, truth

    from ddetr.ops import triton_kernels

    inputs = make_inputs(n=n, m=4, d=d, q=70, p=3, reference=reference, dtype=torch.bfloat16)
    output, grad_output, grads = truth(inputs)
    value, points, weights, references = (None if t is None else t.cuda() for t in inputs.cast(dtype)[1:])
    arguments = (value, inputs.flat, points, weights, references)
    assert relative_error(triton_kernels.forward(*arguments).cpu(), output) < tolerance
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            runs = [triton_kernels.backward(grad_output.to("cuda", dtype), *arguments) for _ in range(2)]
        finally:
            torch.use_deterministic_algorithms(False)
        assert max(relative_error(got.cpu(), grad) for got, grad in zip(runs[0], grads)) < tolerance
        if deterministic:
            assert all(torch.equal(a, b) for a, b in zip(*runs) if a is not None)

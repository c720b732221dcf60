"""The Triton kernels without a GPU: values in Triton's interpreter, and compilation for a Hopper GPU offline.

Subprocesses, since TRITON_INTERPRET must be set before Triton is imported.
"""

import os
import subprocess
import sys

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
for d, dtype, tolerance in ((7, torch.float32, 2e-5), (64, torch.float32, 2e-5), (16, torch.bfloat16, 9e-3), (16, torch.float16, 1e-3)):
    for reference in (0, 2, 4):
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

COMPILE = """
import re
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ddetr.ops import triton_kernels as kernels

for kernel, more in ((kernels._forward_kernel, {}), (kernels._backward_kernel, {"WITH_REFERENCE": True})):
    for dtype in ("fp32", "bf16"):
        block_q, block_d = kernels._blocks(32)
        constants = {"D": 32, "REFERENCE": 2, "BLOCK_Q": block_q, "BLOCK_D": block_d, **more}
        types = dict.fromkeys(("value", "output", "grad_output", "points", "weights", "grad_points"), dtype)
        types |= dict.fromkeys(("reference", "grad_value", "grad_weights", "grad_reference"), "fp32") | {"levels": "i32"}
        names = kernel.arg_names
        kind = {n: "constexpr" if n in constants else "*" + types[n] if n in types else "i32" for n in names}
        aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in types if n in names}
        source = ASTSource(kernel, kind, {(names.index(k),): v for k, v in constants.items()}, aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
        ptx = compiled.asm["ptx"]
        assert len(compiled.asm["cubin"]) > 1000
        assert len(re.findall(r"ld.global[.a-z0-9]*.v4", ptx)) >= 4, "rows of values must be read 16 bytes at a time"
        if more:
            assert "add.v4.f32" in ptx, "gradients of values must be added 16 bytes at a time"
        print(kernel.__name__, dtype)
"""


def run(code, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=200)


def test_values_in_the_interpreter():
    done = run(VALUES, TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    not hasattr(torch.compiler, "is_exporting"), reason="Triton before 3.3 compiles by another interface"
)
def test_compiles_for_hopper():
    done = run(COMPILE, TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 4


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

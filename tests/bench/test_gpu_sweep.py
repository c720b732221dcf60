"""What the sweep of the kernels' cuts makes of its candidates, and the host's overhead; its rehearsal is in
test_bench_gpu.py."""

from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")


def test_without_a_device_the_sweep_says_so(monkeypatch):
    from ddetr.bench.gpu import sweep

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    skipped = []
    sheet = SimpleNamespace(skip=lambda what, why: skipped.append(why))
    sweep.run(sheet, SimpleNamespace(device=torch.device("cpu"), small=False))
    assert skipped == ["there is no CUDA device, and TRITON_INTERPRET is not 1"]


def test_the_wrong_and_the_failing_are_left_out():
    from ddetr.bench.gpu.sweep import Timed, _right_ones
    from ddetr.bench.op import Truth

    def fail():
        raise RuntimeError("no such instruction")

    one = torch.ones(2)
    ways = {"right": lambda: one, "wrong": lambda: one + 0.1, "nan": lambda: one * float("nan"), "failing": fail}
    lines, checks = [], []
    sheet = SimpleNamespace(say=lines.append, check=lambda what, ok, detail: checks.append((ok, detail)))
    where = SimpleNamespace(device=torch.device("cpu"))
    truth = Truth((one.double(),) * 4, one)
    good = _right_ones(sheet, "layer", {n: Timed(c, None) for n, c in ways.items()}, truth, False, 1e-4, where)
    assert list(good) == ["right"]
    assert lines == [
        "layer: wrong left out: output is off by 1.0e-01",
        "layer: nan left out: output is off by nan",
        "layer: failing left out: RuntimeError: no such instruction",
    ]
    assert checks == [(False, "1 of 4 are right")]


def test_the_table_can_be_pasted():
    from ddetr.bench.gpu.sweep import literal
    from ddetr.ops.triton_kernels import Kind, Launch

    table = {Kind(True, 32, torch.bfloat16, False): Launch(8, 4, 2, evict="evict_last")}
    names = {"Kind": Kind, "Launch": Launch, "torch": torch}
    exec(literal(table), names)
    assert names["LAUNCHES"] == table


def test_overhead_of_a_call():
    from ddetr.bench.gpu.launch import launch_overhead
    from ddetr.ops import triton_kernels

    kernel = triton_kernels._forward_kernel
    found = launch_overhead(torch.device("cpu"), calls=20)
    assert triton_kernels._forward_kernel is kernel
    assert found["forward"] > found["of it the module of the kernels"] > found["of it an allocation"] > 0
    assert found["forward and backward"] > found["forward"]

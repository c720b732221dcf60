"""`ddetr bench op`: files and figures, and that nothing wrong or missing passes silently. Times are never asserted."""

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.bench import growth, op, record, sides, tables
from ddetr.bench.sizes import SIZES, Size, chosen_sizes, compulsory_bytes, make_inputs, num_sampled_rows, pyramid
from ddetr.bench.timing import Clock, cuda_clock, interleaved
from ddetr.cli import main as cli
from ddetr.errors import InputError
from ddetr.ops.reference import ms_deform_attn_reference, sampling_locations_reference
from ddetr.runtime import environment

CPU = torch.device("cpu")
CUDA_ONLY = {"official kernel", "hub kernel", "hub kernel, bfloat16", "msda-triton", "mmcv"}
OURS = {"ours", "ours, plain", "embedding_bag", "grid_sample"}


@pytest.fixture
def bench(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., Any]:
    """Run `ddetr bench op ...` on the tiny size with little of everything: exit code, output, error."""
    monkeypatch.setattr("ddetr.bench.timing._COPY_BYTES", 2**16)
    monkeypatch.setattr("ddetr.bench.timing._LEAST_MS", 0)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        code = cli.main(["bench", "op", "--rounds", "1", "--sizes", "tiny", *arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def test_the_files_hold_what_was_measured(bench: Callable[..., Any]) -> None:
    threads = torch.get_num_threads()
    outcome = bench("--dtype", "both", "--output", "out")
    assert outcome.code == 0, outcome.err
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in Path("out").iterdir()) == ["op.json", "op.md"]
    report = json.loads(Path("out/op.json").read_text())
    assert report["command"] == "ddetr bench op --sizes tiny --dtype both --rounds 1"
    assert report["machine"]["torch"] == torch.__version__
    assert report["machine"]["processor"]
    assert report["machine"]["backend"].split()[0] in ("native", "embedding_bag", "reference")
    assert report["copy_gb_per_s"] > 0
    for dtype, tolerance in (("float32", 1e-4), ("bfloat16", 2e-2)):
        rows = [row for row in report["rows"] if row["dtype"] == dtype]
        assert {row["side"] for row in rows} >= OURS
        for row in rows:
            assert row["size"] == "tiny"
            assert set(row["error"]) == set(op.COMPARED)
            assert max(row["error"].values()) < tolerance
            for kind in (op.FORWARD, op.BOTH):
                assert row[kind]["ms"] > 0
                assert row[kind]["gb_per_s"] > 0
                assert len(row[kind]["rounds_ms"]) == 1
        base = next(row for row in rows if row["side"] == "grid_sample")
        assert base[op.FORWARD]["ratio"] == 1
        assert {row["side"] for row in report["left_out"] if row["dtype"] == dtype} >= CUDA_ONLY
    text = Path("out/op.md").read_text()
    assert len(re.findall(r"^\| tiny \| ours \| [\d.]+ \([\d.]+x\) \| ", text, re.MULTILINE)) == 2
    assert "- official kernel: runs on CUDA only\n" in text
    assert "left out: mmcv: runs on CUDA only" in outcome.out
    assert "ours against float64, bfloat16, " in outcome.out


def test_what_is_not_installed_is_listed(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "transformers":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = bench()
    assert outcome.code == 0, outcome.err
    assert re.search("left out: transformers: .*transformers", outcome.out)


def test_a_wrong_side_is_refused(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    right = sides.SIDES["ours"]

    def slightly_larger(setting: sides.Setting) -> sides.Step:
        return lambda *inputs: right(setting)(*inputs) * 1.001

    def gradient_forgotten(setting: sides.Setting) -> sides.Step:
        return lambda value, offsets, *rest: right(setting)(value, offsets.detach(), *rest) + 0 * offsets.sum()

    def not_a_number(setting: sides.Setting) -> sides.Step:
        return lambda *inputs: right(setting)(*inputs) * float("nan")

    def raises(setting: sides.Setting) -> sides.Step:
        def step(*inputs: Tensor) -> Tensor:
            raise RuntimeError("no kernel image\nfor this device")

        return step

    for build in (slightly_larger, gradient_forgotten, not_a_number, raises):
        monkeypatch.setitem(sides.SIDES, build.__name__, build)
    outcome = bench("--output", "out")
    assert outcome.code == 0, outcome.err
    assert re.search("left out: slightly_larger: wrong: its .* is off by 1.0e-03 of the largest value", outcome.out)
    assert "left out: gradient_forgotten: wrong: its gradient of offsets is off by 1.0e+00" in outcome.out
    assert "left out: not_a_number: wrong: its output is off by nan" in outcome.out
    assert "left out: raises: RuntimeError: no kernel image\n" in outcome.out
    rows = json.loads(Path("out/op.json").read_text())["rows"]
    assert not {row["side"] for row in rows} & {"slightly_larger", "gradient_forgotten", "not_a_number", "raises"}


def test_ratios_and_bandwidth_from_given_times() -> None:
    times = {
        op.FORWARD: {"ours": [3.0, 1.0, 2.0], "grid_sample": [10.0, 50.0, 20.0]},
        op.BOTH: {"ours": [4.0], "grid_sample": [2.0]},
    }
    ours, base = op.figures(times, {op.FORWARD: 4_000_000, op.BOTH: 8_000_000})
    assert (ours["side"], ours[op.FORWARD]["ms"], ours[op.FORWARD]["ratio"]) == ("ours", 2, 10)
    assert ours[op.FORWARD]["gb_per_s"] == pytest.approx(2)
    assert ours[op.BOTH]["ratio"] == 0.5
    assert base[op.FORWARD]["ratio"] == 1
    alone = op.figures({op.FORWARD: {"ours": [1.0]}, op.BOTH: {"ours": [1.0]}}, {op.FORWARD: 1, op.BOTH: 1})
    assert alone[0][op.FORWARD]["ratio"] is None
    assert "-" in tables._cells({**alone[0], "error": {"output": 0.0}})


def test_sides_take_turns() -> None:
    ran: list[str] = []
    ticks = iter(range(100))
    clock = Clock("ticks", lambda call, times: (call(), float(next(ticks)))[1], 0)
    times = interleaved({"a": lambda: ran.append("a"), "b": lambda: ran.append("b")}, clock, 2)
    assert ran == ["a", "a", "b", "b"] * 2
    assert times == {"a": [1, 5], "b": [3, 7]}


def test_short_calls_are_repeated() -> None:
    measured: list[int] = []

    def milliseconds(call: Callable[[], object], times: int) -> float:
        measured.append(times)
        return 2.0 * times

    assert interleaved({"a": lambda: None}, Clock("", milliseconds, 5), 1) == {"a": [2.0]}
    assert measured == [1, 1, 1, 3]


def test_the_cuda_clock_flushes_before_a_single_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for the device: what happens between the two events is the call alone."""
    log: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            log.append("event")

        def elapsed_time(self, end: "Event") -> float:
            return 0.25

    monkeypatch.setattr("ddetr.bench.timing._FLUSH_BYTES", 2**27)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: log.append("wait"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(L2_cache_size=2**20))
    monkeypatch.setattr(Tensor, "zero_", lambda tensor: log.append(f"flush {tensor.numel()}"))
    times = interleaved({"a": lambda: log.append("call")}, cuda_clock(CPU), 1)
    measured = ["wait", f"flush {2**26}", f"flush {2**26}", "event", "call", "event", "wait"]
    assert log == measured * 2
    assert times == {"a": [0.25]}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--sizes encoder-demu", "--sizes: no size is called 'encoder-demu' (did you mean encoder-demo?): expected"),
        ("--sizes none", "--sizes none leaves nothing to measure: add --growth, or name some sizes"),
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--threads 0", "--threads: expected at least 1, got 0"),
        ("--dtype float16", "--dtype: expected one of auto, float32, bfloat16, both, got 'float16'"),
        ("--device gpu", "--device: expected one of cpu, cuda, got 'gpu'"),
        ("--size tiny", "unknown option --size (did you mean --sizes?)"),
    ],
)
def test_wrong_options(bench: Callable[..., Any], line: str, message: str) -> None:
    outcome = bench(*line.split())
    assert outcome.code == 2
    assert outcome.err.startswith(f"ddetr: error: {message}")
    assert len(outcome.err.splitlines()) == 1


def test_cuda_without_a_gpu(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    outcome = bench("--device", "cuda")
    assert outcome.code == 2
    assert outcome.err.strip() == (
        "ddetr: error: device cuda: expected auto, cpu, cuda or cuda:N, and PyTorch sees no GPU here "
        "(torch.cuda.is_available() is False); use cpu"
    )


def test_sizes_are_chosen_by_name_and_pattern() -> None:
    assert list(chosen_sizes("decoder-demo, encoder-*-b4")) == [
        "encoder-480x640-b4",
        "encoder-800x1066-b4",
        "encoder-800x1333-b4",
        "decoder-demo",
    ]
    assert chosen_sizes("none") == {}
    with pytest.raises(InputError, match="no size is called ''"):
        chosen_sizes("tiny,")
    assert SIZES["encoder-800x1066-b1"].shapes == [(100, 134), (50, 67), (25, 34), (13, 17)]
    assert SIZES["encoder-800x1066-b1"].num_queries == 17821


def test_inputs_keep_away_from_the_borders_between_cells() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        size = Size(2, pyramid(160, 213))
        inputs = make_inputs(size, CPU, dtype)
        cells = torch.tensor([(w, h) for h, w in size.shapes]).view(-1, 1, 2)
        pixels = inputs.references[:, :, None, :, None] * cells - 0.5 + inputs.offsets.double()
        assert (pixels - pixels.round()).abs().min() > 0.01
        inside = ((pixels > -1) & (pixels < cells)).all(-1).float().mean()
        assert inside > 0.6


def test_compulsory_bytes() -> None:
    size = Size(1, [(2, 3)], 50, heads=2, head_size=4, points=3)
    value, offsets, logits, references, output = 6 * 8, 50 * 2 * 3 * 2, 50 * 2 * 3, 50 * 2, 50 * 8
    forward = value + offsets + logits + references + output
    backward = forward + value + offsets + logits
    assert compulsory_bytes(size, make_inputs(size, CPU)) == (4 * forward, 4 * (forward + backward))

    inputs = make_inputs(size, CPU)._replace(
        offsets=torch.zeros(1, 1, 2, 1, 2, 2), references=torch.tensor([[[[0.5, 0.5]]]])
    )
    inputs.offsets[:, :, 0, :, 0] += torch.tensor([0.1, 0.1])  # four cells around the middle
    inputs.offsets[:, :, 0, :, 1] += torch.tensor([1.1, 0.1])  # two of them inside, one of which is new in each row
    inputs.offsets[:, :, 1] += 9  # outside
    assert num_sampled_rows(Size(1, [(2, 4)], 1, heads=2, points=2), inputs) == 6


class _Extension:
    """The two functions of the official extension, computed by the reference."""

    @staticmethod
    def ms_deform_attn_forward(value, shapes, starts, locations, weights, step):
        assert starts.tolist() == [0, 4800]
        assert value.shape[0] % min(value.shape[0], step) == 0
        return ms_deform_attn_reference(value, shapes.tolist(), locations, weights)

    @staticmethod
    def ms_deform_attn_backward(value, shapes, starts, locations, weights, grad, step):
        leaves = [tensor.detach().requires_grad_() for tensor in (value, locations, weights)]
        with torch.enable_grad():
            output = ms_deform_attn_reference(leaves[0], shapes.tolist(), *leaves[1:])
        return torch.autograd.grad(output, leaves, grad)


def test_the_kernels_of_others_are_called_as_they_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins: no GPU here, and none of them builds everywhere."""

    def triton(img, img_shapes, sampling_points, attention_weights, padding_mode, align_corners):
        assert (padding_mode, align_corners) == ("zeros", False)
        output = ms_deform_attn_reference(img, img_shapes.tolist(), sampling_points, attention_weights)
        return output.unflatten(2, img.shape[2:])

    frontend = SimpleNamespace(triton_multiscale_deformable_attention=triton)
    public = SimpleNamespace(__module__="msda_triton.frontend")
    mmcv = SimpleNamespace(
        MultiScaleDeformableAttnFunction=SimpleNamespace(
            apply=lambda value, shapes, starts, locations, weights, step: ms_deform_attn_reference(
                value, shapes.tolist(), locations, weights
            )
        )
    )
    kernels = SimpleNamespace(get_kernel=lambda name, version=None: _Extension)
    for name, module in {
        "MultiScaleDeformableAttention": _Extension,
        "kernels": kernels,
        "msda_triton": SimpleNamespace(multiscale_deformable_attention=public),
        "msda_triton.frontend": frontend,
        "mmcv": SimpleNamespace(),
        "mmcv.ops": SimpleNamespace(),
        "mmcv.ops.multi_scale_deform_attn": mmcv,
    }.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(sides, "_check_cuda", lambda setting: None)
    sides._hub_kernel_or_reason.cache_clear()
    size = SIZES["tiny"]._replace(shapes=[(60, 80), (30, 40)])
    try:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = make_inputs(size, CPU, dtype)
            steps, reasons = sides.prepare(sides.Setting(size.shapes, CPU, dtype), CUDA_ONLY)
            assert set(reasons) == ({"hub kernel, bfloat16"} if dtype == torch.float32 else set())
            truth = op.true_step(size, inputs)
            leaves = type(inputs)(*(t.clone().requires_grad_() for t in inputs[:3]), inputs.references)
            errors = {name: op.errors_of(step, leaves, truth) for name, step in steps.items()}
            for name, error in errors.items():
                if name != "hub kernel, bfloat16":
                    assert max(error.values()) < op.TOLERANCE[dtype], name
        assert errors["hub kernel, bfloat16"]["output"] > op.TOLERANCE[torch.bfloat16]  # its locations are rounded
    finally:
        sides._hub_kernel_or_reason.cache_clear()


def test_a_hub_kernel_that_does_not_load_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def get_kernel(name: str) -> Any:
        tried.append(name)
        raise ConnectionError("no network")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setattr(sides, "_check_cuda", lambda setting: None)
    sides._hub_kernel_or_reason.cache_clear()
    setting = sides.Setting([(2, 3)], CPU, torch.float32)
    for _ in range(2):
        _, reasons = sides.prepare(setting, ["hub kernel"])
        assert reasons == {"hub kernel": "ConnectionError: no network"}
    assert tried == ["kernels-community/deformable-detr"]
    sides._hub_kernel_or_reason.cache_clear()


def test_softmax_and_locations_outside_are_those_of_the_reference() -> None:
    size = SIZES["tiny"]
    inputs = make_inputs(size, CPU)
    seen: list[Tensor] = []
    step = sides._plain(sides.Setting(size.shapes, CPU, torch.float32), lambda *tensors: seen.extend(tensors))
    step(*inputs)
    expected = sampling_locations_reference(inputs.offsets, inputs.references, size.shapes)
    torch.testing.assert_close(seen[1], expected)
    torch.testing.assert_close(seen[2], inputs.logits.flatten(3).softmax(-1).view(inputs.logits.shape))


def test_growth_is_measured_and_drawn(bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    small = Size(1, [(6, 8)], 4, 2, 8, 1)
    large = small._replace(shapes=[(12, 16)], queries=8, points=2)
    too_large = small._replace(shapes=[(60, 80)])
    panels = {name: panel._replace(sizes={1: small, 2: large}) for name, panel in growth.PANELS.items()}
    panels["image"] = panels["image"]._replace(sizes={1: small, 2: large, 3: too_large})
    monkeypatch.setattr(growth, "PANELS", panels)
    monkeypatch.setitem(growth._MOST_OPERATIONS, "cpu", 4 * 2 * 8 * 4 * 60 * 80 - 1)
    outcome = bench("--growth", "--sizes", "none", "--output", "out")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in Path("out").iterdir()) == ["growth.json", "growth.png"]
    assert Path("out/growth.png").read_bytes().startswith(b"\x89PNG")
    report = json.loads(Path("out/growth.json").read_text())
    assert report["dtype"] == "float32"
    assert report["machine"]["processor"]
    assert len(report["curves"]) == 4 * 3
    for curve in report["curves"]:
        whole = [1, 2, 3] if curve["panel"] == "image" and curve["side"] != growth.DENSE else [1, 2]
        assert curve["x"] == whole
        assert len(curve["ms"]) == len(whole)
        assert min(curve["ms"]) > 0
    assert "pixels of the image" in outcome.out


def test_exponents() -> None:
    assert growth.exponent([1, 10, 100], [3, 30, 300]) == pytest.approx(1)
    assert growth.exponent([1, 2, 4], [5, 5, 5]) == pytest.approx(0)
    assert growth.exponent([2, 4], [4, 16]) == pytest.approx(2)
    assert growth.exponent([2], [4]) is None


def test_the_commit_is_only_that_of_our_own_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert record.commit() is None or re.fullmatch(r"[0-9a-f]{4,}( with changes)?", record.commit())
    monkeypatch.setattr(environment, "_PACKAGE", tmp_path)
    assert record.commit() is None


def test_command_line() -> None:
    def function(*, sizes: str = "default", growth: bool = False, output: str | None = None) -> None: ...

    settings = {"sizes": "encoder-*", "growth": True, "output": "somewhere"}
    assert record.command_line("bench op", function, settings) == "ddetr bench op --sizes 'encoder-*' --growth true"

"""`ddetr bench train`: it measures the engine's own step, every side does the same work, and nothing is left out
unsaid."""

import json
import logging
import shlex
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.bench import official, stopwatch
from ddetr.bench import train as bench
from ddetr.bench.official import LayerByLayerCriterion, cross_image_match, grid_sample_operator, official_step
from ddetr.bench.stopwatch import StopWatch
from ddetr.cli import main as cli
from ddetr.datasets import normalize_images
from ddetr.datasets.config import DataConfig
from ddetr.engine import compile as engine_compile
from ddetr.engine.compile import CompiledForward
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.optimizer import parameter_groups
from ddetr.engine.step import REGIONS
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.models.matcher import HungarianMatcher

CPU = torch.device("cpu")
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")


@pytest.fixture
def run(
    shapes: Path,
    tiny_model: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Any]:
    """Run `ddetr bench train ...` on a tiny detector: exit code, output, error and what train.json holds."""
    monkeypatch.chdir(tmp_path)
    options = {f"--model.{name}": str(value).lower() for name, value in tiny_model.items()}
    options |= {
        "--batch_size": "4",
        "--device_batch_size": "2",
        "--steps": "2",
        "--warmup": "1",
        "--data.num_workers": "0",
    }

    def call(*arguments: str, data: bool = True) -> Any:
        capsys.readouterr()
        source = ["--data", str(shapes), "--data.image_size", "64"] if data else []
        words = [word for pair in options.items() for word in pair]
        command = ["ddetr", "bench", "train", *words, *source, "--output", "out", *arguments]
        monkeypatch.setattr("sys.argv", command)
        code = cli.main()
        captured = capsys.readouterr()
        file = Path("out/train.json")
        report = json.loads(file.read_text()) if file.exists() else {}
        return SimpleNamespace(command=command, code=code, out=captured.out, err=captured.err, report=report)

    return call


def test_the_engines_step_is_split_and_set_beside_the_others(run: Callable[..., Any]) -> None:
    outcome = run("--model.dropout", "0")
    assert outcome.code == 0, outcome.err
    report, engine = outcome.report, outcome.report["engine"]
    assert tuple(engine["ms"]) == REGIONS
    for name in ("data wait", "forward", "matching", "losses", "backward", "optimiser"):
        assert engine["ms"][name] > 0, name
    assert sum(engine["share"].values()) == pytest.approx(1)
    assert len(engine["steps_ms"]) == 2
    assert engine["images_per_s"] == pytest.approx(2 * 4 * 1000 / sum(engine["steps_ms"]))
    assert engine["peak_bytes"] > 2**26
    assert [row["side"] for row in report["sides"]] == ["ours", "official", "transformers"]
    assert report["sides"][0]["ratio"] == 1
    for row in report["sides"]:
        assert row["images_per_s"] == pytest.approx(4000 / row["step_ms"])
        assert row["ratio"] == pytest.approx(row["step_ms"] / report["sides"][0]["step_ms"])
    # The same network, batches, dropout and rates: after the same steps the same loss. transformers' is another
    # network.
    ours, theirs = (row["last_loss"] for row in report["sides"][:2])
    assert theirs == pytest.approx(ours, rel=1e-3)
    assert report["left_out"] == []
    assert report["settings"]["batch_size"] == 4
    assert report["machine"]["torch"] == torch.__version__
    text = Path("out/train.md").read_text()
    assert "| matching | " in text
    assert "| official | " in text
    assert "data wait" in outcome.out


def test_random_images_need_no_data(run: Callable[..., Any]) -> None:
    outcome = run("--synthetic", "64x96", "--sides", "ours", "--epochs", "7", data=False)
    assert outcome.code == 0, outcome.err
    assert outcome.report["settings"]["images"] == "random, 64x96"
    assert outcome.report["sides"] == []
    assert outcome.report["not_measured"] == {}  # epochs do nothing to a step
    assert outcome.report["command"] == shlex.join(outcome.command)


def test_options_reach_the_step(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled forward, checkpointed layers, bfloat16: a measurement that ignored them would be of something else."""
    seen: list[tuple[bool, torch.dtype]] = []
    graphs: list[Any] = []

    def keep(graph: Any, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph

    forward = CompiledForward.__call__

    def spy(compiled: CompiledForward, images: Tensor, mask: Tensor | None) -> Any:
        outputs = forward(compiled, images, mask)
        seen.append((compiled.model.transformer.encoder.activation_checkpointing, outputs["pred_logits"].dtype))
        return outputs

    monkeypatch.setattr(engine_compile, "BACKEND", keep)
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    monkeypatch.setattr(CompiledForward, "__call__", spy)
    torch._dynamo.reset()
    flags = ("--compile", "--activation_checkpointing", "--precision", "bf16")
    outcome = run("--synthetic", "64x96", "--sides", "ours", *flags, data=False)
    torch._dynamo.reset()
    assert outcome.code == 0, outcome.err
    assert set(seen) == {(True, torch.bfloat16)}
    assert len(graphs) == 1
    assert "checkpointing on, compile on" in outcome.out


def test_what_would_change_a_step_and_is_not_measured_is_named() -> None:
    config = TrainConfig(DataConfig(""), optim=OptimConfig(ema_decay=0.99), epochs=3)
    assert bench._not_measured(config) == {"--optim.ema_decay": 0.99}
    assert bench._not_measured(replace(config, optim=OptimConfig())) == {}


def test_a_side_that_fails_is_listed(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.split(".")[0] == "transformers" or name == "ddetr.bench.huggingface":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "transformers", None)
    outcome = run("--synthetic", "64x64", "--sides", "ours,transformers", data=False)
    assert outcome.code == 0, outcome.err
    assert [row["side"] for row in outcome.report["sides"]] == ["ours"]
    assert outcome.report["left_out"] == [{"side": "transformers", "reason": "transformers is not installed"}]
    assert "left out: transformers: transformers is not installed" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps: expected at least 1, got 0"),
        (["--sides", "ours,mine"], "expected some of ours, official, transformers, got mine"),
        (["--synthetic", "big"], "expected HEIGHTxWIDTH in pixels, such as 800x1066, got 'big'"),
        (["--device_batch_size", "auto"], "--batch_size and --device_batch_size are numbers here"),
        ([], "needs --data PATH, or --synthetic"),
    ],
)
def test_mistakes(run: Callable[..., Any], arguments: list[str], message: str) -> None:
    outcome = run(*arguments, data=False)
    assert outcome.code == 2
    assert message in outcome.err


def test_regions_inside_of_others_are_counted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 10**9, 10**6))  # each look at the clock takes a millisecond
    monkeypatch.setattr(stopwatch.time, "perf_counter_ns", lambda: next(now))
    watch = StopWatch(CPU)
    for _ in range(2):
        with watch.region("losses"), watch.region("matching"):
            pass
        watch.end_step()
    rows = watch.steps()
    assert [{name: value for name, value in row.items() if value} for row in rows] == [
        {"the rest": 2.0, "losses": 2.0, "matching": 1.0},
        {"the rest": 2.0, "losses": 2.0, "matching": 1.0},
    ]


def batch(seed: int, counts: list[int]) -> tuple[Tensor, Tensor, list[dict[str, Tensor]]]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (len(counts), 3, 64, 96), dtype=torch.uint8, generator=generator)
    mask = torch.zeros(len(counts), 64, 96, dtype=torch.bool)
    mask[0, 50:] = True
    targets = [
        {
            "labels": torch.randint(5, (count,), generator=generator),
            "boxes": torch.rand(count, 4, generator=generator) * 0.4 + 0.1,
        }
        for count in counts
    ]
    return images, mask, targets


@pytest.mark.parametrize("two_stage", [False, True])
def test_the_official_step_is_ours(tiny_model: dict[str, Any], two_stage: bool) -> None:
    """The same loss and the same weights after a step of two micro-batches, one without an object: it is the same
    work."""
    config = tiny_model | {"num_classes": 5, "dropout": 0.0, "two_stage": two_stage, "freeze_backbone": "stem"}
    optim = OptimConfig(lr=1e-3)
    batches = [batch(0, [3, 4]), batch(1, [0, 0])]
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(DeformableDETR(**config).train())
    theirs, ours = models
    step = official_step(theirs, LossWeights(), parameter_groups(theirs, optim, backbone_pretrained=False), optim, CPU)

    groups = parameter_groups(ours, optim, backbone_pretrained=False)
    criterion, optimizer, expected = build_criterion(ours), torch.optim.AdamW(groups, lr=optim.lr), 0.0
    for images, mask, targets in batches:
        total = criterion.total(
            criterion(ours(normalize_images(images, mask, ours.image_mean, ours.image_std), mask), targets, 7.0)
        )
        total.backward()
        expected += total.item()
    torch.nn.utils.clip_grad_norm_(ours.parameters(), optim.clip_max_norm)
    optimizer.step()

    loss = step(batches)
    assert loss == pytest.approx(expected, rel=2e-2)  # an image without objects counts as one there
    if not two_stage:
        moved = [(a - b).abs().max().item() for a, b in zip(theirs.parameters(), ours.parameters())]
        assert max(moved) < 2e-3


def test_the_official_criterion_gives_our_total(tiny_model: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(**tiny_model | {"num_classes": 5, "dropout": 0.0, "two_stage": True}).eval()
    images, mask, targets = batch(0, [3, 4])
    outputs = model(normalize_images(images, mask), mask)
    criterion = build_criterion(model)
    expected = criterion.total(criterion(outputs, targets))
    assert LayerByLayerCriterion(LossWeights())(outputs, targets).item() == pytest.approx(expected.item(), rel=1e-5)
    with grid_sample_operator():
        other = model(normalize_images(images, mask), mask)
    assert torch.allclose(other["enc_outputs"]["pred_logits"], outputs["enc_outputs"]["pred_logits"], atol=1e-5)
    assert official.attention.ms_deform_attn_step is not official.attention_step_reference


def test_the_cross_image_matching_is_ours() -> None:
    generator = torch.Generator().manual_seed(0)
    _, _, targets = batch(3, [4, 0, 9])
    outputs = {
        "pred_logits": torch.randn(3, 20, 5, generator=generator),
        "pred_boxes": torch.rand(3, 20, 4, generator=generator) * 0.4 + 0.1,
    }
    for theirs, ours in zip(cross_image_match(outputs, targets), HungarianMatcher()(outputs, targets)):
        assert dict(zip(*(index.tolist() for index in theirs))) == dict(zip(*(index.tolist() for index in ours)))

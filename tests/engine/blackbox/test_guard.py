"""Steps that fail: skipped or fatal."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from failing_steps import break_backward, bundles_of
from forks import Forks
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddetr.checkpoint import load_checkpoint
from ddetr.datasets import load_annotations
from ddetr.datasets.config import DataConfig
from ddetr.engine.blackbox.replay import replay
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

STEPS = 4  # of an epoch


def test_two_bad_steps_are_skipped_and_change_nothing(
    settings: dict[str, Any],
    break_loss: Callable[[set[int]], None],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Neither weights nor batch norms nor the optimiser's moments; the schedule and the step count go on."""
    break_loss({2, 6})
    before, seen = {}, []
    original = DetectionModule.training_step

    def watched(self: DetectionModule, batch: Any, batch_idx: int) -> Any:
        state = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        moments = str(self.optimizers().state_dict()["state"])
        out = original(self, batch, batch_idx)
        same = all(torch.equal(tensor, state[name]) for name, tensor in self.model.state_dict().items())
        seen.append((self.guard.skipped, same and moments == str(self.optimizers().state_dict()["state"])))
        before[len(seen)] = state
        return out

    monkeypatch.setattr(DetectionModule, "training_step", watched)
    with caplog.at_level(logging.WARNING, "ddetr"):
        result = train(TrainConfig(**settings))
    assert seen == [(number in (2, 6), number in (2, 6)) for number in range(1, 9)]
    lines = [record.message for record in caplog.records if record.name == "ddetr.engine.blackbox.guard"]
    assert [line.split()[1] for line in lines] == ["2", "6"]
    assert "loss nan" in lines[0]
    assert "images " in lines[0]
    assert "Skipped, 1 of at most 10" in lines[0]
    rows = (result.path / "train.csv").read_text().splitlines()
    assert len(rows) == 1 + 8
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(result.path / "last.pth").model.values())
    bundles = bundles_of(result.path)
    assert [path.name for path in bundles] == ["step-000002", "step-000006"]
    state = torch.load(bundles[1] / "state.pt", weights_only=True)
    for name, tensor in before[6].items():
        assert torch.equal(state["weights"][name], tensor), name


@pytest.mark.parametrize(
    ("steps", "allowed", "stops_at", "why"),
    [
        ({2, 4, 6}, 2, 6, "3 bad steps are more than --max_bad_steps 2 allows"),
        ({4, 5, 6, 7}, 10, 6, "3 bad steps in a row"),
        ({3}, 0, 3, "1 bad steps are more than --max_bad_steps 0"),
    ],
)
def test_too_many_bad_steps_stop_the_run_before_the_checkpoint(
    settings: dict[str, Any],
    break_loss: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    steps: set[int],
    allowed: int,
    stops_at: int,
    why: str,
) -> None:
    """The last good one loads, and the run goes on from it to the end that it would have had."""
    run = Path(settings["output"])
    with monkeypatch.context():
        break_loss(steps)
        with pytest.raises(FloatingPointError, match=rf"step {stops_at} has loss nan.*{why}") as error:
            train(TrainConfig(**settings | {"max_bad_steps": allowed}))
    has_checkpoint = stops_at > STEPS
    assert (run / "last.ckpt").exists() == has_checkpoint
    assert (f"{run / 'last.ckpt'}, from which" in str(error.value)) == has_checkpoint
    assert f"ddetr replay {run / 'blackbox'}" in str(error.value)
    if has_checkpoint:
        state = torch.load(run / "last.ckpt", weights_only=True)
        assert state["global_step"] == STEPS
        counts = next(value for name, value in state["callbacks"].items() if name.startswith("StepGuard"))
        assert counts == {"total": len([step for step in steps if step <= STEPS]), "in_a_row": int(STEPS in steps)}
        monkeypatch.undo()
        train(TrainConfig(**settings | {"resume": "last", "max_bad_steps": allowed + 1}))


def test_weights_that_an_update_broke_are_never_saved(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last step of the second epoch has a finite loss and gradient, and infinite weights after it."""
    original = torch.optim.AdamW.step

    def step(self: torch.optim.AdamW, closure: Any = None) -> Any:
        result = original(self, closure)
        self.calls = getattr(self, "calls", 0) + 1
        if self.calls == 2 * STEPS:
            with torch.no_grad():
                self.param_groups[0]["params"][0].fill_(float("inf"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    with pytest.raises(FloatingPointError, match="step 8 left weights that are not finite, .*last.ckpt"):
        train(TrainConfig(**settings))
    run = Path(settings["output"])
    assert (
        torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2 * STEPS - 1
    )  # the step before an epoch's last is saved
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(run / "last.pth").model.values())


def test_costs_that_the_matcher_repaired_are_reported(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A prediction that no object needs may be NaN without the loss noticing."""
    from ddetr.models.matcher import HungarianMatcher

    original, calls = HungarianMatcher._cost, []

    def spoiled(self: HungarianMatcher, outputs: Any, targets: Any) -> Tensor:
        cost = original(self, outputs, targets)
        if type(cost) is Tensor:  # not that of the estimate of the memory
            calls.append(1)
        if len(calls) == 1 and cost.numel():
            cost[0, 0, 0] = float("nan")
        return cost

    monkeypatch.setattr(HungarianMatcher, "_cost", spoiled)
    train(TrainConfig(**settings))
    lines = [record.message for record in caplog.records if record.name == "ddetr.engine.blackbox.guard"]
    assert len(lines) == 1
    assert lines[0].startswith("step 1: 1 matching costs of images ")


def test_a_run_that_stopped_at_bad_steps_resumes_to_the_same_weights(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The skipped step of the first epoch counts for schedule and random numbers as in the run that was not stopped."""
    break_loss({2})
    whole = train(TrainConfig(**settings | {"output": str(tmp_path / "whole")}))
    monkeypatch.undo()
    break_loss({2, 6})
    with pytest.raises(FloatingPointError, match="2 bad steps are more than"):
        train(TrainConfig(**settings | {"max_bad_steps": 1}))
    monkeypatch.undo()
    resumed = train(TrainConfig(**settings | {"max_bad_steps": 1, "resume": "last"}))
    one, other = (load_checkpoint(run.path / "last.pth").model for run in (whole, resumed))
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_out_of_memory_is_recorded_and_not_tried_again(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddetr.models.attention import MSDeformAttn

    calls = []

    forward = MSDeformAttn.forward

    def full(*arguments: Any) -> Any:
        if isinstance(arguments[1], FakeTensor):  # the estimate of the memory
            return forward(*arguments)
        calls.append(1)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MSDeformAttn, "forward", full)
    with pytest.raises(InputError, match="out of memory on cpu with a batch of 1 images"):
        train(TrainConfig(**settings))
    assert len(calls) == 1
    (bundle,) = bundles_of(Path(settings["output"]))
    assert torch.load(bundle / "state.pt", weights_only=True)["weights"]
    assert "failed in transformer.encoder.layers.0.self_attn" in (bundle / "what.txt").read_text()


def scaled_module(shapes: Path, tiny_model: dict[str, Any], scale: float) -> tuple[DetectionModule, pl.Trainer]:
    annotations = load_annotations(shapes, "train")
    torch.manual_seed(0)
    model = DeformableDETR(**tiny_model | {"num_classes": 3, "dropout": 0.0})
    module = DetectionModule(
        model,
        build_criterion(model),
        OptimConfig(lr=1e-3),
        CocoEvaluator(annotations),
        backbone_pretrained=False,
        steps_per_epoch=2,
        total_steps=2,
        seed=3,
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        plugins=[MixedPrecision("bf16-mixed", "cpu")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
    )
    trainer.precision_plugin.scaler = scaler
    config = DataConfig("unused", augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(annotations, annotations, config, batch_size=4, device_batch_size=4, seed=1)
    return module, trainer, data


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_an_overflow_that_the_scaler_answers_is_no_bad_step(shapes: Path, tiny_model: dict[str, Any]) -> None:
    module, trainer, data = scaled_module(shapes, tiny_model, 3e38)
    trainer.fit(module, datamodule=data)
    assert module.guard.skipped
    assert module.guard.total == 0
    assert trainer.precision_plugin.scaler.get_scale() == pytest.approx(3e38 / 4)


@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_an_overflow_without_a_scale_to_lower_is_one(shapes: Path, tiny_model: dict[str, Any]) -> None:
    module, trainer, data = scaled_module(shapes, tiny_model, 1.0)
    break_backward(module.model.transformer.encoder.layers[0].linear1)
    trainer.fit(module, datamodule=data)
    assert module.guard.total == 2


def test_a_crash_is_recorded_and_goes_on_as_itself(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from ddetr.models.attention import MSDeformAttn

    original, calls = MSDeformAttn.forward, []

    def crashing(self: MSDeformAttn, *args: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 40:
            raise ZeroDivisionError("in the attention")
        return original(self, *args)

    monkeypatch.setattr(MSDeformAttn, "forward", crashing)
    with pytest.raises(ZeroDivisionError, match="in the attention"):
        train(TrainConfig(**settings))
    (bundle,) = bundles_of(Path(settings["output"]))
    header = json.loads((bundle / "bundle.json").read_text())
    assert header["error"]["type"] == "ZeroDivisionError"
    assert header["error"]["module"].endswith("_attn")
    assert header["loss"] is None
    assert "ddetr replay" in caplog.text
    assert "ZeroDivisionError: in the attention" in (bundle / "what.txt").read_text()
    assert "Traceback" in (bundle / "what.txt").read_text()
    result = replay(str(bundle))
    assert result.reproduces
    assert "the failure repeats in transformer." in result.verdict
    monkeypatch.undo()
    assert not replay(str(bundle)).reproduces


def test_a_nan_on_one_process_is_skipped_by_both(
    shapes: Path, tiny_model: dict[str, Any], forks: Forks, tmp_path: Path
) -> None:
    """The second process has it; both skip the step, and the second one's batch is recorded."""
    script = tmp_path / "spoiled.py"
    script.write_text(
        "import os, sys, torch\n"
        "from ddetr.engine.module import DetectionModule\n"
        "from ddetr.models.criterion import SetCriterion\n"
        "now, skipped = [], []\n"
        "step, total = DetectionModule.training_step, SetCriterion.total\n"
        "def training_step(self, batch, index):\n"
        "    now[:] = [self.global_step + 1]\n"
        "    before = torch.cat([p.detach().flatten() for p in self.model.parameters()])\n"
        "    out = step(self, batch, index)\n"
        "    after = torch.cat([p.detach().flatten() for p in self.model.parameters()])\n"
        "    if torch.equal(before, after):\n"
        "        skipped.append(now[0])\n"
        "        assert self.guard.skipped\n"
        "    return out\n"
        "DetectionModule.training_step = training_step\n"
        "rank = os.environ['RANK']\n"
        # infinite, with a finite gradient: the exchange of gradients alone would not tell the other process
        "def spoiled(self, losses):\n"
        "    value = total(self, losses)\n"
        "    return value + float('inf') if rank == '1' and now[0] == 2 else value\n"
        "SetCriterion.total = spoiled\n"
        "from ddetr.cli.main import main\n"
        "code = main(sys.argv[1:])\n"
        "print(f'process {rank} skipped {skipped}', flush=True)\n"
        "sys.exit(code)\n"
    )
    options = ["train", "--data", shapes, "--output", tmp_path / "run", "--epochs", 1, "--batch_size", 2]
    options += ["--device_batch_size", 1, "--data.image_size", 64, "--data.num_workers", 0, "--device", "cpu"]
    options += ["--num_pictures", 0, "--preflight", "false"]
    options += [text for name, value in tiny_model.items() for text in (f"--model.{name}", str(value).lower())]
    done = forks(script, *options, processes=2)
    assert done.returncode == 0, done.stderr
    assert "process 0 skipped [2]" in done.stdout
    assert "process 1 skipped [2]" in done.stdout
    assert done.stderr.count("step 2 has loss inf") == 1
    assert "on process 1" in done.stderr
    (bundle,) = bundles_of(tmp_path / "run")
    assert bundle.name == "step-000002-rank1"
    assert json.loads((bundle / "bundle.json").read_text())["world_size"] == 2

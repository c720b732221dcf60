"""Steps that fail: skipped or fatal, recorded, and computed again from what was recorded."""

import json
import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from ddetr.checkpoint import load_checkpoint
from ddetr.cli import main as cli
from ddetr.datasets import load_annotations
from ddetr.datasets.config import DataConfig
from ddetr.engine.blackbox.bundle import FOLDER, MAX_BUNDLES
from ddetr.engine.blackbox.guard import StepGuard
from ddetr.engine.blackbox.replay import replay
from ddetr.engine.blackbox.trace import find_non_finite, micro_losses
from ddetr.engine.config import OptimConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

STEPS = 4  # of an epoch


def run_bundles(run: Path) -> list[Path]:
    """The bundles of a run, oldest step first."""
    return sorted(path for path in (run / FOLDER).glob("step-*") if (path / "bundle.json").is_file())


@pytest.fixture
def settings(short_run: dict[str, Any], shapes: Path, tmp_path: Path) -> dict[str, Any]:
    """Eight steps of two micro-batches with batch norms and dropout."""
    data = DataConfig(str(shapes), augmentation="plain", image_size=64, num_workers=0)
    return short_run | {"data": data, "batch_size": 2, "device_batch_size": 1, "output": str(tmp_path / "run")}


@pytest.fixture
def break_loss(monkeypatch: pytest.MonkeyPatch) -> Callable[[set[int]], None]:
    """Multiply the total loss of these steps by NaN."""

    def arrange(steps: set[int]) -> None:
        now = []
        begun, original = StepGuard.step, SetCriterion.total

        def step(self: StepGuard, module: DetectionModule, *rest: Any) -> Any:
            now[:] = [module.global_step + 1]
            return begun(self, module, *rest)

        monkeypatch.setattr(StepGuard, "step", step)
        monkeypatch.setattr(
            SetCriterion,
            "total",
            lambda self, losses: original(self, losses) * (float("nan") if now[0] in steps else 1),
        )

    return arrange


class Spoiled(torch.nn.Module):
    """A module whose output gets a NaN in one element."""

    def __init__(self, module: torch.nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any) -> Tensor:
        output = self.module(*args).clone()
        output[0, 0] = float("nan")
        return output


class BadGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


def break_backward(module: torch.nn.Module) -> None:
    original = module.forward
    module.forward = lambda *args: BadGradient.apply(original(*args))


def spoil_pixels(monkeypatch: pytest.MonkeyPatch, image_ids: set[int]) -> None:
    """The images come as floats, these with one NaN."""
    from ddetr.datasets.dataset import DetectionDataset

    original = DetectionDataset.__getitem__

    def spoiled(self: DetectionDataset, index: Any) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = original(self, index)
        if self.train:
            image = image.float()
            if int(target["image_id"]) in image_ids:
                image[0, 3, 5] = float("nan")
        return image, target

    monkeypatch.setattr(DetectionDataset, "__getitem__", spoiled)


def a_step(
    shapes: Path, tiny_model: dict[str, Any], **options: Any
) -> tuple[DeformableDETR, SetCriterion, list, float]:
    """A model and a batch of two micro-batches."""
    torch.manual_seed(0)
    annotations = load_annotations(shapes, "train")
    config = DataConfig(str(shapes), augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(annotations, annotations, config, batch_size=4, device_batch_size=2, seed=1)
    data.trainer = type("One", (), {"world_size": 1, "global_rank": 0, "current_epoch": 0})
    model = DeformableDETR(**tiny_model | {"num_classes": 3} | options)
    return model, build_criterion(model), next(iter(data.train_dataloader())), 9.0


# --- where it begins


@pytest.mark.parametrize(
    "options",
    [{}, {"two_stage": True}, {"with_box_refine": False}, {"freeze_backbone": "stem"}, {"backbone": "regnetx_002"}],
)
def test_a_healthy_step_has_no_place_that_is_not_finite(
    shapes: Path, tiny_model: dict[str, Any], options: dict[str, Any]
) -> None:
    """Whatever is infinite inside by design, such as the two-stage anchors outside, is not reported."""
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model, **options)
    before = torch.get_rng_state()
    assert find_non_finite(model, criterion, batch, num_boxes, seed=1) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "backbone.0.body.layer3",
        "input_proj.1.0",
        "transformer.encoder.layers.0.self_attn.value_proj",
        "transformer.decoder.layers.1.linear2",
        "class_embed.1",
    ],
)
def test_the_first_module_is_named_that_puts_out_nan(shapes: Path, tiny_model: dict[str, Any], name: str) -> None:
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model)
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    spoiled = Spoiled(module)
    if last.isdigit():
        model.get_submodule(parent)[int(last)] = spoiled
    else:
        setattr(model.get_submodule(parent), last, spoiled)
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name, found.kind, found.micro_batch) == ("forward", name, "Spoiled", 0)
    assert "what went in was finite" in found.message
    assert found.inputs[0]["num_nan"] == 0
    assert found.outputs[0]["num_nan"] > 0


@pytest.mark.parametrize(
    "name", ["transformer.encoder.layers.0.linear1", "transformer.decoder.layers.0.cross_attn", "input_proj.0.1"]
)
@pytest.mark.parametrize("two_stage", [False, True])
def test_the_module_is_named_whose_backward_pass_breaks(
    shapes: Path, tiny_model: dict[str, Any], name: str, two_stage: bool
) -> None:
    """Not the one before it, whose output merely gets the broken gradient."""
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model, two_stage=two_stage)
    break_backward(model.get_submodule(name))
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name) == ("backward", name), found.message


def test_input_weights_losses_and_norm_are_told_apart(
    shapes: Path, tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model)
    images, mask, targets = batch[1]
    pixels = images.float()
    pixels[1, 0, 0, 0] = float("inf")
    found = find_non_finite(model, criterion, [batch[0], (pixels, mask, targets)], num_boxes, seed=1)
    assert (found.place, found.name, found.micro_batch) == ("input", "images", 1)
    assert "image 1 of micro-batch 1" in found.message
    wrong = [{**target, "boxes": target["boxes"] * float("nan")} for target in targets]
    assert find_non_finite(model, criterion, [(images, mask, wrong)], num_boxes, seed=1).name == "boxes"

    original = SetCriterion.forward
    with monkeypatch.context() as patch:
        broken = {"loss_giou_0": torch.tensor(float("nan"))}
        patch.setattr(SetCriterion, "forward", lambda *args: original(*args) | broken)
        found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
        assert (found.place, found.name) == ("loss", "loss_giou_0")
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1, loss_scale=1e24)
    assert found.place == "norm"

    with torch.no_grad():
        model.transformer.level_embed[0, 0] = float("nan")
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name) == ("parameter", "transformer.level_embed")


# --- the run goes on, or stops


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
        result = train(**settings)
    assert seen == [(number in (2, 6), number in (2, 6)) for number in range(1, 9)]
    lines = [record.message for record in caplog.records if record.name == "ddetr.engine.blackbox.guard"]
    assert [line.split()[1] for line in lines] == ["2", "6"]
    assert "loss nan" in lines[0]
    assert "images " in lines[0]
    assert "Skipped, 1 of at most 10" in lines[0]
    rows = (result.path / "train.csv").read_text().splitlines()
    assert len(rows) == 1 + 8
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(result.path / "last.pth").model.values())
    bundles = run_bundles(result.path)
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
            train(**settings | {"max_bad_steps": allowed})
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
        train(**settings | {"resume": "last", "max_bad_steps": allowed + 1})


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
        train(**settings)
    run = Path(settings["output"])
    assert (
        torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 2 * STEPS - 1
    )  # the step before an epoch's last is saved
    assert all(torch.isfinite(tensor).all() for tensor in load_checkpoint(run / "last.pth").model.values())


def test_a_run_keeps_its_first_bundles_and_its_latest(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None]
) -> None:
    break_loss({1, 2, 4, 6, 8})
    run = train(**settings).path
    assert [path.name for path in run_bundles(run)] == ["step-000001", "step-000002", "step-000008"]
    assert len(list((run / "blackbox").iterdir())) == MAX_BUNDLES


def test_a_full_disk_does_not_stop_a_run_that_could_go_on(
    settings: dict[str, Any],
    break_loss: Callable[[set[int]], None],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    break_loss({2})

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("ddetr.engine.blackbox.bundle._state", full)
    train(**settings)
    assert "could not be recorded" in caplog.text
    assert "No space left on device" in caplog.text
    assert list((Path(settings["output"]) / "blackbox").iterdir()) == []


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
        if len(calls) == 1 and cost.shape[0]:
            cost[0, 0] = float("nan")
        return cost

    monkeypatch.setattr(HungarianMatcher, "_cost", spoiled)
    train(**settings)
    lines = [record.message for record in caplog.records if record.name == "ddetr.engine.blackbox.guard"]
    assert len(lines) == 1
    assert lines[0].startswith("step 1: 1 matching costs of images ")


def test_a_run_that_stopped_at_bad_steps_resumes_to_the_same_weights(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The skipped step of the first epoch counts for schedule and random numbers as in the run that was not stopped."""
    break_loss({2})
    whole = train(**settings | {"output": str(tmp_path / "whole")})
    monkeypatch.undo()
    break_loss({2, 6})
    with pytest.raises(FloatingPointError, match="2 bad steps are more than"):
        train(**settings | {"max_bad_steps": 1})
    monkeypatch.undo()
    resumed = train(**settings | {"max_bad_steps": 1, "resume": "last"})
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
        train(**settings)
    assert len(calls) == 1
    (bundle,) = run_bundles(Path(settings["output"]))
    assert torch.load(bundle / "state.pt", weights_only=True)["weights"]
    assert "failed in transformer.encoder.layers.0.self_attn" in (bundle / "what.txt").read_text()


def test_a_gpu_that_cannot_be_read_any_more_still_leaves_the_words(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """After a failed assertion on the device every copy from it raises."""
    from ddetr.models.attention import MSDeformAttn

    def asserted(*_: Any) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(MSDeformAttn, "forward", asserted)
    monkeypatch.setattr("ddetr.engine.blackbox.bundle._state", asserted)
    with pytest.raises(RuntimeError, match="device-side assert"):
        train(**settings)
    (bundle,) = run_bundles(Path(settings["output"]))
    assert sorted(path.name for path in bundle.iterdir()) == ["bundle.json", "what.txt"]
    assert "Traceback" in (bundle / "what.txt").read_text()
    assert cli.main(["replay", str(bundle)]) == 2
    assert "could not be read any more" in capsys.readouterr().err


# --- fp16: overflow is the scaler's business


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


# --- the bundle, and the step from it


def test_a_bundle_holds_all_that_the_step_was(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None], shapes: Path
) -> None:
    break_loss({3})
    run = train(**settings).path
    (bundle,) = run_bundles(run)
    header = json.loads((bundle / "bundle.json").read_text())
    assert (header["step"], header["epoch"], header["seed"], header["rank"]) == (3, 0, 42, 0)
    assert header["loss"] == "nan"
    assert header["config"]["optim"]["lr"] == 1e-3
    assert header["versions"]["torch"] == torch.__version__
    assert header["not_finite"]["place"] == "loss"
    records = {record.image_id: record for record in load_annotations(shapes, "train").images}
    assert len(header["images"]) == 2
    state = torch.load(bundle / "state.pt", weights_only=True)
    for place in header["images"]:
        record = records[place["image_id"]]
        assert place["path"] == str(record.path)
        micro = state["batch"][place["micro_batch"]]
        assert micro["images"].dtype == torch.uint8
        assert sorted(micro["targets"][place["row"]]["labels"].tolist()) == sorted(record.labels.tolist())
    assert {"torch", "python", "numpy", "cuda"} == set(state["random"])
    assert state["optimizer"]["state"]
    words = (bundle / "what.txt").read_text()
    assert "step 3 has loss nan" in words
    assert str(records[header["images"][0]["image_id"]].path) in words
    # the recorded failure is not in weights or images: replayed without it, the step is finite
    again = replay(str(bundle))
    assert not again.reproduces
    assert "does not repeat" in again.render()


def test_replay_repeats_a_nan_in_the_pixels_and_shows_the_image(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shapes: Path
) -> None:
    image_id = load_annotations(shapes, "train").images[4].image_id
    spoil_pixels(monkeypatch, {image_id})
    run = train(**settings).path
    bundle = run_bundles(run)[0]
    header = json.loads((bundle / "bundle.json").read_text())
    assert header["not_finite"]["place"] == "input"
    monkeypatch.undo()
    result = replay(str(bundle))
    assert result.reproduces
    assert result.is_same_loss
    assert (result.not_finite.place, result.not_finite.name) == ("input", "images")
    (picture,) = result.pictures  # the other image of the step is not suspect
    assert picture.name.endswith(f"-{image_id}.png")
    assert picture.stat().st_size > 500


def test_replay_repeats_an_exploding_loss_bit_for_bit_and_names_the_module(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are finite and far too large, put in before step 3: as after a rate that was too high."""
    original = DetectionModule.training_step

    def exploding(self: DetectionModule, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 2:
            with torch.no_grad():
                self.model.transformer.encoder.layers[0].linear1.weight.mul_(1e20)
                self.model.transformer.encoder.layers[0].linear2.weight.mul_(1e20)
        return original(self, batch, batch_idx)

    monkeypatch.setattr(DetectionModule, "training_step", exploding)
    with pytest.raises(FloatingPointError, match="3 bad steps in a row"):
        train(**settings)
    bundle = run_bundles(Path(settings["output"]))[0]
    monkeypatch.undo()
    result = replay(str(bundle))
    assert result.reproduces
    assert result.is_same_loss
    assert (result.not_finite.place, result.not_finite.name) == ("forward", "transformer.encoder.layers.0.linear2")
    assert result.not_finite.inputs[0]["max"] > 1e15
    assert "transformer.encoder.layers.0.linear2" in result.render()
    assert len(result.pictures) == 2


def test_a_healthy_step_replays_to_the_same_bits(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, batch norms, two micro-batches, the memory format: all of it is in the loss."""
    original = SetCriterion.total
    monkeypatch.setattr(StepGuard, "check", lambda self, module, loss, norm, optimizer: kept(self, module, loss, norm))

    def kept(self: StepGuard, module: DetectionModule, loss: Tensor, norm: Tensor) -> None:
        if module.global_step == 2:
            raise RuntimeError(f"stop {float(loss)!r} {float(norm)!r}")

    with pytest.raises(RuntimeError, match="stop") as error:
        train(**settings)
    monkeypatch.undo()
    assert original is SetCriterion.total
    loss, norm = map(float, str(error.value).split()[1:])
    (bundle,) = run_bundles(Path(settings["output"]))
    result = replay(str(bundle))
    assert result.loss == loss
    assert result.what.endswith(str(error.value))
    assert not result.reproduces
    assert norm > 0


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
        train(**settings)
    (bundle,) = run_bundles(Path(settings["output"]))
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


def test_micro_losses_are_what_is_trained_on(shapes: Path, tiny_model: dict[str, Any]) -> None:
    """The recorder must compute what the step computed: a float32 loss of every weighed term."""
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model)
    losses = micro_losses(model, criterion, batch[0], num_boxes)
    assert set(criterion.weight_dict) <= set(losses)


# --- two processes


def test_a_nan_on_one_process_is_skipped_by_both(shapes: Path, tiny_model: dict[str, Any], tmp_path: Path) -> None:
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
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "process 0 skipped [2]" in done.stdout
    assert "process 1 skipped [2]" in done.stdout
    assert done.stderr.count("step 2 has loss inf") == 1
    assert "on process 1" in done.stderr
    (bundle,) = run_bundles(tmp_path / "run")
    assert bundle.name == "step-000002-rank1"
    assert json.loads((bundle / "bundle.json").read_text())["world_size"] == 2


# --- the command


def test_replay_on_the_command_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil_pixels(monkeypatch, {load_annotations(shapes, "train").images[4].image_id})
    run = train(**settings).path
    monkeypatch.undo()
    bundle = run_bundles(run)[0]
    capsys.readouterr()
    assert cli.main(["replay", str(bundle), "--device", "cpu"]) == 0
    shown = capsys.readouterr().out
    assert "the failure repeats" in shown
    assert "the same, bit for bit" in shown
    assert "input images" in shown

    header = json.loads((bundle / "bundle.json").read_text())
    header["versions"]["torch"] = "1.0.0"
    (bundle / "bundle.json").write_text(json.dumps(header))
    assert cli.main(["replay", str(bundle)]) == 0
    assert f"torch was 1.0.0 and is {torch.__version__}" in " ".join(capsys.readouterr().out.split())

    header["format"] = 99
    header["versions"]["ddetr"] = "9.9"
    (bundle / "bundle.json").write_text(json.dumps(header))
    cases = [
        (bundle, "has format 99, this ddetr reads 1: use ddetr 9.9"),
        (bundle.parent / "step-000999", "there is no"),
        (run, f"did you mean {bundle}?"),
    ]
    for place, message in cases:
        assert cli.main(["replay", str(place)]) == 2
        assert message in capsys.readouterr().err
    (bundle / "bundle.json").write_text("{")
    assert cli.main(["replay", str(bundle)]) == 2
    assert "bundle.json is damaged" in capsys.readouterr().err
    header["format"] = 1
    (bundle / "bundle.json").write_text(json.dumps(header))
    (bundle / "state.pt").write_bytes(b"nothing")
    assert cli.main(["replay", str(bundle)]) == 2
    assert "state.pt is damaged" in capsys.readouterr().err

"""The moving average of the weights: its arithmetic, who sees it, and that it survives anything that a run survives."""

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from ddetr.checkpoint import load_checkpoint, load_weights
from ddetr.datasets import load_annotations
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.ema import WeightAverage
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.run.folder import RunFolder
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.inference.evaluate_checkpoint import evaluate_checkpoint
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

# lightning's own use of PyTorch
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
DECAY, EPOCHS, STEPS = (
    0.3,
    3,
    2,
)  # the decay is low enough for the warm-up, 1/10, 2/11, 3/12, 4/13, to end within the run
Weights = dict[str, torch.Tensor]


class Spy(Callback):
    """Weights after every step; resume files saved after step 3 and in the validation that follows."""

    def __init__(self, folder: Path):
        self.folder, self.weights, self.validated = folder, [], []

    def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self.weights.append(copied(module.model.state_dict()))

    def on_train_batch_end(self, trainer: pl.Trainer, module: DetectionModule, *_: Any) -> None:
        self.weights.append(copied(module.model.state_dict()))
        trainer.save_checkpoint(self.folder / f"step{trainer.global_step}.ckpt")

    def on_validation_batch_end(self, trainer: pl.Trainer, module: DetectionModule, *_: Any) -> None:
        trainer.save_checkpoint(self.folder / f"validation{trainer.global_step}.ckpt")
        self.validated.append(copied(module.model.state_dict()))


def copied(weights: Weights) -> Weights:
    return {name: tensor.clone() for name, tensor in weights.items()}


def differing(one: Weights, other: Weights) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


def fit(
    shapes: Path, model: dict[str, Any], *callbacks: Callback, ckpt_path: Path | None = None, **trainer: Any
) -> DetectionModule:
    """Three epochs of two steps, with a validation after each."""
    annotations = load_annotations(shapes, "train")
    config = DataConfig(str(shapes), augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(annotations, annotations, config, batch_size=4, device_batch_size=4, seed=0)
    torch.manual_seed(0)
    detector = DeformableDETR(**model | {"num_classes": 3})
    module = DetectionModule(
        detector,
        build_criterion(detector),
        OptimConfig(lr=1e-2),
        CocoEvaluator(annotations),
        backbone_pretrained=False,
        steps_per_epoch=STEPS,
        total_steps=EPOCHS * STEPS,
        seed=0,
    )
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = (
        quiet | {"accelerator": "cpu", "logger": False, "max_epochs": EPOCHS, "num_sanity_val_steps": 0} | trainer
    )
    pl.Trainer(callbacks=list(callbacks), **settings).fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


@pytest.fixture(scope="module", params=[{}, {"with_box_refine": False}], ids=["refine", "shared heads"])
def watched(
    request: pytest.FixtureRequest, shapes: Path, tiny_model: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Spy, DetectionModule]:
    """A run that was looked at, of a model with a head per layer and of one whose layers share theirs."""
    spy = Spy(tmp_path_factory.mktemp("saved"))
    return spy, fit(shapes, tiny_model | request.param, spy, WeightAverage(DECAY))


def test_the_average_is_the_formula_and_only_validation_sees_it(watched: tuple[Spy, DetectionModule]) -> None:
    spy, module = watched
    expected = copied(spy.weights[0])
    floating = [name for name, tensor in expected.items() if tensor.is_floating_point()]
    assert any("running_mean" in name for name in floating), "batch norm's statistics are averaged too"
    averages = []
    for step, weights in enumerate(spy.weights[1:]):
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, tensor in weights.items():
            expected[name] = decay * expected[name] + (1 - decay) * tensor if name in floating else tensor.clone()
        averages.append(copied(expected))
    for validation, seen in enumerate(spy.validated[::2]):  # of the first of two batches
        average = averages[STEPS * (validation + 1) - 1]
        for name in average:
            assert torch.allclose(seen[name].double(), average[name].double(), rtol=1e-5, atol=1e-6), name
    assert differing(spy.validated[-1], spy.weights[-1])
    assert not differing(copied(module.model.state_dict()), spy.weights[-1]), "the trained weights are back"


@pytest.mark.parametrize("moment", ["step", "validation"])
def test_weights_of_a_resume_file_are_its_average(watched: tuple[Spy, DetectionModule], moment: str) -> None:
    """Where --weights gets a run's last.ckpt, also in the heads that layers share."""
    spy, module = watched
    model = DeformableDETR(**module.model.config)
    report = load_weights(model, spy.folder / f"{moment}{EPOCHS * STEPS}.ckpt")
    assert report.share == 1
    assert "averaged" in str(report)
    saved = torch.load(spy.folder / f"{moment}{EPOCHS * STEPS}.ckpt", weights_only=True)
    averaged = saved["weight_average"]["tensors"]
    loaded = model.state_dict()
    assert not differing(averaged, {name: loaded[name] for name in averaged})
    assert differing(averaged, {name: saved["state_dict"][f"model.{name}"] for name in averaged})


def test_a_resume_file_is_right_at_any_moment(watched: tuple[Spy, DetectionModule]) -> None:
    """Saved after a step or in a validation: both copies of the weights, each in its place."""
    spy, _ = watched
    for step in (STEPS, EPOCHS * STEPS):
        trained, validating = (
            torch.load(spy.folder / f"{moment}{step}.ckpt", weights_only=True) for moment in ("step", "validation")
        )
        assert not differing(trained["state_dict"], validating["state_dict"])
        assert trained["weight_average"]["num_updates"] == validating["weight_average"]["num_updates"] == step
        assert not differing(trained["weight_average"]["tensors"], validating["weight_average"]["tensors"])
        weights = {f"model.{name}": tensor for name, tensor in spy.weights[step].items()}
        assert not [name for name in weights if not torch.equal(trained["state_dict"][name], weights[name])]


@pytest.mark.parametrize("moment", ["step3", "validation4"])
def test_a_resumed_run_starts_with_both_copies(
    watched: tuple[Spy, DetectionModule], shapes: Path, tmp_path: Path, moment: str
) -> None:
    """From a file of the middle of an epoch, or of a validation: the average is not started anew."""

    class Look(Callback):
        def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
            trainer.save_checkpoint(tmp_path / "again.ckpt")
            trainer.should_stop = True

    spy, module = watched
    file = spy.folder / f"{moment}.ckpt"
    fit(shapes, module.model.config, WeightAverage(DECAY), Look(), ckpt_path=file)
    before, after = (torch.load(path, weights_only=True) for path in (file, tmp_path / "again.ckpt"))
    assert not differing(before["state_dict"], after["state_dict"])
    assert not differing(before["weight_average"]["tensors"], after["weight_average"]["tensors"])
    assert before["weight_average"]["num_updates"] == after["weight_average"]["num_updates"] == int(moment[-1])


# what PyTorch says of the first step being left out
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_steps_that_the_scaler_leaves_out_are_no_updates(shapes: Path, tiny_model: dict[str, Any]) -> None:
    """fp16: the first step overflows; Lightning counts it all the same."""
    average, steps = WeightAverage(DECAY), []

    class Count(Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            steps.append((trainer.global_step, average.num_updates))

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, backoff_factor=2.0**-112)
    fit(shapes, tiny_model, average, Count(), plugins=[MixedPrecision("16-mixed", "cpu", scaler)], limit_val_batches=0)
    assert steps[0] == (1, 0)
    assert steps[-1][1] == EPOCHS * STEPS - 1


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    return short_run | {"optim": OptimConfig(lr=1e-2, ema_decay=0.9), "epochs": EPOCHS}


def test_what_is_published_is_the_average_and_what_was_measured(
    settings: dict[str, Any], shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a run that was interrupted and resumed ends with the same bits, in both copies."""
    whole = train(TrainConfig(**settings, output=str(tmp_path / "whole")))
    state = torch.load(whole.path / "last.ckpt", weights_only=True)
    published = load_checkpoint(whole.path / "last.pth").model
    trained = {name: state["state_dict"][f"model.{name}"] for name in published}
    average = state["weight_average"]["tensors"]
    assert not [name for name in average if not torch.equal(published[name], average[name])]
    assert len(differing(published, trained)) > 0.9 * len(average)
    again = evaluate_checkpoint(str(whole.path / "last.pth"), settings["data"], batch_size=2)
    assert again.to_dict() == whole.metrics.to_dict()

    original = RunFolder.append_row

    def interrupted(self: RunFolder, name: str, row: dict[str, Any]) -> None:
        original(self, name, row)
        if row["step"] == STEPS + 1:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "append_row", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(TrainConfig(**settings, output=str(tmp_path / "resumed")))
    monkeypatch.undo()
    resumed = train(TrainConfig(**settings, output=str(tmp_path / "resumed"), resume="last"))
    other = torch.load(resumed.path / "last.ckpt", weights_only=True)
    assert not differing(other["state_dict"], state["state_dict"])
    assert other["weight_average"]["num_updates"] == EPOCHS * STEPS
    assert not differing(other["weight_average"]["tensors"], average)
    for name in ("last.pth", "best.pth"):
        assert not differing(*(load_checkpoint(run.path / name).model for run in (whole, resumed)))


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_that_is_none_is_refused(decay: float) -> None:
    with pytest.raises(InputError, match="ema_decay must lie between 0 and 1"):
        OptimConfig(ema_decay=decay)

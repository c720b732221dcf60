"""A recorded step computed again."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_steps import bundles_of, spoil_pixels
from torch import Tensor

from ddetr.cli import main as cli
from ddetr.datasets import load_annotations
from ddetr.engine.blackbox.guard import StepGuard
from ddetr.engine.blackbox.replay import replay
from ddetr.engine.config import TrainConfig
from ddetr.engine.module import DetectionModule
from ddetr.engine.train import train
from ddetr.models.auxiliary import AuxiliaryConfig
from ddetr.models.criterion import SetCriterion


def test_replay_repeats_a_nan_in_the_pixels_and_shows_the_image(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shapes: Path
) -> None:
    image_id = load_annotations(shapes, "train").images[4].image_id
    spoil_pixels(monkeypatch, {image_id})
    run = train(TrainConfig(**settings)).path
    bundle = bundles_of(run)[0]
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
        train(TrainConfig(**settings))
    bundle = bundles_of(Path(settings["output"]))[0]
    monkeypatch.undo()
    result = replay(str(bundle))
    assert result.reproduces
    assert result.is_same_loss
    assert (result.not_finite.place, result.not_finite.name) == ("forward", "transformer.encoder.layers.0.linear2")
    assert result.not_finite.inputs[0]["max"] > 1e15
    assert "transformer.encoder.layers.0.linear2" in result.render()
    assert len(result.pictures) == 2


def test_a_healthy_step_replays_to_the_same_bits(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout, denoising queries, batch norms, two micro-batches, the memory format: all of it is in the loss."""
    settings["auxiliary"] = AuxiliaryConfig(denoising=4, one_to_many=3)
    original = SetCriterion.total
    seen = []

    def check(self: StepGuard, loss: Tensor, norm: Tensor, *_: Any) -> None:
        seen.append(loss)
        if len(seen) == 3:
            raise RuntimeError(f"stop {float(loss)!r} {float(norm)!r}")

    monkeypatch.setattr(StepGuard, "check", check)
    with pytest.raises(RuntimeError, match="stop") as error:
        train(TrainConfig(**settings))
    monkeypatch.undo()
    assert original is SetCriterion.total
    loss, norm = map(float, str(error.value).split()[1:])
    (bundle,) = bundles_of(Path(settings["output"]))
    result = replay(str(bundle))
    assert result.loss == loss
    assert result.what.endswith(str(error.value))
    assert not result.reproduces
    assert norm > 0


def test_replay_on_the_command_line(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, shapes: Path, capsys: pytest.CaptureFixture
) -> None:
    spoil_pixels(monkeypatch, {load_annotations(shapes, "train").images[4].image_id})
    run = train(TrainConfig(**settings)).path
    monkeypatch.undo()
    bundle = bundles_of(run)[0]
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

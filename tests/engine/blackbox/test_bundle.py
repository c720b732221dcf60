"""What is kept of a step that failed."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_steps import bundles_of

from ddetr.cli import main as cli
from ddetr.datasets import load_annotations
from ddetr.engine.blackbox.bundle import MAX_BUNDLES
from ddetr.engine.blackbox.replay import replay
from ddetr.engine.config import TrainConfig
from ddetr.engine.train import train


def test_a_run_keeps_its_first_bundles_and_its_latest(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None]
) -> None:
    break_loss({1, 2, 4, 6, 8})
    run = train(TrainConfig(**settings)).path
    assert [path.name for path in bundles_of(run)] == ["step-000001", "step-000002", "step-000008"]
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
    train(TrainConfig(**settings))
    assert "could not be recorded" in caplog.text
    assert "No space left on device" in caplog.text
    assert list((Path(settings["output"]) / "blackbox").iterdir()) == []


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
        train(TrainConfig(**settings))
    (bundle,) = bundles_of(Path(settings["output"]))
    assert sorted(path.name for path in bundle.iterdir()) == ["bundle.json", "what.txt"]
    assert "Traceback" in (bundle / "what.txt").read_text()
    assert cli.main(["replay", str(bundle)]) == 2
    assert "could not be read any more" in capsys.readouterr().err


def test_a_bundle_holds_all_that_the_step_was(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None], shapes: Path
) -> None:
    break_loss({3})
    run = train(TrainConfig(**settings)).path
    (bundle,) = bundles_of(run)
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
    assert "made with" not in words
    # the recorded failure is not in weights or images: replayed without it, the step is finite
    again = replay(str(bundle))
    assert not again.reproduces
    assert "does not repeat" in again.render()


def test_a_bundle_names_all_images_of_a_mosaic(
    settings: dict[str, Any], break_loss: Callable[[set[int]], None]
) -> None:
    break_loss({1})
    settings["data"] = replace(settings["data"], mosaic=1.0, mixup=1.0)
    with pytest.raises(FloatingPointError):
        train(TrainConfig(**settings | {"max_bad_steps": 0}))
    (bundle,) = bundles_of(Path(settings["output"]))
    header = json.loads((bundle / "bundle.json").read_text())
    words = (bundle / "what.txt").read_text()
    for place in header["images"]:
        assert len(place["others"]) == 4
        for named in (place, *place["others"]):
            assert Path(named["path"]).is_file()
            assert named["path"] in words
            assert f"id {named['image_id']}  " in words
    ids = [str(named["image_id"]) for place in header["images"] for named in (place, *place["others"])]
    assert f"images {', '.join(ids)}:" in words

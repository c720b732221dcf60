"""Training from weights of a hub: fetched before the data are read, remembered, and not needed again."""

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from served_weights import Repo, Served

from ddetr.checkpoint import Checkpoint, save_checkpoint
from ddetr.datasets.annotations import Category
from ddetr.engine import prepare as module
from ddetr.engine.config import TrainConfig
from ddetr.engine.prepare import prepare
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR

SHAPES = [Category(1, "circle"), Category(2, "square"), Category(3, "triangle")]


def test_a_run_from_a_hub_goes_on_without_it(
    served: Served, short_run: dict[str, Any], tiny_model: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "model.safetensors"
    save_checkpoint(file, Checkpoint.of(DeformableDETR(**tiny_model, num_classes=3), SHAPES))
    served.repos["org/shapes"] = Repo({"main": {file.name: file.read_bytes()}})
    config = TrainConfig(**short_run | {"epochs": 1, "weights": "org/shapes", "output": str(tmp_path / "run")})
    run = train(config).path
    (session,) = json.loads((run / "environment.json").read_text())["sessions"]
    sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
    assert session["weights"] == {"source": "org/shapes", "is_public": True, "sha256": sha256}
    assert yaml.safe_load((run / "config.yaml").read_text())["weights"] == "org/shapes"
    shutil.rmtree(tmp_path / "hub home")
    asked = len(served.requests)
    train(replace(config, epochs=2, resume=str(run)))
    assert len(served.requests) == asked
    first, second = json.loads((run / "environment.json").read_text())["sessions"]
    assert first["weights"] == session["weights"]
    assert "weights" not in second


def test_what_cannot_be_had_is_said_before_the_data_are_read(
    served: Served, short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "load_splits", lambda *_, **__: pytest.fail("the data were read"))
    for weights, message in (
        ("org/none", "no such repository, or it is private"),
        ("deformable-detr-r5", r"did you mean deformable-detr-r50"),
        (str(tmp_path / "best.pth"), r"has no 'best\.pth'"),
    ):
        with pytest.raises(InputError, match=message):
            prepare(TrainConfig(**short_run | {"weights": weights, "output": str(tmp_path / "run")}))
    assert not (tmp_path / "run").exists()

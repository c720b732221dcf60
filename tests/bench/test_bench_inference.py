"""`ddetr bench inference` on a tiny detector: both sides compute the same, and what it saves is whole."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.bench import inference
from ddetr.cli import main as cli

pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")


@pytest.fixture
def tiny(tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "MODEL", inference.MODEL | tiny_model)
    monkeypatch.setattr(inference, "IMAGE_HW", (64, 96))
    monkeypatch.setattr(inference, "TRAINING_HW", (64, 64))


@pytest.mark.usefixtures("tiny")
def test_it_measures_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("transformers")
    threads = torch.get_num_threads()
    assert cli.main(["bench", "inference", "--threads", "1", "--rounds", "1", "--output", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    saved = json.loads((tmp_path / "out" / "inference.json").read_text())
    assert saved["command"] == "ddetr bench inference --threads 1 --rounds 1"
    assert list(saved["inference"]) == ["transformers", "ours", "ours, optimize=float32", "ours, optimize=bfloat16"]
    assert list(saved["training"]) == ["transformers", "ours"]
    assert all(row["seconds"] > 0 for kind in ("inference", "training") for row in saved[kind].values())
    assert saved["inference"]["transformers"]["logits_differ_by"] == 0
    assert saved["inference"]["ours, optimize=bfloat16"]["logits_differ_by"] > 0
    norms = [row["gradient_norm"] for row in saved["training"].values()]
    assert norms[0] == pytest.approx(norms[1], rel=1e-3)
    assert norms[0] > 0
    text, out = (tmp_path / "out" / "inference.md").read_text(), capsys.readouterr().out
    for line in ("## inference, one image of 64x96", "## training, one image of 64x64"):
        assert line in text
        assert line.removeprefix("## ") in out


@pytest.mark.usefixtures("tiny")
def test_a_side_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    theirs, ours = inference.make_models()
    with torch.no_grad():
        ours.class_embed[-1].bias += 1
    with pytest.raises(RuntimeError, match="the logits of ours differ from those of transformers"):
        inference.inference(theirs, ours, 1, 1)
    with pytest.raises(RuntimeError, match="the gradients differ"):
        inference.training(theirs, ours, 1, 1)


def test_without_transformers(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "ddetr.bench.huggingface", raising=False)
    assert cli.main(["bench", "inference"]) == 2
    assert "bench inference needs the package transformers: pip install transformers" in capsys.readouterr().err
    assert cli.main(["bench", "inference", "--rounds", "0"]) == 2
    assert "--rounds: expected at least 1, got 0" in capsys.readouterr().err

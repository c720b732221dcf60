"""`ddetr bench evaluation` on a small set: the libraries agree, and what it saves is whole."""

import json
from pathlib import Path

import pytest

from ddetr.bench import evaluation
from ddetr.cli import main as cli


def test_it_measures_and_saves(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sizes = ["--images", "30", "--objects", "200", "--classes", "5", "--per-image", "20", "--rounds", "1"]
    assert cli.main(["bench", "evaluation", *sizes, "--output", str(tmp_path / "out")]) == 0
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(saved["seconds"]) >= {"faster-coco-eval"}
    assert all(value > 0 for row in saved["seconds"].values() for value in row.values())
    assert 0.1 < saved["AP"] < 0.9
    assert saved["largest_difference"] < 1e-6
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "ddetr bench evaluation --images 30" in text
    assert text.count("| faster-coco-eval |") == 1
    assert "| faster-coco-eval |" in capsys.readouterr().out


def test_libraries_that_disagree_are_refused() -> None:
    annotations, detections = evaluation.make_set(20, 100, 4, 10, seed=0)
    _, metrics = evaluation.measure("faster-coco-eval", annotations, detections)
    _, others = evaluation.measure("faster-coco-eval", annotations, detections[::-1])
    assert evaluation.check({"a": metrics, "b": metrics}) == 0
    with pytest.raises(RuntimeError, match="b gives other numbers than a"):
        evaluation.check({"a": metrics, "b": others})


def test_a_wrong_size_says_so(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "evaluation", "--per-image", "0"]) == 2
    assert "--per_image: expected at least 1, got 0" in capsys.readouterr().err

"""benchmarks/bench_evaluation.py on a small set: the libraries agree, and what it saves is whole."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_evaluation.py"


@pytest.fixture
def script() -> ModuleType:
    if not SCRIPT.is_file():
        pytest.skip("the benchmarks are not here")
    spec = importlib.util.spec_from_file_location("bench_evaluation", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_measures_and_saves(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    sizes = ["--images", "30", "--objects", "200", "--classes", "5", "--per-image", "20", "--rounds", "1"]
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *sizes, "--output", str(tmp_path / "out")])
    script.main()
    saved = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(saved["seconds"]) >= {"faster-coco-eval"}
    assert all(value > 0 for row in saved["seconds"].values() for value in row.values())
    assert 0.1 < saved["AP"] < 0.9
    assert saved["largest_difference"] < 1e-6
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "python benchmarks/bench_evaluation.py --images 30" in text
    assert text.count("| faster-coco-eval |") == 1
    assert "| faster-coco-eval |" in capsys.readouterr().out


def test_libraries_that_disagree_are_refused(script: ModuleType) -> None:
    annotations, detections = script.make_set(20, 100, 4, 10, seed=0)
    _, metrics = script.measure("faster-coco-eval", annotations, detections)
    _, others = script.measure("faster-coco-eval", annotations, detections[::-1])
    assert script.check({"a": metrics, "b": metrics}) == 0
    with pytest.raises(SystemExit, match="b gives other numbers than a"):
        script.check({"a": metrics, "b": others})

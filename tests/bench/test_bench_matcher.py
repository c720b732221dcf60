"""`ddetr bench matcher`: both sides assign the same before they are timed, and what it saves is whole."""

import json
from pathlib import Path

import pytest
import torch

from ddetr.bench import matcher
from ddetr.cli import main as cli

SMALL = matcher.Size(2, 12, [3, 0])


def test_it_measures_and_saves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(matcher, "SIZES", [SMALL])
    threads = torch.get_num_threads()
    assert cli.main(["bench", "matcher", "--sizes", "1", "--rounds", "1", "--output", str(tmp_path / "out")]) == 0
    assert torch.get_num_threads() == threads
    saved = json.loads((tmp_path / "out" / "matcher.json").read_text())
    assert (saved["layers"], saved["classes"], saved["command"]) == (7, 91, "ddetr bench matcher --sizes 1 --rounds 1")
    (row,) = saved["rows"]
    assert row["size"] == "batch 2, 12 queries, 0 to 3 objects"
    assert row["official"] > 0
    assert row["ours"] > 0
    assert row["ratio"] == row["official"] / row["ours"]
    assert "| batch 2, 12 queries, 0 to 3 objects |" in (tmp_path / "out" / "matcher.md").read_text()
    out = capsys.readouterr().out
    assert "| batch 2, 12 queries, 0 to 3 objects |" in out
    assert "ddetr bench train" in out, "where its share of a step is to be seen"


def test_sides_that_assign_otherwise_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    right = matcher.cross_image_match
    monkeypatch.setattr(matcher, "cross_image_match", lambda layer, targets: right(layer, targets)[::-1])
    with pytest.raises(RuntimeError, match="the assignments of layer 0 differ"):
        matcher.make_sides(SMALL, torch.device("cpu"))


@pytest.mark.parametrize(("option", "value"), [("--sizes", "0"), ("--sizes", "99"), ("--rounds", "0")])
def test_a_wrong_number_says_so(option: str, value: str, capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["bench", "matcher", option, value]) == 2
    assert f"{option}: expected" in capsys.readouterr().err

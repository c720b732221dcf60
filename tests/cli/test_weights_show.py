"""`ddetr weights show`: one table, or JSON; what is no weights gets one sentence and exit code 2."""

import json
from pathlib import Path

import pytest
import torch

from ddetr.checkpoint import to_official_state_dict
from ddetr.cli import main as cli
from ddetr.models.deformable_detr import DeformableDETR


def test_a_file_of_another_project(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    model = DeformableDETR(2, 32, 5, backbone="test_resnet", enc_layers=1, dec_layers=1, dim_feedforward=32)
    weights = to_official_state_dict(model)
    torch.save({"model": weights}, tmp_path / "a.pth")
    assert cli.main(["weights", "show", str(tmp_path / "a.pth")]) == 2
    assert "its backbone has other weights than timm's 'resnet10t'" in capsys.readouterr().err
    torch.save({"model": weights, "args": {"backbone": "test_resnet"}}, tmp_path / "a.pth")
    assert cli.main(["weights", "show", str(tmp_path / "a.pth")]) == 0
    assert "test_resnet" in capsys.readouterr().out
    assert cli.main(["weights", "show", str(tmp_path / "a.pth"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (told["kind"], told["variant"], told["config"]["num_queries"]) == ("detector", "plain", 5)


def test_what_is_no_weights(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "a.pth").write_text("<!doctype html><html>Sign in</html>")
    assert cli.main(["weights", "show", str(tmp_path / "a.pth")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a web page, as a login or an error leaves it" in line

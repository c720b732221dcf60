"""`ddetr weights ...`, and --weights of other commands."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from served_weights import Repo, Served

from ddetr import DeformableDETR, from_pretrained
from ddetr.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from ddetr.cli import main as cli
from ddetr.datasets.annotations import Category
from ddetr.weight_files.catalogue import catalogue

SHAPES = [Category(1, "circle"), Category(2, "square"), Category(3, "triangle")]


@pytest.fixture
def run(tmp_path: Path, tiny_model: dict[str, Any]) -> Path:
    """A run folder with a checkpoint and settings."""
    folder = tmp_path / "run"
    model = DeformableDETR(**tiny_model, num_classes=3)
    save_checkpoint(folder / "best.pth", Checkpoint.of(model, SHAPES, image_size=64, threshold=0.0))
    (folder / "config.yaml").write_text("epochs: 1\n")
    return folder


@pytest.fixture
def ddetr(capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Run a command in an empty folder: what it says, or the sentence with which it is refused."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: Any) -> str:
        capsys.readouterr()
        code = cli.main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        assert code == (2 if err.startswith("ddetr: error: ") else 0)
        return err.removeprefix("ddetr: error: ") if code else out

    return call


def test_list(ddetr: Callable[..., str], served: Served) -> None:
    lines = ddetr("weights", "list").splitlines()
    assert max(map(len, lines)) <= 100
    rows = {line.split()[0]: line for line in lines if line.strip()}
    assert set(catalogue()) <= set(rows)
    assert "46.9   coco-91  165  apache-2.0  -     hub: SenseTime" in rows["deformable-detr-r50-two-stage"]
    assert "download.openmmlab.com" in rows["mmdet-r50"]
    entries = json.loads(ddetr("weights", "list", "--json"))
    assert [entry["name"] for entry in entries] == list(catalogue())
    assert entries[0]["cached"] is False
    assert served.requests == [], "a list asks nobody"


@pytest.mark.parametrize(
    ("command", "rest"), [("predict", ["--output", "out", "x.jpg"]), ("eval", ["--data", "."])], ids=lambda v: str(v)
)
def test_one_of_both(ddetr: Callable[..., str], command: str, rest: list[str]) -> None:
    needs = f"ddetr {command} needs --checkpoint FILE or --weights NAME, got"
    assert ddetr(command, *rest).startswith(f"{needs} neither")
    assert ddetr(command, "--checkpoint", "a", "--weights", "b", *rest).startswith(f"{needs} both")
    assert "there is nothing of this name" in ddetr(command, "--weights", "nonsense", *rest)


def test_a_name_end_to_end(
    ddetr: Callable[..., str], served: Served, run: Path, shapes: Path, tmp_path: Path, tiny_model: dict[str, Any]
) -> None:
    """As a user has it: another process, which knows the hub by its environment alone."""
    save_checkpoint(tmp_path / "model.safetensors", load_checkpoint(run / "best.pth"))
    served.repos["org/shapes"] = Repo({"main": {"model.safetensors": (tmp_path / "model.safetensors").read_bytes()}})
    image = next(iter(sorted((shapes / "val").glob("*.jpg"))))
    command = [sys.executable, "-m", "ddetr", "predict", "--weights", "org/shapes", "--output", "by name", str(image)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "objects in 1 images" in done.stdout
    ddetr("predict", "--checkpoint", run / "best.pth", "--output", "by file", image)
    by_name, by_file = (
        json.loads((tmp_path / f"by {what}" / "predictions.json").read_text()) for what in ("name", "file")
    )
    assert len(by_name) == 36
    assert by_name == by_file
    assert "COCO metrics: 4 images" in ddetr("eval", "--weights", "org/shapes", "--data", shapes)
    model = from_pretrained("org/shapes")
    assert not model.training
    state_dict = load_checkpoint(run / "best.pth").model
    assert all(tensor.equal(state_dict[name]) for name, tensor in model.state_dict().items())
    served.is_down = True
    assert DeformableDETR.from_pretrained(run / "best.pth").config["num_queries"] == tiny_model["num_queries"]


def test_push(ddetr: Callable[..., str], served: Served, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", served.token)
    out = ddetr("weights", "push", "--license", "cc-by-4.0", "--private", run, "me/shapes")
    files = served.repos["me/shapes"].branches["main"]
    assert set(files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    assert all(f"{name} " in out for name in files)
    assert "images of the validation are not among them" in out
    assert f"uploaded     {served.address}/me/shapes/commit/" in out
    assert "ddetr predict --weights me/shapes --output predictions IMAGES" in out
    assert served.repos["me/shapes"].private
    pushed, trained = from_pretrained("me/shapes").state_dict(), load_checkpoint(run / "best.pth").model
    assert all(tensor.equal(trained[name]) for name, tensor in pushed.items())


def test_a_dry_run_uploads_nothing(ddetr: Callable[..., str], served: Served, run: Path, tmp_path: Path) -> None:
    push = ["weights", "push", "--license", "mit", run, "me/shapes"]
    assert "nothing was uploaded; the files are in shapes" in ddetr(*push, "--dry_run")
    assert load_checkpoint(tmp_path / "shapes").categories == tuple(SHAPES)
    assert "shapes holds something already: choose a new folder" in ddetr(*push, "--dry_run")
    assert "the files are in there" in ddetr(*push, "--output", "there")
    assert served.requests == []


def test_what_cannot_be_pushed(ddetr: Callable[..., str], served: Served, run: Path, tmp_path: Path) -> None:
    assert "needs --license LICENSE" in ddetr("weights", "push", run, "me/shapes")
    push = ["weights", "push", "--license"]
    assert "--license: expected the hub's name of a licence" in ddetr(*push, "Apache 2", run, "me/shapes")
    assert "expected a repository on the hub such as org/name" in ddetr(*push, "mit", run, "shapes")
    assert "the hub does not know who you are" in ddetr(*push, "mit", run, "me/shapes")
    (run / "best.pth").rename(tmp_path / "best.pth")
    assert "holds no best.pth or last.pth" in ddetr(*push, "mit", run, "me/shapes")
    assert "expected a run folder" in ddetr(*push, "mit", tmp_path / "best.pth", "me/shapes")
    assert "me/shapes" not in served.repos

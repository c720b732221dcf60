"""`ddetr eval` says what its number is of: what the reader found, what was left out, what could not be read."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.checkpoint import load_checkpoint, save_checkpoint
from ddetr.cli.main import main
from ddetr.datasets.config import DataSource
from ddetr.errors import InputError
from ddetr.inference.evaluate_checkpoint import evaluate_checkpoint
from ddetr.inference.predictor import Predictor


@pytest.fixture
def data(shapes: Path, tmp_path: Path) -> Path:
    """Four validation images with 11 objects, to be spoilt."""
    shutil.copytree(shapes, tmp_path / "data")
    return tmp_path / "data"


@pytest.fixture
def measured(tiny_run: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> Callable[..., tuple]:
    """(metrics, what metrics.json says of the data, what was shown)."""

    def measure(**options: Any) -> tuple:
        metrics = evaluate_checkpoint(
            str(tiny_run.path / "best.pth"), DataSource(str(data)), output=str(tmp_path / "out"), **options
        )
        content = json.loads((tmp_path / "out" / "metrics.json").read_text())
        return metrics, content.get("measured_on"), " ".join(re.findall(r"[^\s│┃]+", capsys.readouterr().out))

    return measure


def change_annotations(data: Path, change: Callable[[dict[str, Any]], None]) -> None:
    file = data / "annotations" / "instances_val.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


def first_image(data: Path) -> Path:
    return sorted((data / "val").iterdir())[0]


def test_nothing_is_said_of_whole_data(measured: Callable[..., tuple]) -> None:
    metrics, measured_on, shown = measured()
    assert metrics.num_images == 4
    assert measured_on is None
    assert shown == ""


def test_a_missing_image_is_shown_and_counted(measured: Callable[..., tuple], data: Path) -> None:
    gone = first_image(data)
    gone.unlink()
    metrics, measured_on, shown = measured()
    assert metrics.num_images == 3
    assert (measured_on["num_images"], measured_on["num_images_listed"]) == (3, 4)
    assert measured_on["left_out"] == {"missing-image": 1}
    assert "measured on 3 of 4 images" in shown
    assert gone.name in shown


def test_a_class_that_the_checkpoint_lacks_is_shown_and_counted(measured: Callable[..., tuple], data: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        content["categories"][0]["name"] = "hexagon"

    change_annotations(data, rename)
    metrics, measured_on, shown = measured()
    assert "'hexagon' is no class" in shown
    assert measured_on["left_out"]["category-unknown"] == 11 - metrics.num_objects > 0
    assert "measured on" not in shown, "all images were"


def test_a_refused_annotation_stops_unless_it_is_accepted(measured: Callable[..., tuple], data: Path) -> None:
    def spoil(content: dict[str, Any]) -> None:
        content["annotations"][0]["bbox"][2] = float("nan")

    change_annotations(data, spoil)
    with pytest.raises(InputError, match=r"was refused: .*no number.*--accept_refused"):
        measured()
    metrics, measured_on, shown = measured(accept_refused=True)
    assert metrics.num_objects == 10
    assert measured_on["left_out"] == {"nan-box": 1}
    assert "refused nan-box" in shown


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_image_is_named_and_counted(num_workers: int, measured: Callable[..., tuple], data: Path) -> None:
    """Its header is whole, so that only decoding finds out; its objects are not counted as missed."""
    damaged = first_image(data)
    damaged.write_bytes(damaged.read_bytes()[:-200])
    metrics, measured_on, shown = measured(num_workers=num_workers, batch_size=2)
    assert metrics.num_images == 3
    assert (measured_on["num_images"], measured_on["num_images_listed"]) == (3, 4)
    assert [image["path"] for image in measured_on["unreadable"]] == [str(damaged)]
    assert "measured on 3 of 4 images" in shown
    assert f"not read {damaged}" in shown


def test_only_damaged_images(measured: Callable[..., tuple], data: Path) -> None:
    for image in (data / "val").iterdir():
        image.write_bytes(image.read_bytes()[:-200])
    with pytest.raises(InputError, match=r"none of the 4 images of .* can be read: "):
        measured()


def test_optimized_measures_the_same(measured: Callable[..., tuple]) -> None:
    assert pytest.approx(measured()[0].AP, abs=1e-3) == measured(optimize="float32")[0].AP


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_workers": -1}, "num_workers must be at least 0, got -1"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"max_detections": 0}, "max_detections must be at least 1, got 0"),
    ],
)
def test_numbers_out_of_range(options: dict[str, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        evaluate_checkpoint("nowhere.pth", DataSource("nowhere"), **options)


@pytest.mark.parametrize("command", ["eval", "predict", "python"])
def test_a_diverged_checkpoint_is_refused(
    command: str, tiny_run: Any, shapes: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    checkpoint = load_checkpoint(tiny_run.path / "best.pth")
    name = "transformer.decoder.layers.0.norm1.weight"
    checkpoint.model[name] = torch.full_like(checkpoint.model[name], torch.nan)
    path = str(tmp_path / "nan.pth")
    save_checkpoint(path, checkpoint)
    if command == "python":
        with pytest.raises(InputError, match=f"{name} holds values that are NaN"):
            Predictor.from_checkpoint(path)
        return
    rest = ["--data", str(shapes)] if command == "eval" else ["--output", str(tmp_path / "out"), str(shapes / "val")]
    assert main([command, "--checkpoint", path, *rest]) == 2
    assert f"{name} holds values that are NaN" in capsys.readouterr().err


def test_options_of_the_command_line(tiny_run: Any, shapes: Path, capsys: pytest.CaptureFixture) -> None:
    best = str(tiny_run.path / "best.pth")
    assert main(["eval", "--checkpoint", best, "--data", str(shapes), "--optimize", "--accept_refused"]) == 0
    assert "COCO metrics: 4 images" in capsys.readouterr().out
    assert main(["eval", "--checkpoint", best, "--data", str(shapes), "--optimize=int8"]) == 2
    assert "expected one of float32, bfloat16, compile" in capsys.readouterr().err


def test_classes_of_the_data_that_are_others_by_id(measured: Callable[..., tuple], data: Path) -> None:
    """The names decide, and it is said."""

    def renumber(content: dict[str, Any]) -> None:
        for place, name in (("categories", "id"), ("annotations", "category_id")):
            for entry in content[place]:
                entry[name] += 10

    expected = measured()[0]
    change_annotations(data, renumber)
    metrics, _, shown = measured()
    assert metrics.AP == expected.AP
    assert "matched by name" in shown

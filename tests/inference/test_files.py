"""Prediction for files: folders, patterns, names that meet, files that can not be read, whole outputs only."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.inference.files import find_images, predict_files
from ddetr.inference.predictor import Predictor

CATEGORIES = (Category(3, "cat"), Category(17, "Käuzchen"))


class StubModel(torch.nn.Module):
    def forward(self, images, mask):
        logits = torch.tensor([[2.0, -9], [-9, 0.5]])
        boxes = torch.tensor([[0.5, 0.5, 0.5, 0.5], [0.3, 0.3, 0.2, 0.4]])
        return {"pred_logits": logits.repeat(len(images), 1, 1), "pred_boxes": boxes.repeat(len(images), 1, 1)}


@pytest.fixture
def predictor() -> Predictor:
    return Predictor(StubModel(), CATEGORIES, image_size=40, max_size=64, threshold=0.5, device="cpu")


def save_image(path, size_wh=(48, 32), seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size_wh[1], size_wh[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def folder(tmp_path):
    save_image(tmp_path / "in" / "x" / "a.jpg")
    save_image(tmp_path / "in" / "x" / "b.png")
    save_image(tmp_path / "in" / "y" / "a.jpg", size_wh=(64, 50))
    save_image(tmp_path / "in" / "y" / "A.png")
    (tmp_path / "in" / "notes.txt").write_text("no image")
    (tmp_path / "in" / "x" / "._a.jpg").write_bytes(b"macOS")
    return tmp_path / "in"


def test_a_folder(predictor, folder, tmp_path):
    seen = []
    output = tmp_path / "deep" / "out"
    summary = predict_files(predictor, [folder], output, batch_size=3, progress=lambda *step: seen.append(step))
    assert seen == [(3, 4), (4, 4)]
    assert (summary.num_images, summary.num_detections, summary.failures) == (4, 8, ())
    assert [path.name for path in summary.annotated] == ["a.jpg", "b.png", "A.png", "a_2.jpg"]
    assert sorted(path.name for path in output.iterdir()) == ["annotated", "predictions.json", "predictions_named.json"]
    assert sorted(path.name for path in (output / "annotated").iterdir()) == ["A.png", "a.jpg", "a_2.jpg", "b.png"]
    results = json.loads(summary.predictions.read_text())
    assert results[0] == {
        "image_id": 1,
        "category_id": 3,
        "bbox": [12, 8, 24, 16],
        "score": pytest.approx(0.8808, abs=1e-4),
    }
    assert [result["image_id"] for result in results] == [1, 1, 2, 2, 3, 3, 4, 4]
    named = json.loads(summary.predictions_named.read_text(encoding="utf-8"))
    assert named["categories"][1] == {"label": 1, "category_id": 17, "name": "Käuzchen"}
    assert "Käuzchen" in summary.predictions_named.read_text(encoding="utf-8")
    last = named["images"][3]
    assert (last["width"], last["height"], last["image_id"]) == (64, 50, 4)
    assert last["annotated"] == "annotated/a_2.jpg"
    assert last["path"].endswith("a.jpg")
    assert last["detections"][0]["name"] == "cat"
    with Image.open(output / last["annotated"]) as picture:
        assert picture.size == (64, 50)


def test_what_can_not_be_read_is_reported_and_skipped(predictor, folder, tmp_path, caplog):
    (folder / "x" / "broken.jpg").write_bytes((folder / "x" / "a.jpg").read_bytes()[:300])
    (folder / "x" / "empty.png").write_bytes(b"")
    save_image(folder / "thin.png", size_wh=(400, 1))
    summary = predict_files(predictor, [folder], tmp_path / "out", batch_size=2)
    assert summary.num_images == 4
    assert {path.name for path, _ in summary.failures} == {"broken.jpg", "empty.png", "thin.png"}
    assert "broken.jpg" in caplog.text
    named = json.loads(summary.predictions_named.read_text())
    assert len(named["failures"]) == 3
    assert len(named["images"]) == 4


def test_nothing_readable(predictor, tmp_path):
    (tmp_path / "a.jpg").write_bytes(b"")
    summary = predict_files(predictor, [tmp_path / "a.jpg"], tmp_path / "out")
    assert (summary.num_images, len(summary.failures)) == (0, 1)
    assert json.loads(summary.predictions.read_text()) == []


def test_threshold(predictor, folder, tmp_path):
    summary = predict_files(predictor, [folder / "x"], tmp_path / "out", threshold=0.7)
    assert summary.num_detections == 2
    assert json.loads(summary.predictions_named.read_text())["threshold"] == 0.7


def test_inputs_stay_as_they_are(predictor, folder):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for output in (folder, folder / "x", folder / "y"):
        predict_files(predictor, [folder / "x", folder / "y"], output)
    for path, content in before.items():
        assert path.read_bytes() == content


def test_own_pictures_are_neither_input_nor_overwritten_as_input(predictor, folder):
    first = predict_files(predictor, [folder], folder)
    again = predict_files(predictor, [folder], folder)
    assert first.num_images == again.num_images == 4
    picture = first.annotated[0]
    content = picture.read_bytes()
    summary = predict_files(predictor, [picture], folder)
    assert summary.annotated[0].name == "a_2.jpg"
    assert picture.read_bytes() == content


def test_files_named_by_number_keep_it_as_image_id(predictor, tmp_path):
    for number in (139, 285):
        save_image(tmp_path / f"{number:012}.jpg")
    summary = predict_files(predictor, [tmp_path / "000000000285.jpg", tmp_path / "000000000139.jpg"], tmp_path / "out")
    assert {result["image_id"] for result in json.loads(summary.predictions.read_text())} == {139, 285}
    save_image(tmp_path / "more" / "139.jpg")
    summary = predict_files(predictor, [tmp_path / "*.jpg", tmp_path / "more"], tmp_path / "out")
    assert [entry["image_id"] for entry in json.loads(summary.predictions_named.read_text())["images"]] == [1, 2, 3]


def test_finding_images(folder, monkeypatch):
    assert [path.name for path in find_images([folder])] == ["a.jpg", "b.png", "A.png", "a.jpg"]
    assert [path.name for path in find_images([f"{folder}/*/*.png"])] == ["b.png", "A.png"]
    assert [path.name for path in find_images([f"{folder}/**/a.*"])] == ["a.jpg", "a.jpg"]
    assert [path.name for path in find_images([folder / "x" / "b.png", folder / "x"])] == ["b.png", "a.jpg"]  # once
    odd = save_image(folder / "odd [1].jpg")
    assert find_images([odd]) == [odd]
    assert find_images(odd) == [odd]
    monkeypatch.chdir(folder)
    assert len(find_images(["."])) == 5


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["missing.jpg"], "There is no file or folder .*missing.jpg"),
        (["*.bmp"], "Nothing matches"),
        (["*.txt"], "There are no images in"),
        ([], "got none"),
        (["hollow"], "There are no images in .*hollow"),
    ],
)
def test_nothing_found_says_so(predictor, folder, tmp_path, given, message):
    (folder / "hollow").mkdir()
    with pytest.raises(InputError, match=message):
        predict_files(predictor, [folder / name for name in given], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_wrong_output_and_batch_size(predictor, folder):
    with pytest.raises(InputError, match="Cannot make the output folder"):
        predict_files(predictor, [folder], folder / "notes.txt")
    with pytest.raises(InputError, match="batch_size"):
        predict_files(predictor, [folder], folder / "out", batch_size=0)


def test_a_stopped_run_leaves_no_half_file(predictor, folder, tmp_path, monkeypatch):
    predict_files(predictor, [folder], tmp_path / "out")
    before = (tmp_path / "out" / "predictions.json").read_text()

    def broken(*args):
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", broken)
    with pytest.raises(OSError, match="disk full"):
        predict_files(predictor, [folder], tmp_path / "out", threshold=0)
    assert (tmp_path / "out" / "predictions.json").read_text() == before
    assert not list((tmp_path / "out").rglob("*.tmp"))


def test_images_that_are_not_read_are_named(predictor, folder, tmp_path, caplog):
    for name in ("x/b.NEF", "y/c.nef", "y/._d.nef", "e.psd"):
        (folder / name).write_bytes(b"x")
    save_image(folder / "y" / "f.jp2")
    assert predict_files(predictor, [folder], tmp_path / "out").num_images == 5
    said = [record.getMessage() for record in caplog.records]
    assert any(one.startswith("2 .nef files are not read, such as ") and "develop" in one for one in said)
    assert any("1 .psd files are not read" in one for one in said)
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.cr2").write_bytes(b"x")
    with pytest.raises(InputError, match=r"There are no images in .*1 \.cr2 files are not read"):
        predict_files(predictor, [tmp_path / "raw"], tmp_path / "out")

import hashlib
import json

import numpy as np
import pytest

from ddetr.datasets import draw_shapes, load_annotations, read_image
from ddetr.datasets.shapes import ALL_CLASSES, CLASSES, HARD, Difficulty, draw_image
from ddetr.errors import InputError


def fingerprint(folder):
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_the_same_seed_draws_the_same_files(tmp_path):
    first = fingerprint(draw_shapes(tmp_path / "a", 6, 3, 96, seed=1))
    assert first == fingerprint(draw_shapes(tmp_path / "b", 6, 3, 96, seed=1))
    assert len(first) == 11
    other = fingerprint(draw_shapes(tmp_path / "c", 6, 3, 96, seed=2))
    assert all(first[name] != other[name] for name in first)
    more = fingerprint(draw_shapes(tmp_path / "d", 8, 3, 96, seed=1))
    assert {name: more[name] for name in first if name.endswith(".jpg")} == {
        name: value for name, value in first.items() if name.endswith(".jpg")
    }


def test_it_is_a_sound_coco_data_set(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", 40, 10)
    for split, count in (("train", 40), ("val", 10)):
        annotations = load_annotations(folder, split)
        assert annotations.findings == ()
        assert len(annotations.images) == count
        assert tuple(category.name for category in annotations.categories) == CLASSES
        counts = [len(record.labels) for record in annotations.images]
        assert min(counts) >= 1
        assert max(counts) <= 6
        assert {record.size_hw for record in annotations.images} == {(160, 160)}
    train = load_annotations(folder, "train").images
    assert (np.bincount(train.labels, minlength=3) > 0.15 * len(train.labels)).all()
    assert not list(tmp_path.glob(".*")), "the drawing folder is gone"
    assert len({hashlib.sha256(record.path.read_bytes()).hexdigest() for record in train}) == 40


def test_boxes_enclose_what_was_drawn(monkeypatch):
    """On a flat grey background the coloured pixels are the shapes' and their shadows'."""
    import ddetr.datasets.shapes as shapes

    monkeypatch.setattr(shapes, "_background", lambda rng, size, hue: np.full((size, size, 3), 128, np.uint8))
    for seed in range(30):
        image, [(label, box, area)] = draw_image(np.random.default_rng(seed), 160, Difficulty(max_objects=1))
        pixels = np.asarray(image).astype(int)
        coloured = (pixels.max(axis=2) - pixels.min(axis=2)) > 25
        ys, xs = np.nonzero(coloured)
        seen = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(seen - box).max() <= 1.0, (seed, CLASSES[label])
        fill = area / ((box[2] - box[0]) * (box[3] - box[1]))
        assert abs(area - coloured.sum()) / area < 0.12
        low, high = {"circle": (0.76, 0.81), "square": (0.55, 1.01), "triangle": (0.35, 0.51)}[CLASSES[label]]
        assert low < fill < high


def test_a_complete_set_is_used_again(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", 4, 2)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("*")}
    assert draw_shapes(folder, 4, 2) == folder
    assert before == {file: file.stat().st_mtime_ns for file in folder.rglob("*")}


def test_anything_else_in_the_folder_is_left_alone(tmp_path):
    folder = draw_shapes(tmp_path / "shapes", 4, 2)
    with pytest.raises(InputError, match="holds something other than the shapes asked for"):
        draw_shapes(folder, 5, 2)
    next((folder / "train").iterdir()).unlink()
    with pytest.raises(InputError, match="holds something other"):
        draw_shapes(folder, 4, 2)
    precious = tmp_path / "mine"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(InputError):
        draw_shapes(precious, 4, 2)
    assert (precious / "thesis.txt").read_text() == "years of work"
    assert not list(tmp_path.glob(".*"))


def test_an_empty_folder_and_missing_parents_are_fine(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    assert (draw_shapes(tmp_path / "a" / "b", 1, 1) / "train" / "000000.jpg").is_file()
    assert (draw_shapes(tmp_path / "x" / "y", 1, 1) / "val").is_dir()


def test_image_size_and_wrong_numbers(tmp_path):
    folder = draw_shapes(tmp_path / "big", 1, 1, image_size=320)
    assert read_image(folder / "train" / "000000.jpg").shape == (3, 320, 320)
    content = json.loads((folder / "annotations" / "instances_train.json").read_text())
    assert content["images"][0]["width"] == 320
    with pytest.raises(InputError, match="at least 1 image per split and 32 pixels"):
        draw_shapes(tmp_path / "none", 0, 1)


def test_the_default_set_is_the_one_that_has_always_been_drawn(tmp_path):
    _, objects = draw_image(np.random.default_rng([0, 0, 7]), 96)
    assert [(CLASSES[label], *box) for label, box, _ in objects] == [("circle", 16.25, 33.5, 47.25, 64.5)]
    folder = draw_shapes(tmp_path / "shapes", 1, 1, 64)
    info = json.loads((folder / "annotations" / "instances_train.json").read_text())["info"]
    assert info["parameters"] == {"version": 1, "num_train": 1, "num_val": 1, "image_size": 64, "seed": 0}


def test_the_hard_set_has_crowds_of_all_sizes_and_classes(tmp_path):
    folder = draw_shapes(tmp_path / "hard", 40, 2, difficulty=HARD)
    train = load_annotations(folder, "train")
    assert train.findings == ()
    assert tuple(category.name for category in train.categories) == ALL_CLASSES
    counts = [len(record.labels) for record in train.images]
    assert min(counts) <= 3
    assert max(counts) > 20
    assert np.bincount(train.images.labels, minlength=10).min() > 0
    boxes = np.concatenate([record.boxes_xyxy for record in train.images])
    assert boxes.min() >= 0
    assert boxes.max() <= 160
    sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1)
    assert np.percentile(sides, 10) < 10
    assert sides.max() > 80
    with pytest.raises(InputError, match="holds something other"):
        draw_shapes(folder, 40, 2)  # the default set of the same sizes


def test_an_impossible_difficulty():
    with pytest.raises(InputError, match="num_classes must lie in 1 to 10, got 11"):
        Difficulty(num_classes=11)
    with pytest.raises(InputError, match="smallest must be at most largest, got 0.5 and 0.4"):
        Difficulty(smallest=0.5, largest=0.4)

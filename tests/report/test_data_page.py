"""The page of `ddetr data show`: whole and self-contained for any data set, and it shows what a person has to see."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from page_reader import Page, read_whole_page
from PIL import Image

from ddetr.cli import main as cli
from ddetr.datasets import Annotations, Category, ImageTable, load_annotations
from ddetr.datasets.config import DataConfig, PageConfig
from ddetr.errors import InputError
from ddetr.report import data_figures, data_page, tables
from ddetr.report.data_pool import CROWDED, EMPTY, RANDOM, RARE, SMALL, Pool, choose
from ddetr.untrusted import MAX_ROWS

EVIL = "<script>alert(1)</script>"


def make_split(
    boxes: list[list[tuple[float, float, float, float, int]]],
    *,
    names: list[str] | None = None,
    folder: Path = Path("/nowhere"),
    ignored: list[tuple[int, int]] | None = None,
    size_hw: tuple[int, int] = (48, 64),
) -> Annotations:
    """Images 0.png, 1.png, ... with boxes (left, top, right, bottom, label) each; ignored: (image, box) numbers."""
    rows = [(i, j, *box) for i, of_image in enumerate(boxes) for j, box in enumerate(of_image)]
    columns = np.array(rows, np.float64).reshape(-1, 7)
    corners = columns[:, 2:6]
    images = ImageTable(
        np.arange(len(boxes)),
        [str(folder / f"{i}.png") for i in range(len(boxes))],
        np.tile(size_hw, (len(boxes), 1)),
        columns[:, 0].astype(int),
        corners,
        columns[:, 6].astype(int),
        (corners[:, 2:] - corners[:, :2]).prod(axis=1),
        np.array([row[:2] in (ignored or []) for row in rows], bool),
    )
    labels = columns[:, 6].astype(int)
    names = names or [f"class {label}" for label in range(labels.max(initial=0) + 1)]
    return Annotations("made/train", "coco", tuple(Category(i + 1, name) for i, name in enumerate(names)), images)


def draw_images(split: Annotations) -> Annotations:
    for record in split.images:
        record.path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((*record.size_hw, 3), 90, np.uint8)).save(record.path)
    return split


def write_page(
    tmp_path: Path,
    train: Annotations,
    val: Annotations | None = None,
    options: dict[str, Any] | None = None,
    **page: Any,
) -> tuple[Page, list[tuple[str, str]]]:
    data = DataConfig(str(tmp_path / "data"), image_size=64, **(options or {}))
    path = tmp_path / "data.html"
    failures = data_page.write_data_page(path, train, val, data, PageConfig(**page))
    return read_whole_page(path, data_page.SECTIONS), failures


def shown(page: Page) -> list[str]:
    """Names of the images, in the order of the page."""
    return re.findall(r"\b(\d+)\.png ", page.text)


@pytest.mark.parametrize("kind", ["drawn_coco", "cells"])
def test_a_whole_page(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> None:
    root = request.getfixturevalue(kind)
    train = load_annotations(root, "train2017" if kind == "drawn_coco" else "train")
    val = load_annotations(root, "val2017" if kind == "drawn_coco" else "val", categories=train.categories)
    page, failures = write_page(tmp_path, train, val, num_images=9)
    assert failures == []
    for category in train.categories:
        assert category.name in page.text
    assert f"{len(train.images)} training images, {len(val.images)} validation images" in page.text
    for finding in train.findings:
        assert finding.kind in page.text
    assert ("Dashed" in page.text) == any(record.ignore.any() for split in (train, val) for record in split.images)
    assert len(page.all("img")) >= 9
    assert {image["src"].partition(",")[0] for image in page.all("img")} == {"data:image/webp;base64"}
    assert (tmp_path / "data.html").stat().st_size < 2_000_000
    assert page.all("rect")  # the histograms


def test_the_same_seed_makes_the_same_page_and_another_one_another(tmp_path: Path) -> None:
    split = draw_images(make_split([[(2, 2, 12 + i, 20, 0)] for i in range(20)], folder=tmp_path))

    def made(seed: int) -> str:
        write_page(tmp_path, split, num_images=6, seed=seed)
        return re.sub(r"made \S+ \S+", "", (tmp_path / "data.html").read_text())

    first = made(1)
    assert made(1) == first
    assert made(2) != first


def test_what_has_to_be_seen_is_chosen() -> None:
    """Of 100 images: three rare classes, one tiny object, one crowd, images without objects."""
    boxes = [[(0.0, 0.0, 30.0, 30.0, 0)] for _ in range(100)]
    boxes[17] = [(0, 0, 20, 20, 1)]
    boxes[31] = [(0, 0, 20, 20, 2), (0, 0, 20, 20, 0)]
    boxes[62] = [(0, 0, 20, 20, 3)]
    boxes[40] = [(5, 5, 8, 7, 0), (0, 0, 30, 30, 0)]
    boxes[77] = [(0, 0, 30, 30, 0)] * 9
    boxes[80], boxes[81] = [], []
    pool = Pool.of([make_split(boxes)], 800)
    for seed in range(5):
        choices = choose(pool, 12, seed)
        assert len({choice.image for choice in choices}) == len(choices) == 12
        by_group = {group: [c for c in choices if c.group == group] for group in (RARE, SMALL, CROWDED, EMPTY, RANDOM)}
        assert {c.image for c in by_group[RARE]} >= {17, 31, 62}
        assert {c.label for c in by_group[RARE]} >= {1, 2, 3}
        assert by_group[SMALL][0].image == 40
        assert pool.objects.boxes_xyxy[by_group[SMALL][0].object].tolist() == [5, 5, 8, 7]
        assert [c.image for c in by_group[CROWDED]] == [77]
        assert {c.image for c in by_group[EMPTY]} <= {80, 81}
        assert by_group[EMPTY]
        assert by_group[RANDOM]
        assert choices == choose(pool, 12, seed)
    assert choose(pool, 0, 0) == []
    assert [choice.image for choice in choose(pool, 1, 0)][0] in (17, 31, 62)


def test_an_ignored_object_is_neither_rare_nor_small() -> None:
    boxes = [[(0, 0, 30, 30, 0), (0, 0, 2, 2, 1)], [(0, 0, 20, 20, 0)], []]
    choices = choose(Pool.of([make_split(boxes, ignored=[(0, 1)])], 800), 3, 0)
    assert {choice.label for choice in choices} == {0, None}
    assert [choice.image for choice in choices if choice.group == EMPTY] in ([2], [])
    assert len(choices) == 3


@pytest.mark.parametrize("boxes", [[], [[]], [[(3, 3, 20, 20, 0)]], [[], []]], ids=["no image", "empty", "one", "two"])
def test_a_data_set_of_almost_nothing(tmp_path: Path, boxes: list) -> None:
    page, failures = write_page(tmp_path, draw_images(make_split(boxes, folder=tmp_path)))
    assert failures == []
    assert sorted(set(shown(page))) == [str(i) for i in range(len(boxes))]
    assert ("no training image" in page.text) == (not boxes)
    write_page(tmp_path, make_split([], folder=tmp_path), make_split(boxes, folder=tmp_path), split="val")


def test_without_a_validation_split_its_images_cannot_be_wanted(tmp_path: Path) -> None:
    split = draw_images(make_split([[(3, 3, 20, 20, 0)]], folder=tmp_path))
    page, _ = write_page(tmp_path, split, None, split="both")
    assert not re.search(r"\bvalidation \d|validation images", page.text)
    with pytest.raises(InputError, match="--split val"):
        write_page(tmp_path, split, None, split="val")


def test_only_the_images_shown_are_opened_and_one_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = draw_images(make_split([[(3, 3, 20, 20, 0)] for _ in range(30)], folder=tmp_path))
    opened = []
    read_image = data_page.read_image
    monkeypatch.setattr(data_page, "read_image", lambda path, size: opened.append(path) or read_image(path, size))
    page, failures = write_page(tmp_path, split, num_images=4)
    assert len(opened) == 4
    assert failures == []
    for record in split.images:
        record.path.write_bytes(record.path.read_bytes()[:60])
    page, failures = write_page(tmp_path, split, num_images=4)
    assert len(failures) == 4 + data_page.PREVIEW_IMAGES
    for path, reason in failures:
        assert Path(path).name in page.text
        assert reason in page.text
    assert not page.all("img")


def test_names_from_the_data_are_escaped(tmp_path: Path) -> None:
    names = [EVIL, '"><img src=x onerror=alert(1)>', "собака", "\u202eevil", ""]
    boxes = [[(3, 3, 20, 20, label)] for label in range(len(names))]
    split = draw_images(make_split(boxes, names=names, folder=tmp_path / f"{EVIL.replace('/', '')}"))
    page, _ = write_page(tmp_path, split, split)  # which checks that there is no script
    for said in (EVIL, names[1], "собака", "\\u202eevil", "class 4"):
        assert said in page.text
    assert "\u202e" not in (tmp_path / "data.html").read_text()


def test_every_class_is_listed_and_of_too_many_the_rarest(tmp_path: Path) -> None:
    for num_classes in (1000, MAX_ROWS + 7):
        boxes = [[(3.0, 3.0, 20.0, 20.0, label)] * (1 + (label == 5)) for label in range(num_classes)]
        names = [f"kind{label}" for label in range(num_classes + 1)]
        page, _ = write_page(tmp_path, make_split(boxes, names=names), num_images=0)
        cells = {tag["title"] for tag in page.all("th") if "title" in tag}
        assert len(cells) == min(num_classes + 1, MAX_ROWS)
        assert {"kind5", names[-1]} <= cells  # the most frequent, and the one without an object
        assert f"Without an object in training: {names[-1]}." in page.text
        assert ("are left out here" in page.text) == (num_classes > MAX_ROWS)


def test_the_numbers() -> None:
    """Image of 96 x 64 pixels; at image_size 128 it is twice as large."""
    boxes = [[(0, 0, 10, 10, 0), (0, 0, 40, 40, 0), (0, 0, 60, 60, 1), (0, 0, 5, 5, 1)], [(0, 0, 20, 20, 0)], []]
    pool = Pool.of([make_split(boxes, ignored=[(0, 3)], size_hw=(64, 96))], 128)
    assert pool.trained_sides.tolist() == pytest.approx([20, 80, 120, 10, 40])
    original, trained = data_figures.size_rows([("training", pool)])
    assert [count for count, _ in original["counts"]] == [2, 2, 0]
    assert [share for _, share in trained["counts"]] == [0.25, 0.5, 0.25]
    assert data_figures.by_class([("training", pool)], 3) == {
        "images": ["2", "1", "0"],
        "median side as trained": ["40", "120", "-"],
    }
    assert data_figures.image_sizes([("training", pool)]) == [{"name": "96 x 64", "counts": [3]}]
    (per_image,) = [one for one in data_figures.charts([("training", pool)]) if "Objects per image" in one]
    assert "training: 33.3 % from 3 to 4" in per_image
    assert "median: training 1" in per_image


def test_shares_of_the_classes_compare_splits_of_any_size() -> None:
    split = {"name": "", "format": "", "num_images": 1, "num_objects": 1, "num_ignored": 0, "num_without_objects": 0}
    split |= {"objects_p50": 1, "objects_max": 1}
    names = [{"name": name, "category_id": i} for i, name in enumerate(("a", "b"))]
    counts = {"train": {**split, "class_counts": (10, 30)}, "val": {**split, "class_counts": (1, 1)}}
    rows = tables.data({**counts, "categories": names})["classes"]
    assert [(row["name"], row["bars"]) for row in rows] == [
        ("b", [1.0, pytest.approx(2 / 3)]),
        ("a", [pytest.approx(1 / 3), pytest.approx(2 / 3)]),
    ]


def test_the_augmentation_is_that_of_the_options(tmp_path: Path) -> None:
    split = draw_images(make_split([[(3, 3, 20, 20, 0)] for _ in range(4)], folder=tmp_path))
    page, _ = write_page(tmp_path, split, options={"augmentation": "none"}, num_images=0)
    assert page.text.count(": 85 x 64, 1 object") == 16
    assert "with augmentation none, image_size 64; shown" in page.text
    page, _ = write_page(tmp_path, split, options={"mosaic": 1.0}, num_images=0)
    assert "mosaic 1.0" in page.text
    assert page.text.count(" objects") >= 12


# --- the command


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[..., tuple]:
    """Runs it in an empty folder; (exit code, output, errors)."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: Any) -> tuple[int, str, str]:
        options = ["--num_images", "2", "--image_size", "64"]
        code = cli.main(["data", "show", *options, *map(str, arguments)])
        return code, *capsys.readouterr()

    return run


def test_the_command_says_where_the_page_is_and_replaces_its_own(
    show: Callable, shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        code, out, err = show(shapes)
        assert (code, err) == (0, "")
        assert f"page         {tmp_path / 'here' / 'data.html'}" in out
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["data.html"]
    page = read_whole_page(tmp_path / "here" / "data.html", data_page.SECTIONS)
    assert "shapes" in page.text
    assert show(shapes, "--output", "new/folder/page.html", "--split", "val")[0] == 0
    assert "2 of 4 images" in Page((tmp_path / "here" / "new" / "folder" / "page.html").read_text()).text


@pytest.mark.parametrize("content", ["mine", "", "<html><meta name='generator' content='ddetr run report 1'>"])
def test_a_file_of_somebody_else_is_kept(show: Callable, shapes: Path, tmp_path: Path, content: str) -> None:
    file = tmp_path / "here" / "data.html"
    file.write_text(content)
    code, _, err = show(shapes)
    assert code == 2
    assert "data.html is there and is no page" in err
    assert file.read_text() == content


def test_the_page_does_not_land_among_the_data_by_itself(
    show: Callable, shapes: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(shapes)
    before = sorted(shapes.rglob("*"))
    code, _, err = show(".")
    assert code == 2
    assert "--output FILE" in err
    assert sorted(shapes.rglob("*")) == before
    code, _, err = show(shapes, "--output", tmp_path)
    assert code == 2
    assert "is a folder" in err
    assert "num_images must lie in 0 to 100, got 101" in show(shapes, "--num_images", 101)[2]
    assert sorted(shapes.rglob("*")) == before


def test_the_command_names_images_that_cannot_be_read(show: Callable, damaged: Path) -> None:
    code, out, err = show(damaged, "--num_images", "20")
    assert (code, err) == (0, "")
    assert re.search(r"not read     \S*\.(png|jpg): ", out)


def test_the_command_on_strips_and_without_a_validation_split(show: Callable, shapes: Path, tmp_path: Path) -> None:
    root = tmp_path / "strips"
    shutil.copytree(shapes, root)
    for path in root.rglob("*val*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (file,) = root.glob("annotations/*.json")
    content = json.loads(file.read_text())
    Image.new("RGB", (2400, 2)).save(root / "strip.png")
    content["images"].append({"id": 10**6, "file_name": "../strip.png", "width": 2400, "height": 2})
    strip = {"id": 10**6, "image_id": 10**6, "category_id": content["categories"][0]["id"], "bbox": [0, 0, 30, 2]}
    content["annotations"].append(strip | {"area": 60, "iscrowd": 0})
    file.write_text(json.dumps(content))
    assert show(root, "--num_images", 20)[::2] == (0, "")
    assert "a strip" in Page((tmp_path / "here" / "data.html").read_text()).text
    code, _, err = show(root, "--split", "val")
    assert (code, "there is no validation split" in err) == (2, True)
    assert show(root, "--split", "val", "--data.val_fraction", 0.3)[::2] == (0, "")


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path) -> Path:
    """The shapes, their pixels cut off."""
    root = tmp_path / "damaged"
    shutil.copytree(shapes, root)
    for path in [*root.rglob("*.png"), *root.rglob("*.jpg")]:
        path.write_bytes(path.read_bytes()[:-200])
    return root

"""Run folders from anybody: a report of what can be shown, no picture of this machine, no hang, no traceback."""

import dataclasses
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_validation import make_found, make_objects, make_validation
from PIL import Image

from ddetr.cli import main as cli
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.report import REPORT_FILE, RunFiles, Validation, draw_pictures, signature, write_report
from ddetr.report.validation import BEST_FILE


def page_of(run: Path) -> str:
    return write_report(RunFiles.read(run)).read_text(encoding="utf-8")


def validation_of(path: Path, names: tuple[str, ...] = ("cat",)) -> Validation:
    return make_validation(names, [path], make_objects((0, [5, 5, 30, 30], 0)), make_found((0, [5, 5, 30, 30], 0, 0.9)))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with settings alone, of a data set that holds one image; another image lies elsewhere."""
    for place in ("data/val/a.jpg", "private/b.jpg"):
        (tmp_path / place).parent.mkdir(parents=True)
        Image.new("RGB", (64, 48), "red").save(tmp_path / place)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text(json.dumps({"data": {"path": str(tmp_path / "data")}, "epochs": 2}))
    return folder


def from_elsewhere(path: Path) -> Validation:
    """As `validation_of`; saved, it is not signed by this user."""
    return dataclasses.replace(validation_of(path), is_own=False)


@pytest.mark.parametrize("named", ["data", "", "/", "/home", "yaml"])
def test_a_run_from_elsewhere_gets_no_picture_of_this_machine(run: Path, tmp_path: Path, named: str) -> None:
    """Whatever data set its config.yaml names: that comes from the same hands."""
    (tmp_path / "data/linked.jpg").symlink_to(tmp_path / "private/b.jpg")
    (run / "link.jpg").symlink_to(tmp_path / "private/b.jpg")
    (tmp_path / "data.yaml").write_text(f"train: {tmp_path}/private\nval: {tmp_path}/private\nnames: [cat]\n")
    place = tmp_path / ("data.yaml" if named == "yaml" else named)
    (run / "config.yaml").write_text(json.dumps({"data": {"path": str(place)}}))
    for image in ("data/val/a.jpg", "private/b.jpg", "data/../private/b.jpg", "data/linked.jpg", "run/link.jpg"):
        from_elsewhere(tmp_path / image).save(run / BEST_FILE)
        page = page_of(run)
        assert "<img" not in page
        assert "is not shown: the run was made by someone else" in page
        assert draw_pictures(run, Validation.load(run / BEST_FILE), 1) == []


def test_a_run_from_elsewhere_shows_what_lies_in_it_or_in_a_folder_that_the_user_names(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(tmp_path / "data/val/a.jpg", run / "own.jpg")
    from_elsewhere(run / "own.jpg").save(run / BEST_FILE)
    assert page_of(run).count("<img") == 2
    (tmp_path / "data/linked.jpg").symlink_to(tmp_path / "private/b.jpg")
    for image, shown in (("data/val/a.jpg", 2), ("data/linked.jpg", 0), ("private/b.jpg", 0)):
        from_elsewhere(tmp_path / image).save(run / BEST_FILE)
        assert cli.main(["report", "--images", str(tmp_path / "data"), str(run)]) == 0
        assert (run / REPORT_FILE).read_text(encoding="utf-8").count("<img") == shown
    assert cli.main(["report", "--images", str(tmp_path / "nowhere"), str(run)]) == 2
    assert "--images: expected a folder of images" in capsys.readouterr().err


def test_an_own_run_shows_its_pictures_wherever_they_lie(run: Path, tmp_path: Path) -> None:
    """A data set's own links are followed, and a YOLO file names folders elsewhere."""
    (tmp_path / "data/linked.jpg").symlink_to(tmp_path / "private/b.jpg")
    for image in ("data/val/a.jpg", "data/linked.jpg", "private/b.jpg"):
        validation_of(tmp_path / image).save(run / BEST_FILE)
        assert page_of(run).count("<img") == 2


def test_a_signature_is_of_one_list_of_images_and_one_key(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, private = run / BEST_FILE, os.fsencode(tmp_path / "private/b.jpg")
    validation_of(tmp_path / "data/val/a.jpg").save(path)
    assert Validation.load(path).is_own
    rewritten(path, lambda columns: columns.update(paths=np.frombuffer(private, np.uint8)))
    assert not Validation.load(path).is_own
    for wrong in ("", "0" * 64, 7, None, "\ud800", ["a"]):
        validation_of(tmp_path / "private/b.jpg").save(path)
        rewritten(path, about(signature=wrong))
        assert not Validation.load(path).is_own
    Validation.load(path).save(path)  # what is read and written again gets no signature by that
    assert not Validation.load(path).is_own
    validation_of(tmp_path / "data/val/a.jpg").save(path)
    try:
        for folder, is_kept in (("cache", True), ("data/val/a.jpg", False)):  # the second is no folder
            monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / folder))
            signature._key.cache_clear()
            assert not Validation.load(path).is_own
            made_here = signature.signed(b"x")
            assert signature.is_signed(b"x", made_here)
            signature._key.cache_clear()
            assert signature.is_signed(b"x", made_here) == is_kept
        key = tmp_path / "cache/ddetr" / signature.KEY_FILE
        assert key.stat().st_mode & 0o077 == 0
        assert [other.name for other in key.parent.iterdir()] == [key.name]
    finally:
        signature._key.cache_clear()


@pytest.mark.parametrize("kind", ["pipe", "device", "text"])
def test_what_an_npz_names_is_read_as_an_image_or_not_at_all(run: Path, tmp_path: Path, kind: str) -> None:
    place = tmp_path / "data/val/c.jpg"
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    else:
        place.write_text("secret words")
    validation_of(place).save(run / BEST_FILE)
    page = page_of(run)
    assert "<img" not in page
    assert "can't be read" in page.replace("&#39;", "'")
    assert "secret words" not in page


def rewritten(path: Path, change: Callable[[dict[str, Any]], None], save: Callable[..., None] = np.savez) -> None:
    with np.load(path) as file:
        columns = dict(file)
    change(columns)
    with path.open("wb") as file:
        save(file, **columns)


def about(**values: Any) -> Callable[[dict[str, Any]], None]:
    def change(columns: dict[str, Any]) -> None:
        found = json.loads(columns["about"].tobytes()) | values
        columns["about"] = np.frombuffer(json.dumps(found).encode(), np.uint8)

    return change


def crowd_of(columns: dict[str, Any], number: int) -> dict[str, Any]:
    """Each object and detection many times."""
    return {n: np.repeat(c, number, axis=0) for n, c in columns.items() if n.startswith(("object_", "found_"))}


CHANGES: dict[str, Callable[[dict[str, Any]], None]] = {
    "pickled": lambda c: c.update(image_ids=np.array([{"a": 1}], dtype=object)),
    "words": lambda c: c.update(found_scores=np.array(["a"])),
    "times": lambda c: c.update(found_scores=np.zeros(1, "datetime64[s]")),
    "labels": lambda c: c.update(found_labels=np.array([10**6], np.int32)),
    "negative labels": lambda c: c.update(object_labels=np.array([-1], np.int32)),
    "images": lambda c: c.update(object_image=np.array([7], np.int32)),
    "sizes": lambda c: c.update(sizes_hw=np.zeros((1, 2), np.int32)),
    "paths": lambda c: c.update(paths=np.frombuffer(b"a\0b\0c", np.uint8)),
    "boxes": lambda c: c.update(found_boxes_xywh=np.full((1, 4), np.nan, np.float32)),
    "rows": lambda c: c.update(object_area=np.zeros(9, np.float32)),
    "curves": lambda c: c.update(curves=np.zeros((2, 101, 50), np.float32)),
    "nothing": lambda c: c.clear(),
    "crowd": lambda c: c.update(crowd_of(c, 30_000)),
    "threshold": about(threshold=float("nan")),
    "categories": about(categories=[["x", 1]]),
    "many classes": about(categories=[[i, "a"] for i in range(26_000)]),
    "no step": about(step=None),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_arrays_that_do_not_fit(run: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = run / BEST_FILE
    validation_of(tmp_path / "data/val/a.jpg").save(path)
    rewritten(path, change)
    with pytest.raises(InputError, match="can't be read"):
        Validation.load(path)
    assert "validation_best.npz</b>" in page_of(run)


def test_arrays_are_no_larger_than_their_file(run: Path, tmp_path: Path) -> None:
    path = run / BEST_FILE
    validation_of(tmp_path / "data/val/a.jpg").save(path)
    rewritten(path, lambda columns: None, np.savez_compressed)
    with pytest.raises(InputError, match="it is compressed"):
        Validation.load(path)
    validation_of(tmp_path / "data/val/a.jpg").save(path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    header = content["found_scores.npy"]
    content["found_scores.npy"] = header.replace(b"(1,), }" + b" " * 12, b"(1000000000000,), }")
    assert len(content["found_scores.npy"]) == len(header)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="found_scores is no plain array"):
        Validation.load(path)
    path.unlink()
    os.mkfifo(path)
    page_of(run)
    with pytest.raises(InputError, match="a named pipe"):
        Validation.load(path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.yaml", "a0: &a0 [x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{f'*a{i}, ' * 50}]\n" for i in range(9))),
        ("config.yaml", "data: [1]\nepochs: x\n"),
        ("config.yaml", "data: {path: 3, val_images: \"a\\0b\"}\n"),
        ("metrics.json", "[" * 100_000),
        ("metrics.json", '{"best": {"AP": ' + "9" * 5000 + "}}"),
        ("metrics.json", '{"best": {"AP": ' + "9" * 4000 + ', "step": "x", "epoch": 1e400, "per_class": 5}}'),
        ("metrics.json", '{"best": {"AP": 1, "per_class": [{"name": "a", "num_objects": "x", "category_id": []}]}}'),
        ("metrics.json", '{"best": {"AP": [], "per_class": [{"name": "a", "num_objects": "x", "category_id": 1}]}}'),
        ("audit.json", '{"train": {"class_counts": [], "name": 5}, "categories": [], "findings": [3]}'),
        ("audit.json", '{"train": {"class_counts": [1e999]}, "categories": [{"name": 5, "category_id": {}}]}'),
        ("environment.json", '{"sessions": [{"began": 1e17, "seen": -1e17, "state": ["x"], "step": 1e300}]}'),
        ("environment.json", '{"sessions": [{"began": ' + "9" * 4000 + ', "seen": 1, "state": {"a": 1}}]}'),
        ("train.csv", "step,loss\n1,1e308\n2,-1e308\n3,nan\n"),
        ("train.csv", "step," + ",".join(map(str, range(100_000))) + "\n"),
        ("train.csv", "step,loss\n1," + "9" * 1_000_000 + "\n"),
    ],
    ids=lambda text: text[:50],
)  # fmt: skip
def test_files_that_say_anything_cost_their_section_only(
    run: Path, name: str, content: str, capsys: pytest.CaptureFixture
) -> None:
    (run / name).write_text(content)
    assert cli.main(["report", str(run)]) == 0
    assert "Traceback" not in capsys.readouterr().err
    assert (run / REPORT_FILE).stat().st_size < 200_000


@pytest.mark.parametrize("name", ["config.yaml", "metrics.json", "audit.json", "environment.json", "train.csv"])
def test_pipes_in_a_run_folder(run: Path, name: str) -> None:
    shutil.copy(run / "config.yaml", run / "val.csv")
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert (name, True) in [(file, "a named pipe" in why) for file, why in RunFiles.read(run).missing]
    (run / "nothing").symlink_to("nowhere")
    assert "No such file" in page_of(run)


def test_names_do_nothing_to_a_page(run: Path, tmp_path: Path) -> None:
    evil = "a\u202eb\x1b[2J\n" + "x" * 5_000_000
    validation_of(tmp_path / "data/val/a.jpg", (evil,)).save(run / BEST_FILE)
    (run / "audit.json").write_text(json.dumps({"categories": [{"name": evil, "category_id": 1}]}))
    (run / "metrics.json").write_text(json.dumps({"best": {"per_class": [{"name": evil, "label": 0}]}}))
    (run / "train.csv").write_text(f"step,{evil[:8]}\n1,2\n2,3\n")
    page = page_of(run)
    assert not set(page) & set("\u202e\x1b")
    assert r"a\u202eb\x1b[2J" in page
    assert len(page) < 100_000


def test_a_page_of_many_classes_is_bounded(run: Path, tmp_path: Path) -> None:
    """20,000 classes: neither a matrix of 20,000 times 20,000 nor tables of as many rows."""
    names = tuple(f"class {i}" for i in range(20_000))
    validation = validation_of(tmp_path / "data/val/a.jpg", names)
    objects = make_objects(*((0, [5, 5, 30, 30], label) for label in (3, 19_999)))
    found = make_found((0, [5, 5, 30, 30], 3, 0.9), (0, [5, 5, 30, 30], 7, 0.9))
    validation = dataclasses.replace(validation, objects=objects, found=found, curves=validation.curves.astype("f4"))
    assert validation.categories[7] == Category(17, "class 7")
    validation.save(run / BEST_FILE)
    categories = [{"name": name, "category_id": i} for i, name in enumerate(names)]
    split = {"name": "train", "format": "coco", "num_images": 1, "num_objects": 2, "num_ignored": 0}
    split |= {"num_without_objects": 0, "objects_p50": 1.0, "objects_max": 2, "class_counts": [1] * len(names)}
    (run / "audit.json").write_text(json.dumps({"train": split, "categories": categories}))
    page = page_of(run)
    assert "<b>class 19999</b> taken for <b>class 7</b>" in page
    assert "18,000 more classes are left out" in page
    assert len(page) < 2_000_000

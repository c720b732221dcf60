"""`ddetr data convert`: what is written is what was read, and never half of it."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_parts import coco_object, voc_object, voc_xml
from PIL import Image

from ddetr.cli import main as cli
from ddetr.datasets import available_splits, detect_format, load_annotations, read_image
from ddetr.datasets.annotations import Annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.convert.conversion import Conversion, convert
from ddetr.datasets.convert.source import read_source
from ddetr.datasets.images import image_header
from ddetr.errors import InputError

TARGETS = ("coco", "yolo", "voc")


def converted(path: Path, out: Path, to: str, split: str | None = None, **options: Any) -> Conversion:
    return convert(read_source(TrainingSource(str(path)), split), out, to, **options)


def content(annotations: Annotations, with_ignored: bool = True) -> list[tuple[bytes, list[tuple[Any, ...]]]]:
    """(pixels, (class, ignore, box) of each object) of each image, in an order of their own."""
    found = []
    for record in annotations.images:
        objects = [
            (annotations.categories[label].name, bool(ignore), *np.round(box.astype(float), 2).tolist())
            for label, ignore, box in zip(record.labels.tolist(), record.ignore, record.boxes_xyxy)
            if with_ignored or not ignore
        ]
        found.append((read_image(record.path, record.size_hw).numpy().tobytes(), sorted(objects)))
    return sorted(found)


@pytest.fixture
def coco(make_coco: Callable[..., Path]) -> Path:
    """Gapped ids, fractions of a pixel, a crowd, an image without objects, a test split."""
    objects = [
        coco_object(1, 3, (4.25, 5.5, 20.125, 10.0625)),
        coco_object(1, 7, (0, 0, 64, 48), iscrowd=1),
        coco_object(1, 7, (1 / 3, 0.1, 0.5, 40.7)),
    ]
    make_coco([dict(one) for one in objects])
    make_coco([coco_object(2, 7)], split="val")
    return make_coco([coco_object(1, 3)], split="test", num_images=1)


@pytest.mark.parametrize("to", TARGETS)
def test_coco_to_each_and_back(coco: Path, tmp_path: Path, to: str) -> None:
    done = converted(coco, tmp_path / "out", to)
    assert detect_format(tmp_path / "out") == to
    assert sorted(available_splits(tmp_path / "out")) == ["test", "train", "val"]
    assert done.num_images == {"train": 2, "val": 2, "test": 1}
    converted(tmp_path / "out", tmp_path / "back", "coco")
    for split in ("train", "val", "test"):
        before, after = load_annotations(coco, split), load_annotations(tmp_path / "out", split)
        assert content(after) == content(before, with_ignored=to != "yolo")
        assert {f.kind for f in after.findings if f.action != "note"} == set()
        assert content(load_annotations(tmp_path / "back", split)) == content(after)
    if to == "coco":
        assert after.categories == before.categories
        assert [r.image_id for r in after.images] == [r.image_id for r in before.images]
        assert np.array_equal(after.images.area, before.images.area)
        assert done.notes == ()
    else:
        assert any("ids of images and classes are not kept" in note for note in done.notes)
        assert any("areas of masks" in note for note in done.notes)
    assert any("YOLO has no mark for them: 1" in note for note in done.notes) == (to == "yolo")
    assert any("some readers of Pascal VOC refuse: 2" in note for note in done.notes) == (to == "voc")


@pytest.mark.parametrize("to", TARGETS)
def test_voc_and_its_trainval(make_voc: Callable[..., Path], tmp_path: Path, to: str) -> None:
    files = {name: voc_xml([voc_object(), voc_object("dog", difficult=1)]) for name in "abc"}
    root = make_voc(files, {"train": "a", "val": "b", "trainval": "a\nb", "test": "c"})
    done = converted(root, tmp_path / "out", to)
    assert done.num_images == {"train": 1, "val": 1, "test": 1}
    assert any("the split trainval was left out" in note for note in done.notes)
    for split in ("train", "val", "test"):
        expected = content(load_annotations(root, split), with_ignored=to != "yolo")
        assert content(load_annotations(tmp_path / "out", split)) == expected


@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("orientation", [2, 6])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
def test_images_that_exif_turns_come_upright(
    make_coco: Callable[..., Path],
    write_image: Callable[..., Path],
    tmp_path: Path,
    to: str,
    orientation: int,
    stored: bool,
    suffix: str,
) -> None:
    """Whether their boxes were drawn on the upright or on the stored pixels: the new file has no orientation."""
    if suffix == ".tif" and stored:
        return  # Pillow turns it whatever is asked
    upright = orientation < 5 or stored
    name = f"1{suffix}"

    def edit(entries: dict[str, Any]) -> None:
        size = {"width": 64, "height": 48} if upright else {"width": 48, "height": 64}
        entries["images"] = [{"id": 1, "file_name": name} | size]

    root = make_coco(num_images=0, edit=edit)
    write_image(root / "train" / name, orientation=orientation)
    before = load_annotations(root, "train")
    converted(root, tmp_path / "out", to)
    after = load_annotations(tmp_path / "out", "train")
    record = after.images[0]
    with Image.open(record.path) as image:
        assert image.getexif().get(0x0112, 1) == 1
    assert record.size_hw == before.images[0].size_hw == (image_header(record.path).stored_hw)
    assert record.boxes_xyxy == pytest.approx(before.images[0].boxes_xyxy, abs=1e-3)
    difference = read_image(record.path).float() - read_image(before.images[0].path, before.images[0].size_hw).float()
    assert difference.abs().max() <= (8 if suffix == ".jpg" else 0)


@pytest.mark.parametrize("to", TARGETS)
def test_file_names(make_coco: Callable[..., Path], write_image: Callable[..., Path], tmp_path: Path, to: str) -> None:
    """Equal names in folders, spaces, other scripts, names that lists, addresses or systems take for something else."""
    names = [
        "a/1.jpg",
        "b/1.jpg",
        "a/1.png",
        "my photo (1).JPG",
        "Käfer.jpg",
        "犬.jpg",
        "100%#a?.jpg",
        "-x.jpg",
        "con.jpg",
    ]
    names += ["a.jpg.png", "two..jpg", "tab\tnew\nline.jpg", "ü" * 120 + ".jpg", "Big.jpg", "c/BIG.jpg", "'a'&<b>.jpg"]

    def edit(entries: dict[str, Any]) -> None:
        sizes = {"width": 64, "height": 48}
        entries["images"] = [{"id": i + 1, "file_name": name} | sizes for i, name in enumerate(names)]
        entries["annotations"] = [coco_object(i + 1, 3, (i, i, 10, 10)) | {"id": i} for i in range(len(names))]

    root = make_coco(num_images=0, edit=edit)
    for i, name in enumerate(names):
        write_image(root / "train" / name, seed=i)
    before = load_annotations(root, "train")
    done = converted(root, tmp_path / "out", to)
    after = load_annotations(tmp_path / "out", "train")
    assert content(after) == content(before)
    assert not [finding for finding in after.findings if finding.action != "note"]
    written = {record.path.name for record in after.images}
    assert {"Käfer.jpg", "犬.jpg", "my_photo_(1).JPG", "_x.jpg", "_con.jpg"} <= written
    assert len({name.casefold() for name in written}) == len(names)
    assert any("images under other names" in note for note in done.notes)


@pytest.mark.parametrize("to", TARGETS)
def test_class_names(make_coco: Callable[..., Path], tmp_path: Path, to: str) -> None:
    names = [
        "no",
        "010",
        "cat, dog",
        "a: b",
        "<b>&amp;",
        "'\"",
        "犬 🐕",
        "two\nlines",
        "bell\a",
        "#x",
        "",
        "null",
        "- a",
    ]
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(names)]
    objects = [coco_object(1, i + 1, (i, i, 5, 5)) for i in range(len(names))]
    root = make_coco(objects, categories=categories)
    before = load_annotations(root, "train")
    done = converted(root, tmp_path / "out", to)
    after = load_annotations(tmp_path / "out", "train")
    clean = {"two\nlines": "two lines", "bell\a": "bell"} if to == "voc" else {}
    expected = sorted(clean.get(category.name, category.name) for category in before.categories)
    assert sorted(category.name for category in after.categories) == expected
    by_box = {tuple(box): after.categories[label].name for box, label in _boxes(after)}
    for box, label in _boxes(before):
        name = before.categories[label].name
        assert by_box[tuple(box)] == clean.get(name, name)
    assert any("two\\nlines" in note for note in done.notes) == (to == "voc")


def _boxes(annotations: Annotations) -> list[tuple[list[float], int]]:
    return [
        (np.round(box.astype(float), 2).tolist(), label)
        for record in annotations.images
        for box, label in zip(record.boxes_xyxy, record.labels.tolist())
    ]


def test_classes_that_voc_cannot_tell_apart(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "cat"}, {"id": 3, "name": "unused"}]
    root = make_coco([coco_object(1, 1), coco_object(1, 2)], categories=categories)
    notes = converted(root, tmp_path / "voc", "voc").notes
    assert any("classes of one name are one class now: cat" in note for note in notes)
    assert any("classes without an object in train are not kept: unused" in note for note in notes)
    assert [category.name for category in load_annotations(tmp_path / "voc", "train").categories] == ["cat"]


def test_splits_of_other_names(make_voc: Callable[..., Path], make_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = make_voc({"a": voc_xml([voc_object()])}, {})
    done = converted(root, tmp_path / "1", "yolo")
    assert done.num_images == {"train": 1}
    assert any("no validation split" in note for note in done.notes)
    coco = make_coco(split="train2017")
    make_coco(split="val2017")
    make_coco(split="test-dev")
    done = converted(coco, tmp_path / "2", "yolo")
    assert done.num_images == {"train": 2, "val": 2, "test": 2}
    assert "the split test-dev is called test" in done.notes
    assert converted(coco, tmp_path / "3", "voc", split="val2017").num_images == {"val2017": 2}
    make_coco(split="extra")
    with pytest.raises(InputError, match="would not all have names of their own in YOLO; convert them one by one"):
        converted(coco, tmp_path / "4", "yolo")
    with pytest.raises(InputError, match='no split "gone"'):
        converted(coco, tmp_path / "4", "yolo", split="gone")
    assert not (tmp_path / "4").exists()


def test_nothing_is_overwritten_and_nothing_half_written(
    coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="is not empty: expected a new or an empty folder"):
        converted(coco, out, "coco")
    with pytest.raises(InputError, match="mine.txt is a file: expected a new"):
        converted(coco, out / "mine.txt", "coco")
    (out / "mine.txt").unlink()
    monkeypatch.chdir(out)
    with pytest.raises(InputError, match="is the folder that you are in"):
        converted(coco, Path("."), "coco")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="lies in a folder of the data set's images"):
        converted(coco, coco / "train" / "out", "coco")

    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(KeyboardInterrupt):
        converted(coco, out, "voc", progress=stop)
    assert sorted(tmp_path.rglob("*")) == before  # the empty folder is still there

    def meddle(done: int, total: int) -> None:
        (out / "mine.txt").write_text("precious")

    with pytest.raises(InputError, match="is not empty"):
        converted(coco, out, "voc", progress=meddle)
    assert [place.name for place in out.iterdir()] == ["mine.txt"]


def test_hard_links(coco: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = coco / "train" / "1.jpg"
    original.chmod(0o444)
    converted(coco, tmp_path / "linked", "coco", images="link")
    assert os.path.samefile(original, tmp_path / "linked" / "train" / "1.jpg")
    converted(coco, tmp_path / "copied", "coco")
    assert not os.path.samefile(original, tmp_path / "copied" / "train" / "1.jpg")

    def refuse(*_: Any) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    done = converted(coco, tmp_path / "far", "coco", images="link")
    assert "images copied, as they cannot be linked from there: 5" in done.notes
    assert (tmp_path / "far" / "train" / "1.jpg").read_bytes() == original.read_bytes()


def test_the_command(coco: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert cli.main(["data", "convert", str(coco), str(out), "--to", "yolo"]) == 0
    said = capsys.readouterr().out
    assert "Data audit" in said
    assert "train        2 images" in said
    assert "YOLO has no mark for them: 1" in said
    assert load_annotations(out, "train").format == "yolo"
    assert cli.main(["data", "convert", str(coco), str(out), "--to", "yolo"]) == 2
    assert cli.main(["data", "convert", str(coco), str(tmp_path / "new"), "--to", "kitti"]) == 2


def test_refused_data_is_not_converted(
    make_coco: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_coco([coco_object(), coco_object(bbox=(1, 2, "x", 4))])
    arguments = ["data", "convert", str(root), str(tmp_path / "out"), "--to", "voc"]
    assert cli.main(arguments) == 2
    said = capsys.readouterr()
    assert "nan-box" in said.out
    assert "nothing was written" in said.err
    with pytest.raises(InputError, match="Nothing was written"):
        converted(root, tmp_path / "out", "voc")
    assert not (tmp_path / "out").exists()
    root = make_coco([coco_object(), coco_object(bbox=(1, 2, 0, 4))])
    assert cli.main([*arguments, "--strict"]) == 2
    assert cli.main(arguments) == 0


def test_an_image_that_is_gone_or_damaged(coco: Path, tmp_path: Path) -> None:
    source = read_source(TrainingSource(str(coco)))
    (coco / "val" / "2.jpg").unlink()
    with pytest.raises(InputError, match="2.jpg"):
        convert(source, tmp_path / "out", "coco")
    assert not (tmp_path / "out").exists()


def test_coco_files_of_any_name(make_coco: Callable[..., Path], tmp_path: Path) -> None:
    root = make_coco()
    (root / "annotations" / "instances_train.json").rename(root / "a.json")
    (root / "b.json").write_text((root / "a.json").read_text())
    data = TrainingSource(str(root), train_annotations="a.json", val_annotations="b.json", val_images="train")
    done = convert(read_source(data), tmp_path / "out", "yolo")
    assert done.num_images == {"train": 2, "val": 2}
    assert (tmp_path / "out" / "images" / "val" / "1.jpg").is_file()


@pytest.mark.parametrize("to", ["coco", "yolo", "voc"])
def test_a_validation_split_is_held_back(
    make_voc: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], to: str
) -> None:
    objects = [voc_object("cat", (1, 2, 20, 30))]
    root, out = (
        make_voc({stem: voc_xml(objects) for stem in "abcd"}, lists={"everything": "a\nb\nc\nd"}),
        tmp_path / "out",
    )
    arguments = ["data", "convert", str(root), str(out), "--to", to, "--val_fraction", "0.25"]
    assert cli.main(arguments) == 0
    assert [len(load_annotations(out, name).images) for name in ("train", "val")] == [3, 1]
    assert cli.main([*arguments, "--split", "everything"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_no_validation_split_is_held_back_beside_another(coco: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has the split val already"):
        read_source(TrainingSource(str(coco), val_fraction=0.5))


def test_what_is_not_read_is_said_before_it_is_left_behind(make_coco: Callable[..., Path]) -> None:
    root = make_coco()
    (root / "annotations" / "old").mkdir()
    shutil.copy(root / "annotations" / "instances_train.json", root / "annotations" / "old")
    assert [finding.kind for finding in read_source(TrainingSource(str(root))).first.findings] == ["labels-not-read"]

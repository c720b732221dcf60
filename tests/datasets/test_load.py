import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest

from ddetr.datasets import available_splits, default_splits, detect_format, image_files, load_annotations
from ddetr.datasets.annotations import MAX_PLACES, FindingLog, ImageRecord, ImageTable
from ddetr.datasets.config import DataSource
from ddetr.datasets.load import _TRAIN_NAMES, _VAL_NAMES, FORMATS, _first
from ddetr.errors import InputError


def test_a_path_that_is_not_there_suggests_one(tmp_path):
    (tmp_path / "cells").mkdir()
    with pytest.raises(InputError, match=r"there is no .*cels: .* has no 'cels' \(did you mean cells\?\)"):
        detect_format(tmp_path / "cels")
    with pytest.raises(InputError, match=r"has no 'x'$"):
        load_annotations(tmp_path / "x" / "y", "train")


def test_a_folder_of_something_else_says_what_was_expected(tmp_path, write_image):
    for i in range(12):
        write_image(tmp_path / f"{i:02d}.jpg")
    (tmp_path / "package.json").write_text("{}")
    with pytest.raises(InputError, match=r"expected COCO .* Pascal VOC .* YOLO .*; found 00\.jpg, .* and 5 more; "):
        available_splits(tmp_path)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(InputError, match="found a file of another kind"):
        detect_format(tmp_path / "notes.txt")


def test_unknown_format_and_split(make_coco):
    root = make_coco()
    with pytest.raises(InputError, match=r"not \'cocoo\' \(did you mean coco\?\)"):
        load_annotations(root, "train", format="cocoo")
    with pytest.raises(InputError, match=r'has no split "tain"; it has: train \(did you mean train\?\)'):
        load_annotations(root, "tain")
    with pytest.raises(InputError, match="no voc data set"):
        default_splits(root, "voc")
    with pytest.raises(InputError, match=r"\(annotation_file\) is for formats of one file"):
        load_annotations(root, "train", format="voc", annotation_file="x.json")


def test_every_format_can_be_named():
    assert get_args(get_type_hints(DataSource)["format"]) == ("auto", *FORMATS)


def test_an_explicit_format_overrides_what_is_recognised(make_coco, make_yolo):
    root = make_coco()
    make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"}, root=root)
    assert detect_format(root) == "coco"
    assert load_annotations(root, "train", format="yolo").format == "yolo"


@pytest.mark.parametrize(
    ("splits", "train", "val"),
    [
        (["train", "val", "test"], "train", "val"),
        (["test", "train2017", "val2017"], "train2017", "val2017"),
        (["test", "train", "valid"], "train", "valid"),
        (["Train", "Validation"], "Train", "Validation"),
        (["train", "test"], "train", "test"),
        (["test", "trainval"], "trainval", "test"),
        (["test", "train", "trainval", "val"], "train", "val"),
        (["train2014", "val2014"], "train2014", "val2014"),
        (["train_v2", "val_v2"], "train_v2", "val_v2"),
        (["training", "testing"], "training", "testing"),
        (["all"], "all", None),
        (["a", "b"], None, None),
    ],
)
def test_default_splits(splits, train, val):
    assert _first(splits, _TRAIN_NAMES, "train") == train
    assert _first([split for split in splits if split not in (train, "trainval")], _VAL_NAMES, "val") == val


def test_no_split_called_train(make_coco):
    root = make_coco(split="a")
    assert default_splits(root) == ("a", None)
    make_coco(split="b")
    with pytest.raises(InputError, match="has the splits a, b: none is called train"):
        default_splits(root)


def test_splits_that_differ_in_capitals_are_not_guessed(make_coco):
    root = make_coco()
    make_coco(split="Train")
    with pytest.raises(InputError, match="splits Train, train, which differ in capitals alone: --data.train_split"):
        default_splits(root)
    assert default_splits(root, train_split="train") == ("train", None)


def test_a_wrapper_changes_no_format(make_coco, tmp_path):
    """Pascal VOC's reader looks deeper than COCO's, which comes first."""
    root = make_coco(root=tmp_path / "repo" / "src" / "data")
    for i in (1, 2):
        (root / "train" / f"{i}.xml").write_text("<annotation><object><name>a</name></object></annotation>")
    assert detect_format(root) == detect_format(tmp_path / "repo") == detect_format(tmp_path / "repo/src") == "coco"
    assert len(load_annotations(tmp_path / "repo", "train").images) == 2


def test_findings_beyond_the_limit_are_counted():
    log = FindingLog()
    for i in range(MAX_PLACES + 5):
        log.add("degenerate-box", "dropped", f"object {i}", "It is.", count=2)
    log.add("other", "note", "here", "Something.")
    findings = log.freeze()
    assert sum(finding.count for finding in findings if finding.kind == "degenerate-box") == 2 * (MAX_PLACES + 5)
    assert len(findings) == MAX_PLACES + 2
    assert findings[-1].where == f"object {MAX_PLACES} and on"


def test_image_table_is_a_sequence_of_the_records_it_was_made_of(tmp_path):
    rng = np.random.default_rng(0)
    records = [
        ImageRecord(
            image_id=10 + i,
            path=tmp_path / f"bild_ü{i}.jpg",
            size_hw=(i + 1, i + 2),
            boxes_xyxy=rng.random((n, 4), dtype=np.float32),
            labels=rng.integers(0, 5, n),
            area=rng.random(n, dtype=np.float32),
            ignore=rng.random(n) < 0.5,
        )
        for i, n in enumerate((2, 0, 3))
    ]
    table = ImageTable.from_records(records)
    assert len(table) == 3
    for got, want in zip(table, records, strict=True):
        assert (got.image_id, got.path, got.size_hw) == (want.image_id, want.path, want.size_hw)
        for name in ("boxes_xyxy", "labels", "area", "ignore"):
            np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
            assert getattr(got, name).dtype == getattr(want, name).dtype
    assert table[-1].image_id == 12
    assert [record.image_id for record in table[1:]] == [11, 12]
    with pytest.raises(IndexError):
        table[3]
    with pytest.raises(ValueError, match="read-only"):
        table[0].boxes_xyxy[0, 0] = 1
    assert len(ImageTable.from_records([])) == 0


def test_importing_datasets_loads_no_heavy_package():
    heavy = "{'lightning', 'matplotlib', 'scipy', 'rich', 'timm', 'pandas', 'pycocotools', 'transformers'}"
    code = f"import sys, ddetr.datasets; print(sorted({heavy} & set(sys.modules)))"
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert done.stdout.strip() == "[]"


def test_who_listens_hears_how_many_headers_are_read(make_coco, monkeypatch):
    root, seen = make_coco(num_images=5), []
    monkeypatch.setattr(image_files, "_HEADERS_A_TASK", 2)
    with image_files.reading_shown(lambda done, total: seen.append((done, total))):
        load_annotations(root, "train")
    assert seen == [(2, 5), (4, 5), (5, 5)]
    load_annotations(root, "train")
    assert len(seen) == 3

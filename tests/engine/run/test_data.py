"""Whether the data of a run are still those that it began with, and how they differ."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ddetr.datasets import Annotations, Category, ImageTable
from ddetr.datasets.annotations import ImageRecord
from ddetr.engine.run.data import DATA_FILE, DataTraits

CLASSES = (Category(3, "cat"), Category(7, "dog"))


def images(root: Path, names: Sequence[str]) -> list[ImageRecord]:
    records = []
    for number, name in enumerate(names):
        (root / name).write_bytes(b"x" * (number + 1))
        boxes = np.array([[0, 0, 5 + number, 5]], np.float32)
        area = boxes[:, 2] * boxes[:, 3]
        ignore = np.zeros(1, bool)
        records.append(ImageRecord(number, root / name, (10, 20), boxes, np.zeros(1, np.int64), area, ignore))
    return records


def annotated(records: Sequence[ImageRecord], classes: Sequence[Category] = CLASSES) -> Annotations:
    return Annotations("a", "coco", tuple(classes), ImageTable.from_records(records))


NAMES = ["a.jpg", "b.jpg", "é 名.jpg", "d.jpg", "a.jpg"]  # one file stands for two images


@pytest.fixture
def records(tmp_path: Path) -> list[ImageRecord]:
    return images(tmp_path, NAMES)


def traits(records: Sequence[ImageRecord], root: Path, classes: Sequence[Category] = CLASSES) -> DataTraits:
    return DataTraits.of(annotated(records, classes), annotated(records[:2], classes), root)


def test_what_is_kept_is_what_was(records: list[ImageRecord], tmp_path: Path) -> None:
    before = traits(records, tmp_path)
    before.save(tmp_path)
    again = DataTraits.load(tmp_path)
    assert again.splits["train"].names == ["a.jpg", "b.jpg", "é 名.jpg", "d.jpg", "a.jpg (2)"]
    assert before.changes(again) == again.changes(before) == {}
    assert before.changed_classes(again) == ""
    moved = tmp_path / "moved"
    moved.mkdir()
    assert before.changes(traits(images(moved, NAMES), moved)) == {}, "where the data set lies does not matter"


def test_each_change_is_named(records: list[ImageRecord], tmp_path: Path) -> None:
    before = traits(records, tmp_path)

    def change(now: list[ImageRecord]) -> str:
        return "; ".join(before.changes(traits(now, tmp_path)).values())

    other_box = replace(records[2], boxes_xyxy=records[2].boxes_xyxy + 1)
    assert change([*records[:2], other_box, *records[3:]]) == "training images: 1 with other objects (é 名.jpg)"
    for field, value in (("labels", np.ones(1, np.int64)), ("ignore", np.ones(1, bool)), ("size_hw", (20, 20))):
        assert "1 with other objects (d.jpg)" in change(
            [*records[:3], replace(records[3], **{field: value}), *records[4:]]
        )
    assert change([*records[:3], *records[4:]]) == "training images: 1 removed (d.jpg)"
    more = replace(records[0], path=tmp_path / "new.jpg")
    assert change([*records, more]) == "training images: 1 added (new.jpg)"
    assert change([*records[:2], records[3], records[2], records[4]]) == "training images: in another order"
    (tmp_path / "b.jpg").write_bytes(b"another")
    size = "1 with a file of another size (b.jpg)"
    assert change(records) == f"training images: {size}; validation images: {size}"
    (tmp_path / "b.jpg").unlink()
    assert size in change(records)
    several = [replace(record, area=record.area + 1) for record in records[1:]]
    assert "4 with other objects (b.jpg, é 名.jpg, d.jpg and 1 more)" in change([records[0], *several])


@pytest.mark.parametrize(
    ("classes", "said"),
    [
        ([Category(3, "cat"), Category(7, "hound")], "class 'dog' is now 'hound'"),
        ([Category(3, "dog"), Category(7, "cat")], "class 'cat' is now 'dog', 'dog' is now 'cat'"),
        ([*CLASSES, Category(9, "cow")], "classes added 'cow'"),
        ([CLASSES[0]], "classes removed 'dog'"),
        ([Category(1, "cat"), Category(2, "dog")], "classes have other ids"),
    ],
)
def test_classes_are_named(records: list[ImageRecord], tmp_path: Path, classes: list[Category], said: str) -> None:
    assert traits(records, tmp_path).changed_classes(traits(records, tmp_path, classes)) == said


@pytest.mark.parametrize("content", [b"", b"PK", b"words"])
def test_a_damaged_file_stops_nothing(tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture) -> None:
    assert DataTraits.load(tmp_path) is None
    (tmp_path / DATA_FILE).write_bytes(content)
    assert DataTraits.load(tmp_path) is None
    assert "data.npz cannot be read" in caplog.text


def test_columns_of_other_lengths_are_damage(records: list[ImageRecord], tmp_path: Path) -> None:
    traits_now = traits(records, tmp_path)
    split = traits_now.splits["train"]
    replace(traits_now, splits={**traits_now.splits, "train": replace(split, names=split.names[:2])}).save(tmp_path)
    assert DataTraits.load(tmp_path) is None

import pytest

from ddetr.datasets import default_splits, detect_format, load_annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.splits import load_splits

ROWS = """\
Truck 0.00 0 -1.57 9.29 6.75 29.39 25.10 2.85 2.63 12.34 0.47 1.49 69.44 -1.56
Car 0.00 0 1.85 37.63 11.61 43.40 23.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57
Misc 0 0 0 1 2 11 22 0 0 0 0 0 0 0

DontCare -1 -1 -10 3.59 10.16 8.40 11.05 -1 -1 -1 -1000 -1000 -1000 -10
"""


@pytest.fixture
def make_kitti(tmp_path, write_image):
    def make(labels, images="training/image_2", label_folder="training/label_2", suffix=".png"):
        for i, (name, text) in enumerate(labels.items()):
            write_image(tmp_path / images / f"{name}{suffix}", seed=i)
            (tmp_path / label_folder).mkdir(parents=True, exist_ok=True)
            (tmp_path / label_folder / f"{name}.txt").write_text(text)
        return tmp_path

    return make


def test_the_published_form(make_kitti, write_image):
    root = make_kitti({"000000": ROWS, "000001": ""})
    write_image(root / "testing/image_2/000000.png")
    assert detect_format(root) == "kitti"
    assert default_splits(root) == ("training", None)
    annotations = load_annotations(root, "training")
    assert [category.name for category in annotations.categories] == ["Car", "Misc", "Truck"]
    first, second = annotations.images
    assert first.labels.tolist() == [2, 0, 1]
    assert first.boxes_xyxy[2].tolist() == [1, 2, 11, 22]
    assert first.boxes_xyxy[0].tolist() == pytest.approx([9.29, 6.75, 29.39, 25.10])
    assert len(second.labels) == 0
    assert [(f.kind, f.action, f.count) for f in annotations.findings] == [("dontcare-regions", "note", 1)]


def test_a_number_too_many_before_the_box(make_kitti):
    """The box would begin with the 0: `0 15 20 46` for `15 20 46 40`. Results, which end in a score, are read."""
    row = "a 0.00 0 0.0 {} 15.00 20.00 46.00 {} 0.0 0.0 0.0 0.0 0.0 0.0 0.0\n"
    annotations = load_annotations(
        make_kitti({"0": row.format("0.0", "40.0") * 2, "1": row.format(0, "40.0")}), "training"
    )
    (refused,) = [finding for finding in annotations.findings if finding.action == "refused"]
    assert (refused.kind, refused.count) == ("columns-shifted", 3)
    results = {"0": row.format("0.0", "40.0") * 2, "1": row.format("8.0", "40.0")}
    assert "columns-shifted" not in {f.kind for f in load_annotations(make_kitti(results), "training").findings}


def test_lists_of_the_usual_development_kits(make_kitti):
    root = make_kitti({"000000": ROWS, "000001": ROWS, "000002": ROWS})
    for name, text in {"train": "000000\n000001\n000009\n", "val": "000002\n", "test": "007000\n"}.items():
        (root / "ImageSets").mkdir(exist_ok=True)
        (root / f"ImageSets/{name}.txt").write_text(text)
    assert default_splits(root) == ("train", "val")
    train = load_annotations(root, "train")
    assert [record.path.stem for record in train.images] == ["000000", "000001"]
    assert "in-no-list" not in {finding.kind for finding in train.findings}
    assert train.num_images_left_out == 1
    assert [record.path.stem for record in load_annotations(root, "val").images] == ["000002"]
    (root / "ImageSets/val.txt").write_text("\n")
    (said,) = (finding for finding in load_annotations(root, "train").findings if finding.kind == "in-no-list")
    assert (said.action, said.count) == ("note", 1)
    assert "such as 000002." in said.message


def test_lists_in_other_places(make_kitti):
    root = make_kitti({"000000": ROWS, "000001": ROWS})
    (root / "train.txt").write_text("000000\n")
    (root / "val.txt").write_text("000001\n")
    train, val = load_splits(TrainingSource(str(root)))
    assert [record.path.stem for split in (train, val) for record in split.images] == ["000000", "000001"]


def test_the_one_list_that_is_read_is_not_said_to_be_unused(make_kitti):
    root = make_kitti({"000000": ROWS, "000001": ROWS})
    (root / "ImageSets").mkdir()
    (root / "ImageSets/train.txt").write_text("000000\n")
    train, _ = load_splits(TrainingSource(str(root)))
    assert {"in-no-list", "lists-not-used"} & {finding.kind for finding in train.findings} == {"in-no-list"}


def test_several_folders_of_lists(make_kitti):
    """As papers divide KITTI: without them, validation images would be trained on."""
    root = make_kitti({"000000": ROWS, "000001": ROWS, "000002": ROWS})
    for folder, train, val in (
        ("ImageSets_3dop", "000000", "000001\n000002"),
        ("ImageSets_subcnn", "000001", "000002"),
    ):
        (root / folder).mkdir()
        (root / folder / "train.txt").write_text(train)
        (root / folder / "val.txt").write_text(val)
    assert default_splits(root) == ("train_3dop", "val_3dop")
    assert [record.path.stem for record in load_annotations(root, "val_subcnn").images] == ["000002"]


@pytest.mark.parametrize(
    ("folder", "splits"),
    [
        *(("images", "all"), ("image", "all")),
        *(("train/{}", ("train", "val")), ("{}/train", ("train", "val"))),
    ],
)
def test_folders_of_its_users(make_kitti, folder, splits):
    """DIGITS, TAO: the same rows in `images/` and `labels/`, as YOLO's folders are called."""
    if splits == "all":
        root = make_kitti({"a": ROWS}, folder, "labels", ".jpg")
        assert default_splits(root) == ("all", None)
        splits = ("all",)
    else:
        for split in splits:
            place = folder.replace("train", split)
            root = make_kitti({"a": ROWS}, place.format("images"), place.format("labels"), ".jpg")
        assert default_splits(root) == splits
    for split in splits:
        annotations = load_annotations(root, split)
        assert annotations.format == "kitti"
        assert len(annotations.images[0].labels) == 3
        assert split == "all" or f"/{split}" in annotations.images[0].path.as_posix()


def test_yolo_stays_yolo(make_yolo):
    assert detect_format(make_yolo({"images/a.jpg": "0 .5 .5 .2 .2\n" * 3})) == "yolo"


def test_wrong_lines_and_orphans(make_kitti, write_image):
    rows = f"{ROWS}Car 0 0 0 1 2 3\nCar 0 0 0 nan 2 30 40 0 0 0 0 0 0 0\ntraffic light 0 0 0 1 2 30 40 0 0 0 0 0 0 0 .9"
    root = make_kitti({"a": rows, "b": "\xff\n"})
    (root / "training/label_2/b.txt").write_bytes(b"\xff\xfe\xff")
    (root / "training/label_2/gone.txt").write_text(ROWS)
    (root / "training/label_2/._a.txt").write_bytes(b"\0\5\x16\7")
    write_image(root / "training/image_2/c.png")
    annotations = load_annotations(root, "training")
    assert [c.name for c in annotations.categories] == ["Car", "Misc", "Truck", "traffic light"]
    found = {(f.kind, f.action, f.where.partition("/")[2]) for f in annotations.findings}
    assert found >= {
        ("malformed-label", "dropped", "label_2/a.txt, line 6"),
        ("nan-box", "refused", "label_2/a.txt, line 7"),
        ("malformed-labels", "dropped", "label_2/b.txt"),
        ("missing-image", "dropped", "label_2/gone.txt"),
    }
    assert {f.kind: f.count for f in annotations.findings}["image-without-labels"] == 1
    assert annotations.num_images_left_out == 2

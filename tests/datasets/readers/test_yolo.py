import numpy as np
import pytest

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.annotations import Category
from ddetr.datasets.readers.yolo.paths import label_file
from ddetr.errors import InputError

TREE = {"images/train/a.jpg": "0 0.5 0.5 0.25 0.5\n1 0.1 0.1 0.1 0.1\n", "images/val/b.jpg": "1 0.5 0.5 0.5 0.5"}
NAMES = "names: [cat, dog]\n"


def test_boxes_ids_and_names(make_yolo, kinds):
    root = make_yolo(TREE, data_yaml=f"train: images/train\nval: images/val\n{NAMES}nc: 2\n")
    assert detect_format(root) == detect_format(root / "data.yaml") == "yolo"
    assert available_splits(root) == ["train", "val"]
    assert default_splits(root / "data.yaml") == ("train", "val")
    for path in (root, root / "data.yaml"):
        annotations = load_annotations(path, "train")
        assert annotations.name == "yolo/train"
        assert annotations.categories == (Category(0, "cat"), Category(1, "dog"))
        record = annotations.images[0]
        np.testing.assert_allclose(record.boxes_xyxy, [[24, 12, 40, 36], [3.2, 2.4, 9.6, 7.2]], rtol=1e-6)
        assert record.labels.tolist() == [0, 1]
        np.testing.assert_allclose(record.area, [384, 30.72], rtol=1e-5)
        assert kinds(annotations) == {}


ROBOFLOW = {"train/images/a.jpg": "0 .5 .5 .2 .2", "valid/images/b.jpg": "0 .5 .5 .2 .2", "test/images/c.jpg": ""}


@pytest.mark.parametrize(
    ("tree", "data_yaml"),
    [
        (ROBOFLOW, f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 2\n{NAMES}"),
        (ROBOFLOW, f"train: train/images\nvalid: valid/images\n{NAMES}"),
        (ROBOFLOW, f"path: /content/datasets/thing\ntrain: train/images\nval: valid/images\n{NAMES}"),
        (ROBOFLOW, f"train: /content/drive/thing/train/images\nval: D:\\thing\\valid\\images\n{NAMES}"),
        (ROBOFLOW, f"path: ../datasets/thing\ntrain: train\nval: valid\n{NAMES}"),
        (TREE, f"path: .\ntrain: images/train\nval: images/val\n{NAMES}"),
        (TREE, f"path: yolo\ntrain: [images/train]\nval: [images/val]\n{NAMES}"),
        (TREE, "train: images/train/\nval: images/val/\nnames:\n  0: cat\n  1: dog\n"),
        (TREE, f"path: images\ntrain: train\nval: val\n{NAMES}"),
    ],
)
def test_data_yaml_as_found_in_the_wild(make_yolo, tree, data_yaml):
    root = make_yolo(tree, data_yaml=data_yaml)
    assert default_splits(root) == ("train", "val")
    for split in ("train", "val"):
        annotations = load_annotations(root, split)
        assert len(annotations.images) == 1
        assert len(annotations.images[0].labels) >= 1
        assert [category.name for category in annotations.categories] == ["cat", "dog"]
        assert annotations.findings == ()


def test_lists_of_images(make_yolo):
    tree = {**TREE, "images/train/c.jpg": None}
    root = make_yolo(tree, data_yaml=f"train: train.txt\nval: [val.txt]\n{NAMES}")
    (root / "train.txt").write_text(
        "./images/train/a.jpg\nimages/train/c.jpg\nimages/train/gone.jpg\nimages/train/a.jpg\n"
    )
    (root / "val.txt").write_text(str(root / "images/val/b.jpg"))
    train = load_annotations(root, "train")
    assert [record.path.name for record in train.images] == ["a.jpg", "c.jpg"]
    assert [(f.kind, f.action) for f in train.findings] == [
        ("missing-image", "dropped"),
        ("duplicate-image", "repaired"),
        ("image-without-labels", "note"),
    ]
    assert train.findings[0].where == "train.txt, line 3"
    assert len(load_annotations(root, "val").images) == 1


def test_several_folders_make_one_split(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train: [images/train, images/val]\n{NAMES}")
    assert len(load_annotations(root, "train").images) == 2
    assert default_splits(root) == ("train", None)


def test_any_yaml_name(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train: images/train\n{NAMES}")
    (root / "data.yaml").rename(root / "my_cells.yml")
    (root / "config.yaml").write_text("learning_rate: 3\n")
    assert available_splits(root) == ["train"]
    (root / "other.yaml").write_text(f"train: images/val\n{NAMES}")
    with pytest.raises(InputError, match="several YOLO data sets"):
        detect_format(root)
    assert len(load_annotations(root / "other.yaml", "train").images) == 1


def test_no_yaml(make_yolo):
    root = make_yolo(TREE)
    assert default_splits(root) == ("train", "val")
    annotations = load_annotations(root, "train")
    assert annotations.categories == (Category(0, "class_0"), Category(1, "class_1"))
    (root / "classes.txt").write_text("cat\ndog\nbird\n")
    assert [category.name for category in load_annotations(root, "val").categories] == ["cat", "dog", "bird"]


def test_no_yaml_and_no_splits(make_yolo):
    root = make_yolo({"images/a.jpg": "0 .5 .5 .2 .2", "images/b.jpg": ""})
    assert default_splits(root) == ("all", None)
    assert len(load_annotations(root, "all").images) == 2


def test_no_yaml_in_roboflows_tree(make_yolo):
    assert default_splits(make_yolo(ROBOFLOW)) == ("train", "valid")


def test_names_missing_or_wrong(make_yolo, kinds):
    root = make_yolo(TREE, data_yaml="train: images/train\nnc: 3\n")
    assert [category.name for category in load_annotations(root, "train").categories] == [
        "class_0",
        "class_1",
        "class_2",
    ]
    (root / "data.yaml").write_text(f"train: images/train\nnc: 3\n{NAMES}")
    assert kinds(load_annotations(root, "train")) == {"nc-differs": "note"}
    (root / "data.yaml").write_text("train: images/train\nnames: {a: b}\n")
    with pytest.raises(InputError, match="must be class ids"):
        load_annotations(root, "train")
    (root / "data.yaml").write_text("train: [images/train\nnames: :\n")
    with pytest.raises(InputError, match=r"data\.yaml: broken YAML at line 2"):
        load_annotations(root, "train")


def test_gapped_names_keep_their_ids(make_yolo):
    root = make_yolo({"images/a.jpg": "7 .5 .5 .2 .2"}, data_yaml="train: images\nnames: {7: dog, 3: cat}\n")
    annotations = load_annotations(root, "train")
    assert annotations.categories == (Category(3, "cat"), Category(7, "dog"))
    assert annotations.images[0].labels.tolist() == [1]


def test_missing_label_file_is_background_but_not_for_all(make_yolo, kinds):
    yaml = f"train: images\n{NAMES}"
    root = make_yolo({"images/a.jpg": "0 .5 .5 .2 .2", "images/b.jpg": None}, data_yaml=yaml)
    annotations = load_annotations(root, "train")
    assert [len(record.labels) for record in annotations.images] == [1, 0]
    assert kinds(annotations) == {"image-without-labels": "note"}
    assert "1 of 2 images have no label file and count as background, such as b.jpg" in annotations.findings[0].message
    (root / "labels" / "b.txt").touch()  # an empty file says that there is nothing
    assert kinds(load_annotations(root, "train")) == {}
    (root / "labels" / "b.txt").unlink()
    (root / "labels" / "a.txt").unlink()
    annotations = load_annotations(root, "train")
    assert kinds(annotations) == {"no-label-files": "refused"}
    assert "labels/a.txt" in annotations.findings[0].message


def test_lines_of_many_kinds(make_yolo):
    text = "\n".join(
        [
            "0 0.2 0.2 0.6 0.2 0.6 0.8",  # polygon
            "1 0.1 0.1 0.5 0.1 0.5 0.5 0.1 0.5",  # oriented box
            "0 0.5 0.5 0.2 0.2 0.93",  # with a confidence
            "2 0.5 0.5 0.2 0.2",  # class without a name
            "-1 0.5 0.5 0.2 0.2",
            "0 0.5 0.5 0 0.2",
            "0 0.95 0.5 0.3 0.2",  # reaches out
            "0 0.5 nan 0.2 0.2",
            "0 320 240 20 20",  # pixels
            "cat 0.5 0.5 0.2 0.2",
            "0 0.5 0.5",
            "",
            "1.0 0.5 0.5 0.5 0.5",
        ]
    )
    root = make_yolo({"images/a.jpg": text}, data_yaml=f"train: images\n{NAMES}")
    annotations = load_annotations(root, "train")
    relative = annotations.images[0].boxes_xyxy / [64, 48, 64, 48]
    np.testing.assert_allclose(
        relative,
        [
            [0.2, 0.2, 0.6, 0.8],
            [0.1, 0.1, 0.5, 0.5],
            [0.4, 0.4, 0.6, 0.6],
            [0.8, 0.4, 1, 0.6],
            [0.4, 0.4, 0.6, 0.6],
            [0.25, 0.25, 0.75, 0.75],
        ],
        rtol=1e-5,
    )
    assert annotations.images[0].labels.tolist() == [0, 1, 0, 0, 0, 1]
    assert sorted((f.kind, f.action, f.where.rpartition(" ")[2]) for f in annotations.findings) == [
        ("box-clipped", "repaired", "7"),
        ("category-unknown", "dropped", "4"),
        ("category-unknown", "dropped", "5"),
        ("class-name-in-row", "repaired", str(root)),
        ("degenerate-box", "dropped", "6"),
        ("malformed-label", "dropped", "11"),
        ("nan-box", "refused", "8"),
        ("not-relative", "dropped", "9"),
    ]
    assert annotations.findings[0].where.startswith("labels/a.txt, line ")


def test_categories_of_training_are_matched_by_name(make_yolo):
    train = (Category(0, "dog"), Category(1, "cat"))
    root = make_yolo(TREE, data_yaml="train: images/train\nval: images/val\nnames: [cat, dog, bird]\n")
    assert load_annotations(root, "train", categories=train).images[0].labels.tolist() == [1, 0]
    assert load_annotations(root, "val", categories=train[:1]).images[0].labels.tolist() == [0]
    findings = load_annotations(root, "train", categories=train[:1]).findings
    assert [(f.kind, f.where) for f in findings] == [("category-unknown", "labels/train/a.txt, line 1")]


def test_empty_split_is_refused(make_yolo, kinds):
    root = make_yolo(TREE, data_yaml=f"train: images/none\n{NAMES}")
    (root / "images" / "none").mkdir()
    assert kinds(load_annotations(root, "train"))["no-images"] == "refused"


def test_unreadable_files(make_yolo, kinds):
    root = make_yolo({**TREE, "images/train/c.jpg": "0 .5 .5 .2 .2"}, data_yaml=f"train: images/train\n{NAMES}")
    (root / "images/train/a.jpg").write_text("no image")
    (root / "labels/train/c.txt").write_bytes(b"\xff\xfe\x00")
    assert kinds(load_annotations(root, "train")) == {"unreadable-image": "dropped", "unreadable-labels": "refused"}


def test_turned_images_get_a_note(make_yolo, write_image):
    root = make_yolo({"images/a.jpg": "0 .5 .5 .5 .25"}, data_yaml=f"train: images\n{NAMES}")
    write_image(root / "images/a.jpg", orientation=6)
    annotations = load_annotations(root, "train")
    assert annotations.images[0].size_hw == (64, 48)
    assert annotations.images[0].boxes_xyxy.tolist() == [[12, 24, 36, 40]]
    assert [(f.kind, f.action) for f in annotations.findings] == [("orientation", "note")]


def test_only_the_last_images_folder_becomes_labels(tmp_path):
    assert label_file(tmp_path / "images/set/images/train/a.b.jpg") == tmp_path / "images/set/labels/train/a.b.txt"
    assert label_file(tmp_path / "flat/a.jpg").name == "a.txt"

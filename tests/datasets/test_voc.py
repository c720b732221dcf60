import shutil

import numpy as np
import pytest
from dataset_parts import voc_object, voc_xml

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError


def test_splits_labels_and_coordinates(make_voc, kinds):
    files = {
        "a": voc_xml([voc_object("dog"), voc_object("cat", (1, 1, 64, 48), difficult=1)]),
        "b": voc_xml([]),
        "c": voc_xml([voc_object("cat")]),
    }
    root = make_voc(files, {"train": "a\nb\n", "val": "c.jpg\n\n", "cat_train": "a 1\nb -1\n", "trainval": "a\nb\nc"})
    assert detect_format(root) == "voc"
    assert available_splits(root) == ["train", "trainval", "val"]
    assert default_splits(root) == ("train", "val")
    train = load_annotations(root, "train")
    assert train.name == "voc/train"
    assert train.categories == (Category(1, "cat"), Category(2, "dog"))
    record = train.images[0]
    assert record.labels.tolist() == [1, 0]
    assert record.ignore.tolist() == [False, True]
    assert record.boxes_xyxy.tolist() == [[5, 6, 25, 16], [1, 1, 64, 48]]  # as written
    assert record.area.tolist() == [200, 63 * 47]
    assert len(train.images[1].labels) == 0
    assert kinds(train) == {}
    # without categories, a validation split takes the training split's: dog has label 1 although val has no dog
    val = load_annotations(root, "val")
    assert val.categories == train.categories
    assert val.images[0].labels.tolist() == [0]


def test_class_flags_in_lists_are_no_part_of_the_name(make_voc):
    root = make_voc({"a": voc_xml([voc_object()])}, {"train": "a  1\n"})
    assert len(load_annotations(root, "train").images) == 1


def test_devkit_nesting(make_voc, tmp_path):
    root = make_voc({"a": voc_xml([voc_object()])}, root=tmp_path / "kit" / "VOCdevkit" / "VOC2007")
    for path in (root, root.parent, tmp_path / "kit"):
        assert len(load_annotations(path, "train").images[0].labels) == 1
    shutil.copytree(root, root.parent / "VOC2012")
    with pytest.raises(InputError, match=r"several Pascal VOC data sets \(VOC2007, VOC2012\)"):
        detect_format(root.parent)


def test_no_image_sets(make_voc):
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([])}, lists={})
    assert available_splits(root) == ["all"]
    assert default_splits(root) == ("all", None)
    assert len(load_annotations(root, "all").images) == 2


def test_xml_beside_the_images(tmp_path, write_image):
    for split in ("train", "valid"):
        write_image(tmp_path / split / "a.jpg")
        (tmp_path / split / "a.xml").write_text(voc_xml([voc_object()]))
    assert default_splits(tmp_path) == ("train", "valid")
    assert len(load_annotations(tmp_path, "valid").images[0].labels) == 1


def test_a_class_that_training_lacks(make_voc):
    files = {"a": voc_xml([voc_object("cat")]), "b": voc_xml([voc_object("bird"), voc_object("cat")])}
    val = load_annotations(make_voc(files, {"train": "a", "val": "b"}), "val")
    assert val.categories == (Category(1, "cat"),)
    assert val.images[0].labels.tolist() == [0]
    assert [(f.kind, f.where) for f in val.findings] == [("category-unknown", "Annotations/b.xml, object 1")]


def test_wrong_boxes(make_voc):
    boxes = [(5, 6, 5, 16), (9, 6, 5, 16), ("nan", 1, 2, 3), ("", 1, 2, 3), (70, 6, 80, 16), (5, 6, 80, 16)]
    annotations = load_annotations(make_voc({"a": voc_xml([voc_object(box=box) for box in boxes])}), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[5, 6, 9, 16], [5, 6, 64, 16]]
    assert [(f.kind, f.action, f.where[-1]) for f in annotations.findings] == [
        ("swapped-corners", "repaired", "2"),
        ("nan-box", "refused", "3"),
        ("nan-box", "refused", "4"),
        ("degenerate-box", "dropped", "1"),
        ("box-outside-image", "dropped", "5"),
        ("box-clipped", "repaired", "6"),
    ]


def test_objects_without_name_or_box(make_voc):
    objects = ["<object><name>cat</name></object>", voc_object(name=""), voc_object()]
    annotations = load_annotations(make_voc({"a": voc_xml(objects)}), "train")
    assert len(annotations.images[0].labels) == 1
    assert [f.kind for f in annotations.findings] == ["missing-box", "missing-name"]


def test_malformed_xml_is_named_with_its_line(make_voc):
    root = make_voc({"a": "<annotation>\n<object>\n</annotation>", "b": voc_xml([voc_object()])})
    annotations = load_annotations(root, "train")
    assert len(annotations.images) == 1
    [finding] = annotations.findings
    assert (finding.kind, finding.action, finding.where) == ("malformed-xml", "dropped", "Annotations/a.xml, line 3")
    assert "line 3" in finding.message


def test_missing_files(make_voc):
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([])}, {"train": "a\nb\nghost\na\n"})
    (root / "JPEGImages" / "b.jpg").unlink()
    annotations = load_annotations(root, "train")
    assert [record.path.stem for record in annotations.images] == ["a"]
    assert {(f.kind, f.action) for f in annotations.findings} == {
        ("missing-annotation", "dropped"),
        ("missing-image", "dropped"),
        ("duplicate-image", "repaired"),
    }
    (root / "JPEGImages" / "a.jpg").unlink()
    assert load_annotations(root, "train").findings[-1].kind == "every-image-missing"


def test_other_image_suffix_and_image_dir(make_voc, tmp_path, write_image):
    root = make_voc({"a": voc_xml([voc_object()])})
    shutil.rmtree(root / "JPEGImages")
    write_image(root / "pictures" / "a.png")
    assert load_annotations(root, "train", image_dir="pictures").images[0].path.name == "a.png"


def test_size_of_the_real_image(make_voc, write_image, kinds):
    wrong = "<size><width>100</width><height>90</height></size>"
    annotations = load_annotations(make_voc({"a": voc_xml([voc_object()], wrong)}), "train")
    assert annotations.images[0].size_hw == (48, 64)
    assert kinds(annotations) == {"size-mismatch": "repaired"}
    outside = voc_object(box=(70, 50, 90, 80))
    annotations = load_annotations(make_voc({"a": voc_xml([outside], wrong)}), "train")
    assert len(annotations.images) == 0
    assert kinds(annotations) == {"size-mismatch": "dropped"}
    for none in ("", "<size><width>0</width><height>0</height></size>"):
        annotations = load_annotations(make_voc({"a": voc_xml([voc_object()], none)}), "train")
        assert annotations.images[0].size_hw == (48, 64)
        assert kinds(annotations) == {"missing-size": "repaired"}


def test_unknown_split(make_voc):
    root = make_voc({"a": voc_xml([])})
    with pytest.raises(InputError, match=r'has no split "trian"; it has: train \(did you mean train\?\)'):
        load_annotations(root, "trian")


def test_a_set_with_all_splits_and_two_degenerate_boxes(cells):
    """The degenerate boxes are named by file and object."""
    assert default_splits(cells) == ("train", "val")
    train = load_annotations(cells, "train")
    val = load_annotations(cells, "val", categories=train.categories)
    assert [category.name for category in train.categories] == ["Platelets", "RBC", "WBC"]
    assert [len(load_annotations(cells, split).images) for split in ("train", "val", "trainval", "test")] == [
        12,
        5,
        17,
        4,
    ]
    assert [int(np.sum(train.images.labels == label)) for label in range(3)] == [12, 107, 12]
    found = [(f.kind, f.action, f.where) for f in (*train.findings, *val.findings)]
    assert found == [
        ("degenerate-box", "dropped", "Annotations/Cell_00003.xml, object 4"),
        ("degenerate-box", "dropped", "Annotations/Cell_00014.xml, object 6"),
    ]
    assert all(record.size_hw == (120, 160) for record in train.images)


def test_bccd(shared_data):
    """205 + 87 images; its two degenerate boxes are named by file and object."""
    root = shared_data / "bccd"
    assert default_splits(root) == ("train", "val")
    train = load_annotations(root, "train")
    val = load_annotations(root, "val", categories=train.categories)
    assert [category.name for category in train.categories] == ["Platelets", "RBC", "WBC"]
    assert (len(train.images), len(val.images)) == (205, 87)
    assert [int(np.sum(train.images.labels == label)) for label in range(3)] == [209, 2381, 214]
    found = [(f.kind, f.action, f.where) for f in (*train.findings, *val.findings)]
    assert found == [
        ("degenerate-box", "dropped", "Annotations/BloodImage_00343.xml, object 4"),
        ("degenerate-box", "dropped", "Annotations/BloodImage_00338.xml, object 13"),
    ]
    assert all(record.size_hw == (480, 640) for record in train.images)

"""YOLO's label files: which belongs to which image, what their lines say, what the classes are called."""

import json

import numpy as np
import pytest

from ddetr.datasets import load_annotations
from ddetr.datasets.readers.yolo.rows import class_id_of
from ddetr.errors import InputError

ROW = "0 .5 .5 .2 .2"
NAMES = "names: [cat, dog]\n"
YAML = f"train: images\n{NAMES}"


def said(annotations, kind):
    return [(f.action, f.count, f.message) for f in annotations.findings if f.kind == kind]


# ---- label files -----------------------------------------------------------------------------------------------------


def test_labels_beside_images_in_a_folder_called_images(make_yolo, kinds):
    root = make_yolo(
        {"one/a.jpg": None, "two/images/b.jpg": None, "two/images/c.jpg": ROW}, data_yaml=f"train: .\n{NAMES}"
    )
    (root / "one/a.txt").write_text(ROW)
    (root / "two/images/b.txt").write_text(ROW)
    train = load_annotations(root, "train")
    assert [len(record.labels) for record in train.images] == [1, 1, 1]
    ((action, _, message),) = said(train, "labels-in-two-places")
    assert action == "note"
    assert f"1 in {root}/two/images, 1 in {root}/two/labels; all were used" in message
    (root / "two/images/c.txt").write_text(ROW)
    assert said(load_annotations(root, "train"), "two-label-files")[0][1] == 1


@pytest.mark.parametrize(
    ("images", "texts", "objects"),
    [
        (["v0.jpg"], ["V0.TXT"], 1),
        (["V0.JPG"], ["v0.txt"], 1),
        (["v0.jpg"], ["v0.Jpg.TXT"], 1),
        (["cafe\u0301.jpg"], ["caf\u00e9.txt"], 1),
        (["caf\u00e9.jpg"], ["Cafe\u0301.txt"], 1),
        (["a.jpg"], ["a.txt", "A.txt"], 1),
        (["a.jpg"], ["A.txt", "a.TXT"], 0),
        (["a.jpg", "A.jpg"], ["A.txt"], 1),
        (["a.jpg", "A.jpg"], ["a.TXT"], 0),
    ],
    ids=ascii,
)
def test_label_names_that_people_take_for_the_same(make_yolo, images, texts, objects):
    tree = {"images/z.jpg": ROW} | {f"images/{name}": None for name in images}
    root = make_yolo(tree, data_yaml=YAML)
    for text in texts:
        exact = text.removesuffix(".txt") in [name.rpartition(".")[0] for name in images]
        (root / "labels" / text).write_text(ROW if exact or objects else "0 .5 .5 .1 .1")
    train = load_annotations(root, "train")
    assert sum(len(record.labels) for record in train.images) == 1 + objects
    without = len(images) - objects
    assert [count for _, count, _ in said(train, "image-without-labels")] == ([without] if without else [])


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("train_images", "train_labels"),
        ("train_images/sub", "train_labels/sub"),
        ("images_train", "labels_train"),
        ("JPEGImages", "labels"),
        ("Train/IMAGES", "Train/LABELS"),
        ("test/images", "test/Labels"),
        ("train", "train/labels"),
        ("train", "labels/train"),
        ("images (1)", "images (1)"),
    ],
)
def test_places_of_labels(make_yolo, images, labels):
    root = make_yolo({f"{images}/images.jpg": None}, data_yaml=f"train: {images}\n{NAMES}")
    (root / labels).mkdir(exist_ok=True, parents=True)
    (root / labels / "images.txt").write_text(ROW)
    train = load_annotations(root, "train")
    assert (len(train.images[0].labels), train.findings) == (1, ())


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        ("images/train", "labels"),
        ("train/images", "train/labelTxt"),
        ("images", "annotations"),
        ("photos", "annotations/obj"),
    ],
)
def test_label_files_in_another_place_are_named(make_yolo, images, labels):
    root = make_yolo({f"{images}/a.jpg": None}, data_yaml=f"train: {images}\n{NAMES}")
    (root / labels).mkdir(exist_ok=True, parents=True)
    (root / labels / "a.txt").write_text(ROW)
    ((action, _, message),) = said(load_annotations(root, "train"), "no-label-files")
    assert action == "refused"
    assert f"There is {root / labels / 'a.txt'}" in message


def test_images_of_two_suffixes(make_yolo):
    """As converters and systems that hide suffixes leave them; where another image may be meant, none is."""
    images = ["a.png.jpg", "b.jpg.jpg", "c.png.jpg", "c.webp.jpg", "d.jpg", "d.png.jpg", "e.v1.jpg"]
    root = make_yolo({f"images/train/{name}": None for name in images} | {"images/train/f.jpg": ROW})
    for stem in "abcde":
        (root / "labels/train" / f"{stem}.txt").write_text(ROW)
    train = load_annotations(root, "train")
    labelled = [record.path.name for record in train.images if len(record.labels)]
    assert labelled == ["a.png.jpg", "b.jpg.jpg", "d.jpg", "f.jpg"]
    assert "c.txt, e.txt" in said(train, "labels-without-image")[0][2]


def test_label_files_named_with_the_suffix_and_files_of_several_images(make_yolo):
    root = make_yolo({"images/a.jpg": None, "images/b.jpg": ROW, "images/b.png": None}, data_yaml=YAML)
    (root / "labels/a.jpg.txt").write_text(ROW)
    train = load_annotations(root, "train")
    assert [len(record.labels) for record in train.images] == [1, 1, 1]
    ((action, count, message),) = said(train, "shared-label-file")
    assert (action, count) == ("note", 1)
    assert "b.jpg, b.png" in message


def test_labels_without_an_image(make_yolo):
    root = make_yolo({"images/a.jpg": ROW, "images/b.jpg": ROW}, data_yaml=YAML)
    for name in ("labels/ghost.txt", "labels/part/deep.txt", "labels/raw.txt", "labels/listed.txt"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(ROW)
    for name, text in {"classes.txt": "cat\ndog\n", "notes.txt": "seen on Monday, 5 of 9\n", "empty.txt": ""}.items():
        (root / "labels" / name).write_text(text)
    (root / "images/raw.xyz").write_bytes(b"x")
    (root / "train.txt").write_text("images/a.jpg\n")
    train = load_annotations(root, "train")
    findings = [f for f in train.findings if f.kind == "labels-without-image"]
    assert [(f.where, f.action, f.count) for f in findings] == [
        (str(root / "labels"), "note", 3),
        (str(root / "labels/part"), "note", 1),
    ]
    assert "such as ghost.txt, listed.txt, raw.txt" in findings[0].message
    (root / "labels/ghost.txt").unlink()
    (root / "labels/listed.txt").unlink()
    (finding,) = [f for f in load_annotations(root, "train").findings if f.where == str(root / "labels")]
    assert "raw.xyz, which is not read as an image" in finding.message


def test_labels_of_images_that_are_in_another_list_are_not_alone(make_yolo):
    root = make_yolo({"images/a.jpg": ROW, "images/b.jpg": ROW}, data_yaml=f"train: train.txt\n{NAMES}")
    (root / "train.txt").write_text("images/a.jpg\n")
    assert {finding.kind for finding in load_annotations(root, "train").findings} == {"in-no-list"}


def test_images_without_label_files_are_counted_by_folder(make_yolo):
    tree = {f"images/part{i // 3}/{i}.jpg": ROW if i == 0 else None for i in range(6)}
    train = load_annotations(make_yolo(tree, data_yaml=YAML), "train")
    found = [f for f in train.findings if f.kind == "image-without-labels"]
    assert [f.count for f in found] == [2, 3]
    assert "3 of 3 images have no label file and count as background, such as 3.jpg, 4.jpg, 5.jpg" in found[1].message


# ---- rows ------------------------------------------------------------------------------------------------------------

BOX = "0.28125 0.29167 0.3125 0.33333"


def boxes_of(make_yolo, rows, more=""):
    annotations = load_annotations(make_yolo({"images/a.jpg": "\n".join(rows)}, data_yaml=f"{YAML}{more}\n"), "train")
    return annotations.images[0].boxes_xyxy.round(1).tolist(), annotations


def test_keypoints_where_the_yaml_says_so(make_yolo):
    rows = [f"0 {BOX} 0.2 0.2 0.3 0.2 0.3 0.3 0.2 0.3", f"1 {BOX}", f"1 {BOX} 0.9", f"0 {BOX} 0.1 0.2 0.3"]
    boxes, annotations = boxes_of(make_yolo, rows, "kpt_shape: [4, 2]")
    assert boxes == [[8, 6, 28, 22]] * 3
    assert [(f.kind, f.where) for f in annotations.findings] == [("malformed-label", "labels/a.txt, line 4")]
    boxes, annotations = boxes_of(make_yolo, [f"0 {BOX} 0.2 0.2 2 0.3 0.2 1 0 0 0"], "kpt_shape: [17, 3]")
    assert (boxes, annotations.findings) == ([[8, 6, 28, 22]], ())
    with pytest.raises(InputError, match=r"kpt_shape must be \[number of keypoints, 2 or 3\], got 17"):
        boxes_of(make_yolo, rows, "kpt_shape: 17")


POSE = "0.7 0.6 0.1 0.2"  # its second pair lies far away from it


@pytest.mark.parametrize(
    "rows",
    [
        [f"0 {POSE} 0.68 0.55 0.72 0.55 0.7 0.65"],
        [f"0 {POSE} 0.68 0.55 0.72 0.55 0.7 {y} 0 0" for y in (0.64, 0.65, 0.66)]
        + ["0 .1 .1 .2 .1 .2 .2 .15 .25 .1 .2"],
        [f"0 {POSE} 0.68 0.55 2 0.72 0.55 2 0.7 0.65 1"],  # 13 numbers
        [f"0 {POSE} 0.68 0.55 2 0.72 0.55 1"],  # 10
        [f"0 {POSE} 0.68 0.55 2 0.72 0.55 2", f"0 {POSE} 0 0 0 0 0 0"],
    ],
)
def test_keypoints_that_nothing_speaks_of_stop(make_yolo, rows):
    boxes, annotations = boxes_of(make_yolo, rows)
    ((action, _, message),) = said(annotations, "keypoints-or-polygons")
    assert action == "refused"
    assert "Add kpt_shape" in message
    np.testing.assert_allclose(boxes[0], [41.6, 24, 48, 33.6], atol=0.1)


def test_polygons_are_not_taken_for_keypoints(make_yolo):
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 6, 7)
    rows = []
    for x, y, r in rng.uniform([0.1, 0.1, 0.01], [0.9, 0.9, 0.1], (60, 3)):
        points = np.stack([x + r * np.cos(angles), y + r * np.sin(angles)], axis=1).clip(0, 1)
        rows.append("0 " + " ".join(f"{value:.4f}" for value in points.ravel()))
    boxes, annotations = boxes_of(make_yolo, rows)
    assert len(boxes) == 60
    assert annotations.findings == ()
    rows = [f"0 {POSE} 0.68 0.55 0.72 0.55 0.7 0.65"]
    assert boxes_of(make_yolo, rows, "task: segment")[1].findings == ()


def test_rows_that_are_no_polygon_are_reported(make_yolo):
    rows = [
        f"0 {BOX}",
        "0 0.125 0.125 0.4375 0.125 0.4375 0.458 0.125",
        "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 1",
        "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 20",  # pixels among fractions
        "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2 0.05",
        "0 0.1 0.1 0.2 0.1 0.2 0.2 0.1 0.2",
        "0.5 0.5 0.5 0.2 0.2",
        ",;",
    ]
    boxes, annotations = boxes_of(make_yolo, rows)
    assert len(boxes) == 2
    found = sorted((f.kind, f.action, f.where) for f in annotations.findings)
    assert found == [("malformed-label", "dropped", f"labels/a.txt, line {n}") for n in (2, 3, 4, 5, 7, 8)]


def test_confidences_and_tracks_behind_boxes(make_yolo):
    rows = [f"0 {BOX} 0.9 7", f"0 {BOX} 0.8 1", f"1 {BOX} 12", f"0 {BOX} 0.25"]
    boxes, annotations = boxes_of(make_yolo, rows)
    assert boxes == [[8, 6, 28, 22]] * 4
    assert [(f.kind, f.action, f.count) for f in annotations.findings] == [("track-numbers", "note", 1)]
    triangle = "0 0.1 0.1 0.5 0.1 0.5 1"
    np.testing.assert_allclose(boxes_of(make_yolo, [triangle])[0], [[6.4, 4.8, 32, 48]], rtol=1e-5)


def test_lines_that_repeat_another_are_used_once(make_yolo):
    boxes, annotations = boxes_of(make_yolo, [f"0 {BOX}", f"0.0 {BOX}0", f"1 {BOX}", f"0 {BOX}"])
    assert boxes == [[8, 6, 28, 22]] * 2
    assert [(action, count) for action, count, _ in said(annotations, "repeated-line")] == [("repaired", 2)]


def test_commas(make_yolo):
    rows = [
        "0,0.28125,0.29167,0.3125,0.33331",
        "0, 0.28125, 0.29167, 0.3125, 0.33332",
        "0 0,28125 0,29167 0,3125 0,33333",
        "0;0.28125;0.29167;0.3125;0.33334",
        "0\t0.28125\t0.29167\t0.3125\t0.33335",
        "0 2.8125e-01 2.9167e-01 3.125e-01 3.3336e-01",
    ]
    boxes, annotations = boxes_of(make_yolo, rows)
    assert boxes == [[8, 6, 28, 22]] * 6
    assert [(f.kind, f.action) for f in annotations.findings] == [("commas", "repaired")] * 4


def test_pixels_in_place_of_fractions(make_yolo):
    _, annotations = boxes_of(make_yolo, ["0 10 10 30 30", "0 20 10 30 30", f"0 {BOX}"])
    assert [(action, count) for action, count, _ in said(annotations, "boxes-not-relative")] == [("refused", 2)]
    _, annotations = boxes_of(make_yolo, ["0 10 10 30 30", f"0 {BOX}"])
    assert {f.kind for f in annotations.findings} == {"not-relative"}


def test_label_files_of_another_format_stop(make_yolo):
    """BBox-Label-Tool's: how many boxes, then their corners. A line or two are a slip."""
    root = make_yolo({"images/a.jpg": f"1\n76 45 146 87\n{ROW}"}, data_yaml=YAML)
    assert said(load_annotations(root, "train"), "not-yolo-rows") == []
    for name in "bcd":
        (root / "images" / f"{name}.jpg").write_bytes((root / "images" / "a.jpg").read_bytes())
        (root / "labels" / f"{name}.txt").write_text("1\n76 45 146 87\n")
    ((action, count, message),) = said(load_annotations(root, "train"), "not-yolo-rows")
    assert (action, count) == ("refused", 8)
    assert "such as '1'" in message


def labels_and_findings(annotations):
    findings = sorted((f.kind, f.action, f.count) for f in annotations.findings)
    return annotations.images[0].labels.tolist(), findings


def test_class_names_in_place_of_ids(make_yolo):
    rows = ["cat", "1", "Traffic_Light", "'traffic light'", "3 wheeler", "size 10", "size 10"]
    rows = [f"{name} 0.5 0.5 0.{i + 1} 0.2" for i, name in enumerate(rows)]
    rows += ["cat,0.5,0.5,0.1,0.3", "traffic light 0.1 0.1 0.2 0.1 0.2 0.2"]
    yaml = "train: images\nnames: [cat, traffic light, 3 wheeler, size 10]\n"
    annotations = load_annotations(make_yolo({"images/a.jpg": "\n".join(rows)}, data_yaml=yaml), "train")
    found = labels_and_findings(annotations)
    assert found == ([0, 1, 1, 1, 2, 3, 3, 0, 1], [("class-name-in-row", "repaired", 8), ("commas", "repaired", 1)])
    ((_, _, message),) = said(annotations, "class-name-in-row")
    assert "8 rows hold the name of a class in place of its id, such as 'cat 0.5" in message


def test_words_in_place_of_ids_that_are_no_names(make_yolo):
    rows = [f"brown cow 0.5 0.5 0.{i} 0.2" for i in range(1, 10)] + ["Cat .5 .5 .2 .2", "cat .5 .5 .2 .2"]
    yaml = "train: images\nnames: [Cat, cat, CAT, dog]\n"
    annotations = load_annotations(make_yolo({"images/a.jpg": "\n".join(rows)}, data_yaml=yaml), "train")
    assert [message for _, _, message in said(annotations, "category-unknown")][0] == (
        "'brown cow' is no class id and none of the names; the object was left out."
    )
    assert annotations.images[0].labels.tolist() == [0, 1]  # to the letter
    text = "\n".join([*rows, "brown cow .5 .5 .2 .3"])
    annotations = load_annotations(make_yolo({"images/a.jpg": text}, data_yaml=yaml), "train")
    ((action, _, message),) = said(annotations, "unnamed-ids")
    assert action == "refused"
    assert "10 of 12 objects have class ids that have no name (brown cow)" in message


def test_words_name_the_classes_where_nothing_else_does(make_yolo, write_image):
    root = make_yolo({"images/a.jpg": "dog .5 .5 .2 .2\ncat .5 .5 .2 .2"})
    annotations = load_annotations(root, "all")
    assert [category.name for category in annotations.categories] == ["cat", "dog"]
    assert labels_and_findings(annotations) == ([1, 0], [("unnamed-classes", "note", 1)])
    flat = root / "flat"
    write_image(flat / "a.jpg")
    (flat / "a.txt").write_text("dog .5 .5 .2 .2\n")
    assert load_annotations(flat, "all").categories[0].name == "dog"
    (flat / "a.txt").write_text("Dog 10 20 30 40\n")  # OIDv4 ToolKit's corners in pixels
    with pytest.raises(InputError, match="OIDv4"):
        load_annotations(flat, "all")


def test_corners_in_place_of_centres(make_yolo):
    rows = ["0 0.1 0.1 0.3 0.3", "0 0.5 0.5 0.9 0.9", "1 0.6 0.1 0.9 0.5", "1 0.2 0.6 0.95 0.99"]
    _, annotations = boxes_of(make_yolo, rows)
    assert [action for action, _, _ in said(annotations, "boxes-look-like-xyxy")] == ["refused"]
    _, annotations = boxes_of(make_yolo, [*rows, "0 0.5 0.5 0.2 0.2"])
    assert said(annotations, "boxes-look-like-xyxy") == []


def test_a_corner_and_a_size_in_place_of_a_centre(make_yolo, tmp_path):
    """Only boxes near the left and the upper edge reach out when their corner is taken for their centre."""
    grid = [f"0 {0.02 + x / 10} {0.01 + y / 5} 0.1 0.19" for x in range(9) for y in range(5)]
    _, annotations = boxes_of(make_yolo, grid)
    ((action, _, message),) = said(annotations, "boxes-look-like-xywh")
    assert action == "refused"
    assert "--data.boxes xywh-relative; if they are right as they are, by --data.boxes cxcywh-relative." in message
    root = make_yolo({"images/train/a.jpg": "0 .25 .25 .5 .5"}, tmp_path / "one", YAML)
    for form, box in (("xywh", [16, 12, 48, 36]), ("xyxy", [16, 12, 32, 24]), ("cxcywh", [0, 0, 32, 24])):
        (record,) = load_annotations(root, "train", boxes=f"{form}-relative").images
        assert record.boxes_xyxy.tolist() == [box]


def test_the_size_before_the_centre(make_yolo):
    rows = [f"0 0.1{i} 0.2{j} 0.{i} 0.{9 - i}" for i in range(2, 9) for j in range(3)]
    _, annotations = boxes_of(make_yolo, rows)
    ((action, _, message),) = said(annotations, "boxes-in-another-order")
    assert action == "refused"
    assert "the order width, height, x, y. If so, write them in the other order" in message
    assert "by --data.boxes cxcywh-relative." in message


def test_a_confidence_before_the_box(make_yolo):
    rows = [f"0 0.9{i} 0.2 0.{i + 3} 0.2 0.{i + 1}" for i in range(5)]
    _, annotations = boxes_of(make_yolo, rows)
    assert [action for action, _, _ in said(annotations, "confidence-first")] == ["refused"]
    _, annotations = boxes_of(make_yolo, [f"0 0.{i + 3} 0.2 0.2 0.1 0.9{i}" for i in range(5)])
    assert annotations.findings == ()


@pytest.mark.parametrize(
    ("behind", "stops"),
    [
        ([0.3, 1.2, 0.7, 1.5], True),  # radians
        ([-0.4, 0.2, 0.1, 0.3], True),
        ([90, 90, 0, 45], True),  # degrees
        ([45.5, 12, 3, 4], True),
        ([0.9, 0.25, 1, 0], False),
        ([0.9, 0.25, 1, 7], False),
    ],
)
def test_angles_behind_boxes(make_yolo, behind, stops):
    rows = [f"0 0.{i + 3} 0.5 0.2 0.1 {number}" for i, number in enumerate(behind)]
    _, annotations = boxes_of(make_yolo, rows)
    assert [action for action, _, _ in said(annotations, "angles-behind-boxes")] == ["refused"] * stops
    root = make_yolo({"images/train/a.jpg": "\n".join(rows)}, data_yaml=YAML)
    assert load_annotations(root, "train", boxes="cxcywh-relative").findings == ()


@pytest.mark.parametrize(
    ("behind", "stops"),
    [
        ([(1, 2), (2, 3), (1, 3), (3, 2)] * 4, False),  # tracks: never twice in an image
        ([(500, 501), (502, 503)], False),  # no angles
        ([(90, 30), (90, 90), (5, 45), (0, 30)] * 4, True),
        ([(17, 90), (0, 45), (33, 78)], True),  # too few to tell
        ([(-1, -1), (-1, -1)], False),  # no confidence
        ([(1.0000002, 1.0000004), (0.5, 1)], False),
    ],
)
def test_numbers_of_tracks_are_no_angles(make_yolo, behind, stops):
    images = {
        f"images/train/{i}.jpg": "".join(f"0 0.5 0.{j + 3} 0.2 0.1 {number}\n" for j, number in enumerate(numbers))
        for i, numbers in enumerate(behind)
    }
    annotations = load_annotations(make_yolo(images, data_yaml=YAML), "train")
    assert [action for action, _, _ in said(annotations, "angles-behind-boxes")] == ["refused"] * stops


@pytest.mark.parametrize(("in_training", "stops"), [((1, 2, 3), False), ((90, 30, 90), True), ((), True)])
def test_a_validation_split_too_small_to_tell_what_is_behind_its_boxes(make_yolo, in_training, stops):
    def rows(numbers):
        return "".join(f"0 0.5 0.{j + 3} 0.2 0.1 {number}\n" for j, number in enumerate(numbers))

    images = {f"images/train/{i}.jpg": rows(in_training) or "0 0.5 0.5 0.2 0.1\n" for i in range(6)}
    root = make_yolo(images | {"images/val/a.jpg": rows((17, 90))}, data_yaml=f"{YAML}\nval: images/val\n")
    found = said(load_annotations(root, "val"), "angles-behind-boxes")
    assert [action for action, _, _ in found] == ["refused"] * stops


# ---- classes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "class_id"),
    [
        ("0", 0),
        ("0.0", 0),
        ("1e1", 10),
        ("-1", -1),
        ("0.5", None),
        ("nan", None),
        ("inf", None),
        ("cat", None),
        ("²", None),
    ],
)
def test_class_ids(word, class_id):
    assert class_id_of(word) == class_id


def test_class_ids_of_numpy_without_a_yaml(make_yolo):
    root = make_yolo({"images/a.jpg": "0.000000e+00 .5 .5 .2 .2\n1.0 .5 .5 .2 .2"})
    annotations = load_annotations(root, "all")
    assert [category.name for category in annotations.categories] == ["class_0", "class_1"]
    assert annotations.images[0].labels.tolist() == [0, 1]
    ((action, _, message),) = said(annotations, "unnamed-classes")
    assert (action, len(annotations.findings)) == ("note", 1)
    assert "No file names the classes; they are called by their ids" in message


@pytest.mark.parametrize(
    ("images", "lists"),
    [
        ("{split}/a.jpg", ["train/_darknet.labels", "val/_darknet.labels"]),  # Roboflow's export for Darknet
        ("images/{split}/a.jpg", ["labels/train/classes.txt", "labels/val/classes.txt"]),  # labelImg's
        ("images/{split}/a.jpg", ["labels/train/classes.txt"]),
        ("{split}/images/a.jpg", ["train/labels/classes.txt"]),
    ],
)
def test_class_lists_beside_the_labels(make_yolo, images, lists):
    """Each split by its own list, which may have another order; by another's where it has none."""
    rows = {"train": "0 .5 .5 .2 .2\n1 .5 .5 .2 .2", "val": "1 .5 .5 .2 .2"}
    root = make_yolo({images.format(split=split): None for split in rows})
    for split, text in rows.items():
        label = root / images.replace("images", "labels").format(split=split)
        label.parent.mkdir(parents=True, exist_ok=True)
        label.with_suffix(".txt").write_text(text)
    for n, file in enumerate(lists):
        (root / file).write_text("dog\ncat\n" if n else "cat\ndog\n")
    train = load_annotations(root, "train")
    assert [category.name for category in train.categories] == ["cat", "dog"]
    val = load_annotations(root, "val", categories=train.categories)
    assert val.images[0].labels.tolist() == [0 if len(lists) > 1 else 1]
    assert not (*train.findings, *val.findings)


def test_class_lists_of_one_split_that_differ_stop(make_yolo):
    root = make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2", "images/train/b/c.jpg": "1 .5 .5 .2 .2"})
    (root / "classes.txt").write_text("cat\n")  # the beginning of the longest
    (root / "labels/train/b/classes.txt").write_text("cat\ndog\n")
    assert [category.name for category in load_annotations(root, "train").categories] == ["cat", "dog"]
    (root / "classes.txt").write_text("dog\n")
    ((action, _, message),) = said(load_annotations(root, "train"), "class-lists-differ")
    assert action == "refused"
    assert "calls class 0 'dog', and another list calls it 'cat'" in message


def test_a_class_list_that_lacks_classes_in_use_is_older_than_the_labels(make_yolo):
    rows = "0 .5 .5 .2 .2\n2 .5 .5 .3 .3"
    root = make_yolo({"images/train/a.jpg": rows}, data_yaml="train: images/train\nnames: [cat, dog, bird]\n")
    (root / "labels/train/classes.txt").write_text("dog\ncat\n")
    assert load_annotations(root, "train").findings == ()
    (root / "labels/train/classes.txt").write_text("dog\ncat\ncow\n")
    assert [action for action, _, _ in said(load_annotations(root, "train"), "class-lists-differ")] == ["refused"]


@pytest.mark.parametrize(
    ("yaml", "names"),
    [
        ("[no, yes]", ["no", "yes"]),
        ("[on, 010, 2020-01-02, null, 1e3, ~, 0x1F, 1_000, .5, 12:30:00, true]", None),
        ("{0: no, 1: 'yes'}", ["no", "yes"]),
        ('{"0": cat, "1": dog}', ["cat", "dog"]),
        ("{1.0: dog, 0.0: cat}", ["cat", "dog"]),
        ("\n- 0: cat\n- 1: dog", ["cat", "dog"]),
        ("cat,dog", ["cat", "dog"]),
        ("cat", ["cat"]),
        ("\"['cat', 'dog']\"", ["cat", "dog"]),
        ("|\n  cat\n  dog\n", ["cat", "dog"]),
        ("obj.names", ["a cat", "a dog"]),
        ("\nnc: 2", ["class_0", "class_1"]),
        ("[]\nnc: '2'", ["class_0", "class_1"]),
    ],
)
def test_names_are_the_words_that_stand_there(make_yolo, yaml, names):
    root = make_yolo({"images/a.jpg": ROW}, data_yaml=f"train: images\nnames: {yaml}\n")
    (root / "obj.names").write_text("a cat\na dog\n")
    annotations = load_annotations(root, "train")
    assert [c.name for c in annotations.categories] == (names or yaml.strip("[]").split(", "))
    assert annotations.findings == ()


@pytest.mark.parametrize(
    ("yaml", "match"),
    [
        ("names: {cat: 0, dog: 1}", "keys of names must be class ids"),
        ("names: [[cat], dog]", "a class name must be a word"),
        ("names: {0: cat, 0: dog}", "'0' stands twice in the map that begins at line 2"),
        ("names: [cat]\ntrain: elsewhere", "'train' stands twice"),
        ("nc: many", "nc must be a number of classes"),
        ('path: "D:\\sets"\nnames: [cat]', "write paths with / or without quotes"),
        ("", "neither names"),
    ],
)
def test_names_that_say_nothing(make_yolo, yaml, match):
    root = make_yolo({"images/a.jpg": ROW}, data_yaml=f"train: images\n{yaml}\n")
    with pytest.raises(InputError, match=match):
        load_annotations(root / "data.yaml", "train")


def test_many_objects_of_ids_without_a_name_stop(make_yolo):
    """A few are a slip; where a class has been forgotten, its objects would be learned as background."""
    rows = "".join(f"0 0.5 0.5 0.{i} 0.2\n" for i in range(1, 10))
    root = make_yolo({"images/a.jpg": rows + "1 0.5 0.5 0.2 0.2\n"}, data_yaml=f"train: images\n{NAMES}")
    (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
    assert said(load_annotations(root, "train"), "unnamed-ids") == []
    (root / "labels" / "a.txt").write_text(rows + rows.replace("0 0.5", "1 0.4") + "7 0.5 0.5 0.2 0.2\n")
    ((action, count, message),) = said(load_annotations(root, "train"), "unnamed-ids")
    assert (action, count) == ("refused", 10)
    assert "10 of 19 objects have class ids that have no name (1, 7)" in message


@pytest.mark.parametrize(("unnamed", "named", "stops"), [(3, 9, True), (2, 2, False), (3, 60, False), (10, 500, True)])
def test_a_large_part_of_ids_without_a_name_stops(make_yolo, unnamed, named, stops):
    rows = [f"{7 * (i < unnamed)} 0.{i + 101} .5 .1 .1" for i in range(unnamed + named)]
    _, annotations = boxes_of(make_yolo, rows)
    assert [action for action, _, _ in said(annotations, "unnamed-ids")] == ["refused"] * stops


def test_ids_counted_from_one_stop(make_yolo):
    tree = {"images/a.jpg": "1 .5 .5 .2 .2\n2 .5 .5 .2 .2"}
    ((action, _, message),) = said(load_annotations(make_yolo(tree, data_yaml=YAML), "train"), "ids-from-one")
    assert action == "refused"
    assert "names: {1: ..., 2: ...}" in message
    root = make_yolo(tree, data_yaml="train: images\nnames: {1: cat, 2: dog}\n")
    assert load_annotations(root, "train").findings == ()


def test_names_in_another_encoding_are_mentioned(make_yolo, kinds):
    root = make_yolo({"images/a.jpg": ROW}, data_yaml="")
    (root / "data.yaml").write_bytes("train: images\nnames: [猫, 狗]\n".encode("gbk"))
    assert kinds(load_annotations(root, "train")) == {"names-not-utf8": "note"}


@pytest.mark.parametrize("place", ["classes.txt", "labels/classes.txt", "labels/train/classes.txt", "notes.json"])
def test_lists_of_classes_in_another_order_stop(make_yolo, place):
    root = make_yolo({"images/train/a.jpg": f"{ROW}\n1 .5 .5 .1 .1"}, data_yaml=f"train: images/train\n{NAMES}")
    file = root / place
    for names, stops in (("dog\ncat", True), ("Dog\nbird\ncat", True), ("cat\ndog", False), ("Katze\nHund", False)):
        categories = [{"id": str(i), "name": name} for i, name in enumerate(names.split("\n"))]
        file.write_text(json.dumps({"categories": categories}) if place.endswith(".json") else names)
        found = said(load_annotations(root, "train"), "class-lists-differ")
        assert [action for action, _, _ in found] == ["refused"] * stops
    for broken in ("", "{", '{"categories": [1, {"id": 0}]}'):
        file.write_text(broken)
        assert said(load_annotations(root, "train"), "class-lists-differ") == []


def test_class_lists_of_other_splits_must_agree_where_a_split_has_none(make_yolo):
    splits = ("train", "val", "test")
    root = make_yolo({f"images/{split}/{split}.jpg": "0 .5 .5 .2 .2\n1 .5 .5 .4 .4" for split in splits})
    (root / "labels/train/classes.txt").write_text("cat\ndog\n")
    (root / "labels/val/classes.txt").write_text("dog\ncat\n")
    assert [action for action, _, _ in said(load_annotations(root, "test"), "class-lists-differ")] == ["refused"]

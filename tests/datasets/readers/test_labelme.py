import json
from pathlib import Path

import pytest

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations


def shape(label="cat", points=((5, 6), (25, 16)), kind="rectangle", **more):
    points = [list(point) for point in points]
    return {
        "label": label,
        "points": points,
        "group_id": None,
        "description": "",
        "shape_type": kind,
        "flags": {},
    } | more


@pytest.fixture
def write_labelme(tmp_path, write_image):
    def write(name, shapes, image=None, image_path=None, folder="", **more):
        """`folder/name.json`, with its image at `image` (beside it by default, nowhere for ""), called `image_path`."""
        image = str(Path(folder, f"{name}.jpg")) if image is None else image
        if image:
            write_image(tmp_path / image)
        content = {"version": "5.5.0", "flags": {}, "shapes": shapes, "imagePath": image_path or f"{name}.jpg"}
        content |= {"imageData": None, "imageHeight": 48, "imageWidth": 64} | more
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        (tmp_path / folder / f"{name}.json").write_text(json.dumps(content, indent=2))
        return tmp_path

    return write


def test_shapes(write_labelme):
    shapes = [
        shape(points=[(25, 16), (5, 6)]),  # drawn from the lower right corner
        shape("dog", [(10, 10), (20, 12.5), (15, 30)], "polygon"),
        shape("dog", [(30, 20), (30, 25)], "circle"),
        shape("cat", [(1, 1), (9, 1), (9, 5), (1, 5)], "rotation", direction=1.5),
        shape("cat", [(1, 2), (11, 22)], "mask", mask="iVBORw0KGgo="),
        {"label": "dog", "points": [[1, 1], [4, 1], [4, 9]], "line_color": None, "fill_color": None},  # version 3
    ]
    root = write_labelme("a", shapes)
    assert detect_format(root) == "labelme"
    assert default_splits(root) == ("all", None)
    annotations = load_annotations(root, "all")
    assert [category.name for category in annotations.categories] == ["cat", "dog"]
    assert annotations.images[0].labels.tolist() == [0, 1, 1, 0, 0, 1]
    assert annotations.images[0].boxes_xyxy.tolist() == [
        [5, 6, 25, 16],
        [10, 10, 20, 30],
        [25, 15, 35, 25],
        [1, 1, 9, 5],
        [1, 2, 11, 22],
        [1, 1, 4, 9],
    ]
    assert annotations.findings == ()


def test_shapes_without_a_box(write_labelme):
    shapes = [
        *(shape(points=[(1, 1), (5, 5), (9, 9)], kind=kind) for kind in ("line", "linestrip", "point", "points")),
        *(shape(points=points) for points in ([], [(1, 1)], [(1, 2, 3), (4, 5, 6)])),
        shape(points=[(1, 1), (5, 5)], kind="polygon"),
        shape(points="x") | {"points": None},
        shape(label=""),
        shape(label="__ignore__"),
        7,
        shape(points=[("a", None), (5, 5)]),
        shape(points=[(float("nan"), 1), (5, 5)], kind="circle"),
    ]
    annotations = load_annotations(write_labelme("a", shapes), "all")
    assert len(annotations.images[0].labels) == 0
    found = [(f.kind, f.action) for f in annotations.findings]
    assert found == [
        *[("missing-box", "dropped")] * 9,
        *(("missing-name", "dropped"), ("missing-name", "note"), ("missing-name", "dropped")),
        *[("nan-box", "refused")] * 2,
    ]
    assert "is a linestrip that has no area" in annotations.findings[1].message


def test_an_object_in_pieces(write_labelme):
    shapes = [shape(group_id=1), shape(points=[(30, 2), (40, 9)], group_id=1), shape("dog", group_id=1), shape()]
    annotations = load_annotations(write_labelme("a", shapes), "all")
    assert annotations.images[0].boxes_xyxy.tolist() == [[5, 2, 40, 16], [5, 6, 25, 16], [5, 6, 25, 16]]
    assert [(f.kind, f.action) for f in annotations.findings] == [("grouped-shapes", "note")]


def test_labels_that_number_the_objects(write_labelme):
    root = write_labelme("a", [shape("cow-1"), shape("cow-2", points=((1, 1), (9, 9))), shape("dog-1"), shape("7-2")])
    (finding,) = load_annotations(root, "all").findings
    assert (finding.kind, finding.action, finding.count) == ("numbered-labels", "note", 2)
    assert "cow-1, cow-2 are classes" in finding.message
    assert "call them cow." in finding.message


@pytest.mark.parametrize("labels", [["limit 30", "limit 50"], ["type-1", "type-2", "type-1"], ["arrow_2", "arrow_3"]])
def test_numbers_that_tell_classes_apart(write_labelme, labels):
    root = write_labelme("a", [shape(label, points=((i, 1), (9, 9))) for i, label in enumerate(labels)])
    assert load_annotations(root, "all").findings == ()


def test_a_file_that_names_no_image(write_labelme, tmp_path):
    root = write_labelme("a", [shape()])
    content = json.loads((root / "a.json").read_text())
    del content["imagePath"], content["imageData"]
    (root / "a.json").write_text(json.dumps(content))
    assert detect_format(root) == "labelme"
    assert load_annotations(root, "all").images[0].path == root / "a.jpg"


@pytest.mark.parametrize(
    ("folder", "image", "image_path"),
    [
        *(("", None, None), ("json", "images/a.jpg", r"..\images\a.jpg"), ("labels", "a.jpg", "../a.jpg")),
        *(("ann", "img/a.jpg", "a.jpg"), ("ann", "frames/a.jpg", "../frames/a.jpg"), ("", None, r"D:\work\a.jpg")),
        *(("ann", "photos/x 1.jpg", "../photos/x 1.jpg"), ("", "a.PNG", "a.jpg")),
    ],
)
def test_where_images_lie(write_labelme, tmp_path, write_image, folder, image, image_path):
    root = write_labelme("a", [shape()], image, image_path, folder)
    write_image(tmp_path / "masks/other.png")
    (root / folder / "classes.json").write_text('["cat"]')
    (root / folder / "._a.json").write_bytes(b"\0\5\x16\7")
    annotations = load_annotations(root, "all")
    assert len(annotations.images) == 1
    assert {f.kind for f in annotations.findings} == {"other-json"}


def test_beside_yolo(write_labelme, tmp_path):
    """`images/` and `labels/` are YOLO's names too; a set that was made of LabelMe's files keeps them."""
    for split in ("train", "val"):
        root = write_labelme("a", [shape()], f"images/{split}/a.jpg", f"../../images/{split}/a.jpg", f"labels/{split}")
    assert detect_format(root) == "labelme"
    assert default_splits(root) == ("train", "val")
    for split in ("train", "val"):
        (root / f"labels/{split}/a.txt").write_text("0 .5 .5 .2 .2\n")
    assert detect_format(root) == "yolo"
    assert len(load_annotations(root, "val", format="labelme").images) == 1


def test_a_folder_for_each_split(write_labelme):
    for split in ("train", "val"):
        write_labelme("a", [shape()], folder=split)
        root = write_labelme("b", [shape()], f"{split}/images/b.jpg", "../images/b.jpg", f"{split}/annotations")
    assert default_splits(root) == ("train", "val")
    for split in ("train", "val"):
        assert len(load_annotations(root, split).images) == 1  # those beside their images: the folder's own
    for split in ("train", "val"):
        (root / split / "a.json").unlink()
        (record,) = load_annotations(root, split).images
        assert record.path.relative_to(root).as_posix() == f"{split}/images/b.jpg"
    assert available_splits(root) == ["train", "val"]


@pytest.mark.parametrize("val", ["val", "val/0"])
def test_folders_within_the_folder_of_a_split(write_labelme, val):
    for name, folder in (("a", "data/train/0"), ("b", "data/train/1"), ("c", f"data/{val}")):
        root = write_labelme(name, [shape()], folder=folder)
    for path in (root, root / "data"):
        assert default_splits(path) == ("train", "val")
        assert [len(load_annotations(path, split).images) for split in ("train", "val")] == [2, 1]


def test_whose_shapes_these_are(write_labelme, write_image, tmp_path):
    write_labelme("a", [shape()])
    write_labelme("b", [shape()], image_path="a.jpg")  # a copy of a.json, for the next frame
    root = write_labelme("c", [shape()], "", "a.jpg")
    write_image(tmp_path / "d.jpg")
    annotations = load_annotations(root, "all")
    assert [record.path.name for record in annotations.images] == ["a.jpg"]
    assert {(f.kind, f.action, f.where) for f in annotations.findings if f.action == "refused"} == {
        ("image-path-differs", "refused", "b.json"),
        ("ambiguous-image", "refused", "c.json"),
    }
    assert {f.kind: f.message for f in annotations.findings}["image-without-labels"].endswith("not used (d.jpg).")


def test_the_image_is_inside_the_file(write_labelme):
    annotations = load_annotations(write_labelme("a", [shape()], "", imageData="iVBORw0KGgo="), "all")
    assert [f.kind for f in annotations.findings] == ["missing-image", "every-image-missing"]
    assert "`labelme_export_json`" in annotations.findings[0].message


def test_broken_files(write_labelme):
    root = write_labelme("a", [shape()])
    for name, text in {
        "b": '{"shapes": [',
        "c": "[" * 100_000,
        "d": '{"shapes": 1, "imagePath": 2}',
        "e": "\xff",
    }.items():
        (root / f"{name}.json").write_bytes(text.encode("latin-1"))
    annotations = load_annotations(root, "all")
    assert len(annotations.images) == 1
    assert [(f.kind, f.where) for f in annotations.findings] == [
        ("malformed-json", "b.json"),
        ("malformed-json", "c.json"),
        ("other-json", "d.json"),
        ("encoding", "e.json"),
        ("malformed-json", "e.json"),
    ]
    assert annotations.num_images_left_out == 3

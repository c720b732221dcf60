"""Data sets from anybody: nothing hangs, nothing grows without end, and what cannot be used is said."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_parts import coco_object, voc_object, voc_xml
from PIL import EpsImagePlugin, Image

from ddetr.cli import main as cli
from ddetr.datasets import audit, image_size_hw, load_annotations, read_image
from ddetr.datasets.annotations import Annotations, Category, FindingLog, ImageRecord, ImageTable, whole
from ddetr.errors import InputError
from ddetr.untrusted import MAX_CLASSES, MAX_OBJECTS

TREE = {"images/train/a.jpg": "0 0.5 0.5 0.25 0.5\n", "images/val/b.jpg": "0 0.5 0.5 0.5 0.5"}
SPLITS = "train: images/train\nval: images/val\n"


# ---- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["EPS", "PCX", "XBM"])
def test_only_formats_of_photographs_reach_pillow(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("Ghostscript was called")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", never)
    path = tmp_path / "a.jpg"
    Image.new("1" if kind == "XBM" else "RGB", (8, 8)).save(path, format=kind)
    for read in (image_size_hw, read_image):
        with pytest.raises(InputError, match=r"a\.jpg can't be read: it is no image of a known format"):
            read(path)


@pytest.mark.parametrize("kind", ["JPEG", "MPO", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "JPEG2000", "TGA", "ICO"])
def test_formats_that_users_have_are_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "a"
    Image.new("RGB", (32, 16), "red").save(path, format=kind, **({"sizes": [(32, 16)]} if kind == "ICO" else {}))
    assert tuple(read_image(path).shape) == (3, *image_size_hw(path)) == (3, 16, 32)


def test_images_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.jpg")
    (tmp_path / "b.jpg").symlink_to("/dev/zero")
    (tmp_path / "c.jpg").mkdir()
    with (tmp_path / "d.jpg").open("wb") as file:
        file.write(b"\xff\xd8\xff\xe1\x00\x00")
        file.truncate(2**31)  # of which the disk holds nothing
    for name, said in (("a", "a named pipe"), ("b", "a device"), ("c", "a folder"), ("d", "2,048 MB")):
        for read in (image_size_hw, read_image):
            with pytest.raises(InputError, match=f"{name}.jpg can't be read: it (is|has) {said}"):
                read(tmp_path / f"{name}.jpg")


@pytest.mark.parametrize(
    "content",
    [
        b"\xff\xd8" + b"\xff" * 300_000 + b"\xd9",
        b"\xff\xd8" + b"\xff\xd0" * 200_000,
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0\0\x08\0\0\0\x08\x08\x02\0\0\0\0\0\0\0" + b"\0\0\0\0tEXt\0\0\0\0" * 150_000,
    ],
)
def test_headers_without_end_are_left_early(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.jpg").write_bytes(content)
    with pytest.raises(InputError, match="in 100,000"):
        image_size_hw(tmp_path / "a.jpg")


# ---- YOLO ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data_yaml", "said"),
    [
        ("nc: 1000000000", "nc must be a number of classes, at most 25,000"),
        ("nc: -1", "nc must be a number"),
        ("nc: " + "9" * 5000, "nc must be a number"),
        ("names: &a [*a]", "contains itself"),
        ("names: {1.0e+400: a}", "keys of names must be class ids"),
        (f"names: {'[' * 5000}", "nested more than 50"),
        (f"names: [{'x' * 5_000_000}]", "3 MB|5 MB|more than the 2 MB"),
    ],
    ids=lambda text: text[:20],
)
def test_data_yaml_that_says_too_much(make_yolo: Callable[..., Path], data_yaml: str, said: str) -> None:
    root = make_yolo(TREE, data_yaml=f"{SPLITS}{data_yaml}\n")
    with pytest.raises(InputError, match=said):
        load_annotations(root, "train")


def test_paths_in_data_yaml_that_no_system_has(make_yolo: Callable[..., Path]) -> None:
    long = f"val: ['{'x' * 5000}', '{'a/' * 4000}b', \"nul\\0byte\", images/val]\n"
    root = make_yolo(TREE, data_yaml=f"train: images/train\n{long}names: [cat]\n")
    assert len(load_annotations(root, "val").images) == 1


@pytest.mark.parametrize("class_id", ["999999999", "9" * 5000, "²"])
def test_class_ids_without_names_have_an_end(
    make_yolo: Callable[..., Path], kinds: Callable[[Any], dict[str, int]], class_id: str
) -> None:
    root = make_yolo(TREE | {"images/train/c.jpg": f"{class_id} 0.5 0.5 0.5 0.5"})
    annotations = load_annotations(root, "train")
    assert len(annotations.categories) <= MAX_CLASSES
    assert ("too-many-classes" in {f.kind for f in annotations.findings}) == (class_id != "²")


def test_labels_and_lists_that_are_no_files(make_yolo: Callable[..., Path]) -> None:
    root = make_yolo(TREE, data_yaml="train: images/train\nval: val.txt\nnames: [cat]\n")
    (root / "labels/train/a.txt").unlink()
    os.mkfifo(root / "labels/train/a.txt")
    (finding,) = load_annotations(root, "train").findings
    assert (finding.kind, finding.action) == ("unreadable-labels", "refused")
    assert "a named pipe" in finding.message
    os.mkfifo(root / "val.txt")
    with pytest.raises(InputError, match=r"val\.txt can't be read: it is a named pipe"):
        load_annotations(root, "val")
    (root / "data.yaml").unlink()
    os.mkfifo(root / "data.yaml")
    with pytest.raises(InputError, match=r"data\.yaml can't be read: it is a named pipe"):
        load_annotations(root, "train")
    with pytest.raises(InputError, match="neither a folder nor a file"):
        load_annotations(root / "data.yaml", "train")


# ---- COCO ------------------------------------------------------------------------------------------------------------


def coco(root: Path, **content: Any) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    Image.new("RGB", (64, 48)).save(root / "train/a.jpg")
    whole = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "annotations": [coco_object()],
        "categories": [{"id": 3, "name": "cat"}],
    }
    (root / "annotations/instances_train.json").write_text(json.dumps(whole | content))
    return root


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"categories": [{"id": float("inf"), "name": "a"}]}, "expected an object with an integer"),
        ({"categories": [{"id": float("nan"), "name": "a"}]}, "expected an object with an integer"),
        ({"categories": [["x" * 5_000_000]]}, "expected an object with an integer"),
        ({"categories": {"a": 1}}, "must be a list"),
        ({"images": "x"}, "must be a list"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_coco_files_of_which_nothing_can_be_made(tmp_path: Path, content: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        load_annotations(coco(tmp_path / "set", **content), "train")
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"categories": [{"id": 10**30, "name": "cat"}]}, "category-id"),
        ({"categories": [{"id": 3, "name": "c" * 5_000_000}]}, "class-name"),
        ({"categories": [{"id": i, "name": f"c{i}"} for i in range(200_000)]}, "too-many-classes"),
        ({"images": [{"id": 1, "file_name": "a" * 5_000_000}]}, "image-entry"),
        ({"images": [{"id": 1, "file_name": "a\0b"}]}, "every-image-missing"),
        ({"images": [{"id": 1, "file_name": "\ud800/x.jpg"}]}, "every-image-missing"),
        ({"images": [{"id": 10**400, "file_name": "a.jpg"}]}, "image-id-not-integer"),
        ({"images": [{"id": 1, "file_name": "a.jpg", "width": 1e30, "height": 1e9}]}, "size-mismatch"),
        ({"annotations": [coco_object(bbox=(1e308, 1e308, 1e308, 1e308))]}, "nan-box"),
        ({"annotations": [coco_object(bbox=(1e300, 0, 5, 5))]}, "degenerate-box"),
        ({"annotations": [coco_object(area=1e300)]}, "missing-area"),
        ({"annotations": [coco_object(bbox=(), segmentation=[[10**400] * 6])]}, "missing-box"),
        ({"annotations": [coco_object(bbox=(), segmentation=[[-1e308, 0, 1e308, 5]])]}, "nan-box"),
        ({"annotations": [coco_object(category_id=["x" * 5_000_000])]}, "category-unknown"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_coco_values_without_bounds_are_findings(tmp_path: Path, content: dict[str, Any], kind: str) -> None:
    annotations = load_annotations(coco(tmp_path / "set", **content), "train")
    assert kind in {finding.kind for finding in annotations.findings}
    assert all(len(finding.where) + len(finding.message) < 3000 for finding in annotations.findings)


def test_one_key_with_two_values_is_refused(tmp_path: Path) -> None:
    root = coco(tmp_path / "set")
    file = root / "annotations/instances_train.json"
    file.write_text(file.read_text().replace('"iscrowd": 0', '"iscrowd": 0, "image_id": 2'))
    with pytest.raises(InputError, match="the key 'image_id' stands twice"):
        load_annotations(root, "train")


def test_annotation_files_that_are_pipes(tmp_path: Path) -> None:
    root = coco(tmp_path / "set")
    os.mkfifo(root / "annotations/other.json")
    assert len(load_annotations(root, "train").images) == 1
    (root / "annotations/instances_train.json").unlink()
    os.mkfifo(root / "annotations/instances_train.json")
    with pytest.raises(InputError, match="a named pipe"):
        load_annotations(root, "train")


# ---- VOC -------------------------------------------------------------------------------------------------------------

ENTITIES = '<!DOCTYPE a [<!ENTITY a "' + "x" * 1000 + '"><!ENTITY b "' + "&a;" * 1000 + '">]>'


@pytest.mark.parametrize(
    "declared",
    [
        ENTITIES,
        '\n<?xml version="1.0"?>' + ENTITIES,
        '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/hostname">]>',
        '<!DOCTYPE a [<!ENTITY % b "x"> %b;]>',
    ],
    ids=["bomb", "bomb-below-a-line", "external", "parameter"],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_xml_entities_are_refused(make_voc: Callable[..., Path], declared: str, encoding: str) -> None:
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([voc_object()])})
    file = root / "Annotations/b.xml"
    file.write_bytes((declared + voc_xml([voc_object("&b;")])).encode(encoding))
    annotations = load_annotations(root, "train")
    assert len(annotations.images) == 1
    (finding,) = (finding for finding in annotations.findings if finding.kind == "malformed-xml")
    assert "it declares the entity" in finding.message


def test_xml_without_bounds(make_voc: Callable[..., Path]) -> None:
    endless = "<size><width>1e999</width><height>1e999</height></size>"
    root = make_voc({"a": voc_xml([voc_object("n" * 5000)], endless), "b": voc_xml([voc_object()])})
    (root / "Annotations/b.xml").write_text("<a>" * 100_000 + "</a>" * 100_000)
    kinds = {finding.kind for finding in load_annotations(root, "train").findings}
    assert {"missing-size", "class-name"} <= kinds
    (root / "Annotations/b.xml").unlink()
    os.mkfifo(root / "Annotations/b.xml")
    assert "malformed-xml" in {finding.kind for finding in load_annotations(root, "train").findings}


# ---- the whole -------------------------------------------------------------------------------------------------------


def test_an_image_has_a_bounded_number_of_objects(tmp_path: Path) -> None:
    number = MAX_OBJECTS + 1
    record = ImageRecord(
        image_id=1,
        path=tmp_path / "a.jpg",
        size_hw=(48, 64),
        boxes_xyxy=np.tile(np.array([1, 1, 5, 5], np.float32), (number, 1)),
        labels=np.zeros(number, np.int64),
        area=np.full(number, 16, np.float32),
        ignore=np.zeros(number, bool),
    )
    images = ImageTable.from_records([record])
    annotations = whole(tmp_path, "train", "coco", [Category(1, "cat")], images, FindingLog())
    (finding,) = annotations.findings
    assert (finding.kind, finding.action) == ("too-many-objects", "refused")


@pytest.mark.parametrize("line", ["0 .5 .5 .2 .2", "", "x"])
def test_of_a_crowd_no_more_is_read(make_yolo: Callable[..., Path], make_voc: Callable[..., Path], line: str) -> None:
    root = make_yolo({"images/train/a.jpg": f"{line}\n" * 300_000}, data_yaml="train: images/train\nnames: [cat]\n")
    annotations = load_annotations(root, "train")
    assert "The image has 300,000 objects" in {f.kind: f.message for f in annotations.findings}["too-many-objects"]
    root = make_voc({"a": voc_xml([voc_object(line or "cat"), "<object/>" * MAX_OBJECTS])})
    assert "too-many-objects" in {finding.kind for finding in load_annotations(root, "train").findings}


def test_of_a_crowd_in_other_formats_no_more_is_read(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """KITTI, LabelMe and CVAT; their objects have wrong lines, shapes and elements among them."""
    n = MAX_OBJECTS // 2 + 1
    shape = {"label": "cat", "points": [[1, 2], [30, 40]], "shape_type": "rectangle"}
    contents = {
        "kitti/label_2/a.txt": "Car 0 0 0 1 2 30 40\nx\n" * n,
        "labelme/a.json": json.dumps({"imagePath": "a.jpg", "shapes": [shape, None] * n}),
        "cvat/annotations.xml": f'<annotations><image name="a.jpg">{"<box/><x/>" * n}</image></annotations>',
    }
    for name, content in contents.items():
        format = name.partition("/")[0]
        write_image(tmp_path / format / ("image_2" if format == "kitti" else "") / "a.jpg")
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
        annotations = load_annotations(tmp_path / format, "all")
        assert annotations.format == format
        assert "too-many-objects" in {finding.kind for finding in annotations.findings}


def test_the_audit_of_many_classes_is_not_quadratic(tmp_path: Path) -> None:
    """200,000 classes took half an hour; a test without a clock: far more steps than this never end here."""
    Image.new("RGB", (64, 48)).save(tmp_path / "a.jpg")
    record = ImageRecord(
        image_id=1,
        path=tmp_path / "a.jpg",
        size_hw=(48, 64),
        boxes_xyxy=np.array([[1, 1, 5, 5]], np.float32),
        labels=np.zeros(1, np.int64),
        area=np.full(1, 16, np.float32),
        ignore=np.zeros(1, bool),
    )
    categories = tuple(Category(i, f"c{i}") for i in range(200_000))
    report = audit(Annotations("set", "coco", categories, ImageTable.from_records([record])))
    report.render()
    assert sum(f.count for f in report.findings if f.kind == "class-without-objects") == 199_999


def test_names_do_nothing_to_the_screen(make_yolo: Callable[..., Path], capsys: pytest.CaptureFixture) -> None:
    names = json.dumps(["\x1b[2J\x1b]0;owned\x07", "a\u202eb\nc", "x" * 900])
    root = make_yolo(TREE | {"images/train/\x1b[31m\u202e.jpg": "7 .5 .5 .2 .2"}, data_yaml=f"{SPLITS}names: {names}\n")
    assert cli.main(["data", "audit", str(root)]) == 0
    assert cli.main(["data", "audit", str(root / "\x1b[5m\u202enothing\nhere")]) == 2
    shown = "".join(capsys.readouterr())
    assert not set(shown) & set("\x1b\x07\u202e")
    assert r"\x1b[2J\x1b]0;owned\x07" in shown
    assert "x" * 300 not in shown.replace("\n", "")
    assert r"\x1b[5m\u202enothing\nhere" in shown


def test_a_decoder_gets_no_more_than_a_file_has(tmp_path: Path) -> None:
    """The bytes that are read are those of the file, whatever it is called."""
    picture = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(picture, "PNG")
    (tmp_path / "a.eps").write_bytes(picture.getvalue())
    assert torch.equal(read_image(tmp_path / "a.eps")[:, 0, 0], torch.tensor([255, 0, 0], dtype=torch.uint8))

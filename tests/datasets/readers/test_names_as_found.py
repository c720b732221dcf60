"""The names that annotations give their images mean the same in each format, and are guessed in none."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from dataset_parts import voc_object, voc_xml

from ddetr.datasets import load_annotations

KITTI_ROW = "Car 0 0 0 4 6 24 18 1 1 1 0 0 9 0\n"
SIGNED = "https://h.example/set/{}.jpg?X-Amz-Credential=AK/2024/s3&X-Amz-Signature=1"
STATED = {
    "signed": SIGNED,
    "percent": "cam%20é/{}.jpg",
    "windows": "C:\\pics\\{}.jpg",
    "capitals": "IMGS/{}.JPG",
}


def write_csv(root: Path, names: list[str]) -> None:
    rows = "".join(f"{name},64,48,cat,4,6,24,18\n" for name in names)
    (root / "annotations.csv").write_text(f"filename,width,height,class,xmin,ymin,xmax,ymax\n{rows}")


def write_createml(root: Path, names: list[str]) -> None:
    box = {"label": "cat", "coordinates": {"x": 10, "y": 8, "width": 20, "height": 12}}
    (root / "a.json").write_text(json.dumps([{"image": name, "annotations": [box]} for name in names]))


def write_label_studio(root: Path, names: list[str]) -> None:
    value = {"x": 10, "y": 10, "width": 20, "height": 20, "rectanglelabels": ["cat"]}
    region = {"original_width": 64, "original_height": 48, "id": "r", "value": value}
    tasks = [{"data": {"image": name}, "annotations": [{"result": [region]}]} for name in names]
    (root / "a.json").write_text(json.dumps(tasks))


def write_coco(root: Path, names: list[str]) -> None:
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names, 1)]
    objects = [{"id": i["id"], "image_id": i["id"], "category_id": 1, "bbox": [4, 6, 20, 12]} for i in images]
    content = {"images": images, "annotations": objects, "categories": [{"id": 1, "name": "cat"}]}
    (root / "all.json").write_text(json.dumps(content))


WRITERS = {"csv": write_csv, "createml": write_createml, "label_studio": write_label_studio, "coco": write_coco}


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED)
@pytest.mark.parametrize("format", WRITERS)
def test_names_in_one_file(tmp_path: Path, write_image: Callable[..., Path], format: str, stated: str) -> None:
    for name in ("a", "b"):
        write_image(tmp_path / "imgs" / f"{name}.jpg", seed=ord(name))
    WRITERS[format](tmp_path, [stated.format(name) for name in ("a", "b")])
    found = load_annotations(tmp_path, "all", format=format)
    assert [record.path.name for record in found.images] == ["a.jpg", "b.jpg"]
    assert {finding.action for finding in found.findings} <= {"note", "repaired"}


@pytest.mark.parametrize("format", WRITERS)
def test_images_in_several_folders(
    tmp_path: Path, write_image: Callable[..., Path], kinds: Callable, format: str
) -> None:
    """Names without folders, images in folders: found; but not a mask for an image that is gone, nor one of two."""
    names = ["a.jpg", "b.jpg", "c.jpg", "gone.jpg", "two.jpg"]
    for place in ("p/a", "p/b", "q/c", "masks/a", "masks/gone", "r/two", "s/two"):
        write_image(tmp_path / "photographs" / f"{place}.jpg", seed=len(place))
    write_image(tmp_path / "photographs" / "masks" / "b.jpg")
    WRITERS[format](tmp_path, names[2:])
    (tmp_path / "photographs" / "masks" / "c.jpg").symlink_to(tmp_path / "photographs" / "q" / "c.jpg")
    only = load_annotations(tmp_path, "all", format=format, image_dir="photographs/q")
    assert [record.path.name for record in only.images] == ["c.jpg"]
    assert kinds(only)["missing-image"] == "dropped"
    WRITERS[format](tmp_path, names)
    found = load_annotations(tmp_path, "all", format=format, image_dir="photographs")
    assert [record.path.parent.name for record in found.images if record.path.stem == "gone"] != ["p"]
    assert "two.jpg" not in [record.path.name for record in found.images]


@pytest.mark.parametrize("format", WRITERS)
def test_some_names_with_their_folder_and_some_without(
    tmp_path: Path, write_image: Callable[..., Path], format: str
) -> None:
    """As X-AnyLabeling writes them. The folder of those that are found holds the others; a mask is none of them."""
    for place in ("pics/a", "pics/b", "pics/c", "masks/b", "masks/c", "masks/d"):
        write_image(tmp_path / f"{place}.jpg", seed=ord(place[-1]))
    WRITERS[format](tmp_path, ["a.jpg", "..\\pics\\b.jpg", "..\\pics\\c.jpg", "d.jpg"])
    found = load_annotations(tmp_path, "all", format=format)
    assert [record.path for record in found.images] == [tmp_path / "pics" / f"{name}.jpg" for name in "abc"]


@pytest.mark.parametrize("format", ["csv", "coco"])
def test_images_of_another_split_are_not_taken(tmp_path: Path, write_image: Callable[..., Path], format: str) -> None:
    for place in ("train/1", "train/2", "valid/3"):
        write_image(tmp_path / f"{place}.jpg", seed=len(place))
    WRITERS[format](tmp_path, ["1.jpg", "2.jpg", "3.jpg"])
    file = next(path for path in tmp_path.iterdir() if path.is_file())
    file.rename(tmp_path / f"train{file.suffix}")
    found = load_annotations(tmp_path, "train", format=format)
    assert [record.path.name for record in found.images] == ["1.jpg", "2.jpg"]


@pytest.mark.parametrize("stated", STATED.values(), ids=STATED)
@pytest.mark.parametrize("format", ["voc", "labelme"])
def test_names_that_label_files_state(
    tmp_path: Path, write_image: Callable[..., Path], format: str, stated: str
) -> None:
    """The label files have names of their own."""
    for name in ("a", "b"):
        write_image(tmp_path / f"{name}.jpg", seed=ord(name))
        image = stated.format(name)
        if format == "voc":
            text = voc_xml([voc_object()]).replace("x.jpg", image.replace("&", "&amp;"))
            (tmp_path / f"label_{name}.xml").write_text(text)
        else:
            shape = {"label": "cat", "points": [[4, 6], [24, 18]], "shape_type": "rectangle"}
            content = {"shapes": [shape], "imagePath": image, "imageHeight": 48, "imageWidth": 64}
            (tmp_path / f"label_{name}.json").write_text(json.dumps(content))
    found = load_annotations(tmp_path, "all", format=format)
    assert [record.path.name for record in found.images] == ["a.jpg", "b.jpg"]


@pytest.mark.parametrize("before", ["https://h.example/set/", "C:\\pics\\", "", "./"])
@pytest.mark.parametrize("after", ["?X-Amz-Credential=AK/2024/s3&v=1", ""])
def test_names_in_a_list(make_yolo: Callable[..., Path], before: str, after: str) -> None:
    labels = {f"my images/images/{name} é.jpg": "0 0.5 0.5 0.2 0.2\n" for name in ("a", "b")}
    stated = f"{before}my%20images/images/{{}}%20%C3%A9.jpg{after}"
    root = make_yolo(labels, data_yaml="train: train.txt\nval: my images/images\nnames: [cat]\n")
    (root / "train.txt").write_text("".join(f"{stated.format(name)}\n" for name in ("a", "b")))
    found = load_annotations(root, "train")
    assert [(record.path.name, len(record.labels)) for record in found.images] == [("a é.jpg", 1), ("b é.jpg", 1)]


@pytest.mark.parametrize(("format", "form"), [("createml", "xyxy"), ("csv", "xywh")])
def test_boxes_are_read_as_the_option_says(
    tmp_path: Path, write_image: Callable[..., Path], format: str, form: str
) -> None:
    """From the numbers as written, whatever the format's own form."""
    write_image(tmp_path / "a.jpg")
    WRITERS[format](tmp_path, ["a.jpg"])
    ((box,),) = [record.boxes_xyxy.tolist() for record in load_annotations(tmp_path, "all", boxes=form).images]
    assert box == {"createml": [10, 8, 20, 12], "csv": [4, 6, 28, 24]}[format]

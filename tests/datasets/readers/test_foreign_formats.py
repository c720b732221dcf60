"""Tables, Label Studio, Create ML and Hugging Face folders as their tools write them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.annotations import Annotations
from ddetr.errors import InputError

BOX = [4.0, 6.0, 24.0, 18.0]


def kinds(annotations: Annotations) -> dict[str, str]:
    return {finding.kind: finding.action for finding in annotations.findings}


def objects(annotations: Annotations) -> dict[str, list[tuple[str, list[float]]]]:
    """File name -> (class, box) of each object."""
    return {
        record.path.name: [
            (annotations.categories[label].name, np.round(box, 3).tolist())
            for label, box in zip(record.labels, record.boxes_xyxy.astype(float))
        ]
        for record in annotations.images
    }


# ---- CSV -------------------------------------------------------------------------------------------------------------

TENSORFLOW = "filename,width,height,class,xmin,ymin,xmax,ymax\n"
OPEN_IMAGES = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside\n"
)


@pytest.mark.parametrize(
    "text",
    [
        TENSORFLOW + "a.jpg,64,48,cat,4,6,24,18\n",
        "\ufeff" + TENSORFLOW.replace(",", ";").upper() + "a.jpg;64;48;cat;4,0;6;24;18\n",
        (TENSORFLOW + "a.jpg,64,48,cat,4,6,24,18\n").replace(",", "\t").replace("\n", "\r\n"),
        "/home/me/imgs/a.jpg,4,6,24,18,cat\n/home/me/imgs/b.jpg,,,,,\n",  # RetinaNet
        "a.jpg,4,6,24,18,cat,64,48\n",  # SKU-110K
        "cat,4,6,20,12,a.jpg,64,48\n",  # makesense.ai, before and after it wrote a header
        "label_name,bbox_x,bbox_y,bbox_width,bbox_height,image_name,image_width,image_height\ncat,4,6,20,12,a.jpg,64,48\n",
        "Location, class, x1, y1, x2, y2\na.jpg, cat, 4, 6, 24, 18\n",  # the column that holds names of images
        "image_id, Class Name, x_min, y_min, x_max, y_max\na, cat, 4, 6, 24, 18\n\n",  # without suffixes
        OPEN_IMAGES + "a,xclick,cat,1,0.0625,0.375,0.125,0.375,0,0,0,0,0\n",
        'class,filename,y1,x1,y2,x2\n"cat",".\\imgs\\a.jpg",6,4,18,24\n',
        "Image_ID,class,xmin,ymin,width,height\na,cat,4.0,6,20,12\n",  # Zindi; SVHN's tables have Left,Top
        "filename,image_width,image_height,Top,Left,Height,Width,class\na.jpg,64,48,6,4,12,20,cat\n",
    ],
)
def test_tables_of_boxes(tmp_path: Path, write_image: Callable[..., Path], text: str) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    write_image(tmp_path / "images" / "b.jpg")
    (tmp_path / "annotations.csv").write_text(text)
    assert detect_format(tmp_path) == "csv"
    assert available_splits(tmp_path) == ["all"]
    for path in (tmp_path, tmp_path / "annotations.csv"):
        annotations = load_annotations(path, "all")
        assert objects(annotations)["a.jpg"] == [("cat", BOX)]
        assert set(kinds(annotations)) <= {"unlisted-images", "file-name-path"}
        assert ("file-name-path" in kinds(annotations)) == ("imgs" in text)
    assert ("b.jpg" in objects(annotations)) == ("b.jpg" in text)


@pytest.mark.parametrize(
    "columns", ["width,height,class,xmin,ymin", "width,height,xmin,ymin", "xmin,width,ymin,height"]
)
def test_sizes_that_may_be_the_images_are_no_boxes(
    tmp_path: Path, write_image: Callable[..., Path], columns: str
) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "labels.csv").write_text(f"filename,{columns}\na.jpg,1,1,1,1\n")
    with pytest.raises(InputError, match="bbox_width and bbox_height where it has sizes"):
        detect_format(tmp_path)


def test_cells_beyond_the_columns_are_named(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """A second box in the row of the first would be lost without a word."""
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / name)
    (tmp_path / "annotations.csv").write_text("a.jpg,4,6,24,18,cat\nb.jpg,4,6,24,18,cat,1,2,9,8,dog\n")
    annotations = load_annotations(tmp_path, "all")
    assert objects(annotations) == {"a.jpg": [("cat", BOX)], "b.jpg": [("cat", BOX)]}
    assert kinds(annotations) == {"cells-beyond": "dropped"}


def test_a_table_of_any_place(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Given as COCO files are: by itself, with the folder of its images."""
    for name in ("a.jpg", "b.jpg"):
        write_image(tmp_path / "photos" / name)
        (tmp_path / f"{name[0]}.csv").write_text(f"{TENSORFLOW}{name},64,48,cat,4,6,24,18\n")
    for name in ("a.jpg", "b.jpg"):
        found = load_annotations(tmp_path, "val", annotation_file=f"{name[0]}.csv", image_dir="photos")
        assert objects(found) == {name: [("cat", BOX)]}


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("annotations/LABELS.CSV", TENSORFLOW + "a.jpg,64,48,cat,4,6,24,18\n"),
        ("_Annotations.CreateML.JSON", "["),
        ("Metadata.JSONL", '{"file_name": "a.jpg", "objects": {"bbox": [[4, 6, 20, 12]], "categories": ["cat"]}}'),
    ],
)
def test_files_in_capitals(tmp_path: Path, write_image: Callable[..., Path], file: str, text: str) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    boxes = [{"label": "cat", "coordinates": {"x": 14, "y": 12, "width": 20, "height": 12}}]
    text = json.dumps([{"image": "a.jpg", "annotations": boxes}]) if text == "[" else text
    (tmp_path / file).write_text(text)
    (split,) = available_splits(tmp_path)
    assert objects(load_annotations(tmp_path, split)) == {"a.jpg": [("cat", BOX)]}


def test_a_table_in_utf_16(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "ä.jpg")
    (tmp_path / "train.csv").write_text(TENSORFLOW + "ä.jpg,64,48,Kätzchen,4,6,24,18\n", encoding="utf-16")
    assert objects(load_annotations(tmp_path, "train")) == {"ä.jpg": [("Kätzchen", BOX)]}
    (tmp_path / "train.csv").write_bytes((TENSORFLOW + "ä.jpg,64,48,Kätzchen,4,6,24,18\n").encode("latin-1"))
    with pytest.raises(InputError, match="neither UTF-8 nor UTF-16 text; save it as UTF-8"):
        load_annotations(tmp_path, "train")


@pytest.mark.parametrize(
    ("tables", "images", "splits"),
    [
        (["train/_annotations.csv", "valid/_annotations.csv"], ["train", "valid"], ("train", "valid")),
        (["data/train_labels.csv", "data/test_labels.csv"], ["images", "images"], ("train", "test")),
        (["train.csv", "val.csv"], ["train", "val"], ("train", "val")),
        (
            ["oidv6-train-annotations-bbox.csv", "validation-annotations-bbox.csv"],
            ["train", "validation"],
            ("train", "validation"),
        ),
        (["train/labels/detections.csv", "test/labels/detections.csv"], ["train/data", "test/data"], ("train", "test")),
    ],
)
def test_splits_of_tables(
    tmp_path: Path,
    write_image: Callable[..., Path],
    tables: list[str],
    images: list[str],
    splits: tuple[str, str],
) -> None:
    for i, (table, folder) in enumerate(zip(tables, images)):
        write_image(tmp_path / folder / f"{i}.jpg", seed=i)
        (tmp_path / table).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / table).write_text(f"{TENSORFLOW}{i}.jpg,64,48,cat,4,6,24,18\n")
    assert default_splits(tmp_path) == splits
    for i, split in enumerate(splits):
        assert objects(load_annotations(tmp_path, split)) == {f"{i}.jpg": [("cat", BOX)]}


def test_a_table_of_one_class(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Without a column of classes, as contests have them."""
    write_image(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_text(",image,xmin,ymin,xmax,ymax\n0,a.jpg,4,6,24,18\n")
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations) == {"a.jpg": [("object", BOX)]}
    assert kinds(annotations) == {"missing-classes": "repaired"}


@pytest.mark.parametrize(
    ("tables", "splits", "chosen"),
    [
        (
            ["a/train_labels.csv", "a/val_labels.csv", "b/Train.csv"],
            ["a/train_labels", "b/Train", "val"],
            "none is called train",
        ),
        (["a/train.csv", "b/train.csv"], ["a/train", "b/train"], "none is called train"),
        (["train.csv", "train_labels.csv"], ["train", "train_labels"], ("train", None)),
    ],
)
def test_tables_of_several_folders_are_never_parts_of_one_set(tmp_path, tables, splits, chosen):
    for table in tables:
        (tmp_path / table).parent.mkdir(exist_ok=True)
        (tmp_path / table).write_text(f"{TENSORFLOW}a.jpg,64,48,cat,4,6,24,18\n")
    assert sorted(available_splits(tmp_path)) == splits
    if isinstance(chosen, str):
        with pytest.raises(InputError, match=chosen):
            default_splits(tmp_path)
    else:
        assert default_splits(tmp_path) == chosen


def test_columns_in_another_order_stop(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Without a header, x1, x2, y1, y2 are read as x1, y1, x2, y2."""
    rows = []
    for i in range(8):
        write_image(tmp_path / f"{i}.jpg")
        rows.append(f"{i}.jpg,{5 * i},{5 * i + 20},{4 * i},{4 * i + 16},cat\n")
    (tmp_path / "train.csv").write_text("".join(rows))
    found = [f for f in load_annotations(tmp_path, "train").findings if f.action == "refused"]
    assert [f.kind for f in found] == ["boxes-in-another-order"]
    assert "the order x1, x2, y1, y2. If so" in found[0].message


def test_open_images(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Names by their ids, groups ignored, the images that are not there counted in one finding a name."""
    write_image(tmp_path / "train" / "000002b66c9c498e.jpg")
    (tmp_path / "train-annotations-bbox.csv").write_text(
        f"{OPEN_IMAGES}000002b66c9c498e,xclick,/m/01g317,1,0.0625,0.375,0.125,0.375,0,1,0,0,0\n"
        "000002b66c9c498e,activemil,/m/0cmf2,1,0.5,1,0.5,1,-1,-1,1,-1,-1\n"
        "0000599864fd15b3,xclick,/m/0cmf2,1,0.5,1,0.5,1,0,0,0,0,0\n"
    )
    annotations = load_annotations(tmp_path, "train")
    assert [category.name for category in annotations.categories] == ["/m/01g317", "/m/0cmf2"]
    assert kinds(annotations) == {"missing-image": "dropped", "unnamed-classes": "note"}
    (tmp_path / "class-descriptions-boxable.csv").write_text("/m/01g317,Person\n/m/0cmf2,Airplane\n")
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations) == {"000002b66c9c498e.jpg": [("Person", BOX), ("Airplane", [32.0, 24.0, 64.0, 48.0])]}
    assert annotations.images[0].ignore.tolist() == [False, True]
    assert annotations.num_images_left_out == 1


def test_a_part_of_open_images(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Its tables name all of its images, of which people have some; other tables name those that should be there."""
    write_image(tmp_path / "train" / "a.jpg")
    file = tmp_path / "train-annotations-bbox.csv"
    rows = [f"{name},xclick,cat,1,0.0625,0.375,0.125,0.375,0,0,0,0,0\n" for name in "abcdefgh"]
    file.write_text(OPEN_IMAGES + "".join(rows))
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations) == {"a.jpg": [("cat", BOX)]}
    assert [(f.kind, f.action, f.count) for f in annotations.findings] == [("part-of-images", "note", 7)]
    assert "7 of the 8 images that it names are not here: 1 were taken" in annotations.findings[0].message
    file.write_text(TENSORFLOW + "".join(f"{name}.jpg,64,48,cat,4,6,24,18\n" for name in "abcdefgh"))
    assert kinds(load_annotations(tmp_path, "train"))["most-images-left-out"] == "refused"
    file.write_text(OPEN_IMAGES + "".join(rows[1:]))
    assert kinds(load_annotations(tmp_path, "train"))["every-image-missing"] == "refused"


def test_what_is_wrong_with_a_table(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_text(
        f"{TENSORFLOW}a.jpg,64,48,cat,4,6,24,18\na.jpg,64,48,,4,6,24,18\na.jpg,64,48,cat,4,six,24,18\ngone.jpg,64,48,"
        "cat,1,2,3,4\na.jpg,64,48,cat,24,6,4\na.jpg,64,48,cat,24,6,4,18\n"
    )
    annotations = load_annotations(tmp_path, "train")
    found = {(finding.kind, finding.action, finding.where) for finding in annotations.findings}
    assert found == {
        ("missing-name", "dropped", "train.csv, a.jpg, row 3"),
        ("nan-box", "refused", "train.csv, a.jpg, row 4"),
        ("missing-image", "dropped", "train.csv, gone.jpg"),
        ("nan-box", "refused", "train.csv, a.jpg, row 6"),
        ("swapped-corners", "repaired", "train.csv, a.jpg, row 7"),
    }
    (tmp_path / "train.csv").write_text(f"{TENSORFLOW}a.jpg,64,48,cat,.1,.1,.5,.5\n")
    (refused,) = load_annotations(tmp_path, "train").findings
    assert (refused.kind, refused.action) == ("boxes-look-relative", "refused")
    assert "--data.boxes xyxy-relative" in refused.message
    read = load_annotations(tmp_path, "train", boxes="xyxy-relative")
    assert objects(read)["a.jpg"] == [("cat", [6.4, 4.8, 32.0, 24.0])]
    assert not read.findings


def test_images_of_one_name_are_never_guessed(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for folder in ("one", "two"):
        write_image(tmp_path / "raw" / folder / "1.jpg", seed=len(folder))
    table = tmp_path / "labels.csv"
    table.write_text(f"{TENSORFLOW}one/1.jpg,64,48,cat,4,6,24,18\ntwo/1.jpg,64,48,dog,4,6,24,18\n")
    found = load_annotations(tmp_path, "all", image_dir="raw")
    assert [(record.path.parent.name, record.labels.tolist()) for record in found.images] == [
        ("one", [0]),
        ("two", [1]),
    ]
    table.write_text(f"{TENSORFLOW}1.jpg,64,48,cat,4,6,24,18\n")  # two that it could be
    assert kinds(load_annotations(tmp_path, "all")) == {"every-image-missing": "refused"}
    write_image(tmp_path / "1.jpg")
    table.write_text(f"{TENSORFLOW}x/1.jpg,64,48,cat,4,6,24,18\ny/1.jpg,64,48,dog,4,6,24,18\n")  # two for one file
    assert kinds(load_annotations(tmp_path, "all"))["ambiguous-image"] == "refused"


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"a" * 3_000_000, "line of over"),
        (b'"' + b"x\n" * 200_000, "field larger than"),
        (b"a.jpg\0,64,48,cat,4,6,24,18\n", None),
        (b"../" * 3000 + b"a.jpg,64,48,cat,4,6,24,18\n", None),
        (b"a" * 5000 + b".jpg,64,48,cat,4,6,24,18\n", None),
        (b"a.jpg,64,48,cat,1e999,nan,-inf,9" + b"9" * 5000 + b"\n", None),
    ],
)
def test_hostile_tables(tmp_path: Path, write_image: Callable[..., Path], content: bytes, said: str | None) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_bytes(TENSORFLOW.encode() + content)
    if said:
        with pytest.raises(InputError, match=said):
            load_annotations(tmp_path, "train")
    else:
        load_annotations(tmp_path, "train")


BOXES_XYXY = [[4, 6, 24, 18], [40, 20, 60, 44], [30, 30, 62, 40], [2, 2, 30, 46]]


def cells(form: str) -> list[list[float]]:
    return BOXES_XYXY if form == "xyxy" else [[x1, y1, x2 - x1, y2 - y1] for x1, y1, x2, y2 in BOXES_XYXY]


@pytest.mark.parametrize("form", ["xywh", "xyxy"])
@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("image_id,width,height,bbox,source", 'a,64,48,"{}",usask_1\n'),  # global wheat, of Kaggle
        ("filename,bbox,label", 'a.jpg,"{}",object\n'),
        ("label;filename;BBox", "object;a.jpg;({})\n"),
    ],
)
def test_tables_with_a_box_in_a_cell(
    tmp_path: Path, write_image: Callable[..., Path], form: str, head: str, row: str
) -> None:
    """What the four numbers are, the images tell."""
    write_image(tmp_path / "train" / "a.jpg")
    rows = "".join(row.format(box) for box in cells(form))
    (tmp_path / "train.csv").write_text(f"{head}\n{rows}")
    assert detect_format(tmp_path) == "csv"
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations) == {"a.jpg": [("object", box) for box in BOXES_XYXY]}
    said = {"box-form": "note"} | ({"missing-classes": "repaired"} if "label" not in head else {})
    assert kinds(annotations) == said
    given = load_annotations(tmp_path, "train", boxes=form)
    assert objects(given) == objects(annotations)
    assert "box-form" not in kinds(given)


@pytest.mark.parametrize("form", ["xywh", "xyxy"])
def test_boxes_in_cells_of_which_some_reach_out(tmp_path: Path, write_image: Callable[..., Path], form: str) -> None:
    write_image(tmp_path / "a.jpg")
    boxes = [[30 + i, 28, 60, 40 + i] for i in range(8)] + [[50, 30, 80, 44], [40, 30, 60, 60]]
    boxes = boxes if form == "xyxy" else [[x, y, x2 - x, y2 - y] for x, y, x2, y2 in boxes]
    (tmp_path / "train.csv").write_text("image,bbox,class\n" + "".join(f'a.jpg,"{box}",cat\n' for box in boxes))
    annotations = load_annotations(tmp_path, "train")
    assert kinds(annotations) == {"box-form": "note", "box-clipped": "repaired"}
    assert objects(annotations)["a.jpg"][0] == ("cat", [30.0, 28.0, 60.0, 40.0])


def test_tables_with_a_row_for_each_image(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for name in "abc":
        write_image(tmp_path / f"{name}.jpg")
    some = cells("xyxy")
    (tmp_path / "train.csv").write_text(
        "image_name,BoxesString,domain\n"
        f"a,{';'.join(' '.join(map(str, box)) for box in some)},usask_1\nb,no_box,usask_1\nc,4 6 24 18,ethz\n"
    )
    annotations = load_annotations(tmp_path, "train")  # global wheat of 2021
    boxes = [("object", [float(value) for value in box]) for box in some]
    assert objects(annotations) == {"a.jpg": boxes, "b.jpg": [], "c.jpg": boxes[:1]}
    assert kinds(annotations) == {"box-form": "note", "missing-classes": "repaired"}
    rows = [("a.jpg", some, ["cat", "dog", "cat", "dog"]), ("b.jpg", [], []), ("c.jpg", some[:1], ["dog"])]
    (tmp_path / "train.csv").write_text(
        "file_name,bboxes,labels\n" + "".join(f'{name},"{boxes}","{classes}"\n' for name, boxes, classes in rows)
    )
    annotations = load_annotations(tmp_path, "train", format="csv")
    assert [name for name, _ in objects(annotations)["a.jpg"]] == ["cat", "dog", "cat", "dog"]
    assert objects(annotations)["c.jpg"] == [("dog", BOX)]
    (tmp_path / "train.csv").write_text(f'file_name,bboxes,labels\na.jpg,"{some}","[\'cat\']"\n')
    assert kinds(load_annotations(tmp_path, "train"))["boxes-without-classes"] == "refused"


def test_boxes_in_cells_of_a_small_validation_split(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """One box may fit as corners and as a corner and a size; training tells which it is."""
    for split, boxes in (("train", cells("xyxy")), ("val", [[4, 6, 24, 18]])):
        write_image(tmp_path / split / f"{split}.jpg", seed=len(split))
        rows = "".join(f'{split}.jpg,"{box}",cat\n' for box in boxes)
        (tmp_path / f"{split}.csv").write_text(f"file_name,bbox,label\n{rows}")
    annotations = load_annotations(tmp_path, "val", categories=load_annotations(tmp_path, "train").categories)
    assert objects(annotations) == {"val.jpg": [("cat", BOX)]}
    assert kinds(annotations) == {"box-form": "note"}


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        (["[4, 6, 20, 12]"], {"box-form-unknown": "refused"}),  # fits as both
        (["[0.1, 0.2, 0.3, 0.2]"] * 3, {"boxes-look-relative": "refused"}),
        (["[4, 6, 20, 12]", "[1, 2, 3]"], {"box-form-unknown": "refused", "nan-box": "refused"}),
        (["[4, 6, 20, 12]", "[1, 2, 3, 4, 5, 6, 7, 8]"], {"box-form-unknown": "refused", "nan-box": "refused"}),
        (["[4, 6, 20, 12]", "{'x': 1}"], {"box-form-unknown": "refused", "nan-box": "refused"}),
        (["[0, 0, 20, 12]", "[0, 0.5, 64, 47]"], {}),  # the same as both
    ],
)
def test_boxes_in_cells_that_tell_nothing(
    tmp_path: Path, write_image: Callable[..., Path], rows: list[str], found: dict[str, str]
) -> None:
    write_image(tmp_path / "a.jpg")
    (tmp_path / "train.csv").write_text("image,bbox,class\n" + "".join(f'a.jpg,"{row}",cat\n' for row in rows))
    assert kinds(load_annotations(tmp_path, "train")) == found


def test_a_column_that_may_hold_the_classes_is_not_passed_over(
    tmp_path: Path, write_image: Callable[..., Path]
) -> None:
    write_image(tmp_path / "a.jpg")
    rows = "a.jpg,4,6,24,18,{}\na.jpg,9,9,30,30,{}\n"
    (tmp_path / "train.csv").write_text("image,xmin,ymin,xmax,ymax,species\n" + rows.format("robin", "wren"))
    annotations = load_annotations(tmp_path, "train")
    assert kinds(annotations) == {"classes-unknown": "refused", "missing-classes": "repaired"}
    assert '"species" has 2 different words, such as robin' in annotations.findings[0].message
    (tmp_path / "train.csv").write_text("image,xmin,ymin,xmax,ymax,DigitLabel\n" + rows.format(1, 7))  # SVHN
    assert "classes-unknown" in kinds(load_annotations(tmp_path, "train"))
    no_classes = [("species", ("robin", "robin")), ("source", ("x", "y")), ("confidence", (0.5, 0.7))]
    no_classes += [
        ("day", ("2024-01-30", "2024-01-31T12:30:00Z")),
        ("occluded", ("True", "False")),
        ("path", ("x", "y")),
        ("label_conf", (1, 0)),
    ]
    for name, values in no_classes:
        (tmp_path / "train.csv").write_text(f"image,xmin,ymin,xmax,ymax,{name}\n" + rows.format(*values))
        annotations = load_annotations(tmp_path, "train")
        assert [category.name for category in annotations.categories] == ["object"]
        assert kinds(annotations) == {"missing-classes": "repaired"}


# ---- Label Studio ----------------------------------------------------------------------------------------------------


def region(label: str = "cat", **value: Any) -> dict[str, Any]:
    box = {"x": 6.25, "y": 12.5, "width": 31.25, "height": 25.0, "rotation": 0} | value
    return {
        "original_width": 64,
        "original_height": 48,
        "image_rotation": 0,
        "id": f"r{label}{value}",
        "type": "rectanglelabels",
        "from_name": "label",
        "to_name": "image",
        "value": box | {"rectanglelabels": [label]},
    }


def task(image: str, *annotations: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    done = [{"id": i, "was_cancelled": False, "result": result} for i, result in enumerate(annotations)]
    return {"id": 7, "annotations": done, "predictions": [], "data": {"image": image}} | more


@pytest.mark.parametrize(
    ("address", "file"),
    [
        ("/data/upload/3/1a2b3c4d-cat.jpg", "1a2b3c4d-cat.jpg"),
        ("/data/upload/3/1a2b3c4d-cat.jpg", "cat.jpg"),
        ("https://example.com/a%20set/a%20cat.jpg?X-Amz-Signature=%2Fb.jpg", "a cat.jpg"),
        ("/data/local-files/?d=home/me/set/cat.jpg", "cat.jpg"),
        ("s3://bucket/set/cat.jpg", "cat.jpg"),
        ("cat.jpg", "cat.jpg"),
    ],
)
def test_label_studio(tmp_path: Path, write_image: Callable[..., Path], address: str, file: str) -> None:
    write_image(tmp_path / "images" / file)
    write_image(tmp_path / "images" / "b.jpg")
    export = tmp_path / "project-1-at-2024-05-01.json"
    export.write_text(json.dumps([task(address, [region()])]))
    assert detect_format(tmp_path) == detect_format(export) == "label_studio"
    annotations = load_annotations(tmp_path, "all")
    assert objects(annotations) == {file: [("cat", BOX)]}
    assert set(kinds(annotations).values()) == {"note"}
    flat = {k: v for k, v in region().items() if k.startswith("original")} | region()["value"]
    export.write_text(json.dumps([{"image": address, "id": 7, "label": [flat], "annotator": 1, "lead_time": 3.2}]))
    assert objects(load_annotations(tmp_path, "all")) == {file: [("cat", BOX)]}  # JSON-MIN


def test_label_studio_shapes(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """A turned rectangle, a polygon, a rectangle whose label is another entry, a brush; a task without objects."""
    write_image(tmp_path / "a.jpg")
    write_image(tmp_path / "b.jpg")
    polygon = {"value": {"points": [[6.25, 12.5], [37.5, 20], [20, 37.5]], "polygonlabels": ["dog"]}, "id": "p"}
    plain = {"type": "rectangle", "id": "q", "value": {"x": 0, "y": 0, "width": 50, "height": 50}}
    label = {"type": "labels", "id": "q", "value": {"labels": ["fox"]}}
    brush = {"type": "brushlabels", "id": "s", "value": {"rle": [1, 2], "brushlabels": ["dog"]}}
    turned = region(x=50, y=50, width=25, height=25, rotation=90)  # 16 x 12 pixels turned around (32, 24)
    choice = {"type": "choices", "id": "c", "value": {"choices": ["day"]}}
    result = [turned, polygon, plain, label, brush, choice]
    (tmp_path / "train.json").write_text(json.dumps([task("a.jpg", result), task("b.jpg", [])]))
    annotations = load_annotations(tmp_path, "all")
    assert objects(annotations) == {
        "a.jpg": [("cat", [20.0, 24.0, 32.0, 40.0]), ("dog", BOX), ("fox", [0.0, 0.0, 32.0, 24.0])],
        "b.jpg": [],
    }
    assert kinds(annotations) == {"missing-box": "dropped"}


def test_label_studio_drawn_twice(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "a.jpg")
    twice = task("a.jpg", [region()], [region("dog")])
    (tmp_path / "all.json").write_text(json.dumps([twice]))
    assert kinds(load_annotations(tmp_path, "all"))["several-annotations"] == "refused"
    twice["annotations"][1]["ground_truth"] = True
    (tmp_path / "all.json").write_text(json.dumps([twice]))
    assert objects(load_annotations(tmp_path, "all")) == {"a.jpg": [("dog", BOX)]}
    turned = region() | {"image_rotation": 90}
    (tmp_path / "all.json").write_text(json.dumps([task("a.jpg", [turned])]))
    assert kinds(load_annotations(tmp_path, "all"))["image-turned"] == "refused"


def test_label_studio_tasks_that_nobody_has_labelled(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Skipped, untouched, or predicted by a model: none is background."""
    for name in "abcd":
        write_image(tmp_path / f"{name}.jpg")
    skipped = task("b.jpg", [])
    skipped["annotations"][0]["was_cancelled"] = True
    tasks = [task("a.jpg", [region()]), skipped, task("c.jpg"), task("d.jpg", predictions=[{"result": [region()]}])]
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    annotations = load_annotations(tmp_path, "all")
    assert objects(annotations) == {"a.jpg": [("cat", BOX)]}
    left_out = [finding for finding in annotations.findings if finding.kind == "not-annotated"]
    assert [finding.action for finding in left_out] == ["dropped"] * 3
    assert annotations.num_images_left_out == 3
    assert "predictions" in left_out[2].message
    (tmp_path / "all.json").write_text(json.dumps([*tasks, *(task(f"{i}.jpg") for i in range(9))]))
    for i in range(9):
        write_image(tmp_path / f"{i}.jpg")
    annotations = load_annotations(tmp_path, "all")
    assert (annotations.num_images_left_out, kinds(annotations)) == (12, {"not-annotated": "dropped"})  # still at work


def test_a_label_studio_ellipse(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    write_image(tmp_path / "a.jpg")
    value = {"x": 50, "y": 50, "radiusX": 12.5, "radiusY": 25, "ellipselabels": ["cat"]}  # 8 and 12 pixels at (32, 24)
    sizes = {"original_width": 64, "original_height": 48}
    (tmp_path / "all.json").write_text(
        json.dumps([task("a.jpg", [sizes | {"value": value | {"rotation": angle}} for angle in (0, 90)])])
    )
    assert objects(load_annotations(tmp_path, "all"))["a.jpg"] == [
        ("cat", [24.0, 12.0, 40.0, 36.0]),
        ("cat", [20.0, 16.0, 44.0, 32.0]),
    ]


@pytest.mark.parametrize(
    "value", [None, 3, "x", [], {}, {"x": "a", "y": None}, {"points": 4}, {"points": [[1], 2, "z"]}]
)
def test_label_studio_of_anything(tmp_path: Path, write_image: Callable[..., Path], value: Any) -> None:
    write_image(tmp_path / "a.jpg")
    odd = {"value": value if not isinstance(value, dict) else value | {"rectanglelabels": ["cat"]}}
    tasks = [task("a.jpg", [odd, value, region(rotation=value)]), task("http://[a.jpg", [region()])]
    tasks += [{"data": value, "annotations": value, "labels": value}, {"annotations": [{"result": value}], "data": {}}]
    (tmp_path / "all.json").write_text(json.dumps(tasks))
    load_annotations(tmp_path, "all", format="label_studio")


# ---- Create ML -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["path", "imageURL"])
def test_create_ml_of_other_tools(tmp_path: Path, write_image: Callable[..., Path], key: str) -> None:
    """Of Turi Create: an image's path under another key, and its only object without a list."""
    write_image(tmp_path / "images" / "a.jpg")
    obj = {"label": "cat", "coordinates": {"x": 14, "y": 12, "width": 20, "height": 12}}
    (tmp_path / "all.json").write_text(json.dumps([{key: "images/a.jpg", "annotations": obj}, {key: 3}]))
    annotations = load_annotations(tmp_path, "all")
    assert objects(annotations) == {"a.jpg": [("cat", BOX)]}
    (finding,) = annotations.findings
    assert (finding.kind, finding.action) == ("image-entry", "dropped")
    assert "int and NoneType" in finding.message


def test_create_ml(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    box = {"x": 14, "y": 12, "width": 20, "height": 12}
    for split in ("train", "valid"):
        write_image(tmp_path / split / "a.jpg", seed=len(split))
        entries = [{"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": box}]}]
        (tmp_path / split / "_annotations.createml.json").write_text(json.dumps(entries))
    assert detect_format(tmp_path) == "createml"
    assert default_splits(tmp_path) == ("train", "valid")
    assert objects(load_annotations(tmp_path, "valid")) == {"a.jpg": [("cat", BOX)]}
    odd = [{"annotations": []}, {"image": "a.jpg", "annotations": [3, {"label": None, "coordinates": 4}]}, *entries]
    (tmp_path / "train" / "_annotations.createml.json").write_text(json.dumps(odd))
    assert kinds(load_annotations(tmp_path, "train")) == {"image-entry": "dropped", "missing-name": "dropped"}


# ---- Hugging Face ----------------------------------------------------------------------------------------------------

README = """---
task_categories:
- object-detection
dataset_info:
  features:
  - name: image
    dtype: image
  - name: objects
    sequence:
    - name: category
      dtype:
        class_label:
          names:
            '0': dog
            '1': cat
---
# The set
"""


@pytest.mark.parametrize(
    ("found", "description", "name"),
    [
        ({"bbox": [[4, 6, 20, 12]], "categories": ["cat"]}, {}, "cat"),
        ({"bbox": [[4, 6, 20, 12]], "category": [1]}, {"README.md": README}, "cat"),
        (
            {"id": [1], "area": [240], "bbox": [[4, 6, 20, 12]], "category": [1]},
            {
                "dataset_infos.json": '{"d": {"features": {"objects": {"feature": {"category": '
                '{"names": ["dog", "cat"], "_type": "ClassLabel"}}}}}}'
            },
            "cat",
        ),
        ([{"bbox": [4, 6, 20, 12], "label": 1}], {}, "class_1"),
    ],
)
@pytest.mark.parametrize("place", ["train/metadata.jsonl", "data/train/metadata.jsonl", "metadata.jsonl"])
def test_hugging_face(
    tmp_path: Path,
    write_image: Callable[..., Path],
    found: Any,
    description: dict[str, str],
    name: str,
    place: str,
) -> None:
    folder = (tmp_path / place).parent
    inner = "" if "train" in place else "train/"
    write_image(folder / f"{inner}0001.png")
    write_image(folder / f"{inner}0002.png", seed=1)
    lines = [{"file_name": f"{inner}0001.png", "objects": found}]
    lines.append({"file_name": f"{inner}0002.png", "objects": {"bbox": [], "categories": []}})
    (tmp_path / place).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for file, text in description.items():
        (tmp_path / file).write_text(text)
    assert detect_format(tmp_path) == "huggingface"
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations) == {"0001.png": [(name, BOX)], "0002.png": []}
    assert kinds(annotations) == ({"unnamed-classes": "note"} if name == "class_1" else {})


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("metadata_v2.jsonl", ['{"file_name": "a.jpg", "objects": {"bbox": [[4, 6, 20, 12]], "categories": ["cat"]}}']),
        ("metadata.jsonl", ['{"image": "a.jpg", "objects": [{"bbox": [4, 6, 20, 12], "label": "cat"}]}']),
        ("metadata.jsonl", ['{"file_name": "a.jpg", "bbox": [4, 6, 20, 12], "label": "cat"}']),
        (
            "metadata.jsonl",
            [
                '{"file_name": "a.jpg", "objects": '
                '[{"box": {"xmin": 4, "ymin": 6, "xmax": 24, "ymax": 18}, "label": "cat"}]}'
            ],
        ),
        (
            "metadata.jsonl",
            [
                '{"file_name": "b.jpg"}',
                '{"file_name": "c.jpg", "objects": null}',
                '{"file_name": "a.jpg", "objects": {"bbox": [[4, 6, 20, 12]], "categories": ["cat"]}}',
            ],
        ),
        (
            "metadata.csv",
            ["file_name,objects", "a.jpg,\"{'bbox': [(4, 6, 20, 12.0)], 'category': ['cat'], 'id': [None]}\""],
        ),
    ],
)
def test_hugging_face_as_found(tmp_path: Path, write_image: Callable[..., Path], name: str, lines: list[str]) -> None:
    """Other names of the file and of its keys, first images without objects, what pandas writes into a table."""
    for image in "abc":
        write_image(tmp_path / "train" / f"{image}.jpg")
    (tmp_path / "train" / name).write_text("\n".join(lines) + "\n")
    assert detect_format(tmp_path) == "huggingface"
    annotations = load_annotations(tmp_path, "train")
    assert objects(annotations)["a.jpg"] == [("cat", BOX)]
    assert set(kinds(annotations)) <= {"unlisted-images"}


def test_hugging_face_without_classes(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    """Lists of several splits beside each other, whose objects are all of one class."""
    for split in ("train", "val"):
        write_image(tmp_path / "images" / f"{split}.jpg")
        line = {"file_name": f"images/{split}.jpg", "objects": {"bbox": [[4, 6, 20, 12]]}}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(line))
    assert default_splits(tmp_path) == ("train", "val")
    annotations = load_annotations(tmp_path, "val")
    assert objects(annotations) == {"val.jpg": [("object", BOX)]}
    assert kinds(annotations)["missing-classes"] == "repaired"


def test_hugging_face_table(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    for split in ("train", "test"):
        write_image(tmp_path / split / "a.jpg", seed=len(split))
        (tmp_path / split / "metadata.csv").write_text(
            'file_name,objects\na.jpg,"{""bbox"": [[4, 6, 20, 12]], ""categories"": [""cat""]}"\n'
        )
    assert default_splits(tmp_path) == ("train", "test")
    assert objects(load_annotations(tmp_path, "test")) == {"a.jpg": [("cat", BOX)]}


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ('{"file_name": "./a.jpg", "objects": [{"bbox": [1, 2, 3, 4]}]}', "missing-name"),
        ('{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "categories": []}}', "boxes-without-classes"),
        ('{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3]], "categories": ["cat"]}}', "nan-box"),
        ('{"file_name": "a.jpg", "objects": {"bbox": 3, "categories": null}}', None),
        ('{"file_name": "a.jpg", "objects": [[1, 2], null, {"bbox": {}, "label": {"a": [1e999]}}]}', "nan-box"),
        ('{"file_name": 7}', "image-entry"),
        ("[]", "image-entry"),
    ],
)
def test_hugging_face_of_anything(
    tmp_path: Path, write_image: Callable[..., Path], line: str, kind: str | None
) -> None:
    write_image(tmp_path / "a.jpg")
    first = '{"file_name": "a.jpg", "objects": {"bbox": [[1, 2, 3, 4]], "categories": ["cat"]}}'
    (tmp_path / "metadata.jsonl").write_text(f"{first}\n{line}\n")
    found = kinds(load_annotations(tmp_path, "all"))
    assert kind is None or kind in found
    (tmp_path / "metadata.jsonl").write_text(first + "\n{")
    with pytest.raises(InputError, match="metadata.jsonl, line 2, is broken JSON"):
        load_annotations(tmp_path, "all")


# ---- JSON files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig", "cp1252"])
def test_encodings_of_json(tmp_path: Path, write_image: Callable[..., Path], encoding: str) -> None:
    write_image(tmp_path / "a.jpg")
    text = json.dumps([task("a.jpg", [region("Bär")])], ensure_ascii=False)
    (tmp_path / "export.json").write_text(text, encoding=encoding)
    annotations = load_annotations(tmp_path, "all")
    assert [category.name for category in annotations.categories] == ["Bär"]
    assert kinds(annotations) == ({"encoding": "repaired"} if encoding == "cp1252" else {})


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (["train/export.json", "val/export.json"], ["train", "val"]),
        (["custom_train.json", "custom_val.json"], ["train", "val"]),
        (["annotations/project.json"], ["all"]),
        (["x/train.json", "x/val.json"], ["train", "val"]),
    ],
)
def test_splits_of_json_files(
    tmp_path: Path, write_image: Callable[..., Path], files: list[str], splits: list[str]
) -> None:
    write_image(tmp_path / "images" / "a.jpg")
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(json.dumps([task("a.jpg", [region()])]))
    assert sorted(available_splits(tmp_path)) == splits

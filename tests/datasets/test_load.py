import json
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
from dataset_parts import voc_object, voc_xml

from ddetr.datasets import audit, available_splits, default_splits, detect_format, image_files, load_annotations
from ddetr.datasets.annotations import MAX_PLACES, FindingLog, ImageRecord, ImageTable
from ddetr.datasets.config import DataSource, TrainingSource
from ddetr.datasets.load import _TRAIN_NAMES, _VAL_NAMES, FORMATS, _first
from ddetr.datasets.readers.yolo import layout
from ddetr.datasets.splits import load_split, load_splits
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


def test_a_split_that_is_named_is_not_ambiguous(make_coco):
    root = make_coco()
    for split in ("val", "Val"):
        make_coco(split=split)
    with pytest.raises(InputError, match="splits Val, val, which differ in capitals alone"):
        default_splits(root)
    assert default_splits(root, val_split="Val") == ("train", "Val")
    assert load_split(DataSource(path=str(root), val_split="val"), "val").name.endswith("/val")
    _, val = load_splits(TrainingSource(path=str(root), val_split="Val"))
    assert val.name.endswith("/Val")


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
    with image_files.reading_shown(lambda done, total, _: seen.append((done, total))):
        load_annotations(root, "train")
    assert seen == [(2, 5), (4, 5), (5, 5)]
    load_annotations(root, "train")
    assert len(seen) == 3


@pytest.mark.parametrize("format", ["voc", "yolo", "kitti", "labelme"])
def test_who_listens_hears_how_many_label_files_are_read(
    make_voc, make_yolo, write_image, tmp_path, monkeypatch, format
):
    """Of all formats of one file for each image."""
    stems, seen = [str(i) for i in range(5)], []
    if format == "voc":
        root = make_voc({stem: voc_xml([voc_object()]) for stem in stems})
    elif format in ("yolo", "kitti"):
        row = "0 .5 .5 .2 .2" if format == "yolo" else "Car 0 0 0 1 1 9 9 1 1 1 1 1 1 1"
        root = make_yolo({f"images/{stem}.jpg": row for stem in stems})
    else:
        root = tmp_path
        for stem in stems:
            write_image(root / f"{stem}.jpg")
            (root / f"{stem}.json").write_text(json.dumps({"imagePath": f"{stem}.jpg", "shapes": []}))
    assert detect_format(root) == format
    monkeypatch.setattr(image_files, "_LABELS_A_STEP", 2)
    with image_files.reading_shown(lambda *step: seen.append(step)):
        load_annotations(root, available_splits(root)[0])
    assert seen == [(2, 5, "label files"), (4, 5, "label files")]


def test_a_large_folder_is_looked_through_once(tmp_path, write_image, monkeypatch):
    """Flat folders hold label files by the ten thousand; each part of a reading asks for the splits."""
    looked, beside = [], layout._has_labels_beside
    monkeypatch.setattr(layout, "_has_labels_beside", lambda folder: looked.append(folder) or beside(folder))
    for stem in "abcd":
        write_image(tmp_path / f"{stem}.jpg")
        (tmp_path / f"{stem}.txt").write_text("0 .5 .5 .2 .2\n")
    train, val = load_splits(TrainingSource(str(tmp_path), val_fraction=0.25))
    assert (len(train.images), len(val.images), looked) == (3, 1, [tmp_path])
    (tmp_path / "a.txt").unlink()
    write_image(tmp_path / "images" / "e.jpg")
    (tmp_path / "labels").mkdir()
    assert len(load_annotations(tmp_path, "all").images) == 1  # a data set may change between two readings


# ---- images that are not there ---------------------------------------------------------------------------------------


def _lose(root, *, left):
    """All images but a few."""
    for path in sorted(root.rglob("*.jpg"))[left:]:
        path.unlink()


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "yolo list", "labelme", "csv"])
def test_most_images_missing_stop(make_coco, make_voc, make_yolo, write_image, tmp_path, format):
    stems = [f"i{i}" for i in range(8)]
    if format == "coco":
        root = make_coco(num_images=8)
    elif format == "voc":
        root = make_voc({stem: voc_xml([voc_object()]) for stem in stems})
    elif format.startswith("yolo"):
        yaml = f"train: {'train.txt' if format == 'yolo list' else 'images'}\nnames: [a]"
        root = make_yolo({f"images/{stem}.jpg": "0 .5 .5 .2 .2" for stem in stems}, data_yaml=yaml)
        (root / "train.txt").write_text("".join(f"images/{s}.jpg\n" for s in stems))
    else:
        root = tmp_path
        for stem in stems:
            write_image(root / f"{stem}.jpg")
        rows = "".join(f"{s}.jpg,cat,1,2,30,40\n" for s in stems)
        (root / "a.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
        for stem in stems if format == "labelme" else []:
            shape = {"label": "a", "points": [[1, 2], [30, 2], [9, 9]]}
            (root / f"{stem}.json").write_text(json.dumps({"imagePath": f"{stem}.jpg", "shapes": [shape]}))
    splits = available_splits(root)
    _lose(root, left=4)
    assert audit(load_annotations(root, splits[0])).refused == ()  # half: they are dropped
    _lose(root, left=1)
    annotations = load_annotations(root, splits[0])
    (finding,) = audit(annotations).refused
    assert (finding.kind, finding.count) == ("most-images-left-out", annotations.num_images_left_out)
    assert "7 of its 8 images are left out" in finding.message
    assert "--data.allow_incomplete true" in finding.message
    assert audit(load_splits(TrainingSource(str(root), allow_incomplete=True))[0]).refused == ()


def test_most_images_unreadable_stop(make_coco):
    root = make_coco(num_images=8)
    for i in range(2, 9):  # as Git LFS leaves them
        (root / "train" / f"{i}.jpg").write_text("version https://git-lfs.github.com/spec/v1\n")
    assert [f.kind for f in audit(load_annotations(root, "train")).refused] == ["most-images-left-out"]


@pytest.mark.parametrize("format", ["coco", "voc", "yolo", "csv"])
def test_images_of_other_splits_are_not_lost(write_image, tmp_path, format):
    """The annotations of all splits stand in each; where images of several splits have one name, it tells nothing."""
    stems = {"train": [f"i{i}" for i in range(10)], "val": ["v0", "v1"]}
    both = [*stems["train"], *stems["val"]]
    for split, own in stems.items():
        (tmp_path / "labels" / split).mkdir(parents=True)
        for stem in own:
            write_image(
                tmp_path / ("images" if format == "yolo" else "") / split / f"{stem}.jpg", seed=both.index(stem)
            )
        images = [{"id": i, "file_name": f"{stem}.jpg", "width": 64, "height": 48} for i, stem in enumerate(both)]
        content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
        if format == "coco":
            (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(content))
        if format == "csv":
            rows = "".join(f"{stem}.jpg,cat,1,2,30,40\n" for stem in both)
            (tmp_path / split / "_annotations.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
        for stem in both if format == "voc" else []:
            (tmp_path / split / f"{stem}.xml").write_text(voc_xml([voc_object()]))
        for stem in both if format == "yolo" else []:
            (tmp_path / "labels" / split / f"{stem}.txt").write_text("0 .5 .5 .2 .2\n")
    val = load_annotations(tmp_path, "val")
    assert len(val.images) == 2
    assert [finding for finding in val.findings if finding.action == "refused"] == []
    for stem in stems["val"]:
        write_image(tmp_path / ("images" if format == "yolo" else "") / "train" / f"{stem}.jpg")
    val = load_annotations(tmp_path, "val")
    assert "most-images-left-out" in {finding.kind for finding in val.findings}


@pytest.mark.parametrize("prefix", ["", "gone, "])
def test_lost_images_are_known_by_their_names(write_image, tmp_path, prefix):
    """Whatever stands in a name: "gone, i0.jpg" is not the i0.jpg of training, and a list's lines have names too."""
    names = [f"i{i}" for i in range(10)]
    for name in names:
        write_image(tmp_path / "train" / f"{name}.jpg")
    write_image(tmp_path / "val" / "v0.jpg")
    images = [
        {"id": i, "file_name": f"{name}.jpg", "width": 64, "height": 48}
        for i, name in enumerate(["v0", *(prefix + name for name in names)])
    ]
    content = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "val" / "_annotations.coco.json").write_text(json.dumps(content))
    val = load_annotations(tmp_path, "val")
    assert ("most-images-left-out" in {finding.kind for finding in val.findings}) == bool(prefix)


def test_lines_of_a_list_are_known_by_their_names(make_yolo, tmp_path):
    train = {f"images/train/i{i}.jpg": "0 .5 .5 .2 .2" for i in range(10)}
    yaml = "train: images/train\nval: val.txt\nnames: [a]\n"
    make_yolo({**train, "images/val/v0.jpg": "0 .5 .5 .2 .2"}, tmp_path, yaml)
    lines = ["images/val/v0.jpg", *(f"images/val/i{i}.jpg" for i in range(10))]
    (tmp_path / "val.txt").write_text("\n".join(lines))
    assert {finding.kind for finding in load_annotations(tmp_path, "val").findings} == {"missing-image"}


def test_a_few_missing_images_are_dropped(make_coco):
    root = make_coco(num_images=5)
    _lose(root, left=1)
    assert audit(load_annotations(root, "train")).refused == ()


# ---- several data sets in one folder ---------------------------------------------------------------------------------


@pytest.fixture
def make_any(make_yolo, make_voc, make_coco, write_image):
    """A data set of three images in a folder, of a form that has no split or two."""

    def make(form, root):
        stems = ["0", "1", "2"]
        if form == "voc":
            make_voc({stem: voc_xml([voc_object()]) for stem in stems}, {}, root)
        elif form in ("yolo", "yolo with a yaml"):
            yaml = "train: images/train\nval: images/val\nnames: [a]\n" if form != "yolo" else None
            make_yolo(
                {f"images/{s}/{stem}.jpg": "0 .5 .5 .2 .2" for s in ("train", "val") for stem in stems}, root, yaml
            )
        elif form == "coco":
            make_coco(root=root, num_images=3)
        else:
            for stem in stems:
                write_image(root / f"{stem}.jpg")
                if form == "flat voc":
                    (root / f"{stem}.xml").write_text(voc_xml([voc_object()]))
            if form == "csv":
                rows = "".join(f"{stem}.jpg,cat,1,2,30,40\n" for stem in stems)
                (root / "labels.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{rows}")
        return root

    return make


@pytest.mark.parametrize("form", ["flat voc", "voc", "yolo", "yolo with a yaml", "coco", "csv"])
def test_two_data_sets_of_one_format_in_one_folder(make_any, tmp_path, form):
    for name in ("cells", "plants"):
        make_any(form, tmp_path / name)
    if form == "flat voc":  # folders of one class each are published so
        train, _ = load_splits(TrainingSource(str(tmp_path)))
        report = audit(train)
        assert (len(train.images), report.refused) == (6, ())
        assert "2 folders of it were read as one data set: cells, plants. If they don't" in report.render().caption
    else:
        with pytest.raises(InputError, match=r"cells, .*plants.*(name one|give one|give the path of one)"):
            load_splits(TrainingSource(str(tmp_path)))
    alone, _ = load_splits(TrainingSource(str(tmp_path / "cells")))
    assert len(alone.images) == 3
    assert not [f for f in alone.findings if f.kind == "read-together"]


@pytest.mark.parametrize("forms", [("voc", "csv"), ("voc", "yolo with a yaml"), ("flat voc", "voc"), ("coco", "yolo")])
@pytest.mark.parametrize("around", [".", "download"])
def test_data_sets_of_several_formats_in_one_folder(make_any, tmp_path, forms, around):
    root = tmp_path / around
    for name, form in zip(("cells", "plants"), forms, strict=True):
        make_any(form, root / name)
    listed = rf"{root}/cells \(.*\), {root}/plants \(.*\)\. Give|{root}/cells, {root}/plants: give"
    with pytest.raises(InputError, match=listed):
        detect_format(tmp_path)
    if forms == ("voc", "csv"):
        with pytest.raises(InputError, match=r"--data\.format voc \(format\) reads cells alone"):
            load_splits(TrainingSource(str(tmp_path)))
        assert len(load_splits(TrainingSource(str(tmp_path), format="voc"))[0].images) == 3


def test_what_belongs_together_is_no_second_data_set(make_any, make_yolo, tmp_path, write_image):
    """A YAML around them says what is read; folders that lack images or annotations are parts."""
    for name in ("cells", "plants"):
        make_any("yolo", tmp_path / name)
    (tmp_path / "data.yaml").write_text(
        "train: [cells/images, plants/images/train]\nval: plants/images/val\nnames: [a]"
    )
    assert default_splits(tmp_path) == ("train", "val")
    voc = tmp_path / "devkit" / "VOC2007"
    make_any("voc", voc)
    for folder in ("pictures", "masks"):
        write_image(tmp_path / "devkit" / folder / "a.png")
    make_any("csv", tmp_path / "devkit" / "test")  # called as a split
    train, _ = load_splits(TrainingSource(str(tmp_path / "devkit")))
    assert len(train.images) == 3


BOXES = ((4, 6, 24, 18), (10, 12, 40, 42), (8, 8, 16, 16))


def labels_of(format: str, box: tuple[int, ...]) -> dict[str, str]:
    """The files, by their names, that give an image a.png of 64 x 48 pixels beside them the box."""
    x1, y1, x2, y2 = box
    wide, high = x2 - x1, y2 - y1
    centre = {"x": (x1 + x2) / 2, "y": (y1 + y2) / 2, "width": wide, "height": high}
    entry = {"image": "a.png", "annotations": [{"label": "cat", "coordinates": centre}]}
    coco = {
        "images": [{"id": 1, "file_name": "a.png", "width": 64, "height": 48}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, wide, high], "area": wide * high}],
        "categories": [{"id": 1, "name": "cat"}],
    }
    shape = {"label": "cat", "points": [[x1, y1], [x2, y2]], "shape_type": "rectangle"}
    cvat = f'<box label="cat" xtl="{x1}" ytl="{y1}" xbr="{x2}" ybr="{y2}" occluded="0"/>'
    row = f"0 {centre['x'] / 64} {centre['y'] / 48} {wide / 64} {high / 48}"
    kitti = f"cat 0 0 0 {x1} {y1} {x2} {y2} 1 1 1 0 0 0 0"
    task = {
        "data": {"image": "a.png"},
        "annotations": [
            {
                "result": [
                    {
                        "type": "rectanglelabels",
                        "original_width": 64,
                        "original_height": 48,
                        "value": {
                            "x": x1 / 0.64, "y": y1 / 0.48, "width": wide / 0.64, "height": high / 0.48,
                            "rectanglelabels": ["cat"],
                        },
                    }
                ]
            }
        ],
    }  # fmt: skip
    return {
        "voc": {"a.xml": voc_xml([voc_object("cat", box)])},
        "annotations of voc": {"Annotations/a.xml": voc_xml([voc_object("cat", box)])},
        "yolo": {"a.txt": row},
        "images of yolo": {"labels/a.txt": row},
        "kitti": {"label_2/a.txt": kitti},
        "createml": {"_annotations.createml.json": json.dumps([entry])},
        "coco": {"annotations.json": json.dumps(coco)},
        "roboflow of coco": {"_annotations.coco.json": json.dumps(coco)},
        "labelme": {"a.json": json.dumps({"imagePath": "a.png", "shapes": [shape]})},
        "csv": {"_annotations.csv": f"filename,class,xmin,ymin,xmax,ymax\na.png,cat,{x1},{y1},{x2},{y2}\n"},
        "label_studio": {"tasks.json": json.dumps([task])},
        "cvat": {
            "annotations.xml": f'<annotations><image name="a.png" width="64" height="48">{cvat}</image></annotations>'
        },
    }[format]


FOLDERED = [
    *("voc", "annotations of voc", "yolo", "images of yolo", "kitti", "createml", "coco", "roboflow of coco"),
    *("labelme", "csv", "label_studio", "cvat"),
]


@pytest.fixture
def write_labelled(tmp_path, write_image):
    def write(place, format, box):
        write_image(tmp_path / place / ("images/a.png" if format == "images of yolo" else "a.png"), seed=box[0])
        for name, text in labels_of(format, box).items():
            file = tmp_path / place / name
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)

    return write


@pytest.mark.parametrize("places", [("train/0", "train/1", "val"), ("data/train/0", "data/train/1/x", "data/valid/2")])
@pytest.mark.parametrize("format", FOLDERED)
def test_folders_within_the_folder_of_a_split(tmp_path, write_labelled, format, places):
    for place, box in zip(places, BOXES, strict=True):
        write_labelled(place, format, box)
    train, val = load_splits(TrainingSource(path=str(tmp_path)))
    assert train.format == val.format == format.rpartition(" ")[2]
    for place, box in zip(places[:2], BOXES):
        (record,) = (record for record in train.images if record.path.is_relative_to(tmp_path / place))
        np.testing.assert_allclose(record.boxes_xyxy, [box], atol=1e-3)
    assert (len(train.images), len(val.images)) == (2, 1)
    assert {finding.action for finding in (*train.findings, *val.findings)} <= {"note", "repaired"}


@pytest.mark.parametrize("format", FOLDERED)
def test_other_splits_within_the_folder_of_a_split(tmp_path, write_labelled, format):
    """A data set of its own is in it: its validation images are never trained on."""
    for place in ("train/train", "train/val", "test"):
        write_labelled(place, format, BOXES[0])
    with suppress(InputError):
        assert default_splits(tmp_path)[0] == "train"
        assert len(load_annotations(tmp_path, "train").images) == 1


def test_data_sets_with_lists_of_their_own_in_the_folders_of_splits(tmp_path, make_voc):
    xml = voc_xml([voc_object()])
    make_voc({"a": xml, "b": xml}, {"train": "a", "val": "b"}, tmp_path / "train" / "VOC2007")
    make_voc({"c": xml}, {"test": "c"}, tmp_path / "test" / "VOC2007")
    with pytest.raises(InputError, match="holds several Pascal VOC data sets"):
        load_splits(TrainingSource(path=str(tmp_path)))


def write_in_two_formats(tmp_path, make_voc, write_image, val="b", box=(5, 6, 25, 16), name="cat", seed=0):
    """voc/ with a in train and b in val, coco/ with the image `val` in val, whose objects are the others."""
    xml = voc_xml([voc_object()])
    make_voc({"a": xml, "b": xml}, {"train": "a", "val": "b"}, tmp_path / "voc")
    for split, image in (("train", "a" if val == "b" else "b"), ("val", val)):
        x1, y1, x2, y2 = box
        content = {
            "images": [{"id": 1, "file_name": f"{image}.jpg", "width": 64, "height": 48}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "area": 9}],
            "categories": [{"id": 1, "name": name}],
        }
        write_image(tmp_path / "coco" / split / f"{image}.jpg", seed=seed + "ab".index(image))
        file = tmp_path / "coco" / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))


@pytest.mark.parametrize("format", ["auto", "voc"])
def test_one_data_set_in_two_formats(tmp_path, make_voc, write_image, format):
    write_in_two_formats(tmp_path, make_voc, write_image, box=(4, 5.2, 25, 16), name="Cat")
    train, val = load_splits(TrainingSource(path=str(tmp_path), format=format))
    assert [record.path.name for record in (*train.images, *val.images)] == ["a.jpg", "b.jpg"]
    said = [finding.message for finding in train.findings if finding.kind == "other-annotations"]
    assert len(said) == (format == "auto")
    assert all("coco has the same images, splits and objects (COCO); voc/train (voc) was read" in one for one in said)


@pytest.mark.parametrize(
    ("differing", "said"),
    [
        ({"val": "a"}, "split images of the same names in different ways"),
        ({"box": (15, 6, 25, 16)}, "different objects in images of the same names, such as a.jpg"),
        ({"name": "dog"}, "different names of classes in images of the same names, such as a.jpg"),
        ({"seed": 5}, "different images of the same names, such as a.jpg"),
    ],
)
def test_two_formats_that_do_not_say_the_same(tmp_path, make_voc, write_image, differing, said):
    write_in_two_formats(tmp_path, make_voc, write_image, **differing)
    with pytest.raises(InputError, match=rf"{said}: .*coco \(COCO\), .*voc \(Pascal VOC\). Give the path of one"):
        load_splits(TrainingSource(path=str(tmp_path)))


def test_the_format_that_is_named_is_read_with_its_own_splits(make_yolo, make_coco, tmp_path):
    """And not all that lies in its folder as one split, validation images among them."""
    make_coco(root=tmp_path / "coco")
    make_yolo({f"images/{split}/{split}.jpg": "0 .5 .5 .2 .2" for split in ("train", "val")}, root=tmp_path / "yolo")
    train, val = load_splits(TrainingSource(path=str(tmp_path), format="yolo"))
    assert [record.path.name for record in (*train.images, *val.images)] == ["train.jpg", "val.jpg"]


# ---- images in no list -----------------------------------------------------------------------------------------------


def in_no_list(annotations):
    return [(f.count, f.message.partition(" such as ")[2]) for f in annotations.findings if f.kind == "in-no-list"]


def test_labelled_images_in_no_list_of_voc(make_voc, write_image):
    root = make_voc({stem: voc_xml([voc_object()]) for stem in "abcdef"}, {"train": "a\nb", "val": "c"})
    (root / "Annotations" / "gone.xml").write_text(voc_xml([voc_object()]))  # without an image
    write_image(root / "JPEGImages" / "unlabelled.jpg")
    train, val = load_splits(TrainingSource(path=str(root)))
    assert (in_no_list(train), in_no_list(val)) == ([(3, "d, e, f.")], [])
    (root / "ImageSets" / "Main" / "test.txt").write_text("d\ne\nf\n")
    assert in_no_list(load_splits(TrainingSource(path=str(root)))[0]) == []


@pytest.mark.parametrize("yaml", [None, "train: train.txt\nval: val.txt\nnames: [cat]\n"])
def test_labelled_images_in_no_list_of_yolo(make_yolo, yaml):
    row = "0 .5 .5 .2 .2"
    labels = {f"images/{stem}.jpg": row for stem in "abcdef"} | {"images/g.jpg": None, "images/h.jpg": ""}
    root = make_yolo(labels, data_yaml=yaml)
    (root / "train.txt").write_text("images/a.jpg\n./images/b.jpg\n")
    (root / "val.txt").write_text(f"{root}/images/c.jpg\n")
    train, val = load_splits(TrainingSource(path=str(root)))
    assert (in_no_list(train), in_no_list(val)) == ([(3, "d.jpg, e.jpg, f.jpg.")], [])
    (root / "val.txt").write_text("".join(f"images/{stem}.jpg\n" for stem in "cdef"))
    assert in_no_list(load_splits(TrainingSource(path=str(root)))[0]) == []


# ---- what lies beside a test split alone -----------------------------------------------------------------------------


def said_of_train(root):
    with pytest.raises(InputError, match="none is called train") as caught:
        load_splits(TrainingSource(path=str(root)))
    return str(caught.value).partition("names the one to train on")[2]


def test_lists_of_keras_beside_a_test_split(make_yolo, write_image):
    root = make_yolo({"test/images/t.jpg": "0 .5 .5 .2 .2"})
    for split in ("train", "valid"):
        write_image(root / split / "a.jpg")
        (root / split / "_annotations.txt").write_text("a.jpg 5,6,25,16,0 30,20,40,44,1\n")
    said = said_of_train(root)
    assert f"{root}/train is no data set that is read; it holds a list with images and boxes in each line" in said
    assert "(_annotations.txt)" in said


def test_darknets_stale_lists_beside_a_test_split(make_coco, tmp_path, write_image):
    root = make_coco(split="test")
    for i in range(2):
        write_image(root / f"obj/{i}.jpg")
        (root / f"obj/{i}.txt").write_text("0 .5 .5 .2 .2\n")
    for home in (root, root / "darknet"):
        home.mkdir(exist_ok=True)
        (home / "obj.data").write_text("classes=1\ntrain=train.txt\nvalid=valid.txt\nnames=obj.names\n")
        (home / "obj.names").write_text("cat\n")
        for name in ("train.txt", "valid.txt"):
            (home / name).write_text("/content/darknet/data/gone/1.jpg\n")
    said = said_of_train(root)
    assert "YOLO annotations lie there too (train, val): --data.format yolo reads them" in said
    assert f"{root}/darknet is a data set of its own (YOLO): its path reads it" in said
    assert "test is" not in said
    train, _ = load_splits(TrainingSource(path=str(root), format="yolo"))
    assert "every-image-missing" in {finding.kind for finding in train.findings}

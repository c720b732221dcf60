"""VGG Image Annotator's projects and exports, of versions 1 and 2."""

import json
import math

import numpy as np
import pytest

from ddetr.datasets import available_splits, detect_format, load_annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.splits import load_splits
from ddetr.errors import InputError

RECT = {"name": "rect", "x": 4, "y": 6, "width": 20, "height": 12}
BOX = [4.0, 6.0, 24.0, 18.0]


def region(shape=RECT, **attributes):
    return {"shape_attributes": shape, "region_attributes": attributes}


def entries(images, as_dict=False):
    """name -> regions: as VIA exports it; regions numbered, as it did at first."""
    return {
        f"{name}{size}": {
            "filename": name,
            "size": size,
            "regions": {str(i): one for i, one in enumerate(regions)} if as_dict else regions,
            "file_attributes": {},
        }
        for size, (name, regions) in enumerate(images.items(), 100)
    }


def project(images, **attributes):
    return {
        "_via_settings": {"ui": {}, "core": {"filepath": {}, "default_filepath": ""}},
        "_via_img_metadata": entries(images),
        "_via_attributes": {"region": attributes, "file": {}},
        "_via_data_format_version": "2.0.10",
        "_via_image_id_list": [],
    }


@pytest.fixture
def via(tmp_path, write_image):
    """Writes a file and the images a.jpg, b.jpg beside it; reads it."""

    def write(content, file="via_region_data.json", names=("a.jpg", "b.jpg")):
        place = tmp_path / file
        for seed, name in enumerate(names):
            write_image(place.parent / name, seed=seed)
        place.write_text(content if isinstance(content, str) else json.dumps(content))
        assert detect_format(tmp_path) == "via"
        return load_annotations(tmp_path, available_splits(tmp_path)[0])

    return write


def found(annotations):
    return {
        record.path.name: [
            (annotations.categories[label].name, np.round(box, 3).tolist())
            for label, box in zip(record.labels, record.boxes_xyxy.astype(float))
        ]
        for record in annotations.images
    }


CSV = "filename,file_size,file_attributes,region_count,region_id,region_shape_attributes,region_attributes\n"
SHAPE_CELL = json.dumps(RECT).replace('"', '""')


@pytest.mark.parametrize(
    "content",
    [
        entries({"a.jpg": [region(kind="cat")], "b.jpg": []}),
        entries({"a.jpg": [region(kind="cat")], "b.jpg": []}, as_dict=True),
        project({"a.jpg": [region(kind="cat")], "b.jpg": []}, kind={"type": "text"}),
        project({"images\\a.jpg": [region(kind={"cat": True, "dog": False})], "http://h/b.jpg": []}),
        project(
            {"a.jpg": [region(kind="1")], "b.jpg": []}, kind={"type": "radio", "options": {"1": "cat", "2": "dog"}}
        ),
        project({"a.jpg": [region(id="7", Class="cat"), region(id="8", Class="cat")][:1], "b.jpg": []}),
        CSV + f'a.jpg,100,"{{}}",1,0,"{SHAPE_CELL}","{{""kind"":""cat""}}"\nb.jpg,101,"{{}}",0,0,"{{}}","{{}}"\n',
        "#" + CSV + f'a.jpg,100,"{{}}",1,0,"{SHAPE_CELL}","{{""kind"":""cat""}}"\nb.jpg,101,"{{}}",0,0,"{{}}","{{}}"\n',
    ],
)
def test_projects_and_exports(via, kinds, content):
    file = "via_export_csv.csv" if isinstance(content, str) else "via_project.json"
    annotations = via(content, file)
    assert found(annotations) == {"a.jpg": [("cat", BOX)], "b.jpg": []}
    assert kinds(annotations).pop("images-without-regions") == "note"
    assert set(kinds(annotations).values()) <= {"note", "repaired"}


@pytest.mark.parametrize(
    ("shape", "box"),
    [
        ({"name": "polygon", "all_points_x": [4, 24, 24, 10], "all_points_y": [6, 6, 18, 12]}, BOX),
        ({"name": "polyline", "all_points_x": [4, 24, 10], "all_points_y": [6, 6, 18]}, BOX),
        ({"name": "circle", "cx": 20, "cy": 15, "r": 5.5}, [14.5, 9.5, 25.5, 20.5]),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 10, "ry": 4, "theta": 0}, [10, 11, 30, 19]),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 10, "ry": 4}, [10, 11, 30, 19]),
        ({"name": "ellipse", "cx": 20, "cy": 15, "rx": 10, "ry": 4, "theta": math.pi / 2}, [16, 5, 24, 25]),
        ({"name": "rect", "x": 24, "y": 18, "width": -20, "height": -12}, BOX),
    ],
)
def test_shapes(via, shape, box):
    (objects,) = found(via(entries({"a.jpg": [region(shape)]}), names=["a.jpg"])).values()
    assert objects == [("object", [float(value) for value in box])]


@pytest.mark.parametrize(
    "shape",
    [
        {"name": "point", "cx": 20, "cy": 15},
        {"name": "polyline", "all_points_x": [4, 24], "all_points_y": [6, 18]},
        {"name": "polygon", "all_points_x": [4, 24, 24], "all_points_y": "6, 6, 18"},
        {"name": "circle", "cx": 20, "cy": 15, "r": "wide"},
        {"name": "polygon", "all_points_x": [4, None, 24], "all_points_y": [6, 6, 18]},
        {"name": ["rect"]},
        {},
    ],
)
def test_shapes_without_a_box(via, shape):
    annotations = via(entries({"a.jpg": [region(shape, kind="cat"), region(kind="cat")]}))
    assert found(annotations) == {"a.jpg": [("cat", BOX)]}
    (said,) = (finding for finding in annotations.findings if finding.action != "note")
    assert said.action == ("refused" if said.kind == "nan-box" else "dropped")
    assert "a.jpg, region 1" in said.where


@pytest.mark.parametrize(
    ("attributes", "classes", "action"),
    [
        ({"name": "cat", "id": "7"}, ["cat"], "note"),
        ({"Label": "cat", "name": "Tom"}, ["cat"], "note"),
        ({"region_class": "cat", "name": "Tom"}, ["cat"], "note"),
        ({"id": "7", "kind": "cat", "truncated": ""}, None, "refused"),
        ({"name": "cat", "type": "tame"}, None, "refused"),
        ({"kind": "cat", "truncated": " "}, ["cat"], None),
    ],
)
def test_which_attribute_is_the_class(via, attributes, classes, action):
    annotations = via(entries({"a.jpg": [region(**attributes)]}))
    said = [f for f in annotations.findings if f.kind == "class-attribute"]
    assert [f.action for f in said] == ([action] if action else [])
    if classes is None:
        assert all(name in said[0].message for name, value in attributes.items() if value)
        assert "call it `class`" in said[0].message
    else:
        assert [category.name for category in annotations.categories] == classes


def test_several_ticked_boxes_and_regions_without_class(via, kinds):
    ticked = {"dog": True, "cat": True, "tame": False}
    annotations = via(entries({"a.jpg": [region(kind=ticked), region()]}), names=["a.jpg"])
    assert found(annotations) == {"a.jpg": [("dog", BOX)]}
    assert kinds(annotations) == {"several-labels": "repaired", "missing-name": "dropped"}


def test_a_file_for_each_split(tmp_path, write_image, via):
    via(entries({"a.jpg": [region(kind="cat")]}), "train/via_region_data.json", ["a.jpg"])
    via(entries({"c.jpg": [region(kind="cat")]}), "val/via_region_data.json", ["c.jpg", "d.jpg"])
    train, val = load_splits(TrainingSource(path=str(tmp_path)))
    assert found(train) | found(val) == {"a.jpg": [("cat", BOX)], "c.jpg": [("cat", BOX)]}
    assert [(f.kind, f.count) for f in val.findings] == [("unlisted-images", 1)]
    one = TrainingSource(path=str(tmp_path / "train"), train_annotations="via_region_data.json", val_fraction=None)
    assert found(load_splits(one)[0]) == {"a.jpg": [("cat", BOX)]}


def test_two_entries_of_one_name(via, kinds):
    content = entries({"a.jpg": [region(kind="cat")]})
    content["a.jpg7"] = content["a.jpg100"] | {"size": 7}
    assert set(kinds(via(content))) == {"unlisted-images"}
    content["a.jpg7"]["regions"] = []
    assert found(via(content)) == {"a.jpg": [("cat", BOX)]}
    content["a.jpg7"]["regions"] = [region(RECT | {"x": 30}, kind="cat")]
    assert kinds(via(content))["ambiguous-image"] == "refused"


def test_broken_entries(via, kinds):
    content = entries({"a.jpg": [region(kind="cat"), 7, {"region_attributes": {}}]})
    content |= {"x": 3, "y": {"filename": "b.jpg"}, "z": {"filename": 7, "regions": []}}
    annotations = via(content)
    assert found(annotations) == {"a.jpg": [("cat", BOX)]}
    assert [f.count for f in annotations.findings if f.kind == "missing-box"] == [2]
    assert sum(f.kind == "image-entry" for f in annotations.findings) == 3
    with pytest.raises(InputError, match="as JSON|can't be read|broken"):
        via('{"_via_img_metadata": {', "broken.json")


def test_broken_cells_of_a_table(via, kinds):
    rows = f'a.jpg,1,"{{}}",2,0,"{SHAPE_CELL}","{{}}"\na.jpg,1,"{{}}",2,1,"{{","{{}}"\n'
    annotations = via(CSV + rows, "via_export_csv.csv", ["a.jpg"])
    assert found(annotations) == {"a.jpg": [("object", BOX)]}
    assert kinds(annotations)["missing-box"] == "dropped"


def test_an_image_whose_regions_are_broken_is_not_said_to_have_none(via, kinds):
    good = {"a.jpg": [region(kind="cat")]}
    assert kinds(via(entries(good | {"b.jpg": [1]}))) == {"missing-box": "dropped"}
    assert kinds(via(entries(good | {"b.jpg": []}))) == {"images-without-regions": "note"}


def test_broken_cells_are_not_said_to_be_no_regions(via, kinds):
    rows = f'a.jpg,1,"{{}}",1,0,"{SHAPE_CELL}","{{}}"\nb.jpg,1,"{{}}",1,0,"[]","{{}}"\n'
    assert kinds(via(CSV + rows, "via_export_csv.csv"))["missing-box"] == "dropped"
    assert "images-without-regions" not in kinds(via(CSV + rows, "via_export_csv.csv"))


def test_options_without_titles_are_no_names(via):
    annotations = via(project({"a.jpg": [region(kind="0")]}, kind={"options": {"0": None}}))
    assert found(annotations)["a.jpg"] == [("0", BOX)]


def test_a_project_and_its_export_are_one_data_set(via, tmp_path):
    images = {"a.jpg": [region(kind="cat")], "b.jpg": []}
    via(project(images), "via_project.json")
    assert len(via(entries(images), "via_project_json.json").images) == 2
    assert available_splits(tmp_path) == ["all"]
    via(entries(images | {"b.jpg": [region(kind="cat")]}), "via_project_json.json")
    assert available_splits(tmp_path) == ["via_project", "via_project_json"]  # which of them is meant?

import json
import shutil
import warnings

import numpy as np
import pytest
from dataset_parts import coco_object, voc_object, voc_xml
from pycocotools.coco import COCO

from ddetr.datasets import available_splits, build_coco_dataset, default_splits, detect_format, load_annotations
from ddetr.datasets.annotations import Category
from ddetr.datasets.readers.coco.content import read_categories
from ddetr.errors import InputError


def test_gapped_ids_become_contiguous_labels_by_ascending_id(make_coco, kinds):
    annotations = load_annotations(make_coco([coco_object(category_id=7), coco_object(image_id=2)]), "train")
    assert annotations.categories == (Category(3, "cat"), Category(7, "dog"))
    assert [record.labels.tolist() for record in annotations.images] == [[1], [0]]
    assert annotations.format == "coco"
    assert kinds(annotations) == {}
    record = annotations.images[0]
    assert (record.image_id, record.size_hw, record.path.name) == (1, (48, 64), "1.jpg")
    assert record.boxes_xyxy.tolist() == [[4, 5, 24, 15]]
    assert record.boxes_xyxy.dtype == np.float32
    assert record.area.tolist() == [150]
    assert record.ignore.tolist() == [False]


def test_images_without_annotations_are_kept(make_coco):
    annotations = load_annotations(make_coco(num_images=3), "train")
    assert [len(record.labels) for record in annotations.images] == [1, 0, 0]


def test_crowd_boxes_are_ignored_not_dropped(make_coco):
    objects = [coco_object(iscrowd=1, segmentation={"counts": [1], "size": [48, 64]}), coco_object()]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].ignore.tolist() == [True, False]


def test_missing_area_and_iscrowd_are_filled(make_coco, kinds):
    objects = [coco_object(), coco_object()]
    for obj in objects:
        del obj["area"], obj["iscrowd"]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].area.tolist() == [200, 200]
    assert annotations.images[0].ignore.tolist() == [False, False]
    assert kinds(annotations) == {"missing-area": "repaired", "missing-iscrowd": "repaired"}
    assert [finding.count for finding in annotations.findings] == [2, 2]


def test_one_missing_area_is_named(make_coco):
    objects = [coco_object(), coco_object(id=77, area=None), coco_object(id=78, area=0)]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].area.tolist() == [150, 200, 200]
    assert [finding.where for finding in annotations.findings] == [
        "annotations/instances_train.json, annotation id 77 (1.jpg)",
        "annotations/instances_train.json, annotation id 78 (1.jpg)",
    ]


def test_missing_size_is_read_from_the_image(make_coco, kinds):
    def edit(content):
        del content["images"][0]["width"], content["images"][0]["height"]
        content["images"][1]["width"] = None

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert [record.size_hw for record in annotations.images] == [(48, 64), (48, 64)]
    assert kinds(annotations) == {"missing-size": "repaired"}


def test_boxes_are_clipped_and_degenerate_ones_dropped(make_coco):
    objects = [
        coco_object(bbox=(50, 40, 30, 30)),
        coco_object(bbox=(5, 5, 0, 10)),
        coco_object(bbox=(5, 5, 10, -1)),
        coco_object(bbox=(70, 5, 10, 10)),
        coco_object(bbox=(60, 5, 4.6, 10)),
    ]
    annotations = load_annotations(make_coco(objects), "train")
    np.testing.assert_array_equal(annotations.images[0].boxes_xyxy, [[50, 40, 64, 48], [60, 5, 64, 15]])
    found = [(finding.kind, finding.action, finding.where.split()[-2]) for finding in annotations.findings]
    # the last box is out by 0.6 pixels: rounding, clipped without a word
    assert sorted(found) == [
        ("box-clipped", "repaired", "1"),
        ("box-outside-image", "dropped", "4"),
        ("degenerate-box", "dropped", "2"),
        ("degenerate-box", "dropped", "3"),
    ]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), None, "wide", [1]])
def test_boxes_without_numbers_are_refused(make_coco, kinds, bad):
    annotations = load_annotations(make_coco([coco_object(), coco_object(bbox=(1, 2, bad, 4), id=5)]), "train")
    assert kinds(annotations) == {"nan-box": "refused"}
    assert "annotation id 5 (1.jpg)" in annotations.findings[0].where
    assert len(annotations.images[0].labels) == 1


def test_numbers_as_text_are_numbers(make_coco, kinds):
    objects = [coco_object(bbox=("4", "5", "20", "10"), image_id="1", category_id="3", area="150")]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[4, 5, 24, 15]]
    assert kinds(annotations) == {}


def test_a_missing_box_comes_from_the_polygons(make_coco):
    objects = [
        coco_object(bbox=(), segmentation=[[1, 2, 11, 2, 11, 9], [20, 5, 21, 12]]),
        coco_object(bbox=(), segmentation={"counts": [1], "size": [48, 64]}),
        coco_object(bbox=(1, 2, 3)),
    ]
    del objects[1]["bbox"]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[1, 2, 21, 12]]
    assert [(f.kind, f.action) for f in annotations.findings] == [
        ("missing-box", "repaired"),
        ("missing-box", "dropped"),
        ("missing-box", "dropped"),
    ]


def test_unknown_ids_are_dropped_and_named(make_coco):
    objects = [coco_object(category_id=4), coco_object(image_id=99), coco_object(category_id=[3]), coco_object()]
    annotations = load_annotations(make_coco(objects), "train")
    assert sum(len(record.labels) for record in annotations.images) == 1
    assert [(f.kind, f.action, f.where.partition(", ")[2]) for f in annotations.findings] == [
        ("image-unknown", "dropped", "annotation id 2"),
        ("category-unknown", "dropped", "annotation id 1 (1.jpg)"),
        ("category-unknown", "dropped", "annotation id 3 (1.jpg)"),
    ]


def test_many_objects_of_unlisted_categories_stop(make_coco, kinds):
    objects = [coco_object(category_id=7 if i % 2 else 8) for i in range(20)]
    assert kinds(load_annotations(make_coco(objects), "train"))["unnamed-ids"] == "refused"


def test_many_objects_without_a_category_stop(make_coco):
    objects = [{key: value for key, value in coco_object().items() if key != "category_id"} for _ in range(20)]
    annotations = load_annotations(make_coco(objects), "train")
    [refused] = [finding for finding in annotations.findings if finding.action == "refused"]
    assert "20 of 20 objects have no class id" in refused.message


def test_missing_images_are_left_out(make_coco):
    root = make_coco([coco_object(), coco_object(image_id=2), coco_object(image_id=3)], num_images=3)
    (root / "train" / "2.jpg").unlink()
    annotations = load_annotations(root, "train")
    assert [(record.image_id, len(record.labels)) for record in annotations.images] == [(1, 1), (3, 1)]
    assert [(f.kind, f.action) for f in annotations.findings] == [("missing-image", "dropped")]
    assert "2.jpg" in annotations.findings[0].where


def test_every_image_missing_is_one_refusal(make_coco, kinds):
    root = make_coco()
    shutil.rmtree(root / "train")
    annotations = load_annotations(root, "train")
    assert len(annotations.images) == 0
    assert kinds(annotations) == {"every-image-missing": "refused"}
    assert annotations.findings[0].count == 2


def test_unreadable_images_are_left_out(make_coco, kinds):
    root = make_coco()
    (root / "train" / "1.jpg").write_text("no image")
    annotations = load_annotations(root, "train")
    assert [record.image_id for record in annotations.images] == [2]
    assert kinds(annotations) == {"unreadable-image": "dropped"}
    assert len(load_annotations(root, "train", check_images=False).images) == 2


def test_unlisted_images_are_one_note(make_coco, write_image, kinds):
    root = make_coco()
    for name in ("x.jpg", "y.png"):
        write_image(root / "train" / name)
    (root / "train" / "readme.txt").touch()
    annotations = load_annotations(root, "train")
    assert kinds(annotations) == {"unlisted-images": "note"}
    assert annotations.findings[0].count == 2


def test_duplicate_ids(make_coco, kinds):
    def twice(content):
        content["images"].append(dict(content["images"][0]))

    annotations = load_annotations(make_coco([coco_object(id=1), coco_object(id=1)], edit=twice), "train")
    assert len(annotations.images) == 2
    assert len(annotations.images[0].labels) == 2
    assert kinds(annotations) == {"duplicate-image": "repaired", "duplicate-annotation-id": "note"}

    def clash(content):
        content["images"][1]["id"] = 1

    assert kinds(load_annotations(make_coco(edit=clash), "train"))["duplicate-image-id"] == "refused"

    def same_file(content):
        content["images"][1]["file_name"] = "1.jpg"

    assert kinds(load_annotations(make_coco(edit=same_file), "train"))["duplicate-file"] == "note"


def test_ids_that_are_names_are_numbered(make_coco, kinds):
    def edit(content):
        for image, name in zip(content["images"], ("a", "b")):
            image["id"] = name
        content["annotations"][0]["image_id"] = "b"

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert [(record.image_id, len(record.labels)) for record in annotations.images] == [(1, 0), (2, 1)]
    assert kinds(annotations) == {"image-id-not-integer": "repaired"}


def test_categories_missing_or_clashing(make_coco, kinds):
    annotations = load_annotations(make_coco(edit=lambda content: content.pop("categories")), "train")
    assert annotations.categories == (Category(3, "class_3"),)
    assert kinds(annotations) == {"missing-categories": "repaired"}
    clash = [{"id": 3, "name": "cat"}, {"id": 3, "name": "dog"}]
    assert kinds(load_annotations(make_coco(categories=clash), "train")) == {"duplicate-category": "refused"}


def test_validation_labels_are_mapped_on_to_training(make_coco):
    train = load_annotations(make_coco(), "train").categories
    other = [{"id": 1, "name": "dog"}, {"id": 3, "name": "cat"}, {"id": 9, "name": "bird"}]
    objects = [coco_object(category_id=1), coco_object(category_id=3), coco_object(category_id=9)]
    root = make_coco(objects, split="val", categories=other)
    val = load_annotations(root, "val", categories=train)
    assert val.categories == train
    assert val.images[0].labels.tolist() == [1, 0]
    assert {(f.kind, f.action) for f in val.findings} == {
        ("category-id-differs", "repaired"),
        ("category-unknown", "dropped"),
    }


def test_image_turned_by_exif(make_coco, write_image):
    """The json has the size of the stored pixels: the boxes were drawn on them."""
    root = make_coco([coco_object(bbox=(50, 5, 10, 10)), coco_object(image_id=2)])
    write_image(root / "train" / "1.jpg", orientation=6)  # upright: 48 wide, 64 high
    write_image(root / "train" / "2.jpg", orientation=3)  # the size can't tell
    annotations = load_annotations(root, "train")
    assert annotations.images[0].size_hw == (48, 64)
    assert annotations.images[0].boxes_xyxy.tolist() == [[50, 5, 60, 15]]
    assert [(f.kind, f.action, f.where[-5:]) for f in annotations.findings] == [
        ("orientation", "repaired", "1.jpg"),
        ("orientation", "note", "2.jpg"),
    ]


@pytest.mark.parametrize(
    ("objects", "kind"),
    [
        ([coco_object("1.jpg"), coco_object("2", 7)], "image-id-is-name"),
        ([coco_object("set/train/1.jpg"), coco_object(2, 7)], None),  # such a name is none of the list
        ([coco_object(1, "cat"), coco_object(2, " dog ")], "category-id-is-name"),
    ],
)
def test_names_in_place_of_ids(make_coco, kinds, objects, kind):
    def edit(content):
        for entry in content["images"]:
            entry["file_name"] = f"train/{entry['id']}.jpg"
        for obj in content["annotations"]:
            if obj["image_id"] == "2":
                obj["image_id"] = "2.jpg"

    annotations = load_annotations(make_coco([dict(obj) for obj in objects], edit=edit), "train")
    if kind is None:
        assert kinds(annotations) == {"image-unknown": "dropped"}
    else:
        assert [record.labels.tolist() for record in annotations.images] == [[0], [1]]
        assert kinds(annotations) == {kind: "repaired"}


def test_image_ids_off_by_one(make_coco, kinds):
    """Every box but one would lie on the next image, without a word."""
    annotations = load_annotations(make_coco([coco_object(i) for i in range(4)], num_images=4), "train")
    (finding,) = [finding for finding in annotations.findings if finding.kind == "image-ids-off-by-one"]
    assert finding.action == "refused"
    assert "Add 1 to the image ids of the objects" in finding.message
    annotations = load_annotations(make_coco([coco_object(i) for i in (1, 2, 4, 9)], num_images=4), "train")
    assert kinds(annotations) == {"image-unknown": "dropped"}


@pytest.mark.parametrize(
    "box",
    [
        {"x": 4, "y": 5, "width": 20, "height": "10"},
        {"xmin": 4, "ymin": 5, "xmax": 24, "ymax": 15, "label": "cat"},
    ],
)
def test_a_box_whose_numbers_have_names(make_coco, kinds, box):
    def edit(content):
        content["annotations"][0]["bbox"] = box

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[4, 5, 24, 15]]
    assert kinds(annotations) == {}
    assert kinds(load_annotations(make_coco(edit=edit), "train", boxes="xyxy")) == {"missing-box": "dropped"}


def test_categories_without_names(make_coco, kinds):
    """Called by their groups where each has its own."""
    groups = [(3, "cat"), (7, "dog"), (8, "pet"), (9, "pet"), (10, "none")]
    categories = [{"id": i, "supercategory": group} for i, group in groups]
    annotations = load_annotations(make_coco(categories=categories), "train")
    assert [category.name for category in annotations.categories] == ["cat", "dog", "class_8", "class_9", "class_10"]
    assert kinds(annotations) == {"missing-category-name": "repaired"}


def test_a_file_without_annotations_says_so(make_coco, kinds):
    annotations = load_annotations(make_coco(edit=lambda content: content.pop("annotations")), "train")
    assert [len(record.labels) for record in annotations.images] == [0, 0]
    assert kinds(annotations) == {"missing-annotations": "dropped"}


def test_file_names_that_are_numbers(make_coco, kinds):
    def edit(content):
        content["images"][0]["file_name"], content["images"][1]["file_name"] = 1, 2.0

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert [record.path.name for record in annotations.images] == ["1.jpg", "2.jpg"]
    assert kinds(annotations) == {}


@pytest.mark.parametrize("format", ["coco", "voc"])
def test_upright_boxes_with_the_sizes_of_stored_pixels(make_coco, make_voc, write_image, format):
    """As Label Studio exports photos of phones: one box that only the upright image holds tells it of all."""
    boxes = [(5, 40, 20, 20), (1, 2, 10, 12)]
    if format == "coco":
        root = make_coco([coco_object(image_id=i, bbox=box) for i, box in enumerate(boxes, 1)])
        places = [root / "train" / f"{i}.jpg" for i in (1, 2)]
    else:
        root = make_voc({f"{x}": voc_xml([voc_object(box=(x, y, x + w, y + h))]) for x, y, w, h in boxes})
        places = [root / "JPEGImages" / f"{x}.jpg" for x, *_ in boxes]
    for place in places:
        write_image(place, orientation=6)  # upright: 48 wide, 64 high
    annotations = load_annotations(root, "train")
    assert [record.size_hw for record in annotations.images] == [(64, 48)] * 2
    assert [record.boxes_xyxy.tolist() for record in annotations.images] == [[[5, 40, 25, 60]], [[1, 2, 11, 14]]]
    assert {(f.kind, f.action) for f in annotations.findings} == {("orientation", "repaired")}


@pytest.mark.parametrize("as_stored", [True, False])
@pytest.mark.parametrize("format", ["coco", "csv"])
def test_boxes_tell_the_frame_where_no_size_is_stated(make_coco, tmp_path, write_image, format, as_stored):
    """One box that only the stored image holds, and none that only the upright one holds, tells it of all (VoTT)."""
    boxes = [(40, 5, 20, 20) if as_stored else (5, 40, 20, 20), (1, 2, 10, 12)]
    root = tmp_path / "set"
    if format == "coco":

        def unsized(content):
            for image in content["images"]:
                del image["width"], image["height"]

        make_coco([coco_object(image_id=i, bbox=box) for i, box in enumerate(boxes, 1)], edit=unsized)
    else:
        root.mkdir()
        rows = "".join(f"{i}.jpg,{x},{y},{x + w},{y + h},cat\n" for i, (x, y, w, h) in enumerate(boxes, 1))
        (root / "train.csv").write_text(f"image,xmin,ymin,xmax,ymax,label\n{rows}")
    for i in (1, 2):
        write_image(root / "train" / f"{i}.jpg", orientation=6)  # 64 wide, 48 high; upright 48 wide, 64 high
    annotations = load_annotations(root, "train")
    assert [record.size_hw for record in annotations.images] == [(48, 64) if as_stored else (64, 48)] * 2
    assert [tuple(record.boxes_xyxy[0].tolist()) for record in annotations.images] == [
        (x, y, x + w, y + h) for x, y, w, h in boxes
    ]
    actions = {finding.action for finding in annotations.findings if finding.kind == "orientation"}
    assert actions == {"repaired" if as_stored else "note"}


def test_image_of_another_size(make_coco, write_image):
    objects = [coco_object(bbox=(1, 1, 20, 20)), coco_object(image_id=2, bbox=(30, 20, 30, 20))]
    root = make_coco(objects)
    for name, height in (("1.jpg", 24), ("2.jpg", 30)):  # the second in another shape: it tells nothing of the first
        write_image(root / "train" / name, size_wh=(32, height))
    annotations = load_annotations(root, "train")
    assert [record.size_hw for record in annotations.images] == [(24, 32)]
    assert [(f.kind, f.action) for f in annotations.findings] == [
        ("size-mismatch", "repaired"),
        ("size-mismatch", "dropped"),
    ]


def test_a_few_images_that_were_resized_are_left_out(make_coco, write_image):
    """One box that only the stated size holds tells what the boxes of the others, which happen to fit, mean."""
    objects = [coco_object(i, bbox=(1, 2, 10, 10)) for i in range(1, 5)] + [coco_object(5, bbox=(40, 20, 20, 20))]
    root = make_coco(objects, num_images=5)
    for i in (4, 5):
        write_image(root / "train" / f"{i}.jpg", size_wh=(32, 24))
    annotations = load_annotations(root, "train")
    assert [record.path.name for record in annotations.images] == ["1.jpg", "2.jpg", "3.jpg"]
    assert [(f.kind, f.action) for f in annotations.findings] == [("size-mismatch", "dropped")] * 2
    root = make_coco(objects[:4], num_images=4)
    write_image(root / "train" / "4.jpg", size_wh=(32, 24))
    assert [f.action for f in load_annotations(root, "train").findings if f.kind == "size-mismatch"] == ["repaired"]


def test_images_that_were_resized_after_annotation_stop(make_coco, kinds):
    def edit(content):
        for entry in content["images"]:
            entry.update(width=128, height=96)

    root = make_coco([coco_object(image_id=i) for i in (1, 2, 3, 4)], num_images=4, edit=edit)
    assert kinds(load_annotations(root, "train"))["images-resized"] == "refused"
    root = make_coco([coco_object(image_id=i, bbox=(100, 100, 20, 20)) for i in (1, 2, 3, 4)], num_images=4, edit=edit)
    assert "images-resized" not in kinds(load_annotations(root, "train"))  # the stated size is wrong
    objects = [coco_object(image_id=i, bbox=(0.5, 0.5, 0.2, 0.2)) for i in (1, 2, 3, 4)]
    root = make_coco(objects, num_images=4, edit=edit)  # fractions mean the same in any size
    assert set(kinds(load_annotations(root, "train", boxes="cxcywh-relative"))) == {"size-mismatch"}


def test_broken_json_names_line_and_column(make_coco):
    root = make_coco()
    file = root / "annotations" / "instances_train.json"
    file.write_text('{\n "images": [\n  {"id": 1,, }]}')
    with pytest.raises(InputError, match=r"instances_train\.json is broken JSON: .* at line 3, column 12"):
        load_annotations(root, "train")
    for text, message in (
        ("[]", "found a list"),
        ('{"a": 1}', "found the keys a"),
        ('{"images": 3}', "list of objects"),
    ):
        file.write_text(text)
        with pytest.raises(InputError, match=message):
            load_annotations(root, "train")


def test_entries_that_are_no_images(make_coco, kinds):
    annotations = load_annotations(make_coco(edit=lambda content: content["images"].append({"id": 9})), "train")
    assert len(annotations.images) == 2
    assert kinds(annotations) == {"image-entry": "dropped"}


# ---- layouts ---------------------------------------------------------------------------------------------------------


def moved(root, moves):
    """Moves of a set in COCO's own layout: {"annotations/instances_train.json": "train/_annotations.coco.json"}"""
    for source, target in moves.items():
        (root / target).parent.mkdir(parents=True, exist_ok=True)
        shutil.move(root / source, root / target)
    return root


JSON = "annotations/instances_train.json"


@pytest.mark.parametrize(
    ("moves", "split"),
    [
        ({}, "train"),
        ({"train": "images/train"}, "train"),
        ({"train": "images"}, "train"),
        ({JSON: "train/_annotations.coco.json"}, "train"),
        ({JSON: "annotations/train.json"}, "train"),
        ({JSON: "annotations/train_annotations.json", "train": "images"}, "train"),
        ({JSON: "train.json"}, "train"),
        ({JSON: "train.json", "train": "images"}, "train"),
        ({JSON: "train/labels.json"}, "train"),
        ({JSON: "part/labels.json", "train": "part/data"}, "part"),
        ({JSON: "labels.json", "train": "data"}, "labels"),
        ({JSON: "annotations/instances_train2017.json", "train": "train2017"}, "train2017"),
    ],
    ids=str,
)
def test_layouts(make_coco, moves, split):
    root = moved(make_coco(), moves)
    assert detect_format(root) == "coco"
    assert available_splits(root) == [split]
    assert default_splits(root) == (split, None)
    annotations = load_annotations(root, split)
    assert len(annotations.images) == 2
    assert len(annotations.images[0].labels) == 1
    assert annotations.findings == ()
    assert annotations.name == f"set/{split}"


def test_images_beside_the_json(make_coco):
    root = make_coco()
    for file in (root / "train").iterdir():
        file.rename(root / file.name)
    (root / JSON).rename(root / "train.json")
    assert len(load_annotations(root, "train").images) == 2
    assert len(load_annotations(root / "train.json", "train").images) == 2


def test_names_with_folders(make_coco, kinds):
    def inside(content):
        for image in content["images"]:
            image["file_name"] = f"train/{image['file_name']}"

    assert load_annotations(make_coco(edit=inside), "train").findings == ()

    def elsewhere(content):
        for image in content["images"]:
            image["file_name"] = f"C:\\data\\photos\\{image['file_name']}"

    annotations = load_annotations(make_coco(edit=elsewhere), "train")
    assert len(annotations.images) == 2
    assert kinds(annotations) == {"file-name-path": "repaired"}


def test_names_in_other_capitals_or_with_another_suffix(make_coco):
    def edit(content):
        content["images"][0]["file_name"] = "1.JPG"
        content["images"][1]["file_name"] = "2.png"

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert [record.path.name for record in annotations.images] == ["1.jpg", "2.jpg"]
    assert [f.kind for f in annotations.findings] == ["file-name-differs"] * 2


def test_other_tasks_of_coco_are_no_splits(make_coco):
    root = make_coco()
    for name in ("captions_train.json", "person_keypoints_train.json", "image_info_test.json"):
        shutil.copy(root / JSON, root / "annotations" / name)
    assert available_splits(root) == ["train"]


def test_explicit_files(make_coco, tmp_path, monkeypatch):
    root = moved(make_coco(), {JSON: "odd/boxes.v2.json", "train": "odd/pictures"})
    for annotation_file, image_dir in (
        ("odd/boxes.v2.json", "odd/pictures"),
        (root / "odd/boxes.v2.json", root / "odd/pictures"),
    ):
        annotations = load_annotations(root, "mine", annotation_file=annotation_file, image_dir=image_dir)
        assert annotations.name == "set/mine"
        assert len(annotations.images) == 2
        assert annotations.findings == ()
    monkeypatch.chdir(root / "odd")
    assert len(load_annotations(root, "x", annotation_file="boxes.v2.json", image_dir="pictures").images) == 2
    with pytest.raises(InputError, match=r"\(annotation_file\): there is no nothing\.json in"):
        load_annotations(root, "x", annotation_file="nothing.json")


# ---- whole sets and the official call
# ---------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["train2017", "val2017"])
def test_a_coco_set_is_read_as_pycocotools_reads_it(any_coco, split, capsys):
    annotations = load_annotations(any_coco, split)
    assert annotations.findings == ()
    assert len(annotations.categories) == 80
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        coco = COCO(str(any_coco / "annotations" / f"instances_{split}.json"))
    assert [record.image_id for record in annotations.images] == list(coco.imgs)
    for record in annotations.images:
        theirs = coco.imgToAnns[record.image_id]
        ids = [annotations.categories[label].category_id for label in record.labels]
        assert ids == [obj["category_id"] for obj in theirs]
        assert record.ignore.tolist() == [bool(obj["iscrowd"]) for obj in theirs]
        np.testing.assert_allclose(record.area, [obj["area"] for obj in theirs], rtol=1e-6)
        boxes = np.array([obj["bbox"] for obj in theirs]).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        np.testing.assert_allclose(record.boxes_xyxy, boxes, atol=0.011)  # clipped by a hundredth here and there
        assert record.size_hw == (coco.imgs[record.image_id]["height"], coco.imgs[record.image_id]["width"])


def test_build_coco_dataset_on_cocos_own_layout(any_coco):
    is_real = any_coco.name == "coco_tiny"
    args = {"coco_path": str(any_coco), "masks": False, "cache_mode": True}
    val = build_coco_dataset("val", args)
    train = build_coco_dataset("train", args)
    assert len(val) == len(train) == (80 if is_real else 16)
    assert val.categories == train.categories
    image, target = val[0]
    assert min(image.shape[1:]) == 800 or max(image.shape[1:]) == 1333
    assert target["image_id"].item() == (532481 if is_real else 532482)
    assert target["orig_size"].tolist() == ([426, 640] if is_real else [120, 160])


def test_build_coco_dataset_takes_other_layouts_and_refuses_masks(make_coco):
    from argparse import Namespace

    root = make_coco()
    make_coco([coco_object(category_id=1)], split="val", categories=[{"id": 1, "name": "dog"}])
    dataset = build_coco_dataset("val", Namespace(coco_path=root, masks=False))
    assert dataset.categories == (Category(3, "cat"), Category(7, "dog"))
    assert dataset[0][1]["labels"].tolist() == [1]
    with pytest.raises(InputError, match="masks"):
        build_coco_dataset("val", {"coco_path": root, "masks": True})
    with pytest.raises(InputError, match='"train" or "val"'):
        build_coco_dataset("test", {"coco_path": root})
    with pytest.raises(InputError, match="coco_path"):
        build_coco_dataset("val", {})


def test_categories_are_found_without_parsing_the_rest(tmp_path, make_coco):
    file = make_coco() / JSON
    assert read_categories(file) == (Category(3, "cat"), Category(7, "dog"))
    content = json.loads(file.read_text())
    file.write_text(json.dumps({"categories": content.pop("categories"), **content}, indent=1))
    assert read_categories(file) == (Category(3, "cat"), Category(7, "dog"))
    file.write_text("{}")
    assert read_categories(file) is None

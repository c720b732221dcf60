"""What a box's numbers mean: whole splits that look as if they meant something else, and the option that reads them."""

import json

import numpy as np
import pytest
from dataset_parts import coco_object, voc_object, voc_xml

from ddetr.datasets import load_annotations
from ddetr.datasets.annotations import FindingLog, ImageTable
from ddetr.datasets.box_form import corners_of, numbers_of
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.readers.box_meaning import check_meaning, check_placement
from ddetr.datasets.splits import load_splits
from ddetr.errors import InputError

SIZE_WH = np.array([640, 480])
FORMS = ("xywh", "xyxy", "cxcywh", "xywh-relative", "xyxy-relative", "cxcywh-relative")
OBJECTS = {  # (smallest, largest) side, as parts of the image's
    "points": (1 / 640, 1 / 640),
    "tiny": (0.003, 0.01),
    "small": (0.01, 0.08),
    "medium": (0.05, 0.4),
    "big": (0.5, 0.95),
}


def boxes_of(objects, n, seed=0):
    """(n, 4) corners in pixels, anywhere in their images."""
    rng = np.random.default_rng(seed)
    sizes = rng.uniform(*OBJECTS[objects], (n, 2)) * SIZE_WH
    corners = rng.random((n, 2)) * (SIZE_WH - sizes)
    return np.concatenate([corners, corners + sizes], axis=1)


def found(boxes_xyxy, own, wanted="auto"):
    log = FindingLog()
    check_meaning(boxes_xyxy, np.tile(SIZE_WH[::-1], (len(boxes_xyxy), 1)), own, wanted, log, "x")
    return log.freeze()


def misread(boxes_xyxy, form, own):
    """Corners as a reader of the form `own` gets them where the file has been written in `form`."""
    boxes = boxes_xyxy / np.tile(SIZE_WH, 2) if form.endswith("-relative") else boxes_xyxy
    return corners_of(numbers_of(boxes, form), own)


@pytest.mark.parametrize("own", ["xywh", "xyxy"])
@pytest.mark.parametrize("objects", OBJECTS)
def test_no_alarm_where_boxes_are_what_they_should_be(objects, own):
    for n in (1, 4, 40, 1000):
        boxes = boxes_of(objects, n)
        beyond = boxes + np.where(np.arange(n) % 10 == 0, 40, 0)[:, None]  # some reach out of their image
        for some in (boxes, boxes / 2, beyond, boxes.round(), np.tile([0, 0, *SIZE_WH], (n, 1)) + 1):
            assert found(some.astype(float), own) == ()
        said = [(f.kind, f.action) for f in found(boxes * 2, own)]  # most reach out, by whatever form
        assert said == [("boxes-reach-out", "note")] * (n > 4)


@pytest.mark.parametrize("own", ["xywh", "xyxy"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("objects", ["small", "medium"])
@pytest.mark.parametrize("n", [6, 200])
def test_another_form_is_found(objects, form, own, n):
    if form == own:
        return
    findings = found(misread(boxes_of(objects, n), form, own), own)
    if form == "cxcywh" and own == "xywh" and (objects == "small" or n < 20):  # hardly one leaves its image
        return
    assert [finding.action for finding in findings] == ["refused"]
    if n > 20 and objects == "medium":
        assert f"--data.boxes {form};" in findings[0].message
    assert ("-relative" in findings[0].message) == form.endswith("-relative")
    assert f"by --data.boxes {own}." in findings[0].message
    assert found(misread(boxes_of(objects, n), form, own), own, own) == ()  # the option silences it


def test_some_fractions_among_pixels_are_a_note():
    boxes = boxes_of("medium", 50)
    boxes[3] = (0.1, 0.1, 0.5, 0.6)
    assert [(f.kind, f.action, f.count) for f in found(boxes, "xywh")] == [("box-in-first-pixel", "note", 1)]


@pytest.mark.parametrize(("n", "fractions"), [(16, 8), (2, 1), (40, 10), (40, 30)])
def test_many_fractions_among_pixels_stop(n, fractions):
    boxes = boxes_of("medium", n) + 3
    boxes[:fractions] = (boxes[:fractions] - 3) / np.tile(SIZE_WH, 2)
    ((kind, action, count, message),) = [(f.kind, f.action, f.count, f.message) for f in found(boxes, "xyxy")]
    assert (kind, action, count) == ("boxes-in-mixed-units", "refused", fractions)
    assert f"{fractions} of {n} boxes lie in 0 to 1" in message
    assert f"{n - fractions} are in pixels" in message
    assert found(boxes, "xyxy", "xyxy") == ()


@pytest.mark.parametrize("own", ["xywh", "xyxy"])
@pytest.mark.parametrize("form", ["xywh", "xyxy"])
@pytest.mark.parametrize(
    ("scale", "size_wh"), [(100, (640, 480)), (100, (64, 48)), (1000, (1920, 1080)), (1000, (64, 48))]
)
def test_boxes_in_a_scale_of_their_own_are_found(scale, size_wh, form, own):
    boxes = boxes_of("medium", 40) / np.tile(SIZE_WH, 2) * scale
    log = FindingLog()
    check_meaning(misread(boxes, form, own), np.tile(size_wh[::-1], (40, 1)), own, "auto", log, "x")
    ((kind, action, message),) = [(f.kind, f.action, f.message) for f in log.freeze()]
    assert kind == "boxes-look-scaled"
    assert action == ("refused" if size_wh[0] < scale else "note") or form != own
    assert f"divide them by {scale} and read them by --data.boxes {form}-relative;" in message


@pytest.mark.parametrize("own", ["xywh", "xyxy"])
def test_exchanged_x_and_y_stop(own):
    boxes = boxes_of("medium", 60)[:, [1, 0, 3, 2]]
    ((kind, action, message),) = [(f.kind, f.action, f.message) for f in found(boxes, own)]
    assert (kind, action) == ("boxes-look-exchanged", "refused")
    assert "if x and y are exchanged" in message


@pytest.mark.parametrize("own", ["xywh", "xyxy", "cxcywh"])
@pytest.mark.parametrize(("form", "places"), [("xyxy", [0, 2, 1, 3]), ("xyxy", [1, 3, 0, 2]), ("cxcywh", [2, 3, 0, 1])])
@pytest.mark.parametrize("objects", ["tiny", "small", "medium"])
def test_numbers_in_another_order_stop(objects, form, places, own):
    if form == "cxcywh" != own:
        return  # small sizes before centres fit as corners, and as a corner and a size
    numbers = numbers_of(boxes_of(objects, 60), form)[:, places]
    order = {0: "x1, x2, y1, y2", 1: "y1, y2, x1, x2", 2: "width, height, x, y"}[places[0]]
    ((kind, action, message),) = [(f.kind, f.action, f.message) for f in found(corners_of(numbers, own), own)]
    assert (kind, action) == ("boxes-in-another-order", "refused")
    assert f"if the numbers of each stand in the order {order}. " in message
    assert found(corners_of(numbers, own), own, own) == ()


@pytest.mark.parametrize(("first", "second"), [(0, 3), (1, 2), (0, 2), (1, 3)])
@pytest.mark.parametrize("own", ["xyxy", "xywh", "cxcywh"])
def test_a_number_that_is_written_for_another_stops(own, first, second):
    """VoTT once wrote xmin for ymax."""
    numbers = numbers_of(boxes_of("medium", 12), own)
    numbers[2:, second] = numbers[2:, first]
    (finding,) = found(corners_of(numbers, own), own)
    assert (finding.kind, finding.action, finding.count) == ("repeated-number", "refused", 10)
    assert f"read them by --data.boxes {own}" in finding.message
    assert found(corners_of(numbers, own), own, wanted=own) == ()
    few = numbers_of(boxes_of("medium", 12), own)
    few[:5, second] = few[:5, first]
    same = np.tile(numbers[-1], (12, 1))  # one box again and again may be so
    for some in (few, same):
        assert "repeated-number" not in {f.kind for f in found(corners_of(some, own), own)}


def test_an_order_that_fits_as_well_as_a_form_is_named_beside_it():
    """Corners in the first quarter of their images fit as sizes before centres."""
    boxes = misread(boxes_of("medium", 40) / 2, "xyxy", "cxcywh")
    ((kind, action, message),) = [(f.kind, f.action, f.message) for f in found(boxes, "cxcywh")]
    assert (kind, action) == ("boxes-in-another-order", "refused")
    assert "They fit as two corners (x1, y1, x2, y2) or" in message
    assert "too (--data.boxes xyxy or xywh): look at some" in message


def test_boxes_that_are_none_decide_nothing():
    for boxes in (np.zeros((9, 4)), np.full((9, 4), np.nan), np.zeros((0, 4)), np.full((9, 4), 1e300)):
        assert found(boxes, "xywh") == ()


PIXELS = [(8, 6, 28, 22), (30, 20, 54, 38)]  # corners, in images of 64 x 48


def written(form):
    boxes = np.array(PIXELS, dtype=float)
    if form.endswith("-relative"):
        boxes /= (64, 48, 64, 48)
    return [tuple(box) for box in numbers_of(boxes, form).tolist()]


@pytest.mark.parametrize("form", FORMS)
def test_coco_by_the_option(make_coco, form):
    objects = [coco_object(image_id=image, bbox=box, area=0.1) for image in (1, 2) for box in written(form)]
    root = make_coco(objects)
    annotations = load_annotations(root, "train", boxes=form)
    for record in annotations.images:
        np.testing.assert_allclose(record.boxes_xyxy, PIXELS, atol=1e-4)
        np.testing.assert_allclose(record.area, [320, 432] if form.endswith("-relative") else 0.1, rtol=1e-4)
    assert annotations.findings == ()
    refused = [f for f in load_annotations(root, "train").findings if f.action == "refused"]
    assert bool(refused) == (form not in ("xywh", "cxcywh"))


@pytest.mark.parametrize("form", FORMS)
def test_voc_by_the_option(make_voc, form):
    xml = voc_xml([voc_object(box=box) for box in written(form)])
    root = make_voc(dict.fromkeys("abcd", xml))
    annotations = load_annotations(root, "train", boxes=form)
    for record in annotations.images:
        np.testing.assert_allclose(record.boxes_xyxy, PIXELS, atol=1e-4)
    assert annotations.findings == ()
    refused = [f.kind for f in load_annotations(root, "train").findings if f.action == "refused"]
    assert bool(refused) == (form not in ("xyxy", "cxcywh"))


def test_swapped_corners_are_ordered(make_coco, make_voc):
    swapped = [(28, 22, 8, 6), (54, 20, 30, 38), (8, 6, 28, 22)]
    voc = load_annotations(make_voc({"a": voc_xml([voc_object(box=box) for box in swapped])}), "train")
    coco = load_annotations(make_coco([coco_object(bbox=box) for box in swapped]), "train", boxes="xyxy")
    for annotations in (voc, coco):
        assert annotations.images[0].boxes_xyxy.tolist() == [[8, 6, 28, 22], [30, 20, 54, 38], [8, 6, 28, 22]]
        assert [(f.kind, f.action) for f in annotations.findings] == [("swapped-corners", "repaired")] * 2


def test_an_option_that_does_not_fit_is_refused(make_coco, make_yolo):
    objects = [coco_object(bbox=box) for box in written("xywh")]
    kinds = {f.kind: f.action for f in load_annotations(make_coco(objects), "train", boxes="xywh-relative").findings}
    assert kinds["boxes-not-relative"] == "refused"
    with pytest.raises(InputError, match=r"--data\.boxes \(boxes\) is for formats in pixels"):
        load_annotations(make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"}), "train", boxes="xyxy")
    with pytest.raises(InputError, match=r"boxes is one of auto, .* \(did you mean xywh\?\)"):
        load_annotations(make_coco(objects), "train", boxes="xyhw")


def test_the_option_reaches_both_splits(make_coco):
    for split in ("train", "val"):
        root = make_coco([coco_object(bbox=box) for box in written("xyxy-relative")], split=split)
    for annotations in load_splits(TrainingSource(path=str(root), boxes="xyxy-relative")):
        np.testing.assert_allclose(annotations.images[0].boxes_xyxy, PIXELS, atol=1e-4)


# ---- names of classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "count"),
    [
        (["cat", "Cat "], 1),
        (["cat", "cat"], 1),
        (["traffic light", "traffic_light", "Traffic-Light"], 1),
        (["é", "e\u0301"], 1),
        (["cat", "cats"], 0),
    ],
    ids=str,
)
def test_names_that_are_nearly_the_same_are_a_note(make_coco, names, count):
    categories = [{"id": i, "name": name} for i, name in enumerate(names, 3)]
    annotations = load_annotations(make_coco(categories=categories), "train")
    assert [(f.kind, f.action) for f in annotations.findings] == [("alike-class-names", "note")] * count
    assert all(f"id {i + 3}" in f.message for f in annotations.findings for i in range(len(names)))


def test_a_class_of_validation_names_the_one_of_training(make_coco, make_voc, make_yolo):
    make_coco()
    root = make_coco([coco_object(category_id=1)], split="val", categories=[{"id": 1, "name": "Cat"}])
    train = load_annotations(root, "train")
    voc = make_voc({"a": voc_xml([voc_object("cat")]), "b": voc_xml([voc_object("Cat")])}, {"train": "a", "val": "b"})
    yolo = make_yolo({"images/val/a.jpg": "0 .5 .5 .2 .2"}, data_yaml="train: images/val\nnames: [Cat]\n")
    for annotations in (
        load_annotations(root, "val", categories=train.categories),
        load_annotations(voc, "val"),
        load_annotations(yolo, "train", categories=train.categories),
    ):
        [finding] = annotations.findings
        assert (finding.kind, finding.action) == ("category-unknown", "dropped")
        assert "'Cat' is no class of the training set, which has 'cat'" in finding.message


# ---- sizes below zero ------------------------------------------------------------------------------------------------

CORNERS = [10.0, 8.0, 30.0, 20.0]
DRAWN = [(10, 8, 20, 12), (30, 8, -20, 12), (10, 20, 20, -12), (30, 20, -20, -12)]  # from each of the four corners


def write_drawn(root, format, drawn, write_image):
    """A set of this format with an image of 64 x 48, whose boxes are (x, y, width, height) of a corner; a centre's
    formats get the box's centre with the same sizes."""
    write_image(root / "train" / "images" / "a.jpg")
    centres = [(x + w / 2, y + h / 2, w, h) for x, y, w, h in drawn]
    if format == "coco":
        objects = [coco_object(bbox=box, area=240) for box in drawn]
        content = {"images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}], "annotations": objects}
        text = json.dumps(content | {"categories": [{"id": 3, "name": "cat"}]})
        (root / "train" / "_annotations.coco.json").write_text(text)
    elif format == "csv":
        rows = "".join(f"a.jpg,cat,{x},{y},{w},{h}\n" for x, y, w, h in drawn)
        (root / "train" / "_annotations.csv").write_text(f"filename,class,bbox_x,bbox_y,bbox_width,bbox_height\n{rows}")
    elif format == "huggingface":
        line = {"file_name": "images/a.jpg", "objects": {"bbox": drawn, "categories": ["cat"] * len(drawn)}}
        (root / "train" / "metadata.jsonl").write_text(json.dumps(line))
    elif format == "createml":
        boxes = [dict(zip(("x", "y", "width", "height"), box, strict=True)) for box in centres]
        entry = {"image": "a.jpg", "annotations": [{"label": "cat", "coordinates": box} for box in boxes]}
        (root / "train" / "_annotations.createml.json").write_text(json.dumps([entry]))
    else:
        rows = "".join(f"0 {x / 64} {y / 48} {w / 64} {h / 48}\n" for x, y, w, h in centres)
        (root / "train" / "labels").mkdir()
        (root / "train" / "labels" / "a.txt").write_text(rows)
        (root / "data.yaml").write_text("train: train/images\nnames: [cat]\n")


@pytest.mark.parametrize("format", ["coco", "csv", "huggingface", "createml", "yolo"])
def test_boxes_drawn_from_another_corner_are_turned(tmp_path, write_image, kinds, format):
    write_drawn(tmp_path, format, [*DRAWN, (5, 5, 40, 30)], write_image)
    annotations = load_annotations(tmp_path, "train", format=format)
    np.testing.assert_allclose(annotations.images[0].boxes_xyxy, [*[CORNERS] * 4, [5, 5, 45, 35]], atol=1e-4)
    assert annotations.images[0].area.tolist()[:4] == pytest.approx([240] * 4)
    assert kinds(annotations) == {"negative-size": "repaired"}
    assert len(annotations.findings) == 3
    if format == "coco":
        assert "(30, 8, -20, 12)" in annotations.findings[0].message


@pytest.mark.parametrize("box", [(float("inf"), 1, -float("inf"), 3), (1e308, 1e308, -1.7e308, -5), (3, -1e300, 4, -9)])
def test_negative_sizes_that_are_no_numbers_of_an_image(tmp_path, write_image, box):
    write_drawn(tmp_path, "coco", [box], write_image)
    assert len(load_annotations(tmp_path, "train").images[0].labels) == 0


@pytest.mark.parametrize("format", ["coco", "csv", "huggingface", "yolo"])
def test_what_is_no_box_however_it_is_turned_is_left_out(tmp_path, write_image, kinds, format):
    """A size of -1, which stands for none, and boxes that lie outside once they are turned."""
    ordinary = [(5, 5, 40, 30), (1, 2, 10, 10), (1, 30, 10, 10), (20, 2, 10, 10), (3, 3, 9, 9)]
    write_drawn(tmp_path, format, [*ordinary, (10, 8, -1, -1), (5, 5, -20, 12), (30, 30, -20, 0)], write_image)
    annotations = load_annotations(tmp_path, "train", format=format)
    assert len(annotations.images[0].labels) == 5
    assert kinds(annotations) == {"degenerate-box": "dropped"}


def test_negative_sizes_in_fractions(tmp_path, write_image, kinds):
    drawn = [(x / 64, y / 48, w / 64, h / 48) for x, y, w, h in DRAWN]
    write_drawn(tmp_path, "coco", drawn, write_image)
    annotations = load_annotations(tmp_path, "train", boxes="xywh-relative")
    np.testing.assert_allclose(annotations.images[0].boxes_xyxy, [CORNERS] * 4, atol=1e-4)
    assert kinds(annotations) == {"negative-size": "repaired"}


def test_swapped_corners_in_fractions_are_ordered(tmp_path, write_image, kinds):
    """OpenImages' table."""
    write_image(tmp_path / "images" / "a.jpg")
    (tmp_path / "train.csv").write_text(
        "ImageID,LabelName,XMin,XMax,YMin,YMax\na,cat,0.5,0.25,0.25,0.5\na,cat,0.25,0.5,0.25,0.5\n"
    )
    annotations = load_annotations(tmp_path, "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[16, 12, 32, 24]] * 2
    assert kinds(annotations) == {"swapped-corners": "repaired"}


# ---- where they lie --------------------------------------------------------------------------------------------------


def placed(boxes, image_index=None):
    """What is said of boxes in images of SIZE_WH, each in one of its own where it is not said."""
    n = len(boxes)
    index = np.arange(n) if image_index is None else image_index
    count = int(index.max()) + 1
    sizes_hw, paths = np.tile(SIZE_WH[::-1], (count, 1)), [f"{i}.jpg" for i in range(count)]
    flags = np.zeros(n, dtype=bool)
    table = ImageTable(np.arange(count), paths, sizes_hw, index, boxes, np.zeros(n), np.ones(n), flags)
    log = FindingLog()
    check_placement(table, "x", log)
    return [(finding.kind, finding.action, finding.message) for finding in log.freeze()]


def in_the_middle(n=400):
    centres = np.random.default_rng(1).normal(0.5, 0.1, (n, 2)).clip(0.3, 0.7) * SIZE_WH
    return np.concatenate([centres - 40, centres + 40], axis=1)


ALL_OF_IT = np.tile([0, 0, *SIZE_WH], (80, 1))


@pytest.mark.parametrize(
    "boxes",
    [
        *(boxes_of(objects, 400) for objects in OBJECTS),
        boxes_of("medium", 19) / 2,  # too few to tell
        in_the_middle(),
        in_the_middle() - (60, 60, 60, 60),
        boxes_of("medium", 400) * (0.5, 1, 0.5, 1),  # a fixed camera: the street is at the left
        np.concatenate([boxes_of("medium", 400) / 2, [[500, 400, 560, 450]]]),
        np.tile([8, 8, 630, 470], (50, 1)),
        ALL_OF_IT[:9],
        np.concatenate([ALL_OF_IT, boxes_of("medium", 20)]),
    ],
)
def test_nothing_is_said_of_boxes_in_places_that_may_be_right(boxes):
    assert placed(boxes) == []


@pytest.mark.parametrize("factor", [0.25, 0.5, 2 / 3])
def test_boxes_of_smaller_images_are_a_note(factor):
    boxes = boxes_of("medium", 400) * factor
    ((kind, action, message),) = placed(boxes)
    assert (kind, action) == ("boxes-in-one-corner", "note")
    assert f"the left {factor:.0%} and the upper {factor:.0%} of" in message
    assert placed(boxes, np.arange(400) // 40) == []  # ten images may be of one scene


def test_boxes_that_are_the_whole_image_are_a_note():
    boxes = ALL_OF_IT[:20] + [[1, 0, -1, 0]]
    for some in (boxes, np.concatenate([boxes, boxes_of("small", 2)])):
        ((kind, action, message),) = placed(some)
        assert (kind, action) == ("whole-image-boxes", "note")
        assert f"20 of {len(some)} boxes are the whole image" in message

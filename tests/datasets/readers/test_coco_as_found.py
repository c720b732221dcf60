"""COCO files as tools and people write them: names of files, ids, masks, encodings, layouts."""

import json
import shutil
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from dataset_parts import coco_object

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.image_files import ImageFolders
from ddetr.datasets.readers.coco.mask import box_of_mask
from ddetr.datasets.readers.file_names import spellings
from ddetr.datasets.splits import load_splits
from ddetr.errors import InputError

# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def named(make_coco, write_image):
    """Reads a set whose images 1, 2, ... have these names in its JSON, and these files in its folder; each has one box
    that is as wide as its id."""

    def read(names, files, **keys):
        for i, file in enumerate(files):
            write_image(make_coco(num_images=0).joinpath("train", file), seed=i)

        def edit(content):
            content["images"] = [
                {"id": i, keys.get("key", "file_name"): name, "width": 64, "height": 48}
                for i, name in enumerate(names, 1)
            ]

        objects = [coco_object(image_id=i, bbox=(1, 1, i + 2, 9)) for i in range(1, len(names) + 1)]
        root = make_coco(objects, num_images=0, edit=edit)
        annotations = load_annotations(root, "train")
        for record in annotations.images:  # whatever was found, boxes stay with their entry
            assert [box[2] - box[0] for box in record.boxes_xyxy.tolist()] == [record.image_id + 2]
        found = {record.image_id: record.path.relative_to(root / "train").as_posix() for record in annotations.images}
        return found, {finding.kind: finding.action for finding in annotations.findings}

    return read


@pytest.mark.parametrize(
    ("names", "files"),
    [
        (["cam1\\1.jpg", "cam2\\1.jpg"], ["cam1/1.jpg", "cam2/1.jpg"]),
        (["C:\\x\\cam1\\1.jpg", "C:\\x\\cam2\\1.jpg"], ["cam1/1.jpg", "cam2/1.jpg"]),
        (["/home/me/set/cam1/1.jpg", "/mnt/b/cam2/1.jpg"], ["cam1/1.jpg", "cam2/1.jpg"]),
        (["./a.jpg", "../b.jpg"], ["a.jpg", "b.jpg"]),
        (["/a.jpg", "//b.jpg"], ["a.jpg", "b.jpg"]),
        ([" a.jpg", "b.jpg "], ["a.jpg", "b.jpg"]),
        (["a.jpg", "b.PNG.png"], ["a.jpg.jpg", "b.PNG"]),
        (["my%20photo.jpg", "two%20%282%29.jpg"], ["my photo.jpg", "two (2).jpg"]),
        (["100%.jpg", "a%zz.jpg"], ["100%.jpg", "a%zz.jpg"]),
        (["caf%C3%A9.jpg"], ["café.jpg"]),
        (["https://h/x/a.jpg?sig=q/b", "https://h/x/b.jpg?sig=q/c"], ["a.jpg", "b.jpg", "c.jpg"]),
        (["a.jpg?sig=q/b", "b.jpg?v=2"], ["a.jpg", "b.jpg"]),
        (["what?.jpg", "no#2.jpg"], ["what?.jpg", "no#2.jpg", "what.jpg", "no.jpg"]),
        (["/data/local-files/?d=pics%5Ca.jpg", "/data/local-files/?d=pics/b.jpg"], ["a.jpg", "b.jpg"]),
        (["file:///C:/x/a.jpg", "s3://bucket/x/b.jpg"], ["a.jpg", "b.jpg"]),
        (["CAM1/1.JPG", "cam2/1.jpg"], ["cam1/1.jpg", "Cam2/1.jpg"]),
        (["a", "b.png"], ["a.jpg", "b.jpg"]),
        (["a.jpg", "A.jpg"], ["a.jpg", "A.jpg"]),
    ],
    ids=str,
)
def test_names_of_other_systems(named, names, files):
    found, kinds = named(names, files)
    assert found == dict(enumerate(files[: len(names)], 1))
    assert set(kinds.values()) <= {"repaired", "note"}


@pytest.mark.parametrize(("written", "stored"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_composed_or_not(named, written, stored):
    names = ["café/é.jpg", "한국.jpg"]
    files = [unicodedata.normalize(stored, name) for name in names]
    found, _ = named([unicodedata.normalize(written, name) for name in names], files)
    assert found == dict(enumerate(files, 1))


@pytest.mark.parametrize(
    ("names", "files", "found", "kind"),
    [
        (["cam1/1.jpg", "cam2/1.jpg"], ["1.jpg"], {}, ("ambiguous-image", "refused")),
        (["cam1\\1.jpg", "cam2\\1.jpg", "x\\2.jpg"], ["1.jpg", "2.jpg"], {3: "2.jpg"}, ("ambiguous-image", "refused")),
        (["a.png", "a.bmp", "b.jpg"], ["a.jpg", "b.jpg"], {3: "b.jpg"}, ("ambiguous-image", "refused")),
        (["a.png", "a.jpg"], ["a.jpg"], {2: "a.jpg"}, ("missing-image", "dropped")),
        (["a%20b.jpg", "a b.jpg"], ["a b.jpg"], {2: "a b.jpg"}, ("missing-image", "dropped")),
        (["A.jpg"], ["a.jpg", "a.JPG", "x.jpg"], {}, ("every-image-missing", "refused")),
        (["x.jpg", "https://h/gone.jpg?next=/x"], ["x.jpg"], {1: "x.jpg"}, ("missing-image", "dropped")),
        (["x.jpg", "gone.jpg?next=/x.jpg"], ["x.jpg"], {1: "x.jpg"}, ("missing-image", "dropped")),
    ],
    ids=str,
)
def test_one_file_is_never_guessed_for_two_names(named, names, files, found, kind):
    got, kinds = named(names, files)
    assert got == found
    assert kind in kinds.items()


def test_images_are_preferred_to_masks_of_the_same_names(make_coco, write_image):
    root = make_coco()
    (root / "train").rename(root / "images")
    for name in ("1.png", "2.png"):
        write_image(root / "train" / name)
    assert [record.path.parent.name for record in load_annotations(root, "train").images] == ["images"] * 2


@pytest.mark.parametrize("key", ["filename", "path", "coco_url"])
def test_the_name_under_another_key(named, key):
    found, kinds = named(["http://h/train/a.jpg"], ["a.jpg"], key=key)
    assert found == {1: "a.jpg"}
    assert kinds["missing-file-name"] == "repaired"


def test_spellings_of_hostile_names_end():
    for name in ("%" * 500, "?" * 500, "a/" * 500, "https://", "\0", "..", "/", "?d=", "%00.jpg", "\ud800.jpg", "C:"):
        assert all(isinstance(one, str) for one in spellings(name))


def test_names_that_are_alike_are_found_by_name_before_by_stem(tmp_path, write_image):
    for name in ("a.jpg", "a.jpg.png"):
        write_image(tmp_path / name)
    folders = ImageFolders()
    assert folders.find(tmp_path / "A.JPG") == tmp_path / "a.jpg"
    assert folders.find(tmp_path / "a.jpg.bmp") == tmp_path / "a.jpg.png"


@pytest.mark.parametrize(
    ("boxes", "action", "kept"),
    [
        ({1: [(4, 5, 20, 10)], 2: [(5, 5, 20, 10)]}, "refused", []),
        ({1: [(4, 5, 20, 10)], 2: [(4, 5, 20, 10), (1, 1, 9, 9)]}, "refused", []),
        ({1: [(4, 5, 20, 10), (1, 1, 9, 9)], 2: [(1, 1, 9, 9), (4, 5, 20, 10)]}, "note", [1]),
        ({1: [], 2: [(4, 5, 20, 10)]}, "note", [2]),
        ({1: [], 2: []}, "note", [1]),
    ],
)
def test_one_file_under_two_ids(make_coco, boxes, action, kept):
    def same_file(content):
        content["images"][1]["file_name"] = "1.jpg"

    objects = [coco_object(image_id=image, bbox=box) for image, own in boxes.items() for box in own]
    annotations = load_annotations(make_coco(objects, num_images=3, edit=same_file), "train")
    assert [record.image_id for record in annotations.images] == [*kept, 3]
    [finding] = [finding for finding in annotations.findings if finding.kind == "duplicate-file"]
    assert finding.action == action
    assert annotations.num_images_left_out == (2 if action == "refused" else 0)


# ---- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("as_written", [float, lambda i: f"{i}.0", str, lambda i: f" {i} "], ids=range(4))
def test_ids_as_tables_write_them(make_coco, kinds, as_written):
    def edit(content):
        for entry in (*content["images"], *content["categories"]):
            entry["id"] = as_written(entry["id"])

    objects = [coco_object(), coco_object(image_id=2.0, category_id="7"), coco_object(image_id="2", category_id=7.0)]
    annotations = load_annotations(make_coco(objects, edit=edit), "train")
    assert [(record.image_id, record.labels.tolist()) for record in annotations.images] == [(1, [0]), (2, [1, 1])]
    assert [category.category_id for category in annotations.categories] == [3, 7]
    assert kinds(annotations) == {}


def test_ids_that_are_none(make_coco, kinds):
    def edit(content):
        content["images"] += [{"id": wrong, "file_name": "1.jpg"} for wrong in (True, None, [1], float("nan"))]

    objects = [coco_object(), coco_object(image_id=True), coco_object(category_id=False), coco_object(image_id={})]
    annotations = load_annotations(make_coco(objects, edit=edit), "train")
    assert [len(record.labels) for record in annotations.images] == [1, 0]
    assert kinds(annotations) == {
        "image-entry": "dropped",
        "image-unknown": "dropped",
        "category-unknown": "dropped",
    }
    for wrong in (True, 1.5, "x", None):
        with pytest.raises(InputError, match='integer "id"'):
            load_annotations(make_coco(categories=[{"id": wrong, "name": "cat"}]), "train")


def test_ids_that_fit_two_are_none(make_coco):
    def edit(content):
        content["images"][0]["id"], content["images"][1]["id"] = "01", "1"

    annotations = load_annotations(make_coco([coco_object(image_id=1), coco_object(image_id="01")], edit=edit), "train")
    assert [len(record.labels) for record in annotations.images] == [1, 0]


@pytest.mark.parametrize(
    ("written", "crowd"),
    [("0", False), ("1", True), ("0.0", False), (0.0, False), (1.0, True), ("false", False), ("True", True)]
    + [("", False), (None, False), (float("nan"), False), ([], False), (True, True)],
)
def test_iscrowd_as_text(make_coco, written, crowd):
    annotations = load_annotations(make_coco([coco_object(iscrowd=written), coco_object()]), "train")
    assert annotations.images[0].ignore.tolist() == [crowd, False]


def test_sizes_as_text_and_negative(make_coco):
    def edit(content):
        content["images"][0] |= {"width": "64", "height": "48.0"}
        content["images"][1] |= {"width": -64, "height": 48}

    annotations = load_annotations(make_coco(edit=edit), "train")
    assert [record.size_hw for record in annotations.images] == [(48, 64), (48, 64)]
    assert [(f.kind, f.count) for f in annotations.findings] == [("missing-size", 1)]


# ---- masks -----------------------------------------------------------------------------------------------------------


def runs_of(mask):
    flat = np.concatenate([[0], mask.T.reshape(-1), [0]])
    edges = np.flatnonzero(np.diff(flat))
    lengths = np.diff(np.concatenate([[0], edges, [mask.size]])).tolist()
    return lengths if lengths[-1] else lengths[:-1]


@pytest.mark.parametrize("kind", range(4))
def test_boxes_around_masks(kind):
    from pycocotools import mask as theirs

    rng = np.random.default_rng(kind)
    for _ in range(30):
        height, width = rng.integers(1, 40, 2)
        mask = np.zeros((height, width), dtype=np.uint8)
        y, x = rng.integers(height), rng.integers(width)
        if kind == 0:
            mask[y : y + rng.integers(1, 30), x : x + rng.integers(1, 30)] = 1
        elif kind == 1:
            mask[:] = rng.random(mask.shape) < rng.random()
        elif kind == 2:
            mask[:] = 1
        size = [int(height), int(width)]
        packed = theirs.encode(np.asfortranarray(mask))["counts"].decode()
        rows, columns = np.nonzero(mask)
        for counts in (packed, runs_of(mask)):
            box = box_of_mask({"size": size, "counts": counts})
            if not len(rows):
                assert box is None
            else:
                corner = (columns.min(), rows.min())
                assert box.tolist() == [*corner, columns.max() + 1 - corner[0], rows.max() + 1 - corner[1]]


@pytest.mark.parametrize(
    "segmentation",
    [None, 5, "x", [], [[]], [[1, 2, 3]], [None], {}, {"size": [2, 2]}, {"size": [2], "counts": "0"}]
    + [{"size": [2, 2], "counts": counts} for counts in ("", "~", "oooooooooooooo0", "é€", "o", [5], [1, -1, 4], [[4]])]
    + [{"size": [1e300, 2], "counts": [2]}, {"size": [2**40, 2**40], "counts": [0, 2**80]}, {"size": "ab", "counts": 1}]
    + [{"size": [float("nan"), 2], "counts": [0, 4]}, {"size": [2, 2], "counts": [0, 1.5, 2.5]}],
)
def test_broken_masks_have_no_box(segmentation):
    assert box_of_mask(segmentation) is None


def test_a_mask_stands_in_for_a_box(make_coco):
    mask = np.zeros((48, 64), dtype=int)
    mask[6:22, 8:28] = 1
    runs = {"size": [48, 64], "counts": runs_of(mask)}
    objects = [coco_object(bbox=(), segmentation=runs), coco_object(bbox=(), segmentation=runs | {"size": [64, 48]})]
    objects.append(coco_object(bbox=(), segmentation=[1, 2, 11, 2, 11, 9]))
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[8, 6, 28, 22], [1, 2, 11, 9]]
    assert [(f.kind, f.action) for f in annotations.findings] == [
        ("missing-box", action) for action in ("repaired", "dropped", "repaired")
    ]


@pytest.mark.parametrize("bbox", [(0, 0, 0, 0), (9, 9, 0, 12), (9, 9, 12, 0.0), (30, 20, -20, -12), None])
@pytest.mark.parametrize("as_runs", [False, True])
def test_a_mask_stands_in_for_a_box_without_area(make_coco, bbox, as_runs):
    mask = np.zeros((48, 64), dtype=int)
    mask[6:22, 8:28] = 1
    runs = {"size": [48, 64], "counts": runs_of(mask)}
    segmentation = runs if as_runs else [[8, 6, 28, 6, 28, 22, 8, 22]]
    written = coco_object(segmentation=segmentation) | {"bbox": bbox and list(bbox)}
    annotations = load_annotations(make_coco([coco_object(), written]), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[4, 5, 24, 15], [8, 6, 28, 22]]
    assert [(f.kind, f.action) for f in annotations.findings] == [("empty-box" if bbox else "missing-box", "repaired")]


@pytest.mark.parametrize("segmentation", [[], None, [[3, 3, 9, 3, 5, 3]], {"size": [64, 48], "counts": [0, 64 * 48]}])
def test_an_empty_box_without_a_mask_that_has_one_is_left_out(make_coco, kinds, segmentation):
    objects = [coco_object(), coco_object(bbox=(0, 0, 0, 0), segmentation=segmentation)]
    annotations = load_annotations(make_coco(objects), "train")
    assert kinds(annotations) == {"degenerate-box": "dropped"}


def mask_around(bbox, form="polygon"):
    x, y, w, h = bbox
    if form == "polygon":
        return [[x, y, x + w, y, x + w, y + h / 2], [x, y + h / 2, x + w, y + h]]
    mask = np.zeros((48, 64), dtype=int)
    mask[y : y + h, x : x + w] = 1
    return {"size": [48, 64], "counts": runs_of(mask)}


PLACES = [(4 + 5 * i, 2 + 3 * i, 14, 8 + i) for i in range(9)]


@pytest.mark.parametrize("form", ["polygon", "runs"])
@pytest.mark.parametrize("wrong", ["mirrored", "half"])
def test_boxes_that_contradict_their_masks(make_coco, form, wrong):
    def written(num_wrong):
        boxes = [
            box if i >= num_wrong else (64 - box[0] - box[2], *box[1:]) if wrong == "mirrored" else [v / 2 for v in box]
            for i, box in enumerate(PLACES)
        ]
        objects = [coco_object(bbox=b, segmentation=mask_around(p, form)) for b, p in zip(boxes, PLACES, strict=True)]
        return [(f.kind, f.action, f.count) for f in load_annotations(make_coco(objects), "train").findings]

    assert written(0) == []
    assert written(2) == [("box-contradicts-mask", "note", 2)]
    ((kind, action, _),) = written(9)
    assert (kind, action) == ("boxes-contradict-masks", "refused")


def test_what_settles_boxes_that_contradict_their_masks(make_coco):
    objects = [coco_object(bbox=(64 - x - w, y, w, h), segmentation=mask_around((x, y, w, h))) for x, y, w, h in PLACES]
    root = make_coco(objects)
    (finding,) = load_annotations(root, "train").findings
    assert "(46, 2, 60, 10) beside (4, 2, 18, 10) around the mask" in finding.message
    assert 'take "bbox" out of the annotations' in finding.message
    assert load_annotations(root, "train", boxes="xywh").findings == ()
    for obj in objects:
        del obj["bbox"]
    assert load_annotations(make_coco(objects), "train").images[0].boxes_xyxy[0].tolist() == [4, 2, 18, 10]
    corners = [coco_object(bbox=(x / 8, y / 2, x / 8 + 9, y / 2 + 4)) for x, y, _, _ in PLACES]  # as sizes they fit too
    for obj in corners:
        x1, y1, x2, y2 = obj["bbox"]
        obj["segmentation"] = [[x1, y1, x2, y1, x2, y2]]
    (finding,) = load_annotations(make_coco(corners), "train").findings
    assert "They agree when the boxes are read by --data.boxes xyxy; if" in finding.message


@pytest.mark.parametrize(
    "mask_of",
    [
        lambda x, y, w, h: (x + w / 3, y + h / 3, w / 3, h / 3),  # what is seen of it
        lambda x, y, w, h: (x + 2, y - 2, w, h),  # rounding
        lambda x, y, w, h: (x / 64, y / 48, w / 64, h / 48),  # fractions
        lambda x, y, w, h: (x * 3, y * 3, w * 3, h * 3),  # of the image before it was resized
        lambda x, y, w, h: (y, x, h, w),
        lambda x, y, w, h: (0, 0, w, h),  # counted from the box
        lambda x, y, w, h: (30, 40, 5, 5),  # the same for all
        lambda x, y, w, h: (min(x, w), min(y, h), abs(x - w), abs(y - h)),  # the numbers of the box as two points
    ],
)
def test_masks_that_say_nothing_of_boxes(make_coco, mask_of):
    objects = [coco_object(bbox=box, segmentation=mask_around(mask_of(*box))) for box in PLACES]
    assert load_annotations(make_coco(objects), "train").findings == ()


def test_of_many_boxes_some_are_compared_with_their_masks(make_coco, monkeypatch):
    monkeypatch.setattr("ddetr.datasets.readers.coco.content._COMPARED", 2)
    monkeypatch.setattr("ddetr.datasets.readers.coco.content._COMPARED_STEP", 3)
    objects = [coco_object(bbox=(x / 2, y, w, h), segmentation=mask_around((x, y, w, h))) for x, y, w, h in PLACES]
    objects[1]["segmentation"] = [[None]]
    (finding,) = load_annotations(make_coco(objects), "train").findings
    assert "2 of 3 boxes lie" in finding.message


# ---- encodings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "cp1252"])
def test_encodings(make_coco, kinds, encoding):
    root = make_coco(categories=[{"id": 3, "name": "Kätzchen"}])
    file = root / "annotations" / "instances_train.json"
    (root / "train.json").write_bytes(json.dumps(json.loads(file.read_text()), ensure_ascii=False).encode(encoding))
    file.unlink()
    annotations = load_annotations(root, "train")
    assert annotations.categories[0].name == "Kätzchen"
    assert kinds(annotations) == ({"encoding": "repaired"} if encoding == "cp1252" else {})


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_mark_that_stands_twice(make_coco, encoding):
    """Of a text that had one when it was written with one."""
    root = make_coco()
    file = root / "annotations" / "instances_train.json"
    file.write_bytes(f"\ufeff{file.read_text()}".encode(encoding))
    assert len(load_annotations(root, "train").images) == 2


def test_a_broken_encoding_is_one_sentence(make_coco):
    root = make_coco()
    file = root / "annotations" / "instances_train.json"
    file.write_bytes(file.read_text().encode("utf-16") + b"\0")
    with pytest.raises(InputError, match="can't be read"):
        load_annotations(root, "train")


# ---- layouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train_json", "val_json", "images", "names"),
    [
        ("custom_train.json", "custom_val.json", "{split}", ("train", "val")),
        ("annots/custom_train.json", "annots/custom_val.json", "images", ("train", "val")),
        ("annots/train.json", "annots/valid.json", "images/{split}", ("train", "valid")),
        ("labels/train.json", "labels/val.json", "images", ("train", "val")),
        ("annotation/a_train2017.json", "annotation/a_val2017.json", "images", ("train2017", "val2017")),
        ("Annotations/train_coco.json", "Annotations/val_coco.json", "img", ("train", "val")),
        ("train/train.json", "val/val.json", "{split}", ("train", "val")),
        ("train/annotations/x.json", "val/annotations/x.json", "{split}/images", ("train", "val")),
        ("annotations/train/x.json", "annotations/val/x.json", "images/{split}", ("train", "val")),
        ("annotations/instances_my_train.json", "annotations/instances_my_val.json", "{split}", ("train", "val")),
        ("train coco.json", "val coco.json", "images", ("train", "val")),
        ("annotations/custom_train.json", "annotations/custom_val.json", "{split}2017", ("train", "val")),
        (
            "annotations/person_keypoints_train.json",
            "annotations/person_keypoints_val.json",
            "{split}",
            ("train", "val"),
        ),
        ("annotations/train.json", "annotations/val.json", "images/{split}/data", ("train", "val")),
        ("set1_train.json", "set2_train.json", "images", None),
    ],
)
@pytest.mark.parametrize("wrapped", ["", "mine/", "a/mine/"])
def test_guessed_layouts(make_coco, tmp_path, write_image, train_json, val_json, images, names, wrapped):
    made = make_coco(root=tmp_path / "made") / "annotations" / "instances_train.json"
    top = tmp_path / "set"
    for file, split in zip((train_json, val_json), names or ("set1_train", "set2_train"), strict=True):
        place = top / wrapped / file
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made, place)
        for name in ("1.jpg", "2.jpg"):
            write_image(top / wrapped / images.format(split=split) / name)
    for extra in (top / "__MACOSX", top / ".git"):
        extra.mkdir()
    (top / wrapped / "._train.json").write_text('{"images": []}')
    if names is None:
        assert available_splits(top) == ["set1_train", "set2_train"]
        return
    assert default_splits(top) == names
    for split in names:
        annotations = load_annotations(top, split)
        assert [len(record.labels) for record in annotations.images] == [1, 0]
        assert annotations.findings == ()


def test_images_that_lie_in_one_of_many_folders_are_not_guessed(make_coco, kinds):
    """Below the usual folders, only the one folder that has them all is theirs."""
    root: Path = make_coco()
    (root / "train").rename(root / "data")
    (root / "data" / "a").mkdir()
    for name in ("1.jpg", "2.jpg"):
        (root / "data" / name).rename(root / "data" / "a" / name)
    assert len(load_annotations(root, "train").images) == 2
    shutil.copytree(root / "data" / "a", root / "data" / "b")
    assert kinds(load_annotations(root, "train")) == {"every-image-missing": "refused"}


@pytest.mark.parametrize(
    ("file", "names", "split"),
    [
        ("result.json", "images\\{}", "result"),
        ("result.json", "../../label-studio/data/media/upload/1/{}", "result"),
        ("annotations/instances_default.json", "{}", "default"),
        ("annotations.json", "images/{}", "annotations"),
        ("out/_annotations.coco.json", "{}", "out"),
    ],
)
def test_one_file_for_all(make_coco, file, names, split):
    def edit(content):
        for entry in content["images"]:
            entry["file_name"] = names.format(entry["file_name"])

    root: Path = make_coco(edit=edit)
    (root / file).parent.mkdir(exist_ok=True)
    (root / "annotations" / "instances_train.json").rename(root / file)
    (root / "train").rename(root / "images")
    assert default_splits(root) == (split, None)
    assert len(load_annotations(root, split).images) == 2


def test_a_folder_of_one_json_for_each_image_is_no_coco(tmp_path):
    (tmp_path / "labels").mkdir()
    for i in range(120):
        (tmp_path / "labels" / f"{i}.json").write_text('{"images": []}')
    with pytest.raises(InputError, match="no data set that is known"):
        available_splits(tmp_path)


def test_other_json_files_are_no_coco(make_yolo):
    root = make_yolo({"images/a.jpg": "0 .5 .5 .2 .2"})
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {}}')  # Label Studio's
    (root / "default.json").write_text('{"info": {}, "categories": {}, "items": [{"annotations": []}]}')  # Datumaro's
    assert detect_format(root) == "yolo"


def test_checkpoints_of_jupyter_are_no_split(make_coco):
    root = make_coco()
    for folder in ("train", ".ipynb_checkpoints"):
        (root / folder).mkdir(exist_ok=True)
        shutil.copy(root / "annotations" / "instances_train.json", root / folder / "_annotations.coco.json")
    shutil.rmtree(root / "annotations")
    assert available_splits(root) == ["train"]


def test_a_yolo_set_in_a_folder_of_its_own(make_yolo, tmp_path):
    make_yolo({f"images/{s}/a.jpg": "0 .5 .5 .2 .2" for s in ("train", "val")}, root=tmp_path / "zip" / "mine")
    assert default_splits(tmp_path / "zip") == ("train", "val")
    assert len(load_annotations(tmp_path / "zip", "train").images) == 1


# ---- ids and boxes of other shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("listed", "used", "said"),
    [
        ((1, 2, 3), (0, 1, 2), "ids are 0 to 2, those of the categories 1 to 3"),
        (
            (0, 1, 2),
            (1, 2, 3, 3),
            "Subtract 1 from the category ids of the objects, or add 1 to those of the categories",
        ),
        ((1, 2), ("0", 1.0), "ids are 0, 1, those of the categories 1, 2"),
        ((1, 2, 3, 4), (0, 2), "Add 1 to the category ids of the objects, or subtract 1 from those of the categories"),
        ((1, 2, 3), (1, 3), None),
        ((1, 2, 3), (1, 2, 3, 4), None),
        ((0, 1, 2), (0, 1, 9), None),
    ],
    ids=str,
)
def test_category_ids_off_by_one_stop(make_coco, listed, used, said):
    categories = [{"id": i, "name": f"c{i}"} for i in listed]
    objects = [coco_object(category_id=i, bbox=(1 + k, 1, 9, 9)) for k, i in enumerate(used)]
    findings = load_annotations(make_coco(objects, categories=categories), "train").findings
    found = [(f.action, f.message) for f in findings if f.kind == "ids-off-by-one"]
    assert [action for action, _ in found] == ["refused"] * (said is not None)
    assert said is None or said in found[0][1]


def test_a_box_of_another_shape_is_shown(make_coco):
    shapes = [{"x": 1, "y": 2, "size": [3, 4]}, [[1, 2], [3, 4]], "left", "[1, 2, 3]", None]
    objects = [coco_object(bbox=()) | {"bbox": shape} for shape in shapes]
    objects += [coco_object(bbox=()) | {"bbox": text} for text in ("[1, 2, 30, 40]", "1,2,20,20", " (1.0, 2, 9, 9) ")]
    annotations = load_annotations(make_coco(objects), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[1, 2, 31, 42], [1, 2, 21, 22], [1, 2, 10, 11]]
    messages = [f.message for f in annotations.findings if (f.kind, f.action) == ("missing-box", "dropped")]
    assert len(messages) == len(shapes)
    for shape, message in zip(shapes[:-1], messages, strict=False):
        assert f'Its "bbox" is {shape!r}; expected [x, y, width, height].' in message
    assert 'There is no "bbox"' in messages[-1]


# ---- several files of one split --------------------------------------------------------------------------------------


@pytest.fixture
def write_part(tmp_path, write_image):
    """Writes a COCO file below tmp_path / "set" with these images, of which each has one cat and one dog."""

    def write(file, names, ids=None, categories=((1, "cat"), (2, "dog")), folder="images", **changes):
        of_name = {name: i for i, name in categories}
        ids = ids or range(1, len(names) + 1)
        content = {"images": [], "annotations": [], "categories": [{"id": i, "name": n} for i, n in categories]}
        for image_id, name in zip(ids, names, strict=True):
            write_image(tmp_path / "set" / folder / name, seed=len(name))
            content["images"].append({"id": image_id, "file_name": name, "width": 64, "height": 48})
            for class_name, box in (("cat", (4, 5, 20, 10)), ("dog", (30, 5, 10, 20))):
                if class_name in of_name:
                    obj = coco_object(image_id, of_name[class_name], box, id=len(content["annotations"]))
                    content["annotations"].append(obj)
        path = tmp_path / "set" / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content | changes))
        return tmp_path / "set"

    return write


def objects_of(annotations):
    """File name -> class of each object with the left side of its box."""
    names = [category.name for category in annotations.categories]
    return {
        record.path.name: {names[label]: box[0] for label, box in zip(record.labels, record.boxes_xyxy.tolist())}
        for record in annotations.images
    }


BOTH = {"cat": 4, "dog": 30}


@pytest.mark.parametrize(
    ("place", "folder", "split", "count"),
    [
        ("{}.json", "", "all", 3),
        ("annotations/{}.json", "images", "all", 120),
        ("train/{}.json", "train", "train", 3),
        ("train/annotations/{}.json", "train/images", "train", 3),
        ("annotations/train/{}.json", "images/train", "train", 3),
        ("annotations/{}_coco.json", "images", "all", 3),
    ],
)
def test_a_file_for_each_image_is_one_split(write_part, kinds, place, folder, split, count):
    for i in range(count):
        root = write_part(place.format(f"IMG_{i}"), [f"IMG_{i}.jpg"], ids=[i], folder=folder)
    assert detect_format(root) == "coco"
    assert (available_splits(root), default_splits(root)) == ([split], (split, None))
    annotations = load_annotations(root, split)
    assert objects_of(annotations) == {f"IMG_{i}.jpg": BOTH for i in range(count)}
    assert sorted(record.image_id for record in annotations.images) == list(range(count))
    assert kinds(annotations) == {}


def test_each_file_numbers_for_itself(write_part, kinds):
    """Images, categories and objects from 1 in each file, as a converter of single images does."""
    root = write_part("a.json", ["a.jpg"], categories=[(1, "cat")])
    write_part("b.json", ["b.jpg"], categories=[(1, "dog"), (2, "cat")])
    write_part("c.json", ["c.jpg"], categories=[(1, "dog")])
    annotations = load_annotations(root, "all")
    assert objects_of(annotations) == {"a.jpg": {"cat": 4}, "b.jpg": BOTH, "c.jpg": {"dog": 30}}
    assert [(category.category_id, category.name) for category in annotations.categories] == [(1, "cat"), (2, "dog")]
    assert kinds(annotations) == {"image-ids-repeat": "note", "categories-differ": "repaired"}


def test_what_contradicts_is_refused(write_part, kinds):
    root = write_part("a.json", ["a.jpg"])
    write_part("b.json", ["b.jpg"], ids=[2], categories=[(1, "dog"), (2, "cat")])
    write_part("c.json", ["c.jpg"], ids=[3], categories=[])
    nameless = {"image_id": 3, "category_id": 1, "bbox": [1, 1, 9, 9], "area": 81, "iscrowd": 0, "id": 1}
    write_part("c.json", ["c.jpg"], ids=[3], categories=[], annotations=[nameless])
    annotations = load_annotations(root, "all")
    assert kinds(annotations) == {"categories-differ": "refused", "category-unknown": "dropped"}
    write_part("c.json", ["c.jpg"], ids=[3], categories=[(1, "cat"), (2, "cat")])
    assert kinds(load_annotations(root, "all")) == {"categories-differ": "refused"}


def test_one_image_in_two_files(write_part, kinds):
    root = write_part("a.json", ["a.jpg"])
    write_part("b.json", ["a.jpg"])
    assert kinds(load_annotations(root, "all")) == {"image-ids-repeat": "note", "duplicate-file": "note"}
    write_part("b.json", ["a.jpg"], categories=[(1, "cat"), (2, "bird")])
    assert kinds(load_annotations(root, "all"))["duplicate-file"] == "refused"


def test_a_broken_file_among_those_of_images(write_part, kinds):
    for name in "abc":
        root = write_part(f"{name}.json", [f"{name}.jpg"], ids=[ord(name)])
    (root / "b.json").write_text("{")
    (root / "classes.json").write_text('["cat", "dog"]')
    annotations = load_annotations(root, "all")
    assert list(objects_of(annotations)) == ["a.jpg", "c.jpg"]
    assert kinds(annotations) == {"malformed-json": "dropped", "other-json": "note", "unlisted-images": "note"}
    assert annotations.num_images_left_out == 1


def test_objects_without_an_image_id_are_those_of_the_one_image(write_part, kinds):
    root = write_part("a.json", ["a.jpg"])
    nameless = {"category_id": 1, "bbox": [4, 5, 20, 10], "area": 200, "iscrowd": 0, "id": 1}
    write_part("b.json", ["b.jpg"], annotations=[nameless])
    annotations = load_annotations(root, "all")
    assert objects_of(annotations) == {"a.jpg": BOTH, "b.jpg": {"cat": 4}}
    assert kinds(annotations) == {"image-ids-repeat": "note"}


@pytest.mark.parametrize(
    ("names", "split"),
    [
        (("train_0", "train_1"), "train"),
        (("instances_train_part1", "instances_train_part2"), "train"),
        (("train-00000-of-00002", "train-00001-of-00002"), "train"),
        (("part1", "part2"), "all"),
        (("annotations/instances_train1", "annotations/instances_train2"), "train"),
        (("train/part_1", "train/part_2"), "train"),
    ],
)
def test_parts_of_a_split_are_one(write_part, kinds, names, split):
    for i, name in enumerate(names):
        root = write_part(f"{name}.json", [f"{i}a.jpg", f"{i}b.jpg"], ids=[2 * i, 2 * i + 1])
    assert default_splits(root) == (split, None)
    annotations = load_annotations(root, split)
    assert objects_of(annotations) == {f"{i}{letter}.jpg": BOTH for i in range(2) for letter in "ab"}
    assert kinds(annotations) == {}
    alone = load_annotations(root, Path(names[1]).name)  # each by its own name
    assert sorted(objects_of(alone)) == ["1a.jpg", "1b.jpg"]


def test_files_that_share_images_are_no_parts(write_part, kinds):
    root = write_part("train_0.json", ["a.jpg", "b.jpg"])
    write_part("train_1.json", ["b.jpg", "c.jpg"])
    write_part("val.json", ["d.jpg"])
    assert default_splits(root) == ("train", "val")
    assert kinds(load_annotations(root, "train"))["parts-overlap"] == "refused"
    (root / "train_1.json").write_text((root / "train_1.json").read_text()[:-9])
    assert kinds(load_annotations(root, "train"))["malformed-json"] == "refused"


@pytest.mark.parametrize("prefix", ["", "instances_"])
def test_equal_names_in_the_folders_of_parts_are_several_images(write_part, write_image, kinds, prefix):
    for i in range(2):
        root = write_part(f"annotations/{prefix}train_{i}.json", ["a.jpg", "b.jpg"], folder=f"images/train_{i}")
        for name in "ab":
            write_image(root / f"images/train_{i}/{name}.jpg", seed=2 * i + ord(name))
    annotations = load_annotations(root, "train")
    found = [record.path.relative_to(root / "images").as_posix() for record in annotations.images]
    assert found == ["train_0/a.jpg", "train_0/b.jpg", "train_1/a.jpg", "train_1/b.jpg"]
    assert [len(record.labels) for record in annotations.images] == [2] * 4
    assert kinds(annotations) == {"image-ids-repeat": "note"}
    write_image(root / "images/train_1/b.jpg", seed=ord("b"))  # the same picture again
    assert kinds(load_annotations(root, "train"))["parts-overlap"] == "refused"
    (root / "images/train_1/b.jpg").unlink()
    assert kinds(load_annotations(root, "train"))["parts-overlap"] == "refused"


@pytest.mark.parametrize(
    "names", [("train2014", "train2017"), ("train_v1", "train_v2"), ("train_fold1", "train_fold2"), ("seq1", "seq2")]
)
def test_what_is_numbered_otherwise_is_no_part(write_part, names):
    for i, name in enumerate(names):
        root = write_part(f"{name}.json", [f"{i}a.jpg", f"{i}b.jpg"])
    assert available_splits(root) == list(names)


def test_numbered_splits_of_other_formats_are_not_left_out_without_a_word(tmp_path, write_image):
    for i in range(2):
        write_image(tmp_path / f"{i}.jpg", seed=i)
        (tmp_path / f"train_{i}.csv").write_text(f"filename,class,xmin,ymin,xmax,ymax\n{i}.jpg,cat,4,5,20,10\n")
    with pytest.raises(InputError, match="train_0, train_1, which look like parts of one split"):
        load_splits(TrainingSource(str(tmp_path)))
    train, _ = load_splits(TrainingSource(str(tmp_path), train_split="train_1"))
    assert [record.path.name for record in train.images] == ["1.jpg"]


@pytest.mark.parametrize(
    ("key", "written"), [("annotations", "annotation"), ("annotations", "Annotations"), ("categories", "category")]
)
def test_lists_under_another_spelling_of_their_key(make_coco, kinds, key, written):
    root = make_coco(edit=lambda content: content.update({written: content.pop(key)}))
    annotations = load_annotations(root, "train")
    assert [category.name for category in annotations.categories] == ["cat", "dog"]
    assert sum(len(record.labels) for record in annotations.images) == 1
    assert kinds(annotations) == {"other-key": "repaired"}


def test_entries_by_their_ids(make_coco):
    """LIVECell's annotations are an object whose keys are ids; so may images be, without an id of their own."""

    def edit(content):
        content["annotations"] = {str(obj["id"]): obj for obj in content["annotations"]}
        content["images"] = {str(image.pop("id")): image for image in content["images"]}

    annotations = load_annotations(make_coco([coco_object(), coco_object(image_id=2)], edit=edit), "train")
    assert [(image.image_id, len(image.labels)) for image in annotations.images] == [(1, 1), (2, 1)]

"""One data set made wrong for each thing that the audit must say."""

import importlib
import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
from dataset_parts import coco_object
from PIL import Image
from rich.console import Console

from ddetr.datasets import Finding, audit, load_annotations
from ddetr.datasets.audit_report import things
from ddetr.datasets.decoding import spread

audit_module = importlib.import_module("ddetr.datasets.audit")  # the function of its name stands in its place


def audited(root, **options):
    train = load_annotations(root, "train")
    val = load_annotations(root, "val", categories=train.categories) if (root / "val").is_dir() else None
    return audit(train, val, **options)


def both(root):
    train = load_annotations(root, "train")
    return train, load_annotations(root, "val", categories=train.categories)


def printed(report, width=160):
    console = Console(file=io.StringIO(), width=width)
    console.print(report.render())
    return console.file.getvalue()


def test_a_sound_data_set(make_coco):
    root = make_coco(
        [coco_object(), coco_object(category_id=7, iscrowd=1), coco_object(category_id=7, image_id=2)], num_images=3
    )
    make_coco(split="val", num_images=1)
    report = audited(root, decode=True)
    assert report.refused == ()
    assert report.findings == ()
    assert report.train.class_counts == (1, 1)
    assert (report.train.num_images, report.train.num_objects, report.train.num_ignored) == (3, 2, 1)
    assert report.train.num_without_objects == 1
    assert (report.train.objects_p50, report.train.objects_max) == (1, 1)
    assert report.val.num_images == 1
    text = printed(report)
    for words in ("training images", "set/train (coco)", "300 queries", "nothing to repair", "Training may start."):
        assert words in text


def test_report_as_json_holds_every_place(make_coco):
    root = make_coco([coco_object(bbox=(1, 1, 0, 5), id=i) for i in range(9)] + [coco_object(id=50)])
    report = audited(root)
    content = json.loads(json.dumps(report.to_dict()))
    assert content["ok"] is True
    [group] = [group for group in content["findings"] if group["kind"] == "degenerate-box"]
    assert (group["action"], group["count"], len(group["places"])) == ("dropped", 9, 9)
    assert content["categories"] == [{"category_id": 3, "name": "cat"}, {"category_id": 7, "name": "dog"}]
    assert content["train"]["num_objects"] == 1
    text = printed(report)
    assert "annotation id 2 (1.jpg)" in text
    assert "annotation id 3 (1.jpg)" not in text
    assert "and 6 more places" in text


def test_gapped_ids_are_no_finding(make_coco):
    assert [f.kind for f in audited(make_coco([coco_object(), coco_object(category_id=7)])).findings] == []


@pytest.mark.parametrize(
    ("wrong", "kind", "action"),
    [
        ({"bbox": [1, 1, float("nan"), 5]}, "nan-box", "refused"),
        ({"bbox": [1, 1, 0, 5]}, "degenerate-box", "dropped"),
        ({"bbox": [50, 1, 50, 5]}, "box-clipped", "repaired"),
        ({"bbox": [90, 1, 5, 5]}, "box-outside-image", "dropped"),
        ({"category_id": 4}, "category-unknown", "dropped"),
        ({"image_id": 4}, "image-unknown", "dropped"),
        ({"area": None, "bbox": [4, 5, 20, 11]}, "missing-area", "repaired"),
        ({}, "repeated-object", "note"),
    ],
)
def test_wrong_objects(make_coco, wrong, kind, action):
    root = make_coco([coco_object(), coco_object(category_id=7), coco_object(**{"id": 9, **wrong})])
    report = audited(root)
    assert [(f.kind, f.action) for f in report.findings] == [(kind, action)]
    assert bool(report.refused) == (action == "refused")
    if action != "note":
        assert "annotation id 9" in printed(report)
        assert audited(root, strict=True).refused
        assert "--strict" in printed(audited(root, strict=True))


def test_repeated_objects(make_coco):
    """Of another class, in another image or a little beside they are objects of their own."""
    others = [coco_object(category_id=7), coco_object(image_id=2), coco_object(bbox=(4, 5, 20, 10.01))]
    root = make_coco([coco_object(), *others])
    assert audited(root).findings == ()
    root = make_coco([coco_object(), *others, *(coco_object(), coco_object(image_id=2), coco_object())])
    [finding] = audited(root).findings
    assert (finding.kind, finding.action, finding.count) == ("repeated-object", "note", 3)
    assert finding.where.endswith("1.jpg")
    assert "the cat at (4, 5, 24, 15)" in finding.message


def test_objects_that_are_all_or_mostly_ignored(make_coco):
    """Some tools mark every object as a crowd, or as difficult."""
    crowds = [coco_object(bbox=(4, 5, 20, 11 + i), iscrowd=1) for i in range(3)]
    [finding] = audited(make_coco(crowds)).refused
    assert finding.kind == "no-objects"
    assert "all 3 are marked" in finding.message
    sound = [coco_object(category_id=i) for i in (3, 7)]
    [finding] = audited(make_coco([*crowds, *sound])).findings
    assert (finding.kind, finding.action, finding.count) == ("mostly-ignored", "note", 3)
    assert audited(make_coco([*crowds[1:], *sound])).findings == ()


def test_no_images_no_objects_no_classes(make_coco):
    def kinds_refused(root):
        return {finding.kind for finding in audited(root).refused}

    root = make_coco([])
    assert kinds_refused(root) == {"no-objects"}
    assert "Refused: 1 thing must be put right first." in printed(audited(root))
    root = make_coco([coco_object(iscrowd=1)])
    assert kinds_refused(root) == {"no-objects"}
    root = make_coco([], edit=lambda content: content.update(images=[], categories=[]))
    assert kinds_refused(root) == {"no-images", "no-classes"}
    root = make_coco()
    shutil.rmtree(root / "train")
    assert kinds_refused(root) == {"every-image-missing", "no-images"}


def test_a_validation_split_none_of_whose_classes_is_known_is_refused(make_coco):
    """It is another data set's, or its classes are called otherwise: every object would be left out."""
    root = make_coco([coco_object(), coco_object(category_id=7)])
    make_coco([coco_object(), coco_object(bbox=(1, 2, 9, 9))], split="val", categories=[{"id": 3, "name": "Katze"}])
    [finding] = audited(root).refused
    assert (finding.kind, finding.count) == ("no-class-of-training", 2)
    others = [{"id": 3, "name": "Katze"}, {"id": 7, "name": "dog"}]
    make_coco([coco_object(), coco_object(category_id=7)], split="val", categories=others)
    assert audited(root).refused == ()


def test_validation_images_with_the_boxes_of_training_images(make_yolo):
    """They are copies of these, saved once more, or the labels are."""
    rows = [f"0 .5 .5 .2 0.{i}" for i in range(1, 9)]
    labels = {f"images/{split}/{split}{i}.jpg": rows[i] for split in ("train", "val") for i in range(4)}
    yaml = "train: images/train\nval: images/val\nnames: [cat]\n"
    [finding] = audit(*both(make_yolo(labels, data_yaml=yaml))).findings
    assert (finding.kind, finding.action, finding.count) == ("same-boxes-across-splits", "note", 4)


def test_what_is_found_in_the_file_of_both_splits_is_told_once(make_yolo):
    root = make_yolo(
        {f"images/{split}/{split}.jpg": "0 .5 .5 .2 .2" for split in ("train", "val")},
        data_yaml="train: images/train\nval: images/val\nnc: 8\nnames: [cat]\n",
    )
    assert [finding.kind for finding in audit(*both(root)).findings] == ["nc-differs"]


@pytest.mark.parametrize("others", [[], ["x.jpg", "y.jpg"]], ids=len)
def test_images_of_the_other_split_are_not_called_unused(make_coco, write_image, others):
    """Both splits' images in one folder: each of their files lists a part of them."""
    root = make_coco(num_images=3)
    for split, numbers in (("train", "12"), ("val", "3")):
        content = json.loads((root / "annotations" / "instances_train.json").read_text())
        content["images"] = [image for image in content["images"] if image["file_name"][0] in numbers]
        content["annotations"] = []
        (root / "annotations" / f"instances_{split}.json.new").write_text(json.dumps(content))
    for split in ("train", "val"):
        place = root / "annotations" / f"instances_{split}.json"
        place.with_name(f"{place.name}.new").rename(place)
    (root / "train").rename(root / "images")
    for seed, name in enumerate(others, 7):
        write_image(root / "images" / name, seed=seed)
    found = [finding for finding in audit(*both(root)).findings if finding.kind == "unlisted-images"]
    assert [finding.count for finding in found] == [2] * bool(others)
    assert all("such as x.jpg" in finding.message for finding in found)


def test_a_validation_split_without_objects_is_a_note(make_coco):
    root = make_coco([coco_object(), coco_object(category_id=7)])
    make_coco([], split="val")
    report = audited(root)
    assert [(f.kind, f.action) for f in report.findings] == [("no-objects", "note")]


def test_nearly_all_images_without_objects_are_a_note(make_yolo, kinds):
    def found(num_objects, text="0 0.5 0.5 1 1\n"):
        labels = {f"images/train/{i}.jpg": text if i < num_objects else "" for i in range(10)}
        return kinds(audited(make_yolo(labels, data_yaml="names: [cat]\n")))

    assert found(1) == {"mostly-empty": "note"}
    assert found(2) == {}
    assert found(10) == {"whole-image-boxes": "note"}
    missing = {f"images/train/{i}.jpg": None for i in range(20)} | {"images/train/0.jpg": "0 .5 .5 .2 .2\n"}
    root = make_yolo(missing, make_yolo({}).parent / "missing", "names: [cat]\n")
    assert kinds(audited(root)) == {"image-without-labels": "note"}


def test_classes_without_objects(make_coco):
    root = make_coco([coco_object()])
    make_coco([coco_object(category_id=7)], split="val")
    [finding] = audited(root).findings
    assert (finding.kind, finding.action) == ("class-only-in-validation", "note")
    assert "dog (id 7)" in finding.where
    shutil.rmtree(root / "val")
    assert [f.kind for f in audited(root).findings] == ["class-without-objects"]


def test_other_categories_in_validation_are_refused(make_coco):
    train = load_annotations(make_coco(), "train")
    val = load_annotations(make_coco(split="val", categories=[{"id": 3, "name": "cat"}]), "val")
    assert "categories-differ" in {finding.kind for finding in audit(train, val).refused}


def test_more_objects_than_queries_or_detections(make_coco):
    crowd = [coco_object(image_id=2, bbox=(i, 5, 20, 10)) for i in range(6)]
    root = make_coco([coco_object(), coco_object(category_id=7), *crowd])
    report = audited(root, num_queries=5, max_detections=4)
    [finding] = report.findings
    assert (finding.kind, finding.action) == ("more-objects-than-queries", "note")
    assert finding.where.endswith("2.jpg")
    assert "6 objects" in finding.message
    assert [f.kind for f in audited(root, num_queries=6, max_detections=4).findings] == ["more-objects-than-detections"]
    assert audited(root, num_queries=6, max_detections=6).findings == ()


def test_duplicates_between_training_and_validation(make_coco):
    root = make_coco([coco_object(), coco_object(category_id=7)], num_images=3)
    make_coco(split="val")
    shutil.copy(root / "train" / "3.jpg", root / "val" / "1.jpg")
    same_size = bytearray((root / "train" / "2.jpg").read_bytes())
    same_size[len(same_size) // 2] ^= 1
    (root / "val" / "2.jpg").write_bytes(same_size)
    report = audited(root)
    [finding] = report.findings
    assert (finding.kind, finding.action) == ("duplicate-across-splits", "note")
    assert finding.where.endswith("val/1.jpg")
    assert "train/3.jpg" in finding.message


def test_the_same_split_twice_is_all_duplicates(make_coco):
    train = load_annotations(make_coco(), "train")
    assert sum(f.kind == "duplicate-across-splits" for f in audit(train, train).findings) == 2


def test_truncated_images_are_found_by_decoding(make_coco, write_image):
    root = make_coco([coco_object(), coco_object(category_id=7)], num_images=70)
    path = root / "train" / "2.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    assert audited(root).refused == ()
    seen = []
    report = audited(root, decode=True, progress=lambda done, total: seen.append((done, total)))
    [finding] = report.refused
    assert (finding.kind, finding.where) == ("unreadable-image", str(path))
    assert "truncated" in finding.message
    assert seen == [(64, 70), (70, 70)]


def test_an_image_that_vanished_after_reading(make_coco):
    root = make_coco([coco_object(), coco_object(category_id=7)])
    train = load_annotations(root, "train")
    (root / "train" / "2.jpg").unlink()
    assert [(f.kind, f.where[-5:]) for f in audit(train).refused] == [("missing-image", "2.jpg")]


def test_turned_images_are_reported(make_coco, write_image):
    root = make_coco([coco_object(), coco_object(category_id=7)])
    write_image(root / "train" / "1.jpg", orientation=6)
    [finding] = audited(root, decode=True).findings
    assert (finding.kind, finding.action) == ("orientation", "repaired")


def test_two_degenerate_boxes_of_a_voc_set_are_named(cells):
    train = load_annotations(cells, "train")
    report = audit(train, load_annotations(cells, "val", categories=train.categories), decode=True)
    assert report.refused == ()
    text = printed(report)
    assert "Annotations/Cell_00003.xml, object 4" in text
    assert "Annotations/Cell_00014.xml, object 6" in text
    assert report.train.class_counts == (12, 107, 12)
    assert report.train.objects_max == 11
    [group] = [group for group in report.to_dict()["findings"] if group["kind"] == "degenerate-box"]
    assert (group["action"], group["count"]) == ("dropped", 2)


def test_a_coco_set_without_fault_has_no_findings(any_coco):
    train = load_annotations(any_coco, "train2017")
    report = audit(train, load_annotations(any_coco, "val2017", categories=train.categories))
    assert report.findings == ()
    counts = [(part.num_objects, part.num_ignored) for part in (report.train, report.val)]
    assert counts == ([(699, 6), (804, 11)] if any_coco.name == "coco_tiny" else [(93, 4), (111, 4)])
    assert "60 more classes" in printed(report)


def test_rare_classes_are_shown(make_coco):
    """Twenty classes are shown all; of more, the most frequent and the rarest."""
    for num_classes in (20, 24):
        categories = [{"id": i, "name": f"kind{i:02d}"} for i in range(num_classes)]
        objects = [coco_object(category_id=i) for i in range(num_classes) for _ in range(num_classes - i)]
        report = printed(audited(make_coco(objects, categories=categories)))
        shown = [f"kind{i:02d}" in report for i in range(num_classes)]
        assert shown == [num_classes == 20 or i < 12 or i >= 16 for i in range(num_classes)]
        assert ("4 more classes" in report) == (num_classes == 24)


def test_the_table_fits_a_narrow_terminal(make_coco):
    report = audited(make_coco([coco_object(bbox=(1, 1, 0, 5)), coco_object()]))
    assert max(len(line) for line in printed(report, width=80).splitlines()) <= 80


def test_truncated_images_are_judged_by_what_training_does(make_coco, write_image):
    """By default `ddetr data audit` decodes some thousands: training lets others stand in, validation leaves out."""
    objects = [coco_object(), coco_object(category_id=7)]
    root = make_coco(objects, num_images=4)
    make_coco(objects, split="val", num_images=3, root=root)
    for name in ("train/2.jpg", "val/3.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:-2])
    train = load_annotations(root, "train")
    val = load_annotations(root, "val", categories=train.categories)

    def found(**options):
        report = audit(train, val, **options)
        return [(f.action, f.where[-11:].lstrip("/")) for f in report.findings if f.kind == "unreadable-image"]

    assert found() == []
    assert found(decode="auto") == [("dropped", "t/val/3.jpg"), ("note", "train/2.jpg")]
    assert found(decode="val") == [("dropped", "t/val/3.jpg")]
    assert [action for action, _ in found(decode=True)] == ["refused", "refused"]
    assert [action for action, _ in found(decode="val", on_bad_image="raise")] == ["refused"]
    for name in ("train/1.jpg", "val/1.jpg", "val/2.jpg"):
        (root / name).write_bytes((root / name).read_bytes()[:-2])
    assert {action for action, _ in found(decode="auto")} == {"refused"}  # more than training takes; all of validation


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "webp", "tif", "bmp"])
def test_every_format_that_is_cut_is_found(make_yolo, write_image, suffix):
    root = make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"})
    path = write_image(root / "images/train" / f"b.{suffix}", size_wh=(256, 192))
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    found = audit(load_annotations(root, "train"), decode="auto").findings
    [problem] = [finding.message for finding in found if finding.kind == "unreadable-image"]
    assert f"b.{suffix}" in problem


def test_what_was_not_decoded_is_said(make_coco, monkeypatch):
    train = load_annotations(make_coco(num_images=9), "train")
    monkeypatch.setitem(audit_module._DECODED, "auto", (4, 60))
    [finding] = [f for f in audit(train, decode="auto").findings if f.kind == "not-decoded"]
    assert finding.message.startswith("Decoded 4 of 9 training images, spread evenly")
    assert finding.count == 5
    monkeypatch.setitem(audit_module._DECODED, "auto", (40, -1))
    assert "Decoded 0 of 9" in printed(audit(train, decode="auto"))
    assert spread(9, None) == list(range(9))
    assert sorted(spread(9, 4)) == [0, 3, 5, 8]
    assert spread(0, 4) == []


def test_strips_and_specks_are_notes(make_yolo, write_image):
    root = make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"})
    write_image(root / "images/train/strip.png", size_wh=(2400, 2))
    write_image(root / "images/train/speck.png", size_wh=(3, 2))
    found = {f.kind: f for f in audit(load_annotations(root, "train")).findings if f.action == "note"}
    assert "2400 x 2 pixels, a strip" in found["thin-image"].message
    assert found["tiny-image"].where.endswith("speck.png")
    assert len(audit(load_annotations(root, "train")).refused) == 0


def test_images_that_are_nearly_black_are_named(make_coco):
    """12 bits in files of 16; at training and prediction alike nothing is stretched by the content of one image."""
    root = make_coco(num_images=3)
    for name in ("1.jpg", "3.jpg"):
        pixels = np.random.default_rng(0).integers(0, 4096, (48, 64)).astype(np.uint16)
        Image.fromarray(pixels).save(root / "train" / name, format="PNG")
    train = load_annotations(root, "train")
    [finding] = [finding for finding in audit(train, decode=True).findings if finding.kind == "dark-images"]
    assert (finding.action, finding.count) == ("note", 2)
    assert finding.where == str(root / "train" / "1.jpg")
    assert "2 of 3 decoded images are nearly black" in finding.message
    assert "multiply them by 64 or 16" in finding.message


def test_a_black_image_among_many_is_none_of_12_bits(make_coco):
    root = make_coco(num_images=21)
    Image.new("RGB", (64, 48)).save(root / "train" / "1.jpg")
    report = audit(load_annotations(root, "train"), decode=True)
    assert "dark-images" not in {finding.kind for finding in report.findings}


def test_things_are_counted_as_the_table_counts_them():
    one = Finding("a", "refused", "x", "It is.")
    assert [things(findings) for findings in ([], [one], [one, replace(one, count=1233)])] == [
        "0 things",
        "1 thing",
        "1,234 things",
    ]

"""A validation split is held back where a data set has none; which images, their names decide."""

import json
import logging
import shutil
from pathlib import Path

import numpy as np
import pytest
from dataset_parts import coco_object, voc_object, voc_xml

from ddetr.datasets import audit, available_splits
from ddetr.datasets.config import DataSource, TrainingSource
from ddetr.datasets.splits import image_names, load_split, load_splits, no_validation
from ddetr.errors import InputError


def names(annotations, root: Path) -> list[str]:
    return [Path(name).name for name in image_names(annotations, root)]


@pytest.fixture
def flat(make_coco):
    """Forty images with an object each; class 7 is in the first two alone."""
    objects = [coco_object(image_id=i, category_id=7 if i < 3 else 3) for i in range(1, 41)]
    return make_coco(objects, num_images=40)


def test_without_a_validation_split_training_is_read_and_the_cure_is_named(flat):
    train, val = load_splits(TrainingSource(str(flat)))
    assert len(train.images) == 40
    assert val is None
    report = audit(train, val)
    assert not report.refused
    assert "--data.val_fraction 0.1" in str(report.render().caption)
    with pytest.raises(InputError, match=r"no validation split.*it has train.*--data\.val_fraction 0\.1"):
        load_split(TrainingSource(str(flat)), "val")
    assert "--data.val_split" in str(no_validation(TrainingSource(str(flat))))


def test_a_training_split_of_any_name_needs_no_validation_split(make_coco):
    root = make_coco(split="photos")
    make_coco(split="more", root=root)
    with pytest.raises(InputError, match=r"splits more, photos: none is called train; --data\.train_split"):
        load_splits(TrainingSource(str(root)))
    train, val = load_splits(TrainingSource(str(root), train_split="photos"))
    assert (train.name, val) == ("set/photos", None)


def test_a_fraction_is_held_back_the_same_each_time(flat):
    source = TrainingSource(str(flat), val_fraction=0.1)
    train, val = load_splits(source)
    assert (len(train.images), len(val.images)) == (36, 4)
    assert not set(names(train, flat)) & set(names(val, flat))
    assert val.categories == train.categories
    again = load_split(source, "val", categories=train.categories)
    assert names(again, flat) == names(val, flat)
    others = load_split(TrainingSource(str(flat), val_fraction=0.1, split_seed=1), "val")
    assert names(others, flat) != names(val, flat)


def test_training_keeps_an_image_of_each_class(flat):
    for seed in range(20):
        train, val = load_splits(TrainingSource(str(flat), val_fraction=0.5, split_seed=seed))
        assert len(val.images) == 20
        of_dog = train.categories.index(next(c for c in train.categories if c.name == "dog"))
        assert any(of_dog in record.labels for record in train.images)


def test_images_that_were_held_back_stay_so_and_new_ones_are_trained_on(flat, write_image):
    source = TrainingSource(str(flat), val_fraction=0.1)
    _, val = load_splits(source)
    held_back = image_names(val, flat)
    less = TrainingSource(str(flat), val_fraction=0.1, split_seed=5)
    train, again = load_splits(less, held_back=held_back)
    assert image_names(again, flat) == held_back
    assert len(train.images) == 36


def test_frames_of_a_video_stay_on_one_side(make_coco, write_image, caplog):
    frames = [f"cam{video}_{frame:03d}.jpg" for video in range(6) for frame in range(10)]

    def rename(content):
        for entry, name in zip(content["images"], frames, strict=True):
            entry["file_name"] = name

    objects = [coco_object(image_id=i) for i in range(1, 61)]
    root = make_coco(objects, num_images=60, categories=[{"id": 3, "name": "cat"}], edit=rename)
    for name in frames:
        write_image(root / "train" / name)
    with caplog.at_level(logging.WARNING, "ddetr"):
        load_splits(TrainingSource(str(root), val_fraction=0.2))
    assert "frames of 6 videos" in caplog.text
    caplog.clear()
    for pattern in (r"(.*[^0-9])[0-9]+[.]", r"cam\d", r"(cam)(\d)"):
        train, val = load_splits(TrainingSource(str(root), val_fraction=0.2, group_pattern=pattern))
        videos = [{name[:4] for name in names(split, root)} for split in (train, val)]
        assert len(val.images) == 10 * len(videos[1])
        assert not videos[0] & videos[1]
        assert len(videos[1]) == 1 if pattern == r"cam\d" else videos[1]
    assert not caplog.text


def test_images_called_by_their_classes_are_no_frames(make_yolo, caplog):
    images = {f"images/{'cats' if i % 2 else 'Dog'}_{i:03d}.jpg": f"{i % 2} .5 .5 .2 .2" for i in range(24)}
    root = make_yolo(images, data_yaml="train: images\nnames: [dog, cat]\n")
    with caplog.at_level(logging.WARNING, "ddetr"):
        load_splits(TrainingSource(str(root), val_fraction=0.2))
    assert caplog.text == ""


@pytest.fixture
def named(make_yolo, tmp_path):
    """A flat YOLO set whose images are called so."""

    def make(stems: list[str]) -> Path:
        folder = tmp_path / f"set{len(list(tmp_path.iterdir()))}"
        return make_yolo({f"images/{stem}.jpg": "0 .5 .5 .2 .2" for stem in stems}, folder)

    return make


ROBOFLOW = [f"IMG_{i}_{'png' if i % 2 else 'jpg'}.rf.{i:02d}{copy}{'0a1b2c3d' * 4}" for i in range(6) for copy in "abc"]


def test_copies_that_roboflow_made_of_an_image_stay_together(named, caplog):
    root = named(ROBOFLOW)
    for seed in range(5):
        train, val = load_splits(TrainingSource(str(root), val_fraction=0.34, split_seed=seed))
        assert (len(train.images), len(val.images)) == (12, 6)
        assert not {name[:5] for name in names(train, root)} & {name[:5] for name in names(val, root)}
    assert caplog.text == ""


def test_copies_of_an_image_in_training_and_validation_are_a_note(make_yolo):
    splits = ("train", "train", "valid")
    images = {f"{splits[i % 3]}/images/{stem}.jpg": "0 .5 .5 .2 .2" for i, stem in enumerate(ROBOFLOW)}
    root = make_yolo({**images, "valid/images/other_jpg.rf.0123456789abcdef0123456789abcdef.jpg": None})
    report = audit(*load_splits(TrainingSource(str(root))))
    [finding] = [finding for finding in report.findings if finding.kind == "copies-across-splits"]
    assert (finding.action, finding.count) == ("note", 6)
    assert not report.refused


def test_a_common_name_in_training_and_validation_is_no_copy(make_yolo):
    hashes = ["0123456789abcdef" * 2, "fedcba9876543210" * 2]
    stems = {"train": ["images"], "valid": ["images", *(f"v{i}" for i in range(24))]}
    images = {
        f"{split}/images/{stem}_jpg.rf.{hashes[split == 'valid']}.jpg": "0 .5 .5 .2 .2"
        for split, own in stems.items()
        for stem in own
    }
    report = audit(*load_splits(TrainingSource(str(make_yolo(images)))))
    assert "copies-across-splits" not in {finding.kind for finding in report.findings}


@pytest.mark.parametrize(
    ("stems", "said", "start"),
    [
        ([f"field{i}_{x}_{y}_{x + 9}_{y + 9}" for i in range(5) for x in (0, 9) for y in (0, 9)], "tiles of 5", 6),
        ([f"P{i}__0.5__{x}___{y}" for i in range(5) for x in (0, 9) for y in (0, 9)], "tiles of 5 images", 2),
        ([*(f"r{i % 2}_{i}" for i in range(12)), *(f"r{i}_0" for i in range(2, 9))], "frames of 9 videos", 2),
        ([f"v{i % 3}_mp4-{i}_jpg.rf.{i:02d}{'0a1b2c3d' * 4}" for i in range(30)], "frames of 3 videos", 2),
    ],
)
def test_the_pattern_for_tiles_and_frames_is_named(named, caplog, stems, said, start):
    root = named(stems)
    load_splits(TrainingSource(str(root), val_fraction=0.3))
    assert said in caplog.text
    pattern = caplog.text.partition('--data.group_pattern "')[2].partition('"')[0]
    caplog.clear()
    train, val = load_splits(TrainingSource(str(root), val_fraction=0.3, group_pattern=pattern))
    assert not {name[:start] for name in names(train, root)} & {name[:start] for name in names(val, root)}
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("name", "first_parts", "is_said"),
    [
        ("{}_{:03d}", ["cam1", "cam2", "cam3"], True),
        ("{}_{}_9", ["field a", "field b", "field c"], True),
        ("{}_{:03d}", ["cat", "Dog", "cow"], False),  # classes
        ("{}_{:03d}", ["cats", "Dogs", "cow"], False),
        ("{}_{:06d}", ["2007", "2008", "2009"], False),  # as in VOC
        ("{}_{:03d}", ["img"], False),
    ],
)
def test_videos_in_training_and_validation_are_a_note(make_yolo, name, first_parts, is_said):
    stems = [name.format(first_parts[i % len(first_parts)], i) for i in range(24)]
    folder = ("train", "train", "train", "valid")
    root = make_yolo(
        {f"{folder[i // 3 % 4]}/images/{stem}.jpg": "0 .5 .5 .2 .2" for i, stem in enumerate(stems)},
        data_yaml="train: train/images\nval: valid/images\nnames: [cat, dog, cow]\n",
    )
    found = [f for f in audit(*load_splits(TrainingSource(str(root)))).findings if f.kind == "related-across-splits"]
    assert [(finding.action, finding.count) for finding in found] == [("note", 6)] * is_said


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        (".*", "no two images agree in what '.*' matches"),
        ("(ab).", "'(ab).' matches 3 of 10 images; the others, such as images/c"),
        ("/[ac]", "3 of 10 images are held back, 30 % and not 10 %"),
    ],
)
def test_a_pattern_that_does_otherwise_than_meant_is_said(named, caplog, pattern, said):
    root = named(["ab1", "ab2", "ab3", *(f"c{i}" for i in range(7))])
    load_splits(TrainingSource(str(root), val_fraction=0.1, group_pattern=pattern))
    assert said in caplog.text


def test_held_back_images_that_are_gone(flat):
    source = TrainingSource(str(flat), val_fraction=0.1)
    with pytest.raises(InputError, match=r"none of the images that the run holds back .* \(train/99.jpg\): restore"):
        load_splits(source, held_back=["train/99.jpg"])


def test_a_video_that_is_larger_than_the_fraction_is_held_back_whole(make_coco, write_image):
    def rename(content):
        for i, entry in enumerate(content["images"]):
            entry["file_name"] = f"{'ab'[i > 5]}{i:02d}.jpg"

    objects = [coco_object(image_id=i) for i in range(1, 11)]
    root = make_coco(objects, num_images=10, categories=[{"id": 3, "name": "cat"}], edit=rename)
    for i in range(10):
        write_image(root / "train" / f"{'ab'[i > 5]}{i:02d}.jpg")
    _, val = load_splits(TrainingSource(str(root), val_fraction=0.1, group_pattern="/([ab])"))
    assert {name[0] for name in names(val, root)} == {"b"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"group_pattern": "("}, r"'\(' is no regular expression"),
        ({"group_pattern": "frame"}, "'frame' matches no image, such as train/1.jpg"),
        ({"group_pattern": "jpg"}, "would hold back no image"),
        ({"val_split": "train"}, "val_split names others"),
        ({"val_annotations": "x.json"}, "val_annotations names others"),
    ],
)
def test_what_cannot_be_held_back(flat, options, said):
    with pytest.raises(InputError, match=said):
        load_splits(TrainingSource(str(flat), val_fraction=0.1, **options))


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, float("nan")])
def test_a_fraction_is_a_part(flat, fraction):
    with pytest.raises(InputError, match=r"val_fraction must lie in 0\.001 to 0\.9"):
        TrainingSource(str(flat), val_fraction=fraction)


def test_one_class_in_one_image_is_left_to_training(make_coco):
    root = make_coco([coco_object()], num_images=1, categories=[{"id": 3, "name": "cat"}])
    with pytest.raises(InputError, match="has 1 images, and --data.val_fraction 0.5 would hold back no image"):
        load_splits(TrainingSource(str(root), val_fraction=0.5))


def test_validation_that_is_the_training_set_is_said_loudly(flat):
    train, val = load_splits(TrainingSource(str(flat), val_split="train"))
    report = audit(train, val)
    assert "validation-is-training" in {finding.kind for finding in report.findings}
    assert "40 of the 40 validation images are training images" in str(report.render().caption)
    assert not report.refused


def test_boxes_and_labels_follow_their_images(flat):
    whole, _ = load_splits(TrainingSource(str(flat)))
    boxes = {record.path: record.boxes_xyxy for record in whole.images}
    for split in load_splits(TrainingSource(str(flat), val_fraction=0.3)):
        for record in split.images:
            np.testing.assert_array_equal(record.boxes_xyxy, boxes[record.path])


def test_names_do_not_depend_on_where_one_stands(flat, monkeypatch):
    source = TrainingSource(str(flat), val_fraction=0.2)
    _, val = load_splits(source)
    monkeypatch.chdir(flat.parent)
    _, same = load_splits(TrainingSource(flat.name, val_fraction=0.2))
    assert image_names(same, Path(flat.name)) == image_names(val, flat)


def test_the_named_training_split_is_enough(make_coco):
    make_coco(split="alpha")
    root = make_coco(split="val")
    with pytest.raises(InputError, match="none is called train; --data.train_split .* names the one to train on"):
        load_splits(TrainingSource(str(root)))
    train, val = load_splits(TrainingSource(str(root), train_split="alpha"))
    assert (train.name, val.name) == ("set/alpha", "set/val")


def test_a_validation_split_that_is_not_used_is_said(make_coco, caplog):
    root = make_coco([coco_object(image_id=i) for i in range(1, 11)], num_images=10)
    make_coco([coco_object()], split="val", root=root)
    with caplog.at_level(logging.WARNING, "ddetr"):
        load_splits(TrainingSource(str(root), val_fraction=0.2))
    assert "the validation split val of" in caplog.text


def test_a_pattern_needs_a_fraction(flat):
    with pytest.raises(InputError, match="group_pattern says .* give both"):
        TrainingSource(str(flat), group_pattern="cam")


@pytest.mark.parametrize("name", ["validate", "dev", "my_validate_v3", "evaluation"])
def test_validation_splits_of_many_names(make_coco, name):
    root = make_coco([coco_object(image_id=i) for i in range(1, 3)])
    make_coco([coco_object()], split=name, root=root)
    _, val = load_splits(TrainingSource(str(root)))
    assert val is not None
    assert len(val.images) == 2


def test_annotations_of_another_format_are_mentioned(make_coco, make_yolo):
    root = make_coco([coco_object(image_id=i) for i in range(1, 3)])
    make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"}, root=root)
    train, _ = load_splits(TrainingSource(str(root)))
    [finding] = [finding for finding in train.findings if finding.kind == "other-annotations"]
    assert finding.message.startswith(
        "YOLO annotations lie there too (splits: train); coco was read. --data.format yolo"
    )
    train, _ = load_splits(TrainingSource(str(root), format="coco"))
    assert not any(finding.kind == "other-annotations" for finding in train.findings)


@pytest.fixture
def write_lists(make_coco):
    """One COCO file of three images, and lists of them."""

    def write(place, **lists):
        root = make_coco([coco_object(image_id=i) for i in range(1, 4)], num_images=3)
        (root / place).mkdir(parents=True, exist_ok=True)
        for name, text in lists.items():
            (root / place / f"{name}.txt").write_text(text)
        return root

    return write


@pytest.mark.parametrize("place", ["", "ImageSets/Main", "splits"])
@pytest.mark.parametrize(
    "lists",
    [
        {"train": "\n1\n2\n", "val": "images/3.jpg\n"},
        {"train": "train/1.jpg\r\n.\\train\\2.jpg", "val": "/home/me/3.jpg", "trainval": "1\n2\n3\n"},
        {"train": "1.jpg\n2.png\n", "test": "3.jpg"},
        {"train": "1\n2\n", "val": "3", "test": "What was measured\n"},  # which is no list
        {"train": "1\n2\n1\n", "val": "3"},  # one twice
    ],
)
def test_lists_beside_one_file_are_used(write_lists, place, lists):
    root = write_lists(place, **lists)
    train, val = load_splits(TrainingSource(str(root)))
    assert [record.path.name for record in train.images] == ["1.jpg", "2.jpg"]
    assert [record.path.name for record in val.images] == ["3.jpg"]
    assert load_split(DataSource(str(root)), "val").images[0].path.name == "3.jpg"
    assert [(f.kind, f.count) for f in train.findings] == [("lists-used", 2)]
    assert val.findings == ()
    assert available_splits(root) == ["train", "val" if "val" in lists else "test"]
    (root / "train" / "1.jpg").write_bytes(b"broken")
    train, val = load_splits(TrainingSource(str(root)))
    assert (len(train.images), len(val.images)) == (1, 1)


@pytest.mark.parametrize("format", ["voc", "yolo"])
def test_lists_that_lie_where_their_format_has_none_are_used(make_voc, make_yolo, format):
    """Each image is in one of them, which is what the note on lists that are not used asks for."""
    if format == "voc":
        root = make_voc({name: voc_xml([voc_object()]) for name in "abc"}, lists={})
    else:
        root = make_yolo({f"images/{name}.jpg": "0 .5 .5 .2 .2" for name in "abc"})
    (root / "lists" / "2020").mkdir(parents=True)
    for name, text in {"train": "a\nb\n", "val": "c\n"}.items():
        (root / "lists" / "2020" / f"{name}.txt").write_text(text)
    train, val = load_splits(TrainingSource(str(root)))
    assert (train.format, len(train.images), len(val.images)) == (format, 2, 1)
    assert "lists-used" in {finding.kind for finding in train.findings}
    if format == "yolo":  # whose description, where there is one, says which images are in which split
        (root / "data.yaml").write_text("train: images\nnames: [cat]\n")
        assert [len(load_splits(TrainingSource(str(path)))[0].images) for path in (root, root / "data.yaml")] == [3, 3]


def test_lists_tell_images_apart_by_their_suffix(write_lists, write_image):
    root = write_lists("", train="1.jpg\n2\n", val="1.png\n")
    write_image(root / "train" / "1.png", seed=9)
    content = json.loads((root / "annotations" / "instances_train.json").read_text())
    content["images"][2]["file_name"] = "1.png"
    (root / "annotations" / "instances_train.json").write_text(json.dumps(content))
    train, val = load_splits(TrainingSource(str(root)))
    assert [record.path.name for record in train.images] == ["1.jpg", "2.jpg"]
    assert [record.path.name for record in val.images] == ["1.png"]


@pytest.mark.parametrize("place", ["", "ImageSets/Main", "splits"])
@pytest.mark.parametrize(("train", "val"), [("1\n", "3.jpg"), ("1\n2\n", "2\n3"), ("1\n2\n4", "3"), ("1\n2\n3", "5\n")])
def test_lists_of_splits_that_are_not_used_are_said(write_lists, make_coco, place, train, val):
    root = write_lists(place, train=train, val=val, test="What was measured\n")
    train, _ = load_splits(TrainingSource(str(root)))
    (found,) = [finding for finding in train.findings if finding.kind == "lists-not-used"]
    assert (found.action, found.count) == ("note", 2 if val != "5\n" else 1)
    assert len(train.images) == 3
    make_coco(split="val")
    train, _ = load_splits(TrainingSource(str(root)))
    assert "lists-not-used" not in {finding.kind for finding in train.findings}


def test_labels_within_the_folder_of_a_split_are_read_or_said(tmp_path, write_image, make_voc, make_coco):
    def write(folder, *names):
        for name in names:
            write_image(tmp_path / folder / f"{name}.jpg", seed=len(name))
            (tmp_path / folder / f"{name}.xml").write_text(voc_xml([voc_object()]))

    def not_read(root):
        train, _ = load_splits(TrainingSource(str(root)))
        found = [finding for finding in train.findings if finding.kind == "labels-not-read"]
        return len(train.images), [(finding.action, finding.count) for finding in found]

    write("voc/train", "a", "b")
    write("voc/val/cam1", "d")  # which is read
    assert not_read(tmp_path / "voc") == (2, [])
    write("voc/train/more", "c")
    write("voc/train/val_old", "e")
    assert not_read(tmp_path / "voc") == (2, [("note", 2)])
    listed = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([voc_object()])})
    assert not_read(listed) == (2, [])
    root = make_coco()
    make_coco(split="val", root=root)
    assert not_read(root)[1] == []
    (root / "annotations" / "old").mkdir()
    shutil.copy(root / "annotations" / "instances_train.json", root / "annotations" / "old")
    assert not_read(root)[1] == [("note", 1)]


def test_other_splits_for_training_are_said_not_to_be_used(make_coco):
    root = make_coco()
    make_coco(split="val", root=root)
    make_coco(split="test", root=root)
    make_coco(split="trainval", root=root)
    assert "splits-not-used" not in {finding.kind for finding in load_splits(TrainingSource(str(root)))[0].findings}
    make_coco(split="train_extra", root=root)
    (found,) = [f for f in load_splits(TrainingSource(str(root)))[0].findings if f.kind == "splits-not-used"]
    assert (found.action, found.count) == ("note", 1)
    assert "train_extra. train and val were taken" in found.message
    named = load_splits(TrainingSource(str(root), train_split="train", val_split="val"))[0]
    assert "splits-not-used" not in {finding.kind for finding in named.findings}


def test_a_list_that_is_used_is_not_said_to_be_unused(make_voc):
    root = make_voc({name: voc_xml([voc_object()]) for name in "ab"}, {"trainval": "a"})
    train, _ = load_splits(TrainingSource(str(root)))
    assert (len(train.images), "lists-not-used" in {finding.kind for finding in train.findings}) == (1, False)


@pytest.mark.parametrize("name", ["test", "val"])
def test_a_test_split_alone_is_never_trained_on_unasked(make_coco, name):
    root = make_coco(split=name)
    with pytest.raises(InputError, match=f"has the splits {name}: none is called train"):
        load_splits(TrainingSource(str(root)))
    train, _ = load_splits(TrainingSource(str(root), train_split=name))
    assert len(train.images) == 2
    assert len(load_split(DataSource(str(root)), "val", name).images) == 2


@pytest.mark.parametrize("rows", [None, f"Car 0 0 0 4 5 24 15 {'0 ' * 7}"])
def test_folders_of_other_labels_are_no_yolo_annotations(make_yolo, tmp_path, rows):
    """Images and labels are the folders of VOC's XML and KITTI's text files too."""
    root = make_yolo({f"{split}/images/a.jpg": rows for split in ("train", "val")}, root=tmp_path / "other")
    for split in ("train", "val"):
        (root / split / "labels").mkdir(exist_ok=True)
        if rows is None:
            (root / split / "labels" / "a.xml").write_text(voc_xml([voc_object()]))
    train, val = load_splits(TrainingSource(str(root)))
    assert train.format == val.format == ("voc" if rows is None else "kitti")
    assert not any(finding.kind == "other-annotations" for finding in train.findings)


def test_splits_of_unusual_names_are_named(make_coco):
    root = make_coco([coco_object(image_id=i) for i in range(1, 3)])
    make_coco([coco_object()], split="session2", root=root)
    train, val = load_splits(TrainingSource(str(root)))
    assert val is None
    [finding] = [finding for finding in train.findings if finding.kind == "no-validation-split"]
    assert "(session2)" in finding.message

"""Where YOLO data sets keep things, as strangers' files say it."""

import os
import shutil
from pathlib import Path

import pytest

from ddetr.cli import main as cli
from ddetr.datasets import audit, available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.config import TrainingSource
from ddetr.datasets.image_files import is_clutter, walk_files
from ddetr.datasets.readers.yolo.paths import shortest_ends
from ddetr.datasets.splits import load_splits, no_validation
from ddetr.errors import InputError

ROW = "0 .5 .5 .2 .2"
ROBOFLOW = {"train/images/a.jpg": ROW, "valid/images/b.jpg": ROW, "test/images/c.jpg": ROW}
TREE = {"images/train/a.jpg": ROW, "images/val/b.jpg": ROW}
NAMES = "names: [cat, dog]\n"


def said(annotations, kind):
    return [(f.action, f.count, f.message) for f in annotations.findings if f.kind == kind]


# ---- what is named and not there -------------------------------------------------------------------------------------


def test_a_split_that_is_not_there_stays_a_split(make_yolo, capsys):
    tree = {"train/images/a.jpg": ROW, "validate/images/b.jpg": ROW, "test/images/c.jpg": ROW}
    yaml = f"train: ../train/images\nval: ../valid/images\ntest: ../test/images\n{NAMES}"
    root = make_yolo(tree, data_yaml=yaml)
    assert default_splits(root) == ("train", "val")
    val = load_annotations(root, "val")
    ((action, _, message),) = said(val, "missing-path")
    assert action == "refused"
    assert f"val names ../valid/images, which is not there: {root} has test, train, validate" in message
    assert "(did you mean validate?)" in message
    assert cli.main(["data", "audit", str(root)]) == 2
    assert "missing-path" in capsys.readouterr().out


def test_a_path_of_another_machine_is_compared_where_it_meets(make_yolo):
    root = make_yolo({"set/train/a.jpg": ROW, "set/valid/b.jpg": ROW})
    (root / "data.yaml").write_text(f"train: 'C:\\me\\x\\set\\train'\nval: 'C:\\me\\x\\set\\val'\n{NAMES}")
    ((_, _, message),) = said(load_annotations(root, "val"), "missing-path")
    assert f"{root / 'set'} has train, valid (did you mean valid?)" in message


@pytest.mark.parametrize(
    ("entry", "named"),
    [
        ("[train/images, gone/images]", ["gone/images"]),
        ("[gone/images, gone.txt, train/images]", ["gone/images", "gone.txt"]),
        ("[train/images, {a: b}]", ["train must be a path"]),
        ("[train/images, /, //]", ["train names /", "train names //"]),
    ],
)
def test_a_part_of_a_split_that_is_not_there_stops(make_yolo, entry, named):
    root = make_yolo(ROBOFLOW, data_yaml=f"train: {entry}\nval: valid/images\n{NAMES}")
    train = load_annotations(root, "train")
    assert len(train.images) == 1
    found = said(train, "missing-path")
    assert [action for action, _, _ in found] == ["refused"] * len(named)
    assert all(word in message for word, (_, _, message) in zip(named, found, strict=True))
    assert audit(train).refused


@pytest.mark.parametrize(
    ("tree", "train", "other", "name"),
    [
        (TREE, "images/train", "val:", "images/val"),
        (TREE, "images/train", "val: ''", "images/val"),
        (TREE, "images/train", "valid: null\nvalidation: ~", "images/val"),
        (TREE, "images/train", "", "images/val"),
        (ROBOFLOW, "train/images", "test: test/images", "valid/images"),
        (ROBOFLOW, "[train/images]", "test: test/images", "valid/images"),
        (TREE, "train.txt", "", "val.txt"),
    ],
)
def test_a_split_that_is_there_and_not_named_is_said(make_yolo, tree, train, other, name):
    root = make_yolo(tree, data_yaml=f"train: {train}\n{other}\n{NAMES}")
    if train == "train.txt":
        for split, image in (("train", "a"), ("val", "b")):
            (root / f"{split}.txt").write_text(f"images/{split}/{image}.jpg\n")
    read, val = load_splits(TrainingSource(str(root)))
    ((action, _, message),) = said(read, "split-not-named")
    assert action == "note"
    assert message == (
        f"data.yaml names no val, but {name} has images with labels, which are not used: write `val: {name}` into it."
    )
    assert message in audit(read, val).render().caption
    assert message in str(no_validation(TrainingSource(str(root))))


def test_a_training_split_that_is_not_named_stops(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train:\nval: images/val\n{NAMES}")
    with pytest.raises(
        InputError, match="none is called train.*names no train, but images/train has images with labels"
    ):
        load_splits(TrainingSource(str(root)))


def test_what_is_no_split_of_its_own_is_not_mentioned(make_yolo):
    def notes(root):
        return said(load_splits(TrainingSource(str(root)))[0], "split-not-named")

    root = make_yolo({**TREE, "images/val/b.jpg": None}, data_yaml=f"train: images/train\n{NAMES}")
    assert notes(root) == []  # no labels
    (root / "labels" / "val").mkdir()
    (root / "labels" / "val" / "b.txt").write_text(ROW)
    assert len(notes(root)) == 1
    for entries in ("train: [images/train, images/val]", "train: images/train\nval: images/gone"):
        (root / "data.yaml").write_text(f"{entries}\n{NAMES}")
        assert notes(root) == []


def test_names_of_a_description_without_splits_are_used(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train:\nval:\n{NAMES}")
    train = load_annotations(root, "train")
    assert ([category.name for category in train.categories], train.findings) == (["cat", "dog"], ())


def test_all_paths_wrong_names_the_folders(make_yolo):
    root = make_yolo(ROBOFLOW, data_yaml=f"path: /x\ntrain: gone/images\nval: gone.txt\n{NAMES}")
    (root / "train.txt").write_text("train/images/a.jpg\n")
    assert detect_format(root) == "yolo"
    ((_, _, message),) = said(load_annotations(root, "train"), "missing-path")
    assert "gone/images" in message
    assert "test, train, valid" in message
    ((_, _, message),) = said(load_annotations(root, "val"), "missing-path")
    assert "gone.txt" in message
    assert "has train.txt" in message


def test_a_wrong_path_is_not_cut_down_to_another_folder(make_yolo):
    """`valid/images` is not there: `images` is what all splits' paths end in, so it is none of them."""
    root = make_yolo({"train/images/a.jpg": ROW, "images/z.jpg": ROW})
    for prefix in ("", "../", "/content/drive/set/"):
        (root / "data.yaml").write_text(f"train: {prefix}train/images\nval: {prefix}valid/images\n{NAMES}")
        assert len(load_annotations(root, "train").images) == 1
        val = load_annotations(root, "val")
        assert (len(val.images), len(said(val, "missing-path"))) == (0, 1)


def test_a_neighbouring_data_set_does_not_stand_in(make_yolo, tmp_path):
    root = make_yolo({"train/images/a.jpg": ROW}, data_yaml=f"train: train/images\nval: val/images\n{NAMES}")
    make_yolo({"val/images/b.jpg": ROW}, root=tmp_path)
    assert said(load_annotations(root, "val"), "missing-path")


def test_how_much_of_a_path_tells_it_from_others():
    ends = {("x", "train", "images"): 2, ("x", "valid", "images"): 2, ("x", "test"): 2, ("test",): 1}
    assert shortest_ends(ends) == ends
    assert shortest_ends([("a", "b")]) == {("a", "b"): 1}


def test_a_yaml_that_names_thousands_of_paths(make_yolo):
    entry = ", ".join(f"gone{i}/images" for i in range(30))
    root = make_yolo(TREE, data_yaml=f"train: [{entry}]\nval: images/val\n{NAMES}")
    assert len(said(load_annotations(root, "train"), "missing-path")) == 30
    (root / "data.yaml").write_text(f"train: [{'a, ' * 10_001}]\n{NAMES}")
    with pytest.raises(InputError, match="names 10,001 paths, more than 10,000"):
        available_splits(root)


def test_a_yaml_that_names_no_split(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train: ~\nval:\n{NAMES}")
    with pytest.raises(InputError, match="names no split: expected train, val or test"):
        available_splits(root / "data.yaml")
    assert available_splits(root) == ["train", "val"]  # the folders say them


# ---- paths that are meant otherwise ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tree", "yaml"),
    [
        (ROBOFLOW, "train: images/train\nval: images/valid"),
        (TREE, "train: train/images\nval: val/images"),
        (TREE, "train: train\nval: val"),
        (ROBOFLOW, "path: ~/no/such\ntrain: train/images\nval: valid/images\ndownload: https://x.invalid/a.zip"),
        (ROBOFLOW, "train: ~/sets/train/images\nval: ~/sets/valid/images"),
        (ROBOFLOW, "path:\ntrain: ./train/images/\nvalidation: ./valid/images/\ntest: null"),
        ({f"ds/{name}": row for name, row in ROBOFLOW.items()}, "path: ./\ntrain: train/images\nval: valid/images"),
        (ROBOFLOW, "Train: train/images\nVal: valid/images"),
        (ROBOFLOW, "train: ../Train/images\nval: Valid/Images"),
        (ROBOFLOW, 'train: "train\\\\images"\nval: valid\\images'),
    ],
)
def test_paths_as_they_are_meant(make_yolo, tree, yaml):
    root = make_yolo(tree, data_yaml=f"{yaml}\n{NAMES}")
    assert default_splits(root) == ("train", "val")
    for split in ("train", "val"):
        annotations = load_annotations(root, split)
        assert (len(annotations.images), annotations.findings) == (1, ())


def test_a_description_above_its_folder(make_yolo, tmp_path):
    root = make_yolo(TREE)
    (tmp_path / "pets.yml").write_text(f"path: yolo\ntrain: images/train\nval: images/val\n{NAMES}")
    (tmp_path / "elsewhere.yaml").write_text(f"train: other/train\n{NAMES}")
    for path in (root, tmp_path / "pets.yml"):
        train = load_annotations(path, "train")
        assert ([c.name for c in train.categories], len(train.images)) == (["cat", "dog"], 1)


def test_a_description_in_a_folder_of_settings(make_yolo):
    root = make_yolo(TREE)
    (root / "cfg").mkdir()
    (root / "cfg" / "data.yaml").write_text(f"train: images/train\nval: images/val\n{NAMES}")
    assert len(load_annotations(root / "cfg" / "data.yaml", "train").images) == 1


def test_a_linked_description_and_linked_folders(make_yolo, tmp_path):
    root = make_yolo(TREE, data_yaml=f"train: images/train\nval: images/val\n{NAMES}")
    shutil.move(root / "images" / "train", tmp_path / "disk")
    (root / "images" / "train").symlink_to(tmp_path / "disk")
    (tmp_path / "link.yaml").symlink_to(root / "data.yaml")
    for path in (root, tmp_path / "link.yaml"):
        train = load_annotations(path, "train")
        assert (len(train.images[0].labels), train.findings) == (1, ())


def test_links_in_circles_are_walked_once(make_yolo, tmp_path):
    root = make_yolo({"images/a.jpg": ROW, "images/deep/b.jpg": ROW}, data_yaml=f"train: images\n{NAMES}")
    (root / "images" / "deep" / "up").symlink_to(root / "images")
    (root / "images" / "top").symlink_to(root)
    (root / "images" / "self").symlink_to("self")
    (tmp_path / "disk").mkdir()
    shutil.copy(root / "images" / "a.jpg", tmp_path / "disk" / "c.jpg")
    (root / "images" / "more").symlink_to(tmp_path / "disk")
    train = load_annotations(root, "train")
    assert [str(r.path.relative_to(root)) for r in train.images] == [
        "images/a.jpg",
        "images/deep/b.jpg",
        "images/more/c.jpg",
    ]


def test_hidden_folders_and_files_hold_no_images(make_yolo):
    yaml = f"train: train/images\nval: val/images\n{NAMES}"
    root = make_yolo({"train/images/a.jpg": ROW, "val/images/b.jpg": ROW}, data_yaml=yaml)
    for clutter in (".ipynb_checkpoints", ".thumbnails", "__MACOSX", "@eaDir", ".git"):
        (root / "train/images" / clutter).mkdir()
        shutil.copy(root / "train/images/a.jpg", root / "train/images" / clutter / "a.jpg")
        (root / "train/labels" / clutter).mkdir()
        (root / "train/labels" / clutter / "gone.txt").write_text(ROW)
    for name in ("._data.yaml", "train/images/._a.jpg", "train/labels/._a.txt", "train/labels/._gone.txt"):
        (root / name).write_bytes(b"\0\5\x16\7Mac OS X")
    train = load_annotations(root, "train")
    assert (len(train.images), train.findings) == (1, ())
    assert walk_files(root / "train" / "images") == [root / "train/images/a.jpg"]
    assert is_clutter(".DS_Store")
    assert not is_clutter("a.jpg")
    (root / "data.yaml").rename(root / "fruit.yaml")
    (root / "._data.yaml").rename(root / "._fruit.yaml")
    assert default_splits(root) == ("train", "val")


# ---- lists of images -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prefix",
    [
        "images/train/",
        "./images/train/",
        "../images/train/",
        "yolo/images/train/",
        "/home/someone/ds/images/train/",
        "/home/someone/renamed/train/",
        "/content/flat/",
        "C:\\Users\\me\\ds\\images\\train\\",
        "\\\\server\\share\\images\\train\\",
        "",
    ],
)
@pytest.mark.parametrize("place", ["train.txt", "lists/train.txt"])
def test_lists_with_paths_of_all_kinds(make_yolo, prefix, place):
    tree = {"images/train/a.jpg": ROW, "images/train/b.jpg": ROW}
    root = make_yolo(tree, data_yaml=f"path: /home/someone/ds\ntrain: {place}\n{NAMES}")
    if prefix in ("", "/content/flat/", "/home/someone/renamed/train/"):  # an end of it lies beside the list
        shutil.move(root / "images" / "train", root / "train")
        for file in ("train/a.jpg", "train/b.jpg"):
            if prefix != "/home/someone/renamed/train/":
                shutil.move(root / file, root / Path(file).name)
        shutil.move(root / "labels" / "train", root / "labels2")
    (root / place).parent.mkdir(exist_ok=True)
    (root / place).write_text(f"{prefix}a.jpg\r\n{prefix}b.jpg\r\n\r\n")
    train = load_annotations(root, "train")
    assert [record.path.name for record in train.images] == ["a.jpg", "b.jpg"]
    if prefix.endswith("images/train/"):
        assert train.findings == ()


def test_a_list_of_which_nothing_is_there_says_where_it_looked(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train: train.txt\nval: images/val\n{NAMES}")
    (root / "train.txt").write_text("/home/x/1.jpg\n/home/x/2.jpg\n")
    ((action, count, message),) = said(load_annotations(root, "train"), "every-image-missing")
    assert (action, count) == ("refused", 2)
    assert f"None of its 2 images was found (the first is /home/x/1.jpg; looked in {root}" in message


def test_a_list_without_line_breaks_stops(make_yolo):
    """VoTT's: by the end of its line alone it would be the list of one image."""
    root = make_yolo({f"data/obj/{i}.jpg": ROW for i in range(3)}, data_yaml=f"train: train.txt\n{NAMES}")
    (root / "train.txt").write_text("".join(f"data/obj/{i}.jpg" for i in range(3)))
    assert [action for action, _, _ in said(load_annotations(root, "train"), "joined-lines")] == ["refused"]
    shutil.move(root / "data", root / "set.jpg")  # a folder may be called so
    (root / "train.txt").write_text("".join(f"set.jpg/obj/{i}.jpg\n" for i in range(3)))
    assert len(load_annotations(root, "train").images) == 3


def test_equal_names_in_several_folders_of_a_list_are_not_mixed_up(make_yolo):
    """The folders of the list are gone: `1.jpg` of one must not become that of the other."""
    root = make_yolo({"a/images/1.jpg": ROW, "images/1.jpg": ROW}, data_yaml=f"train: train.txt\n{NAMES}")
    (root / "train.txt").write_text("/x/a/images/1.jpg\n/x/b/images/1.jpg\n")
    train = load_annotations(root, "train")
    assert [record.path for record in train.images] == [root / "a/images/1.jpg"]
    assert [action for action, _, _ in said(train, "missing-image")] == ["dropped"]


def test_a_list_from_windows_shell(make_yolo):
    root = make_yolo(TREE, data_yaml=f"train: train.txt\n{NAMES}")
    (root / "train.txt").write_bytes("images\\train\\a.jpg\r\n".encode("utf-16"))
    (root / "labels/train/a.txt").write_bytes(f"{ROW}\r\n".encode("utf-16"))
    train = load_annotations(root, "train")
    assert (len(train.images[0].labels), train.findings) == (1, ())


# ---- Darknet ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "names"),
    [
        (
            "classes = 2\ntrain = data/train.txt\nvalid = data/valid.txt\nnames = data/obj.names\nbackup = backup/",
            "obj.names",
        ),
        ("classes=2\ntrain=train.txt # all\nvalid=valid.txt\nnames=/home/x/coco.names", "coco.names"),
        ("train = build\\x64\\train.txt\nvalid = valid.txt\nnames = gone.names\n", "my.names"),
        ("Train = data/train.txt\nvalid = data/valid.txt\nclasses = 2\n", None),
    ],
)
def test_darknet_and_cvat(make_yolo, text, names):
    root = make_yolo({"obj_train_data/a.PNG": None, "obj_valid_data/b.PNG": None})
    for name in ("obj_train_data/a.txt", "obj_valid_data/b.txt"):
        (root / name).write_text("1 .5 .5 .2 .2\n")
    (root / "train.txt").write_text("data/obj_train_data/a.PNG\n")
    (root / "valid.txt").write_text("data/obj_valid_data/b.PNG\n")
    (root / "obj.data").write_text(text)
    if names:
        (root / names).write_text("cat\ndog\n")
    for path in (root, root / "obj.data"):
        assert default_splits(path) == ("train", "val")
        for split in ("train", "val"):
            annotations = load_annotations(path, split)
            wanted = ["cat", "dog"] if names else ["class_0", "class_1"]
            assert [category.name for category in annotations.categories] == wanted
            assert (annotations.images[0].labels.tolist(), annotations.findings) == ([1], ())


def test_darknet_without_its_names(make_yolo):
    root = make_yolo({"a.jpg": None})
    (root / "obj.data").write_text("classes = 2\ntrain = train.txt\nnames = gone.names\n")
    (root / "train.txt").write_text("a.jpg")
    with pytest.raises(InputError, match="names gone.names as the list of classes, which is not there"):
        load_annotations(root, "train")


# ---- without a description -------------------------------------------------------------------------------------------


def test_labels_beside_images_and_nothing_else(make_yolo):
    root = make_yolo({"a.jpg": None, "b.jpg": None})
    (root / "a.txt").write_text(ROW)
    (root / "b.txt").touch()
    (root / "classes.txt").write_text("cat\n")
    assert default_splits(root) == ("all", None)
    annotations = load_annotations(root, "all")
    assert (len(annotations.images), annotations.findings) == (2, ())
    assert [category.name for category in annotations.categories] == ["cat"]
    for split in ("train", "val"):
        shutil.copytree(root, root.parent / "two" / split)
    assert default_splits(root.parent / "two") == ("train", "val")
    assert len(load_annotations(root.parent / "two", "val").images) == 2


def test_images_and_folders_of_more_in_one_folder_are_read_whole(make_yolo):
    root = make_yolo({"images/a.jpg": ROW, "images/more/b.jpg": ROW})
    (root / "classes.txt").write_text("cat\n")
    assert default_splits(root) == ("all", None)
    assert len(load_annotations(root, "all").images) == 2
    make_yolo({"images/train/c.jpg": ROW, "images/val/d.jpg": ROW}, root=root)
    assert default_splits(root) == ("train", "val")


@pytest.mark.parametrize("place", ["", "ImageSets/", "ImageSets/Main/"])
def test_lists_beside_images_and_labels(make_yolo, place):
    root = make_yolo({"images/a.jpg": ROW, "images/b.jpg": ROW})
    (root / "classes.txt").write_text("cat\n")
    (root / "requirements.txt").write_text("torch\n")
    assert default_splits(root) == ("all", None)
    (root / place).mkdir(exist_ok=True, parents=True)
    (root / place / "train.txt").write_text("a\n")
    (root / place / "val.txt").write_text("/x/images/b.jpg\n")
    assert default_splits(root) == ("train", "val")
    for split, name in (("train", "a.jpg"), ("val", "b.jpg")):
        annotations = load_annotations(root, split)
        assert [record.path.name for record in annotations.images] == [name]
        assert annotations.findings == ()


def test_folders_of_images_and_labels_for_each_split(make_yolo):
    root = make_yolo({"train_images/a.jpg": None, "images-val/b.jpg": None, "test_images/c.jpg": None})
    for name in ("train_labels/a.txt", "labels-val/b.txt"):
        (root / name).parent.mkdir()
        (root / name).write_text(ROW)
    (root / "classes.txt").write_text("cat\n")
    assert available_splits(root) == ["val", "train"]
    train = load_annotations(root, "train")
    assert (len(train.images[0].labels), train.findings) == (1, ())


def test_label_studios_export_is_no_coco_set(make_yolo):
    root = make_yolo({"images/a.jpg": ROW})
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "notes.json").write_text('{"categories": [{"id": 0, "name": "cat"}], "info": {"year": 2024}}')
    assert detect_format(root) == "yolo"
    assert [category.name for category in load_annotations(root, "all").categories] == ["cat", "dog"]


def test_captions_beside_images_are_no_labels(make_yolo):
    root = make_yolo({"a.jpg": None})
    (root / "a.txt").write_text("a photo of a cat\n")
    os.mkfifo(root / "b.txt")
    with pytest.raises(InputError, match="is no data set that is known"):
        detect_format(root)


def test_capitals(make_yolo):
    root = make_yolo({"Images/Train/a.jpg": None, "Images/Val/b.jpg": None})
    for name in ("Labels/Train/a.txt", "Labels/Val/b.txt"):
        (root / name).parent.mkdir(parents=True)
        (root / name).write_text(ROW)
    assert default_splits(root) == ("Train", "Val")
    (root / "classes.txt").write_text("cat\n")
    train = load_annotations(root, "Train")
    assert (len(train.images[0].labels), train.findings) == (1, ())


# ---- names that folders of images have -------------------------------------------------------------------------------


@pytest.mark.parametrize("images", ["img", "Imgs", "image", "JPEGImages"])
@pytest.mark.parametrize("split", ["", "train/"])
def test_images_and_labels_by_other_names(tmp_path, write_image, images, split):
    write_image(tmp_path / split / images / "a.jpg")
    write_image(tmp_path / split / images / "b.jpg", seed=1)
    (tmp_path / split / "labels").mkdir()
    (tmp_path / split / "labels" / "a.txt").write_text(ROW)
    (tmp_path / split / "labels" / "classes.txt").write_text("cat\n")
    annotations = load_annotations(tmp_path, split.strip("/") or "all")
    assert [category.name for category in annotations.categories] == ["cat"]
    assert [len(image.labels) for image in annotations.images] == [1, 0]
    ((_, _, message),) = said(annotations, "image-without-labels")
    assert f"(expected {tmp_path / split / 'labels' / 'b.txt'})" in message


def test_names_of_images_with_folders_called_images(tmp_path, write_image):
    """CVAT keeps the folders that an image came from: images/train/line/images/a.jpg."""
    write_image(tmp_path / "images/train/line/images/a.jpg")
    (tmp_path / "labels/train/line/images").mkdir(parents=True)
    (tmp_path / "labels/train/line/images/a.txt").write_text(ROW)
    (tmp_path / "train.txt").write_text("data/images/train/line/images/a.jpg\n")
    (tmp_path / "data.yaml").write_text(f"train: train.txt\n{NAMES}")
    annotations = load_annotations(tmp_path, "train")
    assert [len(image.labels) for image in annotations.images] == [1]
    assert [f for f in annotations.findings if f.action != "note"] == []

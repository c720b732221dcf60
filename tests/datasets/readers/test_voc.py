import re
import shutil

import numpy as np
import pytest
from dataset_parts import voc_object, voc_xml

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError


def test_splits_labels_and_coordinates(make_voc, kinds):
    files = {
        "a": voc_xml([voc_object("dog"), voc_object("cat", (1, 1, 64, 48), difficult=1)]),
        "b": voc_xml([]),
        "c": voc_xml([voc_object("cat")]),
    }
    root = make_voc(files, {"train": "a\nb\n", "val": "c.jpg\n\n", "cat_train": "a 1\nb -1\n", "trainval": "a\nb\nc"})
    assert detect_format(root) == "voc"
    assert available_splits(root) == ["train", "trainval", "val"]
    assert default_splits(root) == ("train", "val")
    train = load_annotations(root, "train")
    assert train.name == "voc/train"
    assert train.categories == (Category(1, "cat"), Category(2, "dog"))
    record = train.images[0]
    assert record.labels.tolist() == [1, 0]
    assert record.ignore.tolist() == [False, True]
    assert record.boxes_xyxy.tolist() == [[5, 6, 25, 16], [1, 1, 64, 48]]  # as written
    assert record.area.tolist() == [200, 63 * 47]
    assert len(train.images[1].labels) == 0
    assert kinds(train) == {}
    # without categories, a validation split takes the training split's: dog has label 1 although val has no dog
    val = load_annotations(root, "val")
    assert val.categories == train.categories
    assert val.images[0].labels.tolist() == [0]


def test_class_flags_in_lists_are_no_part_of_the_name(make_voc):
    root = make_voc({"a": voc_xml([voc_object()])}, {"train": "a  1\n"})
    assert len(load_annotations(root, "train").images) == 1


def test_an_object_with_several_boxes_is_several_objects(make_voc, kinds):
    second = "<bndbox><xmin>1</xmin><ymin>2</ymin><xmax>9</xmax><ymax>8</ymax></bndbox>"
    two = voc_object().replace("</object>", f"{second}</object>")
    train = load_annotations(make_voc({"a": voc_xml([two])}), "train")
    assert train.images[0].boxes_xyxy.tolist() == [[5, 6, 25, 16], [1, 2, 9, 8]]
    assert kinds(train) == {"several-boxes": "repaired"}


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda xml: xml.replace("<annotation>", '<annotation xmlns="http://example.com/voc">'), {}),
        (lambda xml: re.sub("<(/?)([a-z]+)", lambda tag: f"<{tag[1]}{tag[2].title()}", xml), {}),
        (lambda xml: xml.replace("x.jpg", "x & y.jpg"), {"bare-ampersand": "repaired"}),
        (lambda xml: re.sub("(?<=<)(/?)([xy])m(in|ax)", lambda t: f"{t[1]}{t[2]}{1 + (t[3] == 'ax')}", xml), {}),
    ],
)
def test_other_ways_of_writing_the_same(make_voc, kinds, change, found):
    train = load_annotations(make_voc({"a": change(voc_xml([voc_object("R&amp;D")]))}), "train")
    assert [category.name for category in train.categories] == ["R&D"]
    assert train.images[0].boxes_xyxy.tolist() == [[5, 6, 25, 16]]
    assert kinds(train) == found


def test_boxes_that_are_none_of_voc_are_named(make_voc):
    """Of other elements than corners nobody knows which they mean; without an object around them they have no name."""
    sizes = "<object><name>a</name><bndbox><x>1</x><y>2</y><w>3</w><h>4</h></bndbox></object>"
    files = {"a": voc_xml([sizes]), "b": voc_xml([voc_object().replace("object>", "item>")]), "c": "<annotation>& <"}
    train = load_annotations(make_voc(files | {"d": voc_xml([voc_object()])}), "train")
    assert [(f.kind, f.action, f.where) for f in train.findings] == [
        ("malformed-xml", "dropped", "Annotations/c.xml, line 1"),
        ("missing-box", "dropped", "Annotations/a.xml, object 1"),
        ("missing-object", "dropped", "Annotations/b.xml"),
    ]
    assert "<x>, <y>, <w>, <h>" in train.findings[1].message


def test_lists_of_one_class_each_make_the_splits_together(make_voc):
    """As VoTT writes them: no list of its own for a split. What has no flags is a split of its own."""
    files = {name: voc_xml([voc_object()]) for name in "abc"}
    lists = {"cat_train": "a.jpg 1\nb.jpg -1\n", "dog_train": "a.jpg -1\nb.jpg 1\n", "cat_val": "c.jpg 1\n"}
    root = make_voc(files, lists)
    assert default_splits(root) == ("train", "val")
    assert [len(load_annotations(root, split).images) for split in ("train", "val")] == [2, 1]
    root = make_voc(files, {"day_train": "a\n", "night_train": "b\nc\n"}, root=root.parent / "parts")
    assert available_splits(root) == ["day_train", "night_train"]


def test_devkit_nesting(make_voc, tmp_path):
    root = make_voc({"a": voc_xml([voc_object()])}, root=tmp_path / "kit" / "VOCdevkit" / "VOC2007")
    for path in (root, root.parent, tmp_path / "kit"):
        assert len(load_annotations(path, "train").images[0].labels) == 1
    shutil.copytree(root, root.parent / "VOC2012")
    with pytest.raises(InputError, match=r"several Pascal VOC data sets \(VOC2007, VOC2012\)"):
        detect_format(root.parent)


def test_no_image_sets(make_voc):
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([])}, lists={})
    assert available_splits(root) == ["all"]
    assert default_splits(root) == ("all", None)
    assert len(load_annotations(root, "all").images) == 2


def test_xml_beside_the_images(tmp_path, write_image):
    for split in ("train", "valid"):
        write_image(tmp_path / split / "a.jpg")
        (tmp_path / split / "a.xml").write_text(voc_xml([voc_object()]))
    assert default_splits(tmp_path) == ("train", "valid")
    assert len(load_annotations(tmp_path, "valid").images[0].labels) == 1


def test_a_class_that_training_lacks(make_voc):
    files = {"a": voc_xml([voc_object("cat")]), "b": voc_xml([voc_object("bird"), voc_object("cat")])}
    val = load_annotations(make_voc(files, {"train": "a", "val": "b"}), "val")
    assert val.categories == (Category(1, "cat"),)
    assert val.images[0].labels.tolist() == [0]
    assert [(f.kind, f.where) for f in val.findings] == [("category-unknown", "Annotations/b.xml, object 1")]


def test_wrong_boxes(make_voc):
    boxes = [(5, 6, 5, 16), (9, 6, 5, 16), ("nan", 1, 2, 3), ("", 1, 2, 3), (70, 6, 80, 16), (5, 6, 80, 16)]
    annotations = load_annotations(make_voc({"a": voc_xml([voc_object(box=box) for box in boxes])}), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [[5, 6, 9, 16], [5, 6, 64, 16]]
    assert [(f.kind, f.action, f.where[-1]) for f in annotations.findings] == [
        ("swapped-corners", "repaired", "2"),
        ("nan-box", "refused", "3"),
        ("nan-box", "refused", "4"),
        ("degenerate-box", "dropped", "1"),
        ("box-outside-image", "dropped", "5"),
        ("box-clipped", "repaired", "6"),
    ]


def test_objects_without_name_or_box(make_voc):
    objects = ["<object><name>cat</name></object>", voc_object(name=""), voc_object()]
    annotations = load_annotations(make_voc({"a": voc_xml(objects)}), "train")
    assert len(annotations.images[0].labels) == 1
    assert [f.kind for f in annotations.findings] == ["missing-box", "missing-name"]


def test_malformed_xml_is_named_with_its_line(make_voc):
    root = make_voc({"a": "<annotation>\n<object>\n</annotation>", "b": voc_xml([voc_object()])})
    annotations = load_annotations(root, "train")
    assert len(annotations.images) == 1
    [finding] = annotations.findings
    assert (finding.kind, finding.action, finding.where) == ("malformed-xml", "dropped", "Annotations/a.xml, line 3")
    assert "line 3" in finding.message


def test_missing_files(make_voc):
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([])}, {"train": "a\nb\nghost\na\n"})
    (root / "JPEGImages" / "b.jpg").unlink()
    annotations = load_annotations(root, "train")
    assert [record.path.stem for record in annotations.images] == ["a"]
    assert {(f.kind, f.action) for f in annotations.findings} == {
        ("missing-annotation", "dropped"),
        ("missing-image", "dropped"),
        ("duplicate-image", "repaired"),
    }
    (root / "JPEGImages" / "a.jpg").unlink()
    assert load_annotations(root, "train").findings[-1].kind == "every-image-missing"


def test_other_image_suffix_and_image_dir(make_voc, tmp_path, write_image):
    root = make_voc({"a": voc_xml([voc_object()])})
    shutil.rmtree(root / "JPEGImages")
    write_image(root / "pictures" / "a.png")
    assert load_annotations(root, "train", image_dir="pictures").images[0].path.name == "a.png"


def test_size_of_the_real_image(make_voc, write_image, kinds):
    wrong = "<size><width>100</width><height>90</height></size>"
    annotations = load_annotations(make_voc({"a": voc_xml([voc_object()], wrong)}), "train")
    assert annotations.images[0].size_hw == (48, 64)
    assert kinds(annotations) == {"size-mismatch": "repaired"}
    outside = voc_object(box=(70, 50, 90, 80))
    annotations = load_annotations(make_voc({"a": voc_xml([outside], wrong)}), "train")
    assert len(annotations.images) == 0
    assert kinds(annotations) == {"size-mismatch": "dropped"}
    for none in ("", "<size><width>0</width><height>0</height></size>"):
        annotations = load_annotations(make_voc({"a": voc_xml([voc_object()], none)}), "train")
        assert annotations.images[0].size_hw == (48, 64)
        assert kinds(annotations) == {"missing-size": "repaired"}


def test_images_that_were_resized_after_annotation_stop(make_voc, tmp_path, kinds):
    """Boxes that happen to fit into the smaller images mean other places."""
    double = "<size><width>128</width><height>96</height></size>"
    files = {name: voc_xml([voc_object()], double) for name in "abcd"}
    assert kinds(load_annotations(make_voc(files), "train")) == {
        "size-mismatch": "repaired",
        "images-resized": "refused",
    }
    flat = double.replace("96", "80")  # another shape: the stated size is what is wrong
    root = make_voc({name: voc_xml([voc_object()], flat) for name in "abcd"}, root=tmp_path / "flat")
    assert "images-resized" not in kinds(load_annotations(root, "train"))


def test_unknown_split(make_voc):
    root = make_voc({"a": voc_xml([])})
    with pytest.raises(InputError, match=r'has no split "trian"; it has: train \(did you mean train\?\)'):
        load_annotations(root, "trian")


def test_a_set_with_all_splits_and_two_degenerate_boxes(cells):
    """The degenerate boxes are named by file and object."""
    assert default_splits(cells) == ("train", "val")
    train = load_annotations(cells, "train")
    val = load_annotations(cells, "val", categories=train.categories)
    assert [category.name for category in train.categories] == ["Platelets", "RBC", "WBC"]
    assert [len(load_annotations(cells, split).images) for split in ("train", "val", "trainval", "test")] == [
        12,
        5,
        17,
        4,
    ]
    assert [int(np.sum(train.images.labels == label)) for label in range(3)] == [12, 107, 12]
    found = [(f.kind, f.action, f.where) for f in (*train.findings, *val.findings)]
    assert found == [
        ("degenerate-box", "dropped", "Annotations/Cell_00003.xml, object 4"),
        ("degenerate-box", "dropped", "Annotations/Cell_00014.xml, object 6"),
    ]
    assert all(record.size_hw == (120, 160) for record in train.images)


def test_bccd(shared_data):
    """205 + 87 images; its two degenerate boxes are named by file and object."""
    root = shared_data / "bccd"
    assert default_splits(root) == ("train", "val")
    train = load_annotations(root, "train")
    val = load_annotations(root, "val", categories=train.categories)
    assert [category.name for category in train.categories] == ["Platelets", "RBC", "WBC"]
    assert (len(train.images), len(val.images)) == (205, 87)
    assert [int(np.sum(train.images.labels == label)) for label in range(3)] == [209, 2381, 214]
    found = [(f.kind, f.action, f.where) for f in (*train.findings, *val.findings)]
    assert found == [
        ("degenerate-box", "dropped", "Annotations/BloodImage_00343.xml, object 4"),
        ("degenerate-box", "dropped", "Annotations/BloodImage_00338.xml, object 13"),
    ]
    assert all(record.size_hw == (480, 640) for record in train.images)


# ---- as it is found --------------------------------------------------------------------------------------------------


def named(root, split="train", **options):
    """Names of the images that are used."""
    return [record.path.name for record in load_annotations(root, split, **options).images]


def test_names_with_spaces_dots_and_flags(make_voc):
    """A word after a name may be part of it, or a flag: which, the XML files tell."""
    names = ["my image 01", "train (1)", "a.b", "name 1", "c", "d", "cafe\u0301"]
    lines = "my image 01\ntrain (1)\na.b\nname 1\nc  1\nd -1\ncaf\u00e9\n\n"
    root = make_voc({name: voc_xml([voc_object()]) for name in names}, {"train": lines, "val": "c\r\nnobody 2\r\n"})
    assert named(root) == [f"{name}.jpg" for name in names]
    assert load_annotations(root, "train").findings == ()
    (finding,) = load_annotations(root, "val").findings
    assert (finding.kind, finding.where) == ("missing-annotation", "val.txt, line 2")
    assert "'nobody 2'" in finding.message


@pytest.mark.parametrize(
    "line",
    ["a.jpg", "a.xml", "JPEGImages/a.jpg", r".\JPEGImages\a.jpg", "JPEGImages/a.jpg Annotations/a.xml", "/data/a.jpg"],
)
def test_lists_with_paths(make_voc, line):
    assert named(make_voc({"a": voc_xml([voc_object()])}, {"train": line})) == ["a.jpg"]


@pytest.mark.parametrize("place", ["ImageSets", "imagesets/main", "ImageSets/Layout", "", "Annotations", "Splits"])
def test_lists_elsewhere(make_voc, place):
    root = make_voc({"a": voc_xml([voc_object()]), "b": voc_xml([voc_object()])}, lists={})
    (root / place).mkdir(parents=True, exist_ok=True)
    for name, text in {"train": "a", "val": "b", "classes": "cat\ndog\n", "README": "What this is"}.items():
        if name in ("train", "val") or "main" not in place:
            (root / place / f"{name}.txt").write_text(text)
    assert available_splits(root) == ["train", "val"]
    assert named(root, "val") == ["b.jpg"]


@pytest.mark.parametrize(
    ("encoding", "declared"),
    [
        *(("gb2312", "gb2312"), ("gbk", "gbk"), ("gb18030", "GB2312"), ("utf-16", "utf-16"), ("utf-8", "utf-16")),
        *(("utf-8-sig", "UTF-8"), ("utf-8", ""), ("utf-8", "punycode"), ("utf-16-le", "")),
        *(("shift_jis", "Shift_JIS"), ("big5", "Big5"), ("euc_kr", "EUC-KR"), ("cp1252", "windows-1252")),
    ],
)
def test_other_encodings(make_voc, encoding, declared):
    """The parser knows four; more are read by what a file states, or begins with."""
    name = {"cp1252": "Häuser", "euc_kr": "고양이", "shift_jis": "ネコ"}.get(encoding, "中文")
    root = make_voc({"a": ""})
    head = f'<?xml version="1.0" encoding="{declared}"?>' if declared else ""
    (root / "Annotations/a.xml").write_bytes((head + voc_xml([voc_object(name)])).encode(encoding))
    train = load_annotations(root, "train")
    assert [category.name for category in train.categories] == [name]
    assert train.findings == ()


def test_an_encoding_that_is_not_the_stated_one(make_voc):
    root = make_voc({"a": "", "b": ""})
    for name, text in {"a": "Größe", "b": "\x81ñ"}.items():  # \x81 is no character of cp1252
        content = '<?xml version="1.0" encoding="utf-8"?>' + voc_xml([voc_object(text)])
        (root / f"Annotations/{name}.xml").write_bytes(content.encode("latin-1"))
    train = load_annotations(root, "train")
    assert [category.name for category in train.categories] == ["Größe", "\x81ñ"]
    assert [(f.kind, f.action) for f in train.findings] == [("xml-encoding", "repaired")] * 2
    assert "read as cp1252" in train.findings[0].message


def write_flat(root, write_image, xml_folder, image_folder, names=("a", "b"), suffix=".xml"):
    for i, name in enumerate(names):
        write_image(root / image_folder / f"{name}.jpg", seed=i)
        (root / xml_folder).mkdir(parents=True, exist_ok=True)
        (root / xml_folder / f"{name}{suffix}").write_text(voc_xml([voc_object(name)]))
    return root


@pytest.mark.parametrize(
    ("xml_folder", "image_folder"),
    [
        *(("annotations", "images"), ("annots", "images"), ("labels", "images"), ("xmls", "JPEGImages"), ("", "")),
        *(("data", "data"), ("annotations/xmls", "images"), ("Annotations", "photos"), ("labels", ""), ("", "images")),
        *(("Annotations/more", "Images/more"), ("archive/annotations", "archive/images"), ("archive", "archive")),
    ],
)
@pytest.mark.parametrize("suffix", [".xml", ".XML"])
def test_flat_sets(tmp_path, write_image, xml_folder, image_folder, suffix):
    """Folders as raccoon, kangaroo, the Oxford pets and others have them, without a split."""
    root = write_flat(tmp_path, write_image, xml_folder, image_folder, suffix=suffix)
    (root / "data").mkdir(exist_ok=True)
    (root / "data" / "raccoon_labels.csv").write_text("filename,width,height,class,xmin,ymin,xmax,ymax\n")
    hidden = root / xml_folder / "._a.xml"
    hidden.write_bytes(b"\0\5\x16\7\0\2")
    assert detect_format(root) == "voc"
    assert default_splits(root) == ("all", None)
    annotations = load_annotations(root, "all")
    assert [record.path.name for record in annotations.images] == ["a.jpg", "b.jpg"]
    assert annotations.findings == ()


@pytest.mark.parametrize(
    ("xml_folder", "image_folder"),
    [("{}/annotations", "{}/images"), ("annotations/{}", "images/{}"), ("{}", "{}"), ("{}/xml", "{}")],
)
def test_a_folder_for_each_split(tmp_path, write_image, xml_folder, image_folder):
    for split in ("train", "val"):  # the same names in both: each has its own image
        write_flat(tmp_path, write_image, xml_folder.format(split), image_folder.format(split))
    assert default_splits(tmp_path) == ("train", "val")
    for split in ("train", "val"):
        images = load_annotations(tmp_path, split).images
        assert [record.path.relative_to(tmp_path).as_posix() for record in images] == [
            f"{image_folder.format(split)}/{name}.jpg" for name in "ab"
        ]


def test_images_of_each_split_and_labels_of_all(tmp_path, write_image):
    root = write_flat(tmp_path, write_image, "annotations", "images/train")
    write_flat(root, write_image, "annotations", "images/val", names=("c", "d"))
    write_image(root / "images/val/e.jpg")
    assert default_splits(root) == ("train", "val")
    assert named(root) == ["a.jpg", "b.jpg"]
    assert named(root, "val") == ["c.jpg", "d.jpg"]
    val = load_annotations(root, "val")
    assert [f.message for f in val.findings if f.kind == "image-without-labels"][0].endswith("are not used (e.jpg).")
    write_image(root / "images/train/c.jpg")  # whose boxes are in c.xml?
    assert named(root, "val") == ["d.jpg"]


def test_a_folder_of_files_and_of_folders_of_them_is_read_whole(tmp_path, write_image):
    write_flat(tmp_path / "set", write_image, "", "")
    write_flat(tmp_path / "set", write_image, "more", "more", names=("c",))
    annotations = load_annotations(tmp_path / "set", "all")
    assert [record.path.name for record in annotations.images] == ["a.jpg", "b.jpg", "c.jpg"]


def test_a_folder_for_each_class_is_no_split(tmp_path, write_image):
    for name in ("cat", "dog"):
        write_flat(tmp_path, write_image, name, name, names=(name,))
    assert available_splits(tmp_path) == ["cat", "dog", "all"]
    assert named(tmp_path, "all") == ["cat.jpg", "dog.jpg"]


def test_labels_beside_lists(tmp_path, write_image):
    """Cosmicad's: `labels/` of XML files beside `ImageSets/Main`."""
    write_flat(tmp_path, write_image, "labels", "images")
    for split, name in {"train": "a", "val": "b"}.items():
        (tmp_path / "ImageSets/Main").mkdir(parents=True, exist_ok=True)
        (tmp_path / f"ImageSets/Main/{split}.txt").write_text(name)
    assert default_splits(tmp_path) == ("train", "val")
    assert named(tmp_path, "val") == ["b.jpg"]


@pytest.mark.parametrize(
    "content",
    ['<?xml version="1.0"?><!-- <annotation> --><manifest package="x"/>', "<annotations><image/></annotations>"],
)
def test_other_xml_is_no_data_set(tmp_path, write_image, content):
    write_image(tmp_path / "app/a.jpg")
    for folder in ("app", "annotations"):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / "main.xml").write_text(content)
    assert available_splits(tmp_path, "voc") == []


def test_a_name_with_the_image_suffix(tmp_path, write_image):
    write_flat(tmp_path, write_image, "annots", "images")
    (tmp_path / "annots/a.xml").rename(tmp_path / "annots/a.jpg.xml")
    assert named(tmp_path, "all") == ["a.jpg", "b.jpg"]


def test_beside_a_yolo_file(tmp_path, write_image, make_yolo):
    """XML files without splits, and what was made of them."""
    write_flat(tmp_path, write_image, "annotations", "images")
    labels = {"images/a.jpg": "0 .5 .5 .2 .2", "more/images/b.jpg": "0 .5 .5 .2 .2"}
    root = make_yolo(labels, root=tmp_path)
    assert detect_format(root) == "voc"
    (root / "data.yaml").write_text("train: images\nval: more/images\nnames: [cat]\n")
    assert load_annotations(root, "val").format == "yolo"
    assert load_annotations(root, "all", format="voc").format == "voc"


def test_orphans(tmp_path, write_image):
    root = write_flat(tmp_path, write_image, "annots", "images")
    for name in ("c", "d"):
        write_image(root / f"images/{name}.jpg")
    write_image(root / "images/._e.jpg")
    (root / "annots/ghost.xml").write_text(voc_xml([]))
    annotations = load_annotations(root, "all")
    found = {finding.kind: finding for finding in annotations.findings}
    assert set(found) == {"missing-image", "image-without-labels"}
    assert (found["image-without-labels"].action, found["image-without-labels"].count) == ("note", 2)
    assert "(c.jpg, d.jpg)" in found["image-without-labels"].message
    assert annotations.num_images_left_out == 1


def test_which_image_is_whose(tmp_path, write_image, make_voc):
    """Photos and masks in folders of unknown names, `<filename>` against the file's own name, one image for two."""
    write_flat(tmp_path / "masked", write_image, "annots", "photos")
    write_image(tmp_path / "masked/masks/a.png")
    assert [f.kind for f in load_annotations(tmp_path / "masked", "all").findings][-1] == "every-image-missing"
    root = make_voc({"a": voc_xml([]).replace("x.jpg", r"C:\set\a.png"), "b": voc_xml([]).replace("x.jpg", "a.jpg")})
    write_image(root / "JPEGImages/a.png")
    annotations = load_annotations(root, "train")
    assert [record.path.name for record in annotations.images] == ["a.png", "b.jpg"]
    assert [(f.kind, f.action) for f in annotations.findings] == [("file-name-differs", "note")]
    (root / "JPEGImages/b.jpg").unlink()
    for name in "ab":  # renamed: both state one image
        (root / f"Annotations/{name}.xml").rename(root / f"Annotations/new_{name}.xml")
        (root / f"Annotations/new_{name}.xml").write_text(voc_xml([]).replace("x.jpg", "a"))
    (root / "JPEGImages/a.png").unlink()
    (root / "ImageSets/Main/train.txt").unlink()
    annotations = load_annotations(root, "all")
    assert len(annotations.images) == 1
    (finding,) = annotations.findings
    assert (finding.kind, finding.action) == ("ambiguous-image", "refused")


@pytest.mark.parametrize(
    ("stated", "sizes", "finding"),
    [
        ("{0}", [(64, 48)] * 6, ("file-names-differ", "refused", 6)),
        ("{0}", [(64, 48 + i) for i in range(6)], ("file-name-differs", "note", 1)),  # the stated sizes tell
        ("0", [(64, 48)] * 6, ("file-name-differs", "note", 1)),  # of the file that all are copies of
        ("img{0}", [(64, 48)] * 6, None),  # as they were called before
    ],
)
def test_file_names_of_other_images(make_voc, write_image, stated, sizes, finding):
    files = {}
    for i, (width, height) in enumerate(sizes):
        size = f"<size><width>{width}</width><height>{height}</height></size>"
        files[str(i)] = voc_xml([voc_object()], size).replace("x.jpg", f"{stated.format((i + 1) % 6)}.jpg")
    root = make_voc(files)
    for i, size_wh in enumerate(sizes):
        write_image(root / f"JPEGImages/{i}.jpg", size_wh, seed=i)
    annotations = load_annotations(root, "train")
    assert [record.path.name for record in annotations.images] == [f"{i}.jpg" for i in range(6)]
    found = annotations.findings
    assert (found and (found[0].kind, found[0].action, found[0].count)) == (finding or ())


def test_copies_that_state_the_file_names_of_their_originals(make_voc, kinds):
    files = {str(i): voc_xml([voc_object()]).replace("x.jpg", f"{i}.jpg") for i in range(6)}
    files |= {f"flipped_{name}": xml for name, xml in files.items()}
    annotations = load_annotations(make_voc(files), "train")
    assert len(annotations.images) == 12
    assert kinds(annotations) == {"file-name-differs": "note"}


def test_numbers_and_shapes(make_voc):
    turned = "<cx>32</cx><cy>24</cy><w>20</w><h>10</h><angle>1.5707963267948966</angle>"
    objects = [
        voc_object(box=("5,5", "6.25", "25", "16,0")),
        voc_object(box=("1,234", 6, 25, 16)),  # one and a bit, or a thousand
        f"<object><type>robndbox</type><name>cat</name><robndbox>{turned}</robndbox></object>",
        "<object><name>cat</name><polygon><x1>3</x1><y1>4</y1><x2>9</x2><y2>4</y2><x3>6</x3><y3>8</y3></polygon></object>",
        "<object><name>cat</name><deleted>1</deleted><polygon/></object>",
        "<object><name>cat</name><polygon><pt><x>1</x><y>2</y></pt><pt><x>5</x><y>9</y></pt></polygon></object>",
        "<object><name>cat</name><points><x1>3</x1></points></object>",
    ]
    annotations = load_annotations(make_voc({"a": voc_xml(objects)}), "train")
    assert annotations.images[0].boxes_xyxy.tolist() == [
        [5.5, 6.25, 25, 16],
        [27, 14, 37, 34],
        [3, 4, 9, 8],
        [1, 2, 5, 9],
    ]
    assert [(f.kind, f.action, f.where[-1]) for f in annotations.findings] == [
        ("box-from-shape", "note", "3"),
        ("box-from-shape", "note", "4"),
        ("deleted-object", "note", "5"),
        ("box-from-shape", "note", "6"),
        ("missing-box", "dropped", "7"),
        ("nan-box", "refused", "2"),
    ]
    assert "but <name>, <points>" in annotations.findings[4].message

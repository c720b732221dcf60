import pytest

from ddetr.datasets import available_splits, default_splits, detect_format, load_annotations
from ddetr.errors import InputError

HEAD = """<?xml version="1.0" encoding="utf-8"?>
<annotations>
  <version>1.1</version>
  <meta>
    <task>
      <id>4</id>
      <name>segmentation</name>
      <size>27</size>
      <mode>annotation</mode>
      <labels>
        <label><name>car</name><color>#a76ade</color><type>any</type><attributes></attributes></label>
        <label><name>person</name><color>#c06060</color><type>any</type><attributes></attributes></label>
      </labels>
    </task>
    <dumped>2018-09-25 21:50:22.356000+00:00</dumped>
  </meta>
"""
BOX = '<box label="car" source="manual" occluded="0" xtl="5.00" ytl="6.00" xbr="25.00" ybr="16.50" z_order="0"></box>'


def image(name="a.jpg", shapes=BOX, subset=None):
    own = f' subset="{subset}" task_id="4"' if subset else ""
    return f'<image id="0" name="{name}"{own} width="64" height="48">\n{shapes}\n</image>\n'


@pytest.fixture
def write_cvat(tmp_path, write_image):
    def write(*elements, images=("images/a.jpg",), file="annotations.xml"):
        for i, name in enumerate(images):
            write_image(tmp_path / name, seed=i)
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"{HEAD}{''.join(elements)}</annotations>\n", encoding="utf-8")
        return tmp_path

    return write


def test_shapes(write_cvat):
    shapes = [
        BOX,
        '<box label="person" xtl="20" ytl="20" xbr="40" ybr="30" rotation="90.00"/>',
        '<polygon label="car" occluded="0" points="10.0,10.5;20.0,12.5;15.0,30.0" z_order="0"/>',
        '<ellipse label="car" cx="30" cy="20" rx="10" ry="5" rotation="90"/>',
        '<mask label="person" occluded="0" rle="1, 2, 3" left="3" top="4" width="10" height="20" z_order="0"/>',
        '<polyline label="car" points="1,1;5,5"/><points label="car" points="1,1"/>',
        '<cuboid label="car" xtl1="1" ytl1="1"/><skeleton label="person"><points label="eye" points="1,1"/></skeleton>',
        '<tag label="rainy" source="manual"></tag><box xtl="1" ytl="1" xbr="5" ybr="5"/>',
        '<box label="car" xtl="x" ytl="1" xbr="5" ybr="5"/>',
    ]
    root = write_cvat(image(shapes="".join(shapes)))
    assert detect_format(root) == "cvat"
    assert default_splits(root) == ("all", None)
    annotations = load_annotations(root, "all")
    assert [category.name for category in annotations.categories] == ["car", "person"]
    assert annotations.images[0].labels.tolist() == [0, 1, 0, 0, 1]
    assert annotations.images[0].boxes_xyxy.tolist() == [
        [5, 6, 25, 16.5],
        [25, 15, 35, 35],
        [10, 10.5, 20, 30],
        [25, 10, 35, 30],
        [3, 4, 13, 24],
    ]
    assert [(f.kind, f.action, f.where.rpartition(" ")[2]) for f in annotations.findings] == [
        *(("missing-box", "dropped", str(number)) for number in (6, 7, 8, 9)),
        ("missing-name", "dropped", "11"),
        ("nan-box", "refused", "12"),
    ]


def test_subsets_are_splits(write_cvat):
    root = write_cvat(
        *(image("a.jpg", subset="Train"), image("b.jpg", subset="Validation"), image("sub/a.jpg", subset="Train")),
        images=("images/Train/a.jpg", "images/Train/sub/a.jpg", "images/Validation/b.jpg"),
    )
    assert available_splits(root) == ["Train", "Validation"]
    assert default_splits(root) == ("Train", "Validation")
    assert [r.path.relative_to(root).as_posix() for r in load_annotations(root, "Train").images] == [
        "images/Train/a.jpg",
        "images/Train/sub/a.jpg",
    ]
    (root / "images/Train/sub/a.jpg").unlink()  # its boxes must not come to the other one
    train = load_annotations(root, "Train")
    assert [(f.kind, f.action) for f in train.findings] == [("missing-image", "dropped")]
    assert len(train.images) == 1


@pytest.mark.parametrize(
    ("name", "place"),
    [
        *(("a.jpg", "images/a.jpg"), ("a.jpg", "a.jpg"), ("batch/a.jpg", "images/batch/a.jpg")),
        *(("batch/a.jpg", "images/a.jpg"), ("../../b/a.jpg", "images/a.jpg"), ("b\\a.jpg", "images/a.png")),
    ],
)
def test_where_images_lie(write_cvat, name, place):
    root = write_cvat(image(name), images=(place,))
    for path in (root, root / "annotations.xml"):
        assert detect_format(path) == "cvat"
        assert load_annotations(path, "all").images[0].path == root / place


@pytest.mark.parametrize(
    ("images", "found"),
    [
        (["images/raw/a.jpg", "images/masks/a_mask.jpg", "images/raw/b.jpg"], ["images/raw/a.jpg", "images/raw/b.jpg"]),
        (["a/a.jpg", "b/b.jpg"], ["a/a.jpg", "b/b.jpg"]),
        (["images/a.jpg", "more/b.jpg"], ["images/a.jpg", "more/b.jpg"]),
        (["images/a.jpg", "masks/a.jpg", "masks/b.jpg"], ["images/a.jpg"]),  # nothing from a folder that runs beside
        (["x/a.jpg", "y/a.jpg", "x/b.jpg"], ["x/b.jpg"]),  # of two neither
    ],
)
def test_images_in_folders_that_a_person_made(write_cvat, images, found):
    root = write_cvat(image("a.jpg"), image("b.jpg"), images=images)
    read = load_annotations(root, "all")
    assert [record.path.relative_to(root).as_posix() for record in read.images] == found
    assert len([f for f in read.findings if f.kind == "missing-image"]) == 2 - len(found)


def test_a_folder_of_its_own_for_the_file(write_cvat):
    root = write_cvat(image(), file="annotations/annotations.xml")
    assert load_annotations(root, "all").images[0].path == root / "images/a.jpg"


@pytest.mark.parametrize(
    ("file", "above"), [("annotations/annotations.xml", ""), ("my export/annotations.xml", "my export/")]
)
def test_subsets_of_the_only_export_are_splits(write_cvat, file, above):
    images = (f"{above}images/Train/a.jpg", f"{above}images/Validation/a.jpg")
    root = write_cvat(image(subset="Train"), image(subset="Validation"), images=images, file=file)
    (root / "README.md").touch()
    assert default_splits(root) == ("Train", "Validation")
    train, val = (load_annotations(root, split) for split in ("Train", "Validation"))
    assert [r.path.relative_to(root).as_posix() for r in (*train.images, *val.images)] == list(images)
    assert not (*train.findings, *val.findings)


def test_an_export_for_each_split(write_cvat):
    for split in ("train", "val"):
        root = write_cvat(image(), images=(f"{split}/images/a.jpg",), file=f"{split}/annotations.xml")
    assert default_splits(root) == ("train", "val")
    assert load_annotations(root, "val").images[0].path == root / "val/images/a.jpg"


def test_exports_beside_each_other(write_cvat):
    """Each is a split, and all together are what one trains on; two of one task contradict each other."""
    root = write_cvat(image(), file="task_1.xml", images=("images/a.jpg", "images/b.jpg"))
    write_cvat(image("b.jpg"), file="task_2.xml", images=())
    assert available_splits(root) == ["task_1", "task_2", "all"]
    annotations = load_annotations(root, "all")
    assert [record.path.name for record in annotations.images] == ["a.jpg", "b.jpg"]
    assert annotations.findings == ()
    write_cvat(image(), file="task_3.xml", images=())
    (finding,) = load_annotations(root, "all").findings
    assert (finding.kind, finding.action) == ("ambiguous-image", "refused")


def test_what_is_broken_beside_a_data_set_does_not_end_the_search(write_cvat, make_coco, tmp_path):
    """Another export that can't be read, in a folder of its own, as tools' own files lie about."""
    track = '<track id="0" label="car"><box frame="0" xtl="1" ytl="1" xbr="2" ybr="2" outside="0"/></track>'
    write_cvat(track, images=(), file="sets/video/annotations.xml")
    make_coco(root=tmp_path / "sets" / "deep" / "coco")
    with pytest.raises(InputError, match="no data set itself, but .*coco is one"):
        detect_format(tmp_path / "sets")


def test_a_video_says_what_to_export(write_cvat):
    root = write_cvat('<track id="0" label="car"><box frame="0" xtl="1" ytl="1" xbr="2" ybr="2" outside="0"/></track>')
    with pytest.raises(InputError, match=r"export of a video .* export the task as CVAT for images 1\.1"):
        detect_format(root)


@pytest.mark.parametrize(
    "content", ["<annotations><image>", '<!DOCTYPE a [<!ENTITY b "x">]><annotations>&b;</annotations>']
)
def test_broken_files(tmp_path, content):
    (tmp_path / "annotations.xml").write_text(content)
    with pytest.raises(InputError, match=r"annotations\.xml(: broken XML| can't be read: it declares the entity)"):
        detect_format(tmp_path)


def test_a_subset_that_only_the_folder_names(write_cvat):
    """Of two folders that have it nobody knows which is meant."""
    root = write_cvat(image(), image("b.jpg"), images=("images/Train/a.jpg", "images/Train/b.jpg", "images/old/b.jpg"))
    annotations = load_annotations(root, "all")
    assert [record.path for record in annotations.images] == [root / "images/Train/a.jpg"]
    assert [finding.kind for finding in annotations.findings if finding.action == "dropped"] == ["missing-image"]


def test_images_of_one_name(write_cvat):
    """Tasks of one project that have the same names: the file can belong to either."""
    annotations = load_annotations(
        write_cvat(image(), image(), image("b.jpg"), images=("images/a.jpg", "images/b.jpg")), "all"
    )
    assert [record.path.name for record in annotations.images] == ["b.jpg"]
    refused = [finding for finding in annotations.findings if finding.action == "refused"]
    assert [finding.kind for finding in refused] == ["ambiguous-image"] * 2
    assert "2 images have this name" in refused[0].message


def test_images_that_are_not_there(write_cvat):
    root = write_cvat(image("x.jpg"), image("", shapes=""), images=())
    assert [f.kind for f in load_annotations(root, "all").findings] == [
        *["missing-image"] * 2,
        "every-image-missing",
    ]

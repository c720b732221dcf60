"""What is no data set that is read is named, and what can be done about it said."""

from collections.abc import Callable
from pathlib import Path

import pytest

from ddetr.datasets import detect_format
from ddetr.errors import InputError

IMAGE = "an image"


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"train/cars.tfrecord": ""}, r"TensorFlow records \(train/cars.tfrecord\): `fiftyone convert"),
        ({"train.tfrecord-00000-of-00010": ""}, "TensorFlow records"),
        ({"data/train-00000-of-00001.parquet": "PAR1"}, "Parquet .* `datasets.load_dataset`"),
        ({"dataset_dict.json": "{}", "train/data-00000-of-00001.arrow": ""}, "Arrow tables"),
        ({"a.json": '{"project": {"vid_list": ["1"]}, "attribute": {"1": {"aname": "c"}}}', "a.jpg": IMAGE}, "VIA"),
        ({"meta.json": "{}", "ds/ann/a.jpg.json": "{}", "ds/img/a.jpg": IMAGE}, "a Supervisely project"),
        ({"annotations/train.json": '{"info": {}, "categories": {"label": {}}, "items": []}'}, "Datumaro's JSON"),
        ({"set.vott": "{}", "a.jpg": IMAGE}, "VoTT.*datum convert"),
        ({"a.json": '[{"name": "a.jpg", "labels": [{"box2d": {"x1": 1}}]}]'}, "as BDD100K has .*scalabel.label.to_co"),
        (
            {"labels/100k/val/a.json": '{"frames": [{"objects": [{"box2d": {}}]}]}', "images/100k/val/a.jpg": IMAGE},
            "as BDD100K has .*older ones with a file for each image, write",
        ),
        (
            {"a.json": '{"images": [{"file": "a.jpg", "detections": [{"conf": 1}]}], "detection_categories": {}}'},
            "MegaDetector found, which are detections",
        ),
        ({"labels_with_ids/train/a.txt": "2 -1 0.77 0.2 0.01 0.02\n", "images/train/a.jpg": IMAGE}, "rows of JDE and"),
        ({"gtFine/train/aachen/aachen_0_gtFine_polygons.json": "{}"}, "Cityscapes"),
        ({"export.ndjson": '{"data_row": {"id": "c"}}'}, "Labelbox"),
        ({"output.manifest": "{}"}, "SageMaker"),
        ({"wider_face_split/wider_face_train_bbx_gt.txt": "0--Parade/0.jpg\n"}, "WIDER FACE"),
        (
            {"train/MOT17-02/gt/gt.txt": "1,1,912,484,97,109,0,7,1\n", "train/MOT17-02/img1/1.jpg": IMAGE},
            "MOT's tracks",
        ),
        (
            {"training/label_02/0000.txt": f"0 2 Car 0 0 -1.79 {'296.7 ' * 10}-2.1\n", "training/1.png": IMAGE},
            "KITTI's tracks",
        ),
        ({"training.xml": "<dataset><images><image file='a.jpg'></image></images></dataset>"}, "dlib's imglab"),
        ({"a.csv": "TRAIN,gs://b/a.jpg,cat,0.1,0.1,,,0.5,0.5,,\n", "a.jpg": IMAGE}, "AutoML"),
        ({"train.jsonl": '{"image": "a.jpg", "suffix": "<loc0123> cat"}\n', "a.jpg": IMAGE}, "PaliGemma.*as COCO"),
        ({"annotations/a.json": '[{"image_id": 1, "score": 0.9, "bbox": [1, 2, 3, 4]}]'}, "detections of a model"),
        (
            {"a.json": '[{"image_id": 1, "category_id": 3, "bbox": [1, 2, 3, 4]}]', "i/1.jpg": IMAGE},
            "COCO's objects wi",
        ),
        (
            {"a.json": '{"frame": "a", "objects": []}', "a.jpg": IMAGE},
            r"each image.*\(a.json\): it has frame, objects;",
        ),
        ({"a.csv": "filename,label,x,y,w,h\na.jpg,cat,1,2,3,4\n"}, "it has filename, label, x, y, w, h"),
        ({"train.json": "{'images': [{'id': 1, 'file_name': 'a.jpg'}], 'annotations': []}"}, "COCO's words.*json.dump"),
        ({"a.json": '[{"images": [{"id": 1, "file_name": "a.jpg"}]}]', "a.jpg": IMAGE}, "COCO's words.*one object"),
        ({"a.json.txt": '{"images": [{"id": 1, "file_name": "a.jpg"}]}', "a.jpg": IMAGE}, r"COCO's words.*\*\.json"),
        ({"labelTxt/P0000.txt": "imagesource:GoogleEarth\n", "images/P0000.png": IMAGE}, "DOTA"),
        ({"annfiles/P1.txt": "937.0 913.0 921.0 912.0 923.0 874.0 940.0 875.0 small-vehicle 0\n"}, "DOTA"),
        ({"annotations/1.txt": "684,8,273,116,0,0,0,0\n406,119,265,70,0,0,0,0\n", "images/1.jpg": IMAGE}, "VisDrone"),
        (
            {"0001.txt": "15 0.430176 0.397786 0.418945 0.149740\n", "b.txt": "0 0.5 0.5 1 1\n"},
            "YOLO's .*called labels",
        ),
        ({"Annotations/1.txt": "0 0.5 0.5 0.2 0.2\n", "Images/1.jpg": IMAGE}, "YOLO's .*called labels"),
        ({"annotations/captions_train2017.json": "{}", "train2017/1.jpg": IMAGE}, r"another task .*instances_\*\.json"),
        (
            {"a.json": '{"image": {"image_id": 1}, "annotations": [{"stability_score": 1}]}', "a.jpg": IMAGE},
            "Segment A",
        ),
        ({"train/Soda can/Label/1.txt": "Soda can 178.56 749.4 238.1 812.2\n", "train/Soda can/1.jpg": IMAGE}, "OIDv4"),
        (
            {
                "a/OID/Dataset/train/Cat/1.jpg": IMAGE,
                "a/OID/Dataset/train/Dog/2.jpg": IMAGE,
                "a/OID/Dataset/train/Cat/Label/1.txt": "Cat 1.5 2 30 40\n",
            },
            "OIDv4",
        ),
        ({f"1/2/3/4/5/6/7/{name}/a.jpg": IMAGE for name in ("cat", "dog")}, "no data set that is known"),
        (
            {"train.txt": "imgs/a.jpg 5,6,25,16,0 50,60,90,100,1\nimgs/b.jpg 1,2,3,4,0\n", "imgs/a.jpg": IMAGE},
            "keras-yolo3",
        ),
        (
            {"project.csv": "annotation_id,annotator,id,image,label,lead_time\n", "a.jpg": IMAGE},
            "Label Studio.* as JSON",
        ),
        ({"train.csv": "image_id,bbox\na,\"[{'x': 834, 'y': 222}]\"\n", "a.jpg": IMAGE}, "as lists in one column"),
        ({"set.zip": "PK", "a.jpg": IMAGE}, r"an archive \(set.zip\): unpack it first"),
        ({"VOC.tar.gz": ""}, "unpack it first"),
        (
            {"train.csv": "image_id,width,height,bbox,source\n", "train/a.jpg": IMAGE},
            "name its columns filename, class",
        ),
        ({"JPEGImages/a.jpg": IMAGE, "SegmentationClass/a.png": IMAGE}, "segmentation masks"),
        ({"train/cat/1.jpg": IMAGE, "train/dog/2.jpg": IMAGE}, r"2 images in folders \(cat, dog\).*classification"),
        (
            {"train/cat/1.jpg": IMAGE, "train/dog/2.jpg": IMAGE, "README.md": "Pets", "LICENSE": "", "get.py": ""},
            r"2 images in folders \(cat, dog\).*classification",
        ),
        ({"a/1.jpg": IMAGE, "a_not/1.txt": "466 441 493 470 3\n4 5 9 8 1\n", "gt.zip": ""}, "corners of boxes in pix"),
        ({"a/1.jpg": IMAGE, "a/1.txt": "car,466,441,493,470\n"}, r"corners .* \(a/1.txt\): write its boxes"),
        ({"1.jpg": IMAGE, "2.jpg": IMAGE}, "2 images and no annotations"),
        ({"images/1.jpg": IMAGE}, "1 images and no annotations"),
        ({"a.mp4": "", "b.MOV": ""}, r"videos \(a.mp4\) and no images: take single frames"),
        ({"train.json": "version https://git-lfs.github.com/spec/v1\n", "a.jpg": IMAGE}, "git lfs pull"),
    ],
)
def test_what_is_found_is_named(
    tmp_path: Path, write_image: Callable[..., Path], files: dict[str, str], said: str
) -> None:
    for i, (name, text) in enumerate(files.items()):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        if text is IMAGE:
            write_image(tmp_path / name, seed=i)
        else:
            (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=said):
        detect_format(tmp_path)


def test_a_file_that_is_no_data_set(tmp_path: Path, write_image: Callable[..., Path]) -> None:
    (tmp_path / "set.zip").touch()
    with pytest.raises(InputError, match=r"it holds an archive: unpack it first|an archive: unpack"):
        detect_format(tmp_path / "set.zip")


def test_a_folder_too_high_or_too_low(tmp_path: Path, make_coco: Callable[..., Path]) -> None:
    root = make_coco(root=tmp_path / "download" / "sets" / "coco")
    (tmp_path / "download" / "notes").mkdir()  # a folder that is the only one is looked into
    with pytest.raises(InputError, match="download is no data set itself, but .*coco is one: give that path"):
        detect_format(tmp_path / "download")
    with pytest.raises(InputError, match="train is no data set itself, but .*coco is one"):
        detect_format(root / "train")
    (tmp_path / "tool" / "docs").mkdir(parents=True)
    deep = make_coco(root=tmp_path / "tool" / "x64" / "release" / "data")
    with pytest.raises(InputError, match=f"tool is no data set itself, but {deep} is one"):
        detect_format(tmp_path / "tool")
    make_coco(root=tmp_path / "download" / "sets" / "other")
    with pytest.raises(InputError, match="but there are .*coco, .*other: give one"):
        detect_format(tmp_path / "download" / "sets")

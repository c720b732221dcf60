"""Data: folders as they lie on disk in, padded batches out. In the order data flows:

config.py         DataConfig: where the data is, how it is loaded
annotations.py    Annotations, ImageRecord, Category, Finding: the form that every reader returns; rules for boxes
image_header.py   an image file's size and orientation, undecoded
images.py         the decode policy: read_image, image_size_hw
image_input.py    what people pass as an image (files, Pillow, arrays, tensors), by the same policy
image_files.py    finding image files and settling the frame that their boxes live in
coco_layout.py    where COCO data sets keep things
coco_json.py      a COCO file's JSON
coco_reader.py    reader: COCO
voc.py            reader: Pascal VOC
yolo.py           reader: YOLO
load.py           load_annotations: which format, which split, which reader
splits.py         settings -> annotations of a split
shapes.py         the embedded data set, drawn
audit.py          what is wrong with a data set, and whether training may start
transforms.py     augmentation recipes, normalisation
dataset.py        DetectionDataset: annotations to samples
collate.py        samples to a batch
coco.py           build_coco_dataset: the official call
"""

from ddetr.datasets.annotations import Annotations, Category, Finding, ImageRecord, ImageTable
from ddetr.datasets.audit import AuditReport, audit
from ddetr.datasets.coco import build_coco_dataset
from ddetr.datasets.collate import collate
from ddetr.datasets.dataset import DetectionDataset, sample_seed
from ddetr.datasets.images import image_size_hw, read_image, rgb_from_pillow
from ddetr.datasets.load import available_splits, default_splits, detect_format, load_annotations
from ddetr.datasets.shapes import draw_shapes
from ddetr.datasets.transforms import build_transform, normalize_images, padded_shapes, worst_padded_hw

__all__ = [
    "Annotations",
    "AuditReport",
    "Category",
    "DetectionDataset",
    "Finding",
    "ImageRecord",
    "ImageTable",
    "audit",
    "available_splits",
    "build_coco_dataset",
    "build_transform",
    "collate",
    "default_splits",
    "detect_format",
    "draw_shapes",
    "image_size_hw",
    "load_annotations",
    "normalize_images",
    "padded_shapes",
    "read_image",
    "rgb_from_pillow",
    "sample_seed",
    "worst_padded_hw",
]

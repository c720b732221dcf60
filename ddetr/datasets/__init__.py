"""Data: folders as they lie on disk in, padded batches out. In the order data flows:

config.py         DataConfig: where the data is, how it is loaded
annotations.py    Annotations, ImageRecord, Category, Finding: the form that every reader returns; rules for boxes
box_form.py       what a box's four numbers mean
image_formats.py  which image files are read, and what is said of the others
image_header.py   an image file's size and orientation, undecoded
images.py         the decode policy: read_image, image_size_hw
image_input.py    what people pass as an image (files, Pillow, arrays, tensors), by the same policy
image_files.py    finding image files and settling the frame that their boxes live in
readers/          one file for each format: COCO, Pascal VOC, YOLO, CSV and others
load.py           load_annotations: which format, which split, which reader
leaks.py          what training and validation share
related.py        which images belong together, by their names
splits.py         settings -> annotations of a split
shapes.py         the embedded data set, drawn
decoding.py       which images can't be decoded
audit.py          what only the whole of a data set shows: counts, classes, copies, files that do not decode
audit_report.py   what was found, as a table, and whether training may start
convert/          any data set that is read, written anew as COCO, YOLO or Pascal VOC
transforms.py     augmentation recipes, normalisation
augment.py        mosaic, mixup, large-scale jitter, colours, blur: what the options add to a recipe
dataset.py        DetectionDataset: annotations to samples
collate.py        samples to a batch
coco.py           build_coco_dataset: the official call
"""

import importlib
from typing import Any

from ddetr.datasets.audit import audit
from ddetr.datasets.collate import collate

# Name -> module. Loaded on first use: settings and help need none of what reads and transforms images. The two above
# are called like their modules, which would stand in their place.
_PUBLIC = {
    "Annotations": "ddetr.datasets.annotations",
    "AuditReport": "ddetr.datasets.audit_report",
    "Category": "ddetr.datasets.annotations",
    "DetectionDataset": "ddetr.datasets.dataset",
    "Finding": "ddetr.datasets.annotations",
    "ImageRecord": "ddetr.datasets.annotations",
    "ImageTable": "ddetr.datasets.annotations",
    "available_splits": "ddetr.datasets.load",
    "build_coco_dataset": "ddetr.datasets.coco",
    "build_transform": "ddetr.datasets.transforms",
    "default_splits": "ddetr.datasets.load",
    "detect_format": "ddetr.datasets.load",
    "draw_shapes": "ddetr.datasets.shapes",
    "image_size_hw": "ddetr.datasets.images",
    "load_annotations": "ddetr.datasets.load",
    "normalize_images": "ddetr.datasets.transforms",
    "padded_shapes": "ddetr.datasets.transforms",
    "read_image": "ddetr.datasets.images",
    "rgb_from_pillow": "ddetr.datasets.images",
    "sample_seed": "ddetr.datasets.dataset",
    "training_set": "ddetr.datasets.dataset",
    "worst_padded_hw": "ddetr.datasets.transforms",
}
__all__ = ["audit", "collate"]
__all__ += _PUBLIC


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ddetr.datasets' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)

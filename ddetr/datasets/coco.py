"""The official call: `build_coco_dataset(image_set, args)`."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import Annotations
from ddetr.datasets.dataset import DetectionDataset
from ddetr.datasets.load import default_splits, load_annotations
from ddetr.datasets.readers.coco.content import read_categories
from ddetr.datasets.transforms import official_eval, official_train
from ddetr.errors import InputError

logger = logging.getLogger(__name__)


def build_coco_dataset(image_set: str, args: Namespace | Mapping[str, Any]) -> DetectionDataset:
    """The data set of the official code, with its transforms and normalised images.

    Args:
        image_set: "train" or "val".
        args: a dict or Namespace of official flags. `coco_path`: the folder with `annotations/`, `train2017/` and
            `val2017/`, or with any other layout or format that `load_annotations` recognises. `masks` must be false.
            `cache_mode` is accepted (the system's file cache does its work). Others are not looked at.

    Unlike the official code's, labels are contiguous: `dataset.categories[label].category_id` is COCO's id. They are
    the training file's for both sets.
    """
    options = dict(args) if isinstance(args, Mapping) else vars(args)
    if image_set not in ("train", "val"):
        raise InputError(f'image_set is "train" or "val", not {image_set!r}')
    if options.get("masks"):
        raise InputError("masks=True is segmentation, which ddetr does not do; leave it out or set it to False")
    if not options.get("coco_path"):
        raise InputError("args must have coco_path, the folder of the data set")
    if options.get("cache_mode"):
        logger.info("cache_mode: images are not kept in memory; the operating system caches the files.")
    annotations = _load(Path(options["coco_path"]), image_set)
    train = image_set == "train"
    return DetectionDataset(annotations, official_train() if train else official_eval(), train=train)


def _load(coco_path: Path, image_set: str) -> Annotations:
    files = {name: coco_path / "annotations" / f"instances_{name}2017.json" for name in ("train", "val")}
    if files[image_set].is_file() and (coco_path / f"{image_set}2017").is_dir():
        categories = read_categories(files["train"]) if image_set == "val" and files["train"].is_file() else None
        return load_annotations(coco_path, f"{image_set}2017", format="coco", categories=categories)
    train_split, val_split = default_splits(coco_path)
    if image_set == "train":
        return load_annotations(coco_path, train_split)
    if val_split is None:
        raise InputError(f"{coco_path} has no validation split; it has {train_split}")
    return load_annotations(coco_path, val_split, categories=load_annotations(coco_path, train_split).categories)

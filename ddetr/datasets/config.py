"""Settings of a data set: where it is, and how training loads it. Each part that reads less takes the class with
less."""

from dataclasses import dataclass
from typing import Literal

from ddetr.settings import check_ranges, option


@dataclass(frozen=True)
class DataSource:
    """Where a data set is, and what of it is evaluated."""

    path: str
    """Folder of the data set: COCO, Pascal VOC or YOLO, read as it lies there."""
    format: Literal["auto", "coco", "voc", "yolo"] = "auto"
    """What the folder holds; "auto" recognises it."""
    val_split: str | None = None
    """Name of the validation split; by default the first of val, val2017, valid, test, ... that is there."""
    val_annotations: str | None = None
    """COCO annotation file of the validation split."""
    val_images: str | None = None
    """Folder of the validation images."""


@dataclass(frozen=True)
class TrainingSource(DataSource):
    """Where both splits of a data set are, and whether training may repair them."""

    train_split: str | None = None
    """Name of the training split; by default the first of train, train2017, ... that is there."""
    train_annotations: str | None = None
    """COCO annotation file of the training split, where it has another place or name."""
    train_images: str | None = None
    """Folder of the training images, where it has another place or name."""
    strict: bool = False
    """Refuse to train where the audit repaired or dropped anything."""


@dataclass(frozen=True)
class DataConfig(TrainingSource):
    """Where the images and annotations are, and how training loads them."""

    augmentation: Literal["official", "plain", "none"] = "official"
    """Training recipe: the paper's flips, scales and crops; a flip alone; or nothing."""
    image_size: int = option(800, at_least=32, at_most=8192)
    """Short side in pixels; the paper's scales, crops and longest side (1333) follow in proportion."""
    keep_empty: bool = True
    """Train on images without an object too, as the official code does."""
    buckets: bool = False
    """Sort the images of each step into micro-batches of similar shape, to save padding; a step has the same images. It
    helps where --device_batch_size is at least 2 and well below --batch_size."""
    padded_shapes: int | None = None
    """Pad batches to one of so many shapes (1 to 12), for torch.compile and cuDNN; by default to their largest
    sides."""
    num_workers: int | None = option(None, at_least=0, resume="free")
    """Processes that load images; by default up to 4, as many as there are cores to spare, and 0 for training on a
    processor with fewer than 4."""
    on_bad_image: Literal["skip", "raise"] = option("skip", resume="free")
    """An image that cannot be read: "skip" reports it and lets another one stand in, up to 1 % of the training images,
    or leaves it out of validation, whose metrics then say on how many images they were measured; "raise" stops."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.padded_shapes is not None:
            from ddetr.datasets.transforms import padded_shapes  # slow to import

            padded_shapes(self.image_size, self.padded_shapes)  # refuses a number that is out of range

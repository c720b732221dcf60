"""Settings of a data set: where it is, and how training loads it. Each part that reads less takes the class with
less."""

from dataclasses import dataclass
from typing import Literal

from ddetr.errors import InputError
from ddetr.settings import check_ranges, option

BoxForm = Literal["auto", "xywh", "xyxy", "cxcywh", "xywh-relative", "xyxy-relative", "cxcywh-relative"]


@dataclass(frozen=True)
class DataSource:
    """Where a data set is, and what of it is evaluated."""

    path: str
    """Folder of the data set: COCO, Pascal VOC, YOLO or another of the formats below, read as it lies there."""
    format: Literal[
        "auto",
        "coco",
        "voc",
        "kitti",
        "yolo",
        "cvat",
        "labelme",
        "csv",
        "label_studio",
        "via",
        "createml",
        "huggingface",
    ] = "auto"
    """What the folder holds; "auto" recognises it."""
    val_split: str | None = None
    """Name of the validation split; by default the first of val, val2017, valid, test, ... that is there."""
    val_annotations: str | None = None
    """Annotation file of the validation split, where it has another place or name: COCO's, a CSV table or the like."""
    val_images: str | None = None
    """Folder of the validation images, where they are not found by themselves."""
    boxes: BoxForm = "auto"
    """What the four numbers of a box are, where they are not what the format says (the audit tells): corners "xyxy",
    corner and size "xywh", centre and size "cxcywh", in pixels; with "-relative" in fractions of the image."""
    allow_incomplete: bool = False
    """Take what is there of a split of which more than half of the images are missing, or can't be read; by default it
    is refused: it looks like a wrong path, or a download that is not finished."""
    val_fraction: float | None = option(None, at_least=0.001, at_most=0.9)
    """Hold back this share of the training images for validation, for a data set without a validation split: 0.1 is
    every tenth image. Which ones depends on their names and split_seed alone. Copies that Roboflow made of one image
    stay together."""
    group_pattern: str | None = None
    """With val_fraction: a regular expression for image paths. Images that agree in what it matches, or in its groups,
    stay on one side: "(.*)_[0-9]+" keeps the frames of a video together."""
    split_seed: int = 0
    """With val_fraction: another number holds back other images."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.group_pattern is not None and self.val_fraction is None:
            raise InputError(
                "group_pattern says which images stay together where val_fraction holds some back: give both"
            )


@dataclass(frozen=True)
class TrainingSource(DataSource):
    """Where both splits of a data set are, and whether training may repair them."""

    train_split: str | None = None
    """Name of the training split; by default the first of train, train2017, ... that is there."""
    train_annotations: str | None = None
    """Annotation file of the training split, where it has another place or name: COCO's, a CSV table or the like."""
    train_images: str | None = None
    """Folder of the training images, where they are not found by themselves."""
    strict: bool = False
    """Refuse to train where the audit repaired or dropped anything."""


@dataclass(frozen=True)
class DataConfig(TrainingSource):
    """Where the images and annotations are, and how training loads them."""

    augmentation: Literal["official", "plain", "none"] = "official"
    """Training recipe: the paper's flips, scales and crops; a flip alone; or nothing."""
    image_size: int = option(800, at_least=32, at_most=8192)
    """Short side in pixels; the paper's scales, crops and longest side (1333) follow in proportion."""
    mosaic: float = option(0.0, at_least=0, at_most=1)
    """Probability of a mosaic: the image and three others around a point, cut where they meet. 0.5 is usual."""
    mixup: float = option(0.0, at_least=0, at_most=1)
    """Probability that another image shines through, at 45 to 55 %, with its objects. 0.5 is usual."""
    scale_jitter: float = option(0.0, at_least=0, at_most=1)
    """Probability of large-scale jitter: the image is resized by a factor of scale_jitter_low to scale_jitter_high and
    cut, or given a margin, to its size; where there is no mosaic."""
    scale_jitter_low: float = option(0.1, at_least=0.01, at_most=8)
    """Least factor of scale_jitter."""
    scale_jitter_high: float = option(2.0, at_least=0.01, at_most=8)
    """Largest factor of scale_jitter."""
    color_jitter: float = option(0.0, at_least=0, at_most=1)
    """Probability of another brightness, contrast, saturation and hue. 0.5 is usual."""
    blur: float = option(0.0, at_least=0, at_most=1)
    """Probability of a Gaussian blur, with a sigma of up to 2 pixels at image_size 800."""
    augmentation_off_epochs: int = option(0, at_least=0)
    """Last epochs without mosaic, mixup, scale_jitter, color_jitter and blur: the recipe of `augmentation` alone. 1 in
    10 is usual."""
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
        super().__post_init__()
        if self.scale_jitter_low > self.scale_jitter_high:
            raise InputError(
                f"scale_jitter_low must be at most scale_jitter_high, got {self.scale_jitter_low} and "
                f"{self.scale_jitter_high}"
            )
        if self.padded_shapes is not None:
            from ddetr.datasets.transforms import padded_shapes  # slow to import

            padded_shapes(self.image_size, self.padded_shapes)  # refuses a number that is out of range


# Fields of DataConfig that change no image, or only in the last epochs.
SEEN_NOWHERE = frozenset(
    ["keep_empty", "buckets", "padded_shapes", "num_workers", "on_bad_image", "augmentation_off_epochs"]
)


@dataclass(frozen=True)
class PageConfig:
    """What the page of `ddetr data show` has."""

    num_images: int = option(24, at_least=0, at_most=100)
    """Annotated images on the page, 40 kB each: of the rarest classes, with the smallest objects, at random."""
    split: Literal["train", "val", "both"] = "both"
    """Where they come from."""
    seed: int = option(42, at_least=0, at_most=2**32 - 1)
    """Of what is chosen at random, and of the augmentation, which is that of `ddetr train` with the same seed."""

    def __post_init__(self) -> None:
        check_ranges(self)

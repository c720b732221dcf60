"""The page of `ddetr data show`: a data set before it is trained on, in numbers, annotated images, and augmented
ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddetr.boxes import box_cxcywh_to_xyxy
from ddetr.datasets.annotations import Annotations
from ddetr.datasets.audit import audit
from ddetr.datasets.config import SEEN_NOWHERE, DataConfig, PageConfig, TrainingSource
from ddetr.datasets.dataset import DetectionDataset, sample_seed, training_set
from ddetr.datasets.images import read_image
from ddetr.errors import InputError
from ddetr.files import write_text
from ddetr.inference.drawing import draw_boxes, draw_dashed
from ddetr.printable import one_line
from ddetr.report import data_figures, tables, templates
from ddetr.report.charts import shown
from ddetr.report.data_pool import GROUPS, Choice, Pool, choose
from ddetr.report.pictures import PAGE_SIDE, data_uri, resized
from ddetr.untrusted import open_file
from ddetr.wording import first_few, plural

Progress = Callable[[int, int], None]  # (done, total) pictures

DATA_PAGE = "data.html"
PREVIEW_SIDE, NEAR_SIDE = 400, 280  # pixels of the long side
ZOOMED = 6  # times the side of an object, that its enlarged surroundings have
LEAST_WINDOW = 24  # pixels that they have at least
PREVIEW_IMAGES, PREVIEW_EPOCHS = 4, 4
NAMED_CLASSES = 12
MOST_TAGS = 40  # of a picture: more hide what they name
SECTIONS = {
    "data": "Data audit",
    "classes": "Classes",
    "sizes": "Sizes",
    "images": "Annotated images",
    "augmentation": "Augmentation",
}
_KIND = "data page"


def check_place(path: Path) -> None:
    """InputError where the page cannot go: a folder, or a file that is no page of this kind."""
    if path.is_dir():
        raise InputError(f"--output: {path} is a folder: expected the name of a file in it, such as {path / DATA_PAGE}")
    try:
        with open_file(path) as file:
            is_ours = f'content="ddetr {_KIND} '.encode() in file.read(2000)
    except FileNotFoundError:
        return
    except OSError as error:
        raise InputError(f"--output: {path} cannot be replaced ({error.strerror or error}); name another") from error
    if not is_ours:
        raise InputError(f"--output: {path} is there and is no page of `ddetr data show`: name another, or remove it")


def write_data_page(
    path: Path,
    train: Annotations,
    val: Annotations | None,
    data: DataConfig,
    page: PageConfig,
    progress: Progress | None = None,
) -> list[tuple[str, str]]:
    """Writes the page, whole or not at all.

    Args:
        path: of the file.
        train, val: the splits, of the same classes; `val` may be None.
        data: the settings of training: its augmentation and its size of images.
        page: which images are shown.
        progress: called with (done, total) pictures.

    Returns:
        (path, reason) of each image that was to be shown and cannot be read.

    Raises:
        InputError: there is no validation split, and its images are wanted.
        OSError: the file cannot be written.
    """
    if page.split == "val" and val is None:
        raise InputError("--split val: there is no validation split; expected train")
    named = [("training", train)] + ([("validation", val)] if val is not None else [])
    pools = [(role, Pool.of([split], data.image_size)) for role, split in named]
    wanted = {"train": [train], "val": [val], "both": [split for _, split in named]}[page.split]
    pool = Pool.of([split for split in wanted if split is not None], data.image_size)
    names = [one_line(category.name) or f"class {label}" for label, category in enumerate(train.categories)]
    report = audit(train, val, strict=data.strict)
    choices = choose(pool, page.num_images, page.seed)
    previewed = _previewed(pools[0][1], page.seed)
    total, done, failures = len(choices) + len(previewed), 0, []

    def made(figure: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total)
        if figure["reason"]:
            failures.append((figure["path"], figure["reason"]))
        return figure

    images = [(choice.group, made(_annotated(pool, choice, names))) for choice in choices]
    augmented = training_set(train, data)
    numbers = tables.data(report.to_dict())
    text = templates.render(
        "data_page.html",
        kind=_KIND,
        name=Path(data.path).resolve().name,
        sections=SECTIONS,
        data_path=data.path,
        heading=f"{train.format}: " + ", ".join(f"{len(split.images):,} {role} images" for role, split in named),
        refused=len(report.refused),
        data=numbers,
        by_class=data_figures.by_class(pools, len(names)),
        classes=_class_remarks(report.train.class_counts, names),
        charts=data_figures.charts(pools),
        size_rows=data_figures.size_rows(pools),
        size_names=[f"{name} ({_range(low, high)})" for name, low, high in tables.SIZES],
        image_sizes=data_figures.image_sizes(pools),
        image_size=data.image_size,
        groups=[(group, [figure for of, figure in images if of == group]) for group in GROUPS],
        num_images=len(pool.sizes_hw),
        most_tags=MOST_TAGS,
        has_ignored=bool(pool.objects.ignore.any()),
        augmentation=_augmentation(data),
        seed=page.seed,
        previews=[made(_preview(augmented, index, page.seed, names)) for index in previewed],
    )
    write_text(path, text)
    return failures


def _annotated(pool: Pool, choice: Choice, names: Sequence[str]) -> dict[str, Any]:
    """An image with its objects, and what there is to say about it; with its smallest object enlarged where that is
    why it is shown."""
    record = pool.record(choice.image)
    height, width = record.size_hw
    counted = ~record.ignore
    num_objects = int(counted.sum())
    said = [pool.split_of(choice.image).name, f"{width} x {height} pixels"]
    said.append(plural(num_objects, "object"))
    if num_objects:
        said[-1] += f": {tables.listed(record.labels[counted], names.__getitem__)}"
    if not counted.all():
        said.append(f"{(~counted).sum():,} ignored")
    if choice.label is not None:
        said.append(f"shown for {names[choice.label]}")
    if choice.object is not None:
        side, trained = pool.sides[choice.object], pool.trained_sides[choice.object]
        said.append(f"the smallest, {names[pool.objects.labels[choice.object]]}, has {side:.1f} pixels a side, "
                    f"{trained:.1f} as trained")  # fmt: skip
    figure = {"name": record.path.name, "path": str(record.path), "reason": "", "said": "; ".join(said)}
    try:
        image = read_image(record.path, record.size_hw)
    except InputError as error:
        return figure | {"reason": str(error), "pictures": []}
    pictures = [_picture(_drawn(image, record.boxes_xyxy, record.labels, record.ignore, names, PAGE_SIDE))]
    if choice.object is not None:
        box, label = pool.objects.boxes_xyxy[choice.object], pool.objects.labels[choice.object]
        left, top, right, bottom = _window(box, record.size_hw)
        offset = np.array([left, top, left, top], np.float32)
        near = image[:, top:bottom, left:right]
        near = _drawn(near, box[None] - offset, label[None], np.zeros(1, bool), names, NEAR_SIDE)
        said = f"enlarged: {right - left} x {bottom - top} pixels at ({left}, {top})"
        pictures.append(_picture(near) | {"said": said})
    return figure | {"pictures": pictures}


def _preview(dataset: DetectionDataset, index: int, seed: int, names: Sequence[str]) -> dict[str, Any]:
    """An image as the first epochs get it."""
    record = dataset.annotations.images[index]
    figure = {"name": record.path.name, "path": str(record.path), "reason": "", "pictures": []}
    for epoch in range(PREVIEW_EPOCHS):
        try:
            image, target = dataset[index, sample_seed(seed, epoch, index)]
        except InputError as error:
            return figure | {"reason": str(error)}
        height, width = image.shape[1:]
        boxes = (box_cxcywh_to_xyxy(target["boxes"]) * torch.tensor([width, height] * 2)).numpy()
        ignore = np.zeros(len(boxes), bool)
        drawn = _drawn(image, boxes, target["labels"].numpy(), ignore, names, PREVIEW_SIDE)
        said = f"epoch {epoch + 1}: {width} x {height}, {plural(len(boxes), 'object')}"
        figure["pictures"].append(_picture(drawn) | {"said": said})
    return figure


def _drawn(
    image: Tensor, boxes_xyxy: np.ndarray, labels: np.ndarray, ignore: np.ndarray, names: Sequence[str], long_side: int
) -> Tensor:
    """The image (3, h, w) at this long side with its boxes (n, 4), the ignored ones dashed."""
    picture, scale = resized(image.contiguous(), long_side)
    boxes = torch.from_numpy(boxes_xyxy * np.float32(scale))
    counted = torch.from_numpy(~ignore)
    if ignore.any():
        picture = draw_dashed(picture, boxes[~counted])
    labels = labels[~ignore].tolist()
    of_boxes = [names[label] for label in labels]
    return draw_boxes(picture, boxes[counted], labels, of_boxes, tags=len(labels) <= MOST_TAGS)


def _picture(picture: Tensor) -> dict[str, Any]:
    """The source of an <img> and its size."""
    return {"source": data_uri(picture), "width": picture.shape[2], "height": picture.shape[1], "said": ""}


def _window(box_xyxy: np.ndarray, size_hw: tuple[int, int]) -> tuple[int, int, int, int]:
    """Left, top, right, bottom of the whole pixels around a box, inside the image."""
    height, width = size_hw
    left, top, right, bottom = box_xyxy.tolist()
    side = max(LEAST_WINDOW, math.ceil(ZOOMED * max(right - left, bottom - top)))
    x = max(0, min(round((left + right - side) / 2), width - side))
    y = max(0, min(round((top + bottom - side) / 2), height - side))
    return x, y, min(width, x + side), min(height, y + side)


def _previewed(pool: Pool, seed: int) -> list[int]:
    """Training images whose augmentation is shown: with objects where there are such."""
    per_image = pool.per_image
    candidates = np.flatnonzero(per_image) if per_image.any() else np.arange(len(per_image))
    order = np.random.default_rng(seed).permutation(len(candidates))
    return candidates[order[:PREVIEW_IMAGES]].tolist()


def _augmentation(data: DataConfig) -> dict[str, Any]:
    """The settings that decide on the augmentation: the recipe, and what is not as it is by default."""
    recipe = {"augmentation": data.augmentation, "image_size": data.image_size}
    of_others = {field.name for field in fields(TrainingSource)} | SEEN_NOWHERE
    own = {field.name: field.default for field in fields(DataConfig) if field.name not in of_others}
    return recipe | {name: getattr(data, name) for name, usual in own.items() if getattr(data, name) != usual}


def _class_remarks(counts: Sequence[int], names: Sequence[str]) -> list[str]:
    """What the counts of the training split say, in words."""
    order = [label for label in np.argsort(counts, kind="stable").tolist() if counts[label]]
    absent = [names[label] for label, count in enumerate(counts) if not count]
    remarks = []
    if order:
        rarest = (f"{names[label]} ({counts[label]:,})" for label in order)
        remarks.append(f"The rarest in training: {first_few(rarest, NAMED_CLASSES)}.")
        ratio = counts[order[-1]] / counts[order[0]]
        remarks.append(f"The most frequent class has {shown(ratio)} times the objects of the rarest.")
    if absent:
        remarks.append(f"Without an object in training: {first_few(absent, NAMED_CLASSES)}.")
    return remarks


def _range(low: float, high: float) -> str:
    sides = [round(math.sqrt(value)) if math.isfinite(value) else None for value in (low, high)]
    if not sides[0]:
        return f"below {sides[1]}²"
    return f"{sides[0]}² and more" if sides[1] is None else f"below {sides[1]}²"

"""Validation images with truth and prediction, drawn from the boxes that the validation left."""

from __future__ import annotations

import base64
import io
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from markupsafe import Markup
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from ddetr.datasets.images import read_image
from ddetr.errors import InputError
from ddetr.files import write_atomically
from ddetr.inference.drawing import draw_boxes, side_by_side
from ddetr.report.validation import Validation

logger = logging.getLogger(__name__)

PICTURE_SIDE = 320  # pixels that the short side of a file in pictures/ has at least: tags need room
PAGE_SIDE = 560  # pixels of the long side in the report


def truth_and_prediction(
    validation: Validation, index: int, *, min_side: int = 0, long_side: int | None = None
) -> tuple[Tensor, Tensor]:
    """Image `index` twice, uint8 (3, h, w): with its objects, and with the detections from the threshold on.

    Args:
        min_side: smaller images are enlarged by a whole factor to at least this.
        long_side: images are shrunk to this, or enlarged to about it.

    Raises:
        InputError: the image is not there any more, or is another one.
    """
    height, width = validation.sizes_hw[index].tolist()
    image = read_image(validation.paths[index], (height, width))
    scale = 1.0
    if long_side is not None:
        image, scale = resized(image, long_side)
    objects = validation.objects
    of_image = objects.image == index
    labels = objects.labels[of_image]
    names = [validation.name(label) for label in labels.tolist()]
    boxes_xyxy = torch.from_numpy(objects.boxes_xyxy[of_image] * np.float32(scale))
    truth = draw_boxes(image, boxes_xyxy, labels, names, min_side=min_side)
    found = validation.found.kept((validation.found.image == index) & (validation.found.scores >= validation.threshold))
    names = [validation.name(label) for label in found.labels.tolist()]
    boxes_xyxy = torch.from_numpy(found.boxes_xyxy * scale)
    prediction = draw_boxes(image, boxes_xyxy, found.labels, names, found.scores, min_side=min_side)
    return truth, prediction


def resized(image: Tensor, long_side: int) -> tuple[Tensor, float]:
    """(the image, shrunk to this long side in pixels or enlarged to about it, at most four times; the factor)."""
    height, width = image.shape[1:]
    scale = min(long_side / max(height, width), 4.0)
    return F.resize(image, [max(1, round(height * scale)), max(1, round(width * scale))], antialias=True), scale


def data_uri(picture: Tensor) -> Markup:
    """A picture uint8 (3, h, w) as the source of an <img>, compressed."""
    file = io.BytesIO()
    F.to_pil_image(picture).save(file, format="WEBP", quality=76, method=2)
    return Markup("data:image/webp;base64," + base64.b64encode(file.getvalue()).decode("ascii"))


def draw_pictures(run: Path, validation: Validation, count: int) -> list[Path]:
    """`pictures/NAME.png`: `count` images spread over the validation, truth beside prediction."""
    total = len(validation.paths)
    if count < 1 or total == 0:
        return []
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    paths: list[Path] = []
    for index in np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist():
        if not validation.may_show(index, [run]):
            logger.warning("no picture of %s: the validation was made by someone else", validation.paths[index])
            continue
        try:
            picture = F.to_pil_image(side_by_side(*truth_and_prediction(validation, index, min_side=PICTURE_SIDE)))
        except InputError as error:
            logger.warning("no picture: %s", error)
            continue
        source = validation.paths[index]
        path = folder / f"{source.stem}.png"
        if path in paths:  # images of several folders may share their names
            path = folder / f"{source.stem}-{validation.image_ids[index]}.png"
        write_atomically(path, partial(picture.save, format="PNG"))
        paths.append(path)
    return paths

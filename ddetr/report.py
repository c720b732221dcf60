"""What a run shows for itself: curves of losses and AP, and held-out images with truth beside prediction."""

import csv
import logging
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.atomic import write_atomically
from ddetr.datasets.annotations import Annotations
from ddetr.datasets.images import read_image
from ddetr.drawing import draw_boxes, side_by_side
from ddetr.errors import InputError
from ddetr.plots import png_figure
from ddetr.predictor import Predictor

logger = logging.getLogger(__name__)

PICTURE_SIDE = 320  # pixels that a picture's short side has at least: tags need room


def draw_curves(run: Path) -> Path | None:
    """`curves.png` from train.csv and val.csv: losses of the last layer, and AP, AP50, AP75 by step."""
    training, validation = _columns(run / "train.csv"), _columns(run / "val.csv")
    if not training:
        return None
    path = run / "curves.png"
    with png_figure(path, (11, 4)) as figure:
        losses, scores = figure.subplots(1, 2)
        for name in ("loss", "loss_ce", "loss_bbox", "loss_giou"):
            losses.plot(training["step"], training[name], label=name)
        losses.set(xlabel="step", title="training losses", yscale="log")
        for name in ("AP", "AP50", "AP75"):
            if validation:
                scores.plot(validation["step"], validation[name], marker="o", label=name)
        scores.set(xlabel="step", title="validation", ylim=(0, 1))
        for axes in (losses, scores):
            axes.grid(alpha=0.3)
            if axes.lines:
                axes.legend()
    return path


def draw_pictures(run: Path, annotations: Annotations, count: int, device: str | None = None) -> list[Path]:
    """`pictures/NAME.png`: `count` images spread over `annotations`, truth beside the best checkpoint's predictions."""
    total = len(annotations.images)
    if count < 1 or total == 0 or not (run / "best.pth").is_file():
        return []
    predictor = Predictor.from_checkpoint(run / "best.pth", device)
    folder = run / "pictures"
    folder.mkdir(exist_ok=True)
    paths = []
    for index in np.linspace(0, total - 1, min(count, total)).round().astype(int).tolist():
        record = annotations.images[index]
        try:
            image = read_image(record.path)
        except InputError as error:
            logger.warning("no picture: %s", error)
            continue
        names = [annotations.categories[label].name for label in record.labels.tolist()]
        truth = draw_boxes(image, torch.tensor(record.boxes_xyxy), record.labels, names, min_side=PICTURE_SIDE)
        found = predictor.predict(image)
        prediction = draw_boxes(image, found.boxes_xyxy, found.labels, found.names, found.scores, min_side=PICTURE_SIDE)
        picture = to_pil_image(side_by_side(truth, prediction))
        path = folder / f"{record.path.stem}.png"
        if path in paths:  # images of several folders may share their names
            path = folder / f"{record.path.stem}-{record.image_id}.png"
        write_atomically(path, partial(picture.save, format="PNG"))
        paths.append(path)
    return paths


def _columns(path: Path) -> dict[str, list[float]]:
    """The columns of a CSV file of numbers; empty cells are NaN."""
    if not path.is_file():
        return {}
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        return {}
    return {name: [float(row[name] or "nan") for row in rows] for name in rows[0]}

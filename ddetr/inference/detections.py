"""What was found in one image: boxes in its pixels with scores, labels, original category ids and names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.boxes import box_xyxy_to_xywh
from ddetr.datasets.annotations import Category
from ddetr.datasets.image_input import ImageInput, as_rgb
from ddetr.errors import InputError
from ddetr.evaluation.results import coco_results
from ddetr.inference.drawing import draw_boxes

if TYPE_CHECKING:
    import supervision

__all__ = ["Detection", "Detections"]


class Detection(NamedTuple):
    """One object."""

    box_xyxy: tuple[float, float, float, float]  # pixels of the original image
    score: float
    label: int  # 0..K-1
    category_id: int  # the data set's own
    name: str


@dataclass(frozen=True)
class Detections:
    """k objects of an image, on the CPU, best first. Boxes may reach a little out of the image, as in evaluation."""

    boxes_xyxy: Tensor  # (k, 4) float32, pixels of the original, upright image
    scores: Tensor  # (k,) float32, in [0, 1]
    labels: Tensor  # (k,) int64, 0..K-1
    category_ids: Tensor  # (k,) int64, the data set's own ids
    names: list[str]  # k names
    size_hw: tuple[int, int]  # of the original, upright image
    path: Path | None = None
    image_id: int | None = None

    def __post_init__(self) -> None:
        k = len(self.names)
        for name, expected in (("boxes_xyxy", (k, 4)), ("scores", (k,)), ("labels", (k,)), ("category_ids", (k,))):
            got = tuple(getattr(self, name).shape)
            if got != expected:
                raise InputError(f"Expected {name} {expected} for {k} names, got {got}.")
        if len(self.size_hw) != 2 or min(self.size_hw) < 1:
            raise InputError(f"Expected size_hw as (height, width) in pixels, got {self.size_hw}.")

    @classmethod
    def from_labels(
        cls,
        detections: dict[str, Tensor],
        categories: Sequence[Category],
        size_hw: tuple[int, int],
        path: Path | None = None,
        image_id: int | None = None,
    ) -> Detections:
        """Of PostProcess's `boxes` (xyxy in pixels), `scores` and `labels`, with the model's classes."""
        found = [categories[label] for label in detections["labels"].tolist()]
        return cls(
            boxes_xyxy=detections["boxes"].float().cpu(),
            scores=detections["scores"].float().cpu(),
            labels=detections["labels"].cpu(),
            category_ids=torch.tensor([category.category_id for category in found], dtype=torch.int64),
            names=[category.name for category in found],
            size_hw=size_hw,
            path=path,
            image_id=image_id,
        )

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[Detection]:
        columns = (self.scores, self.labels, self.category_ids)
        rows = zip(self.boxes_xyxy.tolist(), *(column.tolist() for column in columns), self.names)
        for box, score, label, category_id, name in rows:
            yield Detection(tuple(box), score, label, category_id, name)

    def filter(self, threshold: float) -> Detections:
        """Those with a score of at least `threshold`."""
        keep = self.scores >= threshold
        return Detections(
            boxes_xyxy=self.boxes_xyxy[keep],
            scores=self.scores[keep],
            labels=self.labels[keep],
            category_ids=self.category_ids[keep],
            names=[name for name, kept in zip(self.names, keep.tolist()) if kept],
            size_hw=self.size_hw,
            path=self.path,
            image_id=self.image_id,
        )

    def to_coco(self, image_id: int | None = None) -> list[dict[str, Any]]:
        """COCO's results format, under `image_id` or the one that these detections carry."""
        image_id = self.image_id if image_id is None else image_id
        if image_id is None:
            raise InputError("COCO's results format needs an image id: to_coco(image_id).")
        boxes_xywh = box_xyxy_to_xywh(self.boxes_xyxy).numpy()
        return coco_results(image_id, boxes_xywh, self.scores.numpy(), self.category_ids.tolist())

    def to_dict(self) -> dict[str, Any]:
        """For people to read: names, scores to 4 places, box corners to 2."""
        height, width = self.size_hw
        return {
            "path": None if self.path is None else str(self.path),
            "image_id": self.image_id,
            "width": width,
            "height": height,
            "detections": [
                {
                    "name": one.name,
                    "score": round(one.score, 4),
                    "box_xyxy": [round(value, 2) for value in one.box_xyxy],
                    "category_id": one.category_id,
                    "label": one.label,
                }
                for one in self
            ],
        }

    def to_supervision(self) -> supervision.Detections:
        """`supervision.Detections`: class_id is the label; data holds class_name and category_id."""
        try:
            import supervision
        except ImportError as error:
            raise InputError("to_supervision needs the package supervision: pip install 'ddetr[viz]'") from error
        return supervision.Detections(
            xyxy=self.boxes_xyxy.numpy(),
            confidence=self.scores.numpy(),
            class_id=self.labels.numpy(),
            data={"class_name": np.array(self.names, dtype=str), "category_id": self.category_ids.numpy()},
        )

    def draw(self, image: ImageInput | None = None, *, min_side: int = 0) -> Image.Image:
        """The image with these boxes.

        Args:
            image: the image that was passed to predict; may be left out where that was a path.
            min_side: smaller images are enlarged by a whole factor to at least this, so that the tags can be read.
        """
        if image is None and self.path is None:
            raise InputError("These detections do not come from a file: pass the image, draw(image).")
        rgb = as_rgb(self.path if image is None else image)
        if tuple(rgb.shape[1:]) != tuple(self.size_hw):
            (height, width), (h, w) = self.size_hw, rgb.shape[1:]
            raise InputError(f"Expected the image of {width} x {height} pixels that was predicted on, got {w} x {h}.")
        drawn = draw_boxes(rgb, self.boxes_xyxy, self.labels, self.names, self.scores, min_side=min_side)
        return to_pil_image(drawn)

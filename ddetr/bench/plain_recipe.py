"""The official training recipe step by step, as the paper's code and its descendants run it: Pillow's images, float
tensors.

The other side of `ddetr bench data`: decode, flip, resize, crop, resize with Pillow, boxes with PyTorch, then
`to_tensor` and `normalize`. What is done to an image, the `View`, is drawn as in our recipe, so that sizes, boxes and
labels must agree.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from ddetr.boxes import box_xyxy_to_cxcywh
from ddetr.datasets import ImageRecord
from ddetr.datasets.dataset import seeded
from ddetr.datasets.image_header import open_image
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Crop, Recipe, View

Target = dict[str, Any]


def plain_sample(record: ImageRecord, recipe: Recipe, seed: int) -> tuple[Tensor, Target]:
    """(3, h, w) float32 normalised, and the target, of one image."""
    with seeded(seed), open_image(record.path) as file:
        image = file.convert("RGB")
        kept = torch.from_numpy(~record.ignore)
        boxes = torch.from_numpy(record.boxes_xyxy.copy())[kept]
        target = {
            "boxes": boxes,
            "labels": torch.from_numpy(record.labels.copy())[kept],
            "area": torch.from_numpy(record.area.copy())[kept],
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
            "image_id": torch.tensor(record.image_id),
            "orig_size": torch.tensor([image.height, image.width]),
        }
        image, target = _augment(image, target, recipe.draw((image.height, image.width)))
    tensor = F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
    sides = torch.tensor([image.width, image.height, image.width, image.height], dtype=torch.float32)
    target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / sides
    target["size"] = torch.tensor([image.height, image.width])
    return tensor, target


def _augment(image: Image.Image, target: Target, view: View) -> tuple[Image.Image, Target]:
    if view.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        target["boxes"] = mirrored + torch.tensor([image.width, 0, image.width, 0])
    if view.crop is not None:
        image, target = _resize(image, target, view.crop.of_hw)
        image, target = _crop(image, target, view.crop)
    return _resize(image, target, view.out_hw)


def _resize(image: Image.Image, target: Target, size_hw: tuple[int, int]) -> tuple[Image.Image, Target]:
    if image.size[::-1] == size_hw:
        return image, target
    resized = image.resize(size_hw[::-1], Image.Resampling.BILINEAR)
    x, y = (new / old for new, old in zip(resized.size, image.size))
    boxes = target["boxes"] * torch.tensor([x, y, x, y])
    return resized, {**target, "boxes": boxes, "area": target["area"] * (x * y)}


def _crop(image: Image.Image, target: Target, crop: Crop) -> tuple[Image.Image, Target]:
    _, top, left, height, width = crop
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = torch.minimum(boxes.view(-1, 2, 2), torch.tensor([width, height])).clamp(min=0)  # (n, corner, xy)
    keep = (boxes[:, 1] > boxes[:, 0]).all(dim=1)
    area = (boxes[:, 1] - boxes[:, 0]).prod(dim=1)
    target = {**target, "boxes": boxes.view(-1, 4), "area": area}
    target.update({name: target[name][keep] for name in ("boxes", "labels", "area", "iscrowd")})
    return image.crop((left, top, left + width, top + height)), target

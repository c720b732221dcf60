"""The official training recipe step by step, as the paper's code and its descendants run it: Pillow's images, float tensors.

The other side of `ddetr bench data`: decode, flip, resize, crop, resize with Pillow, boxes with PyTorch, then `to_tensor`
and `normalize`. It draws the same random numbers as our recipe, so that sizes, boxes and labels must agree.
"""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as F

from ddetr.boxes import box_xyxy_to_cxcywh
from ddetr.datasets import ImageRecord
from ddetr.datasets.dataset import seeded
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, Recipe

Target = dict[str, Any]


def plain_sample(record: ImageRecord, recipe: Recipe, seed: int) -> tuple[Tensor, Target]:
    """(3, h, w) float32 normalised, and the target, of one image."""
    with seeded(seed), Image.open(record.path) as file:
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
        image, target = _augment(image, target, recipe)
    tensor = F.normalize(F.to_tensor(image), IMAGENET_MEAN, IMAGENET_STD)
    sides = torch.tensor([image.width, image.height, image.width, image.height], dtype=torch.float32)
    target["boxes"] = box_xyxy_to_cxcywh(target["boxes"]) / sides
    target["size"] = torch.tensor([image.height, image.width])
    return tensor, target


def _augment(image: Image.Image, target: Target, recipe: Recipe) -> tuple[Image.Image, Target]:
    if recipe.flip and torch.rand(1).item() < recipe.flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        mirrored = target["boxes"][:, [2, 1, 0, 3]] * torch.tensor([-1, 1, -1, 1])
        target["boxes"] = mirrored + torch.tensor([image.width, 0, image.width, 0])
    if recipe.crop and torch.rand(1).item() >= 1 - recipe.crop:
        image, target = _resize(image, target, recipe.crop_short_sides, None)
        image, target = _crop(image, target, *recipe.crop_range)
    return _resize(image, target, recipe.short_sides, recipe.max_size)


def _resize(
    image: Image.Image, target: Target, short_sides: tuple[int, ...], max_size: int | None
) -> tuple[Image.Image, Target]:
    short_side = short_sides[_between(0, len(short_sides) - 1)] if len(short_sides) > 1 else short_sides[0]
    short, long = sorted(image.size)
    if max_size is not None and long / short * short_side > max_size:
        short_side = int(round(max_size * short / long))
    if short == short_side:
        return image, target
    if image.width < image.height:
        size = (short_side, int(short_side * image.height / image.width))
    else:
        size = (int(short_side * image.width / image.height), short_side)
    resized = image.resize(size, Image.Resampling.BILINEAR)
    x, y = (new / old for new, old in zip(resized.size, image.size))
    boxes = target["boxes"] * torch.tensor([x, y, x, y])
    return resized, {**target, "boxes": boxes, "area": target["area"] * (x * y)}


def _crop(image: Image.Image, target: Target, least: int, most: int) -> tuple[Image.Image, Target]:
    width = _between(min(least, image.width), min(most, image.width))
    height = _between(min(least, image.height), min(most, image.height))
    top, left = _between(0, image.height - height), _between(0, image.width - width)
    boxes = target["boxes"] - torch.tensor([left, top, left, top])
    boxes = torch.minimum(boxes.view(-1, 2, 2), torch.tensor([width, height])).clamp(min=0)  # (n, corner, xy)
    keep = (boxes[:, 1] > boxes[:, 0]).all(dim=1)
    area = (boxes[:, 1] - boxes[:, 0]).prod(dim=1)
    target = {**target, "boxes": boxes.view(-1, 4), "area": area}
    target.update({name: target[name][keep] for name in ("boxes", "labels", "area", "iscrowd")})
    return image.crop((left, top, left + width, top + height)), target


def _between(low: int, high: int) -> int:
    return int(torch.randint(low, high + 1, (1,)).item())

"""Pictures of detections: boxes by torchvision, name tags by Pillow, two pictures side by side.

Images are uint8 RGB tensors (3, H, W) in and out.
"""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes

from ddetr.errors import InputError
from ddetr.printable import shortened
from ddetr.untrusted import MAX_DRAWN, MAX_TAG, MAX_TAGS

__all__ = ["class_color", "draw_boxes", "draw_dashed", "side_by_side"]

LARGEST_ENLARGED = 4096  # pixels of the long side of an image that is enlarged to be drawn on

Color = tuple[int, int, int]
Rectangle = tuple[int, int, int, int]  # left, top, right, bottom; the last two outside


def class_color(label: int) -> Color:
    """The RGB colour of a class: the same in every picture, and far from those of the classes next to it."""
    hue = (0.02 + label * 0.618034) % 1.0  # the golden ratio spreads any number of hues evenly
    value = (1.0, 0.8, 0.95)[label // 8 % 3]
    saturation = (0.85, 0.95, 0.6)[label // 8 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(red * 255), round(green * 255), round(blue * 255)


def draw_boxes(
    image: Tensor,
    boxes_xyxy: Tensor,
    labels: Tensor | Sequence[int],
    names: Sequence[str],
    scores: Tensor | Sequence[float] | None = None,
    *,
    min_side: int = 0,
    tags: bool = True,
) -> Tensor:
    """The image with k boxes, each with its class's colour, name and, where given, score; the best ones on top.

    Args:
        image: uint8 (3, H, W).
        boxes_xyxy: (k, 4) in pixels of the image.
        labels: k class indices; they choose the colours.
        names: k names, one a box.
        scores: k scores in [0, 1].
        min_side: a smaller image is first enlarged by a whole factor, so that the tags do not hide its objects; not
            beyond `LARGEST_ENLARGED` pixels of its long side.
        tags: whether the names are written; the boxes have the colours of their classes either way.
    """
    boxes_xyxy = torch.as_tensor(boxes_xyxy).detach().cpu().float().reshape(-1, 4)
    labels = [int(label) for label in labels]
    scores = None if scores is None else [float(score) for score in scores]
    _check(image, len(boxes_xyxy), labels, names, scores)
    image = image.detach().cpu()
    most = max(1, LARGEST_ENLARGED // max(image.shape[1:]))  # a strip of one pixel would fill the memory
    factor = max(1, min(-(-min_side // min(image.shape[1:])), most))
    if factor > 1:
        image = F.resize(image, [image.shape[1] * factor, image.shape[2] * factor], antialias=True)
        boxes_xyxy = boxes_xyxy * factor
    visible = torch.isfinite(boxes_xyxy).all(dim=1) & (boxes_xyxy[:, 2:] >= boxes_xyxy[:, :2]).all(dim=1)
    order = [i for i in range(len(labels)) if visible[i]]
    if scores is not None:
        order.sort(key=lambda i: scores[i])
    order = order[-MAX_DRAWN:]
    if not order:
        return image.clone()
    colors = [class_color(labels[i]) for i in order]
    corners = _corners(boxes_xyxy[order], image)
    drawn = draw_bounding_boxes(image, corners, colors=colors, width=_line(image))
    if not tags:
        return drawn
    tagged = slice(-MAX_TAGS, None)
    written = [_tag(names[i], labels[i], None if scores is None else scores[i]) for i in order[tagged]]
    return _draw_tags(drawn, corners.int().tolist()[tagged], written, colors[tagged])


def draw_dashed(image: Tensor, boxes_xyxy: Tensor) -> Tensor:
    """The image with k boxes of dashed white on black, without a name: regions that count for nothing.

    Args:
        image: uint8 (3, H, W).
        boxes_xyxy: (k, 4) in pixels of the image.
    """
    boxes_xyxy = torch.as_tensor(boxes_xyxy).detach().cpu().float().reshape(-1, 4)
    visible = torch.isfinite(boxes_xyxy).all(dim=1) & (boxes_xyxy[:, 2:] >= boxes_xyxy[:, :2]).all(dim=1)
    line = _line(image)
    dash = 4 * line
    canvas = F.to_pil_image(image.detach().cpu())
    draw = ImageDraw.Draw(canvas)
    for left, top, right, bottom in _corners(boxes_xyxy[visible][-MAX_DRAWN:], image).int().tolist():
        draw.rectangle((left, top, right, bottom), outline="black", width=line)
        for x in range(left, right + 1, 2 * dash):
            for y in (top, bottom - line + 1):
                draw.rectangle((x, y, min(x + dash, right), y + line - 1), fill="white")
        for y in range(top, bottom + 1, 2 * dash):
            for x in (left, right - line + 1):
                draw.rectangle((x, y, x + line - 1, min(y + dash, bottom)), fill="white")
    return _to_tensor(canvas)


def side_by_side(left: Tensor, right: Tensor, titles: tuple[str, str] = ("truth", "prediction")) -> Tensor:
    """Two uint8 pictures (3, H, W) beside each other under their titles, on white; the lower one is filled up."""
    size = round(1.2 * _font_size(*left.shape[1:]))
    font, gap, bar = ImageFont.load_default(size), max(4, size // 2), 2 * size
    height = max(left.shape[1], right.shape[1])
    canvas = Image.new("RGB", (left.shape[2] + gap + right.shape[2], height + bar), "white")
    draw = ImageDraw.Draw(canvas)
    for picture, x, title in ((left, 0, titles[0]), (right, left.shape[2] + gap, titles[1])):
        canvas.paste(F.to_pil_image(picture), (x, bar))
        draw.text((x + picture.shape[2] / 2, bar / 2), _printable(title), fill="black", font=font, anchor="mm")
    return _to_tensor(canvas)


def _corners(boxes_xyxy: Tensor, image: Tensor) -> Tensor:
    """Whole pixels of the image: a box on its edge stays visible."""
    height, width = image.shape[1:]
    limits = torch.tensor([width - 1, height - 1, width - 1, height - 1])
    return boxes_xyxy.round().clamp(min=0).minimum(limits)


def _line(image: Tensor) -> int:
    """Width of a line in pixels."""
    return max(1, round(min(image.shape[1:]) / 250))


def _draw_tags(image: Tensor, corners: list[list[int]], tags: list[str], colors: list[Color]) -> Tensor:
    """torchvision's own labels take a font file only, and its built-in font can not be read in a large image."""
    height, width = image.shape[1:]
    size = _font_size(height, width)
    font, padding = ImageFont.load_default(size), max(1, size // 6)
    canvas = F.to_pil_image(image)
    draw = ImageDraw.Draw(canvas)
    tag_height = sum(font.getmetrics()) + padding
    placed: list[Rectangle] = []
    for box, tag in zip(reversed(corners), reversed(tags)):  # the best ones choose first
        tag_width = round(draw.textlength(tag, font=font)) + 2 * padding
        placed.append(_free_place(box, tag_width, tag_height, placed, (height, width)))
    for place, tag, color in zip(reversed(placed), tags, colors):
        draw.rectangle((place[0], place[1], place[2] - 1, place[3] - 1), fill=color)
        red, green, blue = color
        is_bright = 0.299 * red + 0.587 * green + 0.114 * blue > 140
        text_color = "black" if is_bright else "white"
        draw.text((place[0] + padding, place[1] + padding // 2), tag, fill=text_color, font=font)
    return _to_tensor(canvas)


def _free_place(
    box: list[int], tag_width: int, tag_height: int, taken: list[Rectangle], size_hw: tuple[int, int]
) -> Rectangle:
    """Where the tag of a box hides the least of the other tags: above it, else inside or below, left or right."""
    left, top, right, bottom = box
    height, width = size_hw
    best, least = (0, 0, 0, 0), None
    for y in (top - tag_height, top, bottom + 1, bottom - tag_height + 1):
        for x in (left, right - tag_width + 1):
            x = max(0, min(x, width - tag_width))
            place = (x, y, x + tag_width, y + tag_height)
            hidden = sum(_overlap(place, other) for other in taken)
            if y < 0 or y + tag_height > height:
                hidden += 2 * tag_width * tag_height  # worse than on top of another one
            if least is None or hidden < least:
                best, least = place, hidden
    return best


def _overlap(a: Rectangle, b: Rectangle) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _font_size(height: int, width: int) -> int:
    return max(10, round(min(height, width) / 36))


def _tag(name: str, label: int, score: float | None) -> str:
    name = _printable(shortened(name, MAX_TAG)) or f"class {label}"
    return name if score is None else f"{name} {score:.2f}"


def _printable(text: str) -> str:
    """One line of ASCII, which is all that Pillow's built-in font knows: accents and other scripts go."""
    return " ".join(unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().split())


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def _check(image: Tensor, num_boxes: int, labels: list[int], names: Sequence[str], scores: list[float] | None) -> None:
    if image.dtype != torch.uint8 or image.ndim != 3 or image.shape[0] != 3:
        raise InputError(f"Expected an image uint8 (3, H, W), got {image.dtype} {tuple(image.shape)}.")
    lengths = {"labels": len(labels), "names": len(names), "scores": num_boxes if scores is None else len(scores)}
    for what, length in lengths.items():
        if length != num_boxes:
            raise InputError(f"Expected {what} for {num_boxes} boxes, got {length}.")

"""The embedded data set: circles, squares and triangles on textured backgrounds, drawn by the program.

It is a real, small detection problem that needs no download: colours, sizes, turns, shading and backgrounds vary, the
classes share their colours, and a few shapes overlap. Every image has its own random stream (seed, split, index), so
that image 7 is the same however many there are. A `Difficulty` other than the default one makes a harder problem.
"""

from __future__ import annotations

import colorsys
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ddetr.errors import InputError
from ddetr.settings import check_ranges, option

CLASSES = ("circle", "square", "triangle")
ALL_CLASSES = (*CLASSES, "star", "cross", "arrow", "heart", "crescent", "hourglass", "half disk")
_VERSION = 1  # part of the parameters: a set drawn by other code is not taken for this one's
_FINE = 4  # shapes are drawn this many times larger and averaged down: smooth edges, boxes to a quarter pixel
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Difficulty:
    """What is in an image; by default what the demo learns."""

    num_classes: int = option(len(CLASSES), at_least=1, at_most=len(ALL_CLASSES))
    """The first so many of `ALL_CLASSES`."""
    max_objects: int = option(6, at_least=1, at_most=100)
    """An image has 1 to so many."""
    smallest: float = option(0.12, at_least=0.02, at_most=0.9)
    """Side of the smallest objects, of the image's."""
    largest: float = option(0.42, at_least=0.02, at_most=0.9)
    """Side of the largest."""
    smallness: float = option(1.5, at_least=0.1, at_most=10)
    """1 for sides that are all as frequent, more for more small ones, as in real scenes."""
    overlap: float = option(0.08, at_least=0, at_most=0.9)
    """Largest share of the smaller of two boxes that the other one may cover."""
    clutter: int = option(0, at_least=0, at_most=100)
    """Up to so many strokes, arcs and blobs of the objects' colours, which are none."""

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.smallest > self.largest:
            raise InputError(f"smallest must be at most largest, got {self.smallest} and {self.largest}")


# For comparisons of detectors: crowds, tiny beside large ones, objects that cover each other, and what looks like them.
HARD = Difficulty(num_classes=10, max_objects=30, smallest=0.04, largest=0.6, smallness=3.0, overlap=0.4, clutter=12)


def draw_shapes(
    folder: str | Path,
    num_train: int = 2000,
    num_val: int = 200,
    image_size: int = 160,
    seed: int = 0,
    difficulty: Difficulty = Difficulty(),
) -> Path:
    """Writes the data set in COCO's layout (`annotations/instances_{train,val}.json`, `train/`, `val/`); returns
    `folder`.

    It is drawn beside `folder` and then renamed, so that a folder that is there is complete. One that already holds
    this very set is used as it is; one that holds anything else raises `InputError`.
    """
    folder = Path(folder)
    if num_train < 1 or num_val < 1 or image_size < 32:
        raise InputError(
            f"the shapes need at least 1 image per split and 32 pixels per side, not {num_train}, {num_val} and "
            f"{image_size}"
        )
    parameters = {
        "version": _VERSION,
        "num_train": num_train,
        "num_val": num_val,
        "image_size": image_size,
        "seed": seed,
    }
    if difficulty != Difficulty():
        parameters["difficulty"] = asdict(difficulty)
    if _is_complete(folder, parameters):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    drawing = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        for split, count in (("train", num_train), ("val", num_val)):
            _write_split(drawing, split, count, image_size, seed, difficulty, parameters)
        drawing.chmod(0o755)  # mkdtemp makes it private, which a data set need not be
        try:
            if folder.is_dir():
                folder.rmdir()  # an empty one gives way
            os.rename(drawing, folder)
        except OSError:
            if not _is_complete(folder, parameters):  # else another process was faster with the same set
                raise InputError(
                    f"{folder} holds something other than the shapes asked for; name another folder or remove it"
                ) from None
    finally:
        shutil.rmtree(drawing, ignore_errors=True)
    return folder


def _is_complete(folder: Path, parameters: dict[str, Any]) -> bool:
    try:
        for split in ("train", "val"):
            with _annotation_file(folder, split).open(encoding="utf-8") as file:
                if json.load(file)["info"]["parameters"] != parameters:
                    return False
            if len(os.listdir(folder / split)) != parameters[f"num_{split}"]:
                return False
    except (OSError, ValueError, LookupError, TypeError):
        return False
    return True


def _annotation_file(folder: Path, split: str) -> Path:
    return folder / "annotations" / f"instances_{split}.json"


def _write_split(
    folder: Path,
    split: str,
    count: int,
    size: int,
    seed: int,
    difficulty: Difficulty,
    parameters: dict[str, Any],
) -> None:
    (folder / split).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        rng = np.random.default_rng([seed, ("train", "val").index(split), index])
        image, objects = draw_image(rng, size, difficulty)
        name = f"{index:06d}.jpg"
        image.save(folder / split / name, quality=_JPEG_QUALITY, subsampling=0)
        images.append({"id": index + 1, "file_name": name, "width": size, "height": size})
        for label, (left, top, right, bottom), area in objects:
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": index + 1,
                    "category_id": label + 1,
                    "bbox": [left, top, right - left, bottom - top],
                    "area": area,
                    "iscrowd": 0,
                }
            )
    content = {
        "info": {"description": "shapes drawn by ddetr", "parameters": parameters},
        "images": images,
        "annotations": annotations,
        "categories": [
            {"id": label + 1, "name": name} for label, name in enumerate(ALL_CLASSES[: difficulty.num_classes])
        ],
    }
    _annotation_file(folder, split).parent.mkdir(exist_ok=True)
    _annotation_file(folder, split).write_text(json.dumps(content), encoding="utf-8")


def draw_image(
    rng: np.random.Generator, size: int, difficulty: Difficulty = Difficulty()
) -> tuple[Image.Image, list[tuple[int, tuple[float, float, float, float], float]]]:
    """An image and its objects: (label, (left, top, right, bottom) in pixels, area in pixels^2)."""
    background_hue = rng.random()
    image = Image.fromarray(_background(rng, size, background_hue))
    if difficulty.clutter:
        for _ in range(rng.integers(difficulty.clutter + 1)):
            _paint_clutter(rng, image, background_hue)
    taken: list[tuple[float, float, float, float]] = []
    objects = []
    for _ in range(rng.integers(1, difficulty.max_objects + 1)):
        label = int(rng.integers(difficulty.num_classes))
        span = difficulty.largest - difficulty.smallest
        side = size * (difficulty.smallest + span * rng.random() ** difficulty.smallness)
        outline = _outline(rng, label, side)
        place = _free_place(rng, outline, taken, size, difficulty.overlap)
        if place is None:
            continue
        box, area = _paint(rng, image, outline + place, background_hue)
        taken.append(box)
        objects.append((label, box, area))
    return image, objects


def _outline(rng: np.random.Generator, label: int, side: float) -> np.ndarray:
    """(V, 2) vertices in pixels around the origin, about `side` across, turned a little."""
    stretch = rng.uniform(0.8, 1.25)
    width, height = side * stretch**0.5, side / stretch**0.5
    name = ALL_CLASSES[label]
    if name == "circle":
        angles = np.linspace(0, 2 * np.pi, 72, endpoint=False)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * side / 2
    corners = _corners(name)
    turn = rng.uniform(-0.35, 0.35)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return corners * [width / 2, height / 2] @ rotation


def _corners(name: str) -> np.ndarray:
    """(V, 2) vertices of a class in [-1, 1], upright."""
    if name == "star":
        angles = np.linspace(-np.pi / 2, 1.5 * np.pi, 10, endpoint=False)
        radii = np.where(np.arange(10) % 2, 0.42, 1.0)
        return np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
    if name == "heart":
        t = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        y = (13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t) + 2.5) / -15
        return np.stack([np.sin(t) ** 3, y], axis=1)
    if name in ("crescent", "half disk"):
        t = np.linspace(-np.pi / 2, np.pi / 2, 36)
        outer = np.stack([np.cos(t) * 2 - 1, np.sin(t)], axis=1)
        hollow = 0.0 if name == "half disk" else 1.1
        return np.concatenate([outer, np.stack([np.cos(t) * hollow - 1, np.sin(t)], axis=1)[::-1]])
    return np.array(_POLYGONS[name])


_POLYGONS = {
    "square": [[-1.0, -1.0], [1.0, -1.0], [1.0, 1.0], [-1.0, 1.0]],
    "triangle": [[0.0, -1.0], [1.0, 1.0], [-1.0, 1.0]],
    "cross": [
        *([-0.3, -1.0], [0.3, -1.0], [0.3, -0.3], [1.0, -0.3], [1.0, 0.3], [0.3, 0.3]),
        *([0.3, 1.0], [-0.3, 1.0], [-0.3, 0.3], [-1.0, 0.3], [-1.0, -0.3], [-0.3, -0.3]),
    ],
    "arrow": [[0.0, -1.0], [1.0, 0.1], [0.35, 0.1], [0.35, 1.0], [-0.35, 1.0], [-0.35, 0.1], [-1.0, 0.1]],
    "hourglass": [[-1.0, -1.0], [1.0, -1.0], [0.15, 0.0], [1.0, 1.0], [-1.0, 1.0], [-0.15, 0.0]],
}


def _free_place(
    rng: np.random.Generator,
    outline: np.ndarray,
    taken: list[tuple[float, float, float, float]],
    size: int,
    most_overlap: float,
) -> np.ndarray | None:
    """(2,) an offset that keeps the outline in the image and clear enough of the others; None where there is none."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    area = np.prod(high - low)
    for place in rng.uniform(1 - low, size - 1 - high, size=(20, 2)):
        left, top, right, bottom = *(place + low), *(place + high)
        for other in taken:
            overlap_x = min(right, other[2]) - max(left, other[0])
            overlap_y = min(bottom, other[3]) - max(top, other[1])
            smaller = min(area, (other[2] - other[0]) * (other[3] - other[1]))
            if overlap_x > 0 and overlap_y > 0 and overlap_x * overlap_y > most_overlap * smaller:
                break
        else:
            return place
    return None


def _paint(
    rng: np.random.Generator, image: Image.Image, outline: np.ndarray, background_hue: float
) -> tuple[tuple[float, float, float, float], float]:
    """Draws one shape with a soft shadow and shading; returns its box and its area, both of the drawn mask."""
    origin = np.floor(outline.min(axis=0)).astype(int) - 1
    patch_w, patch_h = (np.ceil(outline.max(axis=0)).astype(int) + 2 - origin).tolist()
    fine = Image.new("L", (patch_w * _FINE, patch_h * _FINE))
    # Pillow fills the pixels whose centres an outline touches: half a fine pixel puts centres where they belong
    vertices = (outline - origin) * _FINE - 0.5
    ImageDraw.Draw(fine).polygon([tuple(vertex) for vertex in vertices.tolist()], fill=255)
    left, top, right, bottom = fine.getbbox()
    area = fine.histogram()[255] / _FINE**2
    mask = fine.reduce(_FINE)

    shadow = mask.point(lambda value: value * 0.35)
    offset = max(1, round(0.012 * min(image.size)))
    image.paste((0, 0, 0), (int(origin[0]) + offset, int(origin[1]) + offset), shadow)
    image.paste(_shaded(rng, patch_h, patch_w, background_hue), (int(origin[0]), int(origin[1])), mask)

    x, y = origin.tolist()
    box = (x + left / _FINE, y + top / _FINE, x + right / _FINE, y + bottom / _FINE)
    return box, area


def _paint_clutter(rng: np.random.Generator, image: Image.Image, background_hue: float) -> None:
    """A stroke, an arc or a blob of no class, drawn as objects are."""
    size = min(image.size)
    kind = rng.choice(["stroke", "arc", "blob"])
    reach = size * rng.uniform(0.04, 0.3)
    if kind == "blob":  # pulled in and out from corner to corner, so that it is no circle
        angles = np.linspace(0, 2 * np.pi, 9, endpoint=False)
        outline = np.stack([np.cos(angles), np.sin(angles)], axis=1) * rng.uniform(0.25, 1.0, size=(9, 1)) * reach / 2
    else:
        turn = rng.uniform(0, 2 * np.pi)
        bend = rng.uniform(0.5, 1.5) * np.pi if kind == "arc" else 0.02
        angles = turn + np.linspace(0, bend, 24)
        radius = reach / bend  # an arc as long as a stroke
        thickness = max(1.0, size * rng.uniform(0.006, 0.03))
        ring = np.stack([np.cos(angles), np.sin(angles)], axis=1)
        outline = np.concatenate([ring * radius, (ring * (radius + thickness))[::-1]])
        outline -= outline.mean(axis=0)
    low, high = outline.min(axis=0), outline.max(axis=0)
    place = rng.uniform(np.minimum(1 - low, size / 2), np.maximum(size - 1 - high, size / 2))
    _paint(rng, image, outline + place, background_hue)


def _shaded(rng: np.random.Generator, height: int, width: int, background_hue: float) -> Image.Image:
    """A colour clear of the background's hue, lit from the upper left."""
    hue = (background_hue + rng.uniform(0.2, 0.8)) % 1.0
    colour = np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.55, 0.95), rng.uniform(0.75, 1.0)), dtype=np.float32)
    across = np.linspace(0, 1, width, dtype=np.float32)
    down = np.linspace(0, 1, height, dtype=np.float32)
    light = 1.12 - 0.34 * (0.4 * across[None, :] + 0.6 * down[:, None])
    return Image.fromarray((light[..., None] * (colour * 255)).clip(0, 255).astype(np.uint8))


def _background(rng: np.random.Generator, size: int, hue: float) -> np.ndarray:
    """(size, size, 3) uint8: a gradient of two quiet colours under stripes, clouds or checks, and grain."""
    value = rng.uniform(0.25, 0.75)
    ends = [
        colorsys.hsv_to_rgb((hue + shift) % 1.0, rng.uniform(0.1, 0.4), np.clip(value + step, 0.15, 0.9))
        for shift, step in ((0.0, rng.uniform(-0.2, 0.0)), (rng.uniform(-0.1, 0.1), rng.uniform(0.0, 0.2)))
    ]
    first, second = np.array(ends, dtype=np.float32) * 255
    angle = rng.uniform(0, 2 * np.pi)
    steps = np.linspace(-0.5, 0.5, size, dtype=np.float32)
    along = (np.cos(angle) * steps[None, :] + np.sin(angle) * steps[:, None]).astype(np.float32)
    across = (np.sin(angle) * steps[None, :] - np.cos(angle) * steps[:, None]).astype(np.float32)
    texture = _texture(rng, along, across, size)
    grain = rng.standard_normal((size, size), dtype=np.float32) * np.float32(rng.uniform(2, 9))
    mix = (along / 1.42 + 0.5)[..., None]
    pixels = first + (second - first) * mix + (texture * np.float32(rng.uniform(8, 26)) + grain)[..., None]
    return pixels.clip(0, 255).astype(np.uint8)


def _texture(rng: np.random.Generator, along: np.ndarray, across: np.ndarray, size: int) -> np.ndarray:
    """(size, size) float32 about -1..1."""
    kind = rng.choice(["plain", "stripes", "checks", "clouds"])
    if kind == "plain":
        return np.zeros_like(along)
    if kind == "clouds":
        cells = int(rng.integers(4, 12))
        coarse = Image.fromarray(rng.standard_normal((cells, cells), dtype=np.float32))
        return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    frequency = np.float32(2 * np.pi * rng.uniform(4, 14))
    waves = np.sin(frequency * across)
    return waves if kind == "stripes" else np.sign(waves * np.sin(frequency * along)) * np.float32(0.6)

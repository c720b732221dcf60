"""Small data sets with the peculiarities of the real ones that data loaders meet in the wild."""

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from ddetr.checkpoint.coco_classes import COCO_CLASSES

CELLS = ("RBC", "WBC", "Platelets")


def draw_photo(size_wh: tuple[int, int], seed: int) -> Image.Image:
    """Coarse and finer colours that flow into each other: as smooth as photographs are, so that it survives JPEG."""
    generator = np.random.default_rng(seed)
    width, height = size_wh

    def noise(cell: int, low: int, high: int) -> np.ndarray:
        shape = (max(2, height // cell), max(2, width // cell), 3)
        coarse = Image.fromarray(generator.integers(low, high, shape, dtype=np.uint8))
        return np.asarray(coarse.resize(size_wh, Image.Resampling.BICUBIC), dtype=np.int16)

    return Image.fromarray((noise(40, 30, 190) + noise(8, 0, 60)).clip(0, 255).astype(np.uint8))


def draw_coco(root: Path, num_images: int = 16) -> Path:
    """COCO 2017's layout, names and 80 classes, whose ids have gaps.

    16 images per split of several shapes, one of them greyscale; six to eight objects with a polygon each, of fractions
    of a pixel, one a hundredth beyond the edge; in every fourth image a crowd, whose mask is run-length encoded. The
    first three images of `train2017` have one large object each: a bear (23), a donut (60), a keyboard (76).
    """
    categories = [{"supercategory": "thing", "id": number, "name": name} for number, name in COCO_CLASSES.items()]
    ids = itertools.cycle(COCO_CLASSES)  # each class is in both splits
    (root / "annotations").mkdir(parents=True)
    for number, split in enumerate(("train2017", "val2017")):
        generator = np.random.default_rng(number)
        (root / split).mkdir()
        images, objects = [], []
        for i in range(num_images):
            width, height = [(160, 120), (120, 160), (160, 107), (133, 160)][i % 4]
            image_id = 532481 - 8191 * i + number
            photo = draw_photo((width, height), seed=100 * number + i)
            canvas = ImageDraw.Draw(photo)
            is_single = split == "train2017" and i < 3
            for place in range(1 if is_single else 6 + i % 3):
                category_id = (23, 60, 76)[i] if is_single else next(ids)
                box = _coco_box(generator, width, height, is_single, at_the_edge=place == 1)
                left, top, right, bottom = box[0], box[1], box[0] + box[2], box[1] + box[3]
                canvas.ellipse(
                    (left, top, right, bottom), fill=tuple((category_id * step) % 256 for step in (37, 91, 151))
                )
                polygon = [(left + right) / 2, top, right, (top + bottom) / 2, (left + right) / 2, bottom, left, bottom]
                objects.append(_coco_object(len(objects), image_id, category_id, box, [polygon]))
            if i % 4 == 3:
                mask = np.zeros((width, height), np.uint8)  # column by column, as run-length encoding counts
                mask[10:60, 20:50] = 1
                ends = np.flatnonzero(np.diff(mask.ravel())) + 1
                counts = np.diff([0, *ends.tolist(), mask.size]).tolist()
                crowd = {"counts": counts, "size": [height, width]}
                objects.append(_coco_object(len(objects), image_id, 1, [10, 20, 50, 30], crowd) | {"iscrowd": 1})
            name = f"{image_id:012d}.jpg"
            (photo.convert("L") if i == num_images - 1 else photo).save(root / split / name, quality=92)
            images.append({"license": 2, "file_name": name, "height": height, "width": width, "id": image_id})
        content = {"info": {}, "licenses": [], "images": images, "annotations": objects, "categories": categories}
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def _coco_box(
    generator: np.random.Generator, width: int, height: int, is_large: bool, at_the_edge: bool
) -> list[float]:
    if is_large:
        return [width * 0.2, height * 0.2, width * 0.6, height * 0.6]
    share_w, share_h, x, y = generator.uniform(0.1, 0.45, 4)
    box = [round(value, 2) for value in (x * width, y * height, share_w * width, share_h * height)]
    if at_the_edge:
        box[2] = round(width - box[0] + 0.01, 2)
    return box


def _coco_object(number: int, image_id: int, category_id: int, box: list[float], segmentation: Any) -> dict[str, Any]:
    area = round(0.7 * box[2] * box[3], 4)  # of the mask, not of the box
    return {"segmentation": segmentation, "area": area, "iscrowd": 0, "image_id": image_id, "bbox": box} | {
        "category_id": category_id,
        "id": 900100 + 7 * number,
    }


def draw_cells(root: Path) -> Path:
    """Pascal VOC's layout as the blood cells of BCCD have it: 12 images in train, 5 in val, 4 in test, trainval both.

    Crowded (nine red cells to one white one), tabs and paths of another machine in the XML files, and two boxes without
    width or height: object 4 of Cell_00003 (train) and object 6 of Cell_00014 (val).
    """
    for folder in ("Annotations", "JPEGImages", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    splits = {"train": range(12), "val": range(12, 17), "trainval": range(17), "test": range(17, 21)}
    for split, numbers in splits.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("".join(f"Cell_{i:05d}\n" for i in numbers))
    for i in range(21):
        generator = np.random.default_rng(i)
        photo = draw_photo((160, 120), seed=i)
        canvas = ImageDraw.Draw(photo)
        text = []
        for number, name in enumerate(["WBC", "Platelets", *["RBC"] * 9], start=1):
            left, top = (int(generator.integers(1, high)) for high in (118, 78))
            side = {"WBC": 40, "RBC": 24, "Platelets": 9}[name]
            right, bottom = left + side, top + side
            if (i, number) == (3, 4):
                right = left
            elif (i, number) == (14, 6):
                bottom = top
            colour = {"WBC": (90, 60, 160), "RBC": (200, 90, 90), "Platelets": (240, 220, 120)}[name]
            canvas.ellipse((left, top, right, bottom), fill=colour)
            corners = "".join(
                f"\t\t\t<{key}>{value}</{key}>\n"
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), (left, top, right, bottom))
            )
            text.append(
                f"\t<object>\n\t\t<name>{name}</name>\n\t\t<pose>Unspecified</pose>\n\t\t<truncated>0</truncated>\n"
                f"\t\t<difficult>0</difficult>\n\t\t<bndbox>\n{corners}\t\t</bndbox>\n\t</object>\n"
            )
        photo.save(root / "JPEGImages" / f"Cell_{i:05d}.jpg")
        (root / "Annotations" / f"Cell_{i:05d}.xml").write_text(
            f"<annotation>\n\t<folder>JPEGImages</folder>\n\t<filename>Cell_{i:05d}.jpg</filename>\n"
            f"\t<path>/somewhere/else/Cell_{i:05d}.jpg</path>\n\t<source>\n\t\t<database>Unknown</database>\n\t</source>\n"
            "\t<size>\n\t\t<width>160</width>\n\t\t<height>120</height>\n\t\t<depth>3</depth>\n\t</size>\n"
            f"\t<segmented>0</segmented>\n{''.join(text)}</annotation>\n"
        )
    return root

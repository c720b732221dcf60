"""Small data sets on disk, made wrong on purpose."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from dataset_parts import coco_object
from PIL import Image


@pytest.fixture
def write_image() -> Callable[..., Path]:
    def write(path: Path, size_wh: tuple[int, int] = (64, 48), seed: int = 0, orientation: int | None = None) -> Path:
        """A picture of smooth noise, so that it survives JPEG."""
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize(size_wh, Image.Resampling.BICUBIC)
        exif = Image.Exif()
        if orientation:
            exif[0x0112] = orientation
        image.save(path, exif=exif, **({"quality": 95} if path.suffix == ".jpg" else {}))
        return path

    return write


@pytest.fixture
def make_coco(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    def make(
        objects: list[dict[str, Any]] | None = None,
        *,
        split: str = "train",
        num_images: int = 2,
        categories: list[dict[str, Any]] | None = None,
        edit: Callable[[dict[str, Any]], Any] = lambda content: None,
        root: Path = tmp_path / "set",
    ) -> Path:
        """COCO's own layout with 64 x 48 images 1.jpg, 2.jpg, ... and the gapped categories 3 cat and 7 dog."""
        for i in range(1, num_images + 1):
            write_image(root / split / f"{i}.jpg", seed=i + 100 * len(split))
        content = {
            "images": [{"id": i, "file_name": f"{i}.jpg", "width": 64, "height": 48} for i in range(1, num_images + 1)],
            "annotations": [coco_object()] if objects is None else objects,
            "categories": categories or [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
        }
        for i, obj in enumerate(content["annotations"]):
            obj.setdefault("id", i + 1)
        edit(content)
        file = root / "annotations" / f"instances_{split}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        return root

    return make


@pytest.fixture
def make_voc(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    def make(files: dict[str, str], lists: dict[str, str] | None = None, root: Path = tmp_path / "voc") -> Path:
        """files: stem -> XML; lists: split -> content of its file in ImageSets/Main."""
        for i, (stem, xml) in enumerate(files.items()):
            write_image(root / "JPEGImages" / f"{stem}.jpg", seed=i)
            (root / "Annotations").mkdir(exist_ok=True)
            (root / "Annotations" / f"{stem}.xml").write_text(xml)
        for split, text in ({"train": "\n".join(files)} if lists is None else lists).items():
            (root / "ImageSets" / "Main").mkdir(parents=True, exist_ok=True)
            (root / "ImageSets" / "Main" / f"{split}.txt").write_text(text)
        return root

    return make


@pytest.fixture
def make_yolo(tmp_path: Path, write_image: Callable[..., Path]) -> Callable[..., Path]:
    def make(labels: dict[str, str | None], root: Path = tmp_path / "yolo", data_yaml: str | None = None) -> Path:
        """labels: image path such as "images/train/a.jpg" -> its label file's content, None for no file."""
        for i, (name, text) in enumerate(labels.items()):
            image = write_image(root / name, seed=i)
            if text is not None:
                head, _, tail = str(image.relative_to(root)).rpartition("images/")
                label = (root / f"{head}labels/{tail}").with_suffix(".txt")
                label.parent.mkdir(parents=True, exist_ok=True)
                label.write_text(text)
        if data_yaml is not None:
            (root / "data.yaml").write_text(data_yaml)
        return root

    return make


@pytest.fixture
def kinds() -> Callable[[Any], dict[str, str]]:
    def of(findings_owner: Any) -> dict[str, str]:
        return {finding.kind: finding.action for finding in findings_owner.findings}

    return of

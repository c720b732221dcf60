"""YOLO: one text file of `class x y w h` lines per image, `labels/` mirroring `images/`, classes in a `data.yaml`.

The YAML is read as it is found in the wild: `path` missing or of another machine, splits as a folder, a list of folders
or a text file of images, paths relative to the wrong folder, `names` as list or map. Without a YAML, `images/` and
`labels/` are enough. `category_id` is the id in the label files. An image without a label file is background, as YOLO
defines it; polygons (segmentation, oriented boxes) become the box around them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from ddetr.datasets.annotations import (
    Annotations,
    Category,
    FindingLog,
    match_categories,
    report_crowd,
    split_error,
    unlike_training,
    whole,
)
from ddetr.datasets.image_files import ImageFolders, listed_lines, report_unread
from ddetr.datasets.image_formats import is_image_name, is_unread_name
from ddetr.datasets.readers.label_folders import holds_json_labels
from ddetr.datasets.readers.reader import LabelledImage, Wanted, table_of
from ddetr.errors import InputError
from ddetr.untrusted import (
    MAX_CLASSES,
    MAX_LABEL_BYTES,
    MAX_OBJECTS,
    MAX_PATH_PARTS,
    MAX_YAML_BYTES,
    one_line,
    parse_yaml,
    read_text,
)

WHOLE = "all"  # the one split of a data set that has none
_SPLIT_KEYS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test",)}
_MAX_RELATIVE = 1.5  # beyond it a line holds pixels, not fractions; up to it a box just reaches out of the image


# ---- where things lie ------------------------------------------------------------------------------------------------


def yolo_yaml(path: Path) -> Path | None:
    """The data set's YAML file: `path` itself, `data.yaml`, or the only one in the folder that names splits."""
    if path.is_file():
        return path if path.suffix.lower() in (".yaml", ".yml") else None
    candidates = [file for file in sorted(path.glob("*.y*ml")) if _names_splits(file)]
    for file in candidates:
        if file.stem in ("data", "dataset", path.name):
            return file
    if len(candidates) > 1:
        names = ", ".join(file.name for file in candidates)
        raise InputError(f"{path} holds several YOLO data sets ({names}); name one of them")
    return candidates[0] if candidates else None


def _names_splits(file: Path) -> bool:
    try:
        content = _load_yaml(file)
    except InputError:
        return True  # reading it will say what is wrong
    return bool({"names", "nc"} & content.keys()) and any(k in content for keys in _SPLIT_KEYS.values() for k in keys)


def _load_yaml(file: Path) -> dict[str, Any]:
    try:
        text = read_text(file, MAX_YAML_BYTES, errors="replace")
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}") from None
    content = _parse_yaml(text, str(file))
    return content if isinstance(content, dict) else {}


_parse_yaml = lru_cache(maxsize=4)(parse_yaml)  # of 20,000 classes it takes seconds, and each look asks again


def yolo_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its folders and lists of images that exist; {} where there is no YOLO data set."""
    file = yolo_yaml(path)
    if file is not None:
        content = _load_yaml(file)
        entries = {
            split: next((content[k] for k in keys if content.get(k)), None) for split, keys in _SPLIT_KEYS.items()
        }
        resolved = {split: _resolve(file, content, entry) for split, entry in entries.items() if entry}
        return {split: sources for split, sources in resolved.items() if sources}
    if path.is_file():
        return {}
    if (path / "images").is_dir() and (path / "labels").is_dir() and not holds_json_labels(path / "labels"):
        inner = sorted(
            f.name for f in (path / "images").iterdir() if f.is_dir() and (path / "labels" / f.name).is_dir()
        )
        return {name: [path / "images" / name] for name in inner} or {WHOLE: [path / "images"]}
    return {
        folder.name: [folder / "images"]
        for folder in sorted(path.iterdir())
        if (folder / "images").is_dir() and (folder / "labels").is_dir() and not holds_json_labels(folder / "labels")
    }


def _resolve(file: Path, content: dict[str, Any], entry: Any) -> list[Path]:
    """A split's entry to what exists of it. The YAML's paths are tried from its `path`, from its own folder and that
    one's parent, without their leading `..`, and at last by ever shorter ends: it may come from another machine."""
    here = file.resolve().parent
    stated = Path(str(content.get("path") or "."))
    bases = [here / stated, stated, here, here.parent]
    sources = []
    for item in entry if isinstance(entry, list) else [entry]:
        parts = PurePosixPath(str(item).replace("\\", "/")).parts
        if len(parts) > MAX_PATH_PARTS:
            continue
        bare = tuple(part for part in parts if part not in ("..", ".", "/"))
        tries = [base / PurePosixPath(*names) for names in (parts, bare) if names for base in bases]
        tries += [here / PurePosixPath(*bare[i:]) for i in range(1, len(bare))]
        found = next((place for place in tries if _exists(place)), None)
        if found is not None:
            sources.append(Path(found).resolve())
    return sources


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except OSError:  # a name that is too long for any file
        return False


def _image_paths(sources: Sequence[Path], log: FindingLog) -> list[Path]:
    paths: list[Path] = []
    folders = ImageFolders()
    for source in sources:
        if source.is_dir():
            inside = list(source.rglob("*"))
            paths += sorted(file for file in inside if is_image_name(file.name))
            others = (str(file.relative_to(source)) for file in inside if is_unread_name(file.name))
            report_unread(others, str(source), log, are_left_out=True)
            continue
        if is_image_name(source.name):
            paths.append(source)
            continue
        for number, line in enumerate(listed_lines(source), 1):
            if line.strip():
                wanted = source.parent / line.strip().replace("\\", "/")
                found = folders.find(wanted)
                if found is None:
                    message = f"There is no {wanted}; the image was left out."
                    log.add("missing-image", "dropped", f"{source.name}, line {number}", message)
                else:
                    paths.append(found)
    unique = list(dict.fromkeys(paths))
    if len(unique) < len(paths):
        repeated = len(paths) - len(unique)
        log.add(
            "duplicate-image", "repaired", str(sources[0]), f"{repeated} images are listed twice; used once.", repeated
        )
    return unique


def label_file(image: Path) -> Path:
    """Where an image's label file belongs: the last `images` of its path becomes `labels`, else beside it."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_yolo(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    if wanted.image_dir is not None:
        raise InputError("image_dir is for COCO and VOC; a YOLO data set names its images in data.yaml")
    if wanted.boxes != "auto":
        raise InputError("boxes is for formats in pixels; a YOLO label file holds x, y, width, height in fractions")
    path, split = wanted.path, wanted.split
    splits = yolo_splits(path)
    if split not in splits:
        raise split_error(path, split, list(splits))
    log = FindingLog()
    file = yolo_yaml(path)
    root = file.resolve().parent if file else path.resolve()
    images = _image_paths(splits[split], log)
    if not images:
        looked = ", ".join(str(source) for source in splits[split])
        log.add("no-images", "refused", looked, "There is no image in it; correct the split's path.")
    label_files = [label_file(image) for image in images]
    lines = [_read_lines(file, log) for file in label_files]
    if images and not any(line is not None for line in lines):
        message = f"No image has a label file (the first was expected at {label_files[0]}); all would be background."
        log.add("no-label-files", "refused", str(root), message, count=len(images))
    own = _names(root, file, log)
    if not own:
        used = {
            word for text in lines for line in text or [] for word in line.split(maxsplit=1)[:1] if word.isdecimal()
        }
        ids = [int(word) for word in used if len(word) <= 9]
        most = max(ids, default=-1)
        if len(ids) < len(used) or most >= MAX_CLASSES:
            message = (
                f"No file names the classes, and a class id is above {MAX_CLASSES:,}; correct it, or add a data.yaml."
            )
            log.add("too-many-classes", "refused", str(root), message)
        own = [Category(i, f"class_{i}") for i in range(min(most + 1, MAX_CLASSES))]
    categories = tuple(own if wanted.categories is None else wanted.categories)
    label_of = match_categories(own, categories, log, str(root), by_id=False)
    label_of_id = {category.category_id: label_of[i] for i, category in enumerate(own)}
    name_of_id = {category.category_id: category.name for category in own}

    def said_of(class_id: int) -> str:
        if class_id not in name_of_id:
            return f"Class id {class_id} has no name"
        return unlike_training(name_of_id[class_id], categories)

    found = []
    for image, text in zip(images, lines, strict=True):
        where = _shown(label_file(image), root)
        ids, boxes, numbers = _parse(text or [], where, log)
        found.append(LabelledImage(image, where, ids, boxes, numbers, in_fractions=True, unit="line"))
    return whole(f"{root.name}/{split}", "yolo", categories, table_of(found, label_of_id, log, said_of), log)


def _names(root: Path, file: Path | None, log: FindingLog) -> list[Category]:
    """The classes of the YAML, or of a `classes.txt`; [] where nothing names them."""
    if file is None:
        for name in ("classes.txt", "labels/classes.txt", "obj.names"):
            if (root / name).is_file():
                words = listed_lines(root / name)
                return [Category(i, word.strip()) for i, word in enumerate(words) if word.strip()]
        return []
    content = _load_yaml(file)
    names = content.get("names")
    if isinstance(names, dict):
        try:
            categories = [Category(int(key), str(name)) for key, name in names.items()]
        except (TypeError, ValueError, OverflowError):
            raise InputError(
                f"{file}: the keys of names must be class ids (0, 1, ...), found {one_line(list(names))}"
            ) from None
        categories.sort(key=lambda category: category.category_id)
    elif isinstance(names, list):
        categories = [Category(i, str(name)) for i, name in enumerate(names)]
    else:
        count = content.get("nc")
        if not isinstance(count, int):
            raise InputError(f"{file} has neither names (a list or a map) nor nc (a number of classes)")
        if not 0 <= count <= MAX_CLASSES:
            raise InputError(f"{file}: nc must be a number of classes, at most {MAX_CLASSES:,}, got {one_line(count)}")
        categories = [Category(i, f"class_{i}") for i in range(count)]
    if isinstance(content.get("nc"), int) and content["nc"] != len(categories):
        message = f"nc is {content['nc']}, but there are {len(categories)} names; the names were used."
        log.add("nc-differs", "note", file.name, message)
    return categories


def _read_lines(file: Path, log: FindingLog) -> list[str] | None:
    """None where the image has no label file."""
    try:
        return read_text(file, MAX_LABEL_BYTES).splitlines()
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as error:
        message = f"The label file can't be read ({error}); the image would silently become background. Restore it."
        log.add("unreadable-labels", "refused", str(file), message)
        return []


def _parse(lines: Sequence[str], where: str, log: FindingLog) -> tuple[list[int], np.ndarray, list[int]]:
    """Class ids, corners (n, 4) in fractions of the image, and the line of each object."""
    ids, boxes, numbers = [], [], []
    if len(lines) > MAX_OBJECTS:
        report_crowd(log, where, len(lines))
    for number, line in enumerate(lines[:MAX_OBJECTS], 1):
        words = line.split()
        if not words:
            continue
        place = f"{where}, line {number}"
        try:
            class_id, values = int(float(words[0])), np.array([float(word) for word in words[1:]])
            if len(values) < 4:
                raise ValueError
        except (ValueError, OverflowError):
            message = f"Expected `class x y w h`, found {line.strip()[:60]!r}; the line was left out."
            log.add("malformed-label", "dropped", place, message)
            continue
        if (np.abs(values[:4]) > _MAX_RELATIVE).any():
            message = f"Expected fractions of the image, found {line.strip()[:60]!r}; the line was left out."
            log.add("not-relative", "dropped", place, message)
            continue
        if len(values) >= 6 and len(values) % 2 == 0:  # polygon: x y x y ...
            points = values.reshape(-1, 2)
            box = np.concatenate([points.min(axis=0), points.max(axis=0)])
        else:  # x y w h, and perhaps a confidence
            centre, half = values[:2], values[2:4] / 2
            box = np.concatenate([centre - half, centre + half])
        ids.append(class_id)
        boxes.append(box)
        numbers.append(number)
    return ids, np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _shown(file: Path, root: Path) -> str:
    return str(file.relative_to(root)) if file.is_relative_to(root) else str(file)

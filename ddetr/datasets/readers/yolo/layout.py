"""Where YOLO data sets keep things: the file that describes one, the folders and lists of each split, the images of a
list.

The description is a YAML file, or Darknet's `obj.data`, which CVAT writes too. Its paths are taken as they are found in
the wild: `path` missing or of another machine, relative to the wrong folder, `images/train` for `train/images`. What it
names and is nowhere stays a part of its split, as something missing: another split must not take its place unseen.
"""

from __future__ import annotations

import os
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, folded, folders_in, report_unread, visible, walk_files
from ddetr.datasets.image_formats import is_clutter, is_image_name, is_unread_name
from ddetr.datasets.readers.label_folders import holds_json_labels, label_files, split_folders
from ddetr.datasets.readers.reader import WHOLE, looked_at_once, split_kind
from ddetr.datasets.readers.yolo.paths import (
    FEW,
    Places,
    bare_parts,
    given,
    label_file,
    listed_images,
    names_of_labels,
    shortest_ends,
)
from ddetr.datasets.readers.yolo.rows import class_words
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_SPLIT_PATHS, MAX_YAML_BYTES, open_file, parse_yaml, read_text

_SPLIT_KEYS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validate", "validation", "dev", "eval"),
    "test": ("test", "testing"),
}
_YAML, _DARKNET = (".yaml", ".yml"), (".data",)
_LISTS = ("", "ImageSets", "ImageSets/Main")
_LISTED_SPLITS = {name for names in _SPLIT_KEYS.values() for name in names}
_IMAGES_WORD = re.compile(r"[ _.-]*(images?|imgs?)[ _.-]*", re.IGNORECASE)
_OTHER_IMAGES = ("image", "imgs", "img", "jpegimages")
SAMPLED_LABELS = 100  # text files beside images that are looked into


@dataclass(frozen=True)
class YoloSplit:
    """Where the images of a split are said to be."""

    sources: tuple[Path, ...]  # folders, lists of images, single images
    missing: tuple[str, ...] = ()  # a sentence for each that is not there
    bases: tuple[Path, ...] = ()  # folders that paths in the lists may start from


# ---- the file that describes a data set ------------------------------------------------------------------------------


def yolo_file(path: Path) -> Path | None:
    """The file that describes the data set at `path`: itself; in a folder `data.yaml`, or the only one that names
    splits; or one beside the folder that speaks of nothing else."""
    if path.is_file():
        return path if path.suffix.lower() in (*_YAML, *_DARKNET) else None
    for suffixes in (_YAML, _DARKNET):
        candidates = [file for file in _files(path, suffixes) if _names_splits(file)]
        usual = [file for file in candidates if file.stem.lower() in ("data", "dataset", path.name.lower(), "obj")]
        if not usual and len(candidates) > 1:
            names = ", ".join(file.name for file in candidates)
            raise InputError(f"{path} holds several YOLO data sets ({names}): give the path of one")
        if candidates:
            return (usual or candidates)[0]
    beside = [file for file in _files(path.absolute().parent, _YAML) if _speaks_of(file, path)]
    return beside[0] if len(beside) == 1 else None


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    names = sorted(name for name in ImageFolders().names(folder) if name.lower().endswith(suffixes))
    return [folder / name for name in names if not is_clutter(name)]


def names_file(folder: Path) -> Path | None:
    """The YAML file that names classes and no split, such as one whose `train:` and `val:` are empty; None without
    one, or of several."""
    found = []
    for file in _files(folder, _YAML):
        with suppress(InputError):
            content = description(file)
            found += [file] if given(content.get("names")) and not _entries(content) else []
    return found[0] if len(found) == 1 else None


def _names_splits(file: Path) -> bool:
    try:
        content = description(file)
    except InputError:
        return file.suffix.lower() in _YAML  # reading it will say what is wrong
    return bool({"names", "nc"} & content.keys()) and bool(_entries(content))


def _speaks_of(file: Path, folder: Path) -> bool:
    try:
        content = description(file)
        splits = _named_splits(file) if {"names", "nc"} & content.keys() else {}
    except InputError:
        return False
    sources = [source for split in splits.values() for source in split.sources]
    real = Path(os.path.realpath(folder))
    return bool(sources) and all(Path(os.path.realpath(source)).is_relative_to(real) for source in sources)


def description(file: Path) -> dict[str, Any]:
    """What the file says, each value as the text that stands there, keys in small letters."""
    try:
        text = read_text(file, MAX_YAML_BYTES, errors="replace")
    except OSError as error:
        raise InputError(f"{file} can't be read: {error.strerror or error}") from None
    content = _parse_darknet(text) if file.suffix.lower() in _DARKNET else _parse_yaml(text, str(file), as_text=True)
    return {str(key).lower(): value for key, value in content.items()} if isinstance(content, dict) else {}


_parse_yaml = lru_cache(maxsize=4)(parse_yaml)  # of 20,000 classes it takes seconds, and each look asks again


def _parse_darknet(text: str) -> dict[str, str]:
    pairs = (line.split("#")[0].partition("=") for line in text.splitlines())
    content = {key.strip().lower(): value.strip() for key, equals, value in pairs if equals}
    if "classes" in content:
        content["nc"] = content.pop("classes")
    return content


def _entries(content: dict[str, Any]) -> dict[str, Any]:
    found = {
        split: next((content[k] for k in keys if given(content.get(k))), None) for split, keys in _SPLIT_KEYS.items()
    }
    return {split: entry for split, entry in found.items() if entry is not None}


# ---- splits ----------------------------------------------------------------------------------------------------------


@looked_at_once
def yolo_splits(path: Path) -> dict[str, YoloSplit]:
    """Split name -> where its images are said to be; {} where there is no YOLO data set."""
    file = yolo_file(path)
    if file is not None:
        splits = _named_splits(file)
        if not splits and {"names", "nc"} & description(file).keys():
            raise InputError(f"{file} names no split: expected train, val or test, each with a path or a list of paths")
        return splits
    if path.is_file():
        return {}
    inside = {folder.name.lower(): folder for folder in folders_in(path)}
    if (images := _images_of(inside)) is not None:
        labels = inside["labels"]
        inner = [folder for folder in folders_in(images) if (labels / folder.name).is_dir()]
        if inner and (any(split_kind(folder.name) for folder in inner) or not _has_labels_in(images, labels)):
            return {folder.name: YoloSplit((folder,)) for folder in inner}
        lists = {file.stem: file for place in _LISTS for file in visible((path / place).glob("*.txt"), path)}
        lists = {name: file for name, file in lists.items() if name.lower() in _LISTED_SPLITS}
        return {name: YoloSplit((file,), (), (images, path)) for name, file in lists.items()} or {
            WHOLE: YoloSplit((images,))
        }
    strange = (folder for name, folder in inside.items() if not split_kind(name))
    if any(_names_splits(file) for folder in strange for file in _files(folder, (*_YAML, *_DARKNET))):
        return {}  # a data set of its own, or several, and no splits of one
    splits = {}
    for name, folders in split_folders(inside.values(), lambda folder: _images_with_labels(folder) is not None).items():
        splits[name] = YoloSplit(tuple(filter(None, map(_images_with_labels, folders))))
    for folder in inside.values():  # train_images and train_labels
        if any(name.lower() in inside and name != folder.name for name in names_of_labels(folder.name)):
            splits[_IMAGES_WORD.sub("", folder.name)] = YoloSplit((folder,))
    splits.pop("", None)
    if splits:
        return splits
    if _has_labels_beside(path):
        return {WHOLE: YoloSplit((path,))}
    found = split_folders(inside.values(), _has_labels_beside)
    return {name: YoloSplit(tuple(folders)) for name, folders in found.items()}


def _images_with_labels(folder: Path) -> Path | None:
    """The images of a folder that has them and their label files in a folder each."""
    return _images_of({place.name.lower(): place for place in folders_in(folder)})


def _images_of(inside: dict[str, Path]) -> Path | None:
    """The one of the folders (by their names in small letters) with the images of that called labels: images; or img
    and such, where there are rows of label files."""
    labels = inside.get("labels")
    if labels is None or holds_json_labels(labels):
        return None
    others = [inside[name] for name in _OTHER_IMAGES if name in inside]
    if "images" in inside or len(others) != 1:
        return inside.get("images")
    texts = (file for place in (labels, *folders_in(labels)) for file in label_files(place, ".txt", FEW))
    return others[0] if any(map(has_rows, islice(texts, SAMPLED_LABELS))) else None


def _has_labels_in(images: Path, labels: Path) -> bool:
    """Whether an image of the first folder itself has its label file in the second."""
    names = islice(ImageFolders().images(images), SAMPLED_LABELS)
    return any((labels / f"{os.path.splitext(name)[0]}.txt").is_file() for name in names)


def _has_labels_beside(folder: Path) -> bool:
    """Whether an image has a text file of its name beside it that holds a row of a label file."""
    names = ImageFolders().names(folder)
    texts = {folded(name): name for name in names if name.lower().endswith(".txt")}
    labels = (folded(f"{os.path.splitext(name)[0]}.txt") for name in sorted(names) if is_image_name(name))
    beside = (texts[name] for name in labels if name in texts)
    return any(has_rows(folder / name) for name in islice(beside, SAMPLED_LABELS))


def has_rows(file: Path) -> bool:
    """Whether the first line of a text file with anything in it is a row of a label file: five numbers or more, or the
    name of a class and four fractions."""
    try:
        with open_file(file) as stream:
            start = stream.read(1000)
    except OSError:
        return False
    words = start.decode("utf-8-sig", "replace").lstrip().split("\n")[0].replace(",", " ").split()
    name = class_words(words)
    try:
        numbers = [float(word) for word in words[len(name) :]]
    except ValueError:
        return False
    return len(numbers) >= 5 if not name else all(0 <= number <= 1 for number in numbers)


def _named_splits(file: Path) -> dict[str, YoloSplit]:
    content = description(file)
    splits = _resolved(Places(file, content))
    if any(split.sources for split in splits.values()):
        return splits
    return _resolved(Places(file, content, wide=True))


def not_named(file: Path, kind: str) -> Path | None:
    """The images of the split "train" or "val", of which the data set's description `file` doesn't speak, by what lies
    beside the images of the others: images/val beside images/train, val.txt beside train.txt; where there are label
    files."""
    splits = _named_splits(file)
    named = {os.path.realpath(source) for split in splits.values() for source in split.sources}
    for split in splits.values() if kind not in splits else ():
        for place in (place for source in split.sources for place in _beside(source, kind)):
            images = islice(image_paths(YoloSplit((place,), (), split.bases), FindingLog()), SAMPLED_LABELS)
            if os.path.realpath(place) not in named and any(label_file(image).is_file() for image in images):
                return place
    return None


def _beside(source: Path, kind: str) -> list[Path]:
    """What is to another split as `source` is to its own."""
    own = next((place for place in (source, source.parent) if split_kind(place.name)), None)
    if own is None:
        return []
    rest = source.relative_to(own)
    names = sorted(name for name in ImageFolders().names(own.parent) if split_kind(name) == kind)
    places = (own.parent / name / rest for name in names)
    return [place for place in places if place.is_dir() == source.is_dir() and place.suffix == source.suffix][:1]


def _resolved(places: Places) -> dict[str, YoloSplit]:
    entries = {name: entry if isinstance(entry, list) else [entry] for name, entry in _entries(places.content).items()}
    most = max(map(len, entries.values()), default=0)
    if most > MAX_SPLIT_PATHS:
        raise InputError(f"A split names {most:,} paths, more than {MAX_SPLIT_PATHS:,}: list the images in a text file")
    needed = shortest_ends(bare_parts(item) for items in entries.values() for item in items if isinstance(item, str))
    splits = {}
    for name, items in entries.items():
        sources, missing = [], []
        for item in filter(given, items):
            if not isinstance(item, str):
                missing.append(f"{name} must be a path or a list of paths, found {one_line(item)}.")
            elif (found := places.find(item, needed[bare_parts(item)])) is not None:
                sources.append(found)
            elif len(missing) < FEW:
                missing.append(places.said_of(item, name, needed[bare_parts(item)]))
            else:
                missing.append(f"{name} names {one_line(item)}, which is not there. Correct the path.")
        splits[name] = YoloSplit(tuple(sources), tuple(missing), (*places.bases, places.home.parent))
    return splits


def image_paths(split: YoloSplit, log: FindingLog) -> list[Path]:
    """The images of a split, each once."""
    paths: list[Path] = []
    for source in split.sources:
        if source.is_dir():
            inside = walk_files(source)
            paths += [path for path in inside if is_image_name(path.name)]
            others = (str(path.relative_to(source)) for path in inside if is_unread_name(path.name))
            report_unread(others, str(source), log, are_left_out=True)
        elif is_image_name(source.name):
            paths.append(source)
        else:
            paths += listed_images(source, split.bases, log)
    unique = list(dict.fromkeys(paths))
    if len(unique) < len(paths):
        repeated = len(paths) - len(unique)
        message = f"{repeated} images are listed twice; used once."
        log.add("duplicate-image", "repaired", str(split.sources[0]), message, repeated)
    return unique

"""Where COCO data sets keep their annotation files and images: the layouts found in the wild.

Recognised under a folder, the first that is there: `annotations/instances_{split}.json` (COCO's own),
`{split}/_annotations.coco.json` (Roboflow), `annotations/{split}.json`, `{split}.json`, `{split}/*.json`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ddetr.datasets.image_files import ImageFolders, visible
from ddetr.untrusted import open_file

_OTHER_TASKS = re.compile(r"^(captions|person_keypoints|stuff|panoptic|image_info|deprecated)_", re.IGNORECASE)
_FILE_WORDS = re.compile(r"(?:^|[_.-])(?:instances?|annotations?|labels?|coco)(?=[_.-]|$)", re.IGNORECASE)
_SAMPLED_NAMES = 32  # file names tried in each folder that might hold the images


def coco_splits(path: Path) -> dict[str, Path]:
    """Split name -> annotation file, by the first layout that is there; {} where none is."""
    if path.is_file():
        return {_split_name(path): path} if _looks_like_coco(path) else {}
    own = visible(path.glob("annotations/instances_*.json"), path)
    if own:
        return {file.stem.removeprefix("instances_"): file for file in own}
    roboflow = visible(path.glob("*/_annotations.coco.json"), path)
    if roboflow:
        return {file.parent.name: file for file in roboflow}
    if (path / "_annotations.coco.json").is_file():
        return {path.name: path / "_annotations.coco.json"}
    for pattern in ("annotations/*.json", "*.json"):
        files = [f for f in visible(path.glob(pattern), path) if not _OTHER_TASKS.match(f.name) and _looks_like_coco(f)]
        if files:
            names = [_split_name(file) for file in files]
            return {n if names.count(n) == 1 else f.stem: f for n, f in zip(names, files, strict=True)}
    nested = [file for file in visible(path.glob("*/*.json"), path) if _looks_like_coco(file)]
    folders = [file.parent for file in nested]
    return {file.parent.name: file for file in nested if folders.count(file.parent) == 1}


def _split_name(file: Path) -> str:
    return _FILE_WORDS.sub("", file.stem).strip("_.-") or file.stem


def _looks_like_coco(file: Path) -> bool:
    """By the words at either end: a whole file may have half a gigabyte."""
    try:
        with open_file(file) as stream:
            start = stream.read(1 << 16)
            size = stream.seek(0, 2)
            stream.seek(max(0, size - (1 << 16)))
            ends = start + stream.read()
    except OSError:
        return False
    # a file cut short has lost its end; it is recognised all the same, so that reading it can say where it breaks
    words = [b'"images"', b'"annotations"']
    if size > 1 << 16:  # the others may stand between the ends; a small file of classes alone is no data set
        words.append(b'"categories"')
    return start.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"{" and any(word in ends for word in words)


def image_dirs(root: Path, annotation_file: Path, split: str) -> list[Path]:
    """The folders that may hold the images, the likeliest first."""
    beside = annotation_file.parent
    places = [
        root / split,
        root / "images" / split,
        root / split / "images",
        beside / annotation_file.stem,
        beside / split,
        beside / "images",
        beside / "data",
        beside,
        root / "images",
        root / "JPEGImages",
        root / "data",
        root,
        beside.parent / "images",
        beside.parent,
    ]
    return [place for place in dict.fromkeys(places) if place.is_dir()]


def choose_image_dir(places: Sequence[Path], names: Sequence[str]) -> tuple[Path, bool] | None:
    """The folder that holds most of a sample of `names`, and whether only their last part counts; None if none does."""
    step = max(1, len(names) // _SAMPLED_NAMES)
    sample = names[::step][:_SAMPLED_NAMES]
    folders = ImageFolders()
    best, most = None, 0
    for bare in (False, True):
        for place in places:
            found = sum(folders.find(place / (last_part(name) if bare else name)) is not None for name in sample)
            if found > most:
                best, most = (place, bare), found
            if found == len(sample):
                return best
    return best


def last_part(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]

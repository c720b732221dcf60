"""Where COCO data sets keep their annotation files and images: the layouts found in the wild.

Recognised under a folder, the first that is there: `annotations/instances_{split}.json` (COCO's own),
`{split}/_annotations.coco.json` (Roboflow), JSON files in a folder for annotations (`annotations`, `annots`, `labels`,
...), `{split}.json`, `{split}/*.json`. A split is named by its file ("train" of `custom_train.json`) or its folder.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from ddetr.datasets.image_files import folders_in
from ddetr.datasets.image_formats import is_clutter
from ddetr.untrusted import open_file

_FOLDERS = ("annotations", "annotation", "annots", "annot", "anns", "ann", "labels", "label", "json", "jsons")
_IMAGE_FOLDERS = ("images", "JPEGImages", "data", "image", "imgs", "img", "pictures", "photos", "frames")
_OTHER_TASKS = re.compile(r"^(captions|stuff|panoptic|image_info|deprecated)_", re.IGNORECASE)
_KEYPOINTS = re.compile(r"^person_keypoints_", re.IGNORECASE)  # has boxes, but of persons only
_FILE_WORDS = re.compile(
    r"(?:^|[_.\s-])(?:instances?|person_keypoints|annotations?|annots?|labels?|coco)(?=[_.\s-]|$)", re.IGNORECASE
)
_SPLIT_WORD = re.compile(
    r"(?:^|(?<=[_.\s-]))(?:train(?:ing|val)?|val(?:id|idate|idation)?|minival|test(?:ing)?|dev|eval(?:uation)?|holdout)[0-9]*"
    r"(?=[_.\s-]|$)",
    re.IGNORECASE,
)
_OTHERS = (b'"items"', b'"image":')  # Datumaro's, and Segment Anything's, which has one image a file
JSON_MARKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"  # what may stand before the first bracket, in UTF-8, 16 or 32
_MOST_FILES = 100  # JSON files of a folder that holds data sets: with more it has one for each image


def coco_splits(path: Path) -> dict[str, Path]:
    """Split name -> annotation file, by the first layout that is there; {} where none is."""
    if path.is_file():
        return {_split_name(path): path} if _looks_like_coco(path) else {}
    own = _json_files(path / "annotations", "instances_*.json")
    if own:
        return named_by_split({file.stem.removeprefix("instances_"): file for file in own})
    folders = folders_in(path)
    roboflow = {folder.name: folder / "_annotations.coco.json" for folder in folders}
    roboflow = {name: file for name, file in roboflow.items() if file.is_file()}
    if roboflow:
        return roboflow
    if (path / "_annotations.coco.json").is_file():
        return {path.name: path / "_annotations.coco.json"}
    for_annotations = sorted((f for f in folders if f.name.lower() in _FOLDERS), key=_order)
    for folder in (*for_annotations, path):
        files = _coco_files(folder)
        if files:
            return named_by_split({file.stem: file for file in files})
        if folder != path and (inner := _of_folders(folders_in(folder))):
            return inner
    return _of_folders([folder for folder in folders if folder not in for_annotations])


def _order(folder: Path) -> int:
    return _FOLDERS.index(folder.name.lower())


def _json_files(folder: Path, pattern: str = "*.json") -> list[Path]:
    """Those of a folder that holds few of them; hidden ones (`._train.json` of a Mac's zip) are none."""
    files = [file for file in sorted(folder.glob(pattern)) if not is_clutter(file.name)]
    return files if len(files) <= _MOST_FILES else []


def _coco_files(folder: Path) -> list[Path]:
    files = [file for file in _json_files(folder) if not _OTHER_TASKS.match(file.name) and _looks_like_coco(file)]
    return [file for file in files if not _KEYPOINTS.match(file.name)] or files


def _of_folders(folders: Sequence[Path]) -> dict[str, Path]:
    """Splits that are folders with one annotation file each, or with a folder that has it (`train/annotations/`)."""
    inside = {folder.name: _coco_files(folder) for folder in folders}
    for folder in folders:
        if not inside[folder.name] and _SPLIT_WORD.fullmatch(folder.name):
            inner = [one for one in folders_in(folder) if one.name.lower() in _FOLDERS]
            inside[folder.name] = [file for one in inner for file in _coco_files(one)]
    return {name: files[0] for name, files in inside.items() if len(files) == 1}


def named_by_split(files: dict[str, Path]) -> dict[str, Path]:
    """The same files by the names of their splits, or as they were where those don't tell them apart."""
    names = [_split_name(file) for file in files.values()]
    return {n if names.count(n) == 1 else stem: f for n, (stem, f) in zip(names, files.items(), strict=True)}


def _split_name(file: Path) -> str:
    """ "train_v2" of "train_v2.json" and of "instances_train_v2.json", "train" of "custom_train.json"."""
    name = _FILE_WORDS.sub("", file.stem).strip("_.- ") or file.stem
    return split_word(name)


def split_word(name: str) -> str:
    """ "train" of "custom_train"; a name that has no such word at its end or in it, or begins with it, as it is."""
    word = _SPLIT_WORD.search(name)
    return word[0] if word and word.start() else name


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
    start, ends = start.lstrip(JSON_MARKS), ends.replace(b"\0", b"")  # UTF-16 has a zero byte in each letter
    if start[:1] != b"{" or (b'"images"' not in ends and any(word in start for word in _OTHERS)):
        return False
    if b'"images"' in ends or b'"image_id"' in ends:
        return True
    # in a long file they may stand between its ends, or have been cut off: reading it says where it breaks
    return size > 1 << 16 and (b'"annotations"' in ends or b'"categories"' in ends)


def image_dirs(root: Path, annotation_file: Path, split: str) -> list[Path]:
    """The folders that may hold the images, the likeliest first."""
    beside = annotation_file.parent
    dated = [folder for folder in folders_in(root) if re.fullmatch(re.escape(split) + r"_?[0-9]{4}", folder.name)]
    places = [
        root / split,
        *(root / name / split for name in _IMAGE_FOLDERS),
        *dated,  # train2017
        *(root / split / name for name in _IMAGE_FOLDERS),
        beside / annotation_file.stem,
        beside / split,
        *(beside / name for name in _IMAGE_FOLDERS),
        beside,
        *(root / name for name in _IMAGE_FOLDERS),
        root,
        *(beside.parent / name for name in _IMAGE_FOLDERS),
        beside.parent,
    ]
    return [place for place in dict.fromkeys(places) if place.is_dir()]

"""Where COCO data sets keep their annotation files and images: the layouts found in the wild.

Recognised under a folder, the first that is there: `annotations/instances_{split}.json` (COCO's own),
`{split}/_annotations.coco.json` (Roboflow), JSON files in a folder for annotations (`annotations`, `annots`, `labels`,
...), `{split}.json`, `{split}/*.json`. A split is named by its file ("train" of `custom_train.json`) or its folder.
Files that are numbered parts of one split (`train_0.json`, `train_1.json`) are read as one, and so are those of a
folder with a file for each image.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ddetr.datasets.image_files import folders_in
from ddetr.datasets.readers.label_folders import label_files, split_folders
from ddetr.datasets.readers.reader import WHOLE
from ddetr.errors import InputError
from ddetr.untrusted import open_file, parse_json, read_text

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
_DETECTIONS = b'"detection_categories"'  # MegaDetector's, which has images too
JSON_MARKS = b"\xef\xbb\xbf\xff\xfe\0 \t\r\n"  # what may stand before the first bracket, in UTF-8, 16 or 32
_MOST_FILES = 100  # JSON files of a folder that holds data sets: with more it has one for each image
_SAMPLED, _SMALL = 8, 1 << 20  # files of a folder that show whether they are for an image each; bytes of such a file
_PART_WORDS = ("part", "parts", "shard", "chunk", "batch")


def coco_splits(path: Path) -> dict[str, list[Path]]:
    """Split name -> its annotation files, or the folder that has one for each image, by the first layout that is there;
    {} where none is."""
    if path.is_file():
        return {_split_name(path): [path]} if _looks_like_coco(path) else {}
    own = [file for file in label_files(path / "annotations", ".json") if file.name.startswith("instances_")]
    if 0 < len(own) <= _MOST_FILES:
        return _joined({file.stem.removeprefix("instances_"): file for file in own})
    folders = folders_in(path)
    roboflow = split_folders(folders, lambda folder: (folder / "_annotations.coco.json").is_file())
    if roboflow:
        return {name: [place / "_annotations.coco.json" for place in places] for name, places in roboflow.items()}
    if (path / "_annotations.coco.json").is_file():
        return {path.name: [path / "_annotations.coco.json"]}
    for_annotations = sorted((f for f in folders if f.name.lower() in _FOLDERS), key=_order)
    for folder in (*for_annotations, path):
        if splits := _of_folder(folder):
            return splits
        if folder != path and (inner := _of_folders(folders_in(folder))):
            return inner
    return _of_folders([folder for folder in folders if folder not in for_annotations])


def coco_files(splits: dict[str, list[Path]], split: str) -> list[Path]:
    """The annotation files of a split, or the one file that the split would be if it were not joined with others; []
    where there is none."""
    single = [file for files in splits.values() for file in files if split in (file.stem, _split_name(file))]
    files = splits.get(split) or (single if len(single) == 1 else [])
    return [file for place in files for file in (label_files(place, ".json") if place.is_dir() else [place])]


def _order(folder: Path) -> int:
    return _FOLDERS.index(folder.name.lower())


def _of_folder(folder: Path) -> dict[str, list[Path]]:
    """The splits whose files lie in a folder itself."""
    files = label_files(folder, ".json")
    if _are_for_an_image_each(files[:_SAMPLED]):
        return {WHOLE: [folder]}
    files = files if len(files) <= _MOST_FILES else []
    files = [file for file in files if not _OTHER_TASKS.match(file.name) and _looks_like_coco(file)]
    files = [file for file in files if not _KEYPOINTS.match(file.name)] or files
    return _joined({file.stem: file for file in files})


def _of_folders(folders: Sequence[Path]) -> dict[str, list[Path]]:
    """Splits that are folders with the annotations of one each, or with folders that have them (`train/annotations/`,
    `train/0/`)."""
    found = {}
    for name, places in split_folders(folders, lambda folder: bool(_of_folder(folder))).items():
        inside = [list(_of_folder(place).values()) for place in places]
        if all(len(splits) == 1 for splits in inside):
            found[name] = [file for splits in inside for file in splits[0]]
    return found


def _are_for_an_image_each(files: Sequence[Path]) -> bool:
    """Whether files are COCO's with one image each and called as it, or at least not as splits are."""
    names = []
    for file in files:
        try:
            if file.stat().st_size > _SMALL or not _looks_like_coco(file):
                continue
            (image,) = parse_json(read_text(file, _SMALL), "the file")["images"]
            names.append((file.stem, PurePosixPath(str(image["file_name"]).replace("\\", "/")).stem))
        except (OSError, InputError):
            continue  # broken: one of many, perhaps
        except (KeyError, TypeError, ValueError):
            return False
    return len(names) > 1 and all(
        not _SPLIT_WORD.search(own) or (own == image and not _SPLIT_WORD.fullmatch(own)) for own, image in names
    )


def _joined(files: dict[str, Path]) -> dict[str, list[Path]]:
    """Split name -> its files: those that are parts of one together, the others each for itself."""
    parts: dict[str, list[Path]] = defaultdict(list)
    for stem, file in files.items():
        if split := part_of(_FILE_WORDS.sub("", stem)):
            parts[split].append(file)
    parts = {split: some for split, some in parts.items() if len(some) > 1}
    joined = {file for some in parts.values() for file in some}
    rest = named_by_split({stem: file for stem, file in files.items() if file not in joined})
    if rest.keys() & parts.keys():  # train.json beside train_0.json: what it holds can't be known
        return {name: [file] for name, file in named_by_split(files).items()}
    return parts | {name: [file] for name, file in rest.items()}


def part_of(name: str) -> str | None:
    """The split of which a name is a numbered part: "train" of train_0, train-00001-of-00004 and train_part2, "all" of
    part3; None of train, train2017, train_v2, train_fold1 and others."""
    words = re.findall(r"[^\W\d_]+|\d+", re.sub(r"[\W_]*of[\W_]*\d+$", "", name.lower()))
    numbers = [word for word in words if word.isdecimal()]
    words = [word for word in words if not word.isdecimal()]
    splits = [word for word in words if word not in _PART_WORDS]
    if len(numbers) != 1 or 1900 <= int(numbers[0]) < 2100 or not 0 < len(words) < 3 or len(splits) > 1:
        return None
    if splits and not _SPLIT_WORD.fullmatch(splits[0]):
        return None
    return splits[0] if splits else WHOLE


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
    if start[:1] != b"{" or (b'"images"' not in ends and any(word in start for word in _OTHERS)) or _DETECTIONS in ends:
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

"""Where YOLO data sets keep things: the file that describes one, the folders and lists of each split, the images of a
list.

The description is a YAML file, or Darknet's `obj.data`, which CVAT writes too. Its paths are taken as they are found in
the wild: `path` missing or of another machine, relative to the wrong folder, `images/train` for `train/images`. What it
names and is nowhere stays a part of its split, as something missing: another split must not take its place unseen.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, is_clutter, is_image_name, listed_lines, visible, walk_files
from ddetr.errors import InputError
from ddetr.untrusted import MAX_PATH, MAX_PATH_PARTS, MAX_YAML_BYTES, one_line, open_file, parse_yaml, read_text
from ddetr.wording import did_you_mean, first_few

WHOLE = "all"  # the one split of a data set that has none
_SPLIT_KEYS = {"train": ("train", "training"), "val": ("val", "valid", "validation"), "test": ("test", "testing")}
_YAML, _DARKNET = (".yaml", ".yml"), (".data",)
_NOTHING = ("", "~", "null")
_SHOWN = 8  # names of a folder in a message

Parts = tuple[str, ...]


@dataclass(frozen=True)
class YoloSplit:
    """Where the images of a split are said to be."""

    sources: tuple[Path, ...]  # folders, lists of images, single images
    missing: tuple[str, ...] = ()  # a sentence for each that is not there


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
            raise InputError(f"{path} holds several YOLO data sets ({names}); name one of them")
        if candidates:
            return (usual or candidates)[0]
    beside = [file for file in _files(path.absolute().parent, _YAML) if _speaks_of(file, path)]
    return beside[0] if len(beside) == 1 else None


def _files(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return [file for file in visible(folder.glob("*.*"), folder) if file.suffix.lower() in suffixes]


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


def given(value: Any) -> bool:
    """Whether a value of a description says anything."""
    return bool(value) and not (isinstance(value, str) and value.strip().lower() in _NOTHING)


def _entries(content: dict[str, Any]) -> dict[str, Any]:
    found = {
        split: next((content[k] for k in keys if given(content.get(k))), None) for split, keys in _SPLIT_KEYS.items()
    }
    return {split: entry for split, entry in found.items() if entry is not None}


# ---- splits ----------------------------------------------------------------------------------------------------------


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
    inside = {folder.name.lower(): folder for folder in visible(path.iterdir(), path) if folder.is_dir()}
    if "images" in inside and "labels" in inside:
        images, labels = inside["images"], inside["labels"]
        inner = [folder for folder in visible(images.iterdir(), images) if folder.is_dir()]
        inner = [folder for folder in inner if (labels / folder.name).is_dir()]
        return {folder.name: YoloSplit((folder,)) for folder in inner} or {WHOLE: YoloSplit((images,))}
    splits = {}
    for folder in inside.values():
        below = {place.name.lower(): place for place in folder.iterdir() if place.is_dir()}
        if "images" in below and "labels" in below:
            splits[folder.name] = YoloSplit((below["images"],))
    if splits:
        return splits
    if _has_labels_beside(path):
        return {WHOLE: YoloSplit((path,))}
    return {folder.name: YoloSplit((folder,)) for folder in inside.values() if _has_labels_beside(folder)}


def _has_labels_beside(folder: Path) -> bool:
    """Whether an image has a text file of its name beside it that holds a row of a label file."""
    names = ImageFolders().names(folder)
    labels = (f"{os.path.splitext(name)[0]}.txt" for name in sorted(names) if is_image_name(name))
    return any(name in names and has_rows(folder / name) for name in labels)


def has_rows(file: Path) -> bool:
    """Whether the first line of a text file with anything in it is a row of a label file: five numbers or more."""
    try:
        with open_file(file) as stream:
            words = stream.read(1000).lstrip().split(b"\n")[0].replace(b",", b" ").split()
        return len([float(word) for word in words]) >= 5
    except (OSError, ValueError):
        return False


def _named_splits(file: Path) -> dict[str, YoloSplit]:
    content = description(file)
    splits = _resolved(Places(file, content))
    if any(split.sources for split in splits.values()):
        return splits
    return _resolved(Places(file, content, wide=True))


def _resolved(places: Places) -> dict[str, YoloSplit]:
    entries = {name: entry if isinstance(entry, list) else [entry] for name, entry in _entries(places.content).items()}
    needed = shortest_ends(_bare(item) for items in entries.values() for item in items if isinstance(item, str))
    splits = {}
    for name, items in entries.items():
        sources, missing = [], []
        for item in filter(given, items):
            if not isinstance(item, str):
                missing.append(f"{name} must be a path or a list of paths, found {one_line(item)}.")
            elif (found := places.find(item, needed[_bare(item)])) is not None:
                sources.append(found)
            else:
                missing.append(places.said_of(item, name, needed[_bare(item)]))
        splits[name] = YoloSplit(tuple(sources), tuple(missing))
    return splits


class Places:
    """Where the paths of a description are looked for: from its `path`, from its own folder and the one around that,
    without their leading `..`, with `images` on the other side, and at last by shorter ends, for they may come from
    another machine."""

    def __init__(self, file: Path, content: dict[str, Any], *, wide: bool = False) -> None:
        self.content = content
        self.wide = wide  # the folder around the file's own counts too, which may hold another data set
        self.home = file.absolute().parent
        stated = str(content["path"]).replace("\\", "/") if given(content.get("path")) else "."
        homes = list(dict.fromkeys((self.home, file.resolve().parent)))  # the file may be a link
        self.bases = [home / stated for home in homes]
        if stated not in (".", "./"):
            self.bases.append(Path(os.path.expanduser(stated)).absolute())
        self.bases += homes

    def find(self, text: str, needed: int) -> Path | None:
        """What a path stands for; needed: so many of its last parts tell it from the others."""
        if len(_parts(text)) > MAX_PATH_PARTS or len(text) > MAX_PATH:
            return None
        found = next((place for place in self._tries(text, needed) if _exists(place)), None)
        return None if found is None else _tidy(found)

    def _tries(self, text: str, needed: int) -> Iterator[Path]:
        parts, bare = _parts(text), _bare(text)
        bases = (
            [*self.bases, self.home.parent] if self.wide or parts[:1] in (("..",), (self.home.name,)) else self.bases
        )
        if text.startswith("~"):
            yield Path(os.path.expanduser(text))
        for names in (parts, bare):
            yield from (base.joinpath(*names) for base in bases if names or not parts)
        for other in _images_elsewhere(bare):
            yield from (base.joinpath(*other) for base in bases)
        for i in range(1, len(bare) - needed + 1):
            yield from (base.joinpath(*bare[i:]) for base in dict.fromkeys((self.bases[0], self.home)))
        below = [place for place in _folders(self.home) if place.name != "labels" and _exists(place.joinpath(*bare))]
        if len(below) == 1:  # the whole set lies one folder deeper than its description
            yield below[0].joinpath(*bare)

    def said_of(self, text: str, split: str, needed: int) -> str:
        """A sentence on a path that is nowhere: what is there instead."""
        bare = _bare(text)
        folder = next((base for base in self.bases if base.is_dir()), self.home)
        if len(bare) > 1 and not _exists(folder / bare[0]):
            bare = bare[-needed:]
        while len(bare) > 1 and len(bare) <= MAX_PATH_PARTS and _exists(folder / bare[0]):
            folder, bare = folder / bare[0], bare[1:]
        names = [place.name for place in _folders(folder)]
        if bare and bare[0].lower().endswith(".txt"):
            names = sorted(name for name in ImageFolders().names(folder) if name.lower().endswith(".txt"))
        near = did_you_mean(bare[0], names) if bare else ""
        has = one_line(first_few(names, _SHOWN), 400)
        return f"{split} names {one_line(text)}, which is not there: {folder} has {has}{near}. Correct the path."

    def image_lists(self, listing: Path, log: FindingLog) -> list[Path]:
        """The images that a text file lists, one a line; those that are nowhere go to the log."""
        return list(_listed_images(listing, [listing.parent, *self.bases, self.home.parent], log))


def _listed_images(listing: Path, homes: list[Path], log: FindingLog) -> Iterator[Path]:
    lines = [line.strip().strip("\"'").replace("\\", "/") for line in listed_lines(listing)]
    split = [(number, *line.rpartition("/")[::2]) for number, line in enumerate(lines, 1) if line]
    homes = list(dict.fromkeys(_tidy(home) for home in homes))
    parents = {parent: _bare(parent) for _, parent, _ in split}
    needed = shortest_ends(parents.values()) if len(set(parents.values())) > 1 else {}
    candidates = {
        text: [place for place in _folders_meant(text, bare, homes, needed.get(bare, 0)) if _exists(place)]
        for text, bare in parents.items()
    }
    folders = ImageFolders()
    absent = []
    for number, parent, name in split:
        found = next(filter(None, (folders.find(folder / name) for folder in candidates[parent])), None)
        if found is not None:
            yield found
        else:
            absent.append((number, f"{parent}/{name}" if parent else name))
    if split and len(absent) == len(split):
        looked = first_few(homes, 4)
        shown = one_line(absent[0][1])
        message = f"None of the {len(split):,} images that it lists is there, such as {shown}; looked in {looked}."
        log.add("every-image-missing", "refused", str(listing), message, count=len(split))
        return
    for number, name in absent:
        message = f"There is no {listing.parent / name}; the image was left out."
        log.add("missing-image", "dropped", f"{listing.name}, line {number}", message)


def _folders_meant(text: str, bare: Parts, homes: list[Path], needed: int) -> Iterator[Path]:
    if len(bare) > MAX_PATH_PARTS:
        return
    for home in homes:
        yield home.joinpath(*_parts(text))
    for i in range(len(bare) - needed + 1):
        yield from (home.joinpath(*bare[i:]) for home in homes)


def image_paths(splits: YoloSplit, file: Path | None, log: FindingLog) -> list[Path]:
    """The images of a split, each once."""
    paths: list[Path] = []
    for source in splits.sources:
        if source.is_dir():
            paths += [path for path in walk_files(source) if is_image_name(path.name)]
        elif is_image_name(source.name):
            paths.append(source)
        else:
            assert file is not None  # without a description there are no lists
            paths += Places(file, description(file)).image_lists(source, log)
    unique = list(dict.fromkeys(paths))
    if len(unique) < len(paths):
        repeated = len(paths) - len(unique)
        message = f"{repeated} images are listed twice; used once."
        log.add("duplicate-image", "repaired", str(splits.sources[0]), message, repeated)
    return unique


# ---- paths -----------------------------------------------------------------------------------------------------------


def shortest_ends(paths: Iterable[Parts]) -> dict[Parts, int]:
    """How many of its last parts tell each path from all the others, at least one: cut shorter, `valid/images` would be
    any folder called images."""
    ordered = sorted({path[::-1] for path in paths})
    shared = [0, *(len(os.path.commonprefix([a, b])) for a, b in zip(ordered, ordered[1:])), 0]
    return {path[::-1]: min(len(path), max(shared[i : i + 2]) + 1) for i, path in enumerate(ordered)}


def _parts(text: str) -> Parts:
    return PurePosixPath(text.strip().replace("\\", "/")).parts


def _bare(text: str) -> Parts:
    return tuple(part for part in _parts(text) if part not in ("..", ".", "/", "//", "~"))


def _images_elsewhere(bare: Parts) -> Iterator[Parts]:
    """`images/train` for `train/images`, and the reverse."""
    for i, part in enumerate(bare):
        if part.lower() == "images":
            if i > 0:
                yield (*bare[: i - 1], part, bare[i - 1], *bare[i + 1 :])
            if i + 1 < len(bare):
                yield (*bare[:i], bare[i + 1], part, *bare[i + 2 :])


def _folders(folder: Path) -> list[Path]:
    names = (name for name in ImageFolders().names(folder) if not is_clutter(name))
    return sorted(folder / name for name in names if (folder / name).is_dir())


def _exists(place: Path) -> bool:
    try:
        return place.exists()
    except (OSError, ValueError):  # a name that is too long for any file, or that none can have
        return False


def _tidy(place: Path) -> Path:
    """Without `..`, where that is the same place. Links stay: labels lie beside a link, not beside its target."""
    tidy = Path(os.path.normpath(place))
    return tidy if tidy == place or (_exists(tidy) and os.path.samefile(tidy, place)) else place

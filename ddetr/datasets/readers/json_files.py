"""JSON files of annotations: their text, in whichever encoding a tool has written it; those that hold a list of images,
and the splits that they are."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import folders_in, found_below
from ddetr.datasets.image_formats import is_clutter
from ddetr.datasets.readers.coco.layout import JSON_MARKS, named_by_split
from ddetr.datasets.readers.label_folders import split_folders
from ddetr.datasets.readers.reader import WHOLE, looked_at_once, split_kind
from ddetr.errors import InputError
from ddetr.untrusted import MAX_ANNOTATION_BYTES, open_file, parse_json, read_text


def json_text(file: Path, most_bytes: int, log: FindingLog, where: str) -> str:
    """The file's text; an encoding that JSON doesn't have goes to the log.

    Raises:
        InputError: it can't be read.
    """
    try:
        with open_file(file, most_bytes) as stream:
            encoding = json.detect_encoding(stream.read(4))  # UTF-8, 16 or 32
        try:
            return read_text(file, most_bytes, encoding)
        except UnicodeDecodeError as error:
            if not encoding.startswith("utf-8"):
                raise
            text = read_text(file, most_bytes, "cp1252", errors="replace")
            line = text.count("\n", 0, error.start) + 1
            near = text[max(0, error.start - 20) : error.start + 20]
            message = (
                f"The file is not {encoding.upper()} as JSON must be (line {line}: {near!r}); its letters were read as "
                "those of Windows-1252. If they look wrong, save it as UTF-8."
            )
            log.add("encoding", "repaired", where, message)
            return text
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} can't be read: {getattr(error, 'strerror', None) or error}") from None


def _named(root: Path, files: Sequence[Path], are_all: bool) -> dict[str, Path]:
    """Files by the names of their splits: one that is alone in its folder is called as the folder is.

    are_all: whether these are all splits.
    """
    if len(files) == 1 and are_all and (files[0].parent == root or not split_kind(files[0].parent.name)):
        return {WHOLE: files[0]}
    folders = [file.parent for file in files]
    alone = [file for file in files if file.parent != root and folders.count(file.parent) == 1]
    rest = {str(file.relative_to(root).with_suffix("")): file for file in files if file not in alone}
    return {file.parent.name: file for file in alone} | named_by_split(rest)


def file_splits(
    path: Path,
    patterns: Sequence[str],
    is_ours: Callable[[Path], bool],
    named: Callable[[Path, Sequence[Path], bool], dict[str, Path]] = _named,
) -> dict[str, list[Path]]:
    """Split name -> its files: the file at `path`, or those of the first pattern in the folder that are `is_ours`.
    Those below a split's folder are one split; `named` says how the others are called."""
    if path.is_file():
        return {name: [path] for name in named(path.parent, [path], True)} if is_ours(path) else {}
    for pattern in patterns:
        files = [file for file in found_below(path, pattern) if is_ours(file)]
        deeper = _in_split_folders(path, pattern, is_ours, files)
        if files or deeper:
            return {name: [file] for name, file in named(path, files, not deeper).items()} | deeper
    return {}


def _in_split_folders(
    root: Path, pattern: str, is_ours: Callable[[Path], bool], found: Sequence[Path]
) -> dict[str, list[Path]]:
    """Split name -> its files in folders of the split's folder (`train/0`, `train/1`), where `found`, those that fit
    the `pattern`, has none of the split."""
    head, _, name = pattern.partition("/")
    if head != "*" or "/" in name:
        return {}

    def of(folder: Path) -> list[Path]:
        return [file for file in _annotation_files(folder) if fnmatch(file.name.lower(), name) and is_ours(file)]

    known = {file.relative_to(root).parts[0] for file in found}
    splits = [folder for folder in folders_in(root) if split_kind(folder.name) and folder.name not in known]
    places = split_folders(splits, lambda folder: folder not in splits and len(of(folder)) == 1)
    return {name: [file for place in inner for file in of(place)] for name, inner in places.items()}


@looked_at_once
def _annotation_files(folder: Path) -> list[Path]:
    """The files that may hold annotations of several images: among 100,000 images or labels there are few."""
    try:
        names = [name for name in os.listdir(folder) if name.lower().endswith((".json", ".csv", ".tsv"))]
    except OSError:
        return []
    return [folder / name for name in sorted(names) if not is_clutter(name)]


def list_splits(path: Path, patterns: Sequence[str], is_ours: Callable[[bytes], bool]) -> dict[str, list[Path]]:
    """`file_splits` of the files that hold a list, of which the first kilobytes are `is_ours`."""

    def holds(file: Path) -> bool:
        start = start_of(file) if file.suffix.lower() == ".json" else b""
        return start[:1] == b"[" and is_ours(start)

    return file_splits(path, patterns, holds)


def start_of(file: Path) -> bytes:
    """The first kilobytes of a text file, whichever encoding it has; b"" where it can't be read."""
    try:
        with open_file(file) as stream:
            return stream.read(1 << 16).lstrip(JSON_MARKS).replace(b"\0", b"")
    except OSError:
        return b""


def load_list(file: Path, log: FindingLog, where: str) -> list[dict[str, Any]]:
    """The objects of a JSON file that holds a list of them."""
    content = parse_json(json_text(file, MAX_ANNOTATION_BYTES, log, where), str(file))
    if not isinstance(content, list) or not all(isinstance(entry, dict) for entry in content):
        raise InputError(f"{file}: expected a list with an object for each image")
    return content

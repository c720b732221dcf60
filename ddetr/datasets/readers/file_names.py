"""File names as others write them in annotations, to the files that are meant.

A name may come from Windows, a Mac, a web address, another folder. Its spellings are tried in order; where two entries
would get one file by a guess, neither gets it: boxes must never land on another image.
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import parse_qs, unquote

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, folded
from ddetr.datasets.image_formats import is_image_name
from ddetr.untrusted import MAX_PATH_PARTS

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://[^/]*/")  # https://host/, s3://bucket/, file:///
_DRIVE = re.compile(r"^[A-Za-z]:(?=/)")
_SAMPLED_NAMES = 32  # file names tried in each folder that might hold the images


def spellings(name: str) -> list[str]:
    """What a name may mean besides what it says, in the order in which it is tried: with `/` between folders, without
    drive, host and query, or what the query's `d` names (Label Studio); decoded; without spaces at its ends; composed
    (NFC) and decomposed (NFD)."""
    address = _SCHEME.match(name)
    path, found = name[address.end() :] if address else name, []
    head, mark, query = path.partition("?")
    given = parse_qs(query, errors="surrogateescape").get("d", []) if mark else []
    if mark and (address or given or is_image_name(head)):
        found, path = given[:1], head
    if address:
        path = path.partition("#")[0]
    found.append(path)
    if "%" in path:
        found.append(unquote(path, errors="surrogateescape"))
    found = [_DRIVE.sub("", one.replace("\\", "/")) for one in found]
    found += [one.strip() for one in found]
    if not all(one.isascii() for one in found):
        found += [unicodedata.normalize(form, one) for form in ("NFC", "NFD") for one in found]
    return list(dict.fromkeys(found))


def path_parts(spelling: str) -> tuple[str, ...]:
    """Folders and file name below wherever it may lie; () where there is none."""
    parts = [part for part in spelling.split("/") if part not in ("", ".")]
    while parts and parts[0] == "..":
        del parts[0]
    return () if ".." in parts or len(parts) > MAX_PATH_PARTS else tuple(parts)


class FileNames:
    """Looks for the files of names below one folder; each folder is listed once."""

    def __init__(self, folders: ImageFolders, home: Path, by_ends: bool) -> None:
        """by_ends: a name whose folders are not here is looked for by ever shorter ends of its path."""
        self.home = home
        self._folders, self._by_ends = folders, by_ends
        self._known: dict[tuple[str, ...], Path | None] = {(): home}

    def find(self, name: str) -> Path | None:
        return self.as_written(name) or next(self._guesses(name), None)

    def as_written(self, name: str) -> Path | None:
        if "/" not in name and name in self._folders.names(self.home):
            return self.home / name
        path = self.home / name
        return path if path.name in self._folders.names(path.parent) else None

    def _guesses(self, name: str) -> Iterator[Path]:
        whole = [parts for parts in map(path_parts, spellings(name)) if parts]
        longest = max(map(len, whole), default=0) if self._by_ends else 0
        ends = [parts[-length:] for length in range(longest - 1, 0, -1) for parts in whole if len(parts) > length]
        for tries in (whole, ends):
            tries = list(dict.fromkeys(tries))
            places = [(folder, parts[-1]) for parts in tries if (folder := self._folder(parts[:-1])) is not None]
            yield from (folder / last for folder, last in places if last in self._folders.names(folder))
            yield from filter(None, (self._folders.find(folder / last) for folder, last in places))

    def _folder(self, parts: tuple[str, ...]) -> Path | None:
        """The folder below home: each part as it is written, or else the only one that is written alike."""
        if parts not in self._known:
            above = self._folder(parts[:-1])
            inside = self._folders.names(above) if above else frozenset()
            alike = [parts[-1]] if parts[-1] in inside else [n for n in inside if folded(n) == folded(parts[-1])]
            self._known[parts] = above / alike[0] if above and len(alike) == 1 else None
        return self._known[parts]


def choose_home(places: Sequence[Path], names: Sequence[str], folders: ImageFolders) -> FileNames | None:
    """Where the images of `names` lie: the place that holds most of a sample of them; None where none holds any."""
    step = max(1, len(names) // _SAMPLED_NAMES)
    sample = set(names[::step][:_SAMPLED_NAMES])
    homes = [FileNames(folders, place, by_ends=False) for place in places]
    written = [sum(home.as_written(name) is not None for name in sample) for home in homes]
    if written and max(written) > len(sample) / 2:  # such as images beside masks of the same names
        places = [homes[written.index(max(written))].home]
    best, most = None, 0
    for by_ends in (False, True):
        for place in places:
            tried = FileNames(folders, place, by_ends)
            found = len({tried.find(name) for name in sample} - {None})
            if found > most:
                best, most = tried, found
            if found == len(sample):
                return best
    return best


def find_files(
    places: Sequence[Path], names: Sequence[str], folders: ImageFolders, log: FindingLog, shown: str
) -> list[Path | None]:
    """The file of each name, None where there is none or where it can't be known, which the log says."""
    if not names:
        return []
    home = choose_home(places, names, folders)
    if home is None:
        looked = ", ".join(str(place) for place in places[:4]) or "no folder"
        message = (
            f"None of its {len(names)} images was found (the first is {names[0]}; looked in {looked}); "
            "give image_dir (--data.train_images, --data.val_images)."
        )
        log.add("every-image-missing", "refused", shown, message, count=len(names))
        return [None] * len(names)
    paths = [home.find(name) for name in names]
    guessed = [i for i, path in enumerate(paths) if path is not None and not _says(names[i], path, home.home)]
    clashing = _clashing(paths, names, guessed)
    in_other_words = []
    for i, name in enumerate(names):
        path = paths[i]
        if path is None:
            message = f"There is no {home.home / name}; the image was left out."
            log.add("missing-image", "dropped", f"{shown}, {name}", message)
        elif i in clashing:
            paths[i] = None
            _report_clash(name, path, clashing[i], log, shown)
    for i in guessed:
        path = paths[i]
        if path is None:
            continue
        if path.name not in names[i]:
            message = f"The file is called {path.name}; it was used."
            log.add("file-name-differs", "repaired", f"{shown}, {names[i]}", message)
        else:
            in_other_words.append(i)
    if in_other_words:
        i = in_other_words[0]
        message = f"File names carry more than is here, such as {names[i]}; it was found as {paths[i]}."
        log.add("file-name-path", "repaired", shown, message, count=len(in_other_words))
    return paths


def _says(name: str, path: Path, home: Path) -> bool:
    """Whether the name says this path to the letter."""
    return str(path) == f"{home}/{name}" or path == home / name


def _clashing(paths: Sequence[Path | None], names: Sequence[str], guessed: Sequence[int]) -> dict[int, str | None]:
    """Of the guessed ones, those whose file another name has got too -> the name that says it to the letter, None where
    that too is a guess."""
    names_of: dict[Path, set[str]] = defaultdict(set)
    for i in guessed:
        names_of[paths[i]].add(names[i])
    written = {}
    if names_of:
        guesses = set(guessed)
        written = {path: names[i] for i, path in enumerate(paths) if path in names_of and i not in guesses}
    return {
        i: written.get(paths[i])
        for i in guessed
        if paths[i] in written or len(names_of[paths[i]]) > 1  # one name under two ids is another matter
    }


def _report_clash(name: str, path: Path, owner: str | None, log: FindingLog, shown: str) -> None:
    where = f"{shown}, {name}"
    if owner is not None:
        message = f"There is no such file; {path}, which is nearest, belongs to {owner}. The image was left out."
        log.add("missing-image", "dropped", where, message)
        return
    message = (
        f"It and other entries could all mean {path}: whose boxes are whose can't be known. Put the images into "
        "folders as file_name names them, or correct file_name."
    )
    log.add("ambiguous-image", "refused", where, message)

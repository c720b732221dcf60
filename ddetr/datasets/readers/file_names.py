"""File names as others write them in annotations, to the files that are meant.

A name may come from Windows, a Mac, a web address, another folder. Its spellings are tried in order; where two entries
would get one file by a guess, neither gets it: boxes must never land on another image.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from urllib.parse import parse_qs, unquote

from ddetr.datasets.annotations import FindingLog, are_most
from ddetr.datasets.image_files import AlikeNames, ImageFolders, folded, report_all_missing
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.reader import split_kind
from ddetr.printable import one_line
from ddetr.untrusted import MAX_PATH_PARTS

_SCHEME = re.compile(r"^[A-Za-z][A-Za-z0-9+.-]+://[^/]*/")  # https://host/, s3://bucket/, file:///
_DRIVE = re.compile(r"^[A-Za-z]:(?=/)")
_SAMPLED_NAMES = 32  # file names tried in each folder that might hold the images
_DEPTH = 4  # folders below the data set's that are searched for images that lie in no usual place
_MOST_FOLDERS = 10_000  # of those
Spell = Callable[[str], list[str]]  # what a name may mean, the likeliest first


def spellings(name: str) -> list[str]:
    """What a name may mean besides what it says, in the order in which it is tried: with `/` between folders, without
    drive, host and query, or what the query's `d` names (Label Studio); decoded; without spaces at its ends; composed
    (NFC) and decomposed (NFD)."""
    address = _SCHEME.match(name)
    path, found = name[address.end() :] if address else name, []
    head, mark, query = path.partition("?")
    given = parse_qs(query, errors="surrogateescape").get("d", []) if mark else []
    if mark and (address or given or is_image_name(head.replace("\\", "/").rpartition("/")[2])):
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


def last_parts(name: str) -> list[str]:
    """The file names, without folders, that a name may mean, in the order in which they are tried."""
    return list(dict.fromkeys(parts[-1] for one in spellings(name) if (parts := path_parts(one))))


class FileNames:
    """Looks for the files of names below one folder; each folder is listed once."""

    def __init__(self, folders: ImageFolders, home: Path, by_ends: bool, spell: Spell) -> None:
        """by_ends: a name whose folders are not here is looked for by ever shorter ends of its path."""
        self.home, self.by_ends = home, by_ends
        self._folders, self._spell = folders, spell
        self._known: dict[tuple[str, ...], Path | None] = {(): home}

    def find(self, name: str) -> Path | None:
        return self.as_written(name) or next(self._guesses(name), None)

    def as_written(self, name: str) -> Path | None:
        if "/" not in name:
            return self._in(self.home, name)
        path = self.home / name
        return self._in(path.parent, path.name)

    def _in(self, folder: Path, name: str) -> Path | None:
        """The file of this name to the letter; a folder is none."""
        if name not in self._folders.names(folder):
            return None
        path = folder / name
        return path if is_image_name(name) or path.is_file() else None

    def _guesses(self, name: str) -> Iterator[Path]:
        whole = [parts for parts in map(path_parts, self._spell(name)) if parts]
        longest = max(map(len, whole), default=0) if self.by_ends else 0
        ends = [parts[-length:] for length in range(longest - 1, 0, -1) for parts in whole if len(parts) > length]
        for tries in (whole, ends):
            tries = list(dict.fromkeys(tries))
            places = [(folder, parts[-1]) for parts in tries if (folder := self._folder(parts[:-1])) is not None]
            yield from filter(None, (self._in(folder, last) for folder, last in places))
            yield from filter(None, (self._folders.find(folder / last) for folder, last in places))

    def _folder(self, parts: tuple[str, ...]) -> Path | None:
        """The folder below home: each part as it is written, or else the only one that is written alike."""
        if parts not in self._known:
            above = self._folder(parts[:-1])
            inside = self._folders.names(above) if above else frozenset()
            alike = [parts[-1]] if parts[-1] in inside else [n for n in inside if folded(n) == folded(parts[-1])]
            self._known[parts] = above / alike[0] if above and len(alike) == 1 else None
        return self._known[parts]


def choose_home(
    places: Sequence[Path], names: Sequence[str], folders: ImageFolders, spell: Spell = spellings
) -> FileNames | None:
    """Where the images of `names` lie: the place that holds most of a sample of them; None where none holds any."""
    step = max(1, len(names) // _SAMPLED_NAMES)
    sample = set(names[::step][:_SAMPLED_NAMES])
    homes = [FileNames(folders, place, False, spell) for place in places]
    written = [sum(home.as_written(name) is not None for name in sample) for home in homes]
    if written and max(written) > len(sample) / 2:  # such as images beside masks of the same names
        places = [homes[written.index(max(written))].home]
    best, most = None, 0
    for by_ends in (False, True):
        for place in places:
            tried = FileNames(folders, place, by_ends, spell)
            found = len({tried.find(name) for name in sample} - {None})
            if found > most:
                best, most = tried, found
            if found == len(sample):
                return best
    return best


def find_files(
    places: Sequence[Path],
    names: Sequence[str],
    folders: ImageFolders,
    log: FindingLog,
    shown: str,
    *,
    root: Path,
    split: str,
    spell: Spell = spellings,
    are_addresses: bool = False,
    may_be_part: bool = False,
) -> list[Path | None]:
    """The file of each name, None where there is none or where it can't be known, which the log says.

    Args:
        places: folders that may hold the images, the likeliest first.
        shown: the annotation file, for people.
        root: the data set's folder: images that are in none of the places are looked for below it.
        split: its name; folders of other splits hold none of its images.
        are_addresses: the folders in names are those of a server, and nothing is repaired by leaving them out.
        may_be_part: it is usual to have a small part of the images: a note says how many are not there.
    """
    if not names:
        return []
    home = choose_home(places, names, folders, spell)
    paths = [home.find(name) if home else None for name in names]
    _look_elsewhere(paths, names, root, split, home, spell)
    if not any(paths):
        report_all_missing(log, shown, names[0], len(names), places)
        return paths
    base = home.home if home else root
    guessed = [i for i, path in enumerate(paths) if path is not None and not _says(names[i], path, base)]
    clashing = _clashing(paths, names, guessed)
    num_missing = paths.count(None)
    is_part = may_be_part and are_most(num_missing, len(paths) - num_missing)
    if is_part:
        message = (
            f"{num_missing:,} of the {len(names):,} images that it names are not here: {len(names) - num_missing:,} "
            "were taken, as a part of the data set."
        )
        log.add("part-of-images", "note", shown, message, count=num_missing)
    in_other_words = []
    for i, name in enumerate(names):
        path = paths[i]
        if path is None and is_part:
            continue
        if path is None:
            message = f"There is no {one_line(base / name)}, or more than one that it could be; the image was left out."
            log.add("missing-image", "dropped", f"{shown}, {one_line(name)}", message, image=name)
        elif i in clashing:
            paths[i] = None
            _report_clash(name, path, clashing[i], log, shown)
    action = "note" if are_addresses else "repaired"
    for i in guessed:
        path = paths[i]
        if path is None or names[i] == path.name or path.with_suffix("") == base / names[i]:
            continue  # in another folder, which no name states; without suffixes, as OpenImages has its names
        if path.name not in names[i] and not are_addresses:
            message = f"The file is called {one_line(path.name)}; it was used."
            log.add("file-name-differs", "repaired", f"{shown}, {one_line(names[i])}", message)
        else:
            in_other_words.append(i)
    if in_other_words:
        i = in_other_words[0]
        message = (
            f"File names say more or less than the path, such as {one_line(names[i])}; it was found as {paths[i]}."
        )
        log.add("file-name-path", action, shown, message, count=len(in_other_words))
    return paths


def _look_elsewhere(
    paths: list[Path | None],
    names: Sequence[str],
    root: Path,
    split: str,
    home: FileNames | None,
    spell: Spell,
) -> None:
    """Fills in what lies in other folders than most images do: names without folders, or with such as are not here."""
    left = [i for i, path in enumerate(paths) if path is None and (not home or home.by_ends or "/" not in names[i])]
    if not left:
        return
    found = [path for path in paths if path is not None]
    homes = {str(path.parent) for path in found}
    elsewhere = images_below(root, split, {folded(path.stem) for path in found}, homes)
    for i in left:
        parts = filter(None, map(path_parts, spell(names[i])))
        paths[i] = next(filter(None, (elsewhere.find(one[-1], any_suffix=False) for one in parts)), None)


def images_below(root: Path, split: str, found: Collection[str], homes: Collection[str] = ()) -> AlikeNames:
    """The images below a folder, without the folders of other splits, and without those that hold an image of the same
    name as one of `found` and are none of its `homes`: they run beside the images, as masks, depths and other
    resolutions do."""
    kind, alike = split_kind(split), AlikeNames()
    others = {"train", "val", "test"} - {kind} if kind and "trainval" not in split.lower() else set()
    for folder, inner, files in islice(os.walk(root), _MOST_FOLDERS):
        deep = len(Path(folder).relative_to(root).parts) >= _DEPTH
        inner[:] = [] if deep else [name for name in inner if not is_clutter(name) and split_kind(name) not in others]
        images = list(filter(is_image_name, files))
        if folder in homes or not any(folded(os.path.splitext(name)[0]) in found for name in images):
            for name in images:
                alike.add(name, Path(folder, name))
    return alike


def stems_in_other_splits(root: Path, split: str) -> set[str]:
    """The names, folded and without suffix, of the images below a folder that lie in the folders of other splits."""
    others, stems = {"train", "val", "test"} - {split_kind(split)}, set()
    for folder, inner, files in islice(os.walk(root), _MOST_FOLDERS):
        parts = Path(folder).relative_to(root).parts
        inner[:] = [] if len(parts) >= _DEPTH else [name for name in inner if not is_clutter(name)]
        if any(split_kind(part) in others for part in parts):
            stems |= {folded(os.path.splitext(name)[0]) for name in filter(is_image_name, files)}
    return stems


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
    where = f"{shown}, {one_line(name)}"
    if owner is not None:
        owner = one_line(owner)
        message = f"There is no such file; {path}, which is nearest, belongs to {owner}. The image was left out."
        log.add("missing-image", "dropped", where, message, image=name)
        return
    message = (
        f"It and other entries could all mean {path}: whose boxes are whose can't be known. Put the images into "
        "folders as the names say, or correct the names."
    )
    log.add("ambiguous-image", "refused", where, message)

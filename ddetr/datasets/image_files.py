"""The images that annotations speak of: where they lie, what their headers say, and which frame the boxes live in."""

from __future__ import annotations

import os
import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_formats import is_clutter, is_image_name, is_unread_name, unread_files
from ddetr.datasets.image_header import ImageHeader
from ddetr.datasets.images import image_header, size_mismatch
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_LABEL_BYTES, read_text
from ddetr.wording import first_few

_HEADER_THREADS = 8  # they wait for the disk; more gains nothing locally, and on network storage the disk is the limit
_HEADERS_A_TASK = 256
_HEADERS = "image headers"
_LABELS_A_STEP = 256
Progress = Callable[[int, int, str], None]  # (done, total, of what)
T = TypeVar("T")
_progress: ContextVar[Progress | None] = ContextVar("progress", default=None)
_SAME_SHAPE = 0.02  # by how much the sides of an image that was resized differ in their factors
_OTHER_SIZE = 0.05
_FEW_RESIZED = 3  # say nothing of a data set
_ROUNDING_PX = 1.5  # what labelling tools' rounding and inclusive corners add to a box at the image's edge


# The options of every command that say where images lie; in brackets the argument of `load_annotations`.
IMAGES_OPTION = "--data.train_images or --data.val_images (image_dir)"


class AlikeNames:
    """Image files by their names, whatever the capitals, how accents are composed, and the suffix: of two that fit
    neither is meant."""

    def __init__(self) -> None:
        self._places: dict[tuple[bool, str], Any] = {}

    def add(self, name: str, place: Any) -> None:
        for key in ((True, folded(name)), (False, folded(name.rpartition(".")[0]))):
            self._places[key] = None if key in self._places else place

    def find(self, name: str, *, any_suffix: bool = True) -> Any:
        """The place of this name; one of another suffix only with `any_suffix`, or where the name has none."""
        whole = self._places.get((True, folded(name)))
        if whole is not None or (is_image_name(name) and not any_suffix):
            return whole
        stem, suffix = os.path.splitext(name) if is_image_name(name) else (name, "")
        found = self._places.get((False, folded(stem)))
        if found is None and suffix:  # a.jpg.jpg: Windows hides a suffix, and who doesn't see it gives another
            found = self._places.get((True, folded(name + suffix)))
            if found is None and stem.lower().endswith(suffix.lower()):
                found = self._places.get((True, folded(stem)))
        return found


class ImageFolders:
    """File names of folders, each listed once: 118,000 look-ups cost one directory read."""

    def __init__(self) -> None:
        self._exact: dict[Path, frozenset[str]] = {}
        self._alike: dict[Path, AlikeNames] = {}

    def names(self, folder: Path) -> frozenset[str]:
        if folder not in self._exact:
            try:
                self._exact[folder] = frozenset(os.listdir(folder))
            except (OSError, ValueError):  # ValueError: a name that no folder can have
                self._exact[folder] = frozenset()
        return self._exact[folder]

    def images(self, folder: Path) -> list[str]:
        return sorted(name for name in self.names(folder) if is_image_name(name))

    def find(self, path: Path) -> Path | None:
        """The file at `path`, or the one that differs only in capitals, in how accents are composed, or in its image
        suffix; None without one."""
        names = self.names(path.parent)
        if path.name in names:
            return path
        if path.parent not in self._alike:
            alike = self._alike[path.parent] = AlikeNames()
            for name in filter(is_image_name, names):
                alike.add(name, name)
        found = self._alike[path.parent].find(path.name)
        return path.parent / found if found else None

    def report_unread(self, log: FindingLog) -> None:
        """What of the folders that were listed is an image and is not read."""
        for folder in sorted(self._exact):
            report_unread(self._exact[folder], str(folder), log)


def folded(name: str) -> str:
    """The same for names that people take for one: whatever its capitals, and however its accents are composed."""
    return name.lower() if name.isascii() else unicodedata.normalize("NFC", name).casefold()


def visible(paths: Iterable[Path], root: Path) -> list[Path]:
    """Of what was found below `root`, sorted: what is no clutter and lies in none."""
    return sorted(path for path in paths if not any(map(is_clutter, path.relative_to(root).parts)))


def found_below(root: Path, pattern: str) -> list[Path]:
    """The `visible` files below `root` that a pattern names; LABELS.CSV of *.csv too. Names without a wildcard are
    taken as they stand: the folders, which may hold 100,000 images, need not be listed for them."""

    def both(part: re.Match[str]) -> str:
        letters = part[0].strip("[]")
        return f"[{letters.lower()}{letters.upper()}]"

    head, _, name = pattern.rpartition("/")
    if "*" in name:
        name = re.sub(r"\[[^\]]*\]|[A-Za-z]", both, name)
    return visible(root.glob(f"{head}/{name}" if head else name), root)


def folders_in(folder: Path) -> list[Path]:
    """The folders in a folder that are no clutter, sorted."""
    try:
        with os.scandir(folder) as entries:
            names = [e.name for e in entries if e.is_dir() and not is_clutter(e.name)]
    except OSError:
        return []
    return [folder / name for name in sorted(names)]


def walk_files(folder: Path) -> list[Path]:
    """All files in a folder and below that are no clutter, sorted; as `walk_folders` finds them."""
    walked = [(place, names) for place, names in walk_folders(folder) if names]
    files = [place / name for place, names in walked for name in names]
    return files if len(walked) < 2 else sorted(files)


def walk_folders(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below with the sorted names of their files, without clutter. Links to folders are followed,
    each folder is walked once, and none that the folder itself lies in.

    Raises:
        InputError: a folder can't be read.
    """
    seen: set[tuple[int, int]] = set()
    real_root = os.path.realpath(folder)
    waiting, links = [folder], []
    while waiting or links:
        place = waiting.pop() if waiting else links.pop()
        try:
            status = os.stat(place)
            if (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted((entry for entry in os.scandir(place) if not is_clutter(entry.name)), key=lambda e: e.name)
        except OSError as error:
            raise InputError(f"{place} can't be read: {error.strerror or error}") from None
        names = []
        for entry in entries:
            if not _is_folder(entry):
                names.append(entry.name)
            elif not entry.is_symlink():
                waiting.append(place / entry.name)
            elif not Path(real_root).is_relative_to(os.path.realpath(entry.path)):
                links.append(place / entry.name)
        yield place, names


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()  # asks the disk only about links
    except OSError:  # a link to itself
        return False


def listed_lines(listing: Path) -> list[str]:
    """The lines of a text file that lists images or classes; `InputError` where it can't be read."""
    try:
        return read_text(listing, MAX_LABEL_BYTES, errors="replace").splitlines()
    except OSError as error:
        raise InputError(f"{listing} can't be read: {error.strerror or error}") from None


def report_all_missing(
    log: FindingLog, where: str, first: str, count: int, looked: Iterable[str | Path], cure: str | None = None
) -> None:
    """Adds that none of `count` images was found, of which `first` is one, in any of the places of `looked`."""
    message = (
        f"None of its {count:,} images was found (the first is {one_line(first)}; looked in "
        f"{first_few(looked, 4)}). {cure or f'Name their folder by {IMAGES_OPTION}.'}"
    )
    log.add("every-image-missing", "refused", where, message, count=count)


def report_unlisted(
    paths: Iterable[Path | None], folders: ImageFolders, log: FindingLog, shown: str, known: Collection[str] = ()
) -> None:
    """Counts the images that lie beside those of the annotations, and what is not read there.

    paths: of the annotations' images. known: names that other splits have.
    """
    listed: dict[str, set[str]] = defaultdict(set)
    for path in paths:
        if path is not None:
            folder, _, name = str(path).rpartition(os.sep)
            listed[folder].add(name)
    for folder, names in sorted(listed.items()):
        unlisted = [name for name in folders.images(Path(folder)) if name not in names and name not in known]
        if unlisted:
            message = (
                f"{len(unlisted):,} images in {folder} are not listed in {shown} and not used, such as "
                f"{one_line(unlisted[0])}."
            )
            log.add("unlisted-images", "note", folder, message, count=len(unlisted))
        others = filter(is_unread_name, folders.names(Path(folder)))  # first: it is quick
        report_unread((name for name in others if name not in names), folder, log)


def report_unread(names: Iterable[str], where: str, log: FindingLog, *, are_left_out: bool = False) -> None:
    """Adds a finding for each kind of image files, of these names in a folder, that is not read.

    are_left_out: whether the folder's content is what the data set has; otherwise the annotations say that, and each
    of their images that is not read has a finding of its own.
    """
    for unread in unread_files(names):
        action = "dropped" if are_left_out and unread.is_photo else "note"
        log.add("image-not-read", action, where, f"{unread.said}.", count=len(unread.names))


@contextmanager
def reading_shown(progress: Progress) -> Iterator[None]:
    """In it, `progress(done, total, of_what)` hears how many of the label files and of the image headers that are being
    read are read: for who shows it to people. Readers, which are in between, need not know of it."""
    token = _progress.set(progress)
    try:
        yield
    finally:
        _progress.reset(token)


@contextmanager
def reading_on_screen(path: str | os.PathLike) -> Iterator[None]:
    """In it, people see that the data set at `path` is being read, and how far."""
    from ddetr import console

    with console.reading(f"reading {path}", _HEADERS) as update, reading_shown(update):
        yield


def counted(label_files: Sequence[T]) -> Iterator[T]:
    """The label files, or what has one each, as they are read one by one; `reading_shown` says who hears how far it
    is."""
    progress = _progress.get()
    for done, file in enumerate(label_files):
        if progress is not None and done and done % _LABELS_A_STEP == 0:
            progress(done, len(label_files), "label files")
        yield file


def read_headers(paths: Sequence[Path | str]) -> list[ImageHeader | InputError]:
    """The header of each file, or what is wrong with it, in order; `reading_shown` says who hears how far it is."""

    def read(chunk: Sequence[Path | str]) -> list[ImageHeader | InputError]:
        headers: list[ImageHeader | InputError] = []
        for path in chunk:
            try:
                headers.append(image_header(path))
            except InputError as error:
                headers.append(error)
        return headers

    chunks = [paths[i : i + _HEADERS_A_TASK] for i in range(0, len(paths), _HEADERS_A_TASK)]
    if len(chunks) < 2:
        return read(paths)
    progress = _progress.get()
    headers: list[ImageHeader | InputError] = []
    with ThreadPoolExecutor(_HEADER_THREADS) as pool:
        for found in pool.map(read, chunks):
            headers += found
            if progress is not None:
                progress(len(headers), len(paths), _HEADERS)
    return headers


class Stated(NamedTuple):
    """What the annotations say of an image, and the header of its file."""

    path: Path
    header: ImageHeader
    declared_hw: tuple[int, int] | None  # its size, where they say one
    boxes_xyxy: np.ndarray  # (n, 4) as written
    where: str
    in_fractions: bool  # the boxes, which a resized image keeps

    def fits(self, size_hw: tuple[int, int]) -> bool:
        """Whether no box reaches beyond an image of this size."""
        finite = self.boxes_xyxy[np.isfinite(self.boxes_xyxy).all(axis=1)]
        limits = np.array([size_hw[1], size_hw[0]], dtype=np.float64) + _ROUNDING_PX
        return bool((finite[:, 2:] <= limits).all())

    @property
    def is_declared_as_stored(self) -> bool:
        """Whether the size is that of the pixels before the EXIF orientation turns them into another one."""
        return self.header.upright_hw != self.declared_hw == self.header.stored_hw

    @property
    def may_be_as_stored(self) -> bool:
        """Whether its boxes alone can tell if they were drawn on the pixels before the EXIF orientation turns them."""
        return self.declared_hw is None and not self.in_fractions and self.header.upright_hw != self.header.stored_hw

    @property
    def is_resized(self) -> bool:
        """Whether the image looks resized after its boxes were drawn: the same shape in another size."""
        actual_hw = self.header.upright_hw
        if self.declared_hw is None or self.in_fractions or self.is_declared_as_stored or not len(self.boxes_xyxy):
            return False
        by_height, by_width = (actual / declared for actual, declared in zip(actual_hw, self.declared_hw, strict=True))
        return abs(by_height / by_width - 1) <= _SAME_SHAPE and abs(by_width - 1) >= _OTHER_SIZE


def settle_sizes(images: Sequence[Stated], num_images: int, log: FindingLog) -> list[tuple[int, int] | None]:
    """The frame (h, w) that the boxes of each image live in; None where that can't be known, and it is left out.

    num_images: of the split, with those whose files are as they are stated, which need not be among `images`.
    """
    resized = [image for image in images if image.is_resized and image.fits(image.declared_hw)]
    are_resized = any(not image.fits(image.header.upright_hw) for image in resized)
    # Tools that show an image turned, and take its size from the file, write the size of the stored one.
    upright = _lean_upright(image for image in images if image.is_declared_as_stored) > 0
    stored = _lean_upright(image for image in images if image.may_be_as_stored) < 0
    sizes_hw = [_settle_size(image, upright, stored, are_resized, log) for image in images]
    if len(resized) > _FEW_RESIZED and len(resized) * 2 > num_images:
        (height, width), (actual_height, actual_width) = resized[0].declared_hw, resized[0].header.upright_hw
        message = (
            f"{len(resized):,} of {num_images:,} images have the shape that their annotations state, in another size, "
            f"as {actual_width} x {actual_height} for {width} x {height} pixels: they look resized, and their boxes "
            "may not be. Restore the images, or scale the boxes and state the new size."
        )
        log.add("images-resized", "refused", resized[0].where, message, count=len(resized))
    return sizes_hw


def _lean_upright(turned: Iterable[Stated]) -> int:
    """Of how many more of these images the boxes fit the upright frame alone than the stored one alone."""
    fits = ((image.fits(image.header.upright_hw), image.fits(image.header.stored_hw)) for image in turned)
    return sum(upright - stored for upright, stored in fits)


def _settle_size(
    image: Stated, upright: bool, stored: bool, are_resized: bool, log: FindingLog
) -> tuple[int, int] | None:
    """Of one image; upright, stored: whether the boxes of the split were drawn so, where the sizes say otherwise or
    nothing; are_resized: whether boxes of the split fit the stated sizes alone, so that others fit both by chance."""
    path, header, declared_hw, where = image.path, image.header, image.declared_hw, image.where
    actual_hw = header.upright_hw
    if stored and image.may_be_as_stored and (image.fits(header.stored_hw) or not image.fits(actual_hw)):
        message = (
            f"{path.name} is turned by its EXIF orientation, but boxes of these annotations fit the images as stored "
            "alone; it is used as stored."
        )
        log.add("orientation", "repaired", where, message)
        return header.stored_hw
    if declared_hw is None or declared_hw == actual_hw:
        if header.orientation > 1 and len(image.boxes_xyxy) and (declared_hw is None or header.stored_hw == actual_hw):
            message = (
                f"{path.name} is turned by its EXIF orientation and its size does not tell whether its boxes were "
                "drawn on the turned image; that was taken."
            )
            log.add("orientation", "note", where, message)
        return actual_hw
    declared = f"{declared_hw[1]} x {declared_hw[0]}"
    if image.is_declared_as_stored:
        if upright and (image.fits(actual_hw) or not image.fits(header.stored_hw)):
            message = (
                f"{path.name} is turned by its EXIF orientation, and its annotations state the {declared} pixels as "
                "stored, but boxes of these annotations fit the upright images alone; it is used upright."
            )
            log.add("orientation", "repaired", where, message)
            return actual_hw
        message = (
            f"{path.name} is turned by its EXIF orientation, but its boxes were drawn on the {declared} pixels as "
            "stored; it is used as stored."
        )
        log.add("orientation", "repaired", where, message)
        return header.stored_hw
    if image.fits(actual_hw) and not (are_resized and image.is_resized):
        message = (
            f"{path.name} is {actual_hw[1]} x {actual_hw[0]} pixels, not {declared} as annotated; its boxes fit, "
            "the file is believed."
        )
        log.add("size-mismatch", "repaired", where, message)
        return actual_hw
    log.add("size-mismatch", "dropped", where, f"{size_mismatch(path, actual_hw, declared_hw)} It was left out.")
    return None

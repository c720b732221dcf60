"""Which images belong together, by their names: copies that Roboflow made of one image, frames of a video, tiles of an
image. Where some of them are trained on and others validated on, the model looks better than it is."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

from ddetr.datasets.annotations import Category, alike

_ROBOFLOW_COPY = re.compile(r"(_(jpe?g|png|bmp|webp|tiff?|avif|heic))?\.rf\.[0-9A-Za-z]{20,}(?=\.\w+$)", re.IGNORECASE)


class _Kind(NamedTuple):
    """Names that end in numbers; what stands before these is the same for all of a family."""

    pattern: re.Pattern
    least: int  # images of a family; most images are in such, beside which there may be smaller ones
    said: str  # with the number of families
    group_pattern: str  # for people


_KINDS = (
    _Kind(re.compile(r"^(.*[^0-9].*?)[0-9]+\.\w+$", re.DOTALL), 5, "frames of {} videos", "(.*[^0-9])[0-9]+[.]"),
    _Kind(
        re.compile(r"^(.*?)(?:[-_ ]+[0-9]+){2,}\.\w+$", re.DOTALL),  # field7_0_512_512_1024.png
        3,
        "tiles of {} images",
        "(.*?)(?:[-_ ]+[0-9]+)+[.]",
    ),
)
_OF_ROBOFLOWS_FRAMES = "(.*[^0-9])[0-9]+_[a-z]+[.]rf[.]"


class Families(NamedTuple):
    """Images that look as if they belonged together."""

    said: str  # "frames of 6 videos"
    group_pattern: str  # the option that keeps them together
    members: dict[str, list[int]]  # what their names begin with -> their places in the list, ascending


def copied_from(name: str) -> str | None:
    """What the image was called of which Roboflow made a copy of this name, augmented or not: a.jpg for
    a_jpg.rf.0123456789abcdef0123456789abcdef.jpg; None for another name."""
    found = _ROBOFLOW_COPY.search(name)
    return None if found is None else name[: found.start()] + name[found.end() :]


def looks_numbered(name: str) -> bool:
    """Whether an image of this name may be one of several that belong together."""
    name = copied_from(name) or name
    return any(kind.pattern.match(name) for kind in _KINDS)


def families(names: Sequence[str], categories: Iterable[Category]) -> Iterator[Families]:
    """The ways in which most images of a set look related, where there is more than one family. Images that are called
    as a class, or several of it, are none (cat_, data/Dogs-): that tells what is on them, not what they are of."""
    sources = [copied_from(name) for name in names]
    classes = {alike(category.name) + plural for category in categories for plural in ("", "s", "es")}
    for kind in _KINDS:
        members: dict[str, list[int]] = {}
        for place, (name, source) in enumerate(zip(names, sources, strict=True)):
            if match := kind.pattern.match(source or name):
                members.setdefault(match[1], []).append(place)
        members = {stem: places for stem, places in members.items() if alike(stem.rpartition("/")[2]) not in classes}
        large = [len(places) for places in members.values() if len(places) >= kind.least]
        if len(large) > 1 and sum(large) >= len(names) / 2:
            is_roboflows = kind is _KINDS[0] and any(sources)
            pattern = _OF_ROBOFLOWS_FRAMES if is_roboflows else kind.group_pattern
            yield Families(kind.said.format(len(members)), pattern, members)

"""What decoding the images of a data set shows, of all or of as many as some time allows: which can't be decoded, and
which are nearly black."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from ddetr.datasets.annotations import ImageRecord
from ddetr.datasets.images import read_image
from ddetr.errors import InputError
from ddetr.runtime.limits import available_cores

MOST_UNREADABLE = 0.01  # of the training images (but always one): above it training would be on another data set
_A_TASK = 64  # images
DARKEST = 255 // 8  # the brightest value of an image that is nearly black
_MOST_THREADS = 32  # each holds an image twice: beyond, large ones would fill the memory
_GOLDEN = 0.6180339887498949


class Decoded(NamedTuple):
    """What was found."""

    problems: list[tuple[ImageRecord, str]]
    """Images that can't be decoded, and why, in the order in which they were tried."""
    num_images: int
    """How many were tried."""
    dark: list[ImageRecord]
    """Images without a value above `DARKEST`: 12 bits in files of 16 come out so."""


def decode_all(
    images: Sequence[ImageRecord],
    chosen: Sequence[int],
    *,
    deadline: float | None = None,
    progress: Callable[[int], None] | None = None,
) -> Decoded:
    """Reads the chosen images as training does, on all cores. Decoding releases the interpreter's lock, so threads are
    enough.

    Args:
        images: of a split.
        chosen: indices, as `spread` gives them.
        deadline: of `time.monotonic`, after which the others are left.
        progress: called with the number of images done.
    """

    def check(task: Sequence[int]) -> Decoded:
        problems, dark = [], []
        for number, index in enumerate(task):
            if deadline is not None and time.monotonic() > deadline:
                return Decoded(problems, number, dark)
            record = images[index]
            try:
                pixels = read_image(record.path, record.size_hw)
            except InputError as error:
                problems.append((record, str(error)))
                continue
            if pixels.permute(1, 2, 0).numpy().max(initial=0) <= DARKEST:  # as it lies in memory: ten times as fast
                dark.append(record)
        return Decoded(problems, len(task), dark)

    tasks = [chosen[i : i + _A_TASK] for i in range(0, len(chosen), _A_TASK)]
    problems, done, dark = [], 0, []
    with ThreadPoolExecutor(min(_MOST_THREADS, available_cores())) as pool:
        for found in pool.map(check, tasks):
            problems += found.problems
            dark += found.dark
            done += found.num_images
            if progress is not None:
                progress(done)
    return Decoded(problems, done, dark)


def spread(total: int, most: int | None) -> list[int]:
    """Indices of all images, or of `most` spread evenly over them, in an order that is even wherever it ends."""
    if most is None:
        return list(range(total))
    chosen = np.unique(np.linspace(0, total - 1, min(total, most)).round().astype(int)) if total else np.zeros(0, int)
    return chosen[np.argsort(np.arange(len(chosen)) * _GOLDEN % 1, kind="stable")].tolist()


def most_unreadable(num_images: int) -> int:
    """How many of so many training images may turn out not to be readable: for those others stand in."""
    return max(1, int(MOST_UNREADABLE * num_images))

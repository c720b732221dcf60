"""The states that a run can be resumed from: which is the newest whole one."""

import errno
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr.arrays import check_tensors
from ddetr.errors import InputError
from ddetr.files import damage

logger = logging.getLogger(__name__)

# A file that cannot be read now may be whole: no other one may take its place.
_NOT_ITS_FAULT = (errno.EIO, errno.ESTALE, errno.EACCES, errno.EPERM, errno.ETIMEDOUT, errno.ENOTCONN, errno.ENOMEM)
RESUME_FILE, PREVIOUS_FILE, DAMAGED_FILE = "last.ckpt", "previous.ckpt", "damaged.ckpt"


def newest_state(folder: Path) -> Path | None:
    """The newest whole state in a run folder, or None where there is none at all.

    Raises:
        InputError: there are files, but all are damaged.
    """
    errors: list[InputError] = []
    for file in states(folder):
        try:
            check_training_state(file)
        except InputError as error:
            errors.append(error)
            continue
        if errors:
            logger.warning("%s: the state before it, %s, is taken", errors[0], file)
        return file
    if errors:
        raise errors[0]
    return None


def states(folder: Path) -> list[Path]:
    return [folder / name for name in (RESUME_FILE, PREVIOUS_FILE) if (folder / name).is_file()]


def epochs_done(file: Path) -> int:
    """Of the run whose state it is."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True).get("DetectionData", {}).get("epoch", 0)


def set_aside_damaged(resumed_from: Path) -> None:
    """Where a run goes on from the state before the last: the damaged one would take the place of the good one when
    the next is saved."""
    if resumed_from.name == PREVIOUS_FILE and resumed_from.with_name(RESUME_FILE).exists():
        os.replace(resumed_from.with_name(RESUME_FILE), resumed_from.with_name(DAMAGED_FILE))


def check_training_state(file: Path) -> None:
    """Raises `InputError` where `file` is not the state of a training run, or not what was written: PyTorch itself
    looks at no checksum, and loads a flipped bit as a weight."""
    anew = "a run can also be started anew from its last.pth or best.pth by --weights"
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged pickle raises anything
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in _NOT_ITS_FAULT:
            raise
        raise InputError(
            f"--resume: {file} is no training state, or a damaged one ({type(error).__name__}); {anew}"
        ) from error
    if not isinstance(content, dict) or "pytorch-lightning_version" not in content:
        raise InputError(
            f"--resume: {file} holds weights, not the state of a run: start from them with --weights {file}"
        )
    try:
        check_tensors(content, file.stat().st_size)
    except ValueError as error:
        raise InputError(f"--resume: {file} is damaged: {error}; {anew}") from error
    if (what := damage(file)) is not None:
        raise InputError(f"--resume: {file} is damaged: {what}; {anew}")
    if (name := next(not_a_number(content), None)) is not None:
        raise InputError(f"--resume: {file} holds values that are no numbers, {name} first; {anew}")


def not_a_number(content: Any, where: str = "") -> Iterator[str]:
    """Names of the tensors in a nested state that hold a NaN."""
    if isinstance(content, Tensor):
        if content.is_floating_point() and bool(torch.isnan(content).any()):
            yield where
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from not_a_number(value, f"{where}.{key}".lstrip("."))
    elif isinstance(content, (list, tuple)):
        for index, value in enumerate(content):
            yield from not_a_number(value, f"{where}.{index}")

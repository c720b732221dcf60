"""A bundle read back. It may come from anybody, so nothing in it is believed: types, ranges and sizes are checked
before anything is computed with them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from ddetr.arrays import load_tensors
from ddetr.engine.blackbox.bundle import FORMAT
from ddetr.errors import InputError
from ddetr.models.criterion import Classification
from ddetr.printable import one_line
from ddetr.untrusted import (
    MAX_CLASSES,
    MAX_NETWORK,
    MAX_OBJECTS,
    MAX_RUN_BYTES,
    MAX_SIDE,
    MAX_THREADS,
    is_number,
    parse_json,
    read_text,
)


def read_bundle(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `bundle.json` and `state.pt` hold.

    Raises:
        InputError: no bundle, one of another format, or a damaged one.
    """
    if not folder.is_dir():
        raise InputError(
            f"replay: expected the folder of a failed step, such as RUN/blackbox/step-000123, but there is no {folder}"
        )
    if not (folder / "bundle.json").is_file():
        inside = sorted(folder.glob("blackbox/step-*")) or sorted(folder.glob("step-*"))
        hint = f"; did you mean {inside[0]}?" if inside else ""
        raise InputError(f"replay: {folder} holds no bundle.json: it is not the folder of a failed step{hint}")
    header = _read_header(folder / "bundle.json")
    return header, _read_state(folder / "state.pt", header)


def _read_header(file: Path) -> dict[str, Any]:
    try:
        header = parse_json(read_text(file, MAX_RUN_BYTES), file.name)
    except (OSError, ValueError) as error:
        raise InputError(f"replay: {file} is damaged: {getattr(error, 'strerror', None) or error}") from error
    if not isinstance(header, dict) or "format" not in header:
        raise InputError(f"replay: {file} is damaged: it is no description of a step")
    versions = header.get("versions")
    if header["format"] != FORMAT:
        program = f": use ddetr {one_line(versions.get('ddetr'))}" if isinstance(versions, dict) else ""
        raise InputError(
            f"replay: {file.parent} has format {one_line(header['format'])}, this ddetr reads {FORMAT}{program}"
        )
    for name, fits in _HEADER.items():
        if not fits(header.get(name)):
            found = one_line(repr(header[name])) if name in header else "not there"
            raise InputError(f"replay: {file} is damaged: {name} is {found}")
    return header


def _read_state(file: Path, header: Mapping[str, Any]) -> dict[str, Any]:
    try:
        state = load_tensors(file)
    except FileNotFoundError:
        raise InputError(
            f"replay: {file.parent} holds no state.pt, batch and weights of the step: {header['what']}"
        ) from None
    except Exception as error:  # a damaged pickle raises anything
        reason = str(error) if isinstance(error, ValueError) else type(error).__name__
        raise InputError(f"replay: {file} is damaged ({reason})") from error
    wrong = [name for name, fits in _STATE.items() if not isinstance(state, dict) or not fits(state.get(name))]
    if wrong:
        raise InputError(f"replay: {file} is damaged: its {wrong[0]} is not whole")
    return state


def _is_whole(value: Any, low: float = -(2**63), high: float = 2**64) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value < high


def _is_loss_weight(item: tuple[str, Any]) -> bool:
    name, value = item
    return value in get_args(Classification) if name == "classification" else is_number(value)


def _is_auxiliary(item: tuple[str, Any]) -> bool:
    """How many queries there are is a whole number, and no larger than a network's own."""
    name, value = item
    if name in ("denoising", "one_to_many"):
        return _is_whole(value, 0, MAX_NETWORK["num_queries"] + 1)
    return isinstance(value, bool) if name == "look_forward_twice" else is_number(value)


def _is_loss(value: Any) -> bool:
    return value is None or value in ("nan", "inf", "-inf") or is_number(value)


def _is_list(fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(fits, value))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_place(value: Any) -> bool:
    """Where an image stands in the batch."""
    return isinstance(value, dict) and all(
        _is_whole(value.get(name), low, 2**63) for name, low in (("micro_batch", 0), ("row", 0), ("image_id", -(2**63)))
    )


def _is_error(value: Any) -> bool:
    return value is None or (isinstance(value, dict) and _is_text(value.get("type")))


# What is computed with, and what it must be.
_HEADER: dict[str, Callable[[Any], bool]] = {
    "what": _is_text,
    "step_seed": _is_whole,
    "num_boxes": lambda value: is_number(value) and value > 0,
    "images": _is_list(_is_place),
    "categories": lambda value: _is_list(_is_text)(value) and len(value) <= MAX_CLASSES,
    "model": lambda value: isinstance(value, dict),
    "frozen": _is_list(_is_text),
    "loss": _is_loss,
    "loss_weights": lambda value: isinstance(value, dict) and all(map(_is_loss_weight, value.items())),
    "auxiliary": lambda value: value is None or (isinstance(value, dict) and all(map(_is_auxiliary, value.items()))),
    "optimizer": _is_text,
    "groups": _is_list(_is_list(_is_text)),
    "autocast": lambda value: value in (None, "float16", "bfloat16"),
    "channels_last": lambda value: isinstance(value, bool),
    "device": lambda value: value in ("cpu", "cuda"),
    "device_name": _is_text,
    "threads": lambda value: _is_whole(value, 1, MAX_THREADS + 1),
    "matmul_precision": lambda value: value in (None, "highest", "high", "medium"),
    "deterministic": lambda value: isinstance(value, bool),
    "versions": lambda value: isinstance(value, dict) and all(map(_is_text, value.values())) and "ddetr" in value,
    "error": _is_error,
}


def _is_micro_batch(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    images, mask, targets = (value.get(name) for name in ("images", "mask", "targets"))
    if not isinstance(images, Tensor) or images.dim() != 4 or images.shape[1] != 3:
        return False
    if images.dtype != torch.uint8 and not images.is_floating_point():
        return False
    num_images, _, height, width = images.shape
    if not (num_images and 0 < height <= MAX_SIDE and 0 < width <= MAX_SIDE):
        return False
    is_mask = isinstance(mask, Tensor) and mask.dtype == torch.bool and mask.shape == (num_images, height, width)
    has_targets = isinstance(targets, list) and len(targets) == num_images and all(map(_is_target, targets))
    return (mask is None or is_mask) and has_targets


def _is_target(value: Any) -> bool:
    if not isinstance(value, dict) or not all(isinstance(tensor, Tensor) for tensor in value.values()):
        return False
    boxes, labels = value.get("boxes"), value.get("labels")
    if boxes is None or labels is None or not boxes.is_floating_point() or labels.dtype != torch.int64:
        return False
    return boxes.shape == (len(labels), 4) and labels.dim() == 1 and len(labels) <= MAX_OBJECTS


def _is_weights(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(one, Tensor) and not one.is_complex() for one in value.values())


def _is_optimizer(value: Any) -> bool:
    return (
        isinstance(value, dict) and isinstance(value.get("state"), dict) and isinstance(value.get("param_groups"), list)
    )


def _is_scaler(value: Any) -> bool:
    return not value or (isinstance(value, dict) and is_number(value.get("scale")) and value["scale"] > 0)


_STATE: dict[str, Callable[[Any], bool]] = {
    "batch": lambda value: _is_list(_is_micro_batch)(value) and bool(value),
    "weights": _is_weights,
    "optimizer": _is_optimizer,
    "scaler": _is_scaler,
}

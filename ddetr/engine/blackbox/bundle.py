"""What is kept of a training step that failed: enough to compute it again elsewhere.

RUN/blackbox/step-000123/
    what.txt      what happened, in words
    bundle.json   the same for programs: step, images, losses, first place that is not finite, settings, versions
    state.pt      batch, weights and optimiser before the step, random states: plain types and tensors
"""

import importlib.metadata
import json
import logging
import math
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import nn

from ddetr import __version__
from ddetr.checkpoint.published import COLORS, portable_config
from ddetr.datasets import Annotations
from ddetr.engine.blackbox.trace import NotFinite
from ddetr.engine.step import Step, ids_of, on_device
from ddetr.files import write_folder_atomically, write_text

logger = logging.getLogger(__name__)

FOLDER = "blackbox"
FORMAT = 1
MAX_BUNDLES = 3  # per run: its first two and its latest; one holds weights and optimiser, three times the model


def write_bundle(
    run: Path,
    step: Step,
    said: str,
    found: NotFinite | None,
    *,
    config: Mapping[str, Any],
    annotations: Annotations | None,
    scaler: dict[str, Any] | None = None,
    **facts: Any,
) -> str | None:
    """Put the bundle into the run folder; its path, or None where none could be written.

    Never raises: a full disk must not end a run that could go on, and a GPU in an unknown state, from which neither
    batch nor weights can be read, still leaves the words.

    Args:
        step: as it started, inside its autocast; its model and its optimiser are as they were before it.
        said: what happened.
        found: where it began, if that is known.
        config: settings of the run; annotations: of the training images, to name files and classes.
        scaler: state of the gradient scaler before the step.
        facts: loss, gradient norm or error, for bundle.json.
    """
    path = run / FOLDER / f"step-{step.number:06d}{f'-rank{step.rank}' if step.rank else ''}"

    def write(folder: Path) -> None:
        header = _header(step, config) | {"what": said, "not_finite": None if found is None else asdict(found), **facts}
        try:
            header["images"] = _images(step, annotations)
            header["categories"] = [] if annotations is None else [c.name for c in annotations.categories]
            torch.save(_state(step, scaler), folder / "state.pt")
        except RuntimeError as error:
            (folder / "state.pt").unlink(missing_ok=True)
            header["what"] += f" (batch and weights could not be read any more: {type(error).__name__})"
        write_text(folder / "bundle.json", json.dumps(_plain(header), indent=1, default=str) + "\n")
        write_text(folder / "what.txt", _in_words(header))

    try:
        _make_room(path.parent, path.name)
        write_folder_atomically(path, write)
    except Exception as error:
        logger.warning("the failed step could not be recorded in %s: %s: %s", path, type(error).__name__, error)
        return None
    return str(path)


def module_of(trace: TracebackType | None, model: nn.Module) -> str | None:
    """The innermost module of `model` in whose forward an exception was raised."""
    names = {id(module): name for name, module in model.named_modules() if name}
    innermost = None
    while trace is not None:
        owner = trace.tb_frame.f_locals.get("self")
        innermost = names.get(id(owner), innermost)
        trace = trace.tb_next
    return innermost


def _make_room(folder: Path, name: str) -> None:
    """At most `MAX_BUNDLES` with the new one: the first ones, where it began, stay."""
    others = sorted(path for path in folder.glob("step-*") if path.name != name)
    for path in others[MAX_BUNDLES - 1 :]:
        shutil.rmtree(path, ignore_errors=True)


def _header(step: Step, config: Mapping[str, Any]) -> dict[str, Any]:
    model, device = step.model, step.device
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return {
        "format": FORMAT,
        "step": step.number,
        "epoch": step.epoch,
        "rank": step.rank,
        "world_size": step.world_size,
        "seed": step.run_seed,
        "step_seed": step.seed,
        "num_boxes": step.num_boxes,
        "images": [],
        "categories": [],
        "model": portable_config(model.config),
        COLORS: [list(model.image_mean), list(model.image_std)],
        "auxiliary": None if model.auxiliary is None else asdict(model.auxiliary.config),
        "frozen": [name for name, parameter in model.named_parameters() if not parameter.requires_grad],
        "loss": None,
        "loss_weights": asdict(step.criterion.loss_weights),
        "optim": asdict(step.optim),
        "optimizer": type(step.optimizer).__name__,
        "groups": [[names[id(p)] for p in group["params"]] for group in step.optimizer.param_groups],
        "autocast": None if autocast is None else str(autocast).removeprefix("torch."),
        "channels_last": _is_channels_last(model.backbone),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "threads": torch.get_num_threads(),
        "matmul_precision": matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "versions": versions(),
        "config": dict(config),
    }


def matmul_precision() -> str | None:
    """PyTorch's choice for float32 matrix products; None inside `onednn_matmuls`, where it has no one name."""
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError:
        return None


def versions() -> dict[str, str]:
    found = {"ddetr": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("torchvision", "timm", "numpy", "scipy", "lightning"):
        found[package] = importlib.metadata.version(package)
    return found


def _images(step: Step, annotations: Annotations | None) -> list[dict[str, Any]]:
    """What image stands where in the batch, with those that were mixed into it; their files where the annotations are
    at hand."""
    wanted = set(step.image_ids)
    paths = {} if annotations is None else {r.image_id: str(r.path) for r in annotations.images if r.image_id in wanted}

    def named(image_id: int) -> dict[str, Any]:
        return {"image_id": image_id, "path": paths.get(image_id)}

    return [
        {"micro_batch": index, "row": row, **named(own), "others": [named(other) for other in others]}
        for index, (_, _, targets) in enumerate(step.batch)
        for row, (own, *others) in enumerate(map(ids_of, targets))
    ]


def _state(step: Step, scaler: dict[str, Any] | None) -> dict[str, Any]:
    python = random.getstate()
    numpy = np.random.get_state()
    cuda = [step.device] if step.device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        torch.manual_seed(step.seed)  # as the step started
        drawn = {"torch": torch.get_rng_state(), "cuda": [torch.cuda.get_rng_state(device) for device in cuda]}
    return {
        "batch": [dict(zip(("images", "mask", "targets"), on_device(micro, "cpu"))) for micro in step.batch],
        "weights": {name: tensor.detach().cpu() for name, tensor in step.model.state_dict().items()},
        "optimizer": step.optimizer.state_dict(),
        "scaler": scaler,
        "random": drawn
        | {"python": [python[0], list(python[1]), python[2]]}
        | {"numpy": [str(numpy[0]), [int(n) for n in numpy[1]], int(numpy[2]), int(numpy[3]), float(numpy[4])]},
    }


def _is_channels_last(module: nn.Module) -> bool:
    kernels = [p for p in module.parameters() if p.dim() == 4 and p.shape[2] > 1 and p.shape[1] > 1]
    return bool(kernels) and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def _plain(value: Any) -> Any:
    """The same with "nan" and "inf" for what JSON has no number for."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _in_words(header: Mapping[str, Any]) -> str:
    lines = [header["what"], ""]
    if found := header["not_finite"]:
        lines += [f"First place that is not finite: {found['place']} {found['name']} {found['kind']}".rstrip(), ""]
    for place in header["images"]:
        lines += [
            f"micro-batch {place['micro_batch']}, image {place['row']}: id {place['image_id']}  {place['path'] or ''}"
        ]
        lines += [f"    made with id {other['image_id']}  {other['path'] or ''}" for other in place["others"]]
    lines += ["", f"epoch {header['epoch']}, seed {header['seed']}, process {header['rank']} of {header['world_size']}"]
    lines += [", ".join(f"{name} {version}" for name, version in header["versions"].items())]
    if header.get("error"):
        lines += ["", header["error"]["traceback"]]
    return "\n".join(lines) + "\n"

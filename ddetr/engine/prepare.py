"""What a run settles before anything is built: its device, its folder, its data set, read and audited."""

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ddetr import console
from ddetr.checkpoint.detectors import read_config
from ddetr.checkpoint.foreign import check_is_weights
from ddetr.datasets import Annotations, AuditReport, audit
from ddetr.datasets.image_files import reading_on_screen
from ddetr.datasets.splits import load_splits, no_validation, read_held_back
from ddetr.engine.compile import check_compiler
from ddetr.engine.config import TrainConfig
from ddetr.engine.freeze import freeze_parameters
from ddetr.engine.loggers import chosen_loggers
from ddetr.engine.run.data import DataTraits, check_same_data
from ddetr.engine.run.folder import RunFolder
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.models.auxiliary import attach_auxiliary
from ddetr.models.backbones import find_start
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.allocator import use_expandable_segments
from ddetr.runtime.device import choose_device
from ddetr.runtime.distributed import is_first_process
from ddetr.weight_files.sources import find_weights

logger = logging.getLogger(__name__)

_NOT_OF_WEIGHTS = ("num_classes", "pretrained_backbone", "freeze_backbone")  # of the data and of the training


@dataclass(frozen=True)
class Prepared:
    """What is settled before anything is built."""

    config: TrainConfig  # with the sizes of batches
    run: RunFolder
    resume_file: Path | None
    where: dict[str, Any]  # Lightning's arguments for the device
    loggers: Sequence[str]
    train_set: Annotations
    val_set: Annotations
    weights: Path | None  # the file or folder that the run starts from; None where it starts from none, or goes on
    audit: AuditReport
    traits: DataTraits | None  # of the data, on the first process
    other_val: bool  # whether the run that goes on had other validation images: what was best does not count any more


def prepare(config: TrainConfig) -> Prepared:
    """Device, run folder and data set, read and audited; nothing is written. What can be checked without the
    data is checked before they are read."""
    root = existing(config.data.path)
    loggers = chosen_loggers(config.loggers)
    where = _where(config)
    if config.compile:
        check_compiler(where["accelerator"])
    if where["accelerator"] == "cuda":
        use_expandable_segments()
    run, resume_file = RunFolder.choose(config.output, config.resume, root.resolve().name)
    before = run.settings() if resume_file is not None else {}
    config = config.with_batch_sizes(before)
    weights = None
    if config.weights is not None and resume_file is None:
        weights = find_weights(config.weights)
        check_is_weights(weights)
        config = _with_network_of(config, weights)
    elif config.weights is not None:
        config = config.with_network_of(before.get("model") or {})
    if resume_file is not None:
        run.check_unchanged(config, resume_file)
        if is_first_process():
            with run.claimed(is_new=False):
                pass  # whoever cannot have it is told so before the data are read
    _check_options(config, where["devices"] * where["num_nodes"], is_resumed=resume_file is not None)
    with reading_on_screen(config.data.path):
        held_back = read_held_back(run.path) if resume_file is not None else None
        train_set, val_set = load_splits(config.data, keep_empty=config.data.keep_empty, held_back=held_back)
    if val_set is None:
        raise no_validation(config.data)
    with console.reading("decoding validation images", "images") as update:
        report = audit(
            train_set,
            val_set,
            num_queries=config.model["num_queries"],
            max_detections=config.max_detections,
            # What validation meets is known before the first step. A run that goes on was told, and survives it.
            decode="val" if resume_file is None and is_first_process() else False,
            on_bad_image=config.data.on_bad_image,
            strict=config.data.strict,
            progress=update,
        )
    if is_first_process():
        console.show(report.render())
        for finding in report.findings:
            if finding.kind == "validation-is-training":  # above the progress too, not only in a long table
                logger.warning("%s", finding.message)
    if report.refused:
        first, others = report.refused[0], len(report.refused) - 1
        more = f", and {others} more findings in the table above" if others else ""
        raise InputError(f"the audit refused the data set: {first.where}: {first.message}{more}")
    traits, other_val = None, False
    if is_first_process():
        traits = DataTraits.of(train_set, val_set, root)
        if resume_file is not None:
            other_val = check_same_data(run.path, traits, accept_changes=config.accept_changed_data)
    return Prepared(config, run, resume_file, where, loggers, train_set, val_set, weights, report, traits, other_val)


def _with_network_of(config: TrainConfig, weights: Path) -> TrainConfig:
    """The same with the network of a file of weights, where the options say nothing of it."""
    own = config.with_network_of({})
    try:
        network = {name: value for name, value in read_config(weights).items() if name not in _NOT_OF_WEIGHTS}
        found = config.with_network_of(network)
        with torch.device("meta"):
            DeformableDETR(**dict(found.model, pretrained_backbone=False), num_classes=1)
    except InputError as error:  # a part of a detector, or one that does not go with the options: what fits is loaded
        if is_first_process():
            logger.info("the network is as the options say, not as in the weights: %s", error)
        return own
    taken = [f"{name} {value}" for name, value in found.model.items() if value != own.model[name]]
    if taken and is_first_process():
        logger.info("the network is that of %s where no option says otherwise: %s", weights.name, ", ".join(taken))
    return found


def _check_options(config: TrainConfig, num_processes: int, *, is_resumed: bool) -> None:
    """What the options alone decide, on a network without memory: names, sizes and files that cannot be. The files that
    a run has started from may be gone when it is resumed."""
    backbone = config.model["pretrained_backbone"]
    if config.weights is not None or is_resumed or find_start(config.model["backbone"], backbone).file is None:
        backbone = False  # no file, or one that is not read; what timm has may be yet to fetch
    with torch.device("meta"):
        detector = DeformableDETR(**dict(config.model, pretrained_backbone=backbone), num_classes=1)
        freeze_parameters(detector, config.optim.freeze)
        attach_auxiliary(detector, config.auxiliary)
    if isinstance(config.batch_size, int) and config.batch_size % num_processes:
        raise InputError(f"batch_size {config.batch_size} must be divisible by the {num_processes} processes")


def _where(config: TrainConfig) -> dict[str, Any]:
    """Lightning's arguments for the device; under torchrun the numbers that torchrun set."""
    devices = config.devices
    use_cuda = choose_device(config.device).type == "cuda"
    num_nodes = 1
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    devices = devices or (torch.cuda.device_count() if use_cuda else 1)
    return {
        "accelerator": "cuda" if use_cuda else "cpu",
        "devices": devices,
        "num_nodes": num_nodes,
        "strategy": "ddp" if devices * num_nodes > 1 else "auto",
    }

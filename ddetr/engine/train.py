"""`train()`: a data set in, a run folder with a detector out."""

import inspect
import json
import logging
import math
import os
import signal
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ddetr import console, report
from ddetr.checkpoint import Checkpoint, load_weights, save_checkpoint
from ddetr.datasets import Annotations, audit, padded_shapes, worst_padded_hw
from ddetr.datasets.annotations import did_you_mean
from ddetr.datasets.transforms import PAPER_MAX_SIZE, scaled
from ddetr.engine.batch_size import PAPER_BATCH_SIZE, BatchSize, MemoryPlan, resolve
from ddetr.engine.callbacks import MemoryFormat, Publish, Watch
from ddetr.engine.compile import DEFAULT_SHAPES, CompiledForward, check_compiler
from ddetr.engine.config import DataConfig, OptimConfig
from ddetr.engine.data import DetectionData
from ddetr.engine.memory import use_expandable_segments
from ddetr.engine.module import DetectionModule
from ddetr.engine.optimizer import describe_groups, parameter_groups
from ddetr.engine.run import CONFIG_FILE, RESUME_FILE, RunFolder, check_training_state, is_first_process
from ddetr.engine.splits import load_splits
from ddetr.errors import InputError
from ddetr.evaluation import CocoEvaluator, Metrics
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.optimize import onednn_matmuls

logger = logging.getLogger(__name__)

ENOUGH_IMAGES = 10_000  # to learn photographs from nothing; below it, trained weights decide the outcome

# What training starts from where nothing else is said: the strongest published variant, on an ImageNet backbone.
DEFAULT_MODEL = {"pretrained_backbone": True, "with_box_refine": True, "two_stage": True}

PRECISIONS = {"32": "32-true", "bf16": "bf16-mixed", "fp16": "16-mixed"}


@dataclass(frozen=True)
class RunResult:
    """Where a run and its data lie, and the metrics of its last validation."""

    path: Path
    data_path: Path
    image_example: Path
    metrics: Metrics


def train(
    data: DataConfig,
    model: dict[str, Any] | None = None,
    loss: LossWeights = LossWeights(),
    optim: OptimConfig = OptimConfig(),
    *,
    epochs: int = 50,
    batch_size: BatchSize = PAPER_BATCH_SIZE,
    device_batch_size: BatchSize = 2,
    val_every: int = 1,
    output: str | None = None,
    weights: str | None = None,
    resume: str | None = None,
    seed: int = 42,
    precision: Literal["32", "bf16", "fp16"] = "32",
    activation_checkpointing: bool = False,
    compile: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    devices: int | None = None,
    max_detections: int = 100,
    log_every: int = 10,
    num_pictures: int = 12,
) -> RunResult:
    """Train a detector.

    Args:
        data: where the data set is.
        model: constructor arguments of `DeformableDETR`; `num_classes` comes from the data.
        loss: weights of losses and matching costs.
        optim: optimiser and schedule.
        epochs: passes over the training images.
        batch_size: images an optimisation step, over all devices; the paper's is 32, which "auto" is too, with
            device_batch_size auto.
        device_batch_size: images that a device takes at a time; a step takes as many turns as it needs. "auto" tries out
            how many fit into its memory, with the largest images that there can be.
        val_every: epochs between validations; the last epoch always has one.
        output: run folder; by default runs/ and the name of the data set, numbered.
        weights: checkpoint to start from (ours, official, transformers, ...), unlike resume with a new schedule.
        resume: "auto", a run folder or its last.ckpt: continue that run exactly.
        seed: decides initial weights, order and augmentation.
        precision: "32", or "bf16" or "fp16" mixed with 32.
        activation_checkpointing: compute the layers of encoder and decoder twice instead of keeping what they computed:
            less memory, more time, the same gradients.
        compile: torch.compile the model, for a few padded shapes; the first steps of each take minutes.
        device: "auto" takes CUDA where it is available.
        devices: processes; by default all GPUs, or one on the CPU; under torchrun its number.
        max_detections: detections an image that the evaluation counts.
        log_every: steps between rows of train.csv.
        num_pictures: validation images that are drawn at the end, truth beside prediction.

    Raises:
        InputError: settings, data or weights that cannot work, said before the first step.
    """
    config = {
        "data": asdict(data),
        "model": _complete(model or {}),
        "loss": asdict(loss),
        "optim": asdict(optim),
        "epochs": epochs,
        "batch_size": batch_size,
        "device_batch_size": device_batch_size,
        "val_every": val_every,
        "weights": weights,
        "seed": seed,
        "precision": precision,
        "activation_checkpointing": activation_checkpointing,
        "compile": compile,
        "max_detections": max_detections,
    }
    for name in ("epochs", "val_every", "log_every"):
        if (value := locals()[name]) < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0 to 2^32 - 1, got {seed}")
    where = _where(device, devices, precision)
    if compile:
        check_compiler(where["accelerator"])
    if where["accelerator"] == "cuda":
        use_expandable_segments()
    run, resume_file = RunFolder.choose(output, resume, Path(data.path).resolve().name)
    batch_size, device_batch_size = resolve(
        batch_size, device_batch_size, None if resume_file is None else run.path / CONFIG_FILE
    )
    config |= {"batch_size": batch_size, "device_batch_size": device_batch_size}
    if resume_file is not None:
        check_training_state(resume_file)
        run.check_unchanged(config)
    with console.waiting(f"reading {data.path}"):
        train_set, val_set = load_splits(data)
        report_of_data = audit(
            train_set,
            val_set,
            num_queries=config["model"]["num_queries"],
            max_detections=max_detections,
            strict=data.strict,
        )
    if is_first_process():
        console.show(report_of_data.render())
    if report_of_data.refused:
        first, others = report_of_data.refused[0], len(report_of_data.refused) - 1
        more = f", and {others} more findings in the table above" if others else ""
        raise InputError(f"the audit refused the data set: {first.where}: {first.message}{more}")

    is_settled = device_batch_size != "auto"  # otherwise it is at the start of the fit
    datamodule = DetectionData(
        train_set,
        val_set,
        data,
        batch_size=batch_size,
        device_batch_size=device_batch_size if is_settled else 1,
        seed=seed,
    )
    pl.seed_everything(seed, verbose=False)
    detector = _build_detector(config["model"], train_set, weights, is_resumed=resume_file is not None)
    detector.transformer.set_activation_checkpointing(activation_checkpointing)
    worst_hw, compiled = worst_padded_hw(data.image_size), None
    if compile:
        shapes = padded_shapes(data.image_size, getattr(data, "padded_shapes", None) or DEFAULT_SHAPES)
        worst_hw, compiled = shapes[0], CompiledForward(detector, shapes)
        if is_first_process():
            listed = ", ".join(f"{h} x {w}" for h, w in shapes)
            logger.info("compile: batches are padded to %d shapes: %s", len(shapes), listed)
    total_steps = datamodule.steps_per_epoch * epochs
    module = DetectionModule(
        detector,
        build_criterion(detector, loss),
        optim,
        CocoEvaluator(val_set, max_detections),
        backbone_pretrained=_starts_from_weights(config["model"], weights),
        steps_per_epoch=datamodule.steps_per_epoch,
        total_steps=total_steps,
        seed=seed,
        compiled=compiled,
    )
    if is_first_process():
        run.start(config)
        run.write_json("audit.json", report_of_data.to_dict())
        groups = parameter_groups(detector, optim, backbone_pretrained=module.backbone_pretrained)
        for line in describe_groups(groups, detector):
            logger.info(line)
        logger.info(
            "%d images, %d steps of %d images an epoch, %d epochs, into %s",
            len(train_set.images), datamodule.steps_per_epoch, batch_size, epochs, run.path,
        )  # fmt: skip
        if not module.backbone_pretrained and len(train_set.images) < ENOUGH_IMAGES:
            logger.info(
                "random initial weights: photographs need %s images or more to learn from nothing, here are %s; otherwise "
                "give --weights FILE or --model.pretrained_backbone true",
                f"{ENOUGH_IMAGES:,}", f"{len(train_set.images):,}",
            )  # fmt: skip

    def publish(name: str, module: DetectionModule, metrics: Metrics) -> None:
        checkpoint = Checkpoint.of(
            module.model,
            train_set.categories,
            image_size=data.image_size,
            max_size=scaled(PAPER_MAX_SIZE, data.image_size),
            threshold=0.5 if math.isnan(metrics.threshold) else metrics.threshold,
            metrics=metrics.numbers(),
            training={"data": train_set.name, "step": module.global_step, "epoch": module.current_epoch},
        )
        save_checkpoint(run.path / name, checkpoint)

    def settle(size: int) -> None:
        if is_first_process():
            run.write_yaml(CONFIG_FILE, config | {"device_batch_size": size})

    memory_plan = MemoryPlan(
        worst_hw,
        num_objects=max((len(record.labels) for record in train_set.images), default=1),
        precision=precision,
        optimizer_states=1 if optim.sgd else 2,
        settle=None if is_settled else settle,
    )
    with warnings.catch_warnings():
        _quiet_lightning()
        trainer = pl.Trainer(
            max_epochs=epochs,
            check_val_every_n_epoch=min(val_every, epochs),
            precision=PRECISIONS[precision],
            num_sanity_val_steps=0,
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(run.path),
            callbacks=[
                MemoryFormat(),
                memory_plan,
                Watch(run, batch_size=batch_size, total_steps=total_steps, log_every=log_every),
                Publish(run, publish),
                ModelCheckpoint(
                    dirpath=run.path,
                    filename=RESUME_FILE.removesuffix(".ckpt"),
                    save_top_k=1,
                    every_n_epochs=1,
                    save_on_train_epoch_end=True,
                    enable_version_counter=False,
                ),
            ],
            **where,
        )
        with onednn_matmuls():
            _fit(trainer, module, datamodule, run, resume_file)
    if trainer.is_global_zero:
        report.draw_curves(run.path)
        report.draw_pictures(run.path, val_set, num_pictures, device=where["accelerator"])
    # Only a run that was complete before it was resumed has had no validation now.
    metrics = module.metrics or Metrics.from_dict(json.loads((run.path / "metrics.json").read_text())["last"])
    return RunResult(run.path, Path(data.path), val_set.images[0].path, metrics)


def _fit(
    trainer: pl.Trainer, module: DetectionModule, datamodule: DetectionData, run: RunFolder, resume_file: Path | None
) -> None:
    """Training; Ctrl+C stops it as it stops anything else in Python."""
    handler = signal.getsignal(signal.SIGINT)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=resume_file)
    except SystemExit:  # Lightning's answer to Ctrl+C, which it also switches off
        if not trainer.interrupted:
            raise
        signal.signal(signal.SIGINT, handler)
        if (run.path / RESUME_FILE).is_file():
            logger.info("stopped; the same command with --resume goes on from the last checkpoint")
        raise KeyboardInterrupt from None


def _complete(model: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the network but the number of classes, so that the run folder does not depend on defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(DeformableDETR).parameters.items()}
    del defaults["num_classes"]
    for name in model:
        if name not in defaults:
            why = " It comes from the data." if name == "num_classes" else did_you_mean(name, defaults)
            raise InputError(f"model: {name!r} is no setting that can be made.{why}")
    return defaults | DEFAULT_MODEL | model


def _starts_from_weights(model: dict[str, Any], weights: str | None) -> bool:
    return bool(weights or model["pretrained_backbone"])


def _build_detector(
    model: dict[str, Any], train_set: Annotations, weights: str | None, *, is_resumed: bool
) -> DeformableDETR:
    """The network, with its weights where they come from a file; a resumed run brings its own."""
    arguments = dict(model, num_classes=len(train_set.categories))
    if weights is not None or is_resumed:
        # Neither needs the download, but norms and stem are treated as what they are: trained.
        if arguments["freeze_backbone"] is None and _starts_from_weights(model, weights):
            arguments["freeze_backbone"] = "stem"
        arguments["pretrained_backbone"] = False
    detector = DeformableDETR(**arguments)
    if weights is not None and not is_resumed:
        loaded = load_weights(detector, weights, categories=train_set.categories)
        if is_first_process():
            console.show(loaded.render())
    return detector


def _where(device: str, devices: int | None, precision: str) -> dict[str, Any]:
    """Lightning's arguments for the device; under torchrun the numbers that torchrun set."""
    use_cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if use_cuda and not torch.cuda.is_available():
        raise InputError("device cuda: PyTorch sees no GPU here (torch.cuda.is_available() is False); use --device cpu")
    if precision == "fp16" and not use_cuda:
        raise InputError("precision fp16 needs a GPU; on the CPU use 32 or bf16")
    if devices is not None and devices < 1:
        raise InputError(f"devices must be at least 1, got {devices}")
    num_nodes = 1
    if "LOCAL_WORLD_SIZE" in os.environ and "WORLD_SIZE" in os.environ:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    devices = devices or (torch.cuda.device_count() if use_cuda else 1)
    strategy = "ddp" if devices * num_nodes > 1 else "auto"
    return {
        "accelerator": "cuda" if use_cuda else "cpu",
        "devices": devices,
        "num_nodes": num_nodes,
        "strategy": strategy,
    }


def _quiet_lightning() -> None:
    """What Lightning says that does not apply here: the folder, the workers and the logger are chosen by ddetr."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (
        "Checkpoint directory .* exists and is not empty",
        "The '.*_dataloader' does not have many workers",
        "Grad strides do not match bucket view strides",  # of 1 x 1 convolutions, whose channels-last strides are any
        r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning's own use of PyTorch
    ):
        warnings.filterwarnings("ignore", message)

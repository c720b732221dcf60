"""`train()`: a data set in, a run folder with a detector out."""

import inspect
import json
import logging
import math
import os
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from ddetr import console
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import PAPER_BATCH_SIZE, BatchSize, OptimConfig, resolve_batch_sizes
from ddetr.engine.freeze import freeze_parameters
from ddetr.engine.optimizer import describe_groups, parameter_groups
from ddetr.engine.run_folder import CONFIG_FILE, RESUME_FILE, RunFolder
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.models.criterion import LossWeights
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.runtime.device import choose_device
from ddetr.runtime.distributed import is_first_process
from ddetr.runtime.precision import PRECISIONS, numerics
from ddetr.wording import did_you_mean

if TYPE_CHECKING:
    from ddetr.engine.loading.datamodule import DetectionData
    from ddetr.engine.module import DetectionModule
    from ddetr.evaluation.metrics import Metrics

logger = logging.getLogger(__name__)

ENOUGH_IMAGES = 10_000  # to learn photographs from nothing; below it, trained weights decide the outcome

# What training starts from where nothing else is said: the strongest published variant, on an ImageNet backbone.
DEFAULT_MODEL = {"pretrained_backbone": True, "with_box_refine": True, "two_stage": True}


@dataclass(frozen=True)
class RunResult:
    """Where a run and its data lie, and the metrics of its last validation."""

    path: Path
    data_path: Path
    image_example: Path
    metrics: "Metrics"


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
    patience: int | None = None,
    min_delta: float = 0.0,
    output: str | None = None,
    weights: str | None = None,
    resume: str | None = None,
    seed: int = 42,
    precision: Literal["32", "bf16", "fp16"] = "32",
    activation_checkpointing: bool = False,
    compile: bool = False,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    devices: int | None = None,
    checkpoint_every: int | None = None,
    deterministic: bool = False,
    tf32: bool = False,
    max_detections: int = 100,
    log_every: int = 10,
    num_pictures: int = 12,
    loggers: list[Literal["tensorboard", "wandb", "mlflow"]] | None = None,
    max_bad_steps: int = 10,
    preflight: bool = True,
    preflight_only: bool = False,
) -> RunResult | None:
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
        patience: validations without a better AP after which the run ends; by default it runs to its last epoch.
        min_delta: by how much an AP (0 to 1) must exceed the best one to be better.
        output: run folder; by default runs/ and the name of the data set, numbered.
        weights: checkpoint to start from (ours, official, transformers, ...), unlike resume with a new schedule.
        resume: a run folder or its last.ckpt: continue that run exactly. Alone ("last") the run in output, else the newest
            of the data set. "auto": the same where there is one, otherwise a new run, as a job that is started anew
            after each failure wants it.
        seed: decides initial weights, order and augmentation.
        precision: "32", or "bf16" or "fp16" mixed with 32: sampling locations, position encoding, matching and losses are
            float32 in all of them.
        activation_checkpointing: compute the layers of encoder and decoder twice instead of keeping what they computed:
            less memory, more time, the same gradients.
        compile: torch.compile the model, for a few padded shapes; the first steps of each take minutes.
        device: "auto" takes CUDA where it is available.
        devices: processes; by default all GPUs, or one on the CPU; under torchrun its number.
        checkpoint_every: steps between saves of last.ckpt, which --resume continues from; by default every ten minutes. An
            epoch's end and a stop signal (SIGTERM, SIGUSR1) save in any case.
        deterministic: only algorithms whose results have the same bits in every run; slower on GPUs.
        tf32: on GPUs, float32 products with 10 instead of 23 bits behind the point: faster, less exact.
        max_detections: detections an image that the evaluation counts.
        log_every: steps between rows of train.csv.
        num_pictures: validation images that are drawn at the end, truth beside prediction.
        loggers: what follows the run beside its tables; by default TensorBoard, which reads the run folder.
        max_bad_steps: steps of the run that may be skipped, and recorded in blackbox/, since their loss or gradient is not
            finite; one more, or three in a row, stop it.
        preflight: first try data, evaluation and one batch for about a minute, and stop where one of them cannot work; a
            resumed run has had it.
        preflight_only: stop after that and return None.

    Raises:
        InputError: settings, data or weights that cannot work, said before the first step.
    """
    # Here, since they take seconds, and the command line needs the signature alone for its help and its mistakes.
    import lightning.pytorch as pl
    from lightning.pytorch.plugins import MixedPrecision

    from ddetr.checkpoint import Checkpoint, save_checkpoint
    from ddetr.datasets import audit
    from ddetr.datasets.splits import load_splits
    from ddetr.datasets.transforms import PAPER_MAX_SIZE, scaled
    from ddetr.engine.batch_size import MemoryPlan
    from ddetr.engine.blackbox.guard import StepGuard
    from ddetr.engine.callbacks import Publish, Watch
    from ddetr.engine.compile import DEFAULT_SHAPES, CompiledForward, check_compiler
    from ddetr.engine.detector import build_detector, starts_from_weights
    from ddetr.engine.early_stopping import EarlyStopping
    from ddetr.engine.ema import WeightAverage
    from ddetr.engine.fit import fit, quiet_lightning
    from ddetr.engine.loading.data_wait import DataWait
    from ddetr.engine.loading.datamodule import DetectionData
    from ddetr.engine.loggers import Loggers, chosen_loggers
    from ddetr.engine.module import DetectionModule
    from ddetr.engine.run_report import Report, finish, last_word
    from ddetr.engine.saving import SaveState, StateFiles
    from ddetr.evaluation.evaluator import CocoEvaluator
    from ddetr.evaluation.metrics import Metrics
    from ddetr.runtime.allocator import use_expandable_segments
    from ddetr.runtime.precision import onednn_matmuls

    if compile and data.padded_shapes is None:
        data = replace(data, padded_shapes=DEFAULT_SHAPES)
    config = {
        "data": asdict(data),
        "model": _complete(model or {}),
        "loss": asdict(loss),
        "optim": asdict(optim),
        "epochs": epochs,
        "batch_size": batch_size,
        "device_batch_size": device_batch_size,
        "val_every": val_every,
        "patience": patience,
        "min_delta": min_delta,
        "weights": weights,
        "seed": seed,
        "precision": precision,
        "deterministic": deterministic,
        "tf32": tf32,
        "activation_checkpointing": activation_checkpointing,
        "compile": compile,
        "max_detections": max_detections,
        "max_bad_steps": max_bad_steps,
        "loggers": loggers,
    }
    for name in ("epochs", "val_every", "log_every", "checkpoint_every"):
        if (value := locals()[name]) is not None and value < 1:
            raise InputError(f"{name} must be at least 1, got {value}")
    if max_bad_steps < 0:
        raise InputError(f"max_bad_steps must be at least 0, got {max_bad_steps}")
    if patience is not None and patience < 1:
        raise InputError(f"patience must be at least 1 validation, got {patience}")
    if not min_delta >= 0:
        raise InputError(f"min_delta must be at least 0, got {min_delta}")
    if not 0 <= seed < 2**32:
        raise InputError(f"seed must lie in 0 to 2^32 - 1, got {seed}")
    logger_names = chosen_loggers(loggers)
    where = _where(device, devices, precision)
    if compile:
        check_compiler(where["accelerator"])
    if where["accelerator"] == "cuda":
        use_expandable_segments()
    run, resume_file = RunFolder.choose(output, resume, Path(data.path).resolve().name)
    batch_size, device_batch_size = resolve_batch_sizes(
        batch_size, device_batch_size, None if resume_file is None else run.path / CONFIG_FILE
    )
    config |= {"batch_size": batch_size, "device_batch_size": device_batch_size}
    if resume_file is not None:
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
    detector = build_detector(config["model"], train_set, weights, is_resumed=resume_file is not None)
    freeze_parameters(detector, optim.freeze)
    detector.transformer.set_activation_checkpointing(activation_checkpointing)
    compiled = None
    if shapes := datamodule.shapes:
        compiled = CompiledForward(detector, shapes) if compile else None
        if is_first_process():
            listed = ", ".join(f"{h} x {w}" for h, w in shapes)
            logger.info("batches are padded to %d shapes: %s", len(shapes), listed)
    total_steps = datamodule.steps_per_epoch * epochs
    guard = StepGuard(
        run.path,
        max_bad_steps=max_bad_steps,
        config=config,
        annotations=train_set,
        last_checkpoint=run.path / RESUME_FILE,
    )
    module = DetectionModule(
        detector,
        build_criterion(detector, loss),
        optim,
        CocoEvaluator(val_set, max_detections),
        backbone_pretrained=starts_from_weights(config["model"], weights),
        steps_per_epoch=datamodule.steps_per_epoch,
        total_steps=total_steps,
        seed=seed,
        compiled=compiled,
        guard=guard,
    )
    if (preflight or preflight_only) and resume_file is None and is_first_process():
        _preflight(
            run, module, datamodule, from_nothing=weights is None, precision=precision, device=where["accelerator"]
        )
    if preflight_only:
        return None
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

    data_wait, following = DataWait(), Loggers(logger_names if is_first_process() else [], run, config)
    publisher = Publish(run, publish, following.send)

    def settle(size: int) -> None:
        if is_first_process():
            run.write_yaml(CONFIG_FILE, config | {"device_batch_size": size})

    memory_plan = MemoryPlan(
        datamodule.largest_hw,
        num_objects=max((len(record.labels) for record in train_set.images), default=1),
        precision=precision,
        optimizer_states=1 if optim.sgd else 2,
        copies=1 if optim.ema_decay else 0,
        settle=None if is_settled else settle,
    )
    with warnings.catch_warnings():
        quiet_lightning()
        plugins: list[Any] = [StateFiles(run)]
        if precision == "fp16" and where["accelerator"] == "cpu":  # Lightning by itself takes bfloat16 there
            plugins.append(MixedPrecision("16-mixed", "cpu"))
        trainer = pl.Trainer(
            max_epochs=epochs,
            check_val_every_n_epoch=min(val_every, epochs),
            precision=None if len(plugins) > 1 else PRECISIONS[precision].lightning,
            num_sanity_val_steps=0,
            logger=False,  # ours are in `following`, where they can do no harm
            profiler=data_wait,
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(run.path),
            callbacks=[
                following,
                memory_plan,
                guard,
                Watch(
                    run,
                    batch_size=batch_size,
                    total_steps=total_steps,
                    log_every=log_every,
                    data_wait=data_wait,
                    send=following.send,
                ),
                publisher,
                Report(run, publisher),
                *([EarlyStopping(patience, min_delta)] if patience else []),
                # after Publish, which is to see the averaged weights
                *([WeightAverage(optim.ema_decay)] if optim.ema_decay else []),
                SaveState(run, every=checkpoint_every),
            ],
            plugins=plugins,
            enable_checkpointing=False,
            **where,
        )
        with onednn_matmuls(), numerics(deterministic=deterministic, tf32=tf32), last_word(run):
            fit(trainer, module, datamodule, run, resume_file)
    if trainer.is_global_zero:
        finish(run, num_pictures)
        run.check_written()
    # Only a run that was complete before it was resumed has had no validation now.
    metrics = module.metrics or Metrics.from_dict(json.loads((run.path / "metrics.json").read_text())["last"])
    return RunResult(run.path, Path(data.path), val_set.images[0].path, metrics)


def _preflight(
    run: RunFolder,
    module: "DetectionModule",
    datamodule: "DetectionData",
    *,
    from_nothing: bool,
    precision: str,
    device: str,
) -> None:
    """Before the folder holds a run, so that the same command works once the set-up is mended. Of several processes the
    first alone comes here: the others wait for it where the process group is made, and end with it."""
    from ddetr.engine.preflight.run import run_preflight

    autocast = PRECISIONS[precision].autocast
    with console.waiting("preflight"):
        found = run_preflight(module, datamodule, from_nothing=from_nothing, autocast=autocast, device=device)
    console.show(found.render())
    make_folder(run.path, "--output")
    run.write_json("preflight.json", found.to_dict())
    if found.failed:
        raise InputError(found.refusal())


def _complete(model: dict[str, Any]) -> dict[str, Any]:
    """All arguments of the network but the number of classes, so that the run folder does not depend on defaults."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(DeformableDETR).parameters.items()}
    del defaults["num_classes"]
    for name in model:
        if name not in defaults:
            why = ": it comes from the data" if name == "num_classes" else did_you_mean(name, defaults)
            raise InputError(f"model: {name!r} is no setting that can be made{why}")
    return defaults | DEFAULT_MODEL | model


def _where(device: str, devices: int | None, precision: str) -> dict[str, Any]:
    """Lightning's arguments for the device; under torchrun the numbers that torchrun set."""
    use_cuda = choose_device(device).type == "cuda"
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

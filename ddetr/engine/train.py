"""`train()`: a data set in, a run folder with a detector out. Prepare, build, fit."""

import logging
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from ddetr import console
from ddetr.checkpoint import Checkpoint, load_weights
from ddetr.datasets import Annotations
from ddetr.datasets.augment import Augmentation, describe
from ddetr.datasets.config import DataSource
from ddetr.datasets.splits import HELD_BACK_FILE, image_names, read_held_back
from ddetr.datasets.transforms import PAPER_MAX_SIZE, scaled
from ddetr.engine.batch_size import MemoryPlan
from ddetr.engine.blackbox.guard import StepGuard
from ddetr.engine.callbacks import Clock, Publish, Watch
from ddetr.engine.compile import CompiledForward
from ddetr.engine.config import TrainConfig
from ddetr.engine.early_stopping import EarlyStopping
from ddetr.engine.ema import WeightAverage
from ddetr.engine.fit import Trainer, fit, quiet_lightning
from ddetr.engine.freeze import freeze_parameters
from ddetr.engine.loading.data_wait import DataWait
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.loggers import Loggers
from ddetr.engine.module import DetectionModule
from ddetr.engine.optimizer import describe_groups, parameter_groups
from ddetr.engine.preflight.run import run_preflight
from ddetr.engine.prepare import Prepared, prepare
from ddetr.engine.run.data import DATA_FILE
from ddetr.engine.run.folder import PREFLIGHT_FILE
from ddetr.engine.run.states import RESUME_FILE
from ddetr.engine.run_report import Report, finish, last_word
from ddetr.engine.saving import SaveState, StateFiles
from ddetr.engine.step import training_forward
from ddetr.errors import InputError
from ddetr.evaluation import CocoEvaluator, Metrics
from ddetr.files import existing, make_folder
from ddetr.models.auxiliary import attach_auxiliary
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.runtime.distributed import is_first_process
from ddetr.runtime.precision import PRECISIONS, numerics, onednn_matmuls
from ddetr.settings import kept
from ddetr.weight_files.sources import fingerprint, is_public

logger = logging.getLogger(__name__)

ENOUGH_IMAGES = 10_000  # to learn photographs from nothing; below it, trained weights decide the outcome

# Lightning calls the callbacks of a hook one after the other. First come those that what follows reads from or adds to:
CALLBACK_ORDER = (
    Clock,  # stops before anything is done for a validation
    Loggers,  # open before the first row is sent to them
    MemoryPlan,  # settles the size of micro-batches before anything is computed
    StepGuard,
    Watch,
    Publish,  # writes what Report reads, and sees the averaged weights, which WeightAverage takes back after it
    Report,
    EarlyStopping,
    WeightAverage,
    SaveState,  # last: a state holds what all the others have become
)


@dataclass(frozen=True)
class RunResult:
    """Where a run and its data lie, and the metrics of its last validation."""

    path: Path
    data_path: Path
    image_example: Path
    metrics: Metrics
    data_options: Sequence[str] = ()  # of `ddetr eval`, to measure on the same images


@dataclass(frozen=True)
class Built:
    """What trains."""

    data: DetectionData
    data_wait: DataWait
    module: DetectionModule
    guard: StepGuard
    num_steps: int  # of the whole run
    clock: Clock | None = None


def train(config: TrainConfig, clock: Clock | None = None) -> RunResult:
    """Train a detector.

    Args:
        config: settings of the run.
        clock: where the seconds of training are counted.

    Raises:
        InputError: settings, data or weights that cannot work, said before the first step.
    """
    prepared = prepare(config)
    built = replace(build(prepared), clock=clock)
    if not is_first_process():
        return _run(prepared, built)
    with prepared.run.claimed(is_new=config.resume is None):
        prepared.run.check_nobody_came()
        if prepared.config.preflight and prepared.resume_file is None:
            _try(prepared, built, keep=True)
        _begin(prepared, built)
        return _run(prepared, built)


def _run(prepared: Prepared, built: Built) -> RunResult:
    config, run = prepared.config, prepared.run
    trainer = _trainer(prepared, built)
    with (
        warnings.catch_warnings(),
        onednn_matmuls(),
        numerics(deterministic=config.deterministic, tf32=config.tf32),
        last_word(run),
    ):
        quiet_lightning()
        fit(trainer, built.module, built.data, run, prepared.resume_file)
    if trainer.is_global_zero:
        finish(run, config.num_pictures)
        if run.unwritten:
            _write_data(prepared)
        run.check_written()
    # Only a run that was complete before it was resumed has had no validation now.
    metrics = built.module.metrics or run.last_metrics()
    example = prepared.val_set.images[0].path
    return RunResult(run.path, Path(config.data.path), example, metrics, _data_options(config.data))


def _data_options(data: DataSource) -> list[str]:
    given = {field.name: getattr(data, field.name) for field in fields(DataSource) if field.name != "path"}
    changed = [field.name for field in fields(DataSource) if given.get(field.name) not in (None, field.default)]
    return [word for name in changed for word in (f"--data.{name}", str(given[name]))]


def preflight(config: TrainConfig) -> None:
    """Try the set-up of a run on a few images, and train nothing. Only where a folder is named it leaves something.

    Raises:
        InputError: the run could not work.
    """
    if config.resume is not None:
        raise InputError("preflight tries the set-up of a run that has not begun: leave --resume out")
    prepared = prepare(config)
    if is_first_process():
        _try(prepared, build(prepared), keep=config.output is not None)


def build(prepared: Prepared) -> Built:
    """Loaders, the network with the weights that it starts from, and what takes a step."""
    config, run, train_set = prepared.config, prepared.run, prepared.train_set
    data_wait = DataWait()
    evaluator = CocoEvaluator(prepared.val_set, config.max_detections)
    data = DetectionData(
        train_set,
        prepared.val_set,
        config.data,
        batch_size=config.batch_size,
        device_batch_size=1 if config.device_batch_size == "auto" else config.device_batch_size,
        seed=config.seed,
        epochs=config.epochs,
        region=data_wait.region,
        leave_out=evaluator.leave_out,
    )
    pl.seed_everything(config.seed, verbose=False)
    detector = build_detector(config, train_set, prepared.weights, is_resumed=prepared.resume_file is not None)
    freeze_parameters(detector, config.optim.freeze)
    detector.transformer.set_activation_checkpointing(config.activation_checkpointing)
    if data.shapes and is_first_process():
        listed = ", ".join(f"{h} x {w}" for h, w in data.shapes)
        logger.info("batches are padded to %d shapes: %s", len(data.shapes), listed)
    guard = StepGuard(
        run.path,
        max_bad_steps=config.max_bad_steps,
        config=kept(config),
        annotations=train_set,
        last_checkpoint=run.path / RESUME_FILE,
    )
    num_steps = data.steps_per_epoch * config.epochs
    module = DetectionModule(
        detector,
        build_criterion(detector, config.loss),
        config.optim,
        evaluator,
        backbone_pretrained=config.starts_from_weights,
        steps_per_epoch=data.steps_per_epoch,
        total_steps=num_steps,
        seed=config.seed,
        compiled=CompiledForward(training_forward(detector), data.shapes) if config.compile else None,
        guard=guard,
    )
    return Built(data, data_wait, module, guard, num_steps)


def build_detector(
    config: TrainConfig, train_set: Annotations, weights: Path | None, *, is_resumed: bool
) -> DeformableDETR:
    """The network, with its weights where they come from a file; a resumed run brings its own."""
    arguments = dict(config.model, num_classes=len(train_set.categories))
    if config.weights is not None or is_resumed:
        # Neither needs the download, but norms and stem are treated as what they are: trained.
        if arguments["freeze_backbone"] is None and config.starts_from_weights:
            arguments["freeze_backbone"] = "stem"
        arguments["pretrained_backbone"] = False
    detector = DeformableDETR(**arguments)
    if weights is not None:
        loaded = load_weights(detector, weights, categories=train_set.categories)
        if is_first_process():
            console.show(loaded.render(config.verbose))
    attach_auxiliary(detector, config.auxiliary)
    return detector


def _try(prepared: Prepared, built: Built, *, keep: bool) -> None:
    """Before the folder holds a run, so that the same command works once the set-up is repaired. Of several processes
    the first alone comes here: the others wait for it where the process group is made, and end with it.

    keep: whether the folder gets what was found.
    """
    config, run = prepared.config, prepared.run
    with console.waiting("preflight"):
        found = run_preflight(
            built.module,
            built.data,
            from_nothing=config.weights is None,
            autocast=PRECISIONS[config.precision].autocast,
            device=prepared.where["accelerator"],
        )
    console.show(found.render())
    if keep:
        make_folder(run.path, "--output")
        with run.going_on_without(PREFLIGHT_FILE):
            run.write_json(PREFLIGHT_FILE, found.to_dict())
    if found.failed:
        raise InputError(found.refusal())


def _begin(prepared: Prepared, built: Built) -> None:
    """The folder with the settings, and what is said of the run before it starts."""
    config, run, module, num_images = prepared.config, prepared.run, built.module, len(prepared.train_set.images)
    before = run.settings().get("epochs")
    run.start(config, prepared.resume_file)
    _write_data(prepared)
    if prepared.resume_file is not None and before != config.epochs:
        logger.info("the run is extended from %s to %d epochs%s", before, config.epochs, _said_of_extension(config))
    groups = parameter_groups(module.model, config.optim, backbone_pretrained=module.backbone_pretrained)
    for line in describe_groups(groups, module.model):
        logger.info(line)
    logger.info(
        "%d images, %d steps of %d images per epoch, %d epochs, into %s",
        num_images, built.data.steps_per_epoch, config.batch_size, config.epochs, run.path,
    )  # fmt: skip
    logger.info(describe(config.data, config.epochs))
    if not module.backbone_pretrained and num_images < ENOUGH_IMAGES:
        logger.info(
            "random initial weights: photographs need %s images or more to learn from nothing, here are %s; otherwise "
            "give --weights FILE or --model.pretrained_backbone true",
            f"{ENOUGH_IMAGES:,}", f"{num_images:,}",
        )  # fmt: skip


def _write_data(prepared: Prepared) -> None:
    """What the run remembers of its data."""
    with prepared.run.going_on_without("audit.json"):
        prepared.run.write_json("audit.json", prepared.audit.to_dict())
    with prepared.run.going_on_without(DATA_FILE):
        prepared.traits.save(prepared.run.path)
    data = prepared.config.data
    if data.val_fraction is not None:
        with prepared.run.going_on_without(HELD_BACK_FILE):
            before = read_held_back(prepared.run.path) or []  # one that is gone may come back, and is no training image
            names = dict.fromkeys([*before, *image_names(prepared.val_set, existing(data.path))])
            prepared.run.write_json(HELD_BACK_FILE, list(names))


def _said_of_extension(config: TrainConfig) -> str:
    """How it differs from a run that was planned so."""
    said = _said_of_schedule(config)
    if Augmentation.of(config.data) is not None and config.data.augmentation_off_epochs:
        said += (
            "; strong augmentation, which was off in the epochs that were to be the last, is on again until "
            f"{config.data.augmentation_off_epochs} epochs before the new end"
        )
    return said


def _said_of_schedule(config: TrainConfig) -> str:
    if config.optim.schedule == "step":
        return ", with the rates that it would have had if they had been planned"
    return (
        f": from here on the rates fall to a hundredth over {config.epochs} epochs as a cosine, so they jump up first; "
        "a run that was planned so has other rates from its beginning"
    )


def _trainer(prepared: Prepared, built: Built) -> pl.Trainer:
    config, where = prepared.config, prepared.where
    plugins: list[Any] = [StateFiles(prepared.run)]
    if config.precision == "fp16" and where["accelerator"] == "cpu":  # Lightning by itself takes bfloat16 there
        plugins.append(MixedPrecision("16-mixed", "cpu"))
    with warnings.catch_warnings():
        quiet_lightning()
        return Trainer(
            max_epochs=config.epochs,
            check_val_every_n_epoch=min(config.val_every, config.epochs),
            precision=None if len(plugins) > 1 else PRECISIONS[config.precision].lightning,
            num_sanity_val_steps=0,
            logger=False,  # ours are among the callbacks, where they can do no harm
            enable_progress_bar=False,
            enable_model_summary=False,
            use_distributed_sampler=False,
            default_root_dir=str(prepared.run.path),
            callbacks=callbacks(prepared, built),
            plugins=plugins,
            enable_checkpointing=False,
            **where,
        )


def callbacks(prepared: Prepared, built: Built) -> list[Callback]:
    """What watches a run, in `CALLBACK_ORDER`."""
    config, run, optim = prepared.config, prepared.run, prepared.config.optim
    following = Loggers(prepared.loggers if is_first_process() else [], run, kept(config))
    publisher = Publish(run, partial(_checkpoint, prepared), following.send, forget_best=prepared.other_val)

    def settle(size: int) -> None:
        if is_first_process():
            run.write_settings(kept(config) | {"device_batch_size": size})

    memory_plan = MemoryPlan(
        built.data.largest_hw,
        num_objects=built.data.train_set.most_objects,
        precision=config.precision,
        optimizer_states=1 if optim.sgd else 2,
        copies=1 if optim.ema_decay else 0,
        settle=settle if config.device_batch_size == "auto" else None,
    )
    watch = Watch(
        run,
        batch_size=config.batch_size,
        total_steps=built.num_steps,
        log_every=config.log_every,
        data_wait=built.data_wait,
        send=following.send,
    )
    saving = SaveState(run, built.module.requests, every=config.checkpoint_every)
    chosen: list[Callback] = [
        following,
        memory_plan,
        built.guard,
        watch,
        publisher,
        _report(prepared, publisher),
        saving,
    ]
    if built.clock is not None:
        chosen.append(built.clock)
    if config.patience:
        chosen.append(EarlyStopping(config.patience, config.min_delta, forget_best=prepared.other_val))
    if optim.ema_decay:
        chosen.append(WeightAverage(optim.ema_decay))
    return sorted(chosen, key=lambda callback: CALLBACK_ORDER.index(type(callback)))


def _report(prepared: Prepared, publisher: Publish) -> Report:
    weights = None
    if prepared.weights is not None and is_first_process():
        source = str(prepared.config.weights)
        weights = {"source": source, "is_public": is_public(source), "sha256": fingerprint(prepared.weights)}
    return Report(prepared.run, publisher, weights)


def _checkpoint(prepared: Prepared, module: DetectionModule, metrics: Metrics) -> Checkpoint:
    """What is published after a validation."""
    image_size = prepared.config.data.image_size
    return Checkpoint.of(
        module.model,
        prepared.train_set.categories,
        image_size=image_size,
        max_size=scaled(PAPER_MAX_SIZE, image_size),
        threshold=0.5 if math.isnan(metrics.threshold) else metrics.threshold,
        metrics=metrics.numbers(),
        training={"data": prepared.train_set.name, "step": module.global_step, "epoch": module.current_epoch},
    )

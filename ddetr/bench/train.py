"""`ddetr bench train`: where the time of the engine's own training step goes, and the same step by others."""

import logging
import math
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from ddetr import console
from ddetr.bench import record, step_tables
from ddetr.bench.official import official_step
from ddetr.bench.peak import Peak
from ddetr.bench.sides import reason_of
from ddetr.bench.stopwatch import StopWatch
from ddetr.datasets import Annotations, Category, padded_shapes
from ddetr.datasets.config import DataConfig
from ddetr.datasets.image_files import reading_on_screen
from ddetr.datasets.splits import load_split
from ddetr.engine.compile import CompiledForward, check_compiler
from ddetr.engine.config import TrainConfig
from ddetr.engine.fit import run_steps
from ddetr.engine.loading.datamodule import BatchesInMemory, DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.optimizer import parameter_groups
from ddetr.engine.step import REGIONS, MicroBatch, training_forward
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.files import make_folder
from ddetr.models.auxiliary import attach_auxiliary
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.runtime.allocator import use_expandable_segments
from ddetr.runtime.device import choose_device
from ddetr.runtime.precision import PRECISIONS, numerics
from ddetr.settings import flat, kept

logger = logging.getLogger(__name__)

OURS, OFFICIAL, TRANSFORMERS = "ours", "official", "transformers"
DESCRIPTIONS = {
    OURS: "ddetr's engine: DetectionModule.training_step under Lightning, with the options given",
    OFFICIAL: "a plain reading of the official recipe on our network: grid_sample, a cross-image matching for each "
    "layer, AdamW without fused kernels, float32",
    TRANSFORMERS: "Hugging Face's DeformableDetrForObjectDetection of the same sizes with its own loss and AdamW, at "
    "the precision given",
}
# Settings of a run that change a step and are measured, beside its data, model, loss and optimiser.
_SETTINGS = (
    "batch_size",
    "device_batch_size",
    "precision",
    "activation_checkpointing",
    "compile",
    "deterministic",
    "tf32",
)
# Of what changes a step, what this measurement leaves out.
_NOT_MEASURED = ("optim.ema_decay",)


@dataclass
class Plan:
    """What is measured: the settings of a run, and what its batches are made from."""

    config: TrainConfig
    model: dict[str, Any]
    device: torch.device
    train_set: Annotations = field(repr=False)
    batches: list[list[MicroBatch]] | None = field(default=None, repr=False)  # instead of a loader's

    @property
    def is_pretrained(self) -> bool:
        return self.model.get("freeze_backbone") == "stem"

    @property
    def categories(self) -> tuple[Category, ...]:
        return self.train_set.categories

    def detector(self) -> DeformableDETR:
        torch.manual_seed(0)
        return DeformableDETR(**self.model | {"num_classes": len(self.categories)})


def bench_train(
    config: TrainConfig,
    *,
    steps: int = 10,
    warmup: int = 2,
    sides: str = "ours,official,transformers",
    compared_batches: int = 2,
    synthetic: str | None = None,
    output: str | None = None,
    command: str = "",
) -> None:
    """Time training steps.

    Args:
        config: the run whose steps are timed; its sizes of batches must be numbers. What decides nothing about a step
            is not looked at.
        steps: measured steps.
        warmup: steps before them.
        sides: "ours" alone, or with "official" and "transformers" on the same batches.
        compared_batches: batches that the sides take turns with.
        synthetic: HEIGHTxWIDTH of random images in place of data, which then costs no time.
        output: folder for train.json and train.md.
        command: how this was called.

    Raises:
        InputError: no data, or settings that can't be measured.
    """
    chosen = _checked(config, sides, steps=steps, warmup=warmup, compared_batches=compared_batches)
    where = choose_device(config.device)
    if config.compile:
        check_compiler(where.type)
    if where.type == "cuda":
        use_expandable_segments()
    folder = make_folder(Path(output), "--output") if output else None
    size_hw = _size(synthetic)
    train_set = _annotations(config, synthetic)
    network = dict(config.model)
    if network["pretrained_backbone"]:  # nothing is downloaded, but norms and stem are treated as if it had been
        network |= {"pretrained_backbone": False, "freeze_backbone": network["freeze_backbone"] or "stem"}
    plan = Plan(config, network, where, train_set)
    if size_hw:
        plan.batches = [random_batch(plan, size_hw, seed) for seed in range(compared_batches)]
    report: dict[str, Any] = {
        "machine": record.machine(where),
        "command": command or "ddetr.bench.train.bench_train",
        "device": where.type,
        "threads": torch.get_num_threads() if where.type == "cpu" else None,
        "settings": {
            "images": f"random, {synthetic}" if synthetic else f"{train_set.name}, image_size {config.data.image_size}",
            **{name: getattr(config, name) for name in _SETTINGS},
            "model": network,
        },
        "steps": steps,
        "warmup": warmup,
        "compared_batches": compared_batches,
        "not_measured": _not_measured(config),
        "descriptions": {name: DESCRIPTIONS[name] for name in chosen},
    }
    for name, value in report["not_measured"].items():
        logger.warning("%s %s is an option of training that this measurement leaves out", name, value)
    console.show("\n".join(step_tables.header(report)))
    with console.waiting("the engine's steps"):
        report["engine"], batches = engine(plan, steps, warmup, keep=compared_batches)
    console.show("\n" + step_tables.of_engine(report))
    console.show(step_tables.split(report))
    plan.batches = plan.batches or batches
    report["sides"], report["left_out"] = compare(plan, chosen, steps, warmup) if chosen != [OURS] else ([], [])
    if report["sides"]:
        console.show(f"\nthe same step on {compared_batches} batches that are in memory")
        console.show(step_tables.sides(report))
    for line in step_tables.left_out(report):
        console.show(line)
    if folder:
        record.save(folder, "train", report, step_tables.markdown(report))


def _checked(config: TrainConfig, sides: str, **counts: int) -> list[str]:
    """The names of the sides, after a look at what was given."""
    for name, number in counts.items():
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")
    chosen = [name.strip() for name in sides.split(",")]
    if unknown := set(chosen) - set(DESCRIPTIONS):
        raise InputError(f"--sides: expected some of {', '.join(DESCRIPTIONS)}, got {', '.join(sorted(unknown))}")
    if "auto" in (config.batch_size, config.device_batch_size):
        raise InputError(
            "bench train measures sizes that are given: --batch_size and --device_batch_size are numbers here"
        )
    return chosen


def engine(plan: Plan, steps: int, warmup: int, keep: int = 0) -> tuple[dict[str, Any], list[list[MicroBatch]]]:
    """Measured steps of the engine: milliseconds by region (medians), images/s over all of them, peak memory; and the
    `keep` batches that the loader gives."""
    model = plan.detector()
    attach_auxiliary(model, plan.config.auxiliary)
    model.transformer.set_activation_checkpointing(plan.config.activation_checkpointing)
    compiled = None
    if plan.config.compile:
        shapes = padded_shapes(plan.config.data.image_size, plan.config.data.padded_shapes)
        if plan.batches is not None:
            shapes = list(dict.fromkeys(tuple(images.shape[-2:]) for batch in plan.batches for images, _, _ in batch))
        compiled = CompiledForward(training_forward(model), shapes)
    peak, watch = Peak(plan.device), StopWatch(plan.device)
    last_loss = math.nan

    def after_step(number: int, outputs: dict[str, Any]) -> None:
        nonlocal last_loss
        watch.end_step()
        if number == warmup:
            peak.start()
        elif number == warmup + steps:
            last_loss = float(outputs["loss"])

    module = DetectionModule(
        model,
        build_criterion(model, plan.config.loss, region=watch.region),
        plan.config.optim,
        CocoEvaluator(plan.train_set),
        backbone_pretrained=plan.is_pretrained,
        steps_per_epoch=max(1, len(plan.train_set.images) // plan.config.batch_size),
        total_steps=steps + warmup,
        seed=0,
        compiled=compiled,
        region=watch.region,
    )
    if plan.batches is None:
        sizes = {"batch_size": plan.config.batch_size, "device_batch_size": plan.config.device_batch_size}
        data = DetectionData(plan.train_set, plan.train_set, plan.config.data, **sizes, seed=0, region=watch.region)
    else:
        data = BatchesInMemory(
            [plan.batches[index % len(plan.batches)] for index in range(steps + warmup)], watch.region
        )
    precision = PRECISIONS[plan.config.precision].lightning
    with numerics(deterministic=plan.config.deterministic, tf32=plan.config.tf32):
        run_steps(
            module,
            data,
            steps=warmup + steps,
            precision=precision,
            device=plan.device.type,
            after_step=after_step,
        )
    rows = watch.steps()[warmup:]
    total = [sum(row.values()) for row in rows]
    found = {
        "ms": {name: statistics.median(row[name] for row in rows) for name in REGIONS},
        "share": {name: sum(row[name] for row in rows) / sum(total) for name in REGIONS},
        "step_ms": statistics.median(total),
        "steps_ms": total,
        "images_per_s": 1000 * plan.config.batch_size * len(rows) / sum(total),
        "peak_bytes": peak.bytes(),
        "last_loss": last_loss,
    }
    return found, list(islice(data.train_dataloader(), keep))


def compare(plan: Plan, chosen: list[str], steps: int, warmup: int) -> tuple[list[dict], list[dict]]:
    """Rows of the sides on the same batches, which are there before the clock starts; and who is left out, and why."""
    rows, left_out = [], []
    for name in (side for side in DESCRIPTIONS if side in chosen):
        try:
            with console.waiting(f"{name}'s steps"):
                if name == OURS:
                    found, _ = engine(plan, steps, warmup)
                    row = {name: found[name] for name in ("step_ms", "steps_ms", "peak_bytes", "last_loss")}
                else:
                    row = _loop(_SIDES[name](plan), plan, steps, warmup)
        except Exception as error:  # others' packages fail in every way there is
            if name == OURS:
                raise
            logger.debug("%s", name, exc_info=error)
            left_out.append({"side": name, "reason": reason_of(error)})
            continue
        rows.append({"side": name, "images_per_s": 1000 * plan.config.batch_size / row["step_ms"], **row})
    if rows and rows[0]["side"] == OURS:
        for row in rows:
            row["ratio"] = row["step_ms"] / rows[0]["step_ms"]  # how many times as long as ours
    return rows, left_out


def _loop(step: Callable[[list[MicroBatch]], float], plan: Plan, steps: int, warmup: int) -> dict[str, Any]:
    peak, times, loss = Peak(plan.device), [], 0.0
    wait = torch.cuda.synchronize if plan.device.type == "cuda" else lambda: None
    for index in range(warmup + steps):
        if index == warmup:
            peak.start()
        wait()
        start = time.perf_counter()
        loss = step(plan.batches[index % len(plan.batches)])
        wait()
        times.append(1000 * (time.perf_counter() - start))
    measured = times[warmup:]
    return {"step_ms": statistics.median(measured), "steps_ms": measured, "peak_bytes": peak.bytes(), "last_loss": loss}


def _official(plan: Plan) -> Callable[[list[MicroBatch]], float]:
    model = plan.detector().to(plan.device).train()
    groups = parameter_groups(model, plan.config.optim, backbone_pretrained=plan.is_pretrained)
    return official_step(model, plan.config.loss, groups, plan.config.optim, plan.device)


def _transformers(plan: Plan) -> Callable[[list[MicroBatch]], float]:
    from ddetr.bench.huggingface import transformers_step

    return transformers_step(plan.detector(), plan.config.optim, plan.config.precision, plan.device)


_SIDES: dict[str, Callable[[Plan], Callable[[list[MicroBatch]], float]]] = {
    OFFICIAL: _official,
    TRANSFORMERS: _transformers,
}


def _annotations(config: TrainConfig, synthetic: str | None) -> Annotations:
    """What the batches are made from."""
    if synthetic is None:
        if not config.data.path:
            raise InputError("bench train needs --data PATH, or --synthetic HEIGHTxWIDTH")
        with reading_on_screen(config.data.path):
            return load_split(config.data, "train")
    return no_images()


def no_images() -> Annotations:
    """A data set of COCO's classes without any image."""
    categories = tuple(Category(number + 1, f"class {number}") for number in range(80))
    return Annotations("synthetic", "coco", categories, [])


def random_batch(plan: Plan, size_hw: tuple[int, int], seed: int) -> list[MicroBatch]:
    """Random images that fill all but a margin of the batch, with ten objects each."""
    generator = torch.Generator().manual_seed(seed)
    h, w = size_hw
    batch = []
    for start in range(0, plan.config.batch_size, plan.config.device_batch_size):
        n = min(plan.config.device_batch_size, plan.config.batch_size - start)
        images = torch.randint(256, (n, 3, h, w), dtype=torch.uint8, generator=generator)
        mask = torch.zeros(n, h, w, dtype=torch.bool)
        mask[0, :, w - w // 16 :] = True
        targets = [
            {
                "labels": torch.randint(len(plan.categories), (10,), generator=generator),
                "boxes": torch.rand(10, 4, generator=generator) * 0.4 + 0.1,
            }
            for _ in range(n)
        ]
        if plan.device.type == "cuda":
            images, mask = images.pin_memory(), mask.pin_memory()  # as a loader's
        batch.append((images, mask, targets))
    return batch


def _size(synthetic: str | None) -> tuple[int, int] | None:
    if synthetic is None:
        return None
    found = re.fullmatch(r"(\d+)x(\d+)", synthetic)
    if found is None or min(map(int, found.groups())) < 32:
        raise InputError(f"--synthetic: expected HEIGHTxWIDTH in pixels, such as 800x1066, got {synthetic!r}")
    return int(found[1]), int(found[2])


def _not_measured(config: TrainConfig) -> dict[str, Any]:
    """Options of training that are set, that would change a step, and that this measurement knows nothing of."""
    now, usual = flat(kept(config)), flat(kept(TrainConfig(DataConfig(""))))
    return {f"--{name}": now[name] for name in _NOT_MEASURED if now[name] != usual[name]}

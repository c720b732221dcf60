"""Stage 5: the training step of ResNet-50 at 800 x 1066: batches, activation checkpointing, compiled; beside the
official recipe and transformers; where its time goes; its memory beside the estimate that a run prints."""

import gc
import logging
from dataclasses import replace
from typing import Any

import torch

from ddetr.bench.gpu.network import NETWORKS, SMALL
from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.peak import in_words
from ddetr.bench.train import OFFICIAL, TRANSFORMERS, Plan, compare, engine, no_images, random_batch
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import TrainConfig
from ddetr.engine.memory import estimate_memory, readable
from ddetr.models.deformable_detr import build_criterion

_COLUMNS = ("batch", "options", "step ms", "images/s", "peak memory", "estimate", "measured / estimate")
_ROWS: tuple[tuple[int, dict[str, Any], int], ...] = (  # images, options, seconds that are needed for it
    (4, {}, 8),
    (16, {}, 10),
    (4, {"activation_checkpointing": True}, 6),
    (2, {}, 6),
    (8, {}, 8),
    (16, {"activation_checkpointing": True}, 10),
    (4, {"precision": "32", "tf32": True}, 8),
)
_SMALL_ROWS = ((2, {}, 0),)
_COMPILED = (4, {"compile": True}, 50)
_STEPS, _WARMUP = 8, 3


def run(sheet: Sheet, place: Place) -> None:
    """The stage: ours alone, then beside the others, compiled last."""
    logging.getLogger("ddetr").setLevel(logging.WARNING)
    sheet.data |= {"rows": [], "sides": []}
    rows = _SMALL_ROWS if place.small else _ROWS
    for batch, options, seconds in rows[:1]:
        _row(sheet, place, batch, options, seconds, split=True)
    with sheet.part("beside the others", seconds=0 if place.small else 15) as go:
        if go:
            _beside_others(sheet, place, rows[0][0])
    for batch, options, seconds in rows[1:]:
        _row(sheet, place, batch, options, seconds)
    for index in range(min(len(sheet.data["rows"]), 3)):
        with sheet.part(f"estimate of the memory, row {index + 1}", seconds=0 if place.small else 6) as go:
            if go:
                _add_estimate(sheet, place, index)
    if place.on_gpu:
        _row(sheet, place, *_COMPILED)
    else:
        sheet.skip("--compile", "minutes on a CPU; its tests are among the project's own")


def plan_for(place: Place, batch: int, options: dict[str, Any]) -> Plan:
    """Random images of one size, in memory."""
    config = TrainConfig(
        DataConfig(""),
        {"pretrained_backbone": False}
        | NETWORKS["two-stage"]
        | (SMALL if place.small else {"freeze_backbone": "stem"}),
        **{"batch_size": batch, "device_batch_size": batch, "precision": "bf16", "device": place.device.type} | options,
    )
    plan = Plan(config, dict(config.model), place.device, no_images())
    size_hw = (64, 96) if place.small else (800, 1066)
    plan.batches = [random_batch(plan, size_hw, seed) for seed in range(2)]
    return plan


def _row(
    sheet: Sheet, place: Place, batch: int, options: dict[str, Any], seconds: float, *, split: bool = False
) -> None:
    said = ", ".join(f"{name} {str(value).lower()}" for name, value in options.items()) or "bf16"
    with sheet.part(f"batch {batch}, {said}", seconds=seconds) as go:
        if not go:
            return
        plan = plan_for(place, batch, options)
        _empty(place)
        found, _ = engine(plan, *_steps(place))
        row = {"batch": batch, "options": said, "settings": options, "estimate_bytes": None, **found}
        sheet.data["rows"].append(row)
        _show(sheet, place)
        if split:
            parts = [[name, f"{ms:.1f}", f"{100 * found['share'][name]:.0f} %"] for name, ms in found["ms"].items()]
            sheet.table(f"Where the time of a step goes, batch {batch}, {said}", ["part", "ms", "share"], parts)


def _show(sheet: Sheet, place: Place) -> None:
    sheet.table("The engine's step", _COLUMNS, [_cells(row, place) for row in sheet.data["rows"]])


def _empty(place: Place) -> None:
    """A row's peak is its own."""
    gc.collect()
    if place.on_gpu:
        torch.cuda.empty_cache()


def _add_estimate(sheet: Sheet, place: Place, index: int) -> None:
    """What a run would have printed of its memory beforehand, beside what was measured."""
    row = sheet.data["rows"][index]
    row["estimate_bytes"] = estimate = _estimate(plan_for(place, row["batch"], row["settings"]))
    _show(sheet, place)
    if place.on_gpu:
        peak = row["peak_bytes"]
        said = f"measured {readable(peak)}, estimated {readable(estimate)}"
        sheet.check(f"the estimate of memory, batch {row['batch']}, {row['options']}", peak < 1.5 * estimate, said)


def _steps(place: Place) -> tuple[int, int]:
    return (1, 1) if place.small else (_STEPS, _WARMUP)


def _estimate(plan: Plan) -> int:
    model = plan.detector().to(plan.device).train()
    model.transformer.set_activation_checkpointing(plan.config.activation_checkpointing)
    images = plan.batches[0][0][0]
    return estimate_memory(
        model,
        build_criterion(model, plan.config.loss),
        batch=len(images),
        size_hw=tuple(images.shape[-2:]),
        num_objects=10,
        precision=plan.config.precision,
    ).total


def _cells(row: dict[str, Any], place: Place) -> list[str]:
    peak, estimate = row["peak_bytes"], row["estimate_bytes"]
    ratio = (
        f"{peak / estimate:.2f}" if peak and estimate and place.on_gpu else "-"
    )  # the CPU's peak is the whole process's
    step = (f"{row['step_ms']:.1f}", f"{row['images_per_s']:.1f}")
    return [str(row["batch"]), row["options"], *step, in_words(peak), in_words(estimate), ratio]


def _beside_others(sheet: Sheet, place: Place, batch: int) -> None:
    """The official recipe with PyTorch's own choice (TF32 in convolutions alone) and with TF32 in all products;
    transformers at our precision."""
    plan = plan_for(place, batch, {})
    steps = (1, 1) if place.small else (5, 2)
    rows, left_out = compare(plan, ["ours", OFFICIAL, TRANSFORMERS], *steps)
    if place.on_gpu:
        plan.config = replace(plan.config, tf32=True)
        torch.backends.cuda.matmul.allow_tf32 = True
        _empty(place)
        more, reasons = compare(plan, [OFFICIAL], *steps)
        left_out += reasons
        torch.backends.cuda.matmul.allow_tf32 = False
        rows += [row | {"side": "official, TF32 everywhere"} for row in more]
    for row in left_out:
        sheet.skip(row["side"], row["reason"])
    ours = rows[0]["step_ms"]
    sheet.data["sides"] = rows
    columns = ("side", "step ms", "images/s", "times ours", "peak memory")
    cells = [
        [r["side"], f"{r['step_ms']:.1f}", f"{1000 * batch / r['step_ms']:.1f}", f"{r['step_ms'] / ours:.2f}x"]
        + [in_words(r["peak_bytes"])]
        for r in rows
    ]
    sheet.table(f"The same step by others, batch {batch}", columns, cells)

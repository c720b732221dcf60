"""`ddetr bench evaluation`: COCO evaluation by the three libraries, each behind our adapter.

A synthetic set like COCO's validation: crowds, skewed classes, detections near the objects and anywhere. In one process
and interleaved, each library evaluates the same detections; wall time, split into

- gather: `update` with the detections of a batch, as the model gives them
- convert: our flat arrays to the library's own objects
- library: its `evaluate` and `accumulate`
- rest: matching, threshold of the best F1, summary

What the adapter adds is all but `library`. The numbers must agree before any time is shown.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddetr import console
from ddetr.bench import record
from ddetr.datasets.annotations import Annotations, Category, ImageTable
from ddetr.errors import InputError
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.metrics import Metrics
from ddetr.files import make_folder

BASE = "pycocotools"
PHASES = ("gather", "convert", "library", "rest")
BATCH = 16


def make_set(
    images: int, objects: int, classes: int, per_image: int, seed: int
) -> tuple[Annotations, list[dict[str, Tensor]]]:
    """Truth, and `per_image` detections per image: about two near each object, the others anywhere."""
    rng = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, classes + 1)  # as in COCO, some classes have most of the objects
    frequency /= frequency.sum()
    size_hw = np.array([480, 640])
    image_index = np.sort(rng.integers(0, images, objects))
    corners = rng.uniform(0, size_hw[::-1] - 16, (objects, 2))
    sides = np.exp(rng.normal(np.log(50), 1, (objects, 2)))
    boxes_xyxy = np.concatenate([corners, np.minimum(corners + sides.clip(4), size_hw[::-1])], axis=1)
    labels = rng.choice(classes, objects, p=frequency)
    table = ImageTable(
        image_ids=rng.permutation(10 * images)[:images],
        paths=[f"{i}.jpg" for i in range(images)],
        sizes_hw=np.tile(size_hw, (images, 1)),
        image_index=image_index,
        boxes_xyxy=boxes_xyxy,
        labels=labels,
        area=(boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]).prod(axis=1) * rng.uniform(0.5, 1, objects),
        ignore=rng.random(objects) < 0.012,  # COCO's share of crowds
    )
    annotations = Annotations("synthetic", "coco", tuple(Category(i + 1, f"class {i}") for i in range(classes)), table)
    detections = []
    for image in table:
        near = np.repeat(np.arange(len(image.labels)), 2)[:per_image]
        anywhere = per_image - len(near)
        side = (image.boxes_xyxy[:, 2:] - image.boxes_xyxy[:, :2])[near][:, [0, 1, 0, 1]]
        corners = rng.uniform(0, 1, (anywhere, 2, 2)) * size_hw[::-1]
        boxes = np.concatenate(
            [
                image.boxes_xyxy[near] + side * rng.normal(0, 0.08, (len(near), 4)),
                np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1),
            ]
        )
        of_object = np.where(rng.random(len(near)) < 0.1, rng.choice(classes, len(near)), image.labels[near])
        found = {
            "boxes": boxes,
            "scores": np.concatenate([rng.uniform(0.1, 1, len(near)), rng.uniform(0, 0.3, anywhere)]),
            "labels": np.concatenate([of_object, rng.choice(classes, anywhere, p=frequency)]),
        }
        kinds = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64}
        detections.append({name: torch.as_tensor(value, dtype=kinds[name]) for name, value in found.items()})
    return annotations, detections


def measure(
    backend: str, annotations: Annotations, detections: list[dict[str, Tensor]]
) -> tuple[dict[str, float], Metrics]:
    """Wall seconds of each phase of one evaluation, and its numbers."""
    seconds = dict.fromkeys(PHASES, 0.0)
    evaluator = CocoEvaluator(annotations, backend=backend)

    def timed(phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*arguments)
            finally:
                seconds[phase] += time.perf_counter() - start

        return call

    image_ids = evaluator.images.image_ids.tolist()
    update = timed("gather", evaluator.update)
    for i in range(0, len(detections), BATCH):
        update(image_ids[i : i + BATCH], detections[i : i + BATCH])
    # The two phases inside `compute` are timed where they happen, in this evaluator's own back end.
    inner = evaluator._backend
    inner.load = timed("convert", inner.load)
    inner.accumulate = timed("library", inner.accumulate)
    metrics = timed("rest", evaluator.compute)()
    seconds["rest"] -= seconds["library"]
    seconds["library"] -= seconds["convert"]
    return seconds, metrics


def check(numbers: Mapping[str, Metrics]) -> float:
    """The largest difference of any number from the first library's.

    Raises:
        RuntimeError: beyond rounding.
    """

    def values(metrics: Metrics) -> np.ndarray:
        columns = ("AP", "AP50", "AP75", "AR100", "APs", "APm", "APl")
        by_class = [[getattr(row, name) for name in columns] for row in metrics.per_class]
        return np.array([*metrics.numbers().values(), metrics.threshold, metrics.f1, *np.ravel(by_class)])

    first, *others = numbers.values()
    largest = 0.0
    for name, metrics in zip(list(numbers)[1:], others):
        if not np.allclose(values(metrics), values(first), rtol=0, atol=1e-6, equal_nan=True):
            raise RuntimeError(f"{name} gives other numbers than {next(iter(numbers))}: nothing is timed")
        largest = max(largest, float(np.nanmax(np.abs(values(metrics) - values(first)), initial=0.0)))
    return largest


def table(result: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a library; ratios say how many times as fast as pycocotools, or the slowest that is here."""
    rows = result["seconds"]
    base = rows.get(BASE) or list(rows.values())[-1]
    whole = lambda row: sum(row.values())  # noqa: E731
    phases = " | ".join(f"{phase} s" for phase in PHASES)
    lines = [
        f"| library | {phases} | adapter adds | whole s | library's ratio | whole ratio |",
        "|---|" + "---|" * (len(PHASES) + 4),
    ]
    for name, row in rows.items():
        added = whole(row) - row["library"]
        figures = [*(f"{row[phase]:.3f}" for phase in PHASES), f"{added:.3f} s", f"{whole(row):.3f}"]
        ratios = [f"{base['library'] / row['library']:.1f}x", f"{whole(base) / whole(row):.1f}x"]
        lines.append(f"| {' | '.join([name, *figures, *ratios])} |")
    return lines


def markdown(result: Mapping[str, Any]) -> str:
    sizes = result["sizes"]
    lines = [
        f"# COCO evaluation, {result['machine']['date']}",
        "",
        f"- Machine: {record.describe(result['machine'])}.",
        f"- Command: `{result['command']}`. Wall seconds, median of {result['rounds']} interleaved rounds in "
        "one process.",
        f"- Synthetic: {sizes['images']:,} images, {sizes['objects']:,} objects, {sizes['classes']} classes, "
        f"{sizes['per_image']} detections per image.",
        f"- All numbers (COCO's twelve, those by class and size, threshold and F1) agree; largest difference "
        f"{result['largest_difference']:.1e}. AP is {result['AP']:.3f}.",
        "- gather: taking the model's detections; convert: to the library's objects; library: its evaluate and "
        "accumulate;",
        "  rest: threshold of the best F1 and summary. The adapter adds all but the library.",
        "",
        *table(result),
    ]
    return "\n".join(lines) + "\n"


def bench_evaluation(
    *,
    images: int = 5000,
    objects: int = 36_000,
    classes: int = 80,
    per_image: int = 100,
    rounds: int = 3,
    seed: int = 0,
    output: str | None = None,
) -> None:
    """Time COCO's evaluation of a synthetic set by each library that is installed.

    Args:
        images: images of the set.
        objects: objects in all of them.
        classes: classes; as in COCO, some have most of the objects.
        per_image: detections per image.
        rounds: turns of each library, of which the median counts.
        seed: of the set.
        output: folder for evaluation.json and evaluation.md.

    Raises:
        InputError: a number below 1.
    """
    settings = dict(locals())
    sizes = {"images": images, "objects": objects, "classes": classes, "per_image": per_image}
    for name, number in (*sizes.items(), ("rounds", rounds)):
        if number < 1:
            raise InputError(f"--{name}: expected at least 1, got {number}")
    folder = make_folder(Path(output), "--output") if output else None
    installed, left_out = [], []
    for name in BACKENDS:
        try:
            CocoEvaluator(Annotations("", "coco", (), ()), backend=name)
            installed.append(name)
        except InputError as error:
            left_out.append(str(error))
    here = record.machine(torch.device("cpu"))
    console.show(record.describe(here))
    annotations, detections = make_set(**sizes, seed=seed)
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in installed}
    numbers: dict[str, Metrics] = {}
    with console.progress("evaluation") as update:
        for turn in range(rounds * len(installed)):
            name = installed[turn % len(installed)]
            seconds, numbers[name] = measure(name, annotations, detections)
            for phase, value in seconds.items():
                times[name][phase].append(value)
            update(turn + 1, rounds * len(installed))
    result = {
        "machine": here,
        "command": record.command_line("bench evaluation", bench_evaluation, settings),
        "sizes": sizes,
        "rounds": rounds,
        "seconds": {name: {p: statistics.median(v) for p, v in phases.items()} for name, phases in times.items()},
        "largest_difference": check(numbers),
        "AP": numbers[installed[0]].AP,
        "left_out": left_out,
    }
    console.show("\n".join([*table(result), *(f"left out: {line}" for line in left_out)]))
    if folder:
        record.save(folder, "evaluation", result, markdown(result))

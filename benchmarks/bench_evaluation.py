"""COCO evaluation by the three libraries, each behind our adapter: `python benchmarks/bench_evaluation.py`.

A synthetic set like COCO's validation: crowds, skewed classes, detections near the objects and anywhere. In one process
and interleaved, each library evaluates the same detections; wall time, split into

- gather: `update` with the detections of a batch, as the model gives them
- convert: our flat arrays to the library's own objects
- library: its `evaluate` and `accumulate`
- rest: matching, threshold of the best F1, summary

What the adapter adds is all but `library`. The numbers must agree before any time is shown. `--output FOLDER` saves
evaluation.json and evaluation.md.
"""

import argparse
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddetr.bench.record import describe, machine, save_json
from ddetr.datasets.annotations import Annotations, Category, ImageTable
from ddetr.errors import InputError
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator, Detections
from ddetr.evaluation.metrics import Metrics
from ddetr.files import make_folder, write_text

BASE = "pycocotools"
PHASES = ("gather", "convert", "library", "rest")
BATCH = 16


def make_set(
    images: int, objects: int, classes: int, per_image: int, seed: int
) -> tuple[Annotations, list[Detections]]:
    """Truth, and `per_image` detections an image: about two near each object, the others anywhere."""
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
    for record in table:
        near = np.repeat(np.arange(len(record.labels)), 2)[:per_image]
        anywhere = per_image - len(near)
        side = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2])[near][:, [0, 1, 0, 1]]
        corners = rng.uniform(0, 1, (anywhere, 2, 2)) * size_hw[::-1]
        boxes = np.concatenate(
            [
                record.boxes_xyxy[near] + side * rng.normal(0, 0.08, (len(near), 4)),
                np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1),
            ]
        )
        of_object = np.where(rng.random(len(near)) < 0.1, rng.choice(classes, len(near)), record.labels[near])
        found = {
            "boxes": boxes,
            "scores": np.concatenate([rng.uniform(0.1, 1, len(near)), rng.uniform(0, 0.3, anywhere)]),
            "labels": np.concatenate([of_object, rng.choice(classes, anywhere, p=frequency)]),
        }
        kinds = {"boxes": torch.float32, "scores": torch.float32, "labels": torch.int64}
        detections.append({name: torch.as_tensor(value, dtype=kinds[name]) for name, value in found.items()})
    return annotations, detections


def measure(backend: str, annotations: Annotations, detections: list[Detections]) -> tuple[dict[str, float], Metrics]:
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
    """The largest difference of any number from the first library's; raises beyond rounding."""

    def values(metrics: Metrics) -> np.ndarray:
        columns = ("AP", "AP50", "AP75", "AR100", "APs", "APm", "APl")
        by_class = [[getattr(row, name) for name in columns] for row in metrics.per_class]
        return np.array([*metrics.numbers().values(), metrics.threshold, metrics.f1, *np.ravel(by_class)])

    first, *others = numbers.values()
    largest = 0.0
    for name, metrics in zip(list(numbers)[1:], others):
        if not np.allclose(values(metrics), values(first), rtol=0, atol=1e-6, equal_nan=True):
            raise SystemExit(f"{name} gives other numbers than {next(iter(numbers))}: nothing is timed")
        largest = max(largest, float(np.nanmax(np.abs(values(metrics) - values(first)), initial=0.0)))
    return largest


def table(result: Mapping[str, Any]) -> list[str]:
    """Markdown: a row a library; ratios say how many times as fast as pycocotools, or the slowest that is here."""
    rows = result["seconds"]
    base = rows.get(BASE) or list(rows.values())[-1]
    whole = lambda row: sum(row.values())  # noqa: E731
    lines = [
        f"| library | {' | '.join(f'{phase} s' for phase in PHASES)} | adapter adds | whole s | library's ratio | whole ratio |",
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
        f"- Machine: {describe(result['machine'])}.",
        f"- Command: `{result['command']}`. Wall seconds, median of {result['rounds']} interleaved rounds in one process.",
        f"- Synthetic: {sizes['images']:,} images, {sizes['objects']:,} objects, {sizes['classes']} classes, "
        f"{sizes['per_image']} detections an image.",
        f"- All numbers (COCO's twelve, those by class and size, threshold and F1) agree; largest difference "
        f"{result['largest_difference']:.1e}. AP is {result['AP']:.3f}.",
        "- gather: taking the model's detections; convert: to the library's objects; library: its evaluate and accumulate;",
        "  rest: threshold of the best F1 and summary. The adapter adds all but the library.",
        "",
        *table(result),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--objects", type=int, default=36_000)
    parser.add_argument("--classes", type=int, default=80)
    parser.add_argument("--per-image", type=int, default=100, help="detections an image")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="folder for evaluation.json and evaluation.md")
    options = parser.parse_args()
    sizes = {name: getattr(options, name) for name in ("images", "objects", "classes", "per_image")}
    for name, number in (*sizes.items(), ("rounds", options.rounds)):
        if number < 1:
            parser.error(f"--{name.replace('_', '-')}: expected at least 1, got {number}")
    installed, left_out = [], []
    for name in BACKENDS:
        try:
            CocoEvaluator(Annotations("", "coco", (), ()), backend=name)
            installed.append(name)
        except InputError as error:
            left_out.append(str(error))
    here = machine(torch.device("cpu"))
    print(describe(here))
    annotations, detections = make_set(**sizes, seed=options.seed)
    times: dict[str, dict[str, list[float]]] = {name: {phase: [] for phase in PHASES} for name in installed}
    numbers: dict[str, Metrics] = {}
    for round_ in range(options.rounds):
        for name in installed:
            seconds, numbers[name] = measure(name, annotations, detections)
            for phase, value in seconds.items():
                times[name][phase].append(value)
            print(f"round {round_ + 1}  {name:<18} {sum(seconds.values()):8.3f} s", file=sys.stderr)
    result = {
        "machine": here,
        "command": shlex.join(["python", "benchmarks/bench_evaluation.py", *_arguments(parser, options)]),
        "sizes": sizes,
        "rounds": options.rounds,
        "seconds": {name: {p: statistics.median(v) for p, v in phases.items()} for name, phases in times.items()},
        "largest_difference": check(numbers),
        "AP": numbers[installed[0]].AP,
        "left_out": left_out,
    }
    print("\n".join([*table(result), *(f"left out: {line}" for line in left_out)]))
    if options.output:
        folder = make_folder(options.output, "--output")
        save_json(folder / "evaluation.json", result)
        write_text(folder / "evaluation.md", markdown(result))
        print(f"saved in {folder}: evaluation.json, evaluation.md")


def _arguments(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[str]:
    chosen = {
        key: value for key, value in vars(options).items() if value != parser.get_default(key) and key != "output"
    }
    return [word for key, value in chosen.items() for word in (f"--{key.replace('_', '-')}", str(value))]


if __name__ == "__main__":
    main()

"""`ddetr bench data`: the loader alone, on any data set, beside the plain Pillow recipe, which gives the same
samples."""

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from multiprocessing import get_all_start_methods, get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch

from ddetr import console
from ddetr.bench import data_tables as tables
from ddetr.bench import record
from ddetr.bench.plain_recipe import plain_sample
from ddetr.bench.timing import fixed_threads
from ddetr.datasets import Annotations, DetectionDataset, build_transform, collate, padded_shapes, sample_seed
from ddetr.datasets.config import DataConfig
from ddetr.datasets.dataset import seeded
from ddetr.datasets.image_files import reading_on_screen
from ddetr.datasets.images import decode_image, image_header
from ddetr.datasets.splits import load_split
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, MAX_PADDED_SHAPES
from ddetr.engine.loading.datamodule import DetectionData, collate_micro
from ddetr.engine.loading.sampler import EpochOrder
from ddetr.engine.loading.workers import MOST_WORKERS, start_worker
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.padding import padded_hw
from ddetr.runtime.limits import available_cores

STAGES = tables.STAGES
OURS, PLAIN = tables.SIDES

BOX_TOLERANCE = 1e-4  # of the image's side
PIXEL_TOLERANCE = 8.0  # mean difference in 8-bit levels over all images: the recipe with its two resizings is softer
_SHAPE_IMAGES = 2000  # drawn for the padded share; nothing is loaded for it
_LEAST_SECONDS = 3.0  # of each number of loader processes


class Key(NamedTuple):
    """A sample: an image of the data set and the seed of its augmentation."""

    index: int
    seed: int


# Long, since it is a list: each table is measured, shown and kept, one after the other.
def bench_data(
    data: DataConfig,
    *,
    images: int = 128,
    batch_size: int = 32,
    device_batch_size: int = 2,
    workers: int | None = None,
    rounds: int = 5,
    seed: int = 42,
    output: str | None = None,
) -> None:
    """Time the training loader, and the plain Pillow recipe beside it.

    Args:
        data: the data set and how it is read, as for training.
        images: images of the training split that are used, spread evenly over it.
        batch_size: images of an optimisation step.
        device_batch_size: images that are padded together.
        workers: the largest number of loader processes to try; by default what the machine has, up to 4.
        rounds: turns of each side, of which the median counts.
        seed: decides the augmentation.
        output: folder for data.json and data.md.

    Raises:
        InputError: no such data, too few readable images, or a number out of range.
    """
    settings = dict(locals())
    for name in ("images", "batch_size", "device_batch_size", "rounds"):
        if settings[name] < 1:
            raise InputError(f"--{name}: expected at least 1, got {settings[name]}")
    if workers is not None and workers < 0:
        raise InputError(f"--workers: expected at least 0, got {workers}")
    most_workers = min(MOST_WORKERS, available_cores()) if workers is None else workers
    folder = make_folder(Path(output), "--output") if output else None
    with reading_on_screen(data.path):
        whole = load_split(data, "train")
    chosen = comparable(whole, images)
    if len(chosen.images) < batch_size:
        raise InputError(
            f"{whole.name} has {len(chosen.images)} upright, readable images here, fewer than a batch of {batch_size}: "
            f"give a smaller --batch_size"
        )
    recipe = build_transform(data.augmentation, train=True, image_size=data.image_size)
    dataset = DetectionDataset(chosen, recipe, normalize=False)
    keys = [Key(index, sample_seed(seed, 0, index)) for index in range(len(chosen.images))]
    report: dict[str, Any] = {
        "machine": record.machine(torch.device("cpu")),
        "command": record.command_line("bench data", bench_data, settings),
        "data": whole.name,
        "image_size": data.image_size,
        "augmentation": data.augmentation,
        "num_images": len(keys),
        "batch_size": batch_size,
        "device_batch_size": device_batch_size,
        "rounds": rounds,
        "sides": tables.DESCRIPTIONS,
    }
    with fixed_threads(1):
        with console.waiting("comparing the sides"):
            report["checked"], reason = check(dataset, keys)
        report["left_out"] = [] if reason is None else [{"side": PLAIN, "reason": reason}]
        with console.waiting("one core"):
            report["rows"] = one_core(dataset, keys, device_batch_size, rounds, sides=(OURS, PLAIN)[: 1 + (not reason)])
    console.show("\n".join(tables.header(report)))
    show(tables.of_sides(report))
    report["padding"] = padding_table(whole, data, batch_size, device_batch_size, seed)
    show(tables.of_padding(report))
    report["loaders"] = []
    for number in range(most_workers + 1):
        with console.waiting(f"{number} loader processes"):
            report["loaders"].append(loader_speed(chosen, data, batch_size, device_batch_size, seed, number))
    show(tables.of_loaders(report))
    console.show("\n".join(tables.footer(report)))
    if folder:
        record.save(folder, "data", report, tables.markdown(report))


def show(parts: Iterable[Any]) -> None:
    for part in parts:
        console.show(part)


def comparable(annotations: Annotations, most: int) -> Annotations:
    """At most `most` images, spread evenly over the split: upright and readable, since the plain recipe knows no
    turns."""
    step = max(1, len(annotations.images) // most)
    records = []
    for index in range(0, len(annotations.images), step):
        one = annotations.images[index]
        try:
            if image_header(one.path).orientation == 1:
                records.append(one)
        except InputError:
            continue
        if len(records) == most:
            break
    return replace(annotations, images=records)


def check(dataset: DetectionDataset, keys: Sequence[Key]) -> tuple[dict[str, float], str | None]:
    """Largest deviations between the two sides over all samples, and what is wrong with the plain one, None if nothing
    is."""
    boxes, pixels = 0.0, []
    mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    for key in keys:
        one = dataset.annotations.images[key.index]
        image, target = dataset[key]
        plain_image, plain = plain_sample(one, dataset.transform, key.seed)
        found = {"boxes": 0.0, "pixels": 0.0}
        for name in ("labels", "iscrowd", "image_id", "orig_size", "size"):
            if not torch.equal(target[name], plain[name]):
                return found, f"wrong: {name} of {one.path.name} differ"
        if image.shape != plain_image.shape:
            return found, f"wrong: {one.path.name} has another size"
        boxes = max(boxes, (target["boxes"] - plain["boxes"]).abs().max().item() if len(plain["boxes"]) else 0.0)
        pixels.append((image.float() - (plain_image * deviation + mean) * 255).abs().mean().item())
    found = {"boxes": boxes, "pixels": statistics.fmean(pixels)}
    if not boxes <= BOX_TOLERANCE:
        return found, f"wrong: its boxes are off by up to {boxes:.1e} of the image's side"
    if not found["pixels"] <= PIXEL_TOLERANCE:
        return found, f"wrong: its pixels differ by {found['pixels']:.1f} levels in the mean"
    return found, None


def one_core(
    dataset: DetectionDataset, keys: Sequence[Key], device_batch_size: int, rounds: int, sides: Sequence[str]
) -> list[dict[str, Any]]:
    """CPU time, in milliseconds per image, by stage: medians of interleaved rounds, each in a process of its own, ours
    set up as our loader processes are."""
    times: dict[str, list[Counter]] = {side: [] for side in sides}
    for _ in range(rounds):
        for side in sides:
            times[side].append(in_own_process(_PASSES[side], dataset, keys, device_batch_size))
    rows = []
    for side in sides:
        totals = [sum(spent.values()) / len(keys) / 1e6 for spent in times[side]]
        stages = {
            stage: statistics.median(spent[stage] for spent in times[side]) / len(keys) / 1e6
            for stage in STAGES
            if any(spent[stage] for spent in times[side])
        }
        rows.append({"side": side, "ms": statistics.median(totals), "stages_ms": stages, "rounds_ms": totals})
    plain = next((row["ms"] for row in rows if row["side"] == PLAIN), None)
    for row in rows:
        row["images_per_second"] = 1000 / row["ms"]
        row["ratio"] = None if plain is None else plain / row["ms"]
    return rows


def in_own_process(one_pass: Callable[..., Counter], *arguments: Any) -> Counter:
    """The second of two passes in a new process."""
    context = get_context("fork" if "fork" in get_all_start_methods() else "spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run_twice, args=(sender, one_pass, *arguments), daemon=True)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        raise RuntimeError("the measuring process died; its own message stands above") from None
    finally:
        process.join()


def _run_twice(sender: Any, one_pass: Callable[..., Counter], *arguments: Any) -> None:
    torch.set_num_threads(1)
    if one_pass is our_pass:
        start_worker(0)
    one_pass(*arguments)
    sender.send(one_pass(*arguments))


def our_pass(dataset: DetectionDataset, keys: Sequence[Key], device_batch_size: int) -> Counter:
    """Nanoseconds of each stage, over all samples."""
    spent: Counter = Counter()
    samples = []
    for number, key in enumerate(keys, 1):
        start = time.thread_time_ns()
        one = dataset.annotations.images[key.index]
        content = one.path.read_bytes()
        read = time.thread_time_ns()
        pixels = decode_image(content, one.path, one.size_hw)
        decoded = time.thread_time_ns()
        with seeded(key.seed):
            samples.append(dataset.augmented(one, pixels))
        augmented = time.thread_time_ns()
        spent.update({"read": read - start, "decode": decoded - read, "augment": augmented - decoded})
        if len(samples) == device_batch_size or number == len(keys):
            collate_micro(samples, device_batch_size)
            samples = []
            spent["collate"] += time.thread_time_ns() - augmented
    return spent


def plain_pass(dataset: DetectionDataset, keys: Sequence[Key], device_batch_size: int) -> Counter:
    """The same; Pillow reads while it decodes, and normalising is a part of augmenting here."""
    spent: Counter = Counter()
    samples = []
    for number, key in enumerate(keys, 1):
        start = time.thread_time_ns()
        samples.append(plain_sample(dataset.annotations.images[key.index], dataset.transform, key.seed))
        sampled = time.thread_time_ns()
        spent["all up to tensors"] += sampled - start
        if len(samples) == device_batch_size or number == len(keys):
            collate(samples)
            samples = []
            spent["collate"] += time.thread_time_ns() - sampled
    return spent


_PASSES = {OURS: our_pass, PLAIN: plain_pass}


def padding_table(
    annotations: Annotations, data: DataConfig, batch_size: int, device_batch_size: int, seed: int
) -> list[dict[str, Any]]:
    """The share of padding in what the network sees, with the images sorted or not and with fixed shapes or not."""
    size_of = DetectionData(
        annotations, annotations, data, batch_size=batch_size, device_batch_size=device_batch_size, seed=seed
    ).size_of
    counts = sorted({None, data.padded_shapes, MAX_PADDED_SHAPES}, key=lambda count: count or 0)
    rows = []
    for buckets in (False, True):
        order = EpochOrder(
            len(annotations.images),
            batch_size,
            seed=seed,
            device_batch_size=device_batch_size,
            size_of=size_of if buckets else None,
        )
        groups = _drawn_groups(order, size_of, device_batch_size)
        real = sum(h * w for group in groups for h, w in group)
        for count in counts:
            shapes = () if count is None else padded_shapes(data.image_size, count)
            padded = [padded_hw(group, shapes) for group in groups]
            pixels = sum(h * w * len(group) for (h, w), group in zip(padded, groups))
            rows.append(
                {
                    "buckets": buckets,
                    "padded_shapes": count,
                    "padded_share": 1 - real / pixels,
                    "num_shapes": len(set(padded)),
                    "num_batches": len(padded),
                }
            )
    return rows


def _drawn_groups(
    order: EpochOrder, size_of: Callable[[int, int], tuple[int, int]], device_batch_size: int
) -> list[list[tuple[int, int]]]:
    """(h, w) of the images of each micro-batch, over as many epochs as are needed."""
    groups: list[list[tuple[int, int]]] = []
    num_images = 0
    while num_images < _SHAPE_IMAGES:
        sizes_hw = []
        for turn in order:
            sizes_hw.append(size_of(turn.index, turn.seed))
            if num_images + len(sizes_hw) >= _SHAPE_IMAGES and len(sizes_hw) % order.batch_size == 0:
                break
        for begin in range(0, len(sizes_hw), order.batch_size):
            step = sizes_hw[begin : begin + order.batch_size]
            groups += [step[i : i + device_batch_size] for i in range(0, len(step), device_batch_size)]
        num_images += len(sizes_hw)
        order.set_epoch(order.epoch + 1)
    return groups


def loader_speed(
    annotations: Annotations, data: DataConfig, batch_size: int, device_batch_size: int, seed: int, num_workers: int
) -> dict[str, Any]:
    """Images per second that arrive in the training process, by the wall clock, after an unmeasured epoch."""
    loaders = DetectionData(
        annotations,
        annotations,
        replace(data, num_workers=num_workers),
        batch_size=batch_size,
        device_batch_size=device_batch_size,
        seed=seed,
    )
    loaders.trainer = SimpleNamespace(world_size=1, global_rank=0, num_devices=1)
    loader = loaders.train_dataloader()
    num_images, epoch, start = 0, 0, 0.0
    while epoch < 2 or time.perf_counter() - start < _LEAST_SECONDS:
        if epoch == 1:
            start = time.perf_counter()
        loader.batch_sampler.sampler.set_epoch(epoch)
        for step in loader:
            num_images += sum(len(targets) for _, _, targets in step) if epoch else 0
        epoch += 1
    return {"num_workers": num_workers, "images_per_second": num_images / (time.perf_counter() - start)}

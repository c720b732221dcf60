"""`ddetr bench convergence`: detectors trained side by side on the same images, and when each reaches an AP."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ddetr import console
from ddetr.bench import record
from ddetr.bench.convergence import curves, tables
from ddetr.bench.convergence.ours import check_ours, time_ours, train_ours
from ddetr.bench.convergence.peers import PeerTraining, train_peer
from ddetr.bench.convergence.plan import Plan
from ddetr.bench.convergence.points import Curve
from ddetr.bench.convergence.sides import DEFAULT_SIDES, SIDES, Side, chosen_sides
from ddetr.bench.convergence.summary import summary
from ddetr.bench.sides import reason_of
from ddetr.datasets import Annotations, draw_shapes
from ddetr.datasets.image_files import reading_on_screen
from ddetr.datasets.shapes import HARD
from ddetr.datasets.splits import load_splits, no_validation
from ddetr.engine.config import TrainConfig
from ddetr.errors import InputError
from ddetr.files import make_folder, write_text
from ddetr.runtime.device import choose_device

logger = logging.getLogger(__name__)

SHAPES = "shapes"  # in the place of a path
_WARMUP, _TIMED = 2, 4  # steps, for how many epochs there is time


class Comparison:
    """What is compared in a folder."""

    def __init__(self, folder: Path, plan: Plan, config: TrainConfig, minutes: float | None, epochs: int | None):
        self.folder, self.plan, self.base, self.minutes, self.epochs = folder, plan, config, minutes, epochs
        self.device = choose_device(config.device)
        self.machine = record.machine(self.device)
        with reading_on_screen(config.data.path):
            self.train_set, val_set = load_splits(config.data, keep_empty=config.data.keep_empty)
        if val_set is None:
            raise no_validation(config.data)
        self.val_set: Annotations = val_set
        self.steps_per_epoch = len(self.train_set.images) // config.batch_size
        self.left_out: dict[str, str] = {}

    @property
    def clock(self) -> str:
        if self.device.type == "cuda":
            return "GPU seconds (wall time)"
        return f"CPU seconds of the process, PyTorch threads: {torch.get_num_threads()}"

    def parameters_of(self, side: Side) -> int | None:
        """How many its network has; None, and a reason in `left_out`, where one of the others cannot be had.

        Raises:
            InputError: settings of ours that do not go together.
        """
        config = side.config(self.base)
        if side.is_ours:
            return check_ours(config, len(self.train_set.categories))
        try:
            return self._peer(side, config).parameters
        except Exception as error:  # others' packages fail in every way there is
            logger.debug("%s", side.name, exc_info=error)
            self.left_out[side.name] = reason_of(error)
            logger.warning("%s is left out: %s", side.name, self.left_out[side.name])
            return None

    def settle_epochs(self, side: Side) -> None:
        """Once for all its seeds: its own, else those of all sides, else as many as there is time for, by the time of a
        few steps.

        Raises:
            InputError: there is no time for one.
        """
        epochs = side.options.get("epochs", self.epochs)
        if epochs is None:
            assert self.minutes is not None
            with console.waiting(f"{side.name}: how long a step takes"):
                config = side.config(self.base)
                if side.is_ours:
                    step = time_ours(config, self.train_set, self.device, _WARMUP, _TIMED)
                else:
                    step = self._peer(side, config).time_steps(_WARMUP, _TIMED)
            epochs = int(60 * self.minutes / (step * self.steps_per_epoch))
            needed = step * self.steps_per_epoch / 60
            if epochs < 1:
                raise InputError(
                    f"--minutes {self.minutes:g}: an epoch of {side.name} takes about {needed:.2g} minutes here: give "
                    "more, or fewer images"
                )
            logger.info("%s: %.3g s a step, so %d epochs in %g minutes", side.name, step, epochs, self.minutes)
        self.plan.epochs[side.name], self.plan.options[side.name] = epochs, dict(side.options)
        self.plan.save(self.folder)

    def train(self, side: Side, seed: int, parameters: int) -> None:
        """To its last epoch, from where it was."""
        folder = self.folder / f"{side.folder}-seed{seed}"
        file = folder.with_name(f"{folder.name}.json")
        epochs = self.plan.epochs[side.name]
        curve = Curve.read(file)
        if curve is None:
            if folder.exists():
                raise InputError(f"{folder}: {file.name} beside it is gone: remove it too to train this side anew")
            curve = Curve(side.name, seed, epochs, self.base.batch_size, parameters)
        if curve.is_finished:
            return
        curve.machine = record.describe(self.machine)
        curve.save(file)
        logger.info("%s, seed %d: %d epochs", side.name, seed, epochs)
        config = replace(side.config(self.base), seed=seed, epochs=epochs)
        if side.is_ours:
            train_ours(config, curve, file, folder)
        else:
            train_peer(self._peer(side, config), curve, file, folder)

    def _peer(self, side: Side, config: TrainConfig) -> PeerTraining:
        return PeerTraining(side, config, self.train_set, self.val_set, self.device)

    def report(self) -> dict[str, Any]:
        """All that is in the folder: sides that were not chosen this time too."""
        found = []
        for side in self.plan.epochs:
            folder = (SIDES.get(side) or chosen_sides(side)[0]).folder
            files = self.folder.glob(f"{folder}-seed*.json")
            read = [curve for file in files if (curve := Curve.read(file)) is not None and curve.side == side]
            found += sorted(read, key=lambda curve: curve.seed)
        rows, levels = summary(found)
        return {
            "machine": self.machine,
            "machines": list(dict.fromkeys(curve.machine for curve in found)),
            "commands": self.plan.commands,
            "device": self.device.type,
            "clock": self.clock,
            "settings": self.plan.settings,
            "num_images": [len(self.train_set.images), len(self.val_set.images)],
            "sides": {side: chosen_sides(side)[0].about for side in self.plan.epochs},
            "left_out": self.left_out,
            "levels": levels,
            "rows": rows,
            "curves": [asdict(curve) for curve in found],
        }

    def write(self) -> dict[str, Any]:
        """convergence.json, convergence.md and convergence.png."""
        report = self.report()
        record.save_json(self.folder / "convergence.json", report)
        write_text(self.folder / "convergence.md", tables.markdown(report))
        found = [Curve.of(values) for values in report["curves"]]
        curves.draw(self.folder / "convergence.png", found, self.clock.split(",")[0])
        return report


def bench_convergence(
    config: TrainConfig,
    *,
    output: str,
    sides: str = DEFAULT_SIDES,
    seeds: str = "0",
    minutes: float | None = None,
    epochs: int | None = None,
    num_train: int = 2000,
    num_val: int = 300,
    command: str = "",
) -> None:
    """Train detectors side by side on the same images, and tell when each reaches an AP.

    Args:
        config: what all of them share: data, augmentation, backbone, sizes, rates. --data shapes draws a hard set.
        output: folder of the comparison. One that holds a comparison is gone on with: what was interrupted, further
            sides, further seeds.
        sides: any of plain, refine, two-stage, fast, fast-stride4; detr, detr-dc5 (transformers'), faster-rcnn
            (torchvision's). fast+model.query_selection=peaks is fast with another setting, detr+optim.lr=0.002 DETR
            with that rate (by default half of ours, as published, and at most 0.0002), detr+epochs=50 DETR over so
            many epochs, and so on with any option of train.
        seeds: numbers, such as 0,1,2: each side trains once with each.
        minutes: training time of a side and a seed (CPU time of the process; on a GPU wall time), validation left out.
            A few steps tell how many epochs that is.
        epochs: instead of minutes, so many epochs for each that has no number of its own; where both are given, minutes
            decide.
        num_train: training images to draw, for --data shapes.
        num_val: validation images to draw, for --data shapes.
        command: how this was called.

    Raises:
        InputError: settings that cannot be compared, or a folder that holds another comparison.
    """
    chosen, numbers = chosen_sides(sides), _numbers(seeds)
    config, epochs = _checked(config, chosen, minutes, epochs)
    folder = make_folder(Path(output), "--output")
    is_drawn = config.data.path == SHAPES
    data = f"shapes, {num_train} and {num_val}" if is_drawn else str(config.data.path)
    plan = Plan.of(folder, config, data=data, minutes=minutes, epochs=epochs)
    for side in chosen:
        plan.check(side)
    if is_drawn:
        if num_train < config.batch_size:
            raise InputError(f"--num_train {num_train}: expected at least a batch of {config.batch_size} images")
        drawn = folder.resolve() / SHAPES  # resuming wants the same path, however --output is written
        with console.waiting("drawing"):
            draw_shapes(drawn, num_train, num_val, config.data.image_size, difficulty=HARD)
        config = replace(config, data=replace(config.data, path=str(drawn)))
    comparison = Comparison(folder, plan, config, minutes, epochs)
    parameters = {side: count for side in chosen if (count := comparison.parameters_of(side)) is not None}
    if not parameters:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in comparison.left_out.items())
        raise InputError(f"--sides: none of them can train here ({reasons})")
    for side in parameters:
        if side.name not in plan.epochs:
            comparison.settle_epochs(side)
    if command and command not in plan.commands:
        plan.commands.append(command)
        plan.save(folder)
    for seed in numbers:
        for side, count in parameters.items():
            comparison.train(side, seed, count)
            report = comparison.write()
    for line in tables.header(report):
        console.show(line)
    for table in tables.shown(report):
        console.show("")
        console.show(table)
    for line in tables.left_out(report):
        console.show(line)
    console.show(f"saved in {folder}: convergence.json, convergence.md, convergence.png")


def _checked(
    config: TrainConfig, chosen: list[Side], minutes: float | None, epochs: int | None
) -> tuple[TrainConfig, int | None]:
    """The settings as they are compared, and the epochs where they are not settled by minutes."""
    if minutes is None and epochs is None:
        raise InputError("bench convergence needs --minutes or --epochs: how long each side trains")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise InputError(f"--minutes: expected more than 0, got {minutes:g}")
    if minutes is None and epochs is not None and epochs < 1:
        raise InputError(f"--epochs: expected at least 1, got {epochs}")
    if not config.data.path:
        raise InputError(f"bench convergence needs --data PATH, or --data {SHAPES} for a drawn set")
    if "auto" in (config.batch_size, config.device_batch_size):
        raise InputError(
            "bench convergence gives all sides the same batch: --batch_size and --device_batch_size are numbers here"
        )
    for side in chosen:
        settings = side.config(config)  # what cannot be is said before images are drawn
        if settings.compile:
            raise InputError("bench convergence compares networks as they are: leave --compile out")
        if not side.is_ours and settings.precision == "fp16":
            raise InputError(f"--precision fp16: {side.name} trains with 32 or bf16 here")
        if not side.is_ours and settings.optim.freeze:
            raise InputError(f"--optim.freeze names parameters of ours, and {side.name} has others: leave it out")
    if choose_device(config.device).type == "cpu" and config.data.num_workers is None:
        # the clock is that of this process, in which images are loaded then
        config = replace(config, data=replace(config.data, num_workers=0))
    config = replace(config, loggers=[], num_pictures=0, preflight=False, devices=1)
    return config, None if minutes is not None else epochs


def _numbers(seeds: str) -> list[int]:
    try:
        numbers = [int(number) for number in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds: expected numbers such as 0,1,2, got {seeds!r}") from None
    if not all(0 <= number < 2**32 for number in numbers):
        raise InputError(f"--seeds: expected numbers from 0 to 4294967295, got {seeds!r}")
    return list(dict.fromkeys(numbers))

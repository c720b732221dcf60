"""The commands `ddetr train`, `ddetr preflight` and `ddetr demo`."""

import shlex
from collections.abc import Callable, Collection, Sequence
from typing import Any

from ddetr import console
from ddetr.cli.parser import Parser
from ddetr.files import existing


def train_command(parser: Parser) -> Callable[[Any], None]:
    """Train on a data set as it lies there: COCO, Pascal VOC, YOLO and others."""
    parser.usage = "ddetr train --data PATH [options]"
    add_training_options(parser)

    def run(settings: Any) -> None:
        existing(settings.data.path)  # before the ten seconds that it takes to import what trains
        from ddetr.engine.train import train
        from ddetr.runtime.distributed import is_first_process

        result = train(training_config(settings, parser.said))
        if is_first_process():
            print_result(result)

    return run


def preflight_command(parser: Parser) -> Callable[[Any], None]:
    """Try the set-up of a training run on a few images, and train nothing."""
    parser.usage = "ddetr preflight --data PATH [options of ddetr train]"
    add_training_options(parser)

    def run(settings: Any) -> None:
        existing(settings.data.path)
        from ddetr.engine.train import preflight

        preflight(training_config(settings, parser.said))

    return run


def demo_command(parser: Parser) -> Callable[[Any], None]:
    """Train a small detector on drawn shapes, in minutes on a CPU."""
    from ddetr.demo import demo

    parser.usage = "ddetr demo [options]"
    parser.add_function_arguments(demo)
    return lambda settings: print_result(demo(**vars(settings)))


def add_training_options(parser: Parser, *, skip: Sequence[str] = ()) -> None:
    """The fields of `TrainConfig`, with the constructor of `DeformableDETR` for its model; and --config."""
    from ddetr.engine.config import DEFAULT_MODEL, TrainConfig
    from ddetr.models.deformable_detr import DeformableDETR

    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win")
    parser.add_class_arguments(TrainConfig, skip={"model", *skip}, sub_configs=False)
    parser.add_class_arguments(DeformableDETR, "model", skip={"num_classes"}, instantiate=False)
    parser.add_group_of_options("data", "loss", "auxiliary", "optim", "model")
    parser.set_defaults({f"model.{name}": value for name, value in DEFAULT_MODEL.items()})


def training_config(settings: Any, said: Collection[str] | None = None) -> Any:
    """What was read by `add_training_options` -> `TrainConfig`; options of others are left alone.

    said: the options that were given, where those of the network that were not may come from its weights.
    """
    from dataclasses import fields

    from ddetr.engine.config import TrainConfig

    given = vars(settings)
    model = {name: value for name, value in vars(given["model"]).items() if said is None or f"model.{name}" in said}
    return TrainConfig(**{f.name: given[f.name] for f in fields(TrainConfig) if f.name in given} | {"model": model})


def print_result(result: Any) -> None:
    """The last metrics, where everything lies that is there, and three commands to go on with."""
    console.show(result.metrics.render())
    path = result.path
    best = next((path / name for name in ("best.pth", "last.pth") if (path / name).exists()), path / "best.pth")
    places = (best, result.image_example, result.data_path)
    checkpoint, image, data = (shlex.quote(str(place)) for place in places)
    options = "".join(f" {shlex.quote(word)}" for word in result.data_options)
    left = {
        "checkpoint": [best.name],
        "metrics": ["metrics.json", "per_class.csv", "train.csv", "val.csv"],
        "curves": ["curves.png"],
        "pictures": ["pictures"],
        "report": ["report.html"],
    }
    console.show("")
    for what, names in left.items():
        if there := [str(path / name) for name in names if (path / name).exists()]:
            console.show(f"{what:<12} {', '.join(there)}")
    console.show(
        f"""
What next:
  ddetr predict --checkpoint {checkpoint} {image} --output predictions
  ddetr eval --checkpoint {checkpoint} --data {data}{options}
  ddetr train --config configs/cpu_small.yaml --data PATH    # your own images, in any format that is read"""
    )

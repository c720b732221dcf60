"""The commands `ddetr bench ...`."""

import inspect
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any

from ddetr.cli.parser import Parser
from ddetr.cli.training import add_training_options, training_config


def bench_op_command(parser: Parser) -> Callable[[Any], None]:
    """Time the operator against other implementations, on this machine."""
    from ddetr.bench.op import bench_op

    return _measured(parser, bench_op, "[options]")


def bench_gpu_command(parser: Parser) -> Callable[[Any], int]:
    """Prove and measure everything on a GPU, in minutes and without a network."""
    from ddetr.bench.gpu.command import bench_gpu

    return _measured(parser, bench_gpu, "--output FOLDER [options]")


def bench_inference_command(parser: Parser) -> Callable[[Any], None]:
    """Time the whole detector on a CPU, beside transformers' with the same weights."""
    from ddetr.bench.inference import bench_inference

    return _measured(parser, bench_inference, "[options]")


def bench_evaluation_command(parser: Parser) -> Callable[[Any], None]:
    """Time COCO's evaluation by each library that is installed."""
    from ddetr.bench.evaluation import bench_evaluation

    return _measured(parser, bench_evaluation, "[options]")


def bench_matcher_command(parser: Parser) -> Callable[[Any], None]:
    """Time the matching of a training step, beside the official formulation."""
    from ddetr.bench.matcher import bench_matcher

    return _measured(parser, bench_matcher, "[options]")


def bench_data_command(parser: Parser) -> Callable[[Any], None]:
    """Time the training loader beside the plain Pillow recipe."""
    from ddetr.bench.data import bench_data

    run = _measured(parser, bench_data, "--data PATH [options]", sub_configs=False)
    parser.add_group_of_options("data")
    return run


def bench_train_command(parser: Parser) -> Callable[[Any], None]:
    """Time training steps, part by part, and the same steps by others."""
    from ddetr.bench.train import bench_train

    parser.usage = "ddetr bench train (--data PATH | --synthetic HEIGHTxWIDTH) [options of bench train and of train]"
    return _with_training_options(parser, bench_train, ["output"], {"data.path": ""})


def bench_convergence_command(parser: Parser) -> Callable[[Any], None]:
    """Train detectors side by side on the same images: how soon each reaches an AP."""
    from ddetr.bench.convergence.command import bench_convergence
    from ddetr.bench.convergence.sides import BASE, NOT_OPTIONS

    parser.usage = (
        "ddetr bench convergence --data PATH|shapes (--minutes M | --epochs N) --output FOLDER [options of bench "
        "convergence and of train]"
    )
    return _with_training_options(parser, bench_convergence, NOT_OPTIONS, BASE)


def _with_training_options(
    parser: Parser, function: Callable[..., None], skip: Sequence[str], defaults: dict[str, Any]
) -> Callable[[Any], None]:
    """A command with the options of a function and those of `ddetr train`, which the function gets as its `config`.

    skip: of the second, those that there are not, or that are the function's own.
    """
    own = set(inspect.signature(function).parameters) - {"config", "command"}
    parser.add_function_arguments(function, skip={"config", "command"})
    add_training_options(parser, skip=skip)
    parser.set_defaults(defaults)

    def run(settings: Any) -> None:
        given = vars(settings)
        config = training_config(Namespace(**{name: value for name, value in given.items() if name not in own}))
        options = {name: given[name] for name in own}
        function(config, **options, command=shlex.join(["ddetr", *sys.argv[1:]]))

    return run


def _measured(parser: Parser, function: Callable[..., Any], options: str, **how: Any) -> Callable[[Any], Any]:
    """A command whose options are those of a function, which shows and saves what it finds; its exit code."""
    parser.usage = f"{parser.prog} {options}"
    parser.add_function_arguments(function, **how)
    return lambda settings: function(**vars(settings))

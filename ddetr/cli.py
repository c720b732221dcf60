"""The command line: `ddetr COMMAND`. The signatures of the functions are the interface.

Exit codes: 0 done; 2 the input is wrong (one sentence says what); 1 the program failed; 130 interrupted.
"""

import difflib
import json
import logging
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, set_parsing_settings

from ddetr import __version__, console
from ddetr.errors import InputError

logger = logging.getLogger(__name__)


class Parser(ArgumentParser):
    """One-line errors that name the nearest option, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise InputError(_one_line(message, self._known_options()))

    def _known_options(self) -> list[str]:
        return [option for action in self._actions for option in action.option_strings if option.startswith("--")]


def _one_line(message: str, options: Sequence[str]) -> str:
    """jsonargparse's message without its echo of the whole command, with the option that was probably meant."""
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    text = " ".join(lines) if len(lines) <= 3 else " ".join(lines[:3])
    unknown = re.search(r"(?:[Uu]nrecognized arguments:|does not accept (?:option|nested key|key)|Key) '?(-{0,2}[\w.-]+)", text)
    if unknown:
        names = {option.lstrip("-"): option for option in options}
        wanted = unknown.group(1).lstrip("-")
        near = difflib.get_close_matches(wanted, names, n=1) or difflib.get_close_matches(
            wanted.split(".")[-1], [name.split(".")[-1] for name in names], n=1
        )
        if near:
            full = names.get(near[0]) or next(o for n, o in names.items() if n.split(".")[-1] == near[0])
            text += f" (did you mean {full}?)"
    return text


def train_command(parser: Parser) -> Callable[[Any], None]:
    """Train on a COCO, Pascal VOC or YOLO folder."""
    from ddetr.engine.train import DEFAULT_MODEL, train
    from ddetr.models.deformable_detr import DeformableDETR

    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win")
    parser.add_function_arguments(train, skip={"model"}, sub_configs=False)
    parser.add_class_arguments(DeformableDETR, "model", skip={"num_classes"}, instantiate=False)
    parser.set_defaults({f"model.{name}": value for name, value in DEFAULT_MODEL.items()})

    def run(settings: Any) -> None:
        arguments = dict(vars(settings))
        arguments.pop("config")
        arguments["model"] = dict(vars(arguments["model"]))
        result = train(**arguments)
        print_result(result)

    return run


def print_result(result: Any) -> None:
    """The last metrics, where everything lies, and three commands to go on with."""
    console.show(result.metrics.render())
    path, data = result.path, result.data_path
    console.show(
        f"""
checkpoint   {path / "best.pth"}
metrics      {path / "metrics.json"}, {path / "per_class.csv"}, {path / "train.csv"}, {path / "val.csv"}
curves       {path / "curves.png"}
pictures     {path / "pictures"}

What next:
  ddetr predict --checkpoint {path / "best.pth"} {result.image_example} --output predictions
  ddetr eval --checkpoint {path / "best.pth"} --data {data}
  ddetr train --config configs/cpu_small.yaml --data PATH    # COCO, Pascal VOC or YOLO: your own images"""
    )


def eval_command(parser: Parser) -> Callable[[Any], None]:
    """Measure a checkpoint on a data set with COCO's metrics."""
    from ddetr.engine.evaluate import evaluate_checkpoint

    parser.add_function_arguments(evaluate_checkpoint, sub_configs=False)

    def run(settings: Any) -> None:
        console.show(evaluate_checkpoint(**vars(settings)).render())

    return run


def predict_command(parser: Parser) -> Callable[[Any], None]:
    """Find objects in images: annotated pictures and two JSON files."""
    parser.add_argument("images", nargs="+", type=str, help="files, folders and glob patterns")
    parser.add_argument("--checkpoint", type=str, required=True, help="a published checkpoint, for instance best.pth")
    parser.add_argument("--output", type=str, required=True, help="folder for annotated/ and the JSON files")
    parser.add_argument("--threshold", type=float | None, default=None, help="least score; by default the checkpoint's own")
    parser.add_argument("--batch_size", type=int, default=1, help="images that run through the model together")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; by default a GPU if there is one")

    def run(settings: Any) -> None:
        from ddetr.predict_files import predict_files
        from ddetr.predictor import Predictor

        predictor = Predictor.from_checkpoint(settings.checkpoint, settings.device)
        with console.progress("predict") as update:
            done = predict_files(
                predictor,
                settings.images,
                settings.output,
                settings.threshold,
                batch_size=settings.batch_size,
                progress=update,
            )
        console.show(f"{done.num_detections} objects in {done.num_images} images")
        console.show(f"pictures     {Path(settings.output) / 'annotated'}")
        console.show(f"COCO results {done.predictions}")
        console.show(f"with names   {done.predictions_named}")
        for path, reason in done.failures:
            console.show(f"not read     {path}: {reason}")
        if done.failures and not done.num_images:
            raise InputError(f"none of the {len(done.failures)} images could be read")

    return run


def audit_command(parser: Parser) -> Callable[[Any], None]:
    """List what is wrong with a data set, before training finds out."""
    from ddetr.engine.config import DataConfig

    fields = {"augmentation", "image_size", "num_workers", "path"}
    parser.add_argument("path", type=str, help="folder of the data set: COCO, Pascal VOC or YOLO")
    parser.add_class_arguments(DataConfig, skip=fields, instantiate=False)
    parser.add_argument("--num_queries", type=int, default=300, help="queries of the model to be trained")
    parser.add_argument("--max_detections", type=int, default=100, help="detections an image that evaluation counts")
    parser.add_argument("--decode", type=bool, default=False, help="decode every image, to find damaged ones")
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for all findings")

    def run(settings: Any) -> None:
        from ddetr.datasets import audit
        from ddetr.engine.data import load_splits

        options = dict(vars(settings))
        extra = {name: options.pop(name) for name in ("num_queries", "max_detections", "decode", "output")}
        data = DataConfig(**options)
        train, val = load_splits(data)
        with console.progress("decode") as update:
            report = audit(
                train,
                val,
                num_queries=extra["num_queries"],
                max_detections=extra["max_detections"],
                decode=extra["decode"],
                strict=data.strict,
                progress=update,
            )
        console.show(report.render())
        if extra["output"]:
            Path(extra["output"]).write_text(json.dumps(report.to_dict(), indent=1) + "\n")
        if report.refused:
            raise InputError(f"{len(report.refused)} findings must be mended before training, see the table above")

    return run


def demo_command(parser: Parser) -> Callable[[Any], None]:
    """Train a small detector on drawn shapes, in minutes on a CPU."""
    from ddetr.demo import demo

    parser.add_function_arguments(demo)
    return lambda settings: print_result(demo(**vars(settings)))


COMMANDS: dict[str, Callable[[Parser], Callable[[Any], None]]] = {
    "demo": demo_command,
    "train": train_command,
    "eval": eval_command,
    "predict": predict_command,
    "data audit": audit_command,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    console.set_up_logging()
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    try:
        _dispatch(arguments)
    except InputError as error:
        console.err.print(f"ddetr: error: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    except KeyboardInterrupt:
        console.err.print("ddetr: interrupted")
        return 130
    return 0


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        console.show(_overview())
        return
    if arguments[0] == "--version":
        console.show(f"ddetr {__version__}")
        return
    name = next((n for n in (" ".join(arguments[:2]), arguments[0]) if n in COMMANDS), None)
    if name is None:
        if arguments[0] == "data":
            raise InputError("ddetr data: expected a command, one of: audit")
        near = difflib.get_close_matches(arguments[0], COMMANDS, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"no command {arguments[0]!r}{hint}: expected one of {', '.join(COMMANDS)}")
    command = COMMANDS[name]
    parser = Parser(prog=f"ddetr {name}", description=command.__doc__, allow_abbrev=False)
    run = command(parser)
    settings = parser.parse_args(_normalised(arguments[len(name.split()) :]))
    run(parser.instantiate_classes(settings))


def _normalised(arguments: Sequence[str]) -> list[str]:
    """--batch-size is --batch_size, --data PATH is --data.path PATH, and --resume alone is --resume auto."""
    out: list[str] = []
    for i, argument in enumerate(arguments):
        if re.match(r"--[a-zA-Z]", argument):
            name, equals, value = argument.partition("=")
            name = name.replace("-", "_").replace("__", "--", 1)
            name = "--data.path" if name == "--data" else name
            out.append(name + equals + value)
            is_last = i + 1 == len(arguments) or arguments[i + 1].startswith("--")
            if name == "--resume" and not equals and is_last:
                out.append("auto")
        else:
            out.append(argument)
    return out


def _overview() -> str:
    lines = ["usage: ddetr COMMAND [options]; ddetr COMMAND --help lists the options of a command", ""]
    lines += [f"  {name:<12} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version    the version of ddetr"])


if __name__ == "__main__":
    sys.exit(main())

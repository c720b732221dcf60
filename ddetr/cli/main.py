"""The command line: `ddetr COMMAND`. The signatures of the functions are the interface.

Exit codes: 0 done; 2 the input is wrong (one sentence says what); 1 the program failed; 130 interrupted; those of
`ddetr doctor` are in ddetr/doctor/causes.py.
"""

import errno
import inspect
import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ddetr import __version__, console
from ddetr.cli.parser import Parser
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.wording import did_you_mean


def train_command(parser: Parser) -> Callable[[Any], None]:
    """Train on a data set as it lies there: COCO, Pascal VOC, YOLO and others."""
    parser.usage = "ddetr train --data PATH [options]"
    add_training_options(parser)

    def run(settings: Any) -> None:
        existing(settings.data.path)  # before the ten seconds that it takes to import what trains
        from ddetr.engine.train import train
        from ddetr.runtime.distributed import is_first_process

        result = train(training_config(settings))
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

        preflight(training_config(settings))

    return run


def add_training_options(parser: Parser, *, skip: Sequence[str] = ()) -> None:
    """The fields of `TrainConfig`, with the constructor of `DeformableDETR` for its model; and --config."""
    from ddetr.engine.config import DEFAULT_MODEL, TrainConfig
    from ddetr.models.deformable_detr import DeformableDETR

    parser.add_argument("--config", action="config", help="YAML file with any of the options below; later ones win")
    parser.add_class_arguments(TrainConfig, skip={"model", *skip}, sub_configs=False)
    parser.add_class_arguments(DeformableDETR, "model", skip={"num_classes"}, instantiate=False)
    parser.add_group_of_options("data", "loss", "optim", "model")
    parser.set_defaults({f"model.{name}": value for name, value in DEFAULT_MODEL.items()})


def training_config(settings: Any) -> Any:
    """What was read by `add_training_options` -> `TrainConfig`; options of others are left alone."""
    from dataclasses import fields

    from ddetr.engine.config import TrainConfig

    given = vars(settings)
    return TrainConfig(
        **{f.name: given[f.name] for f in fields(TrainConfig) if f.name in given} | {"model": vars(given["model"])}
    )


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


def eval_command(parser: Parser) -> Callable[[Any], None]:
    """Measure a checkpoint on a data set with COCO's metrics."""
    from ddetr.inference.evaluate_checkpoint import evaluate_checkpoint

    parser.usage = "ddetr eval --checkpoint FILE --data PATH [options]"
    parser.add_function_arguments(evaluate_checkpoint, sub_configs=False)
    parser.add_group_of_options("data")
    return lambda settings: console.show(evaluate_checkpoint(**vars(settings)).render())


def predict_command(parser: Parser) -> Callable[[Any], None]:
    """Find objects in images: annotated pictures and two JSON files."""
    parser.usage = "ddetr predict --checkpoint FILE --output FOLDER [options] IMAGES..."
    parser.add_argument("images", nargs="+", type=str, help="files, folders and glob patterns")
    parser.add_argument("--checkpoint", type=str, required=True, help="a published checkpoint, for instance best.pth")
    parser.add_argument("--output", type=str, required=True, help="folder for annotated/ and the JSON files")
    parser.add_argument(
        "--threshold", type=float | None, default=None, help="least score; by default the checkpoint's own"
    )
    parser.add_argument("--batch_size", type=int, default=1, help="images that run through the model together")
    parser.add_argument("--device", type=str | None, default=None, help="cpu or cuda; by default a GPU if there is one")
    parser.add_argument(
        "--optimize",
        type=Literal["float32", "bfloat16", "compile"] | None,
        default=None,
        help="faster: float32 (the same but for rounding; what --optimize alone means), bfloat16, or compile: bfloat16 "
        "through torch.compile, a minute slower at first and for each new image size",
    )

    def run(settings: Any) -> None:
        from ddetr.inference.files import predict_files
        from ddetr.inference.predictor import Predictor
        from ddetr.runtime.allocator import keep_freed_memory

        predictor = Predictor.from_checkpoint(settings.checkpoint, settings.device, optimize=settings.optimize or False)
        if settings.optimize and predictor.device.type == "cpu":
            keep_freed_memory()
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


def report_command(parser: Parser) -> Callable[[Any], None]:
    """Show a run: one HTML file, made anew from its folder."""
    parser.usage = "ddetr report [options] RUN"
    parser.add_argument("run", type=str, help="run folder, also of an unfinished run or of an older version")
    parser.add_argument(
        "--images",
        type=str | None,
        default=None,
        metavar="FOLDER",
        help="also show the validation's images that lie in this folder. Your own runs need no FOLDER; a run folder "
        "from someone else, another machine or an older version could name any picture on this machine",
    )

    def run(settings: Any) -> None:
        from ddetr.report import RunFiles, write_report

        images = None if settings.images is None else Path(settings.images)
        if images is not None and not images.is_dir():
            raise InputError(f"--images: expected a folder of images, but {images} is none")
        files = RunFiles.read(Path(settings.run), images)
        try:
            path = write_report(files)
        except OSError as error:
            raise InputError(f"the report cannot be written into {files.path} ({error.strerror or error})") from error
        console.show(f"report       {path}")
        for name, reason in files.missing:
            console.show(f"left out     {name} {reason}")

    return run


def audit_command(parser: Parser) -> Callable[[Any], None]:
    """List what is wrong with a data set, before training finds out."""
    from ddetr.datasets.config import TrainingSource

    parser.usage = "ddetr data audit [options] PATH"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_class_arguments(TrainingSource, skip={"path"}, instantiate=False)
    parser.add_argument("--num_queries", type=int, default=300, help="queries of the model to be trained")
    parser.add_argument("--max_detections", type=int, default=100, help="detections per image that evaluation counts")
    parser.add_argument(
        "--decode",
        type=bool | Literal["auto"],
        default="auto",
        help="decode images, to find damaged ones: auto up to 4,000 of a split, for a minute; true all; false none",
    )
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for all findings")

    def run(settings: Any) -> None:
        from ddetr.datasets import audit
        from ddetr.datasets.image_files import reading_on_screen
        from ddetr.datasets.splits import load_splits
        from ddetr.files import make_folder, write_text

        options = dict(vars(settings))
        extra = {name: options.pop(name) for name in ("num_queries", "max_detections", "decode")}
        output, data = options.pop("output"), TrainingSource(**options)
        with reading_on_screen(data.path):
            train, val = load_splits(data)
        with console.reading(f"decoding images of {data.path}", "images") as update:
            report = audit(train, val, **extra, strict=data.strict, progress=update)
        console.show(report.render())
        if output:
            file = Path(output)
            write_text(make_folder(file.parent, "--output") / file.name, json.dumps(report.to_dict(), indent=1) + "\n")
        if report.refused:
            number = sum(finding.count for finding in report.refused)  # as the table's last line has it
            things = "1 thing" if number == 1 else f"{number:,} things"
            raise InputError(f"{things} must be repaired before training, see the table above")

    return run


def show_command(parser: Parser) -> Callable[[Any], None]:
    """Look at a data set before training: one HTML file, augmentation included."""
    from dataclasses import fields

    from ddetr.datasets.config import SEEN_NOWHERE, DataConfig, PageConfig

    parser.usage = "ddetr data show [options] PATH"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_class_arguments(DataConfig, skip={"path", *SEEN_NOWHERE}, instantiate=False)
    parser.add_class_arguments(PageConfig, instantiate=False)
    parser.add_argument("--output", type=str, default="data.html", metavar="FILE", help="the page")

    def run(settings: Any) -> None:
        given = dict(vars(settings))
        output = given.pop("output")
        page = PageConfig(**{field.name: given.pop(field.name) for field in fields(PageConfig)})
        data = DataConfig(**given)
        place, root = Path(output).expanduser(), existing(data.path)
        root = root if root.is_dir() else root.parent
        if output == parser.get_default("output") and Path.cwd().resolve().is_relative_to(root.resolve()):
            raise InputError(f"{output} would lie among the data, in {root.resolve()}: say where to by --output FILE")
        from ddetr.datasets.image_files import reading_on_screen
        from ddetr.datasets.splits import load_splits
        from ddetr.files import make_folder
        from ddetr.report.data_page import check_place, write_data_page

        check_place(place)
        with reading_on_screen(data.path):
            train, val = load_splits(data)
        place = make_folder(place.parent, "--output") / place.name
        with console.progress("draw") as update:
            failures = write_data_page(place, train, val, data, page, update)
        console.show(f"page         {place.absolute()}")
        for name, reason in failures:
            console.show(f"not read     {name}: {reason}")

    return run


def convert_command(parser: Parser) -> Callable[[Any], None]:
    """Write a data set anew as COCO, YOLO or Pascal VOC."""
    from ddetr.datasets.config import TrainingSource

    parser.usage = "ddetr data convert [options] PATH OUT --to FORMAT"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_argument("output", type=str, help="new or empty folder", metavar="OUT")
    parser.add_argument("--to", type=Literal["coco", "yolo", "voc"], required=True, help="format to write")
    parser.add_argument("--split", type=str | None, default=None, help="the one split to convert; by default all")
    parser.add_argument(
        "--images",
        type=Literal["copy", "link"],
        default="copy",
        help="link: hard links where the disk is the same; they take no space, but editing one edits the original too",
    )
    parser.add_class_arguments(TrainingSource, skip={"path"}, instantiate=False)

    def run(settings: Any) -> None:
        from ddetr.datasets import audit
        from ddetr.datasets.audit import render_findings
        from ddetr.datasets.convert import convert, read_source
        from ddetr.datasets.image_files import reading_on_screen

        options = dict(vars(settings))
        to, output, split, images = (options.pop(name) for name in ("to", "output", "split", "images"))
        data = TrainingSource(**options)
        with reading_on_screen(data.path):
            source = read_source(data, split)
        report = audit(source.first, source.splits.get(source.val or ""), strict=data.strict)
        others = [f for name in source.others for f in source.splits[name].findings]
        console.show(report.render())
        if others:
            console.show(render_findings(others))
        actions = ("refused", "repaired", "dropped") if data.strict else ("refused",)
        if refused := [*report.refused, *(finding for finding in others if finding.action in actions)]:
            raise InputError(
                f"{len(refused)} findings must be repaired first, see the table above; nothing was written"
            )
        with console.progress("write") as update:
            done = convert(source, output, to, images=images, progress=update)
        for name, count in done.num_images.items():
            console.show(f"{name:<12} {count:,} images")
        console.show(f"{'in all':<12} {done.num_objects:,} objects in {done.path}")
        for note in done.notes:
            console.show(f"changed      {note}")

    return run


def demo_command(parser: Parser) -> Callable[[Any], None]:
    """Train a small detector on drawn shapes, in minutes on a CPU."""
    from ddetr.demo import demo

    parser.usage = "ddetr demo [options]"
    parser.add_function_arguments(demo)
    return lambda settings: print_result(demo(**vars(settings)))


def bench_op_command(parser: Parser) -> Callable[[Any], None]:
    """Time the operator against other implementations, on this machine."""
    from ddetr.bench.op import bench_op

    parser.usage = "ddetr bench op [options]"
    parser.add_function_arguments(bench_op)

    def run(settings: Any) -> None:
        bench_op(**vars(settings))

    return run


def bench_gpu_command(parser: Parser) -> Callable[[Any], int]:
    """Prove and measure everything on a GPU, in minutes and without a network."""
    from ddetr.bench.gpu.command import bench_gpu

    parser.usage = "ddetr bench gpu --output FOLDER [options]"
    parser.add_function_arguments(bench_gpu)
    return lambda settings: bench_gpu(**vars(settings))


def bench_inference_command(parser: Parser) -> Callable[[Any], None]:
    """Time the whole detector on a CPU, beside transformers' with the same weights."""
    from ddetr.bench.inference import bench_inference

    parser.usage = "ddetr bench inference [options]"
    parser.add_function_arguments(bench_inference)

    def run(settings: Any) -> None:
        bench_inference(**vars(settings))

    return run


def bench_evaluation_command(parser: Parser) -> Callable[[Any], None]:
    """Time COCO's evaluation by each library that is installed."""
    from ddetr.bench.evaluation import bench_evaluation

    parser.usage = "ddetr bench evaluation [options]"
    parser.add_function_arguments(bench_evaluation)

    def run(settings: Any) -> None:
        bench_evaluation(**vars(settings))

    return run


def bench_matcher_command(parser: Parser) -> Callable[[Any], None]:
    """Time the matching of a training step, beside the official formulation."""
    from ddetr.bench.matcher import bench_matcher

    parser.usage = "ddetr bench matcher [options]"
    parser.add_function_arguments(bench_matcher)

    def run(settings: Any) -> None:
        bench_matcher(**vars(settings))

    return run


def replay_command(parser: Parser) -> Callable[[Any], None]:
    """Compute a failed training step again, from the bundle that it left."""
    from ddetr.engine.blackbox.replay import replay

    parser.usage = "ddetr replay [options] BUNDLE"
    parser.add_argument("bundle", type=str, help="folder of the failed step: RUN/blackbox/step-000123")
    parser.add_function_arguments(replay, skip={"bundle"})
    return lambda settings: console.show(replay(**vars(settings)).render())


def bench_data_command(parser: Parser) -> Callable[[Any], None]:
    """Time the training loader beside the plain Pillow recipe."""
    from ddetr.bench.data import bench_data

    parser.usage = "ddetr bench data --data PATH [options]"
    parser.add_function_arguments(bench_data, sub_configs=False)
    parser.add_group_of_options("data")

    def run(settings: Any) -> None:
        bench_data(**vars(settings))

    return run


def bench_train_command(parser: Parser) -> Callable[[Any], None]:
    """Time training steps, part by part, and the same steps by others."""
    from ddetr.bench.train import bench_train

    parser.usage = "ddetr bench train (--data PATH | --synthetic HEIGHTxWIDTH) [options of bench train and of train]"
    parser.add_function_arguments(bench_train, skip={"config", "command"})
    add_training_options(parser, skip=["output"])
    parser.set_defaults({"data.path": ""})
    own = set(inspect.signature(bench_train).parameters) - {"config", "command"}

    def run(settings: Any) -> None:
        options = {name: value for name, value in vars(settings).items() if name in own}
        bench_train(training_config(settings), **options, command=shlex.join(["ddetr", *sys.argv[1:]]))

    return run


def doctor_command(parser: Parser) -> Callable[[Any], int]:
    """Tell whether this machine, its GPUs and its PyTorch truly work."""
    from ddetr.doctor.causes import table
    from ddetr.doctor.diagnosis import examine

    parser.usage = "ddetr doctor [options]"
    parser.add_function_arguments(examine, skip={"compute"})
    parser.add_argument("--json", type=bool, default=False, help="all that was found, for programs")
    parser.add_argument(
        "--brief", type=bool, default=False, help="only what is not well, and nothing computed: for the head of a log"
    )
    parser.after_help = f"exit codes (the lowest of those that apply):\n{table()}"

    def run(settings: Any) -> int:
        from ddetr.doctor.rendering import shown

        options = dict(vars(settings))
        as_json, brief = options.pop("json"), options.pop("brief")
        with console.waiting("looking at this machine, then computing on it"):
            diagnosis = examine(**options, compute=not brief)
        for renderable in shown(diagnosis, as_json=as_json, brief=brief, terminal=console.is_terminal()):
            console.show(renderable)
        return diagnosis.exit_code

    return run


COMMANDS: dict[str, Callable[[Parser], Callable[[Any], int | None]]] = {
    "demo": demo_command,
    "train": train_command,
    "preflight": preflight_command,
    "eval": eval_command,
    "predict": predict_command,
    "replay": replay_command,
    "report": report_command,
    "doctor": doctor_command,
    "data audit": audit_command,
    "data show": show_command,
    "data convert": convert_command,
    "bench op": bench_op_command,
    "bench gpu": bench_gpu_command,
    "bench data": bench_data_command,
    "bench train": bench_train_command,
    "bench inference": bench_inference_command,
    "bench evaluation": bench_evaluation_command,
    "bench matcher": bench_matcher_command,
}


# What is wrong with a disk, not with the program.
_OF_THE_MACHINE = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENXIO, errno.ENODEV),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENAMETOOLONG, errno.ENOTCONN, errno.ETIMEDOUT),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # Read by the OpenMP library that PyTorch loads: idle threads soon sleep. By default they spin for milliseconds, and
    # a second busy program on the machine makes training on a few cores up to ten times slower.
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    console.set_up_logging()
    try:
        return parse(arguments)() or 0
    except InputError as error:
        console.show_error(f"ddetr: error: {error}")
        return 2
    except (ChildProcessError, FloatingPointError) as error:  # a process that died; a run that diverged
        console.show_error(f"ddetr: error: {error}")
        return 1
    except OSError as error:
        if error.errno not in _OF_THE_MACHINE:
            raise
        where = f"{error.filename}: " if error.filename else ""
        console.show_error(f"ddetr: error: {where}{error.strerror}")
        return 1
    except KeyboardInterrupt:
        console.show_error("ddetr: interrupted")
        return 130


def parse(arguments: Sequence[str]) -> Callable[[], int | None]:
    """The checked command line as something to call; `--help` of a command exits instead.

    Raises:
        InputError: no such command, or options that it does not have.
    """
    if not arguments or arguments[0] in ("-h", "--help"):
        return lambda: console.show(_overview())
    if arguments[0] == "--version":
        return lambda: console.show(f"ddetr {__version__}")
    name = next((n for n in (" ".join(arguments[:2]), arguments[0]) if n in COMMANDS), None)
    if name is None:
        if group := [n.split()[1] for n in COMMANDS if n.startswith(f"{arguments[0]} ")]:
            raise InputError(f"ddetr {arguments[0]}: expected a command, one of: {', '.join(group)}")
        raise InputError(
            f"no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}: expected one of {', '.join(COMMANDS)}"
        )
    parser = Parser(name, COMMANDS[name].__doc__)
    run = COMMANDS[name](parser)
    return partial(run, parser.read(arguments[len(name.split()) :]))


def _overview() -> str:
    lines = ["usage: ddetr COMMAND [options]; ddetr COMMAND --help lists the options of a command", ""]
    lines += [f"  {name:<18} {command.__doc__}" for name, command in COMMANDS.items()]
    return "\n".join([*lines, "", "  --version          the version of ddetr"])


if __name__ == "__main__":
    sys.exit(main())

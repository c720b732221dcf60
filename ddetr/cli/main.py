"""The command line: `ddetr COMMAND`. The signatures of the functions are the interface.

Exit codes: 0 done; 2 the input is wrong (one sentence says what); 1 the program failed; 130 interrupted; those of
`ddetr doctor` are in ddetr/doctor/causes.py.
"""

import errno
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ddetr import __version__, console
from ddetr.cli import bench, data, weights
from ddetr.cli.parser import Parser
from ddetr.cli.training import demo_command, preflight_command, train_command
from ddetr.errors import InputError
from ddetr.files import existing
from ddetr.wording import did_you_mean


def eval_command(parser: Parser) -> Callable[[Any], None]:
    """Measure a checkpoint on a data set with COCO's metrics."""
    from ddetr.inference.evaluate_checkpoint import evaluate_checkpoint

    parser.usage = "ddetr eval (--checkpoint FILE | --weights NAME) --data PATH [options]"
    weights.add_source_options(parser)
    parser.add_function_arguments(evaluate_checkpoint, skip={"checkpoint"}, sub_configs=False)
    parser.add_group_of_options("data")

    def run(settings: Any) -> None:
        options = dict(vars(settings))
        existing(options["data"].path)  # before a download
        checkpoint = weights.chosen_source("eval", options.pop("checkpoint"), options.pop("weights"))
        console.show(evaluate_checkpoint(checkpoint, **options).render())

    return run


def predict_command(parser: Parser) -> Callable[[Any], None]:
    """Find objects in images: annotated pictures and two JSON files."""
    parser.usage = "ddetr predict (--checkpoint FILE | --weights NAME) --output FOLDER [options] IMAGES..."
    parser.add_argument("images", nargs="+", type=str, help="files, folders and glob patterns")
    weights.add_source_options(parser)
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
    parser.add_argument(
        "--num_queries",
        type=int | None,
        default=None,
        help="of a two-stage network, how many it works with: more for crowded images, fewer for speed; by default as "
        "it was trained",
    )
    parser.add_argument(
        "--query_selection",
        type=Literal["topk", "peaks", "distinct"] | None,
        default=None,
        help="of a two-stage network, how it chooses them: the best proposals (topk), peaks or distinct ones first; by "
        "default as it was trained",
    )

    def run(settings: Any) -> None:
        checkpoint = weights.chosen_source("predict", settings.checkpoint, settings.weights)
        from ddetr.inference.files import predict_files
        from ddetr.inference.predictor import Predictor
        from ddetr.runtime.allocator import keep_freed_memory

        predictor = Predictor.from_checkpoint(
            checkpoint,
            settings.device,
            num_queries=settings.num_queries,
            query_selection=settings.query_selection,
            optimize=settings.optimize or False,
        )
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


def replay_command(parser: Parser) -> Callable[[Any], None]:
    """Compute a failed training step again, from the bundle that it left."""
    from ddetr.engine.blackbox.replay import replay

    parser.usage = "ddetr replay [options] BUNDLE"
    parser.add_argument("bundle", type=str, help="folder of the failed step: RUN/blackbox/step-000123")
    parser.add_function_arguments(replay, skip={"bundle"})
    return lambda settings: console.show(replay(**vars(settings)).render())


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
    "data audit": data.audit_command,
    "data show": data.show_command,
    "data convert": data.convert_command,
    "weights show": weights.show_command,
    "weights list": weights.list_command,
    "weights push": weights.push_command,
    "weights convert": weights.convert_command,
    "bench op": bench.bench_op_command,
    "bench gpu": bench.bench_gpu_command,
    "bench data": bench.bench_data_command,
    "bench train": bench.bench_train_command,
    "bench convergence": bench.bench_convergence_command,
    "bench inference": bench.bench_inference_command,
    "bench evaluation": bench.bench_evaluation_command,
    "bench matcher": bench.bench_matcher_command,
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
            if arguments[1:2] in (["-h"], ["--help"]):
                return lambda: console.show(_overview(f"{arguments[0]} "))
            raise InputError(f"ddetr {arguments[0]}: expected a command, one of: {', '.join(group)}")
        raise InputError(
            f"no command {arguments[0]!r}{did_you_mean(arguments[0], COMMANDS)}: expected one of {', '.join(COMMANDS)}"
        )
    parser = Parser(name, COMMANDS[name].__doc__)
    run = COMMANDS[name](parser)
    return partial(run, parser.read(arguments[len(name.split()) :]))


def _overview(group: str = "") -> str:
    """The commands whose names begin so."""
    lines = [f"usage: ddetr {group}COMMAND [options]; ddetr {group}COMMAND --help lists the options of a command", ""]
    lines += [f"  {name:<18} {command.__doc__}" for name, command in COMMANDS.items() if name.startswith(group)]
    return "\n".join(lines if group else [*lines, "", "  --version          the version of ddetr"])


if __name__ == "__main__":
    sys.exit(main())

"""The commands `ddetr weights ...`: what files of weights hold, where they come from, and where they go."""

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ddetr import console
from ddetr.cli.parser import Parser
from ddetr.errors import InputError
from ddetr.wording import aligned


def add_source_options(parser: Parser) -> None:
    """--checkpoint and --weights, one of which `chosen_source` takes."""
    parser.add_argument(
        "--checkpoint",
        type=str | None,
        default=None,
        help="a published checkpoint, for instance best.pth; or trained weights of another project",
    )
    parser.add_argument(
        "--weights",
        type=str | None,
        default=None,
        help="or trained weights by a name of `ddetr weights list`, a hub id (org/name), an https address or a file",
    )


def chosen_source(command: str, checkpoint: str | None, weights: str | None) -> str:
    """The file or folder that one of the two options means, downloaded where it is not here."""
    if (checkpoint is None) == (weights is None):
        given = "neither" if checkpoint is None else "both"
        raise InputError(
            f"ddetr {command} needs --checkpoint FILE or --weights NAME, got {given}; ddetr {command} --help lists all "
            "options"
        )
    if weights is None:
        return str(checkpoint)
    from ddetr.weight_files.sources import find_weights

    return str(find_weights(weights))


def show_command(parser: Parser) -> Callable[[Any], None]:
    """Tell what a file of trained weights is, whoever wrote it."""
    parser.usage = "ddetr weights show [options] SOURCE"
    parser.add_argument(
        "source",
        type=str,
        help="file or folder of weights of any project; or a name, a hub id or an https address",
    )
    parser.add_argument("--json", type=bool, default=False, help="all that was found, for programs")

    def run(settings: Any) -> None:
        from ddetr.checkpoint.description import describe
        from ddetr.weight_files.sources import find_weights

        found = describe(find_weights(settings.source))
        console.show(json.dumps(found.to_dict(), indent=1, allow_nan=False) if settings.json else found.render())

    return run


def list_command(parser: Parser) -> Callable[[Any], None]:
    """List the trained detectors that --weights knows by a name."""
    parser.usage = "ddetr weights list [--json]"
    parser.add_argument("--json", type=bool, default=False, help="all that is known of them, for programs")

    def run(settings: Any) -> None:
        from ddetr.weight_files.catalogue import catalogue
        from ddetr.weight_files.sources import is_cached

        entries = [asdict(entry) | {"cached": is_cached(entry)} for entry in catalogue().values()]
        if settings.json:
            console.show(json.dumps(entries, indent=1))
            return
        rows = [("name", "AP", "classes", "MB", "licence", "here", "from")]
        for entry in entries:
            ap, size = ("-" if entry[key] is None else str(entry[key]) for key in ("ap", "size_mb"))
            here = "yes" if entry["cached"] else "-"
            rows.append(
                (entry["name"], ap, entry["classes"], size, entry["licence"] or "-", here, _owner(entry["address"]))
            )
        for line in aligned(rows):
            console.show(line)
        console.show("\nAP on COCO val2017 as its authors have it; - is not known; --json has addresses and notes")

    return run


def _owner(address: str) -> str:
    """ "hf://SenseTime/deformable-detr" -> "hub: SenseTime"; of an address at GitHub its owner, of others the host."""
    scheme, _, place = address.partition("://")
    host, owner = place.split("/")[:2]
    if scheme == "hf":
        return f"hub: {host}"
    return f"github: {owner}" if host == "github.com" else host


def convert_command(parser: Parser) -> Callable[[Any], None]:
    """Write trained weights for another project, or as a file of ours."""
    parser.usage = "ddetr weights convert [options] IN OUT --format FORMAT"
    parser.add_argument(
        "source", type=str, help="a checkpoint, or any weights that `ddetr weights show` knows", metavar="IN"
    )
    parser.add_argument("output", type=str, help="new file; for transformers a new folder", metavar="OUT")
    parser.add_argument(
        "--format",
        type=Literal["ours", "official", "transformers", "detrex"],
        required=True,
        help="ours (.pth or .safetensors), official (fundamentalvision's main.py --resume), transformers "
        "(AutoModelForObjectDetection and AutoImageProcessor), detrex (train.init_checkpoint)",
    )
    parser.add_argument("--overwrite", type=bool, default=False, help="replace OUT where it is there")

    def run(settings: Any) -> None:
        from ddetr.checkpoint import convert_checkpoint, read_detector
        from ddetr.weight_files.sources import find_weights

        checkpoint = read_detector(find_weights(settings.source))
        done = convert_checkpoint(checkpoint, settings.output, settings.format, overwrite=settings.overwrite)
        console.show(f"written      {done.path} ({done.num_bytes / 1e6:,.1f} MB)")
        console.show(f"read back    {done.num_tensors} tensors, the same bit for bit")
        for word, sentence in done.notes:
            console.show(f"{word:<12} {sentence}")

    return run


def push_command(parser: Parser) -> Callable[[Any], None]:
    """Publish a run on the Hugging Face hub, with a model card."""
    parser.usage = "ddetr weights push --license NAME [options] RUN REPO"
    parser.add_argument("run", type=str, help="run folder")
    parser.add_argument("repo", type=str, help="repository on the hub, ORG/NAME; made where it is not there")
    parser.add_argument(
        "--license", type=str, required=True, help="what others may do with it: apache-2.0, cc-by-4.0, other, ..."
    )
    parser.add_argument("--private", type=bool, default=False, help="nobody but you sees it")
    parser.add_argument("--revision", type=str | None, default=None, help="branch; by default main")
    parser.add_argument("--pictures", type=bool, default=False, help="show the run's pictures of validation images")
    parser.add_argument(
        "--output", type=str | None, default=None, metavar="FOLDER", help="write it there, and upload nothing"
    )
    parser.add_argument(
        "--dry_run",
        type=bool,
        default=False,
        help="upload nothing: the same as --output with the name of the repository",
    )

    def run(settings: Any) -> None:
        from ddetr.report.card.release import write_release
        from ddetr.weight_files.hub import check_repository, upload

        check_repository(settings.repo)
        path, options = Path(settings.run), {"pictures": settings.pictures}
        if settings.dry_run or settings.output is not None:
            folder = Path(settings.output or settings.repo.rpartition("/")[2])
            _show_files(write_release(path, folder, settings.repo, settings.license, **options), settings.pictures)
            console.show(f"nothing was uploaded; the files are in {folder}")
            return
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "release"
            _show_files(write_release(path, folder, settings.repo, settings.license, **options), settings.pictures)
            commit = upload(folder, settings.repo, private=settings.private, revision=settings.revision)
        console.show(f"uploaded     {commit}")
        at = f"@{settings.revision}" if settings.revision else ""
        console.show(f"use it by    ddetr predict --weights {settings.repo}{at} --output predictions IMAGES")

    return run


def _show_files(files: list[Path], pictures: bool) -> None:
    for file in files:
        console.show(f"{file.name:<26} {file.stat().st_size / 1e6:10,.2f} MB")
    if not pictures:
        console.show("images of the validation are not among them (--pictures shows them)")

"""The commands `ddetr weights ...`: what files of weights hold, where they come from, and where they go."""

from collections.abc import Callable
from typing import Any, Literal

from ddetr import console
from ddetr.cli.parser import Parser


def convert_command(parser: Parser) -> Callable[[Any], None]:
    """Write trained weights for another project, or as a file of ours."""
    parser.usage = "ddetr weights convert [options] IN OUT --format FORMAT"
    parser.add_argument("source", type=str, help="trained weights", metavar="IN")
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
        from ddetr.checkpoint import convert_checkpoint, load_checkpoint

        checkpoint = load_checkpoint(settings.source)
        done = convert_checkpoint(checkpoint, settings.output, settings.format, overwrite=settings.overwrite)
        console.show(f"written      {done.path} ({done.num_bytes / 1e6:,.1f} MB)")
        console.show(f"read back    {done.num_tensors} tensors, the same bit for bit")
        for word, sentence in done.notes:
            console.show(f"{word:<12} {sentence}")

    return run

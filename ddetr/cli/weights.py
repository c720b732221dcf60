"""The commands `ddetr weights ...`: what files of weights hold, where they come from, and where they go."""

import json
from collections.abc import Callable
from typing import Any

from ddetr import console
from ddetr.cli.parser import Parser


def show_command(parser: Parser) -> Callable[[Any], None]:
    """Tell what a file of trained weights is, whoever wrote it."""
    parser.usage = "ddetr weights show [options] FILE"
    parser.add_argument("file", type=str, help="file or folder of weights: ddetr, official, transformers, detrex, ...")
    parser.add_argument("--json", type=bool, default=False, help="all that was found, for programs")

    def run(settings: Any) -> None:
        from ddetr.checkpoint.description import describe

        found = describe(settings.file)
        console.show(json.dumps(found.to_dict(), indent=1, allow_nan=False) if settings.json else found.render())

    return run

"""The stages of `ddetr bench gpu` in the order of their worth, and the process of one: `python -m
ddetr.bench.gpu.stages NAME JSON`."""

import importlib
import json
import logging
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddetr import console
from ddetr.bench import record
from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.sides import reason_of
from ddetr.runtime.allocator import use_expandable_segments

logger = logging.getLogger(__name__)

SECONDS_TO_END = 3  # before its time is up a stage should have come to its end by itself


class Stage(NamedTuple):
    """A function `run(sheet, place)` of a module of this package."""

    module: str
    seconds: int  # of nine minutes
    what: str
    on_cpu: Mapping[str, str] = {}  # environment of a rehearsal


STAGES = {
    "checks": Stage("checks", 75, "Is everything right?"),
    "operator": Stage("operator", 80, "The operator, beside others"),
    "sweep": Stage("sweep", 60, "The kernels' own choices", {"TRITON_INTERPRET": "1"}),
    "network": Stage("network", 75, "The whole detector, beside transformers"),
    "training": Stage("training", 80, "The training step, beside transformers and the official recipe"),
    "runs": Stage("runs", 100, "Real training: killed, starved, poisoned"),
    "tests": Stage("marked", 70, "The tests marked gpu"),
}


def main(name: str, order: dict[str, Any]) -> None:
    """One stage: its sheet is in the file after every entry, whatever becomes of the process."""
    console.set_up_logging()
    given = order["place"]
    place = Place(**given | {"device": torch.device(given["device"]), "scratch": Path(given["scratch"])})
    left = order["ends"] - time.time() - SECONDS_TO_END
    sheet = Sheet(name, Path(order["file"]), time.monotonic() + left)
    sheet.save()
    try:
        if place.on_gpu:
            _grow_segments(place.device)
        sheet.data["machine"] = record.machine(place.device)
        importlib.import_module(f"ddetr.bench.gpu.{STAGES[name].module}").run(sheet, place)
        sheet.state = "done" if sheet.checks or sheet.tables or sheet.lines else "skipped"
        sheet.reason = "" if sheet.state == "done" else "; ".join(why for _, why in sheet.skipped)
    except Exception as error:  # it is told where the figures are told
        logger.exception("%s", name)
        sheet.state, sheet.reason = "failed", reason_of(error)
    sheet.save()


def _grow_segments(device: torch.device) -> None:
    """As `ddetr train` does, before CUDA starts; where the machine can't, every allocation would fail."""
    if not use_expandable_segments():
        return
    try:
        torch.empty(1, device=device)
    except RuntimeError as error:
        logger.warning("expandable segments do not work here: %s", error)
        os.environ.pop("PYTORCH_ALLOC_CONF", None)
        os.environ.pop("PYTORCH_CUDA_ALLOC_CONF", None)
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")


if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "2000")
    main(sys.argv[1], json.loads(sys.argv[2]))

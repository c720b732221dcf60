"""CONTRIBUTING.md walks a training image from its file to the loss: these files run, and no others."""

import re
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import ddetr
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import TrainConfig
from ddetr.engine.prepare import prepare
from ddetr.engine.step import step_losses
from ddetr.engine.train import build

PACKAGE = Path(ddetr.__file__).parent
# What several of them call for a detail, and what one need not read to follow the image.
DETAILS = {
    "engine/loading/data_wait.py",
    "boxes.py",
    "padding.py",
    "untrusted.py",
    "runtime/transfer.py",
    "datasets/annotations.py",
    "datasets/image_header.py",
    "engine/loading/workers.py",
}
MOST_FILES = 18


def test_the_walk_of_a_training_image(shapes: Path, tiny_model: dict[str, Any], tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[1] / "CONTRIBUTING.md").read_text(encoding="utf-8")
    section = text.partition("## The walk of a training image")[2].partition("\n## ")[0]
    listed = re.findall(r"^\| `ddetr/(\S+\.py)`", section, re.MULTILINE)
    assert 0 < len(listed) <= MOST_FILES
    config = TrainConfig(
        DataConfig(str(shapes), image_size=64, num_workers=0),
        tiny_model,
        batch_size=4,
        output=str(tmp_path / "run"),
        device="cpu",
    )
    built = build(prepare(config))
    built.data.trainer = type("One", (), {"world_size": 1, "global_rank": 0, "num_devices": 1})
    loader = iter(built.data.train_dataloader())
    ran: set[str] = set()

    def note(frame: FrameType, event: str, _: Any) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            ran.add(path.relative_to(PACKAGE).as_posix())

    sys.setprofile(note)
    try:
        batch = next(loader)
        step_losses(built.module.model, built.module.criterion, batch[0], num_boxes=4.0)
    finally:
        sys.setprofile(None)
    ran = {"ops/ms_deform_attn.py" if file.startswith("ops/") else file for file in ran} - DETAILS
    ran.add("engine/module.py")  # which Lightning calls; here its part is done by the test
    assert ran == set(listed)

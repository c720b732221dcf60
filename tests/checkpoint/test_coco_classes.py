"""COCO's class names and ids are those of its own files."""

import json
from pathlib import Path

from ddetr.checkpoint.coco_classes import COCO_CLASSES


def test_coco_table(shared_data: Path) -> None:
    content = json.loads((shared_data / "coco_tiny/annotations/instances_val2017.json").read_text())
    assert {category["id"]: category["name"] for category in content["categories"]} == COCO_CLASSES

"""The trained detectors that a name stands for, in catalogue.json: facts of their authors' pages, null where unknown.

A name is PROJECT-BACKBONE-VARIANT; the official ones begin with the paper's name.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Entry:
    """A published detector.

    Attributes:
        name: what a user writes.
        project: who trained it.
        address: a hub repository or a file of one (hf://ORG/NAME[/FILE]), or an https address.
        size_mb: of the download, in 10^6 bytes; None where its authors do not say.
        sha256: of the file, all of it or its first hex digits; None where its authors do not say.
        licence: SPDX name, in small letters.
        ap: published COCO AP on val2017, in percent.
        classes: "coco-91" (rows are COCO's category ids) or "coco-80" (rows are its 80 classes in order).
        model: arguments of `DeformableDETR` that are not the default.
        note: what else a user should know.
    """

    name: str
    project: str
    address: str
    size_mb: int | None
    sha256: str | None
    licence: str | None
    ap: float | None
    classes: str
    model: dict[str, Any]
    note: str


@functools.cache
def catalogue() -> dict[str, Entry]:
    """All entries by name."""
    rows = json.loads(Path(__file__).with_name("catalogue.json").read_text(encoding="utf-8"))
    return {row["name"]: Entry(**row) for row in rows}

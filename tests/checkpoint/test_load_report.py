"""What became of every tensor, for people."""

import io
from pathlib import Path

from weights_of import PETS, REFINE, make_model, save_official

from ddetr.checkpoint import load_weights


def test_report_reads_well(tmp_path: Path) -> None:
    from rich.console import Console

    source, model = make_model(1, num_classes=91), make_model(2, **REFINE)
    report = load_weights(model, save_official(tmp_path / "r50.pth", source), categories=PETS)
    assert str(report).startswith("r50.pth (official): ")
    assert f"{len(report.loaded)} tensors loaded, {len(report.adapted)} adapted, 0 skipped" in str(report)
    console = Console(width=160, file=io.StringIO())
    console.print(report.render())
    text = console.file.getvalue()
    assert "rows of 2 of 3 classes copied by name, new: guinea pig" in text
    assert text.count("class_embed") == 1, "like names on one line"

"""What became of every tensor, for people."""

import io
from pathlib import Path

from weights_of import PETS, REFINE, make_model, save_official

from ddetr.checkpoint import LoadReport, load_weights
from ddetr.checkpoint.report import Remark


def rendered(report: LoadReport, verbose: bool = False) -> str:
    from rich.console import Console

    console = Console(width=160, file=io.StringIO())
    console.print(report.render(verbose))
    return console.file.getvalue()


def test_report_reads_well(tmp_path: Path) -> None:
    source, model = make_model(1, num_classes=91), make_model(2, **REFINE)
    report = load_weights(model, save_official(tmp_path / "r50.pth", source), categories=PETS)
    assert str(report).startswith("r50.pth (official): ")
    assert f"{len(report.loaded)} tensors loaded, {len(report.adapted)} adapted, 0 skipped" in str(report)
    text = rendered(report)
    assert "rows of 2 of 3 classes copied by name, new: guinea pig" in text
    assert text.count("class_embed") == 1, "like names on one line"
    assert "classes: 2 of 3 start from the file's, new: 1" in text
    assert "kept: cat, dog" in text
    assert "new: guinea pig" in text
    rows = [line.replace("\u2502", "|").split("|") for line in rendered(report, verbose=True).splitlines()]
    rows = [[cell.strip() for cell in row[1:-1]] for row in rows if len(row) == 5]
    assert rows[-3:] == [["cat", "17", "cat"], ["dog", "18", "dog"], ["guinea pig", "new", ""]]


def test_the_summary_is_short_and_all_names_are_there_on_request(tmp_path: Path) -> None:
    source, model = make_model(1, num_feature_levels=1), make_model(2, enc_layers=3, dim_feedforward=48)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    summary, full = rendered(report), rendered(report, verbose=True)
    assert len(summary.splitlines()) < 30
    for text in (summary, full):
        assert "a.pth (official): " in text
        assert f"{report.share:.1%} of the model's parameters" in text
        assert all(why in " ".join(text.split()) for _, why in report.initialised)
    name = "transformer.encoder.layers.*.norm2"
    assert name not in summary
    assert name in full
    assert "--verbose" in summary
    assert "--verbose" not in full


def test_names_from_a_file_are_no_markup() -> None:
    report = LoadReport(Path("[bold]a.pth"), "official", skipped=[Remark("[red]x", "not [in] the model")])
    for text in (rendered(report), rendered(report, verbose=True)):
        assert "[bold]a.pth" in text
        assert "[red]x" in text
        assert "not [in] the model" in text

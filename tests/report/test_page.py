"""report.html: whole, self-contained, escaped, and made from whatever is there."""

import html
import json
import os
import shutil
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from made_validation import make_found, make_objects, make_validation
from page_reader import Page, read_whole_page
from PIL import Image

from ddetr.cli import main as cli
from ddetr.report import REPORT_FILE, RunFiles, write_report
from ddetr.report.page import SECTIONS
from ddetr.report.validation import BEST_FILE

EVIL = "<script>alert(1)</script>"


def read_page(run: Path) -> Page:
    """Makes the report and checks what must hold for every one."""
    path = write_report(RunFiles.read(run))
    assert path == run / REPORT_FILE
    return read_whole_page(path, SECTIONS)


def test_the_report_of_training_is_there_and_whole(tiny_run: Any) -> None:
    assert (tiny_run.path / REPORT_FILE).stat().st_size > 20_000
    assert "finished" in Page((tiny_run.path / REPORT_FILE).read_text(encoding="utf-8")).text


def test_a_whole_run(run_folder: Path) -> None:
    page = read_page(run_folder)
    assert RunFiles.read(run_folder).missing == []
    assert "Not all files" not in page.text
    metrics = json.loads((run_folder / "metrics.json").read_text())
    best = metrics["best"]
    assert f"Best AP {best['AP']:.3f}" in page.text
    for row in best["per_class"]:
        assert f"{row['name']} {row['num_objects']}" in page.text
    assert page.text.count("score threshold") >= 2
    assert len(page.all("img")) == 2 * 8  # all eight images, truth and prediction
    environment = json.loads((run_folder / "environment.json").read_text())["sessions"][-1]["environment"]
    for name in ("torch", "python", "processor", "backend", "command", "host"):
        assert html.unescape(str(environment[name])) in page.text.replace("  ", " "), name
    assert "clip_max_norm 1.0" in page.text
    assert len(page.all("polyline")) > 10


def test_names_from_the_data_are_escaped(run_folder: Path) -> None:
    """Class names, file names, paths, findings: wherever a value from outside comes to the page."""
    odd = [
        run_folder / name for name in (f"{EVIL.replace('/', '')}.jpg", "a\"b'c & d.jpg", os.fsdecode(b"\xff\xfe.jpg"))
    ]
    for path in odd:
        Image.fromarray(np.zeros((48, 64, 3), np.uint8)).save(path, format="JPEG")
    objects = make_objects(*((i, [5, 5, 30, 30], i % 2) for i in range(3)))
    found = make_found((0, [5, 5, 30, 30], 1, 0.9), (1, [5, 5, 30, 30], 1, 0.9), (2, [40, 40, 50, 45], 0, 0.9))
    make_validation([EVIL, '"><img src=x onerror=alert(1)>'], odd, objects, found).save(run_folder / BEST_FILE)
    for name in ("metrics.json", "audit.json"):
        content = json.loads((run_folder / name).read_text())
        for rows in (content.get("best", {}).get("per_class", []), content.get("categories", [])):
            for row in rows:
                row["name"] = EVIL
        if "findings" in content:
            place = {"where": EVIL, "message": EVIL, "count": 1}
            content["findings"] = [{"action": "dropped", "kind": EVIL, "count": 1, "places": [place]}]
        (run_folder / name).write_text(json.dumps(content))
    (run_folder / "config.yaml").write_text(f"data: {{path: '{EVIL}'}}\nepochs: 2\n'{EVIL}': '{EVIL}'\n")
    lines = (run_folder / "train.csv").read_text().splitlines()
    (run_folder / "train.csv").write_text(
        "\n".join([lines[0] + f",{EVIL}", *(line + ",1" for line in lines[1:])]) + "\n"
    )
    folder = run_folder.with_name("<b>run & co")
    shutil.move(run_folder, folder)
    page = read_page(folder)
    text = (folder / REPORT_FILE).read_text(encoding="utf-8")
    assert "<script" not in text
    assert "<img src=x" not in text
    assert page.text.count("alert(1)") > 10
    assert "a\"b'c & d.jpg" in page.text
    assert "\\udcff\\udcfe.jpg" in page.text
    linked = {unquote(link["href"], errors="surrogateescape") for link in page.all("a")}
    assert {f"./{path.name}" for path in odd} <= linked


def test_an_old_run_has_a_report_of_what_it_has(run_folder: Path) -> None:
    for name in ("environment.json", "validation_best.npz", "validation_last.npz"):
        (run_folder / name).unlink()
    metrics = json.loads((run_folder / "metrics.json").read_text())
    for which in ("best", "last"):
        for row in metrics[which]["per_class"]:
            del row["APs"], row["APm"], row["APl"]
    (run_folder / "metrics.json").write_text(json.dumps(metrics))
    page = read_page(run_folder)
    assert f"Best AP {metrics['best']['AP']:.3f}" in page.text
    assert "environment.json not there: machine, software and command line" in page.text
    assert "validation_best.npz not there: the detections of a validation" in page.text
    assert not page.all("img")


@pytest.mark.parametrize(
    "kept", ["config.yaml", "train.csv", "val.csv", "metrics.json", "audit.json", "environment.json"]
)
def test_one_file_is_enough_for_a_report(run_folder: Path, kept: str) -> None:
    for path in run_folder.iterdir():
        if path.is_file() and path.name != kept:
            path.unlink()
    page = read_page(run_folder)
    for name in ("config.yaml", "train.csv", "metrics.json", "audit.json"):
        assert (f"{name} not there" in page.text) == (name != kept)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b"null", b"\xff\x00nonsense", b'{"best": 3, "sessions": 4, "train": 5}']
)
def test_damaged_files_cost_their_section_only(run_folder: Path, content: bytes) -> None:
    for name in ("config.yaml", "metrics.json", "audit.json", "environment.json", "val.csv", "validation_best.npz"):
        (run_folder / name).write_bytes(content)
    (run_folder / "validation_last.npz").unlink()
    path = write_report(RunFiles.read(run_folder))
    page = Page(path.read_text(encoding="utf-8"))
    assert [s["id"] for s in page.all("section")] == list(SECTIONS)
    assert "Training losses" in page.text


def test_a_run_that_was_killed_while_writing_a_row(run_folder: Path) -> None:
    path = run_folder / "train.csv"
    whole = path.read_text().splitlines(keepends=True)
    assert len(whole) > 2
    path.write_text("".join(whole[:2]) + whole[2][: len(whole[2]) // 2])
    run = RunFiles.read(run_folder)
    assert len(run.training["step"]) == 1
    read_page(run_folder)
    path.write_text("".join(whole[:2]) + whole[2].rstrip("\n"))  # all cells, but perhaps not all digits
    assert len(RunFiles.read(run_folder).training["step"]) == 1
    path.write_text("".join(whole[:2]) + "7,1\n" + whole[2])
    run = RunFiles.read(run_folder)
    assert len(run.training["step"]) == 2
    assert ("train.csv", "1 of its 3 rows do not fit its header and are left out") in run.missing
    path.write_text(whole[0])
    assert RunFiles.read(run_folder).training == {}
    read_page(run_folder)


def test_images_that_have_moved_are_said_to_have_moved(run_folder: Path, tmp_path: Path) -> None:
    paths = [tmp_path / "gone" / f"{i}.jpg" for i in range(2)]
    objects = make_objects((0, [5, 5, 30, 30], 0), (1, [5, 5, 30, 30], 0))
    make_validation(["cat"], paths, objects, make_found((0, [5, 5, 30, 30], 0, 0.9))).save(run_folder / BEST_FILE)
    page = read_page(run_folder)
    assert not page.all("img")
    assert "The images are not where the validation read them" in page.text
    assert "0.jpg score 1.000; 1 correct, 0 missed, 0 wrong" in page.text
    assert "1.jpg score 0.000; 0 correct, 1 missed, 0 wrong" in page.text


def test_the_report_stays_small_and_bounded(run_folder: Path) -> None:
    """Of many large images a few are shown, shrunk."""
    noise = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    path = run_folder / "large.jpg"
    Image.fromarray(noise).resize((1600, 1200), Image.Resampling.BICUBIC).save(path, quality=95)
    objects = make_objects(*((i, [50, 50, 600, 700], 0) for i in range(40)))
    validation = make_validation(["cat"], [path] * 40, objects, make_found())
    validation.sizes_hw[:] = [1200, 1600]
    validation.save(run_folder / BEST_FILE)
    page = read_page(run_folder)
    assert len(page.all("img")) == 24
    assert all(image["width"] == "560" for image in page.all("img"))
    assert (run_folder / REPORT_FILE).stat().st_size < 3e6


def test_a_report_that_fails_leaves_the_old_one(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = write_report(RunFiles.read(run_folder)).read_bytes()

    def full(self: Path, *arguments: Any, **options: Any) -> int:
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        write_report(RunFiles.read(run_folder))
    assert (run_folder / REPORT_FILE).read_bytes() == before
    assert not list(run_folder.glob(".*"))


def test_the_command(run_folder: Path, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    assert cli.main(["report", str(run_folder)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert (run_folder / REPORT_FILE).is_file()
    (run_folder / "audit.json").unlink()
    assert cli.main(["report", str(run_folder)]) == 0
    assert "left out     audit.json not there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "expected a run folder, but nowhere is not there"),
        (["a file"], "is a file"),
        (["empty"], "empty is no run folder: it has none of config.yaml"),
        ([], "ddetr report needs RUN"),
        (["empty", "--device", "cpu"], "--device"),
    ],
)
def test_wrong_folders(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a file").write_text("")
    Path("empty").mkdir()
    assert cli.main(["report", *arguments]) == 2
    assert message in " ".join(capsys.readouterr().err.split())

"""`ddetr bench data`: files and figures, and that a side which gives something else is not timed. Times are never
asserted."""

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from ddetr.bench import data as bench_of_data
from ddetr.bench import record
from ddetr.bench.data import OURS, PLAIN, comparable, in_own_process, one_core, padding_table
from ddetr.bench.plain_recipe import plain_sample
from ddetr.cli import main as cli
from ddetr.datasets import DetectionDataset, build_transform, load_annotations
from ddetr.datasets.config import DataConfig


@pytest.fixture
def bench(
    shapes: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Callable[..., Any]:
    """Run `ddetr bench data ...` on drawn shapes: exit code, output, error."""
    monkeypatch.setattr(bench_of_data, "_LEAST_SECONDS", 0)
    monkeypatch.setattr(bench_of_data, "_SHAPE_IMAGES", 64)
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Any:
        capsys.readouterr()
        small = ["--data", str(shapes), "--data.image_size", "64", "--rounds", "1", "--batch_size", "4"]
        code = cli.main(["bench", "data", *small, *arguments])
        captured = capsys.readouterr()
        return SimpleNamespace(code=code, out=captured.out, err=captured.err)

    return run


def test_the_files_hold_what_was_measured(bench: Callable[..., Any], shapes: Path) -> None:
    threads = torch.get_num_threads()
    outcome = bench("--workers", "1", "--output", "out")
    assert outcome.code == 0, outcome.err
    assert torch.get_num_threads() == threads
    assert sorted(path.name for path in Path("out").iterdir()) == ["data.json", "data.md"]
    report = json.loads(Path("out/data.json").read_text())
    assert report["command"] == (
        f"ddetr bench data --data {shapes} --data.image_size 64 --batch_size 4 --workers 1 --rounds 1"
    )
    assert report["machine"]["processor"]
    assert report["num_images"] == 8
    ours, plain = report["rows"]
    assert (ours["side"], plain["side"]) == (OURS, PLAIN)
    assert set(ours["stages_ms"]) == {"read", "decode", "augment", "collate"}
    for row in (ours, plain):
        assert row["ms"] == pytest.approx(sum(row["stages_ms"].values()))
        assert row["ms"] > 0
        assert row["images_per_second"] == pytest.approx(1000 / row["ms"])
        assert row["ratio"] == pytest.approx(plain["ms"] / row["ms"])
    assert [row["num_workers"] for row in report["loaders"]] == [0, 1]
    assert all(row["images_per_second"] > 0 for row in report["loaders"])
    assert report["checked"]["boxes"] < 1e-5
    assert 0 < report["checked"]["pixels"] < 8
    assert [(row["buckets"], row["padded_shapes"]) for row in report["padding"]] == [
        (False, None),
        (False, 12),
        (True, None),
        (True, 12),
    ]
    text = Path("out/data.md").read_text()
    assert re.search(r"^\| ours \| \d+ \| [\d.]+x \| [\d.]+ \| read [\d.]+, decode", text, re.MULTILINE)
    assert "both sides gave the same labels and sizes" in outcome.out


def test_a_side_that_gives_something_else_is_left_out(
    bench: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(change: Callable[[torch.Tensor, dict], Any]) -> None:
        def sample(*arguments: Any) -> Any:
            return change(*plain_sample(*arguments))

        monkeypatch.setattr(bench_of_data, "plain_sample", sample)

    for change, said in (
        (lambda image, target: (image, {**target, "boxes": target["boxes"] + 1e-3}), "boxes are off by up to 1.0e-03"),
        (lambda image, target: (image, {**target, "labels": target["labels"] + 1}), "labels of .* differ"),
        (lambda image, target: (image[:, 1:], target), "has another size"),
        (lambda image, target: (image + 0.5, target), "pixels differ by [23][0-9].[0-9] levels in the mean"),
    ):
        wrong(change)
        outcome = bench("--workers", "0")
        assert outcome.code == 0, outcome.err
        assert re.search(f"left out: plain Pillow: wrong: .*{said}", outcome.out), outcome.out
        assert re.search(r"^ours +\d+ +- ", outcome.out, re.MULTILINE)
        assert "both sides" not in outcome.out


def test_the_plain_recipe_gives_the_same_samples(any_coco: Path) -> None:
    annotations = load_annotations(any_coco, "val2017")
    recipe = build_transform("official", train=True, image_size=800)
    dataset = DetectionDataset(annotations, recipe, normalize=False)
    keys = [
        bench_of_data.Key(index, index) for index in range(0, len(annotations.images), len(annotations.images) // 8)
    ]
    assert any(recipe.draw((480, 640), torch.Generator().manual_seed(key.seed)).crop for key in keys)
    found, reason = bench_of_data.check(dataset, keys)
    assert reason is None
    assert found["boxes"] < 1e-6
    assert found["pixels"] < 4


def test_sides_take_turns_and_medians_count(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    times = {OURS: iter([3, 1, 2]), PLAIN: iter([10, 50, 20])}

    def run(one_pass: Callable[..., Counter], *arguments: Any) -> Counter:
        side = OURS if one_pass is bench_of_data.our_pass else PLAIN
        ran.append(side)
        return Counter({"decode": next(times[side]) * 4_000_000})

    monkeypatch.setattr(bench_of_data, "in_own_process", run)
    ours, plain = one_core(None, [bench_of_data.Key(i, i) for i in range(4)], 2, 3, (OURS, PLAIN))
    assert ran == [OURS, PLAIN] * 3
    assert (ours["ms"], ours["ratio"], plain["ms"], plain["ratio"]) == (2, 10, 20, 1)
    assert ours["stages_ms"] == {"decode": 2}


def fails(*arguments: Any) -> Counter:
    raise SystemExit(3)


def test_a_measuring_process_that_dies_is_told() -> None:
    with pytest.raises(RuntimeError, match="measuring process died"):
        in_own_process(fails)


def test_buckets_and_shapes_change_the_padding(any_coco: Path) -> None:
    annotations = load_annotations(any_coco, "train2017")
    batch_size = min(32, len(annotations.images))
    rows = padding_table(annotations, DataConfig("x", padded_shapes=3), batch_size, 2, 1)
    share = {(row["buckets"], row["padded_shapes"]): row["padded_share"] for row in rows}
    assert set(share) == {(buckets, count) for buckets in (False, True) for count in (None, 3, 12)}
    for count in (None, 3, 12):
        assert share[True, count] < share[False, count]
    for buckets in (False, True):
        assert share[buckets, None] < share[buckets, 12] < share[buckets, 3]
    assert all(row["num_shapes"] <= (row["padded_shapes"] or row["num_batches"]) for row in rows)
    assert len({row["num_batches"] for row in rows}) == 1


def test_turned_and_unreadable_images_are_not_compared(shapes: Path, tmp_path: Path) -> None:
    annotations = load_annotations(shapes, "train")
    records = list(annotations.images)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned, broken = tmp_path / "turned.jpg", tmp_path / "broken.jpg"
    Image.open(records[0].path).save(turned, exif=exif)
    broken.write_text("no image")
    records[0], records[1] = (
        SimpleNamespace(**{**vars(one), "path": path}) for one, path in zip(records, (turned, broken))
    )
    whole = annotations.__class__(annotations.name, annotations.format, annotations.categories, records)
    assert comparable(whole, 100).images == records[2:]
    assert len(comparable(whole, 3).images) == 3


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--rounds 0", "--rounds: expected at least 1, got 0"),
        ("--images 0", "--images: expected at least 1, got 0"),
        ("--workers -1", "--workers: expected at least 0, got -1"),
        ("--batch_size 9", "shapes/train has 8 upright, readable images here, fewer than a batch of 9"),
        ("--data.bucket true", "unknown option --data.bucket (did you mean --data.buckets?)"),
    ],
)
def test_wrong_options(bench: Callable[..., Any], line: str, message: str) -> None:
    outcome = bench(*line.split())
    assert outcome.code == 2
    assert outcome.err.startswith(f"ddetr: error: {message}")
    assert len(outcome.err.strip().splitlines()) == 1


def test_command_line_with_a_data_set() -> None:
    def function(data: DataConfig, *, images: int = 3) -> None: ...

    settings = {"data": DataConfig("a set", buckets=True, image_size=800), "images": 3}
    assert record.command_line("bench data", function, settings) == (
        "ddetr bench data --data 'a set' --data.buckets true"
    )

"""The curves and pictures of a run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ddetr.datasets import load_annotations
from ddetr.report import draw_curves, draw_pictures

HEADER = "step,loss,loss_ce,loss_bbox,loss_giou\n"


def test_curves_of_a_run_without_validation(tmp_path: Path) -> None:
    assert draw_curves(tmp_path) is None
    (tmp_path / "train.csv").write_text(HEADER)
    assert draw_curves(tmp_path) is None
    (tmp_path / "train.csv").write_text(HEADER + "1,3,1,1,1\n2,2,1,0.5,0.5\n")
    path = draw_curves(tmp_path)
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        assert image.size == (1210, 440)


def test_curves_take_undefined_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "1,3,1,1,\n2,2,1,nan,0.5\n")
    (tmp_path / "val.csv").write_text("step,AP,AP50,AP75\n2,0.1,0.2,\n4,nan,0.3,\n")
    assert draw_curves(tmp_path) == tmp_path / "curves.png"


def test_pictures_are_spread_over_the_images(tiny_run: Any, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pth").symlink_to(tiny_run.path / "best.pth")
    annotations = load_annotations(shapes, "train")
    paths = draw_pictures(tmp_path, annotations, 3, "cpu")
    assert [path.stem for path in paths] == ["000000", "000004", "000007"]
    with Image.open(paths[0]) as image:  # truth beside prediction, large enough to read
        assert image.height >= 320
        assert image.width >= 2 * 320
    assert len(draw_pictures(tmp_path, annotations, 100, "cpu")) == 8


def test_pictures_of_one_name_do_not_replace_each_other(tiny_run: Any, shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "best.pth").symlink_to(tiny_run.path / "best.pth")
    annotations = load_annotations(shapes, "train")
    first, second = annotations.images[0], annotations.images[1]
    twins = replace(annotations, images=[first, replace(second, path=shapes / "val" / first.path.name)])
    assert [path.name for path in draw_pictures(tmp_path, twins, 2, "cpu")] == ["000000.png", "000000-2.png"]


def test_pictures_leave_out_what_cannot_be_read(
    tiny_run: Any, shapes: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "best.pth").symlink_to(tiny_run.path / "best.pth")
    annotations = load_annotations(shapes, "val")
    images = [replace(annotations.images[0], path=tmp_path / "gone.jpg"), annotations.images[1]]
    assert [path.name for path in draw_pictures(tmp_path, replace(annotations, images=images), 2)] == ["000001.png"]
    assert "no picture: There is no image" in caplog.text


def test_no_pictures_without_a_checkpoint_or_a_wish(shapes: Path, tiny_run: Any, tmp_path: Path) -> None:
    annotations = load_annotations(shapes, "val")
    assert draw_pictures(tmp_path, annotations, 3) == []
    assert draw_pictures(tiny_run.path, annotations, 0) == []

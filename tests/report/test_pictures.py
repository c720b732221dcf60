"""The curves and pictures of a run folder."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_validation import make_found, make_objects, make_validation
from PIL import Image

from ddetr.report import RunFiles, draw_curves, draw_pictures
from ddetr.report.pictures import truth_and_prediction

HEADER = "step,loss,loss_ce,loss_bbox,loss_giou\n"


def test_curves_of_a_run_without_validation(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER)
    assert draw_curves(RunFiles.read(tmp_path)) is None
    (tmp_path / "train.csv").write_text(HEADER + "1,3,1,1,1\n2,2,1,0.5,0.5\n")
    path = draw_curves(RunFiles.read(tmp_path))
    assert path == tmp_path / "curves.png"
    with Image.open(path) as image:
        assert image.size == (1210, 440)


def test_curves_take_undefined_numbers(tmp_path: Path) -> None:
    (tmp_path / "train.csv").write_text(HEADER + "1,3,1,1,\n2,2,1,nan,0.5\n")
    (tmp_path / "val.csv").write_text("step,AP,AP50,AP75\n2,0.1,0.2,\n4,nan,0.3,\n")
    assert draw_curves(RunFiles.read(tmp_path)) == tmp_path / "curves.png"


def test_pictures_are_spread_over_the_images(tiny_run: Any, tmp_path: Path) -> None:
    validation = RunFiles.read(tiny_run.path).detections
    paths = draw_pictures(tmp_path, validation, 3)
    assert [path.stem for path in paths] == ["000000", "000004", "000007"]
    with Image.open(paths[0]) as image:  # truth beside prediction, large enough to read
        assert image.height >= 320
        assert image.width >= 2 * 320
    assert len(draw_pictures(tmp_path, validation, 100)) == 8
    assert draw_pictures(tmp_path, validation, 0) == []


def test_pictures_of_one_name_do_not_replace_each_other(tiny_run: Any, shapes: Path, tmp_path: Path) -> None:
    validation = RunFiles.read(tiny_run.path).detections
    path = validation.paths[0]
    twins = replace(validation, paths=[path, shapes / "val" / path.name, *validation.paths[2:]])
    names = [path.name for path in draw_pictures(tmp_path, twins, 8)]
    assert names[:2] == ["000000.png", f"000000-{validation.image_ids[1]}.png"]
    assert len(set(names)) == 8


def test_pictures_leave_out_what_cannot_be_read(
    tiny_run: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    validation = RunFiles.read(tiny_run.path).detections
    broken = replace(validation, paths=[tmp_path / "gone.jpg", *validation.paths[1:]])
    assert len(draw_pictures(tmp_path, broken, 8)) == 7
    assert "no picture: there is no image" in caplog.text


def test_boxes_are_drawn_where_they_are_also_in_another_size(tmp_path: Path) -> None:
    """A box of the truth is in the left picture, a detection over the threshold in the right one."""
    path = tmp_path / "grey.png"
    Image.fromarray(np.full((48, 64, 3), 128, np.uint8)).save(path)
    objects = make_objects((0, [8, 30, 24, 44], 0))
    found = make_found((0, [40, 30, 60, 44], 0, 0.9), (0, [2, 2, 20, 20], 0, 0.1))
    validation = make_validation(["a"], [path], objects, found)
    for long_side, scale in ((None, 1), (32, 0.5), (256, 4), (10_000, 4)):
        truth, prediction = truth_and_prediction(validation, 0, long_side=long_side)
        assert truth.shape == prediction.shape == (3, 48 * scale, 64 * scale)

        def bottom(picture: Any, scale: float = scale) -> list[int]:
            """Columns that are not grey at the height of the boxes' lower edge."""
            row = (picture[:, round(44 * scale) - 1 : round(44 * scale) + 1] != 128).any(dim=0).any(dim=0)
            return [round(x / scale) for x in (row.nonzero().min().item(), row.nonzero().max().item())]

        assert bottom(truth) == pytest.approx([8, 24], abs=2)
        assert bottom(prediction) == pytest.approx([40, 60], abs=2)

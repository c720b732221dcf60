"""Pictures: boxes and readable tags where they belong, one colour a class, nothing that a box can break."""

import pytest
import torch

from ddetr.errors import InputError
from ddetr.inference.drawing import class_color, draw_boxes, draw_dashed, side_by_side

GREY = torch.full((3, 120, 160), 128, dtype=torch.uint8)


def has_color(image: torch.Tensor, color: tuple[int, int, int]) -> torch.Tensor:
    return (image == torch.tensor(color, dtype=torch.uint8)[:, None, None]).all(dim=0)


def test_boxes_and_tags_have_the_color_of_their_class():
    drawn = draw_boxes(GREY, torch.tensor([[20.0, 40, 100, 90]]), [3], ["cat"], [0.87])
    assert drawn.shape == GREY.shape
    assert drawn.dtype == torch.uint8
    colored = has_color(drawn, class_color(3))
    assert colored[40, 20:101].all()  # the upper edge
    assert colored[90, 20:101].all()
    assert colored[40:91, 20].all()
    assert not colored[45:85, 25:95].any()  # nothing covers what is in the box
    assert colored[28:40, 20:60].float().mean() > 0.5  # the tag stands above it
    bare = has_color(draw_boxes(GREY, torch.tensor([[20.0, 40, 100, 90]]), [3], ["cat"], tags=False), class_color(3))
    assert bare[40, 20:101].all()
    assert not bare[:40].any()
    assert (GREY == 128).all()


def test_what_counts_for_nothing_is_dashed():
    drawn = draw_dashed(GREY, torch.tensor([[20.0, 40, 100, 90]]))
    black, white = has_color(drawn, (0, 0, 0)), has_color(drawn, (255, 255, 255))
    for edge in ((40, slice(20, 101)), (90, slice(20, 101)), (slice(40, 91), 20), (slice(40, 91), 100)):
        assert (black | white)[edge].all()
        assert 0.3 < white[edge].float().mean() < 0.8
    assert (drawn[:, 45:85, 25:95] == 128).all()
    assert torch.equal(draw_dashed(GREY, torch.zeros(0, 4)), GREY)


def test_colors_are_stable_and_differ():
    colors = [class_color(label) for label in range(91)]
    assert len(set(colors)) == 91
    assert colors == [class_color(label) for label in range(91)]


def test_no_boxes_leave_the_image_as_it_is():
    drawn = draw_boxes(GREY, torch.zeros(0, 4), [], [], [])
    assert torch.equal(drawn, GREY)
    assert drawn is not GREY


@pytest.mark.parametrize(
    "box",
    [
        [-50.0, -50, 500, 500],
        [10.0, 10, 10, 10],
        [159.5, 119.5, 170, 130],
        [300.0, 300, 400, 400],
        [50.0, 50, 20, 20],
        [float("nan"), 0, 10, 10],
        [0.0, 0, float("inf"), 10],
    ],
)
def test_odd_boxes_break_nothing(box):
    assert draw_boxes(GREY, torch.tensor([box]), [0], ["a"]).shape == GREY.shape
    assert draw_dashed(GREY, torch.tensor([box])).shape == GREY.shape


@pytest.mark.parametrize("name", ["", "人", "Ägypten", "a" * 200, "two\nlines"])
@pytest.mark.parametrize("size_hw", [(1, 1), (8, 300), (120, 160)])
def test_odd_names_and_sizes_break_nothing(name, size_hw):
    image = torch.zeros(3, *size_hw, dtype=torch.uint8)
    assert draw_boxes(image, torch.tensor([[0.0, 0, 5, 5]]), [0], [name], [1.0]).shape == image.shape


def test_tags_get_out_of_each_others_way():
    boxes = torch.tensor([[20.0, 40, 100, 90], [22.0, 41, 101, 91]])
    drawn = draw_boxes(GREY, boxes, [0, 1], ["cat", "dog"], [0.9, 0.8])
    assert has_color(drawn, class_color(0)).sum() > 300
    assert has_color(drawn, class_color(1)).sum() > 300


def test_small_images_are_enlarged_on_request():
    drawn = draw_boxes(GREY, torch.tensor([[20.0, 40, 100, 90]]), [3], ["cat"], min_side=300)
    assert drawn.shape == (3, 360, 480)
    assert has_color(drawn, class_color(3))[120, 60:301].all()
    assert draw_boxes(GREY, torch.zeros(0, 4), [], [], min_side=120).shape == GREY.shape


def test_wrong_arguments_say_what_is_wrong():
    with pytest.raises(InputError, match="names for 1 boxes, got 2"):
        draw_boxes(GREY, torch.zeros(1, 4), [0], ["a", "b"])
    with pytest.raises(InputError, match="scores for 1 boxes, got 0"):
        draw_boxes(GREY, torch.zeros(1, 4), [0], ["a"], [])
    with pytest.raises(InputError, match=r"uint8 \(3, H, W\), got torch.float32 \(3, 120, 160\)"):
        draw_boxes(GREY.float(), torch.zeros(1, 4), [0], ["a"])


def test_side_by_side():
    right = torch.zeros(3, 60, 100, dtype=torch.uint8)
    pair = side_by_side(GREY, right, ("truth", "prediction"))
    height, width = pair.shape[1:]
    assert height > 120
    assert width > 260
    assert torch.equal(pair[:, -120:, :160], GREY)
    assert torch.equal(pair[:, -120:-60, -100:], right)
    assert (pair[:, -30:, -100:] == 255).all()
    assert (pair[:, : height - 120] < 100).any()  # the titles


def test_endless_names_and_crowds_are_drawn_in_bounded_time():
    """A name of megabytes is cut; of 30,000 boxes some are drawn, and the best have a tag."""
    boxes = torch.tensor([[20.0, 40, 100, 90]]).repeat(30_000, 1)
    names = ["cat"] * 29_999 + ["x" * 5_000_000 + "\x1b\u202e\n"]
    drawn = draw_boxes(GREY, boxes, [3] * 30_000, names)
    assert drawn.shape == GREY.shape
    assert has_color(drawn, class_color(3))[40, 20:101].all()


def test_a_strip_is_not_enlarged_without_end():
    strip = torch.zeros(3, 1, 3000, dtype=torch.uint8)
    assert draw_boxes(strip, [[0, 0, 9, 1]], [0], ["a"], min_side=480).shape == (3, 1, 3000)
    assert draw_boxes(strip[:, :, :100], [[0, 0, 9, 1]], [0], ["a"], min_side=480).shape == (3, 40, 4000)

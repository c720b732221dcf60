"""Boxes: conversions there and back, overlaps by hand and against torchvision."""

import math

import pytest
import torch
from torchvision.ops import generalized_box_iou

from ddetr.boxes import (
    box_cxcywh_to_xyxy,
    box_iou,
    box_xywh_to_xyxy,
    box_xyxy_to_cxcywh,
    box_xyxy_to_xywh,
    generalized_iou,
)


def random_boxes_xyxy(*shape: int, seed: int = 0) -> torch.Tensor:
    corner = torch.rand(*shape, 2, 2, generator=torch.Generator().manual_seed(seed))
    return torch.cat((corner.amin(-2), corner.amax(-2)), dim=-1)


def test_conversions_by_hand() -> None:
    boxes_xyxy = torch.tensor([10.0, 20.0, 40.0, 30.0])
    assert box_xyxy_to_cxcywh(boxes_xyxy).tolist() == [25, 25, 30, 10]
    assert box_xyxy_to_xywh(boxes_xyxy).tolist() == [10, 20, 30, 10]
    assert box_cxcywh_to_xyxy(torch.tensor([25.0, 25.0, 30.0, 10.0])).tolist() == [10, 20, 40, 30]
    assert box_xywh_to_xyxy(torch.tensor([10.0, 20.0, 30.0, 10.0])).tolist() == [10, 20, 40, 30]


@pytest.mark.parametrize("shape", [(), (0,), (5,), (2, 3)])
def test_conversions_there_and_back(shape: tuple[int, ...]) -> None:
    boxes_xyxy = random_boxes_xyxy(*shape)
    torch.testing.assert_close(box_cxcywh_to_xyxy(box_xyxy_to_cxcywh(boxes_xyxy)), boxes_xyxy)
    torch.testing.assert_close(box_xywh_to_xyxy(box_xyxy_to_xywh(boxes_xyxy)), boxes_xyxy)


def test_iou_by_hand() -> None:
    a, b = torch.tensor([[0.0, 0, 2, 2]]), torch.tensor([[1.0, 1, 3, 3], [0, 0, 2, 2], [5, 5, 6, 6]])
    torch.testing.assert_close(box_iou(a, b), torch.tensor([[1 / 7, 1, 0]]))
    # Hulls: 9 of which 2 are empty; 4; 36 of which 31 are empty.
    torch.testing.assert_close(generalized_iou(a, b), torch.tensor([1 / 7 - 2 / 9, 1.0, -31 / 36]))


def test_generalized_iou_equals_torchvision_pairwise() -> None:
    a, b = random_boxes_xyxy(7), random_boxes_xyxy(5, seed=1)
    torch.testing.assert_close(generalized_iou(a[:, None], b[None]), generalized_box_iou(a, b))


def test_generalized_iou_of_degenerate_boxes_is_finite() -> None:
    point, other_point = torch.tensor([0.3, 0.3, 0.3, 0.3]), torch.tensor([0.6, 0.3, 0.6, 0.3])
    box = torch.tensor([0.1, 0.1, 0.5, 0.5])
    for a, b in ((point, point), (point, other_point), (point, box), (box, point)):
        value = generalized_iou(a, b).item()
        assert math.isfinite(value)
        assert -1 <= value <= 0


def test_generalized_iou_has_finite_gradients() -> None:
    a = torch.tensor([[0.3, 0.3, 0.3, 0.3], [0.1, 0.1, 0.5, 0.5], [0.2, 0.2, 0.2, 0.9]], requires_grad=True)
    generalized_iou(a, torch.tensor([[0.3, 0.3, 0.3, 0.3]])).sum().backward()
    assert a.grad.isfinite().all()


def test_generalized_iou_differentiates() -> None:
    a, b = random_boxes_xyxy(4).double().requires_grad_(), random_boxes_xyxy(4, seed=1).double()
    assert torch.autograd.gradcheck(lambda boxes: generalized_iou(boxes, b), a)

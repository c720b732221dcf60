"""Outputs to detections: which, how many, and where."""

import pytest
import torch

from ddetr.models.postprocess import PostProcess


def test_best_pairs_by_hand() -> None:
    """A query may give several classes; boxes are scaled by width and height of their own image."""
    logits = torch.tensor([[[2.0, -1.0, 1.0], [-3.0, 0.0, -2.0]], [[-1.0, -2.0, -3.0], [5.0, 4.0, 3.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.25, 0.75, 0.5, 0.5]], [[0.1, 0.1, 0.2, 0.2], [0.5, 0.5, 1.0, 1.0]]])
    sizes_hw = torch.tensor([[100, 200], [50, 10]])
    first, second = PostProcess(max_detections=3)({"pred_logits": logits, "pred_boxes": boxes}, sizes_hw)

    assert first["labels"].tolist() == [0, 2, 1]
    torch.testing.assert_close(first["scores"], torch.tensor([2.0, 1.0, 0.0]).sigmoid())
    expected = torch.tensor([[80.0, 30, 120, 70], [80, 30, 120, 70], [0, 50, 100, 100]])
    torch.testing.assert_close(first["boxes"], expected)
    assert second["labels"].tolist() == [0, 1, 2]
    torch.testing.assert_close(second["boxes"], torch.tensor([[0.0, 0, 10, 50]]).repeat(3, 1))


@pytest.mark.parametrize(("max_detections", "expected"), [(100, 12), (12, 12), (5, 5)])
def test_number_of_detections_is_clamped_to_the_pairs(max_detections: int, expected: int) -> None:
    outputs = {"pred_logits": torch.randn(2, 4, 3), "pred_boxes": torch.rand(2, 4, 4)}
    detections = PostProcess(max_detections)(outputs, torch.tensor([[10, 10], [20, 20]]))
    for detection in detections:
        assert detection["scores"].shape == detection["labels"].shape == (expected,)
        assert detection["boxes"].shape == (expected, 4)
        assert detection["scores"].diff().le(0).all(), "best first"
    if expected == 12:
        assert detections[0]["labels"].bincount().tolist() == [4, 4, 4]


def test_default_is_that_of_cocos_evaluation() -> None:
    outputs = {"pred_logits": torch.randn(1, 300, 91), "pred_boxes": torch.rand(1, 300, 4)}
    (detection,) = PostProcess()(outputs, torch.tensor([[480, 640]]))
    assert len(detection["scores"]) == 100
    assert detection["scores"].dtype == detection["boxes"].dtype == torch.float32


def test_equals_the_flat_top_k_in_half_precision_too() -> None:
    outputs = {"pred_logits": torch.randn(1, 7, 5).bfloat16(), "pred_boxes": torch.rand(1, 7, 4)}
    (detection,) = PostProcess(9)(outputs, torch.tensor([[1, 1]]))
    scores, pairs = outputs["pred_logits"][0].float().sigmoid().flatten().sort(descending=True, stable=True)
    torch.testing.assert_close(detection["scores"], scores[:9], rtol=0, atol=0)
    assert set(detection["labels"].tolist()) <= set((pairs % 5).tolist())


def test_wrong_sizes_are_named() -> None:
    outputs = {"pred_logits": torch.randn(2, 4, 3), "pred_boxes": torch.rand(2, 4, 4)}
    with pytest.raises(ValueError, match=r"target_sizes_hw must be \(2, 2\), got \(1, 2\)"):
        PostProcess()(outputs, torch.tensor([[10, 10]]))

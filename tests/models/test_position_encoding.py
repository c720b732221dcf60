"""Position encodings: against the formulas, an element at a time."""

import math

import pytest
import torch
import torch.nn.functional as F

from ddetr.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine, sine_embedding


def expected_value(index: int, angle: float, num_features: int) -> float:
    """Feature `index` of an axis: sines at even places, cosines at odd ones, a frequency for each pair."""
    angle = angle / 10000 ** (2 * (index // 2) / num_features)
    return math.sin(angle) if index % 2 == 0 else math.cos(angle)


def test_sine_encoding_with_padding() -> None:
    """Positions are relative to the unpadded part: each image is encoded as if it were alone."""
    num_features, (h, w) = 8, (5, 7)
    valid_hw = [(5, 7), (3, 4)]
    mask = torch.ones(2, h, w, dtype=torch.bool)
    for image, (valid_h, valid_w) in enumerate(valid_hw):
        mask[image, :valid_h, :valid_w] = False
    encoding = PositionEmbeddingSine(num_features)(torch.zeros(2, 99, h, w), mask)
    assert encoding.shape == (2, 2 * num_features, h, w)
    assert encoding.dtype == torch.float32
    assert encoding.isfinite().all(), "padding too"
    for image, (valid_h, valid_w) in enumerate(valid_hw):
        for y in range(valid_h):
            for x in range(valid_w):
                angle_y = (y + 1 - 0.5) / (valid_h + 1e-6) * 2 * math.pi
                angle_x = (x + 1 - 0.5) / (valid_w + 1e-6) * 2 * math.pi
                expected = [expected_value(i, angle_y, num_features) for i in range(num_features)]
                expected += [expected_value(i, angle_x, num_features) for i in range(num_features)]
                torch.testing.assert_close(encoding[image, :, y, x], torch.tensor(expected), atol=1e-5, rtol=0)


def test_sine_encoding_without_mask() -> None:
    feature = torch.zeros(3, 16, 20, 33)
    module = PositionEmbeddingSine(64)
    without = module(feature, None)
    assert without.shape == (1, 128, 20, 33)
    with_mask = module(feature, torch.zeros(3, 20, 33, dtype=torch.bool))
    torch.testing.assert_close(without.expand(3, -1, -1, -1), with_mask, atol=1e-5, rtol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_sine_encoding_is_float32_under_autocast(masked: bool) -> None:
    feature = torch.zeros(1, 16, 300, 300)
    mask = torch.zeros(1, 300, 300, dtype=torch.bool) if masked else None
    module = PositionEmbeddingSine(64)
    exact = module(feature, mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = module(feature.bfloat16(), mask)
    assert under_autocast.dtype == torch.float32
    assert under_autocast.equal(exact)


def test_sine_embedding_of_boxes() -> None:
    """The two-stage queries: (..., 4) -> (..., 4, num_features)."""
    positions = torch.rand(2, 3, 4) * 2 * math.pi
    embedding = sine_embedding(positions, 128)
    assert embedding.shape == (2, 3, 4, 128)
    for index in (0, 1, 6, 127):
        expected = expected_value(index, positions[1, 2, 3].item(), 128)
        assert embedding[1, 2, 3, index].item() == pytest.approx(expected, abs=1e-5)


def test_learned_encoding() -> None:
    module = PositionEmbeddingLearned(6)
    encoding = module(torch.zeros(2, 12, 9, 50), None)
    assert encoding.shape == (1, 12, 9, 50)
    for y, x in ((0, 0), (8, 49), (3, 20)):
        torch.testing.assert_close(encoding[0, :6, y, x], module.col_embed.weight[x])
        torch.testing.assert_close(encoding[0, 6:, y, x], module.row_embed.weight[y])


def test_learned_encoding_stretches_to_larger_maps() -> None:
    """The official table has 50 rows and columns and fails beyond."""
    module = PositionEmbeddingLearned(4)
    encoding = module(torch.zeros(1, 8, 10, 167), None)
    assert encoding.shape == (1, 8, 10, 167)
    expected = F.interpolate(module.col_embed.weight.t()[None], size=167, mode="linear", align_corners=True)[0]
    torch.testing.assert_close(encoding[0, :4, 5], expected)
    torch.testing.assert_close(encoding[0, :4, 5, -1], module.col_embed.weight[49])
    encoding.sum().backward()
    assert module.col_embed.weight.grad.all()

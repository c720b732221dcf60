"""What `record_sampling` says is what the model did."""

from typing import Any

import pytest
import torch

from ddetr.models.attention import MSDeformAttn
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.sampling import record_sampling
from ddetr.ops import ms_deform_attn

SHAPES = [(6, 5), (3, 2)]


@pytest.mark.parametrize("reference_size", [2, 4])
def test_locations_and_weights_give_the_output_of_the_module(reference_size: int) -> None:
    torch.manual_seed(0)
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=4, n_points=3)
    torch.nn.init.normal_(module.sampling_offsets.weight)
    torch.nn.init.normal_(module.attention_weights.weight)
    query, references = torch.randn(2, 7, 16), torch.rand(2, 7, 2, reference_size)
    memory = torch.randn(2, 36, 16)
    locations, weights = module.sampling(query, references, SHAPES)
    assert locations.shape == (2, 7, 4, 2, 3, 2)
    assert weights.shape == (2, 7, 4, 2, 3)
    torch.testing.assert_close(weights.sum((-2, -1)), torch.ones(2, 7, 4))
    value = module.value_proj(memory).unflatten(-1, (4, -1))
    expected = module.output_proj(ms_deform_attn(value, SHAPES, locations, weights))
    torch.testing.assert_close(module(query, references, memory, SHAPES), expected)


def test_at_first_head_h_looks_in_direction_h() -> None:
    """The paper's initialisation: eight heads on the edges of squares, point i at i + 1 cells, all weights equal."""
    module = MSDeformAttn(d_model=16, n_levels=2, n_heads=8, n_points=2)
    references = torch.full((1, 1, 2, 2), 0.5)
    locations, weights = module.sampling(torch.randn(1, 1, 16), references, SHAPES)
    torch.testing.assert_close(weights, torch.full((1, 1, 8, 2, 2), 0.25))
    h, w = SHAPES[0]
    cells = (locations[0, 0, :, 0] - 0.5) * torch.tensor([w, h])  # (8, 2, 2)
    ring = torch.tensor([[1, 0], [1, 1], [0, 1], [-1, 1], [-1, 0], [-1, -1], [0, -1], [1, -1]], dtype=torch.float32)
    torch.testing.assert_close(cells, torch.stack((ring, 2 * ring), dim=1), atol=1e-5, rtol=0)


def test_a_model_is_recorded_layer_by_layer_and_not_changed(tiny_model: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = DeformableDETR(num_classes=3, **tiny_model).eval()
    images = [torch.randn(3, 64, 96), torch.randn(3, 96, 64)]  # padded
    with torch.no_grad():
        before = model(images)
        with record_sampling(model) as calls:
            during = model(images)
        model(images)
    assert torch.equal(before["pred_boxes"], during["pred_boxes"])
    assert torch.equal(before["pred_logits"], during["pred_logits"])
    names = ["encoder.layers.0.self_attn", "decoder.layers.0.cross_attn", "decoder.layers.1.cross_attn"]
    assert [call.module for call in calls] == [f"transformer.{name}" for name in names]  # and none after the block
    encoder, first, second = calls
    num_cells = sum(h * w for h, w in encoder.spatial_shapes)
    assert encoder.locations.shape == (2, num_cells, 4, 2, 4, 2)
    assert first.reference_points.shape == (2, 12, 2, 2)
    assert second.reference_points.shape == (2, 12, 2, 4)  # boxes: with_box_refine
    assert second.weights.shape == (2, 12, 4, 2, 4)
    assert not second.locations.requires_grad


def test_a_failed_pass_leaves_no_hooks(tiny_model: dict[str, Any]) -> None:
    model = DeformableDETR(num_classes=3, **tiny_model).eval()
    with pytest.raises(ValueError, match="expected images"), record_sampling(model):
        model(torch.zeros(1, 4, 64, 64))
    assert not any(module._forward_pre_hooks for module in model.modules())

from typing import Any

import pytest

# The five published variants, small enough for a second on one core.
SMALL = {
    "backbone": "resnet18",
    "hidden_dim": 64,
    "nheads": 4,
    "enc_layers": 2,
    "dec_layers": 3,
    "dim_feedforward": 96,
    "num_queries": 12,
    "num_classes": 5,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    """Constructor arguments of a published variant, of full size."""
    return VARIANTS[request.param]


@pytest.fixture
def small_variant(variant: dict[str, Any]) -> dict[str, Any]:
    """Constructor arguments of a published variant, small."""
    return SMALL | variant


@pytest.fixture
def small() -> dict[str, Any]:
    """Constructor arguments of the base variant, small."""
    return dict(SMALL)

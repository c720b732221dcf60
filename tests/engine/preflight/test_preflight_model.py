"""Preflight, the model's half: each usual mistake is caught by the check that is there for it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from preflight_parts import SetUp, looked_at, statuses

from ddetr.engine.config import OptimConfig
from ddetr.engine.preflight import model as preflight_model
from ddetr.engine.preflight.model import expected_class_loss


def test_the_prior_predicts_the_class_loss() -> None:
    """Against a simulation of the heads: logits around -4.595, one positive an object."""
    torch.manual_seed(0)
    logits = -4.59512 + torch.randn(4_000, 300) / 3**0.5
    p = logits.sigmoid().double()
    negative = 0.75 * p**2 * -(1 - p).log()
    positive = 0.25 * (1 - p[:, 0]) ** 2 * -p[:, 0].log()
    simulated = positive.mean() + negative[:, 1:].sum() / len(p)
    assert expected_class_loss(300 * 4_000, 4_000, 4_000, 0.25) == pytest.approx(float(simulated), rel=0.01)
    assert expected_class_loss(300, 1, 1, 0.25) == pytest.approx(1.13, abs=0.01)
    assert expected_class_loss(300 * 91 * 2, 14, 14, 0.25) < 1.15


def test_mixed_precision_passes(set_up: Callable[..., SetUp]) -> None:
    assert statuses(looked_at(set_up(), autocast=torch.bfloat16)) == {}


def test_a_class_bias_of_zero_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for head in module.model.class_embed:
        torch.nn.init.zeros_(head.bias)
    checks = looked_at((module, data))
    assert checks["first loss"].status == "failed"
    assert "bias of 0.00 instead of -4.60" in checks["first loss"].cause
    # heads with trained weights have no known loss
    assert looked_at((module, data), from_nothing=False)["first loss"].status == "ok"


def test_wild_heads_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for head in module.model.class_embed:
        with torch.no_grad():
            head.weight.mul_(20)
    check = looked_at((module, data))["first loss"]
    assert check.status == "failed"
    assert "spread too far" in check.cause


def test_terms_that_are_not_finite_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    with torch.no_grad():
        module.model.bbox_embed[0].layers[0].bias[0] = float("nan")
    checks = looked_at((module, data), from_nothing=False)
    assert checks["first loss"].status == "failed"
    assert "loss_bbox_0 nan" in checks["first loss"].found
    assert checks["learning"].status == "failed"


def test_a_frozen_head_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for parameter in module.model.class_embed.parameters():
        parameter.requires_grad_(False)
    check = looked_at((module, data))["gradients"]
    assert check.status == "failed"
    assert "frozen: class_embed.0.weight" in check.found
    assert looked_at((module, data), from_nothing=False)["gradients"].status == "warning"


def test_a_detached_head_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    module.model.bbox_embed[1].register_forward_hook(lambda _, args, output: output.detach())
    check = looked_at((module, data))["gradients"]
    assert check.status == "failed"
    assert "none reaches bbox_embed.1.layers.0.weight" in check.found


def test_heads_without_a_loss_are_a_warning(set_up: Callable[..., SetUp]) -> None:
    checks = looked_at(set_up(aux_loss=False))
    assert statuses(checks) == {"gradients": "warning"}
    assert "aux_loss" in checks["gradients"].cause


def test_parameters_that_get_zeros_are_named(set_up: Callable[..., SetUp]) -> None:
    """Batch norms frozen at the zeros that a new ResNet's blocks end with: the blocks can never learn."""
    checks = looked_at(set_up(freeze_backbone="stem"))
    assert statuses(checks) == {"gradients": "warning"}
    assert "only zeros reach backbone.0.body.layer2" in checks["gradients"].found


def test_a_rate_of_zero_is_caught(set_up: Callable[..., SetUp]) -> None:
    zero = OptimConfig(lr=0.0, weight_decay=0.0)
    check = looked_at(set_up(optim=zero))["learning"]
    assert check.status == "failed"
    assert "no parameter moves" in check.found
    assert "the learning rates are {'rest': 0.0" in check.cause


def test_a_rate_that_is_too_low_is_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_model, "MAX_STEPS", 10)
    check = looked_at(set_up(optim=OptimConfig(lr=1e-9)))["learning"]
    assert check.status == "failed"
    assert "1e-09 is too low" in check.cause


def test_a_rate_that_is_too_high_is_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_model, "MAX_STEPS", 30)
    check = looked_at(set_up(optim=OptimConfig(lr=30.0)))["learning"]
    assert check.status == "failed"
    assert "too high" in check.cause


def test_time_that_runs_out_is_a_warning(set_up: Callable[..., SetUp]) -> None:
    """On a large model and a CPU a minute is a step or two, from which nothing can be concluded."""
    checks = looked_at(set_up(), max_seconds=0.0)
    assert statuses(checks) == {"learning": "warning"}
    assert "in 2 steps" in checks["learning"].found


def test_a_step_that_fails_says_where(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    from ddetr.models.attention import MSDeformAttn

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MSDeformAttn, "forward", full)
    check = looked_at(set_up())["first step"]
    assert check.status == "failed"
    assert "OutOfMemoryError in transformer.encoder.layers.0.self_attn" in check.found
    assert "--device_batch_size" in check.next

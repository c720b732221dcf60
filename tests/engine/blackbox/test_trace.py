"""Where a step stops being finite."""

from pathlib import Path
from typing import Any

import pytest
import torch
from failing_steps import Spoiled, a_step, break_backward

from ddetr.engine.blackbox.trace import find_non_finite
from ddetr.models.criterion import SetCriterion


@pytest.mark.parametrize(
    "options",
    [{}, {"two_stage": True}, {"with_box_refine": False}, {"freeze_backbone": "stem"}, {"backbone": "regnetx_002"}],
)
def test_a_healthy_step_has_no_place_that_is_not_finite(
    shapes: Path, tiny_model: dict[str, Any], options: dict[str, Any]
) -> None:
    """Whatever is infinite inside by design, such as the two-stage anchors outside, is not reported."""
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model, **options)
    before = torch.get_rng_state()
    assert find_non_finite(model, criterion, batch, num_boxes, seed=1) is None
    assert torch.equal(torch.get_rng_state(), before)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    "name",
    [
        "backbone.0.body.layer3",
        "input_proj.1.0",
        "transformer.encoder.layers.0.self_attn.value_proj",
        "transformer.decoder.layers.1.linear2",
        "class_embed.1",
    ],
)
def test_the_first_module_is_named_that_puts_out_nan(shapes: Path, tiny_model: dict[str, Any], name: str) -> None:
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model)
    parent, _, last = name.rpartition(".")
    module = model.get_submodule(name)
    spoiled = Spoiled(module)
    if last.isdigit():
        model.get_submodule(parent)[int(last)] = spoiled
    else:
        setattr(model.get_submodule(parent), last, spoiled)
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name, found.kind, found.micro_batch) == ("forward", name, "Spoiled", 0)
    assert "what went in was finite" in found.message
    assert found.inputs[0]["num_nan"] == 0
    assert found.outputs[0]["num_nan"] > 0


@pytest.mark.parametrize(
    "name", ["transformer.encoder.layers.0.linear1", "transformer.decoder.layers.0.cross_attn", "input_proj.0.1"]
)
@pytest.mark.parametrize("two_stage", [False, True])
def test_the_module_is_named_whose_backward_pass_breaks(
    shapes: Path, tiny_model: dict[str, Any], name: str, two_stage: bool
) -> None:
    """Not the one before it, whose output merely gets the broken gradient."""
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model, two_stage=two_stage)
    break_backward(model.get_submodule(name))
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name) == ("backward", name), found.message


def test_input_weights_losses_and_norm_are_told_apart(
    shapes: Path, tiny_model: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, criterion, batch, num_boxes = a_step(shapes, tiny_model)
    images, mask, targets = batch[1]
    pixels = images.float()
    pixels[1, 0, 0, 0] = float("inf")
    found = find_non_finite(model, criterion, [batch[0], (pixels, mask, targets)], num_boxes, seed=1)
    assert (found.place, found.name, found.micro_batch) == ("input", "images", 1)
    assert "image 1 of micro-batch 1" in found.message
    wrong = [{**target, "boxes": target["boxes"] * float("nan")} for target in targets]
    assert find_non_finite(model, criterion, [(images, mask, wrong)], num_boxes, seed=1).name == "boxes"

    original = SetCriterion.forward
    with monkeypatch.context() as patch:
        broken = {"loss_giou_0": torch.tensor(float("nan"))}
        patch.setattr(SetCriterion, "forward", lambda *args: original(*args) | broken)
        found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
        assert (found.place, found.name) == ("loss", "loss_giou_0")
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1, loss_scale=1e24)
    assert found.place == "norm"

    with torch.no_grad():
        model.transformer.level_embed[0, 0] = float("nan")
    found = find_non_finite(model, criterion, batch, num_boxes, seed=1)
    assert (found.place, found.name) == ("parameter", "transformer.level_embed")

"""Activation checkpointing: the same gradients from fewer kept tensors; measured by what autograd saves, not by
time."""

from typing import Any

import pytest
import torch
from torch import Tensor

from ddetr.models.deformable_detr import DeformableDETR

SEED = 7


def make(config: dict[str, Any], *, checkpointing: bool) -> DeformableDETR:
    torch.manual_seed(SEED)
    model = DeformableDETR(**config, dropout=0.3).train()
    with torch.no_grad():  # offsets and weights that depend on the query, so that dropout reaches every gradient
        for name, parameter in model.named_parameters():
            if "sampling_offsets.weight" in name or "attention_weights.weight" in name:
                parameter.normal_(0, 0.05)
    model.transformer.set_activation_checkpointing(checkpointing)
    return model


def batch() -> tuple[Tensor, Tensor]:
    mask = torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 70:] = True
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(SEED)), mask


def loss(model: DeformableDETR) -> Tensor:
    torch.manual_seed(SEED)
    outputs = model(*batch())
    sets = [outputs, *outputs["aux_outputs"], *([outputs["enc_outputs"]] if "enc_outputs" in outputs else [])]
    return sum(out["pred_logits"].square().mean() + out["pred_boxes"].square().mean() for out in sets)


def saved_bytes(model: DeformableDETR) -> int:
    """Of all tensors that the backward pass finds, without the model's own."""
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        total = loss(model)
    assert total.requires_grad  # alive: its graph holds what was counted
    return sum(kept.values())


def test_gradients_are_those_of_kept_activations(small_variant: dict[str, Any]) -> None:
    """Dropout that differed in the second run of a layer would change almost every gradient."""
    kept, again = (make(small_variant, checkpointing=checkpointing) for checkpointing in (False, True))
    losses = [loss(model) for model in (kept, again)]
    assert torch.equal(*losses)
    for value in losses:
        value.backward()
    for (name, one), other in zip(kept.named_parameters(), again.parameters()):
        assert torch.equal(one.grad, other.grad), name


def test_dropout_is_on_in_that_comparison(small: dict[str, Any]) -> None:
    model = make(small, checkpointing=True)
    with_dropout = loss(model)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert not torch.equal(with_dropout, loss(model))


@pytest.mark.parametrize("two_stage", [False, True])
def test_the_backward_pass_finds_fewer_bytes(small: dict[str, Any], two_stage: bool) -> None:
    """The layers of encoder and decoder keep their inputs alone."""
    config = small | {"two_stage": two_stage, "with_box_refine": True}
    more_layers = {"enc_layers": small["enc_layers"] + 2}
    kept = [saved_bytes(make(config | more, checkpointing=False)) for more in ({}, more_layers)]
    again = [saved_bytes(make(config | more, checkpointing=True)) for more in ({}, more_layers)]
    assert again[0] < kept[0]
    assert again[1] - again[0] < 0.2 * (kept[1] - kept[0])  # what two more layers cost


def test_it_is_off_outside_of_training_and_changes_no_name(
    small: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is evaluated and exported must hold no second run of anything."""
    plain, model = (make(small, checkpointing=checkpointing) for checkpointing in (False, True))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert model.config == plain.config

    def used(*_: Any, **__: Any) -> None:
        raise AssertionError("checkpointed")

    monkeypatch.setattr("ddetr.models.deformable_transformer.checkpoint", used)
    with pytest.raises(AssertionError, match="checkpointed"):
        model(*batch())
    with torch.no_grad():
        model(*batch())
    model.eval()(*batch())

"""H-DETR and Mr.DETR: what exists for their training is left out, and what is found is what they find."""

import argparse
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from weights_of import TWO_STAGE, assert_same_weights, make_checkpoint, make_model, reasons, to_detrex, to_mr_detr

from ddetr.checkpoint import build_from_checkpoint, load_weights, to_official_state_dict
from ddetr.checkpoint.detectors import recognise
from ddetr.models.auxiliary import AuxiliaryConfig, attach_auxiliary
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.ops import ms_deform_attn

MIXED = TWO_STAGE | {"mixed_selection": True, "nheads": 8}
ONE_TO_ONE, ONE_TO_MANY = 6, 14


def hybrid(seed: int = 1) -> DeformableDETR:
    """As H-DETR trains: the queries that are matched one to many come after the others."""
    return make_model(seed, **MIXED | {"num_queries": ONE_TO_ONE + ONE_TO_MANY}).eval()


def save_h_detr(path: Path, source: DeformableDETR) -> Path:
    told = {"num_queries_one2one": ONE_TO_ONE, "num_queries_one2many": ONE_TO_MANY, "k_one2many": 6, "nheads": 8}
    args = argparse.Namespace(**told, look_forward_twice=True, mixed_selection=True, dropout=0.0, backbone="resnet10t")
    torch.save({"model": to_official_state_dict(source), "args": args}, path)
    return path


def test_h_detr_finds_what_its_one_to_one_queries_find(tmp_path: Path) -> None:
    """Its whole network with its mask between the two kinds of queries, against what is left of it."""
    source, images = hybrid(), torch.rand(2, 3, 64, 96)
    found = recognise(save_h_detr(tmp_path / "h.pth", source))
    config = found.checkpoint.config
    assert (config["num_queries"], config["mixed_selection"], config["dropout"]) == (ONE_TO_ONE, True, 0.0)
    assert found.left_out == (("query_embed.weight", "queries 6 to 19: matched one to many, H-DETR"),)
    is_many = torch.arange(ONE_TO_ONE + ONE_TO_MANY) >= ONE_TO_ONE
    unseen = (is_many[:, None] != is_many).expand(2 * 8, -1, -1)
    with torch.no_grad():
        encoded = source.encode(images)
        expected = source.decode(encoded, encoded.queries, unseen)[-1]
        got = build_from_checkpoint(found.checkpoint)(images)
    for name in ("pred_logits", "pred_boxes"):
        torch.testing.assert_close(got[name], expected[name][:, :ONE_TO_ONE], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got[name], source(images)[name][:, :ONE_TO_ONE]), "the mask matters"


@pytest.mark.parametrize(("num_queries", "kept"), [(1800, 300), (2400, 900), (900, 900)])
def test_numbers_of_queries_that_are_published(num_queries: int, kept: int, tmp_path: Path) -> None:
    """detrex's files have no command line: 1,800 are 300 and 1,500, 2,400 are 900 and 1,500."""
    source = make_model(1, **MIXED | {"num_queries": num_queries})
    torch.save({"model": to_detrex(source)}, tmp_path / "h.pth")
    found = recognise(tmp_path / "h.pth")
    assert found.checkpoint.config["num_queries"] == kept
    assert found.checkpoint.model["query_embed.weight"].equal(source.query_embed.weight[:kept])
    assert bool(found.left_out) == (kept < num_queries)
    assert any("matched one to one, as H-DETR published" in note for note in found.notes) == (kept < num_queries)


def test_h_detr_as_a_start_for_more_queries(tmp_path: Path) -> None:
    """Those that were matched one to many are no start for one to one."""
    source, model = hybrid(), make_model(2, **MIXED | {"num_queries": 9})
    report = load_weights(model, save_h_detr(tmp_path / "h.pth", source))
    assert model.query_embed.weight[:6].equal(source.query_embed.weight[:6])
    assert not any(row.equal(other) for row in model.query_embed.weight[6:] for other in source.query_embed.weight)
    assert reasons(report.skipped)["query_embed.weight"] == "queries 6 to 19: matched one to many, H-DETR"


def test_mr_detr_without_its_routes(tmp_path: Path) -> None:
    source = make_model(1, **MIXED | {"num_classes": 80})
    torch.save({"model": to_mr_detr(source)}, tmp_path / "mr.pth")
    found = recognise(tmp_path / "mr.pth")
    assert found.project == "Mr.DETR"
    state_dict = source.state_dict()
    assert {name: tensor.shape for name, tensor in found.checkpoint.model.items()} == {
        name: tensor.shape for name, tensor in state_dict.items()
    }
    assert all(tensor.equal(state_dict[name]) for name, tensor in found.checkpoint.model.items())
    # each of two layers: 2 instructions, a norm, 4 linear; a class head, a box head of 3 layers, the label embedding
    assert len(found.left_out) == 2 * (2 + 2 + 4) + 2 + 6 + 1
    assert {why for _, why in found.left_out} == {
        *("Mr.DETR's instructions", "Mr.DETR's second route", "Mr.DETR's one-to-many proposals"),
        "classes of denoising queries",
    }
    assert any("mixes in those of the layers before" in note for note in found.notes)

    model = make_model(2, **MIXED | {"num_classes": 80})
    report = load_weights(model, tmp_path / "mr.pth")
    assert report.share == 1
    assert set(report.skipped) == set(found.left_out)
    assert_same_weights(model, source)


def test_a_layer_of_mr_detr_computes_what_ours_does() -> None:
    """By its own names and in its own order: self-attention with its norm, attention to the image, norm, feed-forward,
    norm."""
    source = make_model(1, **MIXED).eval()
    start = "transformer.decoder.layers.0."
    weights = {n.removeprefix(start): t for n, t in to_mr_detr(source).items() if n.startswith(start)}
    shapes = [(4, 6), (2, 3), (1, 2), (1, 1)]
    query, position = torch.randn(2, 5, 32), torch.randn(2, 5, 32)
    memory, references = torch.randn(2, sum(h * w for h, w in shapes), 32), torch.rand(2, 5, 4, 4)

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (32,), weights[f"{name}.weight"], weights[f"{name}.bias"])

    with torch.no_grad():
        attention = torch.nn.MultiheadAttention(32, 8, batch_first=True)
        attention.load_state_dict(
            {n.removeprefix("attentions.0.attn."): t for n, t in weights.items() if n.startswith("attentions.0.attn.")}
        )
        x = query
        x = norm(x + attention(x + position, x + position, x)[0], "attentions.0.norm_o2o")
        value = linear(memory, "attentions.1.value_proj").unflatten(-1, (8, 4))
        offsets = linear(x + position, "attentions.1.sampling_offsets").unflatten(-1, (8, 4, 4, 2))
        shares = linear(x + position, "attentions.1.attention_weights").unflatten(-1, (8, 16)).softmax(-1)
        places = references[:, :, None, :, None, :2] + offsets / 4 * references[:, :, None, :, None, 2:] * 0.5
        sampled = ms_deform_attn(value, shapes, places, shares.unflatten(-1, (4, 4)))
        x = norm(x + linear(sampled, "attentions.1.output_proj"), "norms.0")
        hidden = linear(x, "ffns.0.layers.0.linear.linear").relu()
        x = norm(x + linear(hidden, "ffns.0.layers.1.linear"), "norms.1")
        got = source.transformer.decoder.layers[0](query, position, references, memory, shapes, None)
    torch.testing.assert_close(got, x, rtol=1e-4, atol=1e-5)


def test_what_trains_beside_our_own_network(tmp_path: Path) -> None:
    source = make_model(1, **MIXED)
    attach_auxiliary(source, AuxiliaryConfig(denoising=10, one_to_many=6))
    torch.save({"state_dict": {f"model.{name}": t for name, t in source.state_dict().items()}}, tmp_path / "last.ckpt")
    found = recognise(tmp_path / "last.ckpt")
    assert set(found.checkpoint.model) == set(make_checkpoint(source).model)
    assert {why for _, why in found.left_out} == {"queries and losses that exist in training alone"}

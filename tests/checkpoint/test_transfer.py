"""Weights into a model of other sizes: what fits is taken, the rest stays as it was, and too little is refused."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weights_of import (
    PETS,
    TWO_STAGE,
    assert_accounts_for_everything,
    assert_same_weights,
    make_checkpoint,
    make_model,
    reasons,
    save_official,
    to_transformers,
)

from ddetr.checkpoint import load_weights, save_checkpoint, to_official_state_dict
from ddetr.errors import InputError


@pytest.mark.parametrize(("source_queries", "num_queries"), [(6, 4), (6, 20), (6, 6)])
def test_another_number_of_queries(source_queries: int, num_queries: int, tmp_path: Path) -> None:
    source, model = make_model(1, num_queries=source_queries), make_model(2, num_queries=num_queries)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    got, queries = model.query_embed.weight, source.query_embed.weight
    common = min(num_queries, source_queries)
    assert got[:common].equal(queries[:common])
    assert ("query_embed.weight" in reasons(report.adapted)) == (num_queries != source_queries)
    if num_queries > source_queries:
        assert len({tuple(row.tolist()) for row in got}) == num_queries, "copies differ"
        assert (got[6:12] - queries).abs().max() < queries.std(), "by little"


def test_two_stage_takes_any_number_of_queries(tmp_path: Path) -> None:
    source, model = make_model(1, **TWO_STAGE), make_model(2, num_queries=50, **TWO_STAGE)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    assert report.share == 1
    assert not report.adapted


def test_weights_of_mixed_selection(tmp_path: Path) -> None:
    """As H-DETR saves them: its contents, of which it has 1,800 in training and uses the first 300."""
    source = make_model(1, **TWO_STAGE, mixed_selection=True)
    file = save_official(tmp_path / "a.pth", source)
    model = make_model(2, **TWO_STAGE, mixed_selection=True, num_queries=4)
    report = load_weights(model, file)
    assert model.query_embed.weight.equal(source.query_embed.weight[:4])
    assert reasons(report.adapted) == {"query_embed.weight": "the first 4 of 6 queries"}
    plain = make_model(3, **TWO_STAGE)
    report = load_weights(plain, file)
    assert report.share == 1
    assert reasons(report.skipped) == {
        "query_embed.weight": "the learned content of queries: set mixed_selection to have it"
    }


def test_what_proposals_say_of_classes(tmp_path: Path) -> None:
    """One score for any object, or one for each class: a file of ours says which."""
    any_object, by_class = (make_model(1, **TWO_STAGE, class_aware=is_aware) for is_aware in (False, True))
    for name, source in (("any.pth", any_object), ("each.pth", by_class)):
        save_checkpoint(tmp_path / name, make_checkpoint(source, categories=PETS))
    head = by_class.class_embed[-1].weight

    model = make_model(2, **TWO_STAGE, class_aware=True)
    load_weights(model, tmp_path / "each.pth", categories=PETS[::-1])
    assert model.class_embed[-1].weight.equal(head.flip(0)), "by the names of the classes"

    model = make_model(2, **TWO_STAGE, class_aware=True)
    report = load_weights(model, tmp_path / "any.pth")
    assert model.class_embed[-1].weight.equal(any_object.class_embed[-1].weight[:1].expand(3, -1))
    assert reasons(report.adapted)["class_embed.2.weight"] == "the score for any object is that of each class"

    model = make_model(2, **TWO_STAGE)
    before = model.class_embed[-1].weight.clone()
    report = load_weights(model, tmp_path / "each.pth")
    assert model.class_embed[-1].weight.equal(before)
    assert "a score for each class" in reasons(report.initialised)["class_embed.2.weight"]

    model = make_model(2, **TWO_STAGE, class_aware=True)  # of others it cannot be known, and they are taken as they are
    load_weights(model, save_official(tmp_path / "official.pth", by_class))
    assert model.class_embed[-1].weight.equal(head)


def test_single_scale_weights_into_four_levels(tmp_path: Path) -> None:
    """The one level of the file is the third of the model: both come from the last stage of the backbone."""
    source, model = make_model(1, num_feature_levels=1), make_model(2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    adapted = reasons(report.adapted)
    assert model.input_proj[2][0].weight.equal(source.input_proj[0][0].weight)
    assert adapted["input_proj.2.0.weight"] == "level 0 of the file, of the same stride"
    level_embed = model.transformer.level_embed
    assert level_embed[2].equal(source.transformer.level_embed[0])
    assert level_embed[[0, 1, 3]].equal(before["transformer.level_embed"][[0, 1, 3]])
    name = "transformer.encoder.layers.0.self_attn.sampling_offsets.bias"
    got, kept = (tensor.view(4, 4, 4, 2) for tensor in (model.state_dict()[name], before[name]))
    assert got[:, 2].equal(source.state_dict()[name].view(4, 1, 4, 2)[:, 0])
    assert got[:, [0, 1, 3]].equal(kept[:, [0, 1, 3]])
    assert "input_proj.0.0.weight" in reasons(report.initialised)
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_four_levels_into_a_single_scale_model(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2, num_feature_levels=1)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    assert model.input_proj[0][0].weight.equal(source.input_proj[2][0].weight)
    assert model.transformer.level_embed.equal(source.transformer.level_embed[2:3])
    assert {"input_proj.1.0.weight", "input_proj.3.0.weight"} <= reasons(report.skipped).keys()
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_levels_from_stride_4_on(tmp_path: Path) -> None:
    """Levels go by stride in both directions: a finer one stays as it was made, or is left out."""
    three = make_model(1)  # strides 8 to 64
    four = make_model(2, num_backbone_levels=4, num_feature_levels=5)
    before = four.state_dict()["transformer.level_embed"][0].clone()
    report = load_weights(four, save_official(tmp_path / "a.pth", three))
    for level in range(4):
        assert four.input_proj[level + 1][0].weight.equal(three.input_proj[level][0].weight)
    assert four.transformer.level_embed[1:].equal(three.transformer.level_embed)
    assert four.transformer.level_embed[0].equal(before)
    assert "input_proj.0.0.weight" in reasons(report.initialised)

    back = make_model(3)
    report = load_weights(back, save_official(tmp_path / "b.pth", four))
    assert back.input_proj[3][0].weight.equal(three.input_proj[3][0].weight)
    assert back.transformer.level_embed.equal(three.transformer.level_embed)
    assert "input_proj.0.0.weight" in reasons(report.skipped)

    same = make_model(4, num_backbone_levels=4, num_feature_levels=5)
    assert load_weights(same, save_official(tmp_path / "c.pth", four)).share == 1
    assert_same_weights(same, four)


def test_other_points_and_layers(tmp_path: Path) -> None:
    source = make_model(1, dec_layers=3, enc_n_points=2)
    model = make_model(2, dec_layers=2, enc_n_points=4, enc_layers=2, dim_feedforward=48)
    report = load_weights(model, save_official(tmp_path / "a.pth", source, enc_n_points=2))
    name = "transformer.encoder.layers.0.self_attn.attention_weights.weight"
    got, expected = model.state_dict()[name].view(4, 4, 4, 32), source.state_dict()[name].view(4, 4, 2, 32)
    assert got[:, :, :2].equal(expected)
    assert reasons(report.adapted)[name] == "4 of 4 levels, 2 of 4 points; the others as initialised"
    assert reasons(report.skipped)["transformer.decoder.layers.2.norm1.weight"] == "not in the model"
    missing = reasons(report.initialised)
    assert missing["transformer.encoder.layers.1.norm1.weight"] == "not in the file"
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_more_hidden_units_change_nothing_at_first(tmp_path: Path) -> None:
    """The new ones of a feed-forward part have no say until training gives them one."""
    source, model = make_model(1, **TWO_STAGE).eval(), make_model(2, dim_feedforward=48, **TWO_STAGE).eval()
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    name = "transformer.decoder.layers.0.linear2.weight"
    assert reasons(report.adapted)[name] == "32 hidden units, and new ones that add nothing yet to make 48"
    assert model.transformer.encoder.layers[0].linear1.weight[32:].abs().max() > 0, "or nothing would ever be learned"
    images = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(model(images)["pred_logits"], source(images)["pred_logits"])
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_fewer_hidden_units_are_the_strongest(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2, dim_feedforward=4)
    layer = source.transformer.decoder.layers[1]
    chosen = [3, 8, 20, 31]
    with torch.no_grad():
        layer.linear2.weight[:, chosen] *= 100
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    got = model.transformer.decoder.layers[1]
    assert got.linear1.weight.equal(layer.linear1.weight[chosen])
    assert got.linear1.bias.equal(layer.linear1.bias[chosen])
    assert got.linear2.weight.equal(layer.linear2.weight[:, chosen])
    assert got.linear2.bias.equal(layer.linear2.bias)
    name = "transformer.decoder.layers.1.linear1.bias"
    assert reasons(report.adapted)[name] == "the 4 strongest of 32 hidden units"


def test_another_number_of_heads_keeps_the_rest(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2, nheads=2)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    name = "transformer.encoder.layers.0.self_attn.sampling_offsets.weight"
    assert "another number of heads" in reasons(report.initialised)[name]
    assert name in reasons(report.skipped)


def test_learned_positions(tmp_path: Path) -> None:
    options = {"position_embedding": "learned"}
    source, model = make_model(1, **options), make_model(2, **options)
    weights = to_transformers(source, 5)
    for ours, theirs in (("row_embed", "row_embeddings"), ("col_embed", "column_embeddings")):
        weights[f"model.position_embedding.{theirs}.weight"] = weights.pop(f"model.backbone.1.{ours}.weight")
    save_file(weights, tmp_path / "model.safetensors")
    assert load_weights(model, tmp_path / "model.safetensors").share == 1
    assert_same_weights(model, source)


@pytest.mark.parametrize(("source_freeze", "freeze"), [("none", "stem"), ("stem", "none")])
def test_norms_with_and_without_counters(source_freeze: str, freeze: str, tmp_path: Path) -> None:
    source, model = make_model(1, freeze_backbone=source_freeze), make_model(2, freeze_backbone=freeze)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pth")
    report = load_weights(model, tmp_path / "a.pth")
    assert_same_weights(model, source)
    counters = report.skipped if freeze == "stem" else report.initialised
    assert counters
    assert all(name.endswith("num_batches_tracked") and "counter" in why for name, why in counters)
    assert report.share == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_in_another_precision(dtype: torch.dtype, tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2, num_queries=9, num_feature_levels=3)
    torch.save({n: t.to(dtype) for n, t in to_official_state_dict(source).items()}, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    name = "transformer.decoder.layers.1.linear2.weight"
    assert model.state_dict()[name].equal(source.state_dict()[name].to(dtype).float())


def test_another_hidden_size_is_refused(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", make_model(hidden_dim=64))
    with pytest.raises(
        InputError, match="expected weights of hidden_dim 32, as the model has, got 64: set hidden_dim=64"
    ):
        load_weights(make_model(), path)


def test_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", make_model(1))
    model = make_model(2, enc_layers=24, dim_feedforward=8192)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"only \d+% of the model's parameters .* another architecture"):
        load_weights(model, path)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_another_backbone_that_shares_blocks_is_refused(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", make_model(1, backbone="resnet18"))
    with pytest.raises(InputError, match="expected weights of the backbone resnet34, .* it has another backbone"):
        load_weights(make_model(2, backbone="resnet34"), path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused_by_name(value: float, tmp_path: Path) -> None:
    """But not those that are skipped."""
    model = make_model()
    weights = dict(make_model(1).state_dict())
    weights["criterion.scale"] = torch.tensor([value])
    torch.save({"model": weights}, tmp_path / "a.pth")
    assert load_weights(model, tmp_path / "a.pth").share == 1
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    name = "transformer.encoder.layers.0.linear1.weight"
    weights[name] = weights[name].clone()
    weights[name][3, 4] = value
    torch.save({"model": weights}, tmp_path / "b.pth")
    with pytest.raises(InputError, match=rf"b\.pth: {name} holds values that are NaN or infinite"):
        load_weights(model, tmp_path / "b.pth")
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())

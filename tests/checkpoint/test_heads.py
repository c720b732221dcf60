"""Which head of a file each head of a model starts from, between the variants of the model."""

from pathlib import Path

from weights_of import REFINE, TWO_STAGE, assert_accounts_for_everything, make_model, reasons, save_official

from ddetr.checkpoint import load_weights, to_official_state_dict


def test_plain_weights_into_a_refining_model(tmp_path: Path) -> None:
    """The one head goes to every layer; but only the first layer still corrects points, as it was trained to."""
    source, model = make_model(1), make_model(2, **REFINE)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    adapted = reasons(report.adapted)
    for layer in range(2):
        assert model.class_embed[layer].weight.equal(source.class_embed[0].weight)
        assert model.bbox_embed[layer].layers[1].weight.equal(source.bbox_embed[0].layers[1].weight)
        assert adapted[f"class_embed.{layer}.weight"] == "the file's one head for all layers"
    assert model.bbox_embed[0].layers[2].weight.equal(source.bbox_embed[0].layers[2].weight)
    assert not model.bbox_embed[1].layers[2].weight.any()
    assert not model.bbox_embed[1].layers[2].bias.any()
    assert "another kind of reference" in adapted["bbox_embed.1.layers.2.bias"]
    assert not report.skipped
    assert not report.initialised
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_refining_weights_into_a_plain_model(tmp_path: Path) -> None:
    source, model = make_model(1, **REFINE), make_model(2)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    assert model.class_embed[0].weight.equal(source.class_embed[1].weight), "the last class head"
    assert model.bbox_embed[0].layers[2].weight.equal(source.bbox_embed[0].layers[2].weight), "the head that saw points"
    assert reasons(report.adapted)["class_embed.0.weight"] == "the head of decoder layer 1 for all layers"
    assert {name.split(".layers")[0] for name, _ in report.skipped} == {
        "class_embed.0.weight",
        "class_embed.0.bias",
        "bbox_embed.1",
    }
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_refining_weights_into_a_two_stage_model_and_back(tmp_path: Path) -> None:
    source, model = make_model(1, **REFINE), make_model(2, **TWO_STAGE)
    report = load_weights(model, save_official(tmp_path / "a.pth", source))
    assert model.class_embed[1].weight.equal(source.class_embed[1].weight)
    assert model.bbox_embed[1].layers[2].weight.equal(source.bbox_embed[1].layers[2].weight)
    assert not model.bbox_embed[0].layers[2].bias.any(), "trained to correct points, where two-stage has boxes"
    missing = reasons(report.initialised)
    assert "only two-stage models have" in missing["class_embed.2.weight"]
    assert missing["transformer.pos_trans.weight"] == "not in the file"
    skipped = reasons(report.skipped)
    assert skipped.keys() == {
        "query_embed.weight",
        "transformer.reference_points.weight",
        "transformer.reference_points.bias",
    }

    source, model = model, make_model(3, **REFINE)
    report = load_weights(model, save_official(tmp_path / "b.pth", source))
    assert model.bbox_embed[0].layers[2].bias.tolist() == [0, 0, -2, -2], "as the constructor starts"
    assert model.bbox_embed[1].layers[2].weight.equal(source.bbox_embed[1].layers[2].weight)
    assert "class_embed.2.weight" in reasons(report.skipped)
    assert "query_embed.weight" in reasons(report.initialised)
    assert_accounts_for_everything(report, model, to_official_state_dict(source))

"""Rows of class heads follow the names of the classes."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from weights_of import (
    PETS,
    REFINE,
    TWO_STAGE,
    assert_accounts_for_everything,
    assert_same_weights,
    make_checkpoint,
    make_model,
    reasons,
    save_official,
    to_detrex,
    to_mmdetection,
    to_transformers,
)

from ddetr.checkpoint import load_weights, save_checkpoint, to_official_state_dict
from ddetr.checkpoint.class_synonyms import meaning
from ddetr.checkpoint.coco_classes import COCO_CLASSES
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.heads import PRIOR_BIAS


def test_class_rows_of_official_coco_weights_by_name(tmp_path: Path) -> None:
    """91 rows whose numbers are COCO's ids, into three classes of which COCO knows two."""
    source, model = make_model(1, num_classes=91, **REFINE), make_model(2, **REFINE)
    report = load_weights(model, save_official(tmp_path / "coco.pth", source), categories=PETS)
    for layer in range(2):
        got, rows = model.class_embed[layer], source.class_embed[layer]
        assert got.weight[:2].equal(rows.weight[[17, 18]])
        assert got.bias[:2].equal(rows.bias[[17, 18]])
        assert got.bias[2].item() == pytest.approx(PRIOR_BIAS)
        assert got.weight[2].abs().max() < 0.2, "a fresh row"
        why = reasons(report.adapted)[f"class_embed.{layer}.weight"]
        assert why == "rows of 2 of 3 classes copied by name, new: guinea pig"
    assert_same_weights(model, source, but=["class_embed"])
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


def test_class_rows_by_name_in_another_order(tmp_path: Path) -> None:
    """As many classes, other labels: rows follow their names, however they are spelt."""
    source, model = make_model(1), make_model(2)
    save_checkpoint(tmp_path / "a.pth", make_checkpoint(source, categories=PETS))
    categories = [Category(1, "Guinea_Pig"), Category(2, "CAT"), Category(3, " dog ")]
    report = load_weights(model, tmp_path / "a.pth", categories=categories)
    assert model.class_embed[0].weight.equal(source.class_embed[0].weight[[2, 0, 1]])
    assert reasons(report.adapted)["class_embed.0.bias"] == "rows of 3 of 3 classes copied by name"
    assert not load_weights(model, tmp_path / "a.pth", categories=PETS).adapted, "the same classes in the same order"


def test_class_rows_of_unnamed_classes(tmp_path: Path) -> None:
    source = make_model(1, num_classes=7)
    path = save_official(tmp_path / "custom.pth", source)
    report = load_weights(model := make_model(2, num_classes=7), path)
    assert not report.adapted
    categories = [Category(i, f"class {i}") for i in range(7)]
    report = load_weights(model, path, categories=categories)
    assert reasons(report.adapted)["class_embed.0.weight"] == "in order: the file names no classes"
    assert_same_weights(model, source)

    model = make_model(2)
    rows = model.class_embed[0].weight.clone()
    report = load_weights(model, path, categories=PETS)
    assert reasons(report.initialised)["class_embed.0.weight"] == "the file has 7 classes without names, the model 3"
    assert model.class_embed[0].weight.equal(rows)

    save_checkpoint(tmp_path / "named.pth", make_checkpoint(source))
    report = load_weights(model, tmp_path / "named.pth")
    assert "pass categories" in reasons(report.initialised)["class_embed.0.weight"]


@pytest.mark.parametrize(("rows", "num_classes"), [(91, 80), (80, 91)])
def test_coco_classes_in_both_numberings(rows: int, num_classes: int, tmp_path: Path) -> None:
    """91 rows by COCO's ids (official), 80 without the gaps (detrex): one into the other without being told."""
    source, model = make_model(1, num_classes=rows), make_model(2, num_classes=num_classes)
    weights = to_official_state_dict(source) if rows == 91 else to_detrex(source)
    torch.save({"model": weights}, tmp_path / "a.pth")
    report = load_weights(model, tmp_path / "a.pth")
    ids = list(COCO_CLASSES)
    got, expected = model.class_embed[0].weight, source.class_embed[0].weight
    assert got.equal(expected[ids]) if rows == 91 else got[ids].equal(expected)
    why = reasons(report.adapted)["class_embed.0.weight"]
    assert (
        why == f"the model's {num_classes} classes taken for COCO's; rows of 80 of {num_classes} classes copied by name"
    )


def test_class_names_of_transformers_and_mmdetection(tmp_path: Path) -> None:
    source = make_model(1)
    id2label = {"0": "dog", "1": "guinea pig", "2": "fish"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "id2label": id2label}))
    save_file(to_transformers(source, 5), tmp_path / "model.safetensors")
    meta = {"dataset_meta": {"classes": ("dog", "guinea pig", "fish"), "palette": [(1, 2, 3)]}}
    torch.save({"state_dict": to_mmdetection(source), "meta": meta}, tmp_path / "mm.pth")
    for path in (tmp_path, tmp_path / "mm.pth"):
        model = make_model(2)
        report = load_weights(model, path, categories=PETS)
        assert model.class_embed[0].weight[1:].equal(source.class_embed[0].weight[:2])
        assert reasons(report.adapted)["class_embed.0.bias"] == "rows of 2 of 3 classes copied by name, new: cat"


def test_class_rows_by_other_words_for_the_same_class(tmp_path: Path) -> None:
    """Pascal VOC's words for COCO's classes."""
    source, model = make_model(1, num_classes=80), make_model(2, num_classes=5)
    torch.save({"model": to_detrex(source)}, tmp_path / "coco.pth")
    words = ("aeroplane", "tvmonitor", "DiningTable", "motorbike", "blood cell")
    report = load_weights(model, tmp_path / "coco.pth", categories=[Category(i, word) for i, word in enumerate(words)])
    names = ("airplane", "tv", "dining table", "motorcycle")
    rows = [list(COCO_CLASSES.values()).index(name) for name in names]
    assert model.class_embed[0].weight[:4].equal(source.class_embed[0].weight[rows])
    assert [(one.name, one.row, one.row_name) for one in report.classes] == [
        *zip(words, rows, names),
        ("blood cell", None, None),
    ]


def test_a_class_of_the_very_name_goes_before_a_synonym(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2)
    categories = [Category(0, "sofa"), Category(1, "couch"), Category(2, "chair")]
    save_checkpoint(tmp_path / "a.pth", make_checkpoint(source, categories=categories))
    load_weights(model, tmp_path / "a.pth", categories=categories[::-1])
    assert model.class_embed[0].weight.equal(source.class_embed[0].weight[[2, 1, 0]])


def test_no_class_of_coco_means_the_same_as_another() -> None:
    assert len({meaning(name) for name in COCO_CLASSES.values()}) == 80
    assert meaning("Potted-Plant") == meaning("pottedplant")
    assert meaning("Mobile phone") == meaning("cell phone")
    assert meaning("remote") != meaning("cell phone")


def test_rows_of_the_proposal_head_are_no_classes(tmp_path: Path) -> None:
    """Its first row says "any object": it stays the first, whatever the classes are."""
    source, model = make_model(1, num_classes=91, **TWO_STAGE), make_model(2, **TWO_STAGE)
    report = load_weights(model, save_official(tmp_path / "a.pth", source), categories=PETS)
    assert model.class_embed[1].weight[0].equal(source.class_embed[1].weight[17])
    assert model.class_embed[2].weight.equal(source.class_embed[2].weight[:3])
    assert "class-agnostic" in reasons(report.adapted)["class_embed.2.weight"]

    save_checkpoint(tmp_path / "b.pth", make_checkpoint(make_model(3, **TWO_STAGE), categories=PETS))
    report = load_weights(model, tmp_path / "b.pth", categories=PETS[::-1])
    assert "class_embed.2.weight" in report.loaded


def test_wrong_number_of_categories(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="expected 3 categories, as the model has, got 2"):
        load_weights(make_model(), tmp_path / "a.pth", categories=PETS[:2])

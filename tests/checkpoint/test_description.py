"""What a file is, for people and for programs."""

import io
import json
from pathlib import Path

import pytest
import torch
from weights_of import PETS, TWO_STAGE, VARIANTS, make_checkpoint, make_model, save_official, to_mr_detr

from ddetr.checkpoint import save_checkpoint
from ddetr.checkpoint.description import Description, describe, variant_of
from ddetr.errors import InputError


def rendered(found: Description) -> str:
    from rich.console import Console

    console = Console(width=400, file=io.StringIO())
    console.print(found.render())
    return console.file.getvalue()


def test_weights_of_another_project(tmp_path: Path) -> None:
    options = {"num_classes": 91, "mixed_selection": True, "nheads": 8, **TWO_STAGE}
    source = make_model(1, **options)
    torch.save({"model": to_mr_detr(source)}, tmp_path / "mr.pth")
    found = describe(tmp_path / "mr.pth")
    assert (found.project, found.where, found.precision) == ("Mr.DETR", "model", ["float32"])
    assert found.variant == "two-stage, box refinement (++), mixed selection"
    assert found.config["backbone"] == "resnet10t"
    assert found.left_out["Mr.DETR's second route"] == 8
    assert found.ddetr_version is None
    parameters = sum(p.numel() for p in make_model(freeze_backbone="none", **options).parameters())
    assert found.parameters["all"] == sum(list(found.parameters.values())[:-1]) == parameters
    text = rendered(found)
    for said in ("Mr.DETR, in its 'model'", "num_queries 6", "80: person", "11 rows of ids that are not used"):
        assert said in text
    assert "Mr.DETR's second route (8 tensors)" in text
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert (told["kind"], told["classes"][1]) == ("detector", {"category_id": 1, "name": "person"})


def test_heads_of_all_layers_count_once(tmp_path: Path) -> None:
    source = make_model(1)
    found = describe(save_official(tmp_path / "a.pth", source))
    heads = [*source.class_embed.parameters(), *source.bbox_embed.parameters()]
    assert found.parameters["heads"] == sum(p.numel() for p in heads)


def test_our_own_file(tmp_path: Path) -> None:
    metrics = {"AP": 0.412345, "per_class": {"AP": [0.1, 0.2, 0.3, 0.4]}}
    fields = {"metrics": metrics, "training": {"data": "pets", "step": 20}, "threshold": float("nan")}
    save_checkpoint(tmp_path / "best.pth", make_checkpoint(make_model(), categories=PETS, **fields))
    found = describe(tmp_path / "best.pth")
    assert found.project == "ddetr"
    text = rendered(found)
    for said in ("written by", "ddetr 0", "plain", "3: cat, dog, guinea pig", "AP 0.4123", "data pets, step 20"):
        assert said in text
    assert "0.2" not in text.split("AP 0.4123")[1].splitlines()[0], "long lists are for programs"
    told = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert told["threshold"] is None
    assert told["metrics"] == metrics


@pytest.mark.parametrize(
    ("name", "variant"),
    [("single_scale", "plain, single scale"), ("single_scale_dc5", "plain, single scale, DC5"), ("base", "plain")],
)
def test_variants_have_the_words_of_the_paper(name: str, variant: str) -> None:
    assert variant_of(make_model(**VARIANTS[name]).config) == variant


def test_other_networks_are_named(tmp_path: Path) -> None:
    torch.save({"state_dict": {"layer4.0.conv1.weight": torch.zeros(3)}}, tmp_path / "resnet50.pth")
    found = describe(tmp_path / "resnet50.pth")
    assert (
        found.render() == "resnet50.pth: a backbone alone (ResNet): start from it with --model.pretrained_backbone FILE"
    )
    assert found.to_dict() == {"kind": "backbone", "file": "resnet50.pth", "architecture": "ResNet"}
    torch.save({"model": {"rpn.head.a": torch.zeros(3), "roi_heads.b": torch.zeros(3)}}, tmp_path / "frcnn.pth")
    assert "another detector, Faster R-CNN or a relative" in describe(tmp_path / "frcnn.pth").render()
    torch.save({"model": {"what.weight": torch.zeros(3)}}, tmp_path / "unknown.pth")
    with pytest.raises(InputError, match="expected weights of Deformable DETR .* got 'what.weight'"):
        describe(tmp_path / "unknown.pth")

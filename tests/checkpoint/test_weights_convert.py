"""Checkpoints in the formats of other projects: each is read back bit for bit, and refused where it cannot hold it."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from weights_of import (
    PETS,
    REFINE,
    TWO_STAGE,
    VARIANTS,
    assert_same_weights,
    make_checkpoint,
    make_model,
    save_official,
    to_detrex,
)

from ddetr.checkpoint import (
    Checkpoint,
    build_from_checkpoint,
    convert,
    convert_checkpoint,
    load_checkpoint,
    load_weights,
    to_official_state_dict,
)
from ddetr.checkpoint.coco_classes import COCO_CLASSES, NUM_IDS
from ddetr.cli import main as cli
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.postprocess import PostProcess

COCO_91 = tuple(Category(row, COCO_CLASSES.get(row, f"N/A {row}")) for row in range(NUM_IDS))
COCO_80 = tuple(Category(category_id, name) for category_id, name in COCO_CLASSES.items())
TINY = {"backbone": "test_resnet"}  # timm's smallest of plain batch norms
WIDE = {"hidden_dim": 256}  # the only size of the official code's and of detrex's two-stage networks


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(
        one[name].dtype == other[name].dtype and one[name].equal(other[name]) for name in one
    )


def tensors_in(path: Path) -> dict[str, Tensor]:
    return torch.load(path, weights_only=True)["model"]


def read_into(path: Path, categories: tuple[Category, ...], **options: Any) -> Checkpoint:
    """A file of weights as a checkpoint, through a network made for it."""
    model = make_model(9, num_classes=len(categories), **options)
    report = load_weights(model, path)
    assert not [*report.adapted, *report.skipped, *report.initialised]
    return Checkpoint.of(model, categories)


def round_trip(source: Checkpoint, first: Path, format: Any, suffix: str) -> Path:
    """first -> ours -> `format`: the second file of that format."""
    ours = first.with_name(f"ours{suffix}")
    convert_checkpoint(source, ours, "ours")
    assert same(load_checkpoint(ours).model, source.model)
    second = first.with_name(f"second{first.suffix}")
    convert_checkpoint(load_checkpoint(ours), second, format)
    return second


@pytest.fixture
def tiny_is_a_resnet(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if torchvision and detectron2 had timm's smallest ResNet too: the real ones take seconds."""
    for name in ("_OFFICIAL_RESNETS", "_RESNETS"):
        monkeypatch.setattr(convert, name, ("test_resnet",))


def check_official_round_trip(options: dict[str, Any], suffix: str, folder: Path) -> None:
    options = options | WIDE if options.get("two_stage") else options
    source = make_model(1, num_classes=NUM_IDS, **options)
    first = save_official(folder / "first.pth", source)
    second = round_trip(read_into(first, COCO_91, **options), first, "official", suffix)
    assert same(tensors_in(second), to_official_state_dict(source))
    args = torch.load(second, weights_only=True)["args"]
    assert {name: source.config[name] for name in args} == args
    assert second.stat().st_size < 1.02 * first.stat().st_size, "shared heads are stored once"


def test_official_to_ours_and_back_is_bit_identical(
    variant: dict[str, Any], tiny_is_a_resnet: None, tmp_path: Path
) -> None:
    suffix = ".safetensors" if variant.get("with_box_refine") else ".pth"
    check_official_round_trip(variant | TINY, suffix, tmp_path)


def test_official_weights_of_resnet50_go_there_and_back(tmp_path: Path) -> None:
    check_official_round_trip(TWO_STAGE | {"backbone": "resnet50"}, ".pth", tmp_path)


def check_detrex_round_trip(options: dict[str, Any], folder: Path) -> None:
    options = options | WIDE if options.get("two_stage") else options
    source = make_model(1, num_classes=80, **options)
    torch.save({"model": to_detrex(source)}, folder / "first.pth")
    checkpoint = read_into(folder / "first.pth", COCO_80, **options)
    second = round_trip(checkpoint, folder / "first.pth", "detrex", ".pth")
    assert same(tensors_in(second), to_detrex(source))


@pytest.mark.parametrize("variant_name", ["single_scale", "base", "refine", "two_stage"])
def test_detrex_to_ours_and_back_is_bit_identical(variant_name: str, tiny_is_a_resnet: None, tmp_path: Path) -> None:
    levels = {"num_feature_levels": 1 if variant_name == "single_scale" else 5}
    check_detrex_round_trip(VARIANTS[variant_name] | TINY | levels, tmp_path)


def test_detrex_weights_of_a_real_resnet_go_there_and_back(tmp_path: Path) -> None:
    check_detrex_round_trip(TWO_STAGE | {"backbone": "resnet18"}, tmp_path)


def test_half_precision_stays(tiny_is_a_resnet: None, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(1, **TINY | TWO_STAGE | WIDE), categories=PETS)
    checkpoint.model = {name: tensor.half() for name, tensor in checkpoint.model.items()}
    for format, name in (("official", "a.pth"), ("transformers", "b"), ("detrex", "c.pth"), ("ours", "d.safetensors")):
        done = convert_checkpoint(checkpoint, tmp_path / name, format)
        assert done.num_tensors == len(checkpoint.model)
        assert 1 < done.num_bytes / sum(tensor.nbytes for tensor in checkpoint.model.values()) < 1.2
    assert {tensor.dtype for tensor in tensors_in(tmp_path / "a.pth").values()} == {torch.float16}


@pytest.mark.parametrize("last_id", [40, 200])
def test_officially_a_class_lies_in_the_row_of_its_category_id(
    last_id: int, tiny_is_a_resnet: None, tmp_path: Path
) -> None:
    """The official code takes labels for category ids: the same boxes and scores, under those."""
    categories = (Category(17, "cat"), Category(last_id, "dog"), Category(5, "guinea pig"))
    ours = make_model(1, **TINY | TWO_STAGE | WIDE).eval()
    done = convert_checkpoint(make_checkpoint(ours, categories=categories), tmp_path / "a.pth", "official")
    num_rows = max(NUM_IDS, last_id + 1)
    notes = dict(done.notes)
    assert f"3 in {num_rows} rows" in notes["classes"]
    assert ("change" in notes) == (num_rows > NUM_IDS)

    theirs = DeformableDETR(**ours.config | {"num_classes": num_rows}).eval()
    theirs.load_state_dict(tensors_in(tmp_path / "a.pth"))
    images, size = torch.randn(1, 3, 64, 96), torch.tensor([[64, 96]])
    with torch.no_grad():
        (expected,), (found,) = (PostProcess(18)(model(images), size) for model in (ours, theirs))
    assert found["labels"].tolist() == [categories[label].category_id for label in expected["labels"]]
    assert torch.allclose(found["boxes"], expected["boxes"], atol=1e-3)
    assert torch.allclose(found["scores"], expected["scores"], atol=1e-6)

    model = make_model(2, **TINY | TWO_STAGE | WIDE)
    load_weights(model, tmp_path / "a.pth", categories=categories)
    assert_same_weights(model, ours)


def test_the_names_of_classes_are_beside_the_weights(tiny_is_a_resnet: None, tmp_path: Path) -> None:
    """detrex has none in its files, and does not look at ours."""
    source = make_model(1, **TINY)
    convert_checkpoint(make_checkpoint(source, categories=PETS), tmp_path / "a.pth", "detrex")
    model = make_model(2, **TINY)
    load_weights(model, tmp_path / "a.pth", categories=PETS[::-1])
    assert model.class_embed[0].weight.equal(source.class_embed[0].weight.flip(0))


@pytest.mark.parametrize("ids", [(-1, 2, 3), (4, 4, 5), (1, 2, 10**9)])
def test_ids_that_are_no_rows_are_refused(ids: tuple[int, ...], tiny_is_a_resnet: None, tmp_path: Path) -> None:
    categories = [Category(category_id, f"class {i}") for i, category_id in enumerate(ids)]
    checkpoint = make_checkpoint(make_model(1, **TINY), categories=categories)
    with pytest.raises(InputError, match=f"a class row for each category id.*{ids[0]}, {ids[1]}"):
        convert_checkpoint(checkpoint, tmp_path / "a.pth", "official")


def test_for_detrex_the_rows_of_coco_become_its_eighty_classes(tiny_is_a_resnet: None, tmp_path: Path) -> None:
    """Its own converter keeps the first rows of the head of proposals, whose very first one says "any object"."""
    source = make_model(1, num_classes=NUM_IDS, **TINY | TWO_STAGE | WIDE)
    done = convert_checkpoint(make_checkpoint(source, categories=COCO_91), tmp_path / "a.pth", "detrex")
    assert "num_classes=80" in dict(done.notes)["use"]
    found, weights = tensors_in(tmp_path / "a.pth"), source.state_dict()
    assert found["class_embed.1.weight"].equal(weights["class_embed.1.weight"][list(COCO_CLASSES)])
    assert found["class_embed.2.bias"].equal(weights["class_embed.2.bias"][:80])
    model = make_model(2, num_classes=80, **TINY | TWO_STAGE | WIDE)
    assert not load_weights(model, tmp_path / "a.pth", categories=COCO_80).adapted


@pytest.mark.parametrize(
    ("format", "options", "named"),
    [
        ("official", TINY, "the backbone test_resnet (it has ResNets of bottlenecks)"),
        ("detrex", TINY, "the backbone test_resnet (it has ResNets)"),
        ("transformers", {"backbone": "test_efficientnet"}, "the backbone test_efficientnet"),
        ("transformers", TINY | {"position_embedding": "learned"}, "learned position embeddings"),
        ("transformers", TINY | {"num_feature_levels": 2}, "two feature levels"),
        ("transformers", TINY | {"hidden_dim": 48}, "hidden_dim 48"),
        ("transformers", TINY | TWO_STAGE | {"mixed_selection": True}, "mixed_selection"),
        ("transformers", TINY | TWO_STAGE | {"class_aware": True}, "class_aware"),
        ("transformers", TINY | TWO_STAGE | {"query_selection": "peaks"}, "query_selection peaks"),
        ("transformers", TINY | {"num_backbone_levels": 4}, "a backbone level of stride 4"),
        ("detrex", VARIANTS["single_scale_dc5"] | {"backbone": "resnet18"}, "dilation"),
        ("detrex", TWO_STAGE | {"backbone": "resnet18"}, "hidden_dim 32 in a two-stage network"),
        ("detrex", {"backbone": "resnet18", "enc_n_points": 2}, "other numbers of points than 4"),
    ],
)
def test_what_a_format_cannot_express_is_named(format: Any, options: dict, named: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(1, **options))
    with pytest.raises(InputError, match=rf"cannot express {re.escape(named)}.*Nothing was written"):
        convert_checkpoint(checkpoint, tmp_path / ("a" if format == "transformers" else "a.pth"), format)
    assert not list(tmp_path.iterdir())


def test_heads_that_should_be_one_but_differ_are_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(1, **TINY))
    checkpoint.model["class_embed.1.bias"] = checkpoint.model["class_embed.1.bias"] + 1
    with pytest.raises(InputError, match=r"class_embed\.1\.bias and class_embed\.0\.bias are one head"):
        convert_checkpoint(checkpoint, tmp_path / "a", "transformers")


def test_nothing_is_replaced_unasked(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(1, **TINY))
    file, folder = tmp_path / "a.pth", tmp_path / "a"
    convert_checkpoint(checkpoint, file, "ours")
    convert_checkpoint(checkpoint, folder, "transformers")
    for output, format in ((file, "ours"), (folder, "transformers")):
        with pytest.raises(InputError, match="there already: choose another name, or replace it by --overwrite"):
            convert_checkpoint(checkpoint, output, format)
        convert_checkpoint(checkpoint, output, format, overwrite=True)
    (folder / "thesis.tex").write_text("years")
    with pytest.raises(InputError, match=r"holds more than a converted checkpoint \(thesis\.tex\)"):
        convert_checkpoint(checkpoint, folder, "transformers", overwrite=True)
    assert (folder / "thesis.tex").read_text() == "years"
    for output, format, message in (
        (tmp_path / "b.onnx", "ours", "expected a file that ends in .pth or .pt or .safetensors"),
        (tmp_path / "b.safetensors", "official", "expected a file that ends in .pth or .pt"),
        (tmp_path / "b.safetensors", "transformers", "expected a new folder"),
        (tmp_path / "b.pth", "onnx", "expected one of ours, official, transformers, detrex"),
        (file / "b.pth", "ours", "cannot be made"),
        ("..", "transformers", "expected the name of a new file or folder"),
        ("/proc/b.pth", "ours", "OUT: /proc/b.pth cannot be written"),
    ):
        with pytest.raises(InputError, match=re.escape(message)):
            convert_checkpoint(checkpoint, output, format)
    (tmp_path / "c.pth").mkdir()
    with pytest.raises(InputError, match=r"c\.pth is a folder"):
        convert_checkpoint(checkpoint, tmp_path / "c.pth", "ours", overwrite=True)


def test_a_checkpoint_of_too_few_categories_is_refused(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(1, **TINY))
    checkpoint.categories = checkpoint.categories[:2]
    with pytest.raises(InputError, match="each of the 3 classes of the checkpoint, got 2"):
        convert_checkpoint(checkpoint, tmp_path / "a.pth", "ours")


@pytest.mark.parametrize("format", ["ours", "transformers"])
def test_what_reads_back_otherwise_is_not_kept(format: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that the reader does not know, a number that the disk changed: the old file stays, and no rest of it."""
    output = tmp_path / ("a" if format == "transformers" else "a.pth")
    before = make_checkpoint(make_model(1, **TINY))
    convert_checkpoint(before, output, format)
    after = make_checkpoint(make_model(2, **TINY))
    read: Callable = convert.read_weights

    def disturbed(path: Path) -> Any:
        source = read(path)
        source.tensors["transformer.level_embed"][0, 0] += 1
        return source

    monkeypatch.setattr(convert, "read_weights", disturbed)
    with pytest.raises(RuntimeError, match=r"reads back otherwise.*transformer\.level_embed; it was not kept"):
        convert_checkpoint(after, output, format, overwrite=True)
    assert list(tmp_path.iterdir()) == [output]
    found = read(output).tensors["transformer.level_embed"]
    assert found.equal(before.model["transformer.level_embed"])


def test_whoever_may_read_the_folder_may_read_the_weights(tmp_path: Path) -> None:
    """safetensors makes its files for their owner alone, which a server or a colleague is not."""
    checkpoint = make_checkpoint(make_model(1, **TINY))
    convert_checkpoint(checkpoint, tmp_path / "a", "transformers")
    convert_checkpoint(checkpoint, tmp_path / "a.safetensors", "ours")
    usual = (tmp_path / "a" / "config.json").stat().st_mode
    assert (tmp_path / "a" / "model.safetensors").stat().st_mode == usual
    assert (tmp_path / "a.safetensors").stat().st_mode == usual


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    model = make_model(1, **TINY | REFINE)
    source, output = tmp_path / "best.pth", tmp_path / "out"
    convert_checkpoint(make_checkpoint(model, categories=PETS), source, "ours")
    assert cli.main(["weights", "convert", str(source), str(output), "--format", "transformers"]) == 0
    shown = capsys.readouterr().out
    assert f"written      {output}" in shown
    assert "tensors, the same bit for bit" in shown
    assert "the category ids, the threshold, the metrics and how it was trained" in shown
    assert cli.main(["weights", "convert", str(source), str(output), "--format", "transformers"]) == 2
    assert "is there already" in capsys.readouterr().err
    assert cli.main(["weights", "convert", str(source), str(tmp_path / "a.pth"), "--format", "detrex"]) == 2
    error = capsys.readouterr().err
    assert "detrex cannot express the backbone test_resnet" in error
    assert len(error.splitlines()) == 1
    built = build_from_checkpoint(load_checkpoint(source))
    assert_same_weights(built, model)

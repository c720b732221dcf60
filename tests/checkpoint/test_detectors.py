"""A file of any project becomes a checkpoint of ours: variant and sizes from the weights and from what lies beside."""

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights_of import (
    FORMATS,
    PETS,
    REFINE,
    TWO_STAGE,
    VARIANTS,
    make_checkpoint,
    make_model,
    save_official,
    to_detrex,
    to_mmdetection,
    to_transformers,
)

from ddetr.checkpoint import (
    Checkpoint,
    build_from_checkpoint,
    load_checkpoint,
    read_detector,
    save_checkpoint,
    to_official_state_dict,
)
from ddetr.checkpoint.coco_classes import COCO_CLASSES
from ddetr.checkpoint.detectors import recognise
from ddetr.datasets.annotations import Category, FindingLog, match_categories
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR

# As the constructor's defaults, but small; what no file shows is as in the published networks.
PUBLISHED = {"nheads": 8, "num_classes": 80}


def assert_same_detector(got: Checkpoint, expected: DeformableDETR, but: tuple[str, ...] = ()) -> None:
    config = {**expected.config, "pretrained_backbone": False}
    assert {n: v for n, v in got.config.items() if n not in but} == {n: v for n, v in config.items() if n not in but}
    state_dict = expected.state_dict()
    assert set(got.model) == set(state_dict)
    for name, tensor in got.model.items():
        assert tensor.equal(state_dict[name]), name


@pytest.mark.parametrize("variant_name", VARIANTS)
def test_official_files_with_their_command_line(variant_name: str, tmp_path: Path) -> None:
    source = make_model(1, num_classes=91, **VARIANTS[variant_name])
    args = {"num_queries": 6, "dilation": variant_name == "single_scale_dc5", "backbone": "resnet10t"}
    found = recognise(save_official(tmp_path / "a.pth", source, **args))
    assert_same_detector(found.checkpoint, source)
    assert (found.project, found.where, found.notes, found.left_out) == ("official", "model", (), ())


@pytest.mark.parametrize("project", FORMATS)
@pytest.mark.parametrize("variant_name", ["base", "two_stage"])
def test_bare_weights_are_what_is_published(project: str, variant_name: str, tmp_path: Path) -> None:
    source = make_model(1, **PUBLISHED | VARIANTS[variant_name])
    with torch.no_grad():
        for projection in source.input_proj:  # mmdetection has no biases there
            projection[0].bias.zero_()
    torch.save({"state_dict": FORMATS[project](source)}, tmp_path / "a.pth")
    found = recognise(tmp_path / "a.pth")
    assert_same_detector(found.checkpoint, source, but=("num_queries",) if source.two_stage else ())
    assert found.checkpoint.categories == tuple(Category(*one) for one in COCO_CLASSES.items())
    if source.two_stage:
        assert found.checkpoint.config["num_queries"] == 300
        assert any("300 queries, as published" in note for note in found.notes)


@pytest.mark.parametrize("generation", [4, 5])
def test_a_folder_of_transformers(generation: int, tmp_path: Path) -> None:
    """Its JSON files say what weights do not show."""
    variant = VARIANTS["single_scale_dc5"] if generation == 4 else TWO_STAGE | {"dropout": 0.0}
    source = make_model(1, **variant)
    config = {"model_type": "deformable_detr", "encoder_attention_heads": 4, "num_queries": 6, "dropout": 0.1}
    config["decoder_attention_heads"] = 4
    config["id2label"] = {"0": "cat", "1": "dog", "2": "cow"}
    if generation == 4:
        config |= {"backbone": "resnet10t", "use_timm_backbone": True, "dilation": True}
        torch.save(to_transformers(source, generation), tmp_path / "pytorch_model.bin")
    else:
        config |= {"backbone_config": {"model_type": "timm_backbone", "backbone": "resnet10t"}, "dropout": 0.0}
        config |= {"two_stage": True, "with_box_refine": True, "two_stage_num_proposals": 6, "num_queries": 300}
        save_file(to_transformers(source, generation), tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text(json.dumps(config))
    size = {"shortest_edge": 480, "longest_edge": 800} if generation == 5 else 480
    processor = {"size": size, "max_size": 800, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.25, 0.25, 0.25]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    found = recognise(tmp_path)
    assert_same_detector(found.checkpoint, source)
    assert [(c.category_id, c.name) for c in found.checkpoint.categories] == [(0, "cat"), (1, "dog"), (2, "cow")]
    expected = {"image_size": 480, "max_size": 800, "mean": [0.5, 0.5, 0.5], "std": [0.25, 0.25, 0.25]}
    assert found.checkpoint.input == expected
    assert found.notes == ()


@pytest.mark.parametrize("told", [{"decoder_attention_heads": 8}, {"activation_function": "gelu"}])
def test_what_transformers_computes_otherwise_is_refused(told: dict[str, Any], tmp_path: Path) -> None:
    save_file(to_transformers(make_model(), 5), tmp_path / "model.safetensors")
    config = {"model_type": "deformable_detr", "encoder_attention_heads": 4, "decoder_attention_heads": 4} | told
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="expected equal attention heads in encoder and decoder, and ReLU, got"):
        read_detector(tmp_path)


def test_any_timm_backbone_that_the_folder_names(tmp_path: Path) -> None:
    source = make_model(1, backbone="mobilenetv3_small_050", **REFINE)
    save_file(to_transformers(source, 5), tmp_path / "model.safetensors")
    with pytest.raises(InputError, match=r"expected a backbone that its weights show .* got one of other names"):
        read_detector(tmp_path)
    config = {"model_type": "deformable_detr", "backbone": "mobilenetv3_small_050"}
    config |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_detector(read_detector(tmp_path), source)
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": "resnet18"}))
    with pytest.raises(InputError, match="its backbone has other weights than timm's 'resnet18'"):
        read_detector(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"backbone": "no such model"}))
    with pytest.raises(InputError, match="unknown backbone 'no such model'"):
        read_detector(tmp_path)


def test_coco_classes_keep_their_ids(tmp_path: Path) -> None:
    """91 rows whose places are the ids: each object of COCO's files finds its row, and none an unused one."""
    categories = read_detector(save_official(tmp_path / "a.pth", make_model(num_classes=91))).categories
    assert [c.category_id for c in categories] == list(range(91))
    assert (categories[0].name, categories[1].name, categories[12].name) == ("N/A 0", "person", "N/A 12")
    assert len({c.name for c in categories}) == 91
    coco = [Category(*one) for one in COCO_CLASSES.items()]
    labels = match_categories(coco, categories, FindingLog(), "coco", by_id=True)
    assert labels.tolist() == list(COCO_CLASSES)


def test_classes_without_names(tmp_path: Path) -> None:
    found = recognise(save_official(tmp_path / "a.pth", make_model()))
    assert [c.name for c in found.checkpoint.categories] == ["class_0", "class_1", "class_2"]
    assert any("have no names" in note for note in found.notes)


def test_classes_and_queries_of_mmdetection(tmp_path: Path) -> None:
    source = make_model(1, enc_n_points=3, **TWO_STAGE)
    meta = {"cfg": "model = dict(num_queries=6, as_two_stage=True)", "dataset_meta": {"classes": ("cat", "dog", "cow")}}
    torch.save({"state_dict": to_mmdetection(source), "meta": meta}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="expected a number of attention heads that fits"):
        read_detector(tmp_path / "a.pth")
    source = make_model(1, nheads=8, **TWO_STAGE)
    torch.save({"state_dict": to_mmdetection(source), "meta": meta}, tmp_path / "a.pth")
    found = read_detector(tmp_path / "a.pth")
    assert found.config["num_queries"] == 6
    assert [c.name for c in found.categories] == ["cat", "dog", "cow"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_becomes_a_network_of_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model(1)
    weights = {name: tensor.to(dtype) for name, tensor in to_official_state_dict(source).items()}
    torch.save({"ema": {"module": weights}, "args": argparse.Namespace(nheads=4)}, tmp_path / "a.pth")
    found = recognise(tmp_path / "a.pth")
    assert found.where == "ema.module"
    model = build_from_checkpoint(found.checkpoint)
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert tensor.equal(weights[name].float()), name


def test_heads_that_are_stored_once(tmp_path: Path) -> None:
    """As safetensors of transformers have them where all layers share one."""
    source = make_model(1)
    weights = to_transformers(source, 5)
    once = {n: t for n, t in weights.items() if not n.startswith(("class_embed.1.", "bbox_embed.1."))}
    save_file(once, tmp_path / "model.safetensors")
    config = {"model_type": "deformable_detr", "encoder_attention_heads": 4, "decoder_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same_detector(read_detector(tmp_path), source)


def test_our_own_files_are_read_as_they_are(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model(**TWO_STAGE), categories=PETS, metrics={"AP": 0.5}, image_size=64)
    save_checkpoint(tmp_path / "a.safetensors", checkpoint)
    found = recognise(tmp_path / "a.safetensors")
    assert found.project == "ddetr"
    assert (found.checkpoint.categories, found.checkpoint.metrics) == (PETS, {"AP": 0.5})


def changed(**changes: torch.Tensor | None) -> dict[str, Any]:
    weights = dict(to_official_state_dict(make_model(nheads=8, **REFINE)))
    for name, tensor in changes.items():
        name = name.replace("__", ".")
        if tensor is None:
            del weights[name]
        else:
            weights[name] = tensor
    return weights


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"transformer__encoder__layers__0__norm1__bias": None},
            "1 of .* tensors are missing, first transformer.encoder",
        ),
        (
            {"transformer__gate__weight": torch.zeros(3)},
            r"which has no 'transformer.gate.weight', .* \(1 such tensors\)",
        ),
        ({"transformer__encoder__layers__0__norm1__bias": torch.zeros(3)}, r"to be \(32,\) .* got \(3,\)"),
        ({"query_embed__weight": torch.zeros(6, 64).char()}, r"to be \(6, 64\) floating-point .* of torch.int8"),
        ({"transformer__decoder__ref_point_head__layers__0__weight": torch.zeros(3)}, "another detector: DINO"),
        ({"backbone__0__body__layers__0__relative_position_bias_table": torch.zeros(3)}, "Swin transformer of its own"),
        ({"class_embed__0__weight": torch.zeros(())}, "no class heads|floating-point numbers"),
        ({"query_embed__weight": torch.zeros(())}, r"to be .* floating-point numbers, .* got \(\)"),
        ({"transformer__encoder__layers__0__linear1__weight": torch.zeros(32, 32, 1)}, r"got \(32, 32, 1\)"),
        ({"backbone__0__body__layer1__0__conv1__weight": torch.zeros(2)}, "its backbone has other weights than timm's"),
        ({"level_scale": torch.zeros(3)}, "which has no 'level_scale'"),
    ],
)
def test_what_would_find_other_objects_is_refused(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    torch.save({"model": changed(**changes)}, tmp_path / "a.pth")
    with pytest.raises(InputError, match=message) as caught:
        read_detector(tmp_path / "a.pth")
    assert str(caught.value).startswith(f"{tmp_path / 'a.pth'}: expected ")
    assert "\n" not in str(caught.value)


def test_parts_of_a_detector_are_refused(tmp_path: Path) -> None:
    heads = ("class_embed", "bbox_embed")
    weights = {n: t for n, t in to_transformers(make_model(nheads=8), 5).items() if not n.startswith(heads)}
    torch.save(weights, tmp_path / "pytorch_model.bin")
    with pytest.raises(InputError, match="it has no class heads, as transformers' base models"):
        read_detector(tmp_path)


def test_arrays_of_numpy_are_told_what_to_do(tmp_path: Path) -> None:
    weights = {name: np.zeros(tuple(tensor.shape)) for name, tensor in to_detrex(make_model()).items()}
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="an array of NumPy: where you trust the file, write it again"):
        read_detector(tmp_path / "a.pth")


def test_the_state_of_a_run_is_what_the_run_published_beside_it(tiny_run: Any, tmp_path: Path) -> None:
    found = recognise(tiny_run.path / "last.ckpt")
    published = load_checkpoint(tiny_run.path / "last.pth")
    assert (found.project, found.checkpoint.categories) == ("ddetr", published.categories)
    assert found.checkpoint.config == published.config
    got, expected = (build_from_checkpoint(checkpoint).state_dict() for checkpoint in (found.checkpoint, published))
    assert got.keys() == expected.keys()
    assert all(tensor.equal(expected[name]) for name, tensor in got.items())

    shutil.copy(tiny_run.path / "last.ckpt", tmp_path)  # alone it says neither classes nor sizes
    with pytest.raises(InputError, match=r"give best\.pth or last\.pth of the run's folder"):
        recognise(tmp_path / "last.ckpt")

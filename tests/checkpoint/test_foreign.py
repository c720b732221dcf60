"""Weights of every project, in its own names, into the same model."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights_of import (
    FORMATS,
    REFINE,
    VARIANTS,
    assert_same_weights,
    make_checkpoint,
    make_model,
    save_official,
    to_detrex,
    to_transformers,
)

from ddetr.checkpoint import load_weights, save_checkpoint, to_official_state_dict
from ddetr.errors import InputError


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_our_own_weights(variant: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    source, model = make_model(1, **variant), make_model(2, **variant)
    save_checkpoint(tmp_path / f"a{suffix}", make_checkpoint(source))
    report = load_weights(model, tmp_path / f"a{suffix}")
    assert report.kind == "ddetr"
    assert not report.adapted
    assert not report.skipped
    assert not report.initialised
    assert report.share == 1
    assert_same_weights(model, source)


@pytest.mark.parametrize("form", ["zip", "legacy", "bare", "several devices", "safetensors"])
def test_official_weights(variant: dict[str, Any], form: str, tmp_path: Path) -> None:
    source, model = make_model(1, **variant), make_model(2, **variant)
    weights, path = to_official_state_dict(source), tmp_path / "official.pth"
    if form == "safetensors":
        path = tmp_path / "official.safetensors"
        save_file({name: tensor.clone() for name, tensor in weights.items()}, path)
    elif form == "bare":
        torch.save(weights, path)
    elif form == "several devices":
        torch.save({"model": {f"module.{name}": tensor for name, tensor in weights.items()}}, path)
    elif form == "zip":
        save_official(path, source)
    else:
        args = argparse.Namespace(lr=2e-4, nheads=4)
        torch.save({"model": weights, "args": args}, path, _use_new_zipfile_serialization=False)
    report = load_weights(model, path)
    assert report.kind == "official"
    assert not report.adapted
    assert not report.skipped
    assert not report.initialised
    assert_same_weights(model, source)


@pytest.mark.parametrize("generation", [4, 5])
def test_transformers_weights(variant: dict[str, Any], generation: int, tmp_path: Path) -> None:
    source, model = make_model(1, **variant), make_model(2, **variant)
    weights = to_transformers(source, generation)
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "deformable_detr", "encoder_attention_heads": 4, "id2label": {"0": "LABEL_0"}})
    )
    if generation == 4:
        torch.save(weights, tmp_path / "pytorch_model.bin")
        path = tmp_path
    else:
        path = tmp_path / "model.safetensors"
        save_file(weights, path, metadata={"format": "pt"})
    report = load_weights(model, path)
    assert report.kind == "transformers"
    assert not report.adapted
    assert not report.skipped
    assert not report.initialised
    assert_same_weights(model, source)


@pytest.mark.parametrize("variant_name", ["base", "refine", "two_stage"])
@pytest.mark.parametrize("project", ["detrex", "mmdetection", "mmdetection 2"])
def test_detrex_and_mmdetection_weights(variant_name: str, project: str, tmp_path: Path) -> None:
    options = VARIANTS[variant_name] | {"num_feature_levels": 5, "num_classes": 80}
    source, model = make_model(1, **options), make_model(2, **options)
    if project == "detrex":
        torch.save({"model": to_detrex(source), "iteration": 1}, tmp_path / "model_final.pth")
        biases = ()
    else:
        content = {"state_dict": FORMATS[project](source), "meta": {"cfg": "...", "epoch": 50}}
        torch.save(content, tmp_path / "model_final.pth", _use_new_zipfile_serialization=False)
        biases = tuple(f"input_proj.{level}.0.bias" for level in range(5))
    report = load_weights(model, tmp_path / "model_final.pth")
    assert report.kind == project
    assert not report.adapted
    assert not report.skipped
    assert not report.initialised
    assert_same_weights(model, source, but=biases)
    for name in biases:
        assert not model.state_dict()[name].any()


def test_decoder_heads_alone_are_enough(tmp_path: Path) -> None:
    """A library that stores shared tensors once may keep the decoder's copy of a head, or one head of many equal
    ones."""
    source, model = make_model(1, **REFINE), make_model(2, **REFINE)
    weights = to_official_state_dict(source)
    torch.save({n: t for n, t in weights.items() if not n.startswith("bbox_embed.")}, tmp_path / "a.pth")
    assert load_weights(model, tmp_path / "a.pth").share == 1
    assert_same_weights(model, source)

    source, model = make_model(1), make_model(2)
    weights = {n: t for n, t in to_official_state_dict(source).items() if not re.match(r"(class|bbox)_embed\.0", n)}
    torch.save(weights, tmp_path / "b.pth")
    report = load_weights(model, tmp_path / "b.pth")
    assert report.share == 1
    assert not report.adapted
    assert_same_weights(model, source)


def test_decoder_that_disagrees_with_its_heads_is_refused(tmp_path: Path) -> None:
    weights = to_official_state_dict(make_model(**REFINE))
    weights["transformer.decoder.bbox_embed.1.layers.0.bias"] = torch.zeros(32)
    torch.save({"model": weights}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="to be the same head, but they differ"):
        load_weights(make_model(**REFINE), tmp_path / "a.pth")


def test_weights_of_another_detector_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"encoder.conv1.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="expected weights of Deformable DETR .* got 'encoder.conv1.weight'"):
        load_weights(make_model(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"model\.safetensors or pytorch_model\.bin"):
        load_weights(make_model(), tmp_path)

"""Weights in several files: a folder, its index, or one of the files stand for all of them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from weights_of import REFINE, assert_same_weights, make_checkpoint, make_model, to_transformers

from ddetr.checkpoint import load_weights, save_checkpoint
from ddetr.errors import InputError


def save_shards(folder: Path, weights: dict[str, torch.Tensor], stem: str, suffix: str, count: int = 3) -> Path:
    """As transformers and accelerate write them; returns the index."""
    weight_map = {}
    for number in range(count):
        name = f"{stem}-{number + 1:05}-of-{count:05}{suffix}"
        part = dict(list(weights.items())[number::count])
        weight_map |= dict.fromkeys(part, name)
        save_file(part, folder / name) if suffix == ".safetensors" else torch.save(part, folder / name)
    index = folder / f"{stem}{suffix}.index.json"
    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "deformable_detr", "encoder_attention_heads": 4}))
    return index


@pytest.mark.parametrize(("stem", "suffix"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_shards_are_read_together(stem: str, suffix: str, tmp_path: Path) -> None:
    source, model = make_model(1, **REFINE), make_model(2, **REFINE)
    index = save_shards(tmp_path, to_transformers(source, 5), stem, suffix)
    for path in (tmp_path, index, tmp_path / f"{stem}-00002-of-00003{suffix}"):
        model = make_model(2, **REFINE)
        report = load_weights(model, path)
        assert report.share == 1
        assert_same_weights(model, source)


def refusal(path: Path) -> str:
    with pytest.raises(InputError) as caught:
        load_weights(make_model(), path)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_missing_files(tmp_path: Path) -> None:
    index = save_shards(tmp_path, to_transformers(make_model(1), 5), "model", ".safetensors")
    shard = tmp_path / "model-00002-of-00003.safetensors"
    shard.unlink()
    assert f"1 of its 3 files are missing: {shard.name}" in refusal(tmp_path)
    index.unlink()
    assert "got file 1 of 3 without model.safetensors.index.json" in refusal(
        tmp_path / "model-00001-of-00003.safetensors"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weight_map": {"a": "../../secret.safetensors"}}, "names of files in the same folder, got '../../secret"),
        ({"weight_map": {"a": "/etc/passwd"}}, "names of files in the same folder"),
        ({"weight_map": {"a": "..\\x.safetensors"}}, "names of files in the same folder"),
        ({"weight_map": {"a": 3}}, "expected an index of weights"),
        ({"weight_map": ["a"]}, "expected an index of weights"),
        ({"weight_map": {}}, "expected an index of weights"),
        ({"weight_map": {f"{i}": f"{i}.bin" for i in range(2000)}}, "at most 1000 names"),
        ({"weight_map": {"a": "model.safetensors.index.json"}}, "got something else: JSON"),
        ([], "expected an index of weights"),
    ],
)
def test_an_index_that_points_elsewhere(content: Any, message: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(content))
    assert message in refusal(tmp_path)


def test_an_index_of_tensors_that_are_not_there(tmp_path: Path) -> None:
    index = save_shards(tmp_path, to_transformers(make_model(1), 5), "model", ".safetensors")
    content = json.loads(index.read_text())
    content["weight_map"]["model.new"] = "model-00001-of-00003.safetensors"
    index.write_text(json.dumps(content))
    assert "1 of its tensors are in none of its files, first 'model.new'" in refusal(tmp_path)


def test_a_run_folder_is_told_its_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "best.pth", make_checkpoint(make_model()))
    assert f"got the folder of a run: give {tmp_path / 'best.pth'}" in refusal(tmp_path)


def test_a_configuration_of_strange_values(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2)
    save_file(to_transformers(source, 5), tmp_path / "model.safetensors")
    for strange in ("x", 0, -1, None, [], 10**30, {"a": 1}):
        config = {"model_type": "deformable_detr", "encoder_attention_heads": strange, "encoder_n_points": strange}
        (tmp_path / "config.json").write_text(json.dumps({**config, "id2label": strange, "with_box_refine": strange}))
        assert load_weights(model, tmp_path).share == 1
    for text in ("", "[1]", "{", "[" * 100_000, '"x"'):
        (tmp_path / "config.json").write_text(text)
        assert load_weights(model, tmp_path).share == 1

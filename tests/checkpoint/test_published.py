"""Our published format: there and back to the bit, plain values only, whole or not at all."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from weights_of import PETS, assert_same_weights, make_checkpoint, make_model, save_official

from ddetr.checkpoint import Checkpoint, build_from_checkpoint, load_checkpoint, save_checkpoint
from ddetr.errors import InputError


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_round_trip_is_exact(variant: dict[str, Any], suffix: str, tmp_path: Path) -> None:
    model = make_model(**variant).eval()
    checkpoint = make_checkpoint(
        model, threshold=0.35, metrics={"AP": 0.445, "per_class": {"class 0": None}}, training={"data": "x", "epoch": 3}
    )
    path = tmp_path / "new" / ("best" + suffix)
    save_checkpoint(path, checkpoint)
    loaded = load_checkpoint(path)
    assert loaded.categories == checkpoint.categories
    assert loaded.model.keys() == checkpoint.model.keys()
    for name in ("config", "input", "threshold", "metrics", "training", "ddetr_version", "format_version"):
        assert getattr(loaded, name) == getattr(checkpoint, name), name
    rebuilt = build_from_checkpoint(loaded)
    assert not rebuilt.training
    assert rebuilt.config == checkpoint.config
    assert_same_weights(rebuilt, model)
    with torch.no_grad():
        images = torch.rand(1, 3, 96, 96)
        got, expected = rebuilt(images), model(images)
    assert got["pred_logits"].isfinite().all()
    assert got["pred_logits"].equal(expected["pred_logits"])
    assert got["pred_boxes"].equal(expected["pred_boxes"])


def test_holds_tensors_and_plain_values_only(tmp_path: Path) -> None:
    """torch.load itself reads it with weights_only=True and nothing allowed beyond that."""
    metrics = {"AP": np.float64(0.5), "loss": torch.tensor(1.5), "count": np.int64(3), "curve": (1.0, np.float32(2.0))}
    save_checkpoint(tmp_path / "a.pth", make_checkpoint(make_model(), metrics=metrics))
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    assert content["format"] == "ddetr"
    assert content["metrics"] == {"AP": 0.5, "loss": 1.5, "count": 3, "curve": [1.0, 2.0]}
    assert {type(value) for value in content["metrics"].values()} == {float, int, list}
    assert content["categories"][0] == {"category_id": 7, "name": "class 0"}
    assert set(content["input"]) == {"image_size", "max_size", "mean", "std"}
    with pytest.raises(TypeError, match=r"training\.data is a PosixPath|training\.data is a WindowsPath"):
        save_checkpoint(tmp_path / "b.pth", make_checkpoint(make_model(), training={"data": tmp_path}))


def test_shared_heads_and_views_are_stored_once(tmp_path: Path) -> None:
    model = make_model(num_classes=800)
    checkpoint = make_checkpoint(model)
    checkpoint.model["class_embed.0.weight"] = torch.zeros(50, 800, 32)[3]  # a view of a larger tensor
    checkpoint.model["class_embed.1.weight"] = checkpoint.model["class_embed.0.weight"]
    size = sum(p.numel() * 4 for p in model.parameters()) + sum(b.numel() * 4 for b in model.buffers())
    for suffix in (".pth", ".safetensors"):
        save_checkpoint(tmp_path / f"a{suffix}", checkpoint)
        assert os.path.getsize(tmp_path / f"a{suffix}") < size + 100_000
        assert load_checkpoint(tmp_path / f"a{suffix}").model.keys() == checkpoint.model.keys()


@pytest.mark.parametrize("freeze", ["stem", "none"])
def test_norms_stay_as_they_were_trained(freeze: str, tmp_path: Path) -> None:
    """A model that began with ImageNet weights needs them no more, but its norms stay frozen."""
    model = make_model(freeze_backbone=freeze)
    checkpoint = make_checkpoint(model)
    checkpoint.config |= {"pretrained_backbone": freeze == "stem", "freeze_backbone": None}
    save_checkpoint(tmp_path / "a.pth", checkpoint)
    config = load_checkpoint(tmp_path / "a.pth").config
    assert config["pretrained_backbone"] is False
    assert config["freeze_backbone"] == freeze
    assert_same_weights(build_from_checkpoint(load_checkpoint(tmp_path / "a.pth")), model)


def test_path_of_pretrained_weights_is_not_published(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.config["pretrained_backbone"] = "/home/somebody/secret/resnet.pth"
    for name in ("a.pth", "a.safetensors"):
        save_checkpoint(tmp_path / name, checkpoint)
        assert b"secret" not in (tmp_path / name).read_bytes()


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("killed_in", ["write", "replace"])
def test_a_killed_save_leaves_the_old_file(
    suffix: str, killed_in: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"last{suffix}"
    save_checkpoint(path, make_checkpoint(make_model(), training={"epoch": 1}))

    def killed(*args: Any, **kwargs: Any) -> None:
        if killed_in == "write":
            path_or_file = args[1]
            Path(path_or_file if isinstance(path_or_file, str | Path) else path_or_file.name).write_bytes(b"half a fi")
        raise KeyboardInterrupt

    if killed_in == "replace":
        monkeypatch.setattr(os, "replace", killed)
    else:
        monkeypatch.setattr("ddetr.weight_files.files.torch.save", killed)
        monkeypatch.setattr("ddetr.weight_files.files.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(path, make_checkpoint(make_model(), training={"epoch": 2}))
    assert load_checkpoint(path).training == {"epoch": 1}
    assert [file.name for file in tmp_path.iterdir()] == [path.name], "nothing else is left"


def test_number_of_categories_must_fit() -> None:
    with pytest.raises(InputError, match="each of the 3 classes, got 1"):
        Checkpoint.of(make_model(), PETS[:1])


def test_weights_that_do_not_fit_their_config(tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.config["dec_layers"] = 1
    with pytest.raises(InputError, match=r"do not fit its own configuration: .*decoder\.layers\.1"):
        build_from_checkpoint(checkpoint)
    checkpoint.config = {**checkpoint.config, "dec_layers": 2, "new_option": 1}
    with pytest.raises(InputError, match="'new_option', which ddetr .* does not know"):
        build_from_checkpoint(checkpoint)


def test_weights_that_are_not_finite_make_no_detector() -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.model = {name: tensor.clone() for name, tensor in checkpoint.model.items()}
    checkpoint.model["transformer.level_embed"][0, 0] = torch.nan
    with pytest.raises(InputError, match=r"transformer\.level_embed holds values that are NaN or infinite"):
        build_from_checkpoint(checkpoint)


def test_a_flipped_bit_is_noticed(tmp_path: Path) -> None:
    """An archive of torch.save has a checksum for each tensor."""
    path = tmp_path / "a.pth"
    save_checkpoint(path, make_checkpoint(make_model()))
    data = bytearray(path.read_bytes())
    place = data.find(make_model().state_dict()["transformer.level_embed"].numpy().tobytes())
    assert place > 0
    data[place + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"damaged or cut short \(at transformer\.level_embed\)"):
        load_checkpoint(path)


def test_weights_of_others_are_pointed_to_the_right_option(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"bare weights: start from them with --weights, or .*load_weights"):
        load_checkpoint(save_official(tmp_path / "official.pth", make_model()))
    torch.save(make_model().state_dict(), tmp_path / "bare.pth")
    with pytest.raises(InputError, match="--weights"):
        load_checkpoint(tmp_path / "bare.pth")


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_newer_format_says_so(suffix: str, tmp_path: Path) -> None:
    checkpoint = make_checkpoint(make_model())
    checkpoint.format_version, checkpoint.ddetr_version = 2, "9.0.0"
    save_checkpoint(tmp_path / f"a{suffix}", checkpoint)
    with pytest.raises(InputError, match=r"format 1 or older, got format 2, written by ddetr 9\.0\.0.*upgrade"):
        load_checkpoint(tmp_path / f"a{suffix}")


def test_an_incomplete_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "a.pth", make_checkpoint(make_model()))
    content = torch.load(tmp_path / "a.pth", weights_only=True)
    for name in ("config", "categories", "model"):
        torch.save({key: value for key, value in content.items() if key != name}, tmp_path / "b.pth")
        with pytest.raises(InputError, match=f"its {name} is not whole"):
            load_checkpoint(tmp_path / "b.pth")

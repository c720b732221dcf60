"""Checkpoints: ours there and back, those of other projects, and everything that can be wrong with a file.

All weights are made here: random, in the names and shapes of each project.
"""

import argparse
import io
import json
import os
import pickle
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from ddetr.checkpoint import (
    Checkpoint,
    LoadReport,
    build_from_checkpoint,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    to_official_state_dict,
)
from ddetr.checkpoint.coco_classes import COCO_CLASSES
from ddetr.datasets.annotations import Category
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.models.heads import PRIOR_BIAS

SMALL: dict[str, Any] = {
    "backbone": "resnet10t",
    "hidden_dim": 32,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 32,
    "num_queries": 6,
    "num_classes": 3,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "single_scale": {"num_feature_levels": 1},
    "single_scale_dc5": {"num_feature_levels": 1, "dilation": True},
    "base": {},
    "refine": {"with_box_refine": True},
    "two_stage": {"with_box_refine": True, "two_stage": True},
}
REFINE, TWO_STAGE = VARIANTS["refine"], VARIANTS["two_stage"]
PETS = (Category(17, "cat"), Category(18, "dog"), Category(5, "guinea pig"))


def make_model(seed: int = 0, **options: Any) -> DeformableDETR:
    """A small model whose every value is random, so that no two parameters can be taken for each other."""
    torch.manual_seed(seed)
    model = DeformableDETR(**SMALL | {"freeze_backbone": "stem"} | options)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.2)
    return model


def make_checkpoint(model: DeformableDETR, **fields: Any) -> Checkpoint:
    categories = [Category(10 * i + 7, f"class {i}") for i in range(model.config["num_classes"])]
    return Checkpoint.of(model, **{"categories": categories} | fields)


def save_official(path: Path, model: DeformableDETR, **args: Any) -> Path:
    """As the official code saves: everything of a run, its command line pickled."""
    namespace = argparse.Namespace(lr=2e-4, nheads=model.config["nheads"], **args)
    torch.save(
        {"model": to_official_state_dict(model), "optimizer": {"state": {}}, "epoch": 49, "args": namespace}, path
    )
    return path


def assert_same_weights(model: DeformableDETR, source: DeformableDETR, but: Iterable[str] = ()) -> None:
    state_dict = model.state_dict()
    for name, tensor in source.state_dict().items():
        if name in state_dict and not name.startswith(tuple(but)):
            assert state_dict[name].equal(tensor), name


def assert_accounts_for_everything(report: LoadReport, model: DeformableDETR, source: dict[str, Tensor]) -> None:
    """Each tensor of the model in one list, and each tensor of the file used or skipped."""
    ours = report.loaded + [name for name, _ in report.adapted] + [name for name, _ in report.initialised]
    assert len(ours) == len(set(ours))
    own = model.state_dict(keep_vars=True)
    assert {id(own[name]) for name in ours} == {id(tensor) for tensor in own.values()}
    assert all(why for _, why in [*report.adapted, *report.skipped, *report.initialised])
    assert {name for name, _ in report.skipped} <= set(source)
    assert 0.5 <= report.share <= 1


def reasons(remarks: list) -> dict[str, str]:
    return dict(remarks)


@pytest.fixture(params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> dict[str, Any]:
    return VARIANTS[request.param]


# --- our format -------------------------------------------------------------------------------------------------------


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
        monkeypatch.setattr("ddetr.checkpoint.files.torch.save", killed)
        monkeypatch.setattr("ddetr.checkpoint.published.save_file", killed)
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


# --- files that are something else ------------------------------------------------------------------------------------


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("read", [load_checkpoint, lambda path: load_weights(make_model(), path)])
def test_a_file_that_runs_code_is_refused(read: Any, legacy: bool, tmp_path: Path) -> None:
    content = {
        "format": "ddetr",
        "model": to_official_state_dict(make_model()),
        "metrics": Malicious(tmp_path / "harm"),
    }
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"wants to run '(posix|nt|os)\.mkdir', which was not done"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


def broken_files(folder: Path) -> dict[str, str]:
    """Name -> what the message must say."""
    save_checkpoint(folder / "whole.pth", make_checkpoint(make_model()))
    save_checkpoint(folder / "whole.safetensors", make_checkpoint(make_model()))
    whole, whole_st = (folder / "whole.pth").read_bytes(), (folder / "whole.safetensors").read_bytes()
    (folder / "short.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "short.safetensors").write_bytes(whole_st[: len(whole_st) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("not weights at all")
    (folder / "picture.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "pickle.pth").write_bytes(pickle.dumps({"a": 1}))
    (folder / "last.ckpt").write_bytes(pickle.dumps(PETS[0]))
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({}, folder / "nothing.pth")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, folder / "lightning.ckpt")
    (folder / "folder.pth").mkdir()
    return {
        "absent.pth": "expected a file of weights, but there is none",
        "folder.pth": "folder",
        "short.pth": "damaged or cut short",
        "short.safetensors": "damaged or cut short",
        "empty.pth": "damaged or cut short",
        "empty.safetensors": "damaged or cut short",
        "text.pth": "got something else",
        "picture.pth": "got something else",
        "pickle.pth": "got something else",
        "last.ckpt": "--resume",
        "lightning.ckpt": "--resume",
        "list.pth": "got ",
        "nothing.pth": "got ",
    }


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, message in broken_files(tmp_path).items():
        for read in (load_checkpoint, lambda path: load_weights(model, path)):
            with pytest.raises(InputError, match=re.escape(message)) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)
            assert "\n" not in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])


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


# --- weights of every project, into the same model --------------------------------------------------------------------


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


def to_transformers(source: DeformableDETR, generation: int) -> dict[str, Tensor]:
    """Names of transformers 4 and 5, written down from their models and not from our reader."""
    weights = {}
    for name, tensor in to_official_state_dict(source).items():
        if name.startswith("backbone.0.body."):
            name = name.replace("backbone.0.body.", "backbone.conv_encoder.model.")
        name = name.removeprefix("transformer.").replace("query_embed.", "query_position_embeddings.")
        name = name.replace("linear1", "fc1").replace("linear2", "fc2")
        if name.startswith("encoder."):
            name = name.replace("norm1", "self_attn_layer_norm").replace("norm2", "final_layer_norm")
        if name.startswith("decoder."):
            name = name.replace("norm1", "encoder_attn_layer_norm").replace("norm2", "self_attn_layer_norm")
            name = name.replace("norm3", "final_layer_norm").replace("cross_attn", "encoder_attn")
        if not name.startswith(("class_embed", "bbox_embed")):
            name = f"model.{name}"
        if generation == 5:
            name = name.replace("backbone.conv_encoder", "backbone").replace("self_attn.out_proj", "self_attn.o_proj")
            name = re.sub(r"(layers\.\d+)\.fc", r"\1.mlp.fc", name)
        if "in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                weights[name.replace("in_proj_", f"{letter}_proj.")] = part.clone()
        else:
            weights[name] = tensor.clone()
    return weights


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


def to_detrex(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of detrex, written down from its own converter and not from our reader."""
    weights = {}
    for name, tensor in to_official_state_dict(source).items():
        if name.startswith("backbone.0.body."):
            name = name.removeprefix("backbone.0.body.")
            name = name if name.startswith("layer") else f"stem.{name}"
            name = re.sub(r"layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
            name = re.sub(r"bn(\d)", r"conv\1.norm", name)
            name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            name = f"backbone.{name}"
        if level := re.match(r"input_proj\.(\d)\.(\d)", name):
            place = f"convs.{level[1]}" if int(level[1]) < 3 else f"extra_convs.{int(level[1]) - 3}"
            name = name.replace(level[0], f"neck.{place}.{'conv' if level[2] == '0' else 'norm'}")
        name = name.replace("linear1", "ffns.0.layers.0.0").replace("linear2", "ffns.0.layers.1")
        if "encoder.layers" in name:
            name = name.replace("self_attn", "attentions.0").replace("norm1", "norms.0").replace("norm2", "norms.1")
        if "decoder.layers" in name:
            name = name.replace("self_attn", "attentions.0.attn").replace("cross_attn", "attentions.1")
            name = name.replace("norm1", "norms.1").replace("norm2", "norms.0").replace("norm3", "norms.2")
        weights[name.replace("level_embed", "level_embeds").replace("query_embed", "query_embedding")] = tensor
    return weights


def to_mmdetection(source: DeformableDETR) -> dict[str, Tensor]:
    """Names of mmdetection 3, written down from its modules and not from our reader."""
    weights = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("backbone.0.body.", "backbone.").removeprefix("transformer.")
        if level := re.match(r"input_proj\.(\d)\.(\d)", name):
            if name.endswith(".0.bias"):
                continue  # its neck has none
            place = f"convs.{level[1]}" if int(level[1]) < 3 else f"extra_convs.{int(level[1]) - 3}"
            name = name.replace(level[0], f"neck.{place}.{'conv' if level[2] == '0' else 'gn'}")
        name = name.replace("linear1", "ffn.layers.0.0").replace("linear2", "ffn.layers.1")
        if name.startswith("encoder.layers"):
            name = name.replace("norm1", "norms.0").replace("norm2", "norms.1")
        if name.startswith("decoder.layers"):
            name = name.replace("self_attn.", "self_attn.attn.")
            name = name.replace("norm1", "norms.1").replace("norm2", "norms.0").replace("norm3", "norms.2")
        name = re.sub(r"^(enc_output|pos_trans)\.", r"\1_fc.", name).replace("enc_output", "memory_trans")
        name = name.replace("reference_points.", "reference_points_fc.").replace("query_embed.", "query_embedding.")
        name = name.replace("class_embed.", "bbox_head.cls_branches.")
        name = re.sub(
            r"bbox_embed\.(\d)\.layers\.(\d)", lambda m: f"bbox_head.reg_branches.{m[1]}.{2 * int(m[2])}", name
        )
        weights[name] = tensor
    return weights


@pytest.mark.parametrize("variant_name", ["base", "refine", "two_stage"])
@pytest.mark.parametrize("project", ["detrex", "mmdetection"])
def test_detrex_and_mmdetection_weights(variant_name: str, project: str, tmp_path: Path) -> None:
    options = VARIANTS[variant_name] | {"num_feature_levels": 5, "num_classes": 80}
    source, model = make_model(1, **options), make_model(2, **options)
    if project == "detrex":
        torch.save({"model": to_detrex(source), "iteration": 1}, tmp_path / "model_final.pth")
        biases = ()
    else:
        content = {"state_dict": to_mmdetection(source), "meta": {"cfg": "...", "epoch": 50}}
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


# --- classes ----------------------------------------------------------------------------------------------------------


def test_coco_table(shared_data: Path) -> None:
    content = json.loads((shared_data / "coco_tiny/annotations/instances_val2017.json").read_text())
    assert {category["id"]: category["name"] for category in content["categories"]} == COCO_CLASSES


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


# --- other sizes and other variants -----------------------------------------------------------------------------------


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
    name = "transformer.decoder.layers.0.linear1.weight"
    assert missing[name] == reasons(report.skipped)[name] == "(32, 32) in the file, (48, 32) in the model"
    assert_accounts_for_everything(report, model, to_official_state_dict(source))


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


def test_weights_in_half_precision(tmp_path: Path) -> None:
    source, model = make_model(1), make_model(2, num_queries=9, num_feature_levels=3)
    torch.save({n: t.half() for n, t in to_official_state_dict(source).items()}, tmp_path / "a.pth")
    load_weights(model, tmp_path / "a.pth")
    assert all(p.dtype == torch.float32 for p in model.parameters())
    name = "transformer.decoder.layers.1.linear2.weight"
    assert model.state_dict()[name].equal(source.state_dict()[name].half().float())


# --- what does not fit at all -----------------------------------------------------------------------------------------


def test_another_hidden_size_is_refused(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", make_model(hidden_dim=64))
    with pytest.raises(
        InputError, match="expected weights of hidden_dim 32, as the model has, got 64: set hidden_dim=64"
    ):
        load_weights(make_model(), path)


def test_another_architecture_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    path = save_official(tmp_path / "a.pth", make_model(1))
    model = make_model(2, backbone="resnet18")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(InputError, match=r"only \d+% of the model's parameters .* another architecture"):
        load_weights(model, path)
    assert all(tensor.equal(before[name]) for name, tensor in model.state_dict().items())


def test_weights_of_another_detector_are_refused(tmp_path: Path) -> None:
    torch.save({"model": {"encoder.conv1.weight": torch.zeros(3)}}, tmp_path / "a.pth")
    with pytest.raises(InputError, match="expected weights of Deformable DETR .* got 'encoder.conv1.weight'"):
        load_weights(make_model(), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"model\.safetensors or pytorch_model\.bin"):
        load_weights(make_model(), tmp_path)


# --- the report -------------------------------------------------------------------------------------------------------


def test_report_reads_well(tmp_path: Path) -> None:
    from rich.console import Console

    source, model = make_model(1, num_classes=91), make_model(2, **REFINE)
    report = load_weights(model, save_official(tmp_path / "r50.pth", source), categories=PETS)
    assert str(report).startswith("r50.pth (official): ")
    assert f"{len(report.loaded)} tensors loaded, {len(report.adapted)} adapted, 0 skipped" in str(report)
    console = Console(width=160, file=io.StringIO())
    console.print(report.render())
    text = console.file.getvalue()
    assert "rows of 2 of 3 classes copied by name, new: guinea pig" in text
    assert text.count("class_embed") == 1, "like names on one line"

"""The detector is found under whatever wrappers, keys and prefixes it lies, and its averaged weights before others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from weights_of import (
    FORMATS,
    PETS,
    REFINE,
    assert_same_weights,
    make_checkpoint,
    make_model,
    to_mmdetection,
    to_transformers,
)

from ddetr.checkpoint import load_weights, save_checkpoint, to_official_state_dict
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.weight_files.folders import read_files
from ddetr.weight_files.pickled import StandIn, TensorView

BIASES = ("input_proj.",)  # mmdetection's neck has none


@pytest.fixture(scope="module")
def source() -> DeformableDETR:
    return make_model(1, **REFINE)


@pytest.fixture(scope="module")
def target() -> DeformableDETR:
    return make_model(2, **REFINE)


def assert_loaded(content: Any, source: DeformableDETR, target: DeformableDETR, folder: Path) -> Any:
    torch.save(content, folder / "a.ckpt")
    with torch.no_grad():
        for tensor in target.state_dict().values():
            tensor.zero_()
    report = load_weights(target, folder / "a.ckpt")
    assert report.share == 1
    assert_same_weights(target, source)
    return report


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize(
    "prefix",
    [
        "_orig_mod.",
        "module._orig_mod.",
        "_orig_mod.module.",
        "model.",
        "model.model.",
        "module.model._orig_mod.",
        "ema_model.module.",
        "net.detector.",
        "_forward_module.module.",
        "_fsdp_wrapped_module.",
    ],
)
def test_any_prefix(kind: str, prefix: str, source: DeformableDETR, target: DeformableDETR, tmp_path: Path) -> None:
    weights = {f"{prefix}{name}": tensor for name, tensor in FORMATS[kind](source).items()}
    torch.save({"state_dict": weights}, tmp_path / "a.pth")
    report = load_weights(target, tmp_path / "a.pth")
    assert report.kind == kind
    assert report.share == 1
    assert not report.skipped
    assert_same_weights(target, source, but=BIASES if "mmdetection" in kind else ())


def test_wrappers_inside_of_names(source: DeformableDETR, target: DeformableDETR, tmp_path: Path) -> None:
    """torch.compile, FSDP or activation checkpointing of a part."""
    inner = {"transformer.": "transformer._orig_mod.", "layers.0.": "layers.0._fsdp_wrapped_module."}
    for where, wrapped in [
        *inner.items(),
        ("encoder.", "encoder.module."),
        ("norm1.", "_checkpoint_wrapped_module.norm1."),
    ]:
        weights = {name.replace(where, wrapped): tensor for name, tensor in to_official_state_dict(source).items()}
        assert any(name not in source.state_dict() for name in weights)
        assert_loaded(weights, source, target, tmp_path)


@pytest.mark.parametrize(
    "keys",
    [
        ["model"],
        ["state_dict"],
        ["model_state_dict"],
        ["ema"],
        ["model_ema"],
        ["ema_state_dict"],
        ["params"],
        ["network"],
        ["ema", "module"],
        ["checkpoint", "model", "state_dict"],
    ],
)
def test_any_nesting(keys: list[str], source: DeformableDETR, target: DeformableDETR, tmp_path: Path) -> None:
    content: Any = to_official_state_dict(source)
    for key in reversed(keys):
        content = {"epoch": 3, key: content}
    assert assert_loaded(content, source, target, tmp_path).where == ".".join(keys)


def test_averaged_weights_go_first(source: DeformableDETR, target: DeformableDETR, tmp_path: Path) -> None:
    plain, averaged = make_model(3, **REFINE).state_dict(), source.state_dict()
    both = {f"model.{name}": tensor for name, tensor in plain.items()}
    for content in (
        {"model": plain, "ema": {"module": averaged, "updates": 3}},
        {"state_dict": plain, "state_dict_ema": averaged},
        {"model": plain, "model_ema": averaged},
        {"state_dict": both | {f"ema_model.module.{name}": tensor for name, tensor in averaged.items()}},
    ):
        report = assert_loaded(content, source, target, tmp_path)
        assert "ema" in report.where
        assert report.where in str(report)
    # OpenMMLab's hook saves the average as state_dict, and what was trained as ema_state_dict.
    content = {
        "message_hub": {},
        "ema_state_dict": {f"module.{n}": t for n, t in plain.items()},
        "state_dict": averaged,
    }
    assert assert_loaded(content, source, target, tmp_path).where == "state_dict"
    assert_loaded(AveragedModel(source).state_dict(), source, target, tmp_path)


def test_lightning_checkpoint_of_another_program(
    source: DeformableDETR, target: DeformableDETR, tmp_path: Path
) -> None:
    class Strangers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.criterion = source, nn.Linear(2, 2)

    states = {
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}}],
        "hyper_parameters": {"path": Path("x")},
    }
    content = {"state_dict": Strangers().state_dict(), "pytorch-lightning_version": "2.1.0", "epoch": 3, **states}
    report = assert_loaded(content, source, target, tmp_path)
    assert {name for name, _ in report.skipped} == {"criterion.weight", "criterion.bias"}
    content["state_dict"] = {f"model.{name}": tensor for name, tensor in to_transformers(source, 4).items()}
    assert assert_loaded(content, source, target, tmp_path).kind == "transformers"
    content["state_dict"] = {"encoder.weight": torch.zeros(2)}
    torch.save(content, tmp_path / "b.ckpt")
    with pytest.raises(InputError, match="expected weights of Deformable DETR") as caught:
        load_weights(target, tmp_path / "b.ckpt")
    assert "--resume" not in str(caught.value)


def test_state_of_our_own_run_with_its_average(tmp_path: Path) -> None:
    """Heads that layers share are averaged under the first of their names; classes come from what the run published."""
    source, trained, target = make_model(1), make_model(3), make_model(2)
    frozen = "backbone.0.body.conv1."
    averaged = {
        n: t for n, t in source.state_dict().items() if not n.startswith((frozen, "class_embed.1", "bbox_embed.1"))
    }
    state_dict = {f"model.{name}": tensor for name, tensor in trained.state_dict().items()}
    content = {"state_dict": state_dict, "weight_average": {"num_updates": 3, "tensors": averaged}}
    content["pytorch-lightning_version"] = "2.6.6"
    torch.save(content, tmp_path / "last.ckpt")
    save_checkpoint(tmp_path / "last.pth", make_checkpoint(trained, categories=PETS))
    report = load_weights(target, tmp_path / "last.ckpt", categories=PETS[::-1])
    assert "average" in str(report)
    assert report.kind == "ddetr"
    assert_same_weights(target, source, but=[frozen, "class_embed."])
    assert_same_weights(target, trained, but=[n for n in source.state_dict() if not n.startswith(frozen)])
    assert target.class_embed[1].weight.equal(source.class_embed[0].weight.flip(0)), "rows follow the classes"


class Box(dict):
    """A dict of a class that other programs save their content as."""


def test_a_file_that_is_an_object_of_a_class_of_dicts(
    source: DeformableDETR, target: DeformableDETR, tmp_path: Path
) -> None:
    for weights, but in ((to_mmdetection(source), BIASES), (source.state_dict(), ())):
        torch.save(Box(state_dict=Box(weights), meta=Box(CLASSES=("a", "b", "c"))), tmp_path / "a.pth")
        assert load_weights(target, tmp_path / "a.pth").share == 1
        assert_same_weights(target, source, but=but)


def test_a_whole_network_is_refused_in_one_sentence(tmp_path: Path) -> None:
    for content in (nn.Linear(2, 2), {"model": nn.Linear(2, 2), "ema": None, "epoch": -1}):
        torch.save(content, tmp_path / "a.pt")
        with pytest.raises(InputError, match=r"got a whole network of the class 'torch\.nn\.modules\.linear\.Linear'"):
            load_weights(make_model(), tmp_path / "a.pt")


def test_base_model_of_transformers_has_no_heads(tmp_path: Path) -> None:
    """AutoModel's names have no "model." in front."""
    source, model = make_model(1), make_model(2)
    weights = {n.removeprefix("model."): t for n, t in to_transformers(source, 5).items() if n.startswith("model.")}
    torch.save(weights, tmp_path / "a.bin")
    report = load_weights(model, tmp_path / "a.bin")
    assert {name.split(".")[0] for name, _ in report.initialised} == {"class_embed", "bbox_embed"}
    assert_same_weights(model, source, but=["class_embed", "bbox_embed"])


def test_mmdetection_3_training_checkpoint(source: DeformableDETR, target: DeformableDETR, tmp_path: Path) -> None:
    content = {
        "meta": {"dataset_meta": {"classes": ("a", "b", "c")}, "cfg": "model = dict()", "time": "20260101"},
        "state_dict": to_mmdetection(source) | {"data_preprocessor.mean": torch.zeros(3, 1, 1)},
        "message_hub": {"log_scalars": {}, "runtime_info": {}, "resumed_keys": {}},
        "optimizer": {"state": {}, "param_groups": []},
    }
    torch.save(content, tmp_path / "epoch_1.pth")
    report = load_weights(target, tmp_path / "epoch_1.pth")
    assert [name for name, _ in report.skipped] == ["data_preprocessor.mean"]
    assert_same_weights(target, source, but=BIASES)


@pytest.mark.parametrize("kind", FORMATS)
def test_any_tensor_may_be_missing_or_of_another_shape(
    kind: str, target: DeformableDETR, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read, or one sentence; never another error."""
    path = tmp_path / "a.pth"
    torch.save(FORMATS[kind](make_model(1, **REFINE)), path)
    file = read_files(path)
    whole = file.content
    names = [name for name in whole if "backbone" not in name or "conv1" in name]

    def assert_works_or_says_why(weights: dict[str, Any]) -> None:
        monkeypatch.setattr("ddetr.checkpoint.foreign.read_files", lambda path: file._replace(content=weights))
        try:
            load_weights(target, path)
        except InputError as error:
            sentence = str(error)
        else:
            return
        assert "a.pth" in sentence
        assert "\n" not in sentence

    def strange(view: TensorView) -> list[Any]:
        shapes = [(), (0,), (0, 3), (2, 1), view.shape[:1], (1, 1, 1)]
        return [StandIn("a.Class"), "text", *(replace(view, shape=shape, stride=(1,) * len(shape)) for shape in shapes)]

    sign = next(name for name in names if "level_embed" in name)
    for number, name in enumerate(names[list(FORMATS).index(kind) :: 7]):
        without = {other: view for other, view in whole.items() if other != name}
        assert_works_or_says_why(without)
        values = strange(whole[name])
        assert_works_or_says_why(without | {name: values[number % len(values)]})
    for value in strange(whole[sign]):  # by which the file is recognised
        assert_works_or_says_why(whole | {sign: value})
    for part in ("level_embed", "embed", "bbox", "encoder"):
        assert_works_or_says_why({name: view for name, view in whole.items() if part in name})

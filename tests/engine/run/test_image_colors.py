"""How images are normalised belongs to the weights: it travels from the backbone, or from the file of weights, through
training and resuming into what is published."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.checkpoint import Checkpoint, load_checkpoint, load_weights, save_checkpoint, to_official_state_dict
from ddetr.datasets.annotations import Category
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from ddetr.engine.config import TrainConfig
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.inference.predictor import Predictor
from ddetr.models.deformable_detr import DeformableDETR

HALF = (0.5, 0.5, 0.5)
ODD = {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]}


def odd_weights(path: Path, tiny_model: dict[str, Any], num_classes: int = 3) -> Path:
    model = DeformableDETR(**tiny_model, num_classes=num_classes)
    model.image_mean, model.image_std = tuple(ODD["mean"]), tuple(ODD["std"])
    save_checkpoint(path, Checkpoint.of(model, [Category(i, f"class {i}") for i in range(num_classes)]))
    return path


def colors(checkpoint: Path) -> dict[str, Any]:
    return {name: load_checkpoint(checkpoint).input[name] for name in ("mean", "std")}


def test_a_model_has_those_of_its_backbone() -> None:
    for backbone, mean, std in (
        ("tf_efficientnet_lite0", HALF, HALF),
        ("resnet18", IMAGENET_MEAN, IMAGENET_STD),
        ("resnet50_clip", (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ):
        with torch.device("meta"):
            model = DeformableDETR(3, 32, backbone=backbone)
        assert (model.image_mean, model.image_std) == (mean, std)


def test_the_file_of_weights_decides_for_the_whole_run(
    short_run: dict[str, Any], tiny_model: dict[str, Any], tmp_path: Path
) -> None:
    """Also after it was resumed, when the file is not read any more; a state of an older version says nothing: images
    were always normalised as ImageNet's."""
    weights, run = odd_weights(tmp_path / "odd.pth", tiny_model), tmp_path / "run"
    config = TrainConfig(**short_run | {"epochs": 1, "output": str(run), "weights": str(weights), "val_every": 9})
    train(config)
    assert colors(run / "last.pth") == ODD
    assert Predictor.from_checkpoint(run / "last.pth", "cpu").mean == tuple(ODD["mean"])
    weights.unlink()
    train(replace(config, epochs=2, resume="last"))
    assert colors(run / "last.pth") == ODD
    other = DeformableDETR(**tiny_model, num_classes=3)
    load_weights(other, run / "last.ckpt")
    assert [list(other.image_mean), list(other.image_std)] == [ODD["mean"], ODD["std"]]
    state = torch.load(run / "last.ckpt", weights_only=True)
    del state["image_mean_std"]
    torch.save(state, run / "last.ckpt")
    train(replace(config, epochs=3, resume="last"))
    assert colors(run / "last.pth") == {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}


def test_weights_of_others_are_of_imagenets(tiny_model: dict[str, Any], tmp_path: Path) -> None:
    model = DeformableDETR(**tiny_model, num_classes=3)
    assert model.image_mean == HALF
    torch.save({"model": to_official_state_dict(model)}, tmp_path / "official.pth")
    load_weights(model, tmp_path / "official.pth")
    assert (model.image_mean, model.image_std) == (IMAGENET_MEAN, IMAGENET_STD)


@pytest.mark.parametrize("value", [None, "x", [[1, 2, 3]], [[1, 2, 3], [0, 0, 0]], [[1, 2], [1, 2]]])
def test_a_state_that_says_nonsense_is_refused(value: Any, tiny_model: dict[str, Any], tmp_path: Path) -> None:
    model = DeformableDETR(**tiny_model, num_classes=3)
    state = {"pytorch-lightning_version": "2", "state_dict": model.state_dict(), "image_mean_std": value}
    torch.save(state, tmp_path / "last.ckpt")
    with pytest.raises(InputError, match="three numbers"):
        load_weights(model, tmp_path / "last.ckpt")

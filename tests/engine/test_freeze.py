"""What `optim.freeze` names does not move: no weight, no running statistic."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.checkpoint import build_from_checkpoint, load_checkpoint
from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.freeze import freeze_parameters
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.models.deformable_detr import DeformableDETR


@pytest.fixture
def model(tiny_model: dict[str, Any]) -> DeformableDETR:
    return DeformableDETR(**tiny_model | {"num_classes": 3, "with_box_refine": False})


def trainable(model: torch.nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters(remove_duplicate=False) if parameter.requires_grad}


def test_patterns_freeze_what_they_name_and_nothing_else(model: DeformableDETR) -> None:
    before = trainable(model)
    freeze_parameters(model, [])
    assert trainable(model) == before
    freeze_parameters(model, ["transformer.encoder.*", "*.norm2.bias"])
    frozen = before - trainable(model)
    assert frozen == {
        name for name in before if name.startswith("transformer.encoder.") or name.endswith(".norm2.bias")
    }


def test_a_shared_head_is_frozen_under_each_of_its_names(model: DeformableDETR) -> None:
    """Without refinement all layers have one head: class_embed.1 is class_embed.0."""
    freeze_parameters(model, ["class_embed.1.*"])
    assert not model.class_embed[0].weight.requires_grad


@pytest.mark.parametrize(
    ("pattern", "hint"),
    [
        ("backbone", r"did you mean backbone\.\*"),
        ("transformer.encodr.*", r"transformer\.encoder\.\*"),
        ("bbox_embed.0.layer.*", r"bbox_embed\.0\.layers\.\*"),
        ("zzz", "for instance backbone"),
    ],
)
def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest(
    model: DeformableDETR, pattern: str, hint: str
) -> None:
    with pytest.raises(InputError, match=f"no parameter is called .*{hint}"):
        freeze_parameters(model, [pattern])


def test_freezing_everything_is_refused(model: DeformableDETR) -> None:
    with pytest.raises(InputError, match=r"\* leave nothing to train"):
        freeze_parameters(model, ["*"])


def test_what_is_frozen_already_may_be_named_again(tiny_model: dict[str, Any]) -> None:
    """A frozen batch norm has buffers where it had parameters: that is no mistake in the pattern."""
    model = DeformableDETR(**tiny_model | {"num_classes": 3, "freeze_backbone": "all"})
    freeze_parameters(model, ["backbone.0.body.bn1.*"])


def test_frozen_norms_alone_leave_the_weights_of_the_backbone_to_train(tiny_model: dict[str, Any]) -> None:
    """freeze_backbone: norm, the strong recipe's."""
    norm, stem = (
        DeformableDETR(**tiny_model | {"num_classes": 3, "freeze_backbone": freeze}) for freeze in ("norm", "stem")
    )
    assert norm.state_dict().keys() == stem.state_dict().keys()
    assert all("bn" not in name for name in trainable(norm))
    more = trainable(norm) - trainable(stem)
    assert {name.split(".")[3] for name in more} == {"conv1", "layer1"}


def test_a_run_leaves_frozen_weights_and_statistics_as_they_were(
    shapes: Path, tiny_model: dict[str, Any], tmp_path: Path
) -> None:
    """Over training and validations, with batch norms that would otherwise follow the data; all the rest moves."""
    settings = {
        "data": DataConfig(str(shapes), image_size=64, num_workers=0),
        "model": tiny_model,
        "epochs": 2,
        "batch_size": 4,
        "num_pictures": 0,
    }
    start = train(TrainConfig(**settings, optim=OptimConfig(lr=1e-3), output=str(tmp_path / "start")))
    weights = str(start.path / "last.pth")
    unfrozen = settings | {"model": tiny_model | {"freeze_backbone": "none"}, "weights": weights}
    optim = OptimConfig(
        lr=1e-2, freeze=["backbone.0.body.conv1.*", "backbone.0.body.bn1.*", "backbone.0.body.layer1.*"]
    )
    run = train(TrainConfig(**unfrozen, optim=optim, output=str(tmp_path / "frozen")))
    checkpoint = load_checkpoint(run.path / "last.pth")
    before, after = load_checkpoint(weights).model, checkpoint.model
    is_frozen = {
        name: name.split(".")[3] in ("conv1", "bn1", "layer1") for name in after if name.startswith("backbone.0")
    }
    assert any("running_mean" in name for name, frozen in is_frozen.items() if frozen)
    for name in after:
        assert torch.equal(before[name], after[name]) == is_frozen.get(name, False), name
    build_from_checkpoint(checkpoint)  # its names are those of a network that is not frozen

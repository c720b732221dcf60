"""The one place where the losses of a step are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import ddetr.engine
from ddetr.datasets import normalize_images
from ddetr.engine.memory import make_batch
from ddetr.engine.step import REGIONS, count_objects, model_outputs, step_losses
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

CPU = torch.device("cpu")


def detector(tiny_model: dict[str, Any], **options: Any) -> tuple[DeformableDETR, SetCriterion]:
    torch.manual_seed(0)
    model = DeformableDETR(**tiny_model | {"num_classes": 3, "dropout": 0.0}).eval()
    return model, build_criterion(model, **options)


def test_the_losses_are_the_criterions_of_the_models_outputs(tiny_model: dict[str, Any]) -> None:
    """A float32 loss of every weighed term, of normalised images, divided by the objects of the whole step."""
    model, criterion = detector(tiny_model)
    batch = images, mask, targets = make_batch(2, (64, 96), 5, CPU)
    losses = step_losses(model, criterion, batch, 20.0)
    assert set(criterion.weight_dict) <= set(losses)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    expected = criterion(
        model(normalize_images(images, mask, model.image_mean, model.image_std), mask), targets
    )  # by default divided by its own objects
    assert all(torch.allclose(losses[name] * 2, expected[name]) for name in criterion.weight_dict)
    assert torch.equal(
        model_outputs(model, batch)["pred_boxes"],
        model(normalize_images(images, mask, model.image_mean, model.image_std), mask)["pred_boxes"],
    )
    assert count_objects([batch, batch]) == 20


def test_each_part_enters_its_region(tiny_model: dict[str, Any]) -> None:
    entered: list[str] = []

    @contextmanager
    def region(name: str) -> Iterator[None]:
        entered.append(name)
        yield
        entered.append(f"end of {name}")

    model, criterion = detector(tiny_model, region=region)
    step_losses(model, criterion, make_batch(1, (64, 64), 2, CPU), 2.0, region)
    parts = ["forward", "end of forward", "losses", "matching", "end of matching", "end of losses"]
    assert entered == parts
    assert {"forward", "losses", "matching"} <= set(REGIONS)


def test_nobody_else_in_the_engine_runs_the_model_on_images() -> None:
    """A forward pass written again somewhere would miss what training does to it, such as normalising."""
    engine = Path(ddetr.engine.__file__).parent
    users = [path.name for path in engine.rglob("*.py") if "normalize_images" in path.read_text("utf-8")]
    assert users == ["step.py"]

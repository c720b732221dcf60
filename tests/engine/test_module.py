"""One optimisation step and one validation, through Lightning."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader

from ddetr.checkpoint import build_from_checkpoint, load_checkpoint
from ddetr.datasets import Annotations, DetectionDataset, collate, load_annotations, normalize_images
from ddetr.datasets.config import DataConfig
from ddetr.datasets.transforms import official_eval
from ddetr.engine.config import OptimConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.evaluation.evaluator import CocoEvaluator, evaluate
from ddetr.inference.predictor import Predictor
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

# lightning's own use of PyTorch
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
SEED = 3


@dataclass
class Step:
    """What one step left: gradients before clipping, what was logged, parameters before and after."""

    gradient: torch.Tensor
    logged: dict[str, float]
    before: torch.Tensor
    after: torch.Tensor


class Spy(Callback):
    def on_before_optimizer_step(self, trainer: pl.Trainer, module: DetectionModule, optimizer: Any) -> None:
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        assert all(parameter.grad is not None for parameter in parameters)
        self.gradient = torch.cat([parameter.grad.flatten() for parameter in parameters])

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: DetectionModule, outputs: Any, batch: Any, index: int
    ) -> None:
        self.logged = {name: float(value) for name, value in outputs.items()}


def trainer_with(*callbacks: Callback) -> pl.Trainer:
    return pl.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=list(callbacks),
    )


def flat(module: torch.nn.Module) -> torch.Tensor:
    return torch.cat(
        [parameter.detach().flatten().clone() for parameter in module.parameters() if parameter.requires_grad]
    )


def fixed_model(tiny_model: dict[str, Any]) -> DeformableDETR:
    """Without dropout and with fixed norms: its losses are sums over images."""
    torch.manual_seed(SEED)
    return DeformableDETR(**tiny_model | {"num_classes": 3, "dropout": 0.0, "freeze_backbone": "stem"})


def take_step(
    annotations: Annotations, model: DeformableDETR, *, micro: int, optim: OptimConfig = OptimConfig()
) -> Step:
    config = DataConfig("unused", augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(annotations, annotations, config, batch_size=8, device_batch_size=micro, seed=SEED)
    module = DetectionModule(
        model,
        build_criterion(model),
        optim,
        CocoEvaluator(annotations),
        backbone_pretrained=False,
        steps_per_epoch=1,
        total_steps=1,
        seed=SEED,
    )
    spy, before = Spy(), flat(model)
    trainer_with(spy).fit(module, datamodule=data)
    return Step(spy.gradient, spy.logged, before, flat(model))


@pytest.fixture(scope="module")
def annotations(shapes: Path) -> Annotations:
    """Eight images, two of them, which are the first micro-batch of two, without an object."""
    whole = load_annotations(shapes, "train")
    config = DataConfig("unused", augmentation="none", image_size=64, num_workers=0)
    data = DetectionData(whole, whole, config, batch_size=8, device_batch_size=2, seed=SEED)
    data.trainer = type("One", (), {"world_size": 1, "global_rank": 0})
    first_two = {int(target["image_id"]) for target in next(iter(data.train_dataloader()))[0][2]}
    nothing = {
        "boxes_xyxy": np.zeros((0, 4), np.float32),
        "labels": np.zeros(0, np.int64),
        "area": np.zeros(0, np.float32),
        "ignore": np.zeros(0, bool),
    }
    images = [replace(record, **nothing) if record.image_id in first_two else record for record in whole.images]
    assert sum(len(record.labels) == 0 for record in images) == 2
    return replace(whole, images=images)


@pytest.mark.parametrize("variant", [{}, {"two_stage": True}, {"with_box_refine": False}])
def test_micro_batches_give_the_gradient_of_the_whole_batch(
    annotations: Annotations, tiny_model: dict[str, Any], variant: dict[str, bool]
) -> None:
    whole = take_step(annotations, fixed_model(tiny_model | variant), micro=8)
    assert whole.gradient.norm() > 1
    for micro in (2, 3):
        parts = take_step(annotations, fixed_model(tiny_model | variant), micro=micro)
        assert (parts.gradient - whole.gradient).norm() < 1e-6 * whole.gradient.norm()
        losses = [name for name in whole.logged if "error" not in name]
        assert [parts.logged[name] for name in losses] == pytest.approx(
            [whole.logged[name] for name in losses], rel=1e-5
        )


def test_what_is_logged_is_what_the_criterion_says(annotations: Annotations, tiny_model: dict[str, Any]) -> None:
    model = fixed_model(tiny_model)
    criterion = build_criterion(model)
    dataset = DetectionDataset(annotations, official_eval(64, 107), normalize=False)
    images, mask, targets = collate([dataset[i] for i in range(8)])
    assert not mask.any()
    with torch.no_grad():
        inputs = normalize_images(images, None, model.image_mean, model.image_std)
        losses = criterion(model(inputs), targets)
    logged = take_step(annotations, fixed_model(tiny_model), micro=8).logged
    assert logged.keys() == losses.keys() | {"loss", "grad_norm", "lr_rest", "lr_backbone", "lr_linear_proj"}
    for name, value in losses.items():
        assert logged[name] == pytest.approx(float(value), rel=1e-4), name
    assert logged["loss"] == pytest.approx(float(criterion.total(losses)), rel=1e-5)


def test_the_whole_gradient_is_clipped_once(annotations: Annotations, tiny_model: dict[str, Any]) -> None:
    sgd = {"sgd": True, "lr": 1.0, "lr_linear_proj_mult": 1.0, "weight_decay": 0.0}
    clipped = take_step(annotations, fixed_model(tiny_model), micro=2, optim=OptimConfig(**sgd, clip_max_norm=0.1))
    change = clipped.after - clipped.before
    assert clipped.logged["grad_norm"] == pytest.approx(float(clipped.gradient.norm()), rel=1e-5)
    assert float(change.norm()) == pytest.approx(0.1, rel=1e-3)
    assert torch.allclose(change, -clipped.gradient * 0.1 / clipped.gradient.norm(), atol=1e-6)

    free = take_step(annotations, fixed_model(tiny_model), micro=2, optim=OptimConfig(**sgd, clip_max_norm=0.0))
    assert torch.allclose(free.after - free.before, -free.gradient, rtol=1e-4, atol=1e-6)
    assert free.logged["grad_norm"] == pytest.approx(float(free.gradient.norm()), rel=1e-5)


def test_validation_measures_what_evaluate_measures(shapes: Path, tiny_run: Any) -> None:
    checkpoint = load_checkpoint(tiny_run.path / "best.pth")
    annotations = load_annotations(shapes, "train")
    model = build_from_checkpoint(checkpoint)
    config = DataConfig("unused", augmentation="none", image_size=64, num_workers=0)
    module = DetectionModule(
        model,
        build_criterion(model),
        OptimConfig(),
        CocoEvaluator(annotations),
        backbone_pretrained=False,
        steps_per_epoch=1,
        total_steps=1,
        seed=SEED,
    )
    data = DetectionData(annotations, annotations, config, batch_size=4, device_batch_size=3, seed=SEED)
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=data, verbose=False)

    dataset = DetectionDataset(annotations, official_eval(64, 107), normalize=False, train=False)
    predictor = Predictor(model, checkpoint.categories, image_size=64, max_size=107, device="cpu")
    expected = evaluate(predictor.detect, DataLoader(dataset, batch_size=3, collate_fn=collate), annotations)
    assert expected.AP > 0.1
    assert module.metrics.to_dict() == expected.to_dict()


def test_convolutions_stay_channels_last_under_autocast(set_up: Any) -> None:
    """From planes, as images may come, to the projections of all levels; the weights too, rounded or not."""
    module, _ = set_up(num_feature_levels=4)
    seen = {}

    def look(name: str) -> Any:
        return lambda _, inputs, output: seen.update({name: output.is_contiguous(memory_format=torch.channels_last)})

    for name, layer in module.model.named_modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.register_forward_hook(look(name))
    images = normalize_images(torch.randint(256, (2, 3, 128, 128), dtype=torch.uint8))
    assert images.is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        module.model(images)
    assert {name for name in seen if name.startswith("input_proj")} == {f"input_proj.{level}.0" for level in range(4)}
    assert [name for name, is_last in seen.items() if not is_last] == []

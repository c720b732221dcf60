"""Preflight: a set-up that works passes, and each usual mistake is caught by the check that is there for it."""

import copy
import json
import os
import random
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import to_pil_image

from ddetr.cli import main as cli
from ddetr.datasets.annotations import Category
from ddetr.datasets.config import DataConfig
from ddetr.datasets.splits import load_splits
from ddetr.engine.config import OptimConfig
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.preflight import model as preflight_model
from ddetr.engine.preflight.data import Check
from ddetr.engine.preflight.model import expected_class_loss
from ddetr.engine.preflight.run import PreflightReport, run_preflight
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.models.postprocess import PostProcess

CHECKS = ["training targets", "validation targets", "evaluation", "first loss", "learning", "gradients"]


@pytest.fixture(scope="module")
def oblong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six images of 96 x 64 pixels a split, with three objects each, whose classes have ids that do not count from 0."""
    folder = tmp_path_factory.mktemp("data") / "oblong"
    generator = torch.Generator().manual_seed(0)
    categories = [{"id": number, "name": name} for number, name in ((7, "seven"), (3, "three"), (90, "ninety"))]
    (folder / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        (folder / split).mkdir()
        images, objects = [], []
        for image_id in range(11, 17):
            name = f"{split}-{image_id}.png"
            pixels = torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8, generator=generator)
            to_pil_image(pixels).save(folder / split / name)
            images.append({"id": image_id, "file_name": name, "height": 64, "width": 96})
            for number in range(3):
                left, top = (int(torch.randint(0, high, (), generator=generator)) for high in (60, 30))
                box = [left, top, 20 + number * 4, 16 + number * 5]
                category = categories[(image_id + number) % 2 + (image_id == 16)]["id"]
                objects.append(
                    {"id": len(objects) + 1, "image_id": image_id, "category_id": category, "bbox": box}
                    | {"area": box[2] * box[3], "iscrowd": 0}
                )
        content = {"images": images, "annotations": objects, "categories": categories}
        (folder / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return folder


SetUp = tuple[DetectionModule, DetectionData]


@pytest.fixture
def set_up(oblong: Path, tiny_model: dict[str, Any]) -> Callable[..., SetUp]:
    def build(max_detections: int = 100, augmentation: str = "official", **changes: Any) -> SetUp:
        optim = changes.pop("optim", OptimConfig(lr=2e-3))
        config = DataConfig(str(oblong), image_size=64, num_workers=0, augmentation=augmentation)
        train_set, val_set = load_splits(config)
        data = DetectionData(train_set, val_set, config, batch_size=4, device_batch_size=2, seed=1)
        torch.manual_seed(0)
        model = DeformableDETR(**tiny_model | {"dropout": 0.1, "num_classes": 3} | changes)
        module = DetectionModule(
            model,
            build_criterion(model),
            optim,
            CocoEvaluator(val_set, max_detections),
            backbone_pretrained=False,
            steps_per_epoch=1,
            total_steps=1,
            seed=3,
        )
        return module, data

    return build


def looked_at(setup: SetUp, **options: Any) -> dict[str, Check]:
    report = run_preflight(*setup, **{"from_nothing": True} | options)
    return {check.name: check for check in report.checks}


def statuses(checks: dict[str, Check]) -> dict[str, str]:
    return {name: check.status for name, check in checks.items() if check.status != "ok"}


# --- what works passes


@pytest.mark.parametrize("augmentation", ["official", "plain", "none"])
@pytest.mark.parametrize("changes", [{}, {"two_stage": True}, {"with_box_refine": False}])
def test_a_set_up_that_works_passes(set_up: Callable[..., SetUp], augmentation: str, changes: dict[str, Any]) -> None:
    checks = looked_at(set_up(augmentation=augmentation, **changes))
    assert list(checks) == CHECKS
    assert statuses(checks) == {}, checks
    assert checks["evaluation"].facts["AP"] == pytest.approx(1, abs=1e-9)
    marked = checks["training targets"].facts
    assert marked["num_marked"] >= 5
    assert marked["num_off"] == 0


@pytest.mark.parametrize("name", ["bccd", "coco_tiny"])
def test_real_data_pass(shared_data: Path, set_up: Callable[..., SetUp], name: str) -> None:
    config = DataConfig(str(shared_data / name), image_size=128, num_workers=0)
    train_set, val_set = load_splits(config)
    data = DetectionData(train_set, val_set, config, batch_size=4, device_batch_size=2, seed=1)
    module, _ = set_up(num_classes=len(train_set.categories), num_queries=60)
    module.evaluator = CocoEvaluator(val_set)
    assert statuses(looked_at((module, data))) == {}


def test_mixed_precision_passes(set_up: Callable[..., SetUp]) -> None:
    assert statuses(looked_at(set_up(), autocast=torch.bfloat16)) == {}


def test_the_run_is_as_it_was_bit_for_bit(set_up: Callable[..., SetUp]) -> None:
    """Weights, batch norms, random states, the evaluator, the mode of the model and the criterion's counter."""
    module, data = set_up()
    before = {name: tensor.clone() for name, tensor in module.model.state_dict().items()}
    torch.manual_seed(9)
    drawn = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    module.model.eval()
    run_preflight(module, data, from_nothing=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    assert np.array_equal(np.random.get_state()[1], drawn[2])
    assert not module.model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())
    assert module.evaluator.coco_results() == []
    assert isinstance(module.model, DeformableDETR)
    assert module.model.config["dropout"] == 0.1
    assert module.model.transformer.encoder.layers[0].dropout1.p == 0.1


def test_the_prior_predicts_the_class_loss() -> None:
    """Against a simulation of the heads: logits around -4.595, one positive an object."""
    torch.manual_seed(0)
    logits = -4.59512 + torch.randn(4_000, 300) / 3**0.5
    p = logits.sigmoid().double()
    negative = 0.75 * p**2 * -(1 - p).log()
    positive = 0.25 * (1 - p[:, 0]) ** 2 * -p[:, 0].log()
    simulated = positive.mean() + negative[:, 1:].sum() / len(p)
    assert expected_class_loss(300 * 4_000, 4_000, 4_000, 0.25) == pytest.approx(float(simulated), rel=0.01)
    assert expected_class_loss(300, 1, 1, 0.25) == pytest.approx(1.13, abs=0.01)
    assert expected_class_loss(300 * 91 * 2, 14, 14, 0.25) < 1.15


# --- the data's mistakes


def shifted(sample: Callable, by: int = 1) -> Callable:
    """A transform that adds to the labels."""

    def transform(image: Any, target: dict[str, Any]) -> Any:
        image, target = sample(image, target)
        return image, {**target, "labels": target["labels"] + by}

    return transform


def test_labels_shifted_by_one_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up(num_classes=4)  # as many as the mistake needs, so that nothing crashes
    data.train_set.transform = shifted(data.train_set.transform)
    check = looked_at((module, data))["training targets"]
    assert check.status == "failed"
    assert "shifted by +1" in check.cause

    module, data = set_up(num_classes=4)
    data.val_set.transform = shifted(data.val_set.transform)
    checks = looked_at((module, data))
    assert checks["validation targets"].status == "failed"
    assert "shifted by +1" in checks["validation targets"].cause
    assert checks["evaluation"].status == "failed"

    module, data = set_up()
    data.train_set.transform = shifted(data.train_set.transform, by=3)
    assert "the model has the classes 0 to 2" in looked_at((module, data))["training targets"].found


def test_boxes_as_corners_are_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "ddetr.datasets.dataset.relative_boxes",
        lambda corners, size_hw: corners / np.array([size_hw[1], size_hw[0]] * 2, dtype=corners.dtype),
    )
    checks = looked_at(set_up())
    assert checks["validation targets"].status == "failed"
    assert "corners (xyxy), where centre and size" in checks["validation targets"].cause
    assert checks["training targets"].status == "failed"
    assert checks["evaluation"].status == "failed"


def test_swapped_sizes_are_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    original = PostProcess.forward
    monkeypatch.setattr(PostProcess, "forward", lambda self, out, sizes: original(self, out, sizes.flip(1)))
    checks = looked_at(set_up())
    for name in ("validation targets", "evaluation"):
        assert checks[name].status == "failed"
        assert "height and width are swapped" in checks[name].cause, checks[name]


def test_boxes_in_pixels_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    data.val_set.augmented = _in_pixels(data.val_set.augmented)
    data.train_set.augmented = _in_pixels(data.train_set.augmented)
    checks = looked_at((module, data))
    assert checks["training targets"].status == checks["validation targets"].status == "failed"
    assert "pixels" in checks["training targets"].cause
    assert "pixels" in checks["validation targets"].cause


def _in_pixels(original: Callable) -> Callable:
    def augmented(record: Any, pixels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        image, target = original(record, pixels)
        return image, {**target, "boxes": target["boxes"] * 64}

    return augmented


@pytest.mark.parametrize("what", ["image alone", "boxes alone"])
def test_a_flip_of_one_without_the_other_is_caught(set_up: Callable[..., SetUp], what: str) -> None:
    module, data = set_up(augmentation="none")
    original, flip = data.train_set.transform, v2.RandomHorizontalFlip(1.0)

    def transform(image: Any, target: dict[str, Any]) -> Any:
        image, target = original(image, target)
        flipped_image, flipped = flip(image, target)
        return (flipped_image, target) if what == "image alone" else (image, flipped)

    data.train_set.transform = transform
    check = looked_at((module, data))["training targets"]
    assert check.status == "failed"
    assert "transformed differently" in check.cause


def test_a_flip_in_validation_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    data.val_set.transform = v2.Compose([data.val_set.transform, v2.RandomHorizontalFlip(1.0)])
    checks = looked_at((module, data))
    assert "mirrored" in checks["validation targets"].cause
    assert checks["evaluation"].status == "failed"


def test_mixed_up_image_ids_are_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    original = CocoEvaluator.update
    monkeypatch.setattr(CocoEvaluator, "update", lambda self, ids, found: original(self, ids, found[::-1]))
    check = looked_at(set_up())["evaluation"]
    assert check.status == "failed"
    assert "image ids are mixed up: it is found under image 1" in check.cause
    assert "is not found again" in check.found


def test_lost_detections_are_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    original = CocoEvaluator.update
    monkeypatch.setattr(CocoEvaluator, "update", lambda self, ids, found: original(self, ids[:1], found[:1]))
    check = looked_at(set_up())["evaluation"]
    assert check.status == "failed"
    assert "3 of 6 images are lost" in check.found


def test_classes_in_another_order_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    other = tuple(reversed(module.evaluator.annotations.categories))
    module.evaluator.annotations = replace(module.evaluator.annotations, categories=other)
    check = looked_at((module, data))["validation targets"]
    assert check.status == "failed"
    assert "number their classes differently" in check.cause
    assert isinstance(other[0], Category)


@pytest.mark.parametrize(
    ("changes", "advice"), [({"max_detections": 2}, "--max_detections"), ({"num_queries": 2}, "--model.num_queries")]
)
def test_more_objects_than_can_be_found_is_a_warning(
    set_up: Callable[..., SetUp], changes: dict[str, Any], advice: str
) -> None:
    checks = looked_at(set_up(**changes))
    assert statuses(checks) == {"evaluation": "warning"}
    assert "has 3 objects" in checks["evaluation"].cause
    assert advice in checks["evaluation"].next


# --- the model's mistakes


def test_a_class_bias_of_zero_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for head in module.model.class_embed:
        torch.nn.init.zeros_(head.bias)
    checks = looked_at((module, data))
    assert checks["first loss"].status == "failed"
    assert "bias of 0.00 instead of -4.60" in checks["first loss"].cause
    # heads with trained weights have no known loss
    assert looked_at((module, data), from_nothing=False)["first loss"].status == "ok"


def test_wild_heads_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for head in module.model.class_embed:
        with torch.no_grad():
            head.weight.mul_(20)
    check = looked_at((module, data))["first loss"]
    assert check.status == "failed"
    assert "spread too far" in check.cause


def test_terms_that_are_not_finite_are_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    with torch.no_grad():
        module.model.bbox_embed[0].layers[0].bias[0] = float("nan")
    checks = looked_at((module, data), from_nothing=False)
    assert checks["first loss"].status == "failed"
    assert "loss_bbox_0 nan" in checks["first loss"].found
    assert checks["learning"].status == "failed"


def test_a_frozen_head_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    for parameter in module.model.class_embed.parameters():
        parameter.requires_grad_(False)
    check = looked_at((module, data))["gradients"]
    assert check.status == "failed"
    assert "frozen: class_embed.0.weight" in check.found
    assert looked_at((module, data), from_nothing=False)["gradients"].status == "warning"


def test_a_detached_head_is_caught(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    module.model.bbox_embed[1].register_forward_hook(lambda _, args, output: output.detach())
    check = looked_at((module, data))["gradients"]
    assert check.status == "failed"
    assert "none reaches bbox_embed.1.layers.0.weight" in check.found


def test_heads_without_a_loss_are_a_warning(set_up: Callable[..., SetUp]) -> None:
    checks = looked_at(set_up(aux_loss=False))
    assert statuses(checks) == {"gradients": "warning"}
    assert "aux_loss" in checks["gradients"].cause


def test_parameters_that_get_zeros_are_named(set_up: Callable[..., SetUp]) -> None:
    """Batch norms frozen at the zeros that a new ResNet's blocks end with: the blocks can never learn."""
    checks = looked_at(set_up(freeze_backbone="stem"))
    assert statuses(checks) == {"gradients": "warning"}
    assert "only zeros reach backbone.0.body.layer2" in checks["gradients"].found


def test_a_rate_of_zero_is_caught(set_up: Callable[..., SetUp]) -> None:
    zero = OptimConfig(lr=0.0, weight_decay=0.0)
    check = looked_at(set_up(optim=zero))["learning"]
    assert check.status == "failed"
    assert "no parameter moves" in check.found
    assert "the learning rates are {'rest': 0.0" in check.cause


def test_a_rate_that_is_too_low_is_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_model, "MAX_STEPS", 10)
    check = looked_at(set_up(optim=OptimConfig(lr=1e-9)))["learning"]
    assert check.status == "failed"
    assert "1e-09 is too low" in check.cause


def test_a_rate_that_is_too_high_is_caught(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight_model, "MAX_STEPS", 30)
    check = looked_at(set_up(optim=OptimConfig(lr=30.0)))["learning"]
    assert check.status == "failed"
    assert "too high" in check.cause


def test_time_that_runs_out_is_a_warning(set_up: Callable[..., SetUp]) -> None:
    """On a large model and a CPU a minute is a step or two, from which nothing can be concluded."""
    checks = looked_at(set_up(), max_seconds=0.0)
    assert statuses(checks) == {"learning": "warning"}
    assert "in 2 steps" in checks["learning"].found


def test_a_step_that_fails_says_where(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    from ddetr.models.attention import MSDeformAttn

    def full(*_: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(MSDeformAttn, "forward", full)
    check = looked_at(set_up())["first step"]
    assert check.status == "failed"
    assert "OutOfMemoryError in transformer.encoder.layers.0.self_attn" in check.found
    assert "--device_batch_size" in check.next


def test_a_data_set_that_cannot_be_read_is_a_failed_check(set_up: Callable[..., SetUp]) -> None:
    module, data = set_up()
    data.train_set = copy.copy(data.train_set)
    data.train_set.transform = lambda *_: 1 / 0
    check = looked_at((module, data))["training targets"]
    assert check.status == "failed"
    assert "ZeroDivisionError" in check.found


# --- as part of a run


@pytest.fixture
def settings(short_run: dict[str, Any], oblong: Path, tmp_path: Path) -> dict[str, Any]:
    data = DataConfig(str(oblong), image_size=64, num_workers=0)
    return short_run | {"data": data, "epochs": 1, "batch_size": 2, "preflight": True, "output": str(tmp_path / "run")}


def test_a_run_with_preflight_is_the_run_without(settings: dict[str, Any], tmp_path: Path) -> None:
    from ddetr.checkpoint import load_checkpoint

    with_it = train(**settings)
    without = train(**settings | {"preflight": False, "output": str(tmp_path / "other")})
    one, other = (load_checkpoint(run.path / "last.pth").model for run in (with_it, without))
    assert all(torch.equal(one[name], other[name]) for name in one)
    content = json.loads((with_it.path / "preflight.json").read_text())
    assert content["passed"]
    assert [check["name"] for check in content["checks"]] == CHECKS
    assert not (without.path / "preflight.json").exists()
    written = (with_it.path / "preflight.json").stat().st_mtime_ns
    train(**settings | {"epochs": 1, "resume": "auto"})
    assert (with_it.path / "preflight.json").stat().st_mtime_ns == written  # a resumed run has had it


def test_a_failed_check_stops_the_run_before_it_begins(settings: dict[str, Any], tmp_path: Path) -> None:
    broken = settings | {"optim": OptimConfig(lr=0.0, weight_decay=0.0)}
    with pytest.raises(InputError, match="preflight: learning: .*no parameter moves.*--preflight false"):
        train(**broken)
    run = tmp_path / "run"
    assert not json.loads((run / "preflight.json").read_text())["passed"]
    assert [path.name for path in run.iterdir()] == ["preflight.json"]
    train(**broken | {"preflight": False})  # in the same folder
    assert (run / "last.ckpt").is_file()


def options(settings: dict[str, Any]) -> list[str]:
    listed = [
        "--data",
        settings["data"].path,
        "--data.image_size",
        "64",
        "--data.num_workers",
        "0",
        "--batch_size",
        "2",
    ]
    listed += ["--optim.lr", "1e-3", "--output", settings["output"], "--device", "cpu", "--epochs", "1"]
    return listed + [text for n, v in settings["model"].items() for text in (f"--model.{n}", str(v).lower())]


def test_the_command_tries_and_trains_nothing(settings: dict[str, Any], capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["preflight", *options(settings)]) == 0
    shown = capsys.readouterr().out
    for name in CHECKS:
        assert name in shown
    assert [path.name for path in Path(settings["output"]).iterdir()] == ["preflight.json"]
    assert cli.main(["preflight", *options(settings), "--optim.lr", "0"]) == 2
    captured = capsys.readouterr()
    assert "ddetr: error: preflight: learning" in captured.err
    assert "failed" in captured.out


def test_the_table_shows_brackets_as_they_are() -> None:
    from rich.console import Console

    check = Check("labels", "failed", "[1, 2]", "[bold]", "cause", "place")
    console = Console(record=True, width=120)
    console.print(PreflightReport((check,), 1.0).render())
    shown = console.export_text()
    assert "[1, 2]" in shown
    assert "[bold]" in shown
    assert "likely: cause; look at place" in shown


@pytest.mark.slow
def test_two_processes_end_together(settings: dict[str, Any]) -> None:
    """The first one finds the mistake; the second, which waits for it, must not wait for ever."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "ddetr", "train"]
    command += [*options(settings), "--optim.lr", "0"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0
    assert done.stderr.count("ddetr: error: preflight: learning") == 1
    assert not (Path(settings["output"]) / "config.yaml").exists()


def test_the_criterion_is_looked_at_too(set_up: Callable[..., SetUp], monkeypatch: pytest.MonkeyPatch) -> None:
    """One that reads boxes in another order: perfect predictions have a loss."""
    original = SetCriterion.forward

    def forward(self: SetCriterion, outputs: Any, targets: Any, num_boxes: Any = None) -> dict[str, Tensor]:
        return original(self, outputs, [{**t, "boxes": t["boxes"][:, [1, 0, 3, 2]]} for t in targets], num_boxes)

    monkeypatch.setattr(SetCriterion, "forward", forward)
    check = looked_at(set_up())["validation targets"]
    assert check.status == "failed"
    assert "perfect predictions have loss_bbox" in check.found

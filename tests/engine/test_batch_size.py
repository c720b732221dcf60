"""Automatic micro-batches: the search, what a probe may not touch, and what a run remembers. CUDA is simulated."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import yaml
from torch import Tensor, nn

from ddetr.checkpoint import load_checkpoint
from ddetr.datasets import load_annotations
from ddetr.datasets.config import DataConfig
from ddetr.engine import batch_size
from ddetr.engine.batch_size import MemoryPlan, even_size, largest_that_fits, probe_step
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.module import DetectionModule
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.models.deformable_detr import DeformableDETR, build_criterion

GIB = 2**30


class Device:
    """A stand-in for a GPU: a step takes `fixed` + n * `each` bytes, and more than `total` can't be had."""

    def __init__(self, fixed: int, each: int, total: int):
        self.fixed, self.each, self.total = fixed, each, total
        self.tried: list[int] = []

    def used(self, batch: int) -> int:
        self.tried.append(batch)
        peak = self.fixed + batch * self.each
        if peak > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return peak


@pytest.mark.parametrize("most", [1, 2, 5, 16, 31, 32])
@pytest.mark.parametrize("room", [0, 1, 2, 3, 7, 11, 31, 32, 100])
def test_the_search_finds_the_largest_batch(most: int, room: int) -> None:
    """Within the budget, and never by another way than trying; in a handful of tries."""
    device = Device(GIB, GIB, total=GIB * (room + 3))
    assert largest_that_fits(device.used, budget=GIB * (1 + room), most=most) == min(most, room)
    assert len(device.tried) == len(set(device.tried)) <= 11
    assert max(device.tried) <= most


@pytest.mark.parametrize("room", [0, 1, 5, 6, 13])
def test_running_out_of_memory_is_an_answer(room: int) -> None:
    device = Device(GIB, GIB, total=GIB * (1 + room))
    assert largest_that_fits(device.used, budget=100 * GIB, most=32) == min(32, room)


def test_other_errors_of_a_probe_are_errors() -> None:
    def broken(batch: int) -> int:
        raise RuntimeError("no kernel image")

    with pytest.raises(RuntimeError, match="no kernel image"):
        largest_that_fits(broken, GIB, 8)


@pytest.mark.parametrize(
    ("share", "limit", "expected"),
    [(32, 12, 11), (32, 32, 32), (32, 40, 32), (32, 8, 8), (8, 3, 3), (1, 1, 1), (32, 31, 16)],
)
def test_turns_are_as_few_as_possible_and_even(share: int, limit: int, expected: int) -> None:
    """31 that fit, of 32: two turns of 16, not 31 and 1."""
    assert even_size(share, limit) == expected


def plan(settle: Any = None) -> MemoryPlan:
    return MemoryPlan((64, 96), num_objects=9, precision="32", optimizer_states=2, settle=settle)


def stand_ins(device: str, share: int) -> tuple[Any, Any]:
    data = SimpleNamespace(batch_size=2 * share, device_batch_size=1)
    data.set_device_batch_size = lambda size: setattr(data, "device_batch_size", size)
    trainer = SimpleNamespace(datamodule=data, world_size=2, num_devices=2, is_global_zero=False)
    weights = torch.empty(3 * GIB // 8, device="meta", requires_grad=True)  # 1.5 GiB of float32
    return trainer, SimpleNamespace(device=torch.device(device), model=SimpleNamespace(parameters=lambda: [weights]))


def test_a_gpu_is_tried_out_below_its_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """90 % of 80 GiB, less the 6 GiB that gradients, optimiser and the exchange of gradients will take: 66 GiB."""
    gpu = Device(GIB, 5 * GIB, total=80 * GIB)
    probed: list[tuple] = []

    def probe(trainer: Any, module: Any, batch: int, size_hw: tuple[int, int], num_objects: int) -> int:
        probed.append((size_hw, num_objects))
        return gpu.used(batch)

    monkeypatch.setattr(batch_size, "probe_step", probe)
    monkeypatch.setattr(batch_size, "free_and_total", lambda _: (79 * GIB, 80 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: GIB)
    share = [1.0]
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda _: share[0])
    sizes: list[int] = []
    trainer, module = stand_ins("cuda", share=16)
    plan(sizes.append).on_fit_start(trainer, module)
    assert set(probed) == {((64, 96), 9)}
    assert gpu.tried == [1, 2, 4, 8, 16, 12, 14, 13]
    assert sizes == [8]  # 13 would fit: two turns of 8
    assert trainer.datamodule.device_batch_size == 8

    share[0] = 0.5  # of the card is all that this process may take: 90 % of 40 GiB, less the 6
    plan(sizes.append).on_fit_start(trainer, module)
    assert sizes == [8, 4]  # 5 would fit: four turns of 4

    gpu.fixed = 70 * GIB
    with pytest.raises(InputError, match=r"not even one image of 64 x 96 px fits .*--activation_checkpointing"):
        plan(sizes.append).on_fit_start(trainer, module)


@pytest.mark.parametrize(("free", "expected"), [(100 * GIB, 8), (10 * GIB, 3), (1 * GIB, 0)])
def test_a_cpu_is_estimated(monkeypatch: pytest.MonkeyPatch, free: int, expected: int) -> None:
    """Two processes share 90 % of what is free: of 10 GiB 4.5 each, less 1.5 that do not depend on the batch."""

    def estimate(self: Any, trainer: Any, module: Any, batch: int) -> Any:
        return SimpleNamespace(lasting=2 * GIB, parameters=GIB, peak=GIB // 2 + batch * GIB)

    monkeypatch.setattr(MemoryPlan, "_estimate", estimate)
    monkeypatch.setattr(batch_size, "free_and_total", lambda _: (free, 200 * GIB))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    trainer, module = stand_ins("cpu", share=32)
    assert plan()._limit(trainer, module, 32) == expected or (expected == 0 and plan()._limit(trainer, module, 32) < 1)


def test_all_processes_take_the_least(monkeypatch: pytest.MonkeyPatch) -> None:
    settled: list[int] = []
    the_plan = plan(settle=settled.append)
    monkeypatch.setattr(MemoryPlan, "_limit", lambda *_: 7)
    monkeypatch.setattr(batch_size, "gathered", lambda limit: [limit, 3])
    trainer, module = stand_ins("cpu", share=32)
    the_plan.on_fit_start(trainer, module)
    assert settled == [3]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_probe_touches_nothing(shapes: Path, tiny_model: dict[str, Any], checkpointing: bool) -> None:
    """Weights, running statistics, gradients, hooks of gradients (DDP's), random states and modes."""
    torch.manual_seed(0)
    annotations = load_annotations(shapes, "train")
    model = DeformableDETR(**tiny_model | {"num_classes": 3})
    model.transformer.set_activation_checkpointing(checkpointing)
    module = DetectionModule(
        model,
        build_criterion(model),
        OptimConfig(),
        CocoEvaluator(annotations),
        backbone_pretrained=False,
        steps_per_epoch=1,
        total_steps=1,
        seed=0,
    )
    norms = [child for child in model.modules() if isinstance(child, nn.BatchNorm2d)]
    assert norms
    module.eval()
    model.backbone.train()
    modes = [child.training for child in module.modules()]
    fired: list[Tensor] = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(fired.append)
    state = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    random_state = torch.get_rng_state()
    trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)

    runs: list[torch.Size] = []
    hook = norms[0].register_forward_hook(lambda norm, _, output: runs.append(norm.training and output.shape))
    assert probe_step(trainer, module, 3, (64, 96), 5) == 0
    hook.remove()
    assert runs[0][0] == 3  # it ran, in training mode
    assert [child.training for child in module.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert fired == []


def test_auto_is_the_run_with_the_number_it_finds(
    short_run: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is settled stands in the run's settings, decides nothing else, and holds when the run goes on elsewhere."""
    short_run |= {"batch_size": 8}
    monkeypatch.setattr(MemoryPlan, "_limit", lambda *_: 3)
    train(TrainConfig(**short_run | {"device_batch_size": "auto"}, output=str(tmp_path / "auto")))
    assert yaml.safe_load((tmp_path / "auto" / "config.yaml").read_text())["device_batch_size"] == 3
    train(TrainConfig(**short_run | {"device_batch_size": 3}, output=str(tmp_path / "number")))
    one, other = (load_checkpoint(tmp_path / name / "last.pth").model for name in ("auto", "number"))
    assert all(torch.equal(one[name], other[name]) for name in one)

    def probed(*_: Any) -> int:
        raise AssertionError("probed again")

    monkeypatch.setattr(MemoryPlan, "_limit", probed)
    again = train(TrainConfig(**short_run | {"device_batch_size": "auto"}, resume=str(tmp_path / "auto")))
    assert yaml.safe_load((again.path / "config.yaml").read_text())["device_batch_size"] == 3
    with pytest.raises(InputError, match="device_batch_size was 3 and is"):
        train(TrainConfig(**short_run | {"device_batch_size": 2}, resume=str(tmp_path / "auto")))


def test_auto_is_the_papers_batch() -> None:
    def resolved(batch_size: Any, device_batch_size: Any, before: dict[str, Any]) -> tuple[Any, Any]:
        sizes = {"batch_size": batch_size, "device_batch_size": device_batch_size}
        config = TrainConfig(DataConfig("x"), **sizes).with_batch_sizes(before)
        return config.batch_size, config.device_batch_size

    assert resolved("auto", 2, {}) == (32, "auto")
    assert resolved(16, "auto", {}) == (16, "auto")
    assert resolved(16, 2, {}) == (16, 2)
    before = {"batch_size": 24, "device_batch_size": 6}
    assert resolved("auto", 2, before) == (24, 6)
    assert resolved(16, "auto", before) == (16, 6)
    assert resolved(16, 2, before) == (16, 2)
    for sizes in ((0, 2), (8, 0)):
        with pytest.raises(InputError, match="must be at least 1, got 0"):
            resolved(*sizes, {})

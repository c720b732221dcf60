"""Precision and determinism: what is rounded, what is not, and what has the same bits in every run."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import ddetr.models.attention
from ddetr.checkpoint import load_checkpoint
from ddetr.engine.config import TrainConfig
from ddetr.engine.memory import make_batch
from ddetr.engine.step import step_losses
from ddetr.engine.train import train
from ddetr.models.criterion import SetCriterion
from ddetr.models.deformable_detr import DeformableDETR, build_criterion
from ddetr.models.matcher import HungarianMatcher


@pytest.fixture
def settings(short_run: dict[str, Any]) -> dict[str, Any]:
    model = short_run["model"] | {"two_stage": True}
    return short_run | {"model": model, "epochs": 1, "batch_size": 8, "device_batch_size": 4}


def first_losses(run: Path) -> dict[str, float]:
    with (run / "train.csv").open() as file:
        row = next(csv.DictReader(file))
    return {name: float(value) for name, value in row.items() if name.startswith("loss")}


@pytest.mark.parametrize(("precision", "tolerance"), [("bf16", 2e-2), ("fp16", 2e-3)])
def test_the_loss_of_a_step_agrees_with_float32(
    settings: dict[str, Any], tmp_path: Path, precision: str, tolerance: float
) -> None:
    """Same weights, images, dropout: every loss term within 2 % (bf16: 8 bits) or 0.2 % (fp16: 11 bits) of float32's,
    measured against the total; and not the same, which would be float32 under another name."""
    exact = first_losses(train(TrainConfig(**settings, output=str(tmp_path / "32"))).path)
    rounded = first_losses(train(TrainConfig(**settings, precision=precision, output=str(tmp_path / precision))).path)
    assert exact.keys() == rounded.keys()
    for name, value in exact.items():
        assert abs(rounded[name] - value) < tolerance * exact["loss"], name
    assert rounded["loss"] != exact["loss"]


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_locations_costs_and_losses_are_float32(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    seen: dict[str, set[torch.dtype]] = {"references": set(), "values": set(), "costs": set(), "losses": set()}
    step = ddetr.models.attention.ms_deform_attn_step

    def watched_step(value: Any, shapes: Any, offsets: Any, logits: Any, reference_points: Any) -> Any:
        seen["values"].add(value.dtype)
        seen["references"].add(reference_points.dtype)
        return step(value, shapes, offsets, logits, reference_points)

    def watched(original: Any, key: str) -> Any:
        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            seen[key] |= {value.dtype for value in (result.values() if isinstance(result, dict) else [result])}
            return result

        return call

    monkeypatch.setattr(ddetr.models.attention, "ms_deform_attn_step", watched_step)
    monkeypatch.setattr(HungarianMatcher, "_cost", watched(HungarianMatcher._cost, "costs"))
    monkeypatch.setattr(SetCriterion, "forward", watched(SetCriterion.forward, "losses"))
    train(TrainConfig(**settings, precision=precision, output=str(tmp_path / "run")))
    half = torch.bfloat16 if precision == "bf16" else torch.float16
    assert half in seen["values"]
    assert seen["references"] == seen["costs"] == seen["losses"] == {torch.float32}


def test_deterministic_runs_have_the_same_bits(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    switched: list[bool] = []
    original = HungarianMatcher.match_sets

    def watched(*arguments: Any) -> Any:
        switched.append(torch.are_deterministic_algorithms_enabled())
        return original(*arguments)

    monkeypatch.setattr(HungarianMatcher, "match_sets", watched)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        runs = [
            train(TrainConfig(**settings, deterministic=True, output=str(tmp_path / name))).path / "last.pth"
            for name in ("a", "b")
        ]
    finally:
        torch.set_num_threads(threads)
    one, other = (load_checkpoint(file).model for file in runs)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert all(switched)
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_deterministic_runs_on_a_gpu_have_the_same_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    options = {"deterministic": True, "device": "cuda", "devices": 1, "precision": "bf16"}
    files = [
        train(TrainConfig(**settings, **options, output=str(tmp_path / name))).path / "last.pth" for name in ("a", "b")
    ]
    one, other = (load_checkpoint(file).model for file in files)
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


# What PyTorch, 2.6 or a later one, refuses on CUDA under deterministic algorithms, by the text of
# torch.use_deterministic_algorithms and its source; cumsum on floats alone.
REFUSED = {
    *("cumsum", "put_", "histc", "median", "kthvalue", "nll_loss2d_forward", "grid_sampler_2d_backward"),
    *("upsample_linear1d_backward", "upsample_bilinear2d_backward", "upsample_bicubic2d_backward"),
    *("_adaptive_avg_pool2d_backward", "adaptive_max_pool2d_backward", "reflection_pad2d_backward"),
}


@pytest.mark.parametrize("two_stage", [False, True])
def test_nothing_in_a_step_is_refused_by_deterministic_algorithms_on_a_gpu(
    tiny_model: dict[str, Any], two_stage: bool
) -> None:
    found: set[str] = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
            name = func.overloadpacket.__name__
            if name in REFUSED and (name != "cumsum" or func(*args, **(kwargs or {})).is_floating_point()):
                found.add(name)
            return func(*args, **(kwargs or {}))

    model = DeformableDETR(num_classes=3, **tiny_model | {"two_stage": two_stage}).train()
    criterion = build_criterion(model)
    images, mask, targets = make_batch(2, (64, 96), 3, torch.device("cpu"))
    mask[0, :, 64:] = True
    with Watch():
        losses = step_losses(model, criterion, (images, mask, targets), 6.0)
        criterion.total(losses).backward()
    assert found == set()

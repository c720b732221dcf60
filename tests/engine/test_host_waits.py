"""Where the host waits for the GPU: a new `.item()` in a step is seen here, with or without a GPU."""

import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from pretend_gpu import GPU, OnGPU, PretendAccelerator, PretendGPU, pretend_gpu

from ddetr.datasets import Category
from ddetr.engine.config import OptimConfig, TrainConfig
from ddetr.engine.fit import fit
from ddetr.engine.loading.datamodule import DetectionData
from ddetr.engine.module import DetectionModule
from ddetr.engine.prepare import prepare
from ddetr.engine.train import _begin, _trainer, build
from ddetr.inference.predictor import Predictor
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.transfer import sent

# lightning's own use of PyTorch
pytestmark = pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")

MATCHING = "models/matcher.py match_sets: a copy to the host"
GUARD = "runtime/distributed.py agree: a copy to the host"
ROW = "engine/callbacks.py _numbers: a copy to the host"  # of train.csv, every --log_every steps
BEFORE_SAVING = "engine/blackbox/trace.py non_finite_parameters: a copy to the host"


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendGPU]:
    # As where Triton is: the operator is one operation, which the pretended GPU computes by the CPU's kernel.
    monkeypatch.setattr(sys.modules["ddetr.ops.ms_deform_attn"], "uses_reference", lambda device_type: False)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**40, 2**40))
    with pretend_gpu() as gpu:
        yield gpu


class Spy(Callback):
    """The waits of each training step, with its way to the device and all callbacks, and of each validation batch."""

    def __init__(self, gpu: PretendGPU):
        self.gpu, self.steps, self.validation = gpu, [], []

    def _take(self) -> Counter:
        places = Counter(self.gpu.places)
        self.gpu.forget()
        return places

    def on_train_batch_end(self, trainer: pl.Trainer, module: DetectionModule, *_: Any) -> None:
        assert all(isinstance(parameter, OnGPU) for parameter in module.parameters())
        self.steps.append(self._take())

    def on_validation_start(self, *_: Any) -> None:
        self._take()

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validation.append(self._take())


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator")
def test_a_step_waits_for_the_costs_of_matching_and_for_whether_it_is_finite(
    short_run: dict[str, Any], tmp_path: Path, gpu: PretendGPU
) -> None:
    short_run["model"]["two_stage"] = True
    short_run |= {"epochs": 1, "batch_size": 2, "device_batch_size": 1, "log_every": 4, "loggers": []}
    short_run |= {"optim": OptimConfig(ema_decay=0.9), "output": str(tmp_path / "run"), "device": "cpu"}
    config = TrainConfig(**short_run)
    prepared = prepare(config)
    where = {"accelerator": "auto", "devices": 1, "strategy": SingleDeviceStrategy(GPU, PretendAccelerator())}
    prepared = replace(prepared, where=where)
    built, spy = build(prepared), Spy(gpu)
    with prepared.run.claimed(is_new=True):
        _begin(prepared, built)
        trainer = _trainer(prepared, built)
        trainer.callbacks.append(spy)
        fit(trainer, built.module, built.data, prepared.run, None)

    step = {MATCHING: 2, GUARD: 1}  # micro-batches
    # The first step comes after the whole start of the run; before the last but one the state is saved.
    assert spy.steps[1:] == [step, step | {BEFORE_SAVING: 1}, step | {ROW: 1}]
    assert spy.validation == [{"evaluation/evaluator.py <genexpr>: a copy to the host": 3}] * 4


VARIANTS = {
    "plain": {"with_box_refine": False},
    "+": {"with_box_refine": True},
    "++": {"with_box_refine": True, "two_stage": True},
    "single scale": {"with_box_refine": False, "num_feature_levels": 1},
    "single scale, DC5": {"with_box_refine": False, "num_feature_levels": 1, "dilation": True},
}


@pytest.mark.parametrize("encoding", ["sine", "learned"])
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_the_network_could_be_recorded_as_a_graph(
    tiny_model: dict[str, Any], gpu: PretendGPU, variant: str, encoding: str, masked: bool
) -> None:
    """Nothing in evaluation waits, and nothing comes from the host: a CUDA graph holds neither."""
    torch.manual_seed(0)
    model = DeformableDETR(**tiny_model | VARIANTS[variant] | {"num_classes": 3, "position_embedding": encoding}).eval()
    images, mask = torch.randn(2, 3, 64, 96), torch.zeros(2, 64, 96, dtype=torch.bool)
    mask[1, :, 60:] = True
    with torch.no_grad():
        expected = model(images, mask if masked else None)["pred_logits"]
        model, images, mask = model.to("cuda"), images.to("cuda"), mask.to("cuda") if masked else None
        gpu.forget()
        found = model(images, mask)["pred_logits"]
    assert isinstance(found, OnGPU)
    assert (gpu.waits, gpu.sent) == ([], [])
    assert torch.equal(found.cpu(), expected)


def test_a_prediction_waits_for_what_it_found(tiny_model: dict[str, Any], gpu: PretendGPU) -> None:
    categories = [Category(number, str(number)) for number in range(3)]
    predictor = Predictor(DeformableDETR(**tiny_model | {"num_classes": 3}), categories, image_size=64, device="cpu")
    predictor.device, predictor.model = GPU, predictor.model.to("cuda")
    images = [torch.randint(256, (3, *size_hw), dtype=torch.uint8) for size_hw in ((64, 64), (64, 96))]
    gpu.forget()
    predictor.predict(images, threshold=0.0, batch_size=2)
    assert Counter(gpu.places) == {"inference/predictor.py <dictcomp>: a copy to the host": 3}


def _read(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return float(x.sum())


def _ask(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return bool((x > 0).any())


def _list(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return x.tolist()


def _copy_back(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return x.to("cpu", non_blocking=True)


def _pick(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return x[x > 0]


def _put(x: torch.Tensor, gpu: PretendGPU) -> Any:
    x[torch.zeros(1, dtype=torch.long, device="cuda")] = 1.0


def _find(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return x.nonzero()


def _constant(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return torch.tensor([1.0, 2.0], device="cuda")


def _unpinned(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return torch.ones(2).to("cuda", non_blocking=True)


def _blocking(x: torch.Tensor, gpu: PretendGPU) -> Any:
    return torch.ones(2).pin_memory().to("cuda")


@pytest.mark.parametrize(
    "action", [_read, _ask, _list, _copy_back, _pick, _put, _find, _constant, _unpinned, _blocking]
)
def test_what_waits_is_seen(gpu: PretendGPU, action: Callable[..., Any]) -> None:
    x = torch.ones(3).to("cuda")
    gpu.forget()
    action(x, gpu)
    assert len(gpu.waits) == 1
    assert gpu.sent == []


def test_what_does_not_wait_is_not(gpu: PretendGPU) -> None:
    x = torch.zeros(3, device="cuda", requires_grad=True)
    y = sent(torch.tensor([1.0, 2.0, 3.0]), GPU)
    assert isinstance(y, OnGPU)
    total = (x.where(y > 1, 0.0) * y).sum() + torch.arange(3, device="cuda")[1:].sum()
    total.backward()
    assert (gpu.waits, len(gpu.sent)) == ([], 1)
    assert x.grad.tolist() == [0, 2, 3]


def test_tensors_of_two_devices_do_not_meet(gpu: PretendGPU) -> None:
    with pytest.raises(RuntimeError, match="expected all tensors on one device"):
        torch.zeros(3, device="cuda") + torch.ones(3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_as_often(set_up: Callable[..., tuple[DetectionModule, DetectionData]]) -> None:
    """PyTorch itself says where it waits. The first two steps compile kernels and make the optimiser's state."""
    module, data = set_up(two_stage=True)
    heard: list[warnings.WarningMessage] = []

    class Listen(Callback):
        def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
            heard.clear()
            torch.cuda.set_sync_debug_mode("warn" if trainer.global_step == 2 else "default")

        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            torch.cuda.set_sync_debug_mode("default")

    trainer = pl.Trainer(
        max_steps=3,
        accelerator="cuda",
        devices=1,
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=0,
        callbacks=[Listen()],
    )
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            trainer.fit(module, datamodule=data)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in heard if "synchronizing CUDA operation" in str(one.message)]
    assert Counter(Path(one.filename).name for one in waits) == {"matcher.py": 2, "distributed.py": 1}

"""An exponential moving average of the weights: what is validated and published where `optim.ema_decay` is set.

Costs: one more copy of the trained weights on the device (160 MB for the ResNet-50 model) and in last.ckpt, one fused
multiply-add over them per step, two copies per validation.
"""

from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn

from ddetr.engine.module import DetectionModule
from ddetr.models.auxiliary import PREFIX

_IN_CHECKPOINT = "weight_average"


class WeightAverage(Callback):
    """Keeps the average beside the model, and exchanges the two for the time of a validation.

    It stands behind the callbacks that publish, so that their `on_validation_end` still sees the averaged weights.
    Values are exchanged, not tensors: optimiser, DistributedDataParallel and compiled graphs notice nothing.

    Lightning's own callback is not used: it gives the trained weights back before the hook that publishes, it counts
    the steps that fp16's scaler leaves out, and a checkpoint that it saves during a validation has the two exchanged.
    """

    def __init__(self, decay: float):
        self.decay, self.num_updates = decay, 0
        self._current: dict[str, Tensor] = {}  # the model's own tensors
        self._average: dict[str, Tensor] = {}  # their averages; while exchanged, the values that are being trained
        self._is_exchanged = False
        self._loaded: dict[str, Tensor] = {}
        self._hook: Any = None

    def on_train_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._current = trained_tensors(module.model)
        self._average = {name: tensor.clone() for name, tensor in self._current.items()}
        for name, tensor in self._loaded.items():
            self._average[name].copy_(tensor)
        self._loaded = {}
        # Called where the optimiser has really stepped: fp16's scaler leaves out the steps whose gradient overflows.
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._update())

    def _update(self) -> None:
        update_average(self._average, self._current, self.decay, self.num_updates)
        self.num_updates += 1

    def on_validation_start(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        if not self._average:
            return
        if dist.is_available() and dist.is_initialized():
            # The weights are the same on every process, the running statistics are not: what counts is what the first
            # one has, since that is what a resumed run gets.
            for name, _ in module.model.named_buffers():
                if name in self._average and self._average[name].is_floating_point():
                    dist.broadcast(self._average[name], src=0)
        self._exchange()

    def on_validation_end(self, trainer: pl.Trainer, module: DetectionModule) -> None:
        self._put_back()

    def on_exception(self, trainer: pl.Trainer, module: DetectionModule, exception: BaseException) -> None:
        self._put_back()

    def teardown(self, trainer: pl.Trainer, module: DetectionModule, stage: str) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook, self._current, self._average = None, {}, {}

    def on_save_checkpoint(self, trainer: pl.Trainer, module: DetectionModule, checkpoint: dict[str, Any]) -> None:
        """Right at any moment: saved during a validation, the values being trained lie in the place of the average."""
        average, trained = self._average or self._loaded, self._current
        if self._is_exchanged:
            average, trained = trained, average
            for name, shared_with in _names_of(module.model).items():
                if shared_with in trained:
                    checkpoint["state_dict"][f"model.{name}"] = trained[shared_with]
        checkpoint[_IN_CHECKPOINT] = {"num_updates": self.num_updates, "tensors": average}

    def on_load_checkpoint(self, trainer: pl.Trainer, module: DetectionModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint[_IN_CHECKPOINT]
        self.num_updates, self._loaded = saved["num_updates"], saved["tensors"]

    def _exchange(self) -> None:
        exchange(self._average, self._current)
        self._is_exchanged = not self._is_exchanged

    def _put_back(self) -> None:
        if self._is_exchanged:
            self._exchange()


@torch.no_grad()
def update_average(average: dict[str, Tensor], current: dict[str, Tensor], decay: float, num_updates: int) -> None:
    """One step of the average, in place.

    The decay of update n (from 0) is min(decay, (1 + n) / (10 + n)): the first averages soon forget the initial
    weights. Running statistics of batch norms are averaged as the weights are.

    Args:
        average: by name.
        current: the weights after the step, by the same names.
        decay: the last one, in [0, 1).
        num_updates: n.
    """
    decay = min(decay, (1 + num_updates) / (10 + num_updates))
    floating = [name for name, tensor in current.items() if tensor.is_floating_point()]
    torch._foreach_lerp_([average[name] for name in floating], [current[name] for name in floating], 1 - decay)
    counters = list(current.keys() - floating)  # numbers of batches
    if counters:
        torch._foreach_copy_([average[name] for name in counters], [current[name] for name in counters])


@torch.no_grad()
def exchange(average: dict[str, Tensor], current: dict[str, Tensor]) -> None:
    """Each gets the values of the other, in place; both by the same names."""
    for name, tensor in current.items():
        value = tensor.clone()
        tensor.copy_(average[name])
        average[name].copy_(value)


def trained_tensors(model: nn.Module) -> dict[str, Tensor]:
    """What training changes and a checkpoint publishes, each tensor once and under its first name: trainable
    parameters, and saved buffers."""
    tensors = model.state_dict(keep_vars=True)
    own = {name: first for name, first in _names_of(model).items() if not name.startswith(PREFIX)}
    return {
        name: tensors[name].detach()
        for name, first in own.items()
        if name == first and (tensors[name].requires_grad or not isinstance(tensors[name], nn.Parameter))
    }


def _names_of(model: nn.Module) -> dict[str, str]:
    """Every name of a state dict -> the first name of the same tensor: layers may share a head."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in model.state_dict(keep_vars=True).items()}

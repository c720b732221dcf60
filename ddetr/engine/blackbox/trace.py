"""Where a step stops being finite: the first module whose output, or whose gradient, is no number.

The step is computed once more, with hooks on every module. Nothing of the model changes but the running statistics of
its batch norms, which the caller keeps (`NormStatistics`), and no `.grad` is touched.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ddetr.engine.step import MicroBatch, step_losses
from ddetr.models.criterion import SetCriterion
from ddetr.wording import first_few


@dataclass(frozen=True)
class NotFinite:
    """The first place of a step, in the order of computation, that is not finite.

    `place`: "input" (images or boxes), "parameter", "forward" (a module's output), "loss" (a term of the loss),
    "backward" (the gradient behind a module) or "norm" (all gradients are finite, but not the norm of them all).
    """

    place: Literal["input", "parameter", "forward", "loss", "backward", "norm"]
    name: str  # "transformer.encoder.layers.0.linear1", "images", "loss_giou_0"
    kind: str  # class of the module, or "" where it is none
    micro_batch: int
    message: str  # one sentence for people
    inputs: list[dict[str, Any]] = field(default_factory=list)  # statistics of what went in
    outputs: list[dict[str, Any]] = field(default_factory=list)


class NormStatistics:
    """The running statistics of the batch norms that are training, as they are now: with them a step can be undone."""

    def __init__(self, model: nn.Module):
        norms = [
            norm
            for norm in model.modules()
            if isinstance(norm, _BatchNorm) and norm.training and norm.running_mean is not None
        ]
        self._buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var)]
        self._counters = [norm.num_batches_tracked for norm in norms if norm.num_batches_tracked is not None]
        self._kept = [torch.empty_like(buffer) for buffer in self._buffers]
        self._counted = [torch.empty_like(counter) for counter in self._counters]
        _copy(self._kept, self._buffers)
        _copy(self._counted, self._counters)

    def restore(self) -> None:
        _copy(self._buffers, self._kept)
        _copy(self._counters, self._counted)


@torch.no_grad()
def _copy(destinations: list[Tensor], sources: list[Tensor]) -> None:
    """A kernel or two for all, where hundreds of copies would take a millisecond."""
    if destinations:
        torch._foreach_copy_(destinations, sources)


def find_non_finite(
    model: nn.Module,
    criterion: SetCriterion,
    batch: Sequence[MicroBatch],
    num_boxes: float,
    *,
    seed: int,
    loss_scale: float = 1.0,
) -> NotFinite | None:
    """Compute a step again and name the first place that is not finite; None where everything is.

    Runs under the caller's autocast and leaves PyTorch's generators as they were.

    Args:
        batch: the micro-batches of the step, on the model's device.
        seed: what the step's random numbers start from.
        loss_scale: factor on the loss before its gradient, a gradient scaler's.
    """
    broken = non_finite_parameters(model)
    if broken:
        message = f"the weights themselves are not finite: {first_few(broken, 3)}"
        return NotFinite("parameter", broken[0], "", 0, message)
    device = next(model.parameters()).device
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda), eager():
        torch.manual_seed(seed)
        largest: tuple[float, str] = (0.0, "")
        for index, micro_batch in enumerate(batch):
            if found := _bad_input(index, micro_batch):
                return found
            with torch.enable_grad(), _Tracer(model, index) as tracer:
                try:
                    losses = step_losses(model, criterion, micro_batch, num_boxes)
                except _Found as stop:
                    return stop.finding
                for name in criterion.weight_dict:
                    value = float(losses[name].detach()) if name in losses else 0.0
                    if not math.isfinite(value):
                        message = f"{name} is {value}, though every output of the model is finite"
                        return NotFinite("loss", name, "", index, message)
                total = criterion.total(losses)
                if not math.isfinite(value := float(total.detach())):
                    message = f"the weighted sum of the losses is {value}, though each of them is finite"
                    return NotFinite("loss", "loss", "", index, message)
                found, norm = tracer.backward(total * loss_scale)
                if found is not None:
                    return found
                largest = max(largest, norm)
        if largest[0] ** 2 * sum(p.numel() for p in model.parameters()) > torch.finfo(torch.float32).max:
            message = (
                f"every gradient is finite, but they are so large (up to {largest[0]:.3g}, in {largest[1]}) "
                "that the norm "
                "of them all is not"
            )
            return NotFinite("norm", largest[1], "", 0, message)
    return None


def non_finite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that hold NaN or infinity; one copy to the host for all."""
    named = list(model.named_parameters())
    if not named:
        return []
    finite = torch.stack([torch.isfinite(parameter.detach()).all() for _, parameter in named]).tolist()
    return [name for (name, _), is_finite in zip(named, finite) if not is_finite]


def statistics(tensor: Tensor) -> dict[str, Any]:
    """Shape, type, range and counts of what is no number, as plain types."""
    values = tensor.detach()
    finite = values[torch.isfinite(values)].double() if values.is_floating_point() else values.double().flatten()
    some = finite.numel() > 0
    return {
        "shape": list(values.shape),
        "dtype": str(values.dtype).removeprefix("torch."),
        "min": float(finite.min()) if some else None,
        "max": float(finite.max()) if some else None,
        "mean": float(finite.mean()) if some else None,
        "num_nan": int(torch.isnan(values).sum()),
        "num_inf": int(torch.isinf(values).sum()),
    }


def _bad_input(index: int, micro_batch: MicroBatch) -> NotFinite | None:
    images, _, targets = micro_batch
    if images.is_floating_point() and not bool(torch.isfinite(images).all()):
        rows = [i for i, image in enumerate(images) if not bool(torch.isfinite(image).all())]
        message = f"pixels of image {', '.join(map(str, rows))} of micro-batch {index} are not finite"
        return NotFinite("input", "images", "", index, message, [statistics(images)])
    for row, target in enumerate(targets):
        if not bool(torch.isfinite(target["boxes"]).all()):
            message = f"a box of image {row} of micro-batch {index} is not finite"
            return NotFinite("input", "boxes", "", index, message, [statistics(target["boxes"])])
    return None


class _Found(Exception):
    def __init__(self, finding: NotFinite):
        super().__init__(finding.message)
        self.finding = finding


@dataclass(eq=False)
class _Watched:
    """A tensor of the forward pass: which module made it, which take it in. Innermost modules come first."""

    tensor: Tensor  # kept alive, since identities of freed tensors are given out again
    producer: str = ""
    consumers: list[str] = field(default_factory=list)
    is_finite: bool | None = None  # its gradient; None: not seen yet


class _Tracer:
    """Hooks on every module while it is entered: stops at the first output that is not finite, watches gradients."""

    def __init__(self, model: nn.Module, micro_batch: int):
        self.model, self.micro_batch = model, micro_batch
        self.modules = {name: module for name, module in model.named_modules() if name}
        # In-place operations make another value of the same tensor: the version tells them apart.
        self.watched: dict[tuple[int, int], _Watched] = {}
        self.outputs: dict[str, list[_Watched]] = {}
        self.first: _Watched | None = None
        self.hooks: list[Any] = []

    def __enter__(self) -> "_Tracer":
        for name, module in self.modules.items():
            self.hooks.append(module.register_forward_pre_hook(self._before(name), with_kwargs=True))
            self.hooks.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self.hooks:
            hook.remove()
        self.watched.clear()
        self.outputs.clear()

    def backward(self, total: Tensor) -> tuple[NotFinite | None, tuple[float, str]]:
        """The first place whose gradient is not finite, else None; and the largest gradient with its parameter."""
        named = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        # Not .backward(): it would write .grad, and wake the gradient exchange between processes.
        gradients = torch.autograd.grad(total, [p for _, p in named], allow_unused=True)
        if self.first is not None:
            return self._explained(self.first), (0.0, "")
        largest = (0.0, "")
        for (name, _), gradient in reversed(list(zip(named, gradients))):
            if gradient is None:
                continue
            if not bool(torch.isfinite(gradient).all()):
                module = name.rpartition(".")[0]
                message = f"the gradient of {name} is not finite, though the one that comes into {module} is"
                return self._finding("backward", module, message, outputs=[statistics(gradient)]), largest
            largest = max(largest, (float(gradient.abs().max()), name))
        return None, largest

    def _before(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            for tensor in _tensors((args, kwargs)):
                if tensor.requires_grad and not tensor.is_leaf:
                    self._watch(tensor).consumers.insert(0, name)  # children are entered after their parents

        return hook

    def _after(self, name: str):
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
            tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point()]
            if not all(bool(torch.isfinite(tensor).all()) for tensor in tensors):
                inputs = [statistics(tensor) for tensor in _tensors((args, kwargs))]
                outputs = [statistics(tensor) for tensor in tensors]
                clean = not any(one["num_nan"] or one["num_inf"] for one in inputs)
                counts = f"{sum(o['num_nan'] for o in outputs)} NaN, {sum(o['num_inf'] for o in outputs)} infinite"
                message = (
                    f"the output of {name} ({type(module).__name__}) is the first that is not finite "
                    f"({counts}); what went "
                    f"in was {'finite' if clean else 'not finite either: made between modules'}"
                )
                raise _Found(self._finding("forward", name, message, inputs, outputs))
            self.outputs[name] = [self._watch(t, name) for t in tensors if t.requires_grad and not t.is_leaf]

        return hook

    def _watch(self, tensor: Tensor, producer: str = "") -> _Watched:
        key = (id(tensor), tensor._version)
        if key not in self.watched:
            watched = self.watched[key] = _Watched(tensor, producer)

            def hook(gradient: Tensor) -> None:
                watched.is_finite = bool(torch.isfinite(gradient).all())
                if not watched.is_finite and self.first is None:
                    self.first = watched

            tensor.register_hook(hook)
        return self.watched[key]

    def _explained(self, first: _Watched) -> NotFinite:
        """Of the modules that take the tensor in, the innermost whose own output has a finite gradient broke it."""
        for name in first.consumers:
            if self._gets_finite(name, first):
                message = f"the backward pass of {name} is the first that is not finite: what came into it was"
                return self._finding("backward", name, message, [statistics(first.tensor)])
        # No module takes it in: a function does, in the forward of the innermost module around.
        parts = first.producer.split(".")
        around = [".".join(parts[:end]) for end in range(len(parts) - 1, 0, -1)]
        name = next((name for name in around if self._gets_finite(name, first)), "")
        made = f"the output of {first.producer}" if first.producer else "a tensor between modules"
        place = f"a function in {name}" if name else "the loss"
        message = f"the gradient of {made} is the first that is not finite: it comes from {place}"
        return self._finding("backward", name or first.producer, message, [statistics(first.tensor)])

    def _gets_finite(self, name: str, first: _Watched) -> bool:
        outputs = self.outputs.get(name, [])
        return bool(outputs) and first not in outputs and all(one.is_finite for one in outputs)

    def _finding(
        self, place: Literal["forward", "backward"], name: str, message: str, inputs: Any = (), outputs: Any = ()
    ) -> NotFinite:
        kind = type(self.modules[name]).__name__ if name in self.modules else ""
        return NotFinite(place, name, kind, self.micro_batch, message, list(inputs), list(outputs))


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from _tensors(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _tensors(one)


@contextmanager
def eager() -> Iterator[None]:
    """Compiled models run no hooks: inside the block they run as they were written."""
    with torch.compiler.set_stance("force_eager"):
        yield

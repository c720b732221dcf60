"""The implementations that are timed against each other: ours, and everybody else's that can be imported here.

Each starts from what a model has: raw offsets, logits and reference points. Ours takes them as they are; the others get
softmax and locations computed outside, as the official module and transformers do it. Kernels without a rule for
bfloat16 run in float32, converted on the way in and out, which is what autocast does with them.
"""

import functools
import inspect
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from ddetr.ops import embedding_bag, ms_deform_attn, ms_deform_attn_step
from ddetr.ops.reference import ms_deform_attn_reference

_IM2COL_STEP = 64  # images at a time; the official default

Step = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # value, offsets, logits, references -> output
Core = Callable[[Tensor, Tensor, Tensor], Tensor]  # value, locations, weights -> output


class Setting(NamedTuple):
    """What an implementation is prepared for."""

    shapes: list[tuple[int, int]]
    device: torch.device
    dtype: torch.dtype


class UnavailableError(Exception):
    """An implementation that is not for this setting; the message says why."""


def prepare(setting: Setting, names: Iterable[str] | None = None) -> tuple[dict[str, Step], dict[str, str]]:
    """Implementations by name, by default all, and the reason of each that is not there."""
    steps, reasons = {}, {}
    for name in SIDES if names is None else names:
        try:
            steps[name] = SIDES[name](setting)
        except Exception as error:  # others' packages fail to load in every way there is
            reasons[name] = reason_of(error)
    return steps, reasons


def reason_of(error: Exception) -> str:
    """An exception in a line."""
    if isinstance(error, UnavailableError):
        return str(error)
    if isinstance(error, ModuleNotFoundError) and error.name:
        return f"{error.name} is not installed"
    lines = str(error).strip().splitlines() or ["no message"]
    return f"{type(error).__name__}: {lines[0]}"


def _ours(setting: Setting) -> Step:
    return lambda value, *rest: ms_deform_attn_step(value, setting.shapes, *rest)


def _ours_plain(setting: Setting) -> Step:
    return _plain(setting, lambda value, *rest: ms_deform_attn(value, setting.shapes, *rest))


def _embedding_bag(setting: Setting) -> Step:
    flat = [length for hw in setting.shapes for length in hw]
    return lambda *inputs: _EmbeddingBag.apply(flat, *inputs)


def _grid_sample(setting: Setting) -> Step:
    return _plain(setting, lambda value, *rest: ms_deform_attn_reference(value, setting.shapes, *rest))


def _transformers(setting: Setting) -> Step:
    from transformers.models.deformable_detr.modeling_deformable_detr import MultiScaleDeformableAttention

    module = MultiScaleDeformableAttention()
    shapes, starts = _tensors(setting)

    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return module(value, shapes, setting.shapes, starts, locations, weights, _IM2COL_STEP)

    return _plain(setting, _in_float32(core))


def _official(setting: Setting) -> Step:
    _check_cuda(setting)
    import MultiScaleDeformableAttention

    return _plain(setting, _in_float32(_extension(MultiScaleDeformableAttention, setting)))


def _hub(setting: Setting) -> Step:
    _check_cuda(setting)
    return _plain(setting, _in_float32(_extension(_hub_kernel(), setting)))


def _hub_bfloat16(setting: Setting) -> Step:
    """Its own bfloat16, where locations are bfloat16 too."""
    _check_cuda(setting)
    if setting.dtype != torch.bfloat16:
        raise UnavailableError("for bfloat16 alone")
    core = _extension(_hub_kernel(), setting)
    return _plain(setting, lambda value, *rest: core(value, *(tensor.to(value.dtype) for tensor in rest)))


def _msda_triton(setting: Setting) -> Step:
    _check_cuda(setting)
    import msda_triton

    # The package's public function hides a failure of its kernel and falls back to grid_sample.
    function = sys.modules[
        msda_triton.multiscale_deformable_attention.__module__
    ].triton_multiscale_deformable_attention
    shapes, _ = _tensors(setting)
    options: dict[str, Any] = {"padding_mode": "zeros", "align_corners": False}
    options = {name: value for name, value in options.items() if name in inspect.signature(function).parameters}

    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function(value, shapes, locations, weights, **options).flatten(2)

    return _plain(setting, _in_float32(core))


def _torch_ms_deform_attn(setting: Setting) -> Step:
    _check_cuda(setting)
    from torch_ms_deform_attn import ms_deform_attn as function

    return _with_the_official_arguments(setting, function)


def _mmcv(setting: Setting) -> Step:
    _check_cuda(setting)
    from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction

    return _with_the_official_arguments(setting, MultiScaleDeformableAttnFunction.apply)


def _with_the_official_arguments(setting: Setting, function: Callable[..., Tensor]) -> Step:
    shapes, starts = _tensors(setting)

    def core(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return function(value, shapes, starts, locations, weights, _IM2COL_STEP)

    return _plain(setting, _in_float32(core))


BASE = "grid_sample"
SIDES: dict[str, Callable[[Setting], Step]] = {
    "ours": _ours,
    "ours, plain": _ours_plain,
    "embedding_bag": _embedding_bag,
    BASE: _grid_sample,
    "transformers": _transformers,
    "official kernel": _official,
    "hub kernel": _hub,
    "hub kernel, bfloat16": _hub_bfloat16,
    "msda-triton": _msda_triton,
    "torch-ms-deform-attn": _torch_ms_deform_attn,
    "mmcv": _mmcv,
}
DESCRIPTIONS = {
    "ours": "ms_deform_attn_step: softmax and locations inside",
    "ours, plain": "ms_deform_attn: softmax and locations outside",
    "embedding_bag": "our fallback in stock PyTorch, for machines without a kernel",
    BASE: "this project's reference: level by level, in float32; softmax and locations outside",
    "transformers": "its module as installed, without kernels from the hub",
    "official kernel": "the CUDA extension of Deformable-DETR",
    "hub kernel": "kernels-community/deformable-detr through the package kernels",
    "hub kernel, bfloat16": "the same with bfloat16 values, locations and weights",
    "msda-triton": "rziga/msda-triton",
    "torch-ms-deform-attn": "S-aiueo32/torch-ms-deform-attn",
    "mmcv": "mmcv.ops.multi_scale_deform_attn",
}


def _plain(setting: Setting, core: Core) -> Step:
    """Softmax and locations as the official module and transformers write them, then `core`."""
    normalizer = torch.tensor([(w, h) for h, w in setting.shapes], dtype=torch.float32, device=setting.device)

    def step(value: Tensor, offsets: Tensor, logits: Tensor, references: Tensor) -> Tensor:
        weights = F.softmax(logits.flatten(3), -1, dtype=torch.float32).view(logits.shape)
        locations = references[:, :, None, :, None, :] + offsets / normalizer[None, None, None, :, None, :]
        return core(value, locations, weights)

    return step


def _in_float32(core: Core) -> Core:
    return lambda value, *rest: core(value.float(), *rest).to(value.dtype)


def _check_cuda(setting: Setting) -> None:
    if setting.device.type != "cuda":
        raise UnavailableError("runs on CUDA only")


def _tensors(setting: Setting) -> tuple[Tensor, Tensor]:
    """(L, 2) sizes and (L,) first cells of the levels on the device, as others take them."""
    shapes = torch.tensor(setting.shapes, dtype=torch.int64, device=setting.device)
    cells = shapes.prod(1).cumsum(0)
    return shapes, torch.cat([cells.new_zeros(1), cells[:-1]])


def _hub_kernel() -> ModuleType:
    found = _hub_kernel_or_reason()
    if isinstance(found, str):
        raise UnavailableError(found)
    return found


@functools.cache  # failures too: each try would wait for the network
def _hub_kernel_or_reason() -> ModuleType | str:
    try:
        from kernels import get_kernel

        versioned = "version" in inspect.signature(get_kernel).parameters
        return get_kernel("kernels-community/deformable-detr", **({"version": 1} if versioned else {}))
    except Exception as error:  # no network, no build for this PyTorch, ...
        return reason_of(error)


def _extension(module: Any, setting: Setting) -> Core:
    shapes, starts = _tensors(setting)
    return lambda value, locations, weights: _Extension.apply(module, value, shapes, starts, locations, weights)


class _Extension(torch.autograd.Function):
    """The two functions of the official extension, which the hub's kernel has too."""

    @staticmethod
    def forward(ctx: Any, module: Any, *tensors: Tensor) -> Tensor:
        ctx.module = module
        ctx.save_for_backward(*tensors)
        return module.ms_deform_attn_forward(*tensors, _IM2COL_STEP)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grads = ctx.module.ms_deform_attn_backward(*ctx.saved_tensors, grad.contiguous(), _IM2COL_STEP)
        grad_value, grad_locations, grad_weights = grads
        return None, grad_value, None, None, grad_locations, grad_weights


class _EmbeddingBag(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, flat: list[int], *inputs: Tensor) -> Tensor:
        ctx.flat = flat
        ctx.save_for_backward(*inputs)
        return embedding_bag.forward(inputs[0], flat, *inputs[1:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        value, *rest = ctx.saved_tensors
        return None, *embedding_bag.backward(grad, value, ctx.flat, *rest, False)

"""Models for inference: the same outputs in less time, from a rewritten copy of a trained model."""

import copy
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from ddetr.errors import InputError
from ddetr.models.deformable_transformer import DeformableTransformerEncoderLayer
from ddetr.runtime.precision import numerics

__all__ = ["TOLERANCES", "Optimization", "OptimizedModel", "optimize_model"]

Optimization = Literal["float32", "bfloat16", "compile"]

# The most that an output may move, relative to the largest of its kind.
TOLERANCES: dict[str, float] = {"float32": 1e-4, "bfloat16": 5e-2, "compile": 5e-2}

log = logging.getLogger(__name__)


class OptimizedModel(nn.Module):
    """A rewritten model with the `forward` of the original, for inference only; made by `optimize_model`."""

    def __init__(self, model: nn.Module, optimization: Optimization):
        super().__init__()
        self.model = model
        self.optimization = optimization
        self._compiled: Callable[..., Any] | None = None

    def compile_model(self) -> None:
        """From now on through torch.compile, with the weights as constants, laid out and rounded once."""
        self._compiled = torch.compile(self.model)

    @torch.no_grad()
    def forward(self, images: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
        """As the original's."""
        if self.optimization == "float32":
            return self.model(images, mask)
        with torch.autocast(images.device.type, torch.bfloat16):
            if self._compiled is None:
                return self.model(images, mask)
            from torch._inductor import config  # slow to import

            with config.patch(freezing=True):  # as an option of torch.compile it comes after the weights became inputs
                return self._compiled(images, mask)


def optimize_model(model: nn.Module, optimization: Optimization = "float32") -> OptimizedModel:
    """A copy of a detector for inference, checked against the original on a random image.

    - "float32": batch norms are folded into the convolutions, which work channels-last; on a CPU linear layers are
      oneDNN's, with the activation inside, where those are faster than PyTorch's own. Only rounding changes.
    - "bfloat16": convolutions and linear layers in bfloat16; sampling locations, softmax, normalisations and boxes stay
      in float32.
    - "compile": that through torch.compile, which takes about a minute at the first image and again when the size of
      images changes. It needs a C++ compiler (CPU) or Triton (CUDA).

    Args:
        model: a `DeformableDETR`, on its device; it is not changed.
        optimization: see above.

    Raises:
        InputError: no such optimization.
        RuntimeError: an output moved by more than `TOLERANCES[optimization]` of the largest of its kind.
    """
    if optimization not in TOLERANCES:
        raise InputError(f"optimize: expected one of {', '.join(TOLERANCES)}, got {optimization!r}")
    device = next(model.parameters()).device
    images = torch.randn(1, 3, 128, 160, generator=torch.Generator().manual_seed(0), device="cpu").to(device)
    # The check is of our rewriting, not of TF32, in which PyTorch convolves by default.
    exact = numerics(deterministic=torch.are_deterministic_algorithms_enabled(), tf32=False)
    with exact, torch.inference_mode(False), torch.no_grad():
        fast = copy.deepcopy(model).eval().requires_grad_(False)
        expected = _compared(fast(images))
        fold_batch_norms(fast.backbone[0], images)
        fast.to(memory_format=torch.channels_last)
        if device.type == "cpu" and optimization == "float32" and _onednn_is_faster():
            use_onednn_linears(fast)
        if device.type == "cpu":
            use_chunks(fast, rows=4608 if optimization == "compile" else 1024)  # each chunk is compiled by itself
        optimized = OptimizedModel(fast, optimization).eval()
        for name, tensor in _compared(optimized(images)).items():
            moved = ((tensor - expected[name]).abs().max() / expected[name].abs().max()).item()
            if not moved <= TOLERANCES[optimization]:
                raise RuntimeError(
                    f"optimized for {optimization}, {name} moved by {moved:.1e} of its largest value, more than "
                    f"{TOLERANCES[optimization]:.0e}: use the model as it is"
                )
            log.info("optimized for %s: %s moved by %.1e of its largest value", optimization, name, moved)
    if optimization == "compile":
        optimized.compile_model()
    return optimized


def _compared(outputs: dict[str, Any]) -> dict[str, Tensor]:
    """The outputs to compare. Two-stage queries are a choice of cells, which rounding may order in another way: there
    the scores and boxes of all cells are compared instead.
    """
    found = outputs.get("enc_outputs", outputs)
    return {name: found[name].float() for name in ("pred_logits", "pred_boxes")}


def fold_batch_norms(module: nn.Module, images: Tensor) -> int:
    """Fold each batch norm (statistics fixed) into the convolution whose output it takes; returns how many.

    Which takes which is seen in a run on `images`, so that it works for any network; layers that run more than once are
    left as they are.
    """
    made: dict[int, nn.Conv2d] = {}  # by the identity of the output
    kept: list[Tensor] = []  # alive, so that no identity is used twice
    pairs: list[tuple[nn.Conv2d, nn.Module]] = []

    def after_convolution(convolution: nn.Conv2d, _: Any, output: Tensor) -> None:
        made[id(output)] = convolution
        kept.append(output)

    def before_norm(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in made:
            pairs.append((made[id(inputs[0])], norm))

    hooks = []
    for child in module.modules():
        if type(child) is nn.Conv2d:
            hooks.append(child.register_forward_hook(after_convolution))
        elif isinstance(getattr(child, "running_var", None), Tensor):
            hooks.append(child.register_forward_pre_hook(before_norm))
    module(images)
    for hook in hooks:
        hook.remove()
    names = {child: name for name, child in module.named_modules()}
    runs = [id(layer) for pair in pairs for layer in pair] + [id(convolution) for convolution in made.values()]
    folded = 0
    for convolution, norm in pairs:
        if runs.count(id(convolution)) != 2 or runs.count(id(norm)) != 1:
            continue
        convolution.weight, convolution.bias = fuse_conv_bn_weights(
            convolution.weight, convolution.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        activation = getattr(norm, "act", None)  # timm has norms with an activation inside
        module.set_submodule(names[norm], nn.Identity() if activation is None else activation)
        folded += 1
    return folded


class OneDNNLinear(nn.Module):
    """A linear layer by oneDNN, for float32 on a CPU: there twice as fast as MKL's on AMD processors."""

    def __init__(self, linear: nn.Linear, activation: Literal["none", "relu"] = "none"):
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], "")


def use_onednn_linears(module: nn.Module) -> None:
    """Replace linear layers, and take in the activation where a layer's is called `activation` after its `linear1`."""
    for parent in list(module.modules()):
        if isinstance(parent, nn.MultiheadAttention):  # reads the weights of its linear layer, never calls it
            continue
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear:
                continue
            fused = name == "linear1" and isinstance(getattr(parent, "activation", None), nn.ReLU)
            setattr(parent, name, OneDNNLinear(child, "relu" if fused else "none"))
            if fused:
                parent.activation = nn.Identity()


class ChunkedFeedForward(nn.Module):
    """Linear, activation, linear over some rows at a time: the wide rows between them never leave the cache.

    At 800x1066 they are 73 MB per layer, which cost more to allocate than to compute.
    """

    def __init__(self, linear1: nn.Module, activation: nn.Module, linear2: nn.Module, rows: int):
        super().__init__()
        self.linear1, self.activation, self.linear2 = linear1, activation, linear2
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        """(N, S, C) -> (N, S, C)."""
        parts = [self.linear2(self.activation(self.linear1(part))) for part in x.split(self.rows, 1)]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def use_chunks(module: nn.Module, rows: int) -> None:
    """Replace the feed-forward network of the encoder's layers, which have as many rows as cells."""
    for layer in module.modules():
        if isinstance(layer, DeformableTransformerEncoderLayer):
            layer.linear2 = ChunkedFeedForward(layer.linear1, layer.activation, layer.linear2, rows)
            layer.linear1 = layer.activation = nn.Identity()


@functools.cache
def _onednn_is_faster() -> bool:
    """Measured here, at the size of an encoder layer: on some processors MKL is as good. Without oneDNN: no."""
    if not (torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    linear = nn.Linear(256, 256)
    sides = {"PyTorch": linear, "oneDNN": OneDNNLinear(linear)}
    x, best = torch.randn(1, 4096, 256), {}
    for _ in range(5):
        for name, side in sides.items():
            start = time.perf_counter()
            side(x)
            best[name] = min(best.get(name, math.inf), time.perf_counter() - start)
    log.info("linear layers: %s", ", ".join(f"{name} {1000 * seconds:.2f} ms" for name, seconds in best.items()))
    return best["oneDNN"] < 0.9 * best["PyTorch"]

"""Our operator in models of Hugging Face transformers, and out again: per instance, nothing imported from there.

Three forms of multi-scale deformable attention are known by their attributes and by the names of their arguments:

- attention modules with linear layers of their own (Deformable DETR and what copied it): the whole step is swapped,
  after a comparison with the module's own forward on small random numbers;
- `MultiScaleDeformableAttention`, the sampling inside of those, where the whole step can't be swapped;
- the sampling function of D-FINE and DEIMv2, an attribute of its module, with a number of points for each level.

Shapes: N batch, S = sum_l H_l*W_l, M heads, D head size, C = M*D, Q queries, L levels, P points.
"""

import copy
import inspect
import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.ops.arguments import SpatialShapes
from ddetr.ops.ms_deform_attn import ms_deform_attn, ms_deform_attn_step

_STEP_LAYERS = ("sampling_offsets", "attention_weights", "value_proj", "output_proj")
_STEP_SIZES = ("n_heads", "n_levels", "n_points")
_STEP_ARGUMENTS = {
    "hidden_states",
    "attention_mask",
    "encoder_hidden_states",
    "position_embeddings",
    "reference_points",
}
_SAMPLING_ARGUMENTS = {"value", "value_spatial_shapes_list", "sampling_locations", "attention_weights"}
_POINT_LIST_FUNCTION = "multi_scale_deformable_attention_v2"
_ABSENT = object()
_log = logging.getLogger(__name__)


class Acceleration:
    """What `accelerate` swapped, and the way back; as a context manager it goes back at the end of the block.

    Attributes:
        swapped: name of the module -> "step" (from the outputs of the linear layers on) or "sampling".
        skipped: name of a module that attends this way but was left as it is -> why.
    """

    def __init__(self) -> None:
        self.swapped: dict[str, str] = {}
        self.skipped: dict[str, str] = {}
        self._changes: list[tuple[nn.Module, str, Any, Any]] = []  # module, attribute, what stood there, what stands

    def __len__(self) -> int:
        return len(self.swapped)

    def __repr__(self) -> str:
        lines = [f"{len(self)} modules swapped"]
        lines += [f"  {name}: {what}" for name, what in self.swapped.items()]
        lines += [f"  {name}: left as it is, {why}" for name, why in self.skipped.items()]
        return "\n".join(lines)

    def __enter__(self) -> "Acceleration":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Put back what was there, exactly; what somebody else has replaced since stays. Twice is harmless."""
        for module, attribute, before, now in self._changes:
            if module.__dict__.get(attribute) is not now:
                continue
            if before is _ABSENT:
                delattr(module, attribute)
            else:
                setattr(module, attribute, before)
        self._changes.clear()
        self.swapped.clear()

    def _swap(self, name: str, what: str, module: nn.Module, attribute: str, replacement: Any) -> None:
        self._changes.append((module, attribute, module.__dict__.get(attribute, _ABSENT), replacement))
        setattr(module, attribute, replacement)
        self.swapped[name] = what


def accelerate(model: nn.Module) -> Acceleration:
    """Swap `ddetr.ops` into a model of Hugging Face transformers that attends by multi-scale deformable attention.

    Deformable DETR, RT-DETR (v1, v2), D-FINE, DEIMv2, LW-DETR, RF-DETR, Grounding DINO, MM Grounding DINO, OmDet-Turbo,
    Mask2Former, OneFormer, PP-DocLayout (v2 to v4). Outputs, gradients and returned attention weights stay the same up
    to rounding; below float32 locations are computed in float32, which is more exact. Weights, `state_dict` and other
    models of the process are untouched; copies and pickles of the model keep the swap (loading one needs ddetr). Not
    for `nn.DataParallel`, whose replicas would run on the weights of the first device.

    Modules that were swapped before stay so, and belong to the earlier handle. Modules whose `forward` somebody else
    has replaced (kernels from the hub, offloading) are left as they are.

    Args:
        model: the model or any part of it, with its weights loaded, in training or evaluation.

    Returns:
        The handle: what was swapped, and `undo()`. In a `with` statement that happens at the end of the block.

    Raises:
        ValueError: nothing in `model` could be swapped.

    Example:
        >>> model = AutoModelForObjectDetection.from_pretrained("SenseTime/deformable-detr")
        >>> handle = accelerate(model)
        >>> len(handle)
        12
        >>> handle.undo()
    """
    handle = Acceleration()
    found_ours = False
    inside: set[nn.Module] = set()  # modules within one whose whole step is ours, which calls them no more
    for name, module in model.named_modules():
        if module in inside:
            continue
        ours = _is_ours(module)
        found_ours |= ours
        if not ours and _is_point_list(module):
            if module.decoder_method == "default":
                handle._swap(name, "sampling", module, "ms_deformable_attn_core", _sample_point_list)
            else:
                handle.skipped[name] = f"its method is {module.decoder_method!r}, which does not interpolate"
        elif not ours and _is_sampling(module):
            handle._swap(name, "sampling", module, "forward", _sample)
        elif not ours and _is_step(module):
            step = _step_like(module)
            if isinstance(step, _Step):
                handle._swap(name, "step", module, "forward", step)
                ours = True
            elif not any(_is_sampling(child) or _is_ours(child) for child in module.children()):
                handle.skipped[name] = step
        if ours:
            inside.update(module.modules())
    for name, why in handle.skipped.items():
        _log.info("accelerate: %s left as it is, %s", name, why)
    if not handle.swapped and not found_ours:
        reasons = "".join(f"; {name!r} was left as it is: {why}" for name, why in handle.skipped.items())
        raise ValueError(
            f"nothing to accelerate in {type(model).__name__}: expected a module of Hugging Face transformers for "
            "multi-scale deformable attention (MultiScaleDeformableAttention or ...MultiscaleDeformableAttention, as "
            f"in Deformable DETR, RT-DETR, Grounding DINO, Mask2Former){reasons}. Models of ddetr use the operator "
            "anyway; in a module of your own call ddetr.ops.ms_deform_attn"
        )
    return handle


def _is_ours(module: nn.Module) -> bool:
    forward = module.__dict__.get("forward")
    point_list = module.__dict__.get("ms_deformable_attn_core")
    return isinstance(forward, _Step) or forward is _sample or point_list is _sample_point_list


def _is_point_list(module: nn.Module) -> bool:
    function = module.__dict__.get("ms_deformable_attn_core")
    return getattr(function, "__name__", None) == _POINT_LIST_FUNCTION and hasattr(module, "decoder_method")


def _is_sampling(module: nn.Module) -> bool:
    return _own_arguments(module) >= _SAMPLING_ARGUMENTS


def _is_step(module: nn.Module) -> bool:
    return (
        all(isinstance(getattr(module, name, None), nn.Module) for name in _STEP_LAYERS)
        and all(isinstance(getattr(module, name, None), int) for name in _STEP_SIZES)
        and _own_arguments(module) >= _STEP_ARGUMENTS
    )


def _own_arguments(module: nn.Module) -> set[str]:
    """The names of the arguments of `forward`; none where somebody has replaced it on the instance."""
    own = type(module).forward
    if getattr(module.forward, "__func__", None) is not own:
        return set()
    return set(inspect.signature(own).parameters)


def _shapes(as_list: SpatialShapes | None, as_tensor: Tensor | None) -> SpatialShapes:
    """The list where there is one: reading a tensor waits for the device."""
    return as_tensor.tolist() if as_list is None else as_list


def _sample(
    value: Tensor,
    value_spatial_shapes: Tensor | None,
    value_spatial_shapes_list: SpatialShapes | None,
    level_start_index: Tensor | None,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int | None = None,
) -> Tensor:
    """In the place of `MultiScaleDeformableAttention.forward`."""
    shapes = _shapes(value_spatial_shapes_list, value_spatial_shapes)
    return ms_deform_attn(value, shapes, sampling_locations, attention_weights)


def _sample_point_list(
    value: Tensor,
    value_spatial_shapes: SpatialShapes | Tensor,
    sampling_locations: Tensor,  # (N, Q, M, sum_l P_l, 2)
    attention_weights: Tensor,  # (N, Q, M, sum_l P_l)
    num_points_list: list[int],
    method: str = "default",
) -> Tensor:
    """In the place of D-FINE's sampling function: levels with fewer points are filled up with points of weight 0."""
    shapes = value_spatial_shapes.tolist() if isinstance(value_spatial_shapes, Tensor) else value_spatial_shapes
    num_points = max(num_points_list)
    locations = [
        F.pad(part, (0, 0, 0, num_points - part.shape[3])) for part in sampling_locations.split(num_points_list, dim=3)
    ]
    weights = [F.pad(part, (0, num_points - part.shape[3])) for part in attention_weights.split(num_points_list, dim=3)]
    return ms_deform_attn(value, shapes, torch.stack(locations, dim=3), torch.stack(weights, dim=3))


class _Step:
    """In the place of the `forward` of an attention module, whose layers it uses; an object, since closures don't
    pickle."""

    def __init__(self, module: nn.Module, mask_is_padding: bool):
        self.module = module
        self.mask_is_padding = mask_is_padding  # Mask2Former and OneFormer; the others mark what is valid

    def __call__(
        self,
        hidden_states: Tensor,  # (N, Q, C)
        attention_mask: Tensor | None = None,  # (N, S) bool
        encoder_hidden_states: Tensor | None = None,  # (N, S, C)
        encoder_attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,  # (N, Q, C)
        reference_points: Tensor | None = None,  # (N, Q, L or 1, 2 or 4)
        *,
        spatial_shapes: Tensor | None = None,
        spatial_shapes_list: SpatialShapes | None = None,
        **_: Any,
    ) -> tuple[Tensor, Tensor]:
        module = self.module
        if position_embeddings is not None:
            hidden_states = hidden_states + position_embeddings
        value = module.value_proj(encoder_hidden_states)
        if attention_mask is not None:
            padding = attention_mask if self.mask_is_padding else ~attention_mask
            value = value.masked_fill(padding[..., None], 0.0)
        value = value.unflatten(-1, (module.n_heads, -1))
        sizes = (module.n_heads, module.n_levels, module.n_points)
        offsets = module.sampling_offsets(hidden_states).unflatten(-1, (*sizes, 2))
        logits = module.attention_weights(hidden_states).unflatten(-1, sizes)
        reference_points = reference_points.expand(value.shape[0], -1, module.n_levels, -1)
        output = ms_deform_attn_step(
            value, _shapes(spatial_shapes_list, spatial_shapes), offsets, logits, reference_points
        )
        weights = F.softmax(logits.flatten(-2), -1)  # for the caller alone: the operator has its own
        if not _has_flat_points(module):
            weights = weights.view(logits.shape)
        return module.output_proj(output), weights


def _has_flat_points(module: nn.Module) -> bool:
    """RT-DETRv2: the points of all levels in one dimension, and one box for all levels as a reference."""
    return hasattr(module, "n_points_scale")


@torch.no_grad()
def _step_like(module: nn.Module) -> _Step | str:
    """The step that computes what the module's own forward does, or why there is none.

    The form leaves open which mask marks padding, how offsets are scaled ("discrete" RT-DETRv2 does not even
    interpolate), and what later versions of transformers will do. A copy with random weights shows it, whatever those
    of the module are.
    """
    generator = torch.Generator().manual_seed(0)  # the program's own random state is not touched
    why = ""
    try:
        copied = copy.deepcopy(module).to("cpu", torch.float32)
        for parameter in copied.parameters():
            parameter.normal_(0, 0.2, generator=generator)
        for mask_is_padding in (False, True):
            step = _Step(copied, mask_is_padding)
            sizes = (4,) if _has_flat_points(module) else (2, 4)
            differences = [d for size in sizes for d in _compare(step, size, generator)]
            if all(difference < 1e-4 for difference in differences):
                return _Step(module, mask_is_padding)
            why = f"its output differs from our step by {max(differences):.0e} of the largest value"
    except Exception as error:  # whatever it is: the module works as it did
        return f"comparing it with our step raised {type(error).__name__}: {error}"
    return why


@torch.autocast("cpu", enabled=False)
def _compare(step: _Step, reference_size: int, generator: torch.Generator) -> list[float]:
    """The differences of outputs and weights over their largest values, on a small random input."""
    module = step.module

    def random(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, dtype=torch.float32, device="cpu")

    shapes = [(2 + level % 2, 3) for level in range(module.n_levels)]
    cells, channels = sum(h * w for h, w in shapes), module.value_proj.in_features
    inputs = {
        "hidden_states": random(2, 5, channels) - 0.5,
        "attention_mask": random(2, cells) < 0.7,
        "encoder_hidden_states": random(2, cells, channels) - 0.5,
        "position_embeddings": random(2, 5, channels) - 0.5,
        "reference_points": random(2, 5, 1 if _has_flat_points(module) else module.n_levels, reference_size),
        "spatial_shapes": torch.tensor(shapes, device="cpu"),
        "spatial_shapes_list": shapes,
        "level_start_index": torch.zeros(module.n_levels, dtype=torch.long, device="cpu"),  # only kernels read it
    }
    own = type(module).forward
    known = inspect.signature(own).parameters
    expected = own(module, **{name: value for name, value in inputs.items() if name in known})
    got = step(**inputs)
    return [((a - b).abs().max() / b.abs().max()).item() for a, b in zip(got, expected, strict=True)]

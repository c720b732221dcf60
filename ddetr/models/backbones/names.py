"""The names that other projects give to the tensors of a backbone, as rules that lead to timm's.

Read: OpenMMLab's mmpretrain and mmdetection, torchvision, EfficientNet-PyTorch; the self-supervised DINO, iBOT, MoCo (1
to 3), SimCLR and BYOL. The names of the authors' own repositories (Swin, ConvNeXt, DINOv2, DINOv3, EVA, CLIP, MAE and
others) are known to timm, whose filters come after these rules.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from ddetr.weight_files.state_dicts import Rules, renamed

# Before the names of the backbone, the first that fits; of MoCo's two networks that which is trained.
PREFIXES = (
    "",
    "backbone.",
    "backbone.0.body.",
    "model.backbone.0.body.",
    "backbone.body.",
    "model.",
    "model.backbone.",
    "encoder_q.",
    "base_encoder.",
    "encoder.",
    "online_encoder.",
    "online_encoder.net.",
    "net.",
    "body.",
)
# The keys of networks that are averages of the trained one: measured and published by their projects.
AVERAGES = ("teacher", "model_ema", "ema", "ema_model")


@dataclass(frozen=True)
class Naming:
    """How a project names a kind of network.

    Attributes:
        kind: for people.
        marks: patterns that all match a name of every such file.
        rules: to timm's names.
        adapt: the tensors under timm's names, in its shapes and orders.
    """

    kind: str
    marks: Sequence[str]
    rules: Rules
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] = dict

    def is_of(self, names: Iterable[str]) -> bool:
        names = list(names)
        return all(any(re.search(mark, name) for name in names) for mark in self.marks)

    def renamed(self, names: Iterable[str]) -> dict[str, str]:
        """Each name -> timm's."""
        return renamed(names, self.rules)


def _merged_as_timm(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Four cells become one: OpenMMLab numbers them (channel, row, column), Swin and timm (column, row, channel)."""
    new = dict(tensors)
    for name, tensor in tensors.items():
        if re.search(r"layers\.\d+\.downsample\.(?:reduction\.weight|norm\.(?:weight|bias))$", name):
            cells = tensor.unflatten(-1, (-1, 2, 2))
            new[name] = cells.transpose(-3, -1).flatten(-3)
    return new


def _flat_scales(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's layer scales are (C, 1, 1)."""
    return {name: tensor.flatten() if name.endswith(".gamma") else tensor for name, tensor in tensors.items()}


_OPENMMLAB_FFN: Rules = (
    (r"\.ffn\.layers\.0\.0\.", ".mlp.fc1."),
    (r"\.ffn\.layers\.1\.", ".mlp.fc2."),
    (r"^patch_embed\.projection\.", "patch_embed.proj."),
)
NAMINGS: tuple[Naming, ...] = (
    Naming("timm's, or of the authors", (), ()),
    Naming(
        "OpenMMLab's Swin",
        (r"^stages\.0\.blocks\.0\.attn\.w_msa\.qkv\.weight$",),
        (
            *_OPENMMLAB_FFN,
            (r"\.attn\.w_msa\.", ".attn."),
            # It joins cells at the end of a stage, timm at the start of the next.
            (r"^stages\.0\.downsample\.", "layers.1.downsample."),
            (r"^stages\.1\.downsample\.", "layers.2.downsample."),
            (r"^stages\.2\.downsample\.", "layers.3.downsample."),
            (r"^stages\.", "layers."),
        ),
        _merged_as_timm,
    ),
    Naming(
        "OpenMMLab's ConvNeXt",
        (r"^stages\.0\.0\.depthwise_conv\.weight$",),
        (
            (r"^downsample_layers\.0\.", "stem."),
            (r"^downsample_layers\.(\d)\.", r"stages.\1.downsample."),
            (r"^stages\.(\d)\.(\d+)\.", r"stages.\1.blocks.\2."),
            (r"\.depthwise_conv\.", ".conv_dw."),
            (r"\.pointwise_conv([12])\.", r".mlp.fc\1."),
        ),
    ),
    Naming(
        "OpenMMLab's vision transformer",
        (r"^layers\.0\.ln1\.weight$", r"^layers\.0\.attn\.qkv\.weight$"),
        (
            *_OPENMMLAB_FFN,
            (r"^layers\.(\d+)\.ln([12])\.", r"blocks.\1.norm\2."),
            (r"^layers\.(\d+)\.gamma([12])\.weight$", r"blocks.\1.ls\2.gamma"),
            (r"^layers\.", "blocks."),
            (r"^pre_norm\.", "norm_pre."),
            (r"^ln1\.", "norm."),
        ),
    ),
    Naming(
        "torchvision's ConvNeXt",
        (r"^features\.1\.0\.block\.0\.weight$", r"^features\.1\.0\.layer_scale$"),
        (
            (r"^features\.0\.", "stem."),
            (r"^features\.1\.", "stages.0.blocks."),
            (r"^features\.2\.", "stages.1.downsample."),
            (r"^features\.3\.", "stages.1.blocks."),
            (r"^features\.4\.", "stages.2.downsample."),
            (r"^features\.5\.", "stages.2.blocks."),
            (r"^features\.6\.", "stages.3.downsample."),
            (r"^features\.7\.", "stages.3.blocks."),
            (r"\.block\.0\.", ".conv_dw."),
            (r"\.block\.2\.", ".norm."),
            (r"\.block\.3\.", ".mlp.fc1."),
            (r"\.block\.5\.", ".mlp.fc2."),
            (r"\.layer_scale$", ".gamma"),
        ),
        _flat_scales,
    ),
    Naming(
        "torchvision's Swin",
        (r"^features\.1\.0\.attn\.relative_position_bias_table$",),
        (
            (r"^features\.0\.0\.", "patch_embed.proj."),
            (r"^features\.0\.2\.", "patch_embed.norm."),
            (r"^features\.1\.", "layers.0.blocks."),
            (r"^features\.2\.", "layers.1.downsample."),
            (r"^features\.3\.", "layers.1.blocks."),
            (r"^features\.4\.", "layers.2.downsample."),
            (r"^features\.5\.", "layers.2.blocks."),
            (r"^features\.6\.", "layers.3.downsample."),
            (r"^features\.7\.", "layers.3.blocks."),
            (r"\.mlp\.0\.", ".mlp.fc1."),
            (r"\.mlp\.3\.", ".mlp.fc2."),
        ),
    ),
    Naming(
        "torchvision's vision transformer",
        (r"^encoder\.layers\.encoder_layer_0\.ln_1\.weight$",),
        (
            (r"^class_token$", "cls_token"),
            (r"^conv_proj\.", "patch_embed.proj."),
            (r"^encoder\.pos_embedding$", "pos_embed"),
            (r"^encoder\.layers\.encoder_layer_(\d+)\.", r"blocks.\1."),
            (r"^encoder\.ln\.", "norm."),
            (r"\.ln_([12])\.", r".norm\1."),
            (r"\.self_attention\.in_proj_", ".attn.qkv."),
            (r"\.self_attention\.out_proj\.", ".attn.proj."),
            (r"\.mlp\.(?:0|linear_1)\.", ".mlp.fc1."),
            (r"\.mlp\.(?:3|linear_2)\.", ".mlp.fc2."),
        ),
    ),
)


def efficientnet_pytorch(names: Iterable[str], timm_names: Iterable[str]) -> Naming | None:
    """The naming of EfficientNet-PyTorch for a file; None where it is of another kind. It counts its blocks through all
    stages, whose lengths are those of timm's network.

    Args:
        names: of the file.
        timm_names: of timm's network.
    """
    names = set(names)
    if "_conv_stem.weight" not in names:
        return None
    rules: list[tuple[str, str]] = [
        (r"^_conv_stem\.", "conv_stem."),
        (r"^_bn0\.", "bn1."),
        (r"^_conv_head\.", "conv_head."),
        (r"^_bn1\.", "bn2."),
    ]
    found = {match[0] for name in timm_names if (match := re.match(r"blocks\.(\d+)\.(\d+)\.", name))}
    for number, place in enumerate(sorted(found, key=lambda block: [int(part) for part in block.split(".")[1:3]])):
        is_expanded = f"_blocks.{number}._expand_conv.weight" in names
        parts = _EXPANDED if is_expanded else _SEPARABLE
        rules += [(rf"^_blocks\.{number}\.{theirs}\.", f"{place}{ours}.") for theirs, ours in parts.items()]
    return Naming("EfficientNet-PyTorch's", (), tuple(rules))


_SQUEEZE = {"_se_reduce": "se.conv_reduce", "_se_expand": "se.conv_expand"}
_SEPARABLE = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2", **_SQUEEZE}
_EXPANDED = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
    **_SQUEEZE,
}

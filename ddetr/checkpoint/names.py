"""The names of other projects, and what they are officially; where in a file the detector is.

Read: the official code, Hugging Face transformers (4.x and 5.x names), detrex, Mr.DETR (its own layers in detrex),
mmdetection 2 and 3.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ddetr.weight_files.pickled import StandIn, TensorView, mapping_of
from ddetr.weight_files.state_dicts import Rules, renamed, state_dicts, without_wrappers

_AVERAGED = re.compile(r"(?:^|[_.])(?:ema|swa|averaged?|avg)(?:[_.]|$)")

_TRANSFORMERS: Rules = (
    (r"^model\.backbone\.(?:conv_encoder\.)?model\.(?:_backbone\.)?", "backbone.0.body."),
    # Its own ResNet (use_timm_backbone=False) in torchvision's names.
    (r"\.body\.embedder\.embedder\.convolution\.", ".body.conv1."),
    (r"\.body\.embedder\.embedder\.normalization\.", ".body.bn1."),
    (r"\.body\.encoder\.stages\.0\.layers\.", ".body.layer1."),
    (r"\.body\.encoder\.stages\.1\.layers\.", ".body.layer2."),
    (r"\.body\.encoder\.stages\.2\.layers\.", ".body.layer3."),
    (r"\.body\.encoder\.stages\.3\.layers\.", ".body.layer4."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.convolution\.", r"\1.downsample.0."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.normalization\.", r"\1.downsample.1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.0\.convolution\.", r"\1.conv1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.1\.convolution\.", r"\1.conv2."),
    (r"(\.body\.layer\d\.\d+)\.layer\.2\.convolution\.", r"\1.conv3."),
    (r"(\.body\.layer\d\.\d+)\.layer\.0\.normalization\.", r"\1.bn1."),
    (r"(\.body\.layer\d\.\d+)\.layer\.1\.normalization\.", r"\1.bn2."),
    (r"(\.body\.layer\d\.\d+)\.layer\.2\.normalization\.", r"\1.bn3."),
    (r"^model\.(?:backbone\.)?position_embedding\.row_embeddings\.", "backbone.1.row_embed."),
    (r"^model\.(?:backbone\.)?position_embedding\.column_embeddings\.", "backbone.1.col_embed."),
    (r"^model\.query_position_embeddings\.", "query_embed."),
    (r"^model\.input_proj\.", "input_proj."),
    (r"^model\.", "transformer."),
    (r"(encoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.encoder_attn_layer_norm\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.self_attn_layer_norm\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.final_layer_norm\.", r"\1.norm3."),
    (r"(decoder\.layers\.\d+)\.encoder_attn\.", r"\1.cross_attn."),
    (r"(decoder\.layers\.\d+\.self_attn)\.o_proj\.", r"\1.out_proj."),
    (r"(coder\.layers\.\d+)\.(?:mlp\.)?fc([12])\.", r"\1.linear\2."),
)
_OPENMMLAB_LAYERS: Rules = (  # detrex took its layers over from mmcv
    (r"(coder\.layers\.\d+)\.ffns?(?:\.0)?\.layers\.0\.0\.", r"\1.linear1."),
    (r"(coder\.layers\.\d+)\.ffns?(?:\.0)?\.layers\.1\.", r"\1.linear2."),
    (r"(encoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(encoder\.layers\.\d+)\.norms\.1\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm2."),  # they number the norms in the order of the forward
    (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.norms\.2\.", r"\1.norm3."),
    (r"^neck\.convs\.(\d+)\.conv\.", r"input_proj.\1.0."),
    (r"^neck\.convs\.(\d+)\.(?:gn|norm)\.", r"input_proj.\1.1."),
    (r"^query_embedding\.", "query_embed."),
)
_NUMBERED_ATTENTIONS: Rules = (  # of mmcv's layers; mmdetection 3 has named ones
    (r"(encoder\.layers\.\d+)\.attentions\.0\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.0\.attn\.", r"\1.self_attn."),
    (r"(decoder\.layers\.\d+)\.attentions\.1\.", r"\1.cross_attn."),
    (r"^transformer\.level_embeds$", "transformer.level_embed"),
)
_DETREX: Rules = (
    (r"^backbone\.stem\.conv1\.norm\.", "backbone.0.body.bn1."),
    (r"^backbone\.stem\.", "backbone.0.body."),
    (r"^backbone\.res2\.", "backbone.0.body.layer1."),
    (r"^backbone\.res3\.", "backbone.0.body.layer2."),
    (r"^backbone\.res4\.", "backbone.0.body.layer3."),
    (r"^backbone\.res5\.", "backbone.0.body.layer4."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.norm\.", r"\1.downsample.1."),
    (r"(\.body\.layer\d\.\d+)\.shortcut\.", r"\1.downsample.0."),
    (r"(\.body\.layer\d\.\d+)\.conv([123])\.norm\.", r"\1.bn\2."),
    *_NUMBERED_ATTENTIONS,
    *_OPENMMLAB_LAYERS,
)
_MR_DETR: Rules = (  # its self-attention has the norm inside, and each linear layer a second one for a training route
    (r"(decoder\.layers\.\d+)\.attentions\.0\.norm_o2o\.", r"\1.norm2."),
    (r"(decoder\.layers\.\d+)\.norms\.0\.", r"\1.norm1."),
    (r"(decoder\.layers\.\d+)\.norms\.1\.", r"\1.norm3."),
    (r"(decoder\.layers\.\d+)\.ffns\.0\.layers\.0\.linear\.linear(_sep)?\.", r"\1.linear1\2."),
    (r"(decoder\.layers\.\d+)\.ffns\.0\.layers\.1\.linear(_sep)?\.", r"\1.linear2\2."),
    *_DETREX,
)
_OPENMMLAB_HEADS: Rules = (
    (r"^backbone\.", "backbone.0.body."),
    (r"^bbox_head\.cls_branches\.", "class_embed."),
    (r"^bbox_head\.reg_branches\.(\d+)\.0\.", r"bbox_embed.\1.layers.0."),  # 1 and 3 are ReLUs
    (r"^bbox_head\.reg_branches\.(\d+)\.2\.", r"bbox_embed.\1.layers.1."),
    (r"^bbox_head\.reg_branches\.(\d+)\.4\.", r"bbox_embed.\1.layers.2."),
)
_MMDETECTION: Rules = (
    (r"^(encoder|decoder|level_embed|pos_trans_norm)\b", r"transformer.\1"),
    (r"^reference_points_fc\.", "transformer.reference_points."),
    (r"^memory_trans_fc\.", "transformer.enc_output."),
    (r"^memory_trans_norm\.", "transformer.enc_output_norm."),
    (r"^pos_trans_fc\.", "transformer.pos_trans."),
    (r"(decoder\.layers\.\d+\.self_attn)\.attn\.", r"\1."),
    *_OPENMMLAB_HEADS,
    *_OPENMMLAB_LAYERS,
)
_MMDETECTION_2: Rules = (
    (r"^bbox_head\.(transformer|query_embedding)\.", r"\1."),
    *_NUMBERED_ATTENTIONS,
    *_OPENMMLAB_HEADS,
    *_OPENMMLAB_LAYERS,
)
_RULES: dict[str, Rules] = {
    "official": (),
    "transformers": _TRANSFORMERS,
    "detrex": _DETREX,
    "Mr.DETR": _MR_DETR,
    "mmdetection": _MMDETECTION,
    "mmdetection 2": _MMDETECTION_2,
}


@dataclass(frozen=True)
class Detector:
    """The state dict of a Deformable DETR in what a file holds."""

    kind: str  # a key of `_RULES`
    where: str  # for people: "ema.module"
    tensors: dict[str, TensorView | StandIn]  # by the names of its project
    in_file: dict[str, str]  # those names -> the names in the state dict
    others: tuple[str, ...]  # names of tensors beside the detector

    @property
    def repeats_box_heads(self) -> bool:
        """Whether its decoder holds the box heads a second time: those of refining models do."""
        return any(
            name.startswith(("transformer.decoder.bbox_embed.", "model.decoder.bbox_embed.")) for name in self.in_file
        )

    @property
    def is_averaged(self) -> bool:
        return bool(_AVERAGED.search(self.where))


def find_detector(content: Any) -> Detector | None:
    """The detector of a file, under whatever keys and prefixes it lies; None where there is none.

    Where there are several, averaged weights go before others, since those are what a project measures and publishes;
    then the first. OpenMMLab's hook has exchanged the two in what it saves: its average is called state_dict.
    """
    found = [detector for keys, values in state_dicts(content) for detector in _detectors(keys, values)]
    is_openmmlab = isinstance(content, dict) and ("message_hub" in content or "meta" in content)
    wanted = (detector for detector in found if detector.is_averaged != is_openmmlab)
    return next(wanted, found[0] if found else None)


def with_average(content: Any) -> Any:
    """The state of a run of ours that keeps an average of its weights: the average in the place of the weights.

    It holds trained tensors alone, each under the first of its names (`ddetr.engine.ema`).
    """
    parts = (
        [mapping_of(content.get(key)) for key in ("weight_average", "state_dict")] if isinstance(content, dict) else []
    )
    if not parts or not all(parts):
        return content
    averaged, state_dict = mapping_of(parts[0].get("tensors")) or {}, {}
    first: dict[Any, str] = {}
    for name, view in parts[1].items():
        if isinstance(view, TensorView):
            name_of_first = first.setdefault((view.storage, view.offset, view.shape), name)
            state_dict[name] = averaged.get(name_of_first.removeprefix("model."), view)
    return {"averaged": state_dict}


def official_names(kind: str, names: Iterable[str]) -> dict[str, str]:
    """Each name of a project -> the official one; an unknown name stays as it is."""
    names = list(names)
    convs = (re.match(r"neck\.convs\.(\d{1,3})\.", name) for name in names)
    num_convs = 1 + max((int(conv[1]) for conv in convs if conv), default=-1)
    counted_on = {}
    for name in names:
        extra = re.match(r"neck\.extra_convs\.(\d{1,3})\.", name)  # counted anew after the backbone's levels
        counted_on[name] = f"neck.convs.{num_convs + int(extra[1])}.{name[extra.end() :]}" if extra else name
    new = renamed(counted_on.values(), _RULES[kind])
    return {name: new[counted] for name, counted in counted_on.items()}


def _detectors(keys: tuple[str, ...], values: Mapping[Any, Any]) -> Iterator[Detector]:
    """Those in one dict: each is recognised by its level embedding, and what comes before that is its prefix."""
    in_file: dict[str, str] = {}  # without wrappers -> the name in the dict
    for name, value in values.items():
        if isinstance(name, str) and isinstance(value, (TensorView, StandIn)):
            in_file.setdefault(without_wrappers(name), name)
    for sign in [name for name in in_file if name.endswith(("level_embed", "level_embeds"))]:
        for kind, prefix, added in _kinds(sign, in_file):
            own = {added + name.removeprefix(prefix): name for name in in_file if name.startswith(prefix)}
            names = {name: in_file[plain] for name, plain in own.items()}
            taken = set(names.values())
            yield Detector(
                kind,
                ".".join(filter(None, (*keys, prefix.rstrip(".")))),
                {name: values[original] for name, original in names.items()},
                names,
                tuple(n for n, value in values.items() if isinstance(value, TensorView) and n not in taken),
            )


def _kinds(sign: str, names: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """For the name of a level embedding: the project, what stands before its names, and what they lack themselves."""
    found = re.fullmatch(r"((?:[^.]+\.)*?)(bbox_head\.transformer\.|transformer\.|model\.|)(level_embeds?)", sign)
    if found is None:
        return
    prefix, place, last = found.groups()
    if last == "level_embeds":
        if place == "transformer.":
            layer = re.compile(rf"{re.escape(prefix)}transformer\.decoder\.layers\.\d+\.attentions\.0\.norm_o2o\.")
            yield ("Mr.DETR" if any(map(layer.match, names)) else "detrex"), prefix, ""
        elif place == "bbox_head.transformer.":
            yield "mmdetection 2", prefix, ""
    elif place == "transformer.":
        yield "official", prefix, ""
    elif any(name.startswith(f"{prefix}{place}bbox_head.") for name in names):
        yield "mmdetection", f"{prefix}{place}", ""
    elif place == "model." or any(
        re.match(rf"{re.escape(prefix)}encoder\.layers\.\d+\.\w+_layer_norm\.", n) for n in names
    ):
        yield "transformers", prefix, "" if place else "model."

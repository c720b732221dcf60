"""The official names in those of other projects: what names.py reads, the other way round.

Each rule stands for one of names.py. They can not drift apart unseen: `ddetr.checkpoint.convert` reads every file back
before it is put in its place.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from ddetr.weight_files.state_dicts import Rules, renamed

# Those of 4.x, under which the hub has its files: 5.x reads them, and writes them too.
_TRANSFORMERS: Rules = (
    (r"^backbone\.0\.body\.", "model.backbone.conv_encoder.model."),
    (r"^query_embed\.", "model.query_position_embeddings."),
    (r"^input_proj\.", "model.input_proj."),
    (r"^transformer\.", "model."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.self_attn_layer_norm."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.encoder_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.self_attn_layer_norm."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.final_layer_norm."),
    (r"(decoder\.layers\.\d+)\.cross_attn\.", r"\1.encoder_attn."),
    (r"(coder\.layers\.\d+)\.linear([12])\.", r"\1.fc\2."),
)
_DETREX: Rules = (
    (r"^backbone\.0\.body\.(conv1|bn1)\.", r"backbone.stem.\1."),
    (r"^backbone\.0\.body\.layer1\.", "backbone.res2."),
    (r"^backbone\.0\.body\.layer2\.", "backbone.res3."),
    (r"^backbone\.0\.body\.layer3\.", "backbone.res4."),
    (r"^backbone\.0\.body\.layer4\.", "backbone.res5."),
    (r"^(backbone\..+)\.bn([123])\.", r"\1.conv\2.norm."),
    (r"^(backbone\..+)\.downsample\.0\.", r"\1.shortcut."),
    (r"^(backbone\..+)\.downsample\.1\.", r"\1.shortcut.norm."),
    (r"^(neck\..+)\.0\.(weight|bias)$", r"\1.conv.\2"),
    (r"^(neck\..+)\.1\.(weight|bias)$", r"\1.norm.\2"),
    (r"^query_embed\.", "query_embedding."),
    (r"^transformer\.level_embed$", "transformer.level_embeds"),
    (r"(encoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0."),
    (r"(decoder\.layers\.\d+)\.self_attn\.", r"\1.attentions.0.attn."),
    (r"(decoder\.layers\.\d+)\.cross_attn\.", r"\1.attentions.1."),
    (r"(coder\.layers\.\d+)\.linear1\.", r"\1.ffns.0.layers.0.0."),
    (r"(coder\.layers\.\d+)\.linear2\.", r"\1.ffns.0.layers.1."),
    (r"(encoder\.layers\.\d+)\.norm1\.", r"\1.norms.0."),
    (r"(encoder\.layers\.\d+)\.norm2\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d+)\.norm2\.", r"\1.norms.0."),
    (r"(decoder\.layers\.\d+)\.norm1\.", r"\1.norms.1."),
    (r"(decoder\.layers\.\d+)\.norm3\.", r"\1.norms.2."),
)


def in_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Official names and tensors -> those of transformers, where query, key and value projections are apart."""
    written = {}
    for official, name in renamed(tensors, _TRANSFORMERS).items():
        tensor = tensors[official]
        if found := re.fullmatch(r"(.*\.self_attn)\.in_proj_(weight|bias)", name):
            written |= {f"{found[1]}.{x}_proj.{found[2]}": part.clone() for x, part in zip("qkv", tensor.chunk(3))}
        else:
            written[name] = tensor
    return written


def in_detrex(tensors: Mapping[str, Tensor], num_backbone_levels: int) -> dict[str, Tensor]:
    """Official names -> those of detrex.

    num_backbone_levels: how many of the projections are of stages of the backbone; its neck counts the others anew.
    """
    counted = {}
    for name, tensor in tensors.items():
        if level := re.match(r"input_proj\.(\d+)\.", name):
            number = int(level[1])
            is_extra = number >= num_backbone_levels
            place = f"extra_convs.{number - num_backbone_levels}" if is_extra else f"convs.{number}"
            name = f"neck.{place}.{name[level.end() :]}"
        counted[name] = tensor
    return {new: counted[name] for name, new in renamed(counted, _DETREX).items()}

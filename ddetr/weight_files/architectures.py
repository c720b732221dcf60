"""Which network the names of tensors belong to, where it is not Deformable DETR: for a sentence that says so.

The names were read in the projects' own code and in transformers. A name that several share goes with the first.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

from ddetr.weight_files.state_dicts import without_wrappers


class Architecture(NamedTuple):
    """A family of networks; `is_backbone` where the weights are those of a backbone alone."""

    name: str
    is_backbone: bool


# Name -> what has to be found among the names of the tensors, all of it.
_DETECTORS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("Grounding DINO", (r"(?:^|\.)(?:bert|text_backbone|language_model)\.", r"sampling_offsets")),
    ("D-FINE or DEIM", (r"(?:^|\.)lqe_layers\.\d",)),
    ("RT-DETR", (r"(?:^|\.)(?:fpn_blocks\.\d|dec_score_head\.\d|denoising_class_embed\.)",)),
    ("RF-DETR or LW-DETR", (r"(?:^|\.)refpoint_embed\.", r"(?:^|\.)query_feat\.")),
    ("Co-DETR", (r"^query_head\.",)),
    ("DETA", (r"(?:^|\.)pix_trans\.",)),
    ("MS-DETR", (r"decoder\.layers\.\d+\.linear3\.", r"decoder\.layers\.\d+\.linear4\.")),
    ("DAB-DETR or DN-DETR", (r"(?:^|\.)(?:refpoint_embed|anchor_box_embed)\.", r"(?:^|\.)ref_point_head\.")),
    ("Conditional DETR", (r"(?:^|\.)(?:ca_qcontent_proj|encoder_attn\.q_pos_sine_proj)\.",)),
    ("DINO, or a detector made from it", (r"(?:^|\.)(?:ref_point_head|reference_points_head)\.",)),
    ("DETR", (r"(?:^|\.)input_proj(?:ection)?\.weight$", r"(?:^|\.)(?:class_embed|class_labels_classifier)\.weight$")),
    ("DETR (mmdetection)", (r"(?:^|\.)bbox_head\.fc_cls\.", r"(?:^|\.)query_embedding\.")),
    ("MaskFormer or Mask2Former", (r"(?:^|\.)(?:sem_seg_head|pixel_level_module|panoptic_head)\.",)),
    ("Faster R-CNN or a relative", (r"(?:^|\.)(?:rpn|rpn_head|proposal_generator)\.", r"(?:^|\.)roi_heads?\.")),
    ("RetinaNet or a relative", (r"(?:^|\.)(?:head\.classification_head|bbox_head\.(?:retina_cls|conv_cls))\.",)),
    ("YOLOS", (r"(?:^|\.)(?:embeddings\.detection_tokens|det_token)$",)),
    ("YOLOX", (r"(?:^|\.)(?:head|bbox_head)\.(?:cls_preds|multi_level_conv_cls)\.",)),
    ("YOLO", (r"^(?:model\.)+0\.conv\.weight$", r"^(?:model\.)+\d+\.(?:cv\d|m)\.")),
)
_BACKBONES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("ResNet", (r"(?:^|\.)layer4\.0\.conv1\.weight$",)),
    ("ResNet, in detectron2's names", (r"(?:^|\.)res5\.0\.conv1\.weight$",)),
    ("Swin Transformer", (r"relative_position_bias_table$|\.attn\.cpb_mlp\.",)),
    ("vision transformer", (r"(?:^|\.)(?:blocks\.\d+\.attn\.qkv|layers?\.\d+\.attention(?:\.attention)?\.\w+)\.",)),
    ("ConvNeXt", (r"(?:^|\.)stages\.\d\.(?:blocks\.)?\d+\.(?:conv_dw|dwconv)\.",)),
    ("EfficientNet", (r"(?:^|\.)_blocks\.\d+\._depthwise_conv\.",)),
    ("EfficientNet, MobileNet or a relative", (r"(?:^|\.)blocks\.\d+\.\d+\.(?:conv_pw|conv_dw)\.",)),
)
_OF_DETECTORS = re.compile(r"bbox|(?:^|[._])(?:rpn|roi|decoder|anchor|query|heads?\.\w+_head)(?:[._]|$)")


def architecture_of(names: Iterable[str]) -> Architecture | None:
    """The network that tensors of these names belong to; None where it is none of the table, as Deformable DETR."""
    names = [without_wrappers(name) for name in names]

    def has(pattern: str) -> bool:
        return any(map(re.compile(pattern).search, names))

    for name, patterns in _DETECTORS:
        if all(map(has, patterns)):
            return Architecture(name, is_backbone=False)
    if any(map(_OF_DETECTORS.search, names)):
        return None
    return next((Architecture(name, True) for name, patterns in _BACKBONES if all(map(has, patterns))), None)

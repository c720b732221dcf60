"""What files of other projects hold for training alone: the detector finds the same objects without it.

Read in the code of H-DETR (arXiv:2207.13080) and Mr.DETR (arXiv:2412.10028); our own auxiliary parts are of this kind.
"""

import re

from torch import Tensor

from ddetr.checkpoint.report import Remark
from ddetr.models.auxiliary import PREFIX

# Official names, and what they are of.
_PARTS: tuple[tuple[str, str], ...] = (
    (rf"^{re.escape(PREFIX)}", "queries and losses that exist in training alone"),
    (r"^transformer\.decoder\.(?:class_embed_o2m_encoder|bbox_embed_enc_o2m)\.", "Mr.DETR's one-to-many proposals"),
    (
        r"^transformer\.decoder\.layers\.\d+\.attentions\.0\.(?:instruction_o2m(?:_pos)?|norm_o2m)\.",
        "Mr.DETR's instructions",
    ),
    (r"^transformer\.decoder\.layers\.\d+\.linear[12]_sep\.", "Mr.DETR's second route"),
    (r"^(?:bbox_attention|mask_head|seg_input_proj)\.", "masks of the objects, beside their boxes"),
)
_DENOISING = r"^label_enc\."
# Queries of H-DETR's published networks -> those of them that are matched one to one.
_ONE_TO_ONE = {1800: 300, 2400: 900}


def why_left_out(name: str, kind: str) -> str | None:
    """What a tensor of this official name is of, if it exists for training alone; None for all others."""
    if kind == "Mr.DETR" and re.match(_DENOISING, name):  # in DINO it has a part in what is found
        return "classes of denoising queries"
    return next((what for pattern, what in _PARTS if re.match(pattern, name)), None)


def one_to_one_queries(tensors: dict[str, Tensor], told: int | None) -> tuple[dict[str, Tensor], list[Remark]]:
    """Without the queries that H-DETR matches one to many, which are the last of them; and what was left out.

    Args:
        tensors: under official names.
        told: the number of one-to-one queries, where the file says it.
    """
    queries = tensors.get("query_embed.weight")
    if queries is None or queries.ndim != 2:
        return tensors, []
    kept = told or _ONE_TO_ONE.get(len(queries), len(queries))
    if kept >= len(queries):
        return tensors, []
    remark = Remark("query_embed.weight", f"queries {kept} to {len(queries) - 1}: matched one to many, H-DETR")
    return tensors | {"query_embed.weight": queries[:kept]}, [remark]

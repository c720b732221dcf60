"""Which head of a file each head of a model starts from."""

from ddetr.checkpoint.foreign import SourceWeights
from ddetr.models.deformable_detr import DeformableDETR


class HeadMap:
    """Which head of the file each head of the model starts from.

    A plain model has one head for all decoder layers; a refining one has a head per layer; a two-stage one has a
    further head for its proposals. A box head corrects points (plain; the first layer of refining) or boxes (all
    others).
    """

    def __init__(self, source: SourceWeights, model: DeformableDETR):
        self.source = source
        self.is_shared = not model.config["with_box_refine"]
        self.num_layers = model.config["dec_layers"]
        self.two_stage = model.two_stage
        self.source_layers = source.num_layers("decoder")
        self.source_heads = {family: source.heads(family) for family in ("class_embed", "bbox_embed")}
        self.source_shared = {family: source.is_one_head(family) for family in self.source_heads}
        self.source_refines = (
            source.two_stage or source.config["with_box_refine"] or not self.source_shared["bbox_embed"]
        )

    def is_proposal(self, name: str) -> bool:
        return self.two_stage and int(name.split(".")[1]) == self.num_layers

    def source_name(self, name: str) -> str | None:
        """The name in the file of a head's parameter; None where the file has no such head."""
        family, _, rest = name.split(".", 2)
        index = self._source_index(name)
        if index is None or not self.source_heads[family]:
            return None
        if self.source_shared[family]:
            index = self.source_heads[family][0]
        return f"{family}.{index}.{rest}"

    def twins(self, source_name: str) -> list[str]:
        """All names in the file of the same head."""
        family, _, rest = source_name.split(".", 2)
        if not self.source_shared[family]:
            return [source_name]
        return [f"{family}.{index}.{rest}" for index in self.source_heads[family]]

    def how(self, name: str) -> str:
        family = name.split(".")[0]
        if self.is_shared:
            if not self.source_refines:
                return ""
            return f"the head of decoder layer {self._source_index(name)} for all layers"
        return "the file's one head for all layers" if not self.source_refines and self.source_shared[family] else ""

    def why_missing(self, name: str) -> str:
        if self.is_proposal(name) and not self.source.two_stage:
            return "a head for proposals, which only two-stage models have"
        return "not in the file"

    def same_reference(self, name: str) -> bool:
        index = self._source_index(name)
        source_point = not self.source_refines or (index == 0 and not self.source.two_stage)
        return source_point == self.corrects_point(name)

    def corrects_point(self, name: str) -> bool:
        return self.is_shared or (int(name.split(".")[1]) == 0 and not self.two_stage)

    def _source_index(self, name: str) -> int | None:
        """The decoder layer (or, for proposals, one more than the last) whose head in the file is meant."""
        family, index, _ = name.split(".", 2)
        if self.is_shared:
            if not self.source_refines:
                return 0
            # The first box head corrects points, as the shared one has to; the last class head is the best trained.
            return 0 if family == "bbox_embed" else self.source_layers - 1
        if self.is_proposal(name):
            return self.source_layers if self.source.two_stage else None
        if not self.source_refines and self.source_shared[family]:
            return 0
        return int(index) if int(index) < self.source_layers else None

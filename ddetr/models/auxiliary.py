"""What trains beside the network and never leaves with it: denoising queries and a one-to-many route.

Both run the network's own decoder once more over what its encoder has made, in a pass of their own, so that what the
network's queries find does not depend on them by a bit. Their parameters are this module's: a published checkpoint has
none of them.

Shapes: N batch, T the most objects per image, C hidden_dim, K classes, R queries of a pass, M objects of all images.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.boxes import box_cxcywh_to_xyxy, box_xyxy_to_cxcywh
from ddetr.errors import InputError
from ddetr.models.deformable_transformer import Encoded, Queries
from ddetr.models.matcher import Matches, PaddedTargets
from ddetr.models.position_encoding import sine_embedding
from ddetr.runtime.transfer import sent
from ddetr.settings import check_ranges, option

if TYPE_CHECKING:
    from ddetr.models.deformable_detr import DeformableDETR

PREFIX = "auxiliary."  # of its parameters in the state dict of a network that is being trained
_SMALLEST = 1e-3  # side of a noised box, of the image's
_NEVER = -100.0  # logit of a query that is none: its loss and its gradient are zero


@dataclass(frozen=True)
class AuxiliaryConfig:
    """Queries and losses that exist in training alone, by default none: the trained network is the same without
    them."""

    denoising: int = option(0, at_least=0)
    """Contrastive denoising (DINO): about this many noised objects per image are queries too, to be found again, and as
    many with more noise, to be refused; DINO has 100, 0 is none."""
    label_noise: float = option(0.5, at_least=0, at_most=1)
    """Twice the share of denoising queries that get a random class."""
    box_noise: float = option(1.0, at_least=0)
    """How far the sides of denoising queries may move, in halves of the box; twice as far for those to be refused."""
    one_to_many: int = option(0, at_least=0)
    """A second pass of the queries through the decoder, with feed-forward parts of its own, in which an object has up
    to this many of them (Mr.DETR); Mr.DETR has 6, 0 is none."""

    look_forward_twice: bool = False
    """A layer's correction of the boxes also learns from the loss of the layer after it (DINO)."""

    def __post_init__(self) -> None:
        check_ranges(self)


class DenoisingOutputs(NamedTuple):
    """What the decoder makes of denoising queries: outputs of each layer, and which object each should be."""

    layers: list[dict[str, Tensor]]
    matches: Matches
    num_groups: int


class Noised(NamedTuple):
    """Denoising queries of a batch, group after group, of a group first those to be found again."""

    labels: Tensor  # (N, R)
    boxes: Tensor  # (N, R, 4) cxcywh
    is_used: Tensor  # (N, R) bool: an image with fewer objects than another has queries that are none
    unseen: Tensor  # (N, R, R) bool, True where a query (row) does not see another
    matches: Matches
    num_groups: int


class Auxiliary(nn.Module):
    """Makes queries from the objects of a training step, and gives what the network's decoder makes of them."""

    def __init__(self, model: "DeformableDETR", config: AuxiliaryConfig):
        super().__init__()
        self.config = config
        self.num_classes = model.config["num_classes"]
        hidden_dim = model.config["hidden_dim"]
        if config.denoising:
            self.label_embed = nn.Embedding(self.num_classes, hidden_dim)
            if not model.two_stage:  # which has a rule of its own from a box to a query
                self.box_embed = nn.Linear(hidden_dim * 2, hidden_dim)
        if config.one_to_many:
            sizes = (hidden_dim, model.config["dim_feedforward"], model.config["dropout"])
            self.feed_forwards = nn.ModuleList(_FeedForward(*sizes) for _ in range(model.config["dec_layers"]))

    def forward(
        self, model: "DeformableDETR", encoded: Encoded, targets: Sequence[dict[str, Tensor]]
    ) -> dict[str, Any]:
        """What the criterion takes beside the network's own outputs.

        Args:
            model: the network that is being trained.
            encoded: what it made of the images.
            targets: for each image `labels` (t,) and `boxes` (t, 4) cxcywh in [0, 1]; t may be 0.

        Returns:
            with denoising `denoising` (`DenoisingOutputs`), with the one-to-many route `one_to_many`: outputs of each
            decoder layer.
        """
        outputs: dict[str, Any] = {}
        if self.config.denoising:
            noised = self.noised(PaddedTargets.of(targets, encoded.memory.device))
            outputs["denoising"] = self._denoised(model, encoded, noised)
        if self.config.one_to_many:
            outputs["one_to_many"] = model.decode(encoded, encoded.queries, feed_forwards=list(self.feed_forwards))
        return outputs

    def noised(self, targets: PaddedTargets) -> Noised:
        """Denoising queries (arXiv:2203.03605, sec. 3.3): groups of all objects of an image, each object twice."""
        (n, most), device = targets.labels.shape, targets.labels.device
        t = max(most, 1)  # a batch without any object has queries too, that are none: every process does the same
        groups = max(1, self.config.denoising // t)
        sizes = sent(torch.tensor(targets.sizes), device)
        is_object = torch.arange(t, device=device) < sizes[:, None]  # (N, T)
        labels = F.pad(targets.labels, (0, t - most))
        boxes = F.pad(targets.boxes, (0, 0, 0, t - most), value=0.5)

        labels = labels[:, None, None].expand(n, groups, 2, t)
        is_random = torch.rand(labels.shape, device=device) < self.config.label_noise / 2
        labels = torch.where(is_random, torch.randint_like(labels, self.num_classes), labels)
        halves = boxes[:, None, None, :, 2:].repeat(1, 1, 1, 1, 2) / 2  # (N, 1, 1, T, 4)
        shift = torch.rand(n, groups, 2, t, 4, device=device)
        shift[:, :, 1] += 1
        sign = torch.randint_like(shift, 2) * 2 - 1
        corners = box_cxcywh_to_xyxy(boxes)[:, None, None] + shift * sign * halves * self.config.box_noise
        low, high = corners.clamp(0, 1).unflatten(-1, (2, 2)).sort(dim=-2).values.unbind(-2)  # sides that have crossed
        centre, size = box_xyxy_to_cxcywh(torch.cat((low, high), dim=-1)).split(2, dim=-1)
        noised = torch.cat((centre, size.clamp(min=_SMALLEST)), dim=-1)

        r = groups * 2 * t
        is_used = is_object[:, None, None].expand(n, groups, 2, t).reshape(n, r)
        group = torch.arange(r, device=device) // (2 * t)
        itself = torch.eye(r, dtype=torch.bool, device=device)
        unseen = ((group[:, None] != group) | ~is_used[:, None]) & ~itself  # (N, R, R)
        images, places = targets.indices()
        first = torch.arange(groups, device=device)[:, None] * (2 * t)
        matches = Matches(images.repeat(groups), (first + places).flatten(), places.repeat(groups))
        return Noised(labels.reshape(n, r), noised.reshape(n, r, 4), is_used, unseen, matches, groups)

    def _denoised(self, model: "DeformableDETR", encoded: Encoded, noised: Noised) -> DenoisingOutputs:
        content = self.label_embed(noised.labels)
        if model.two_stage:
            position, _ = model.transformer.queries_of(noised.boxes)
        else:
            embedding = sine_embedding(noised.boxes * (2 * math.pi), content.shape[-1] // 2).flatten(2)  # (N, R, 2C)
            position = self.box_embed(embedding.to(self.box_embed.weight.dtype))
        # Learned queries start from a point, and so do these beside them.
        references = noised.boxes[..., : encoded.queries.references.shape[-1]]
        unseen = noised.unseen.repeat_interleave(model.config["nheads"], dim=0)
        layers = model.decode(encoded, Queries(content, position, references), unseen)
        for layer in layers:
            layer["pred_logits"] = layer["pred_logits"].masked_fill(~noised.is_used[..., None], _NEVER)
        return DenoisingOutputs(layers, noised.matches, noised.num_groups)


def attach_auxiliary(model: "DeformableDETR", config: AuxiliaryConfig) -> None:
    """From now on `config`'s queries and losses train beside the network; nothing where it has none.

    Raises:
        InputError: what the network cannot do.
    """
    if config.look_forward_twice and not model.config["with_box_refine"]:
        raise InputError("look_forward_twice needs with_box_refine: without it no layer starts from another's boxes")
    if config.denoising or config.one_to_many or config.look_forward_twice:
        model.auxiliary = Auxiliary(model, config)
        model.transformer.decoder.look_forward_twice = config.look_forward_twice


def keeping_encoded(model: "DeformableDETR") -> Callable[[Tensor, Tensor | None], dict[str, Any]]:
    """The network's forward, whose outputs also have `encoded`, for `Auxiliary`."""

    def run(images: Tensor, mask: Tensor | None) -> dict[str, Any]:
        encoded = model.encode(images, mask)
        encoded = encoded._replace(values=model.transformer.decoder.values(encoded))
        return model.detect(encoded) | {"encoded": encoded}

    return run


class _FeedForward(nn.Module):
    """As a decoder layer's own."""

    def __init__(self, d_model: int, d_ffn: int, dropout: float):
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(d_model, d_ffn), nn.Linear(d_ffn, d_model)
        self.dropout1, self.dropout2 = nn.Dropout(dropout), nn.Dropout(dropout)
        self.norm = nn.LayerNorm(d_model)
        for linear in (self.linear1, self.linear2):
            nn.init.xavier_uniform_(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.dropout2(self.linear2(self.dropout1(self.linear1(x).relu()))))

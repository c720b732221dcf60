"""Deformable transformer: feature maps of several scales in, query states and boxes of every layer out
(arXiv:2010.04159, sec. 4 and A.4).

Shapes: N batch, C hidden_dim, L levels, S = sum_l H_l*W_l, Q queries, K classes.
Reference points are (x, y) or (cx, cy, w, h) in [0, 1]; `valid_ratios` (N, L, 2) is the unpadded share of each level
as (w, h); `_unact` means before the sigmoid.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ddetr.models.attention import MSDeformAttn
from ddetr.models.heads import refine_boxes
from ddetr.models.position_encoding import sine_embedding
from ddetr.models.query_selection import QuerySelection, ranked_scores, smaller

SpatialShapes = Sequence[tuple[int, int]]


class Proposals(NamedTuple):
    """What the two-stage encoder proposes for every cell: class logits (N, S, K) and boxes (N, S, 4) cxcywh."""

    logits: Tensor
    boxes: Tensor


class Queries(NamedTuple):
    """What the decoder starts from: content and position (N, Q, C), reference points (N, Q, 2) or boxes (N, Q, 4)."""

    content: Tensor
    position: Tensor
    references: Tensor


class Encoded(NamedTuple):
    """What the encoder makes of feature maps, and all that the decoder needs."""

    memory: Tensor  # (N, S, C)
    spatial_shapes: SpatialShapes
    valid_ratios: Tensor  # (N, L, 2)
    mask: Tensor | None  # (N, S)
    queries: Queries
    proposals: Proposals | None  # two-stage
    values: list[Tensor] | None = None  # what each decoder layer samples, (N, S, C), once for several passes


class Decoded(NamedTuple):
    """Query states of every decoder layer, [(N, Q, C)], and their boxes, [(N, Q, 4)] cxcywh."""

    states: list[Tensor]
    boxes: list[Tensor]


class DeformableTransformerEncoderLayer(nn.Module):
    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.self_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.activation = nn.ReLU(inplace=True)
        self.dropout2 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout3 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)

    def forward(
        self, src: Tensor, pos: Tensor, reference_points: Tensor, spatial_shapes: SpatialShapes, mask: Tensor | None
    ) -> Tensor:
        """src, pos (N, S, C), reference_points (N, S, L, 2) -> (N, S, C)."""
        src = self.norm1(src + self.dropout1(self.self_attn(src + pos, reference_points, src, spatial_shapes, mask)))
        hidden = self.dropout2(self.activation(self.linear1(src)))
        return self.norm2(src + self.dropout3(self.linear2(hidden)))


class LayerStack(nn.Module):
    """Layers one after the other, whose activations the backward pass can compute again instead of keeping them."""

    def __init__(self, layers: Sequence[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.activation_checkpointing = False

    def run(self, layer: nn.Module, *inputs: Any) -> Tensor:
        """layer(*inputs); with `activation_checkpointing`, in training, only `inputs` are kept for the backward pass.

        Random states are kept too, so that dropout drops the same when the layer runs again.
        """
        if self.activation_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)


class DeformableTransformerEncoder(LayerStack):
    def forward(
        self, src: Tensor, pos: Tensor, spatial_shapes: SpatialShapes, valid_ratios: Tensor, mask: Tensor | None
    ) -> Tensor:
        """src, pos (N, S, C) -> memory (N, S, C)."""
        reference_points = cell_centres(spatial_shapes, valid_ratios)[:, :, None] * valid_ratios[:, None]
        for layer in self.layers:
            src = self.run(layer, src, pos, reference_points, spatial_shapes, mask)  # (N, S, C)
        return src


class DeformableTransformerDecoderLayer(nn.Module):
    def __init__(self, d_model: int, d_ffn: int, dropout: float, n_levels: int, n_heads: int, n_points: int):
        super().__init__()
        self.cross_attn = MSDeformAttn(d_model, n_levels, n_heads, n_points)
        self.dropout1 = nn.Dropout(dropout)
        self.norm1 = nn.LayerNorm(d_model)
        self.self_attn = nn.MultiheadAttention(d_model, n_heads, dropout=dropout, batch_first=True)
        self.dropout2 = nn.Dropout(dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.linear1 = nn.Linear(d_model, d_ffn)
        self.activation = nn.ReLU(inplace=True)
        self.dropout3 = nn.Dropout(dropout)
        self.linear2 = nn.Linear(d_ffn, d_model)
        self.dropout4 = nn.Dropout(dropout)
        self.norm3 = nn.LayerNorm(d_model)

    def forward(
        self,
        tgt: Tensor,
        query_pos: Tensor,
        reference_points: Tensor,
        memory: Tensor,
        spatial_shapes: SpatialShapes,
        mask: Tensor | None,
        value: Tensor | None = None,
        attn_mask: Tensor | None = None,
        feed_forward: nn.Module | None = None,
    ) -> Tensor:
        """tgt, query_pos (N, Q, C), reference_points (N, Q, L, 2 or 4), memory (N, S, C) -> (N, Q, C).

        value: (N, S, C), what the layer samples of the memory, where it is known.
        attn_mask: (N * heads, Q, Q) bool, True where a query (row) does not see another; None where each sees all.
        feed_forward: what takes the place of the layer's own, (N, Q, C) -> (N, Q, C).
        """
        query = tgt + query_pos
        attended = self.self_attn(query, query, tgt, attn_mask=attn_mask, need_weights=False)[0]
        tgt = self.norm2(tgt + self.dropout2(attended))
        attended = self.cross_attn(tgt + query_pos, reference_points, memory, spatial_shapes, mask, value)
        tgt = self.norm1(tgt + self.dropout1(attended))
        if feed_forward is not None:
            return feed_forward(tgt)
        hidden = self.dropout3(self.activation(self.linear1(tgt)))
        return self.norm3(tgt + self.dropout4(self.linear2(hidden)))


class DeformableTransformerDecoder(LayerStack):
    def __init__(self, layers: Sequence[nn.Module], with_box_refine: bool):
        super().__init__(layers)
        self.with_box_refine = with_box_refine
        self.look_forward_twice = False  # whether a layer's correction also learns from the loss of the layer after it

    def forward(
        self,
        queries: Queries,
        encoded: Encoded,
        bbox_embed: Sequence[nn.Module],
        attn_mask: Tensor | None = None,
        feed_forwards: Sequence[nn.Module] | None = None,
    ) -> Decoded:
        """Queries -> their states and boxes, layer after layer.

        Args:
            queries: Q queries.
            encoded: what they look at.
            bbox_embed: a box head for each layer.
            attn_mask: (N * heads, Q, Q) bool, True where a query (row) does not see another; None where each sees all.
            feed_forwards: for each layer what takes the place of its own feed-forward part, in training alone.
        """
        tgt, query_pos, reference_points = queries
        memory, spatial_shapes, valid_ratios, mask = encoded[:4]
        states, boxes_per_layer, corrected = [], [], reference_points
        none = [None] * len(self.layers)
        values, feed_forwards = encoded.values or none, feed_forwards or none
        for layer, box_head, value, feed_forward in zip(self.layers, bbox_embed, values, feed_forwards):
            ratios = valid_ratios.repeat(1, 1, reference_points.shape[-1] // 2)  # (N, L, 2 or 4)
            reference_points_in_levels = reference_points[:, :, None] * ratios[:, None]
            tgt = self.run(
                *(layer, tgt, query_pos, reference_points_in_levels, memory, spatial_shapes, mask),
                *(value, attn_mask, feed_forward),
            )  # (N, Q, C)
            correction = box_head(tgt)
            boxes = refine_boxes(correction, corrected)  # (N, Q, 4)
            states.append(tgt)
            boxes_per_layer.append(boxes)
            if self.with_box_refine:
                # Each layer learns its own correction (sec. A.4), or also that of the layer before it.
                corrected = refine_boxes(correction, reference_points) if self.look_forward_twice else boxes.detach()
                reference_points = boxes.detach()
        return Decoded(states, boxes_per_layer)

    def values(self, encoded: Encoded) -> list[Tensor] | None:
        """What each layer samples, (N, S, C), for several passes over it; None where activations are not kept."""
        if self.activation_checkpointing:
            return None
        return [layer.cross_attn.project(encoded.memory, encoded.mask) for layer in self.layers]


class DeformableTransformer(nn.Module):
    """Encoder and decoder, with learned queries (one-stage) or with queries made from encoder proposals (two-stage)."""

    def __init__(
        self,
        d_model: int = 256,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        num_feature_levels: int = 4,
        dec_n_points: int = 4,
        enc_n_points: int = 4,
        num_queries: int = 300,
        with_box_refine: bool = False,
        two_stage: bool = False,
        query_selection: QuerySelection = "topk",
        class_aware: bool = False,
    ):
        super().__init__()
        self.d_model, self.num_queries, self.two_stage = d_model, num_queries, two_stage
        self.query_selection, self.class_aware = query_selection, class_aware
        common = (d_model, dim_feedforward, dropout, num_feature_levels, nhead)
        self.encoder = DeformableTransformerEncoder(
            [DeformableTransformerEncoderLayer(*common, enc_n_points) for _ in range(num_encoder_layers)]
        )
        self.decoder = DeformableTransformerDecoder(
            [DeformableTransformerDecoderLayer(*common, dec_n_points) for _ in range(num_decoder_layers)],
            with_box_refine,
        )
        self.level_embed = nn.Parameter(torch.empty(num_feature_levels, d_model))
        if two_stage:
            self.enc_output = nn.Linear(d_model, d_model)
            self.enc_output_norm = nn.LayerNorm(d_model)
            self.pos_trans = nn.Linear(d_model * 2, d_model * 2)
            self.pos_trans_norm = nn.LayerNorm(d_model * 2)
        else:
            self.reference_points = nn.Linear(d_model, 2)
        self._reset_parameters()

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Whether training computes the activations of encoder and decoder layers twice instead of keeping them."""
        self.encoder.activation_checkpointing = self.decoder.activation_checkpointing = enabled

    def _reset_parameters(self) -> None:
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        for module in self.modules():
            if isinstance(module, MSDeformAttn):
                module.reset_parameters()
        if not self.two_stage:
            nn.init.zeros_(self.reference_points.bias)
        nn.init.normal_(self.level_embed)

    def forward(
        self,
        srcs: Sequence[Tensor],
        masks: Sequence[Tensor] | None,
        pos_embeds: Sequence[Tensor],
        query_embed: Tensor | None,
        class_head: nn.Module,
        box_head: nn.Module,
    ) -> Encoded:
        """Feature maps -> what the encoder makes of them, and the queries that `decoder` starts from.

        Args:
            srcs: L maps (N, C, H_l, W_l).
            masks: L masks (N, H_l, W_l), True = padding, or None where nothing is padded.
            pos_embeds: L encodings (N or 1, C, H_l, W_l), float32.
            query_embed: (Q, 2C), the position half first; for two-stage the content alone, (Q, C), where it is learned
                (mixed selection), else None.
            class_head, box_head: of the proposals, for two-stage.
        """
        n = srcs[0].shape[0]
        spatial_shapes = [(src.shape[2], src.shape[3]) for src in srcs]
        src = torch.cat([src.flatten(2).transpose(1, 2) for src in srcs], dim=1)  # (N, S, C)
        pos = torch.cat(
            [(pos.flatten(2).transpose(1, 2) + level) for pos, level in zip(pos_embeds, self.level_embed)], dim=1
        )  # (N or 1, S, C)
        if masks is None:
            mask = None
            valid_ratios = torch.ones(n, len(srcs), 2, device=src.device)
        else:
            mask = torch.cat([mask.flatten(1) for mask in masks], dim=1)  # (N, S)
            valid_ratios = torch.stack([valid_ratio(mask) for mask in masks], dim=1)  # (N, L, 2)

        memory = self.encoder(src, pos, spatial_shapes, valid_ratios, mask)

        proposals = None
        if self.two_stage:
            proposals, boxes_unact, invalid = self._propose(
                memory, spatial_shapes, mask, class_head, box_head, valid_ratios
            )
            # The official code ranks by the first column, which its encoder loss trains as "any object".
            scores = proposals.logits.amax(-1) if self.class_aware else proposals.logits[..., 0]
            scores = ranked_scores(
                self.query_selection, scores, proposals.boxes, spatial_shapes, invalid, self.num_queries
            )
            best = scores.topk(smaller(self.num_queries, src.shape[1]), dim=1).indices
            boxes_unact = boxes_unact.gather(1, best[..., None].expand(-1, -1, 4)).detach()  # (N, Q, 4)
            reference_points = boxes_unact.sigmoid()
            query_pos, tgt = self.queries_of(reference_points)
            if query_embed is not None:
                tgt = query_embed[: tgt.shape[1]].expand_as(tgt)
        else:
            query_pos, tgt = (half[None].expand(n, -1, -1) for half in query_embed.chunk(2, dim=-1))
            with torch.autocast(src.device.type, enabled=False):
                reference_points = self.reference_points(query_pos).float().sigmoid()  # (N, Q, 2)

        queries = Queries(tgt, query_pos, reference_points)
        return Encoded(memory, spatial_shapes, valid_ratios, mask, queries, proposals)

    def queries_of(self, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Two-stage: boxes (N, Q, 4) cxcywh -> position and content of the queries that start from them, (N, Q, C)."""
        embedding = sine_embedding(boxes * (2 * math.pi), self.d_model // 2).flatten(2)  # (N, Q, 2C)
        query = self.pos_trans_norm(self.pos_trans(embedding.to(self.pos_trans.weight.dtype)))
        return query.chunk(2, dim=-1)

    def _propose(
        self,
        memory: Tensor,
        spatial_shapes: SpatialShapes,
        mask: Tensor | None,
        class_head: nn.Module,
        box_head: nn.Module,
        valid_ratios: Tensor,
    ) -> tuple[Proposals, Tensor, Tensor]:
        """One proposal a cell (sec. A.4): `Proposals`, their boxes before the sigmoid, (N, S, 4), and which of them are
        none, (N or 1, S): padding, or too near to the border."""
        centres = cell_centres(spatial_shapes, valid_ratios)  # (N, S, 2)
        sizes = torch.cat(
            [torch.full_like(c, 0.05 * 2.0**level) for level, c in enumerate(self._split(centres, spatial_shapes))],
            dim=1,
        )
        anchors = torch.cat((centres, sizes), dim=-1)  # (N, S, 4)
        invalid = ((anchors <= 0.01) | (anchors >= 0.99)).any(-1)
        if mask is not None:
            invalid = invalid | mask
        anchors_unact = torch.logit(anchors.clamp(0.01, 0.99)).masked_fill(invalid[..., None], float("inf"))
        memory = self.enc_output_norm(self.enc_output(memory.masked_fill(invalid[..., None], 0.0)))
        boxes_unact = box_head(memory) + anchors_unact
        return Proposals(class_head(memory), boxes_unact.sigmoid()), boxes_unact, invalid

    @staticmethod
    def _split(flat: Tensor, spatial_shapes: SpatialShapes) -> Sequence[Tensor]:
        """(N, S, ...) -> L tensors (N, H_l*W_l, ...)."""
        return flat.split([h * w for h, w in spatial_shapes], dim=1)


def cell_centres(spatial_shapes: SpatialShapes, valid_ratios: Tensor) -> Tensor:
    """Centres of all cells as (x, y) relative to the unpadded part of their level: (N, S, 2) float32."""
    centres = []
    for level, (h, w) in enumerate(spatial_shapes):
        ys = (torch.arange(h, dtype=torch.float32, device=valid_ratios.device) + 0.5) / h
        xs = (torch.arange(w, dtype=torch.float32, device=valid_ratios.device) + 0.5) / w
        grid = torch.stack((xs[None, :].expand(h, w), ys[:, None].expand(h, w)), dim=-1).flatten(0, 1)  # (H*W, 2)
        centres.append(grid[None] / valid_ratios[:, None, level])
    return torch.cat(centres, dim=1)


def valid_ratio(mask: Tensor) -> Tensor:
    """Mask (N, H, W), True = padding -> unpadded share as (w, h), (N, 2) float32."""
    return torch.stack(((~mask[:, 0, :]).float().mean(1), (~mask[:, :, 0]).float().mean(1)), dim=-1)

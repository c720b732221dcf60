"""Deformable DETR (arXiv:2010.04159) in its five published variants, under the official parameter names.

Shapes: N batch, H and W of the padded images, Q queries, K classes, C hidden_dim, L feature levels.
"""

import inspect
import math
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddetr.errors import InputError
from ddetr.models.backbones import Backbone, FreezeBackbone
from ddetr.models.criterion import LossWeights, SetCriterion
from ddetr.models.deformable_transformer import DeformableTransformer, Encoded, Queries
from ddetr.models.heads import BoxHead, class_head
from ddetr.models.position_encoding import PositionEmbeddingLearned, PositionEmbeddingSine
from ddetr.models.postprocess import PostProcess
from ddetr.models.query_selection import QuerySelection
from ddetr.padding import pad_images
from ddetr.printable import one_line
from ddetr.untrusted import MAX_NETWORK
from ddetr.wording import did_you_mean


class DeformableDETR(nn.Module):
    """Detector: images in, class logits and boxes of a fixed number of queries out.

    Attributes:
        config: the constructor's arguments: `DeformableDETR(**model.config)` builds the same network.
        image_mean, image_std: of red, green and blue in [0, 1], with which its images are normalised: those of timm's
            weights of the backbone, or of the file of weights that the network was started from.
    """

    # Long, since the signature with its help is the interface of command line, YAML and checkpoint: each argument
    # stands in it, in the help and in `config`.
    def __init__(
        self,
        num_classes: int = 80,
        hidden_dim: int = 256,
        num_queries: int = 300,
        *,
        backbone: str = "resnet50",
        pretrained_backbone: bool | str = False,
        freeze_backbone: FreezeBackbone | None = None,
        backbone_window: int | None = None,
        dilation: bool = False,
        position_embedding: Literal["sine", "learned"] = "sine",
        num_feature_levels: int = 4,
        num_backbone_levels: int = 3,
        nheads: int = 8,
        enc_layers: int = 6,
        dec_layers: int = 6,
        dim_feedforward: int = 1024,
        dropout: float = 0.1,
        enc_n_points: int = 4,
        dec_n_points: int = 4,
        aux_loss: bool = True,
        with_box_refine: bool = False,
        two_stage: bool = False,
        query_selection: QuerySelection = "topk",
        class_aware: bool = False,
        mixed_selection: bool = False,
    ):
        """
        Args:
            num_classes: K, classes with a logit each; there is no background class.
            hidden_dim: C, size of queries and features; divisible by nheads and by 4.
            num_queries: Q, the most objects that an image can have; for two-stage a choice at run time.
            backbone: name of a timm model; plain vision transformers get a feature pyramid (ViTDet's).
            pretrained_backbone: true for ImageNet weights, a name of timm with its tag (resnet50.a1_in1k), an address
                of the hub (hf-hub:org/name), or a file of weights of this backbone, under timm's names, torchvision's,
                OpenMMLab's or those of self-supervised training.
            freeze_backbone: "stem" (fixed batch norms, and all up to stride 4: stem and first stage, as published),
                "norm" (batch norms alone), "all" or "none"; by default "stem" where the backbone is pretrained and
                "none" where it starts from nothing.
            backbone_window: of plain vision transformers, patches a side of the windows in which all but four blocks
                attend (ViTDet's 14), for large images; by default they attend to the whole image.
            dilation: DC5, stride 16 instead of 32 in the last stage; for num_feature_levels 1.
            position_embedding: "sine" or "learned".
            num_feature_levels: L; 1 is the last backbone stage alone, above num_backbone_levels further levels are made
                from it.
            num_backbone_levels: the most levels that are stages of the backbone: 3 for strides 8, 16 and 32, as
                published; 4 for stride 4 too, which small objects need (DINO's fifth scale): four times the cells.
            nheads: attention heads.
            enc_layers: encoder layers.
            dec_layers: decoder layers.
            dim_feedforward: hidden size of the feed-forward parts.
            dropout: probability in encoder and decoder.
            enc_n_points: points that an encoder head samples per level.
            dec_n_points: points that a decoder head samples per level.
            aux_loss: return the outputs of all decoder layers, for the loss.
            with_box_refine: each decoder layer corrects the boxes of the one before ("+").
            two_stage: queries start from encoder proposals ("++"); needs with_box_refine.
            query_selection: which proposals: "topk", the best, as published; "peaks", first those of cells that score
                highest among their neighbours; "distinct", first those that no better one covers (IoU above 0.5).
            class_aware: proposals have a score for each class, and the best counts (DINO); else one for "any object",
                as published.
            mixed_selection: queries have the boxes of proposals and a learned content, the best proposal the first
                (H-DETR, DINO); else their content is made from the box too, as published.

        Raises:
            InputError: arguments that do not fit together.
        """
        super().__init__()
        self.config: dict[str, Any] = {
            "num_classes": num_classes,
            "hidden_dim": hidden_dim,
            "num_queries": num_queries,
            "backbone": backbone,
            "pretrained_backbone": pretrained_backbone,
            "freeze_backbone": freeze_backbone,
            "backbone_window": backbone_window,
            "dilation": dilation,
            "position_embedding": position_embedding,
            "num_feature_levels": num_feature_levels,
            "num_backbone_levels": num_backbone_levels,
            "nheads": nheads,
            "enc_layers": enc_layers,
            "dec_layers": dec_layers,
            "dim_feedforward": dim_feedforward,
            "dropout": dropout,
            "enc_n_points": enc_n_points,
            "dec_n_points": dec_n_points,
            "aux_loss": aux_loss,
            "with_box_refine": with_box_refine,
            "two_stage": two_stage,
            "query_selection": query_selection,
            "class_aware": class_aware,
            "mixed_selection": mixed_selection,
        }
        _check(self.config)
        if freeze_backbone is None:
            freeze_backbone = "stem" if pretrained_backbone else "none"
        self.num_queries, self.two_stage, self.aux_loss = num_queries, two_stage, aux_loss
        self.auxiliary: nn.Module | None = None  # `Auxiliary`, where `attach_auxiliary` gave the network one to train

        encoding = {"sine": PositionEmbeddingSine, "learned": PositionEmbeddingLearned}[position_embedding]
        num_features = min(num_feature_levels, num_backbone_levels)
        body = Backbone(
            backbone,
            num_features,
            pretrained=pretrained_backbone,
            dilation=dilation,
            freeze=freeze_backbone,
            window=backbone_window,
        )
        self.image_mean, self.image_std = body.mean, body.std
        self.backbone = nn.Sequential(body, encoding(hidden_dim // 2))  # official names: backbone.0 and backbone.1
        projections = [_projection(channels, hidden_dim, kernel_size=1) for channels in body.num_channels]
        channels = body.num_channels[-1]
        for _ in range(num_feature_levels - num_features):
            # The first further level is made from the raw last stage, each other one from the level before it.
            projections.append(_projection(channels, hidden_dim, kernel_size=3, stride=2, padding=1))
            channels = hidden_dim
        self.input_proj = nn.ModuleList(projections)
        self.transformer = DeformableTransformer(
            d_model=hidden_dim,
            nhead=nheads,
            num_encoder_layers=enc_layers,
            num_decoder_layers=dec_layers,
            dim_feedforward=dim_feedforward,
            dropout=dropout,
            num_feature_levels=num_feature_levels,
            dec_n_points=dec_n_points,
            enc_n_points=enc_n_points,
            num_queries=num_queries,
            with_box_refine=with_box_refine,
            two_stage=two_stage,
            query_selection=query_selection,
            class_aware=class_aware,
        )
        # Official names: position and content of learned queries; of mixed selection the content.
        self.query_embed: nn.Embedding | None = None
        if not two_stage or mixed_selection:
            self.query_embed = nn.Embedding(num_queries, hidden_dim if two_stage else hidden_dim * 2)
        num_heads = dec_layers + two_stage
        if with_box_refine:
            self.class_embed = nn.ModuleList(class_head(hidden_dim, num_classes) for _ in range(num_heads))
            # Only the first correction starts from a bare point and therefore has a size to guess: sigmoid(-2) = 0.12.
            sizes = [0.0 if two_stage or layer else -2.0 for layer in range(num_heads)]
            self.bbox_embed = nn.ModuleList(BoxHead(hidden_dim, size) for size in sizes)
        else:
            self.class_embed = nn.ModuleList([class_head(hidden_dim, num_classes)] * num_heads)
            self.bbox_embed = nn.ModuleList([BoxHead(hidden_dim, -2.0)] * num_heads)
        if with_box_refine:  # copies start equal, as in the official code
            for head in self.class_embed[1:]:
                head.load_state_dict(self.class_embed[0].state_dict())
            for head in self.bbox_embed[1:]:
                for layer, first in zip(head.layers[:-1], self.bbox_embed[0].layers[:-1]):
                    layer.load_state_dict(first.state_dict())
        self.register_load_state_dict_pre_hook(_accept_official_keys)

    @classmethod
    def from_pretrained(cls, source: str | Path) -> "DeformableDETR":
        """A trained network in eval mode, by a name of `ddetr weights list`, a hub id, an https address, a file or a
        folder: `ddetr.from_pretrained`, under the name where the field looks for it."""
        import ddetr  # what reads weights stands above the network, and is found through the package's public name

        return ddetr.from_pretrained(source)

    def forward(self, images: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> dict[str, Any]:
        """Detect.

        Args:
            images: (N, 3, H, W) float, normalised by `image_mean` and `image_std`; or N tensors (3, h, w) of any sizes,
                which are padded here.
            mask: (N, H, W) bool, True = padding; None where nothing is padded.

        Returns:
            dict with `pred_logits` (N, Q, K), `pred_boxes` (N, Q, 4) cxcywh in [0, 1] of the unpadded image,
            with aux_loss `aux_outputs` (such a dict for each decoder layer but the last), and for two-stage
            `enc_outputs` (such a dict for the proposals, S = number of cells in place of Q).
        """
        return self.detect(self.encode(images, mask))

    def encode(self, images: Tensor | Sequence[Tensor], mask: Tensor | None = None) -> Encoded:
        """Images -> what backbone and encoder make of them, and the queries: the first half of `forward`."""
        images, mask = _as_batch(images, mask)
        srcs, masks, pos_embeds = self._features(images, mask)
        queries = None if self.query_embed is None else self.query_embed.weight
        return self.transformer(srcs, masks, pos_embeds, queries, self.class_embed[-1], self.bbox_embed[-1])

    def detect(self, encoded: Encoded) -> dict[str, Any]:
        """What the queries find in the images: the second half of `forward`, and what it returns."""
        layers = self.decode(encoded, encoded.queries)
        outputs: dict[str, Any] = layers[-1]
        if self.aux_loss:
            outputs["aux_outputs"] = layers[:-1]
        if encoded.proposals is not None:
            outputs["enc_outputs"] = {"pred_logits": encoded.proposals.logits, "pred_boxes": encoded.proposals.boxes}
        return outputs

    def decode(
        self,
        encoded: Encoded,
        queries: Queries,
        attn_mask: Tensor | None = None,
        feed_forwards: Sequence[nn.Module] | None = None,
    ) -> list[dict[str, Tensor]]:
        """What any queries find: for each decoder layer `pred_logits` (N, Q, K) and `pred_boxes` (N, Q, 4).

        attn_mask, feed_forwards: as of the decoder, for queries that exist in training alone.
        """
        decoded = self.transformer.decoder(queries, encoded, self.bbox_embed, attn_mask, feed_forwards)
        return [
            {"pred_logits": head(state), "pred_boxes": boxes}
            for head, state, boxes in zip(self.class_embed, decoded.states, decoded.boxes)
        ]

    def _features(self, images: Tensor, mask: Tensor | None) -> tuple[list[Tensor], list[Tensor] | None, list[Tensor]]:
        """Images (N, 3, H, W) -> L maps (N, C, H_l, W_l), their masks (N, H_l, W_l) and position encodings."""
        backbone, encoding = self.backbone
        features = backbone(images)
        srcs = [projection(feature) for projection, feature in zip(self.input_proj, features)]
        last = features[-1]
        for projection in self.input_proj[len(features) :]:
            last = projection(last)
            srcs.append(last)
        if mask is None:
            return srcs, None, [encoding(src, None) for src in srcs]
        masks = [F.interpolate(mask[:, None].float(), size=src.shape[-2:])[:, 0].bool() for src in srcs]
        return srcs, masks, [encoding(src, level_mask) for src, level_mask in zip(srcs, masks)]


class _GroupNorm(nn.GroupNorm):
    """Also of a map of one cell with a channel for each group, which PyTorch's module refuses: its norm is the bias."""

    def forward(self, input: Tensor) -> Tensor:
        return torch.group_norm(input, self.num_groups, self.weight, self.bias, self.eps)


def _projection(in_channels: int, hidden_dim: int, **conv: int) -> nn.Sequential:
    """Convolution to hidden_dim channels and group norm of 32 groups (fewer where hidden_dim does not divide)."""
    projection = nn.Sequential(
        nn.Conv2d(in_channels, hidden_dim, **conv), _GroupNorm(math.gcd(32, hidden_dim), hidden_dim)
    )
    nn.init.xavier_uniform_(projection[0].weight)
    nn.init.zeros_(projection[0].bias)
    return projection


_AT_LEAST_ONE = ("num_classes", "hidden_dim", "num_queries", "num_feature_levels", "dec_layers", "nheads")
_AT_LEAST_ONE += ("dim_feedforward", "enc_n_points", "dec_n_points")
_CHOICES = {
    "num_backbone_levels": (3, 4),
    "position_embedding": ("sine", "learned"),
    "freeze_backbone": (None, *get_args(FreezeBackbone)),
    "query_selection": get_args(QuerySelection),
}


def _check(config: Mapping[str, Any]) -> None:
    for name, choices in _CHOICES.items():
        if config[name] not in choices:
            raise InputError(f"{name}: expected one of {', '.join(map(str, choices))}, got {one_line(config[name])}")
    if config["two_stage"] and not config["with_box_refine"]:
        raise InputError("two_stage needs with_box_refine: proposals are boxes, which only refining layers correct")
    chosen = [f"query_selection {config['query_selection']}"] if config["query_selection"] != "topk" else []
    chosen += [name for name in ("class_aware", "mixed_selection") if config[name]]
    if chosen and not config["two_stage"]:
        raise InputError(
            f"{chosen[0]} is about queries that are chosen among proposals and needs two_stage; the queries of this "
            "model are learned"
        )
    if config["dilation"] and config["num_feature_levels"] != 1:
        raise InputError(f"dilation (DC5) needs num_feature_levels 1, got {config['num_feature_levels']}")
    if config["num_backbone_levels"] == 4 > config["num_feature_levels"]:
        got = config["num_feature_levels"]
        raise InputError(f"num_backbone_levels 4 needs num_feature_levels 4 or more, got {got}")
    for name in _AT_LEAST_ONE:
        if config[name] < 1:
            raise InputError(f"{name} must be at least 1, got {config[name]}")
    if config["backbone_window"] is not None and config["backbone_window"] < 1:
        raise InputError(f"backbone_window must be at least 1, or null, got {one_line(config['backbone_window'])}")
    if config["enc_layers"] < 0:
        raise InputError(f"enc_layers must be at least 0, got {config['enc_layers']}")
    for name, most in MAX_NETWORK.items():
        if config[name] > most:
            raise InputError(f"{name} must be at most {most}, got {one_line(config[name])}")
    if config["hidden_dim"] % 4 or config["hidden_dim"] % config["nheads"]:
        raise InputError(
            f"hidden_dim must be divisible by 4 and by nheads={config['nheads']}, got {config['hidden_dim']}"
        )
    if not 0 <= config["dropout"] < 1:
        raise InputError(f"dropout must lie in [0, 1), got {config['dropout']}")


def check_fits(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> None:
    """Whether the network of `config`, which may come from a file, is no larger than the weights beside it; it is built
    without memory for that: a few bytes of configuration can ask for terabytes.

    Raises:
        InputError: it is larger, or no network of ours.
    """
    with torch.device("meta"):
        needed = sum(tensor.numel() for tensor in DeformableDETR(**config).state_dict().values())
    stored = sum(tensor.numel() for tensor in weights.values())
    if needed > stored:
        raise InputError(
            f"the weights do not fit the configuration beside them: it is of a network of {needed:,} numbers, and they "
            f"are {stored:,}"
        )


def _as_batch(images: Tensor | Sequence[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    if not isinstance(images, Tensor):
        images = list(images)
        if mask is not None:
            raise ValueError("a list of images makes its own mask: expected mask=None")
        for image in images:
            if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
                got = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
                raise ValueError(f"expected images of shape (3, h, w), got {got}")
        if len({image.shape for image in images}) == 1:
            images = torch.stack(images)
        else:
            images, mask = pad_images(images)
    if images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected images of shape (N, 3, H, W), got {tuple(images.shape)}")
    if not images.is_floating_point():
        raise ValueError(f"expected normalised floating-point images, got {images.dtype}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != (images.shape[0], *images.shape[2:])):
        raise ValueError(
            f"expected a bool mask of shape {(images.shape[0], *images.shape[2:])}, True = padding, "
            f"got {mask.dtype} {tuple(mask.shape)}"
        )
    return images, mask


def _accept_official_keys(model: DeformableDETR, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take out of a state dict what the official code stores twice or beside the weights.

    Its refining decoder holds the heads a second time (`transformer.decoder.bbox_embed.*`), and profiling tools leave
    `*total_params` and `*total_ops`.
    """
    for key in [key for key in state_dict if key.startswith(prefix)]:
        name = key.removeprefix(prefix)
        if name.startswith(("transformer.decoder.bbox_embed.", "transformer.decoder.class_embed.")):
            twin = prefix + name.removeprefix("transformer.decoder.")
            if twin in state_dict and not torch.equal(state_dict[twin], state_dict[key]):
                raise ValueError(f"{key} and {twin} are the same head but hold different values")
            state_dict.setdefault(twin, state_dict[key])
            del state_dict[key]
        elif name.endswith(("total_params", "total_ops")):
            del state_dict[key]
    tracked = {prefix + name for name, _ in model.named_buffers() if name.endswith("num_batches_tracked")}
    counters = [key for key in state_dict if key.startswith(prefix) and key.endswith("num_batches_tracked")]
    for key in set(counters) - tracked:
        del state_dict[key]  # from a trainable batch norm into a frozen one
    for key in tracked - set(state_dict):
        if key.replace("num_batches_tracked", "running_mean") in state_dict:  # from a frozen one into a trainable one
            state_dict[key] = torch.zeros((), dtype=torch.long)


def build_criterion(model: DeformableDETR, loss_weights: LossWeights = LossWeights(), **options: Any) -> SetCriterion:
    """The criterion that fits the outputs of `model`; options: those of `SetCriterion` that do not follow from it."""
    num_aux = model.config["dec_layers"] - 1 if model.aux_loss else 0
    if model.auxiliary is not None:
        config = model.auxiliary.config
        options = {"denoising": config.denoising > 0, "one_to_many": config.one_to_many} | options
    options = {"two_stage": model.two_stage, "class_aware": model.config["class_aware"]} | options
    return SetCriterion(model.config["num_classes"], loss_weights, num_aux=num_aux, **options)


# Flags of the official training script that decide nothing about model, loss or post-processing.
TRAINING_FLAGS = frozenset(
    "lr lr_backbone_names lr_backbone lr_linear_proj_names lr_linear_proj_mult batch_size weight_decay epochs lr_drop "  # noqa: SIM905
    "lr_drop_epochs clip_max_norm sgd frozen_weights dataset_file coco_path coco_panoptic_path remove_difficult "
    "output_dir device seed resume start_epoch eval num_workers cache_mode mask_loss_coef dice_loss_coef "
    "position_embedding_scale".split()
)


def build_model(args: Mapping[str, Any] | Namespace) -> tuple[DeformableDETR, SetCriterion, dict[str, PostProcess]]:
    """Model, criterion and post-processors from the official flag names.

    Args:
        args: a dict or Namespace. Model flags are the constructor's arguments of `DeformableDETR`, loss flags the
            fields of `LossWeights`; the official training flags are accepted. `num_classes` is 91 where it is not
            given, as in the official code for COCO.

    Returns:
        model, criterion, {"bbox": PostProcess}.

    Raises:
        InputError: an unknown flag, with the nearest known one; `masks`, which is not supported.
    """
    flags = dict(args if isinstance(args, Mapping) else vars(args))
    if flags.pop("masks", False):
        raise InputError("masks (segmentation) is not supported: expected masks=False")
    model_flags = set(inspect.signature(DeformableDETR).parameters)
    loss_flags = set(LossWeights.__dataclass_fields__)
    known = model_flags | loss_flags | TRAINING_FLAGS | {"masks", "max_detections"}
    for name in flags:
        if name not in known:
            raise InputError(f"unknown flag {name!r}{did_you_mean(name, known)}")
    if flags.get("lr_backbone", 1) <= 0 and "freeze_backbone" not in flags:
        flags["freeze_backbone"] = "all"  # the official meaning of a zero rate
    model = DeformableDETR(**{"num_classes": 91} | {name: flags[name] for name in flags if name in model_flags})
    criterion = build_criterion(model, LossWeights(**{name: flags[name] for name in flags if name in loss_flags}))
    return model, criterion, {"bbox": PostProcess(flags.get("max_detections", 100))}

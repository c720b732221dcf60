"""What the families of timm need to work at any image size. A family is a module of timm (`timm.list_modules()`); one
that is not named here needs nothing."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ddetr.errors import InputError


@dataclass(frozen=True)
class Family:
    """How the networks of a family come to work at any image size.

    Attributes:
        kind: "pyramid" gives maps of several strides; "swin", "coatnet" and "hiera" do too, with a part that is ours;
            "plain" is a vision transformer of one stride.
        multiple: images are padded with zeros, right and at the bottom, to a multiple of it.
        arguments: of timm's function, where they make the size free.
        why_fixed: why it works at one image size alone; empty where it does not.
    """

    kind: Literal["pyramid", "swin", "coatnet", "hiera", "plain"] = "pyramid"
    multiple: int = 1
    arguments: Mapping[str, Any] = field(default_factory=dict)
    why_fixed: str = ""


_PLAIN = Family("plain", 16, {"dynamic_img_size": True})
# Their layers of stride 2 or 4 leave out what remains at the right and bottom, or cannot add maps of odd sizes.
_EVEN = Family(multiple=32)
# `always_partition`: windows stay as large and shifted as they were trained, also where a map is smaller than at 224.
_WINDOWS = Family("swin", 4, {"strict_img_size": False, "always_partition": True})
_TABLES = Family(why_fixed="its attention has a table of positions for one image size")
_GRID = Family(why_fixed="its layers mix the cells of a grid of one size")

ALTERNATIVES = "Take for instance convnext_tiny or swin_tiny_patch4_window7_224"

_FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("vision_transformer", "deit", "eva"), _PLAIN),
    **dict.fromkeys(("swin_transformer", "swin_transformer_v2"), _WINDOWS),
    "swin_transformer_v2_cr": Family(why_fixed="its windows are made for one image size"),
    "maxxvit": Family("coatnet", 32),
    **dict.fromkeys(
        ("convnext", "csatv2", "densenet", "dla", "edgenext", "fasternet", "focalnet", "hieradet_sam2"), _EVEN
    ),
    "hiera": Family("hiera", 32),
    **dict.fromkeys(("hrnet", "inception_next", "rdnet", "tresnet", "twins"), _EVEN),
    **dict.fromkeys(
        ("beit", "cait", "coat", "convit", "crossvit", "efficientformer", "efficientformer_v2", "gcvit"), _TABLES
    ),
    **dict.fromkeys(("levit", "mvitv2", "nest", "pit", "tnt"), _TABLES),
    "mlp_mixer": _GRID,
}


def family_of(name: str) -> Family:
    """The family of a model of timm.

    Raises:
        InputError: the model works at one image size alone.
    """
    import timm

    family = next((f for module, f in _FAMILIES.items() if timm.models.is_model_in_modules(name, [module])), Family())
    if timm.models.is_model_in_modules(name, ["byoanet"]) and "bot" in name:  # bottleneck transformers; others are free
        family = _TABLES
    if family.why_fixed:
        raise InputError(
            f"backbone {name!r} cannot be used: {family.why_fixed}, and a detector sees images of many. {ALTERNATIVES}"
        )
    return family

"""Small networks of the families that have no small one in timm: its own networks with fewer blocks and channels."""

import importlib
from collections.abc import Iterator
from typing import Any

import pytest

_ONE_HEAD = {"num_heads": (1, 1, 2, 2)}
_PLAIN = {"embed_dim": 32, "depth": 8, "num_heads": 2}
# Name -> (family, network of timm, what is smaller)
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tiny_swin": (
        "swin_transformer",
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": (2, 1, 2, 2)} | _ONE_HEAD,
    ),
    "tiny_swinv2": (
        "swin_transformer_v2",
        "swinv2_tiny_window8_256",
        {"embed_dim": 16, "depths": (2, 1, 1, 2)} | _ONE_HEAD,
    ),
    "tiny_convnext": ("convnext", "convnext_tiny", {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)}),
    "tiny_hiera": ("hiera", "hiera_tiny_224", {"embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "tiny_hiera_abswin": ("hiera", "hiera_small_abswin_256", {"embed_dim": 16, "stages": (1, 1, 2, 1)}),
    "tiny_vit": ("vision_transformer", "vit_tiny_patch16_224", _PLAIN),
    "tiny_dinov2": ("vision_transformer", "vit_small_patch14_dinov2", _PLAIN | {"img_size": 70}),
    "tiny_siglip": ("vision_transformer", "vit_base_patch16_siglip_224", _PLAIN),
    "tiny_clip": ("vision_transformer", "vit_base_patch32_clip_224", _PLAIN),
    "tiny_deit": ("deit", "deit_tiny_distilled_patch16_224", _PLAIN),
    "tiny_eva02": ("eva", "eva02_tiny_patch14_224", _PLAIN),
    "tiny_dinov3": ("eva", "vit_small_patch16_dinov3", _PLAIN),
    "tiny_rope_mixed": ("eva", "vit_small_patch16_rope_mixed_224", _PLAIN),
}


@pytest.fixture(scope="session", autouse=True)
def tiny_networks() -> Iterator[None]:
    """They are known to timm under the names of `TINY` in the whole process; no other test asks for them."""
    from timm.models import register_model

    for name, (family, whole, smaller) in TINY.items():
        build = getattr(importlib.import_module(f"timm.models.{family}"), whole)

        def network(pretrained: bool = False, build: Any = build, smaller: Any = smaller, **options: Any) -> Any:
            return build(pretrained, **smaller | options)

        network.__name__, network.__module__ = name, f"timm.models.{family}"
        register_model(network)
    return

"""Prints the image's build arguments out of versions.json, one per line: `python3 container/build_arguments.py
[VARIANT] [BASE_IMAGE]`.

The Dockerfile has the same values as defaults, for a build without make; a test keeps them equal.
"""

import json
import sys
from pathlib import Path

VERSIONS = json.loads(Path(__file__).with_name("versions.json").read_text(encoding="utf-8"))


def build_arguments(variant: str = "", base_image: str = "") -> dict[str, str]:
    """Names and values for `--build-arg`; empty: the default variant, the pinned base image."""
    image = VERSIONS["image"]
    variant = variant or image["default_variant"]
    if variant not in VERSIONS["variants"]:
        raise SystemExit(f"error: VARIANT={variant}: expected one of {', '.join(VERSIONS['variants'])}")
    libraries = VERSIONS["variants"][variant]
    return {
        "BASE_IMAGE": base_image or f"{image['base']}@{image['base_digest']}",
        # A base image of one's own: its digest is part of its name, or it has none.
        "BASE_DIGEST": image["base_digest"] if not base_image else base_image.partition("@")[2],
        "VARIANT": variant,
        "IMAGE_VERSION": libraries["tag"],
        "TORCH": libraries["torch"],
        "TORCHVISION": libraries["torchvision"],
        "CUDA": libraries["cuda"],
        "CUDNN": libraries["cudnn"],
        "NCCL": libraries["nccl"],
    }


if __name__ == "__main__":
    for name, value in build_arguments(*sys.argv[1:]).items():
        sys.stdout.write(f"{name}={value}\n")

"""docs/environment.md says what versions.json says."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
VERSIONS = json.loads((ROOT / "container" / "versions.json").read_text(encoding="utf-8"))
DEFAULT = VERSIONS["variants"][VERSIONS["image"]["default_variant"]]


def row(first: str) -> list[str]:
    """The cells of the table's row that begins so."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("variant", VERSIONS["variants"])
def test_the_builds(variant: str) -> None:
    facts = VERSIONS["variants"][variant]
    drivers = VERSIONS["toolkits"]["drivers"][facts["cuda"]]
    _, torch, first, last, driver, oldest, cudnn, nccl, here = row(f"`{variant}`")
    assert torch == facts["torch"]
    assert first.split()[0] == facts["architectures"][0]
    assert last.split()[0] == facts["architectures"][-1]
    assert [driver, oldest, cudnn, nccl] == [
        drivers["driver"],
        drivers["driver_minimum"],
        facts["cudnn"],
        facts["nccl"],
    ]
    assert ("the default" in here) == (variant == VERSIONS["image"]["default_variant"])
    assert ("not built by us" in here) != facts["locked"]
    assert not facts["locked"] or f"`{VERSIONS['image']['name']}:{facts['tag']}`" in here


def test_what_stands_in_the_place_of_what() -> None:
    assert f"{DEFAULT['torch']}, with torchvision {DEFAULT['torchvision']}" in row("PyTorch 2.6")[2]
    assert f"Python {VERSIONS['image']['python']}" in row("Ubuntu 20.04")[2]
    assert f"CUDA {DEFAULT['cuda']}" in row("CUDA 12.1")[2]
    assert DEFAULT["cudnn"] in row("cuDNN 9.1")[2]
    assert "12.1" not in {variant["cuda"] for variant in VERSIONS["variants"].values()}


def test_the_image_that_the_page_and_the_readme_name() -> None:
    names = {f"{VERSIONS['image']['name']}:{variant['tag']}" for variant in VERSIONS["variants"].values()}
    default = f"{VERSIONS['image']['name']}:{DEFAULT['tag']}"
    for path in ("README.md", "docs/environment.md", "Makefile", "compose.yaml"):
        text = (ROOT / path).read_text(encoding="utf-8")
        found = {name.rstrip(".") for name in re.findall(r"pytorch-cuda:[\w.]+", text)}
        assert {default} <= found <= names, path


def test_what_is_said_of_the_newer_pytorch() -> None:
    text = " ".join(PAGE.split())
    for variant in VERSIONS["variants"].values():
        if variant["tag"] != DEFAULT["tag"]:
            libraries = (
                f"PyTorch {variant['torch']} with torchvision {variant['torchvision']} for CUDA {variant['cuda']}"
            )
            driver = VERSIONS["toolkits"]["drivers"][variant["cuda"]]["driver_minimum"]
            assert f"{libraries}, which takes driver {driver} or newer" in text

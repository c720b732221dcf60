"""docs/environment.md says what versions.json says."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "environment.md").read_text(encoding="utf-8")
VERSIONS = json.loads((ROOT / "container" / "versions.json").read_text(encoding="utf-8"))


def row(first: str) -> list[str]:
    """The cells of the table's row that begins so."""
    line = next(line for line in PAGE.splitlines() if line.startswith(f"| {first} |"))
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.parametrize("variant", VERSIONS["variants"])
def test_the_builds(variant: str) -> None:
    facts = VERSIONS["variants"][variant]
    drivers = VERSIONS["toolkits"]["drivers"][facts["cuda"]]
    _, first, last, driver, oldest, cudnn, nccl, here = row(f"`{variant}`")
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


def test_what_stands_in_the_place_of_what() -> None:
    assert f"{VERSIONS['torch']}, with torchvision {VERSIONS['torchvision']}" in row("PyTorch 2.6")[2]
    assert f"Python {VERSIONS['image']['python']}" in row("Ubuntu 20.04")[2]
    default = VERSIONS["variants"][VERSIONS["image"]["default_variant"]]
    assert f"CUDA {default['cuda']}" in row("CUDA 12.1")[2]
    assert default["cudnn"] in row("cuDNN 9.1")[2]
    assert "12.1" not in {variant["cuda"] for variant in VERSIONS["variants"].values()}


def test_the_image_that_the_page_and_the_readme_name() -> None:
    name = f"{VERSIONS['image']['name']}:{VERSIONS['image']['tag']}"
    for path in ("README.md", "docs/environment.md", "Makefile", "compose.yaml"):
        text = (ROOT / path).read_text(encoding="utf-8")
        assert set(re.findall(r"pytorch-cuda:v[\d.]+", text)) == {name}, path

"""For a change that is to change no result: the weights of short runs are those of an earlier commit, bit for bit.

    DDETR_BEFORE=COMMIT .venv/bin/pytest -m slow tests/test_same_bits.py

The command line is what both commits have in common, so it is what starts the runs.
"""

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
BEFORE = os.environ.get("DDETR_BEFORE")
OPTIONS = [
    *("--data.image_size", "96", "--model.backbone", "test_resnet", "--model.pretrained_backbone", "false"),
    *("--model.hidden_dim", "32", "--model.num_queries", "12", "--model.enc_layers", "1", "--model.dec_layers", "2"),
    *("--model.dim_feedforward", "64", "--model.num_feature_levels", "3", "--epochs", "2", "--batch_size", "4"),
    *("--device_batch_size", "2", "--devices", "1", "--device", "cpu", "--seed", "3", "--num_pictures", "0"),
]
RUNS = {
    "two stages, preflight": [],
    "one stage": ["--model.two_stage", "false", "--model.with_box_refine", "false", "--preflight", "false"],
    "average, cosine": ["--optim.ema_decay", "0.99", "--optim.schedule", "cosine", "--optim.warmup_steps", "3"],
    "fp16": ["--precision", "fp16", "--preflight", "false"],
    "bf16, buckets, checkpointing": [
        *("--precision", "bf16", "--data.buckets", "true", "--activation_checkpointing", "true", "--preflight", "false")
    ],
    "shapes, workers, SGD": [
        *("--data.padded_shapes", "2", "--data.num_workers", "2", "--optim.sgd", "true", "--preflight", "false")
    ],
    "two processes": ["--devices", "2", "--preflight", "false"],
}
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BEFORE is None, reason="DDETR_BEFORE names the commit to compare with"),
    pytest.mark.timeout(1200),
]


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tree of the earlier commit, with its own kernel."""
    folder = tmp_path_factory.mktemp("before")
    packed = subprocess.run(["git", "archive", str(BEFORE), "ddetr"], cwd=ROOT, capture_output=True, check=True).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    build = [sys.executable, "-B", str(folder / "ddetr/ops/native/build.py")]
    subprocess.run(build, cwd=folder, capture_output=True, check=True)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from ddetr.datasets import draw_shapes

    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", 24, 6, 96)


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return {key: tensor for inner, one in items for key, tensor in tensors(one, f"{name}.{inner}").items()}


@pytest.mark.parametrize("options", RUNS.values(), ids=RUNS)
def test_weights_are_those_of_the_commit_before(options: list[str], before: Path, data: Path, tmp_path: Path) -> None:
    weights = []
    for root, name in ((before, "before"), (ROOT, "now")):
        command = [sys.executable, "-m", "ddetr", "train", "--data", str(data), *OPTIONS, *options]
        done = subprocess.run(
            [*command, "--output", str(tmp_path / name)],
            cwd=tmp_path,
            env=os.environ | {"PYTHONPATH": str(root)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{name}: {done.stderr[-3000:]}"
        weights.append(tensors(torch.load(tmp_path / name / "last.pth", map_location="cpu", weights_only=True)))
    assert weights[0].keys() == weights[1].keys()
    assert weights[0]
    differ = [name for name, tensor in weights[0].items() if not torch.equal(tensor, weights[1][name])]
    assert not differ, f"{len(differ)} of {len(weights[0])} tensors differ, for instance {differ[0]}"

import os

# Before PyTorch loads, as the command line does it: see ddetr/cli/main.py.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):  # `make test`: they share the cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
TINY_MODEL = {
    "backbone": "test_resnet",
    "pretrained_backbone": False,
    "hidden_dim": 32,
    "nheads": 4,
    "enc_layers": 1,
    "dec_layers": 2,
    "dim_feedforward": 64,
    "num_queries": 12,
    "num_feature_levels": 2,
    "with_box_refine": True,
    "two_stage": False,
}


# The files that take longest, in this order the first (`make test` gives each file to one process): one that began last
# would be waited for. xdist's own order is by the number of tests, and theirs are few.
LONGEST_FIRST = [
    "notebooks/test_notebooks.py",
    "engine/test_resume.py",
    "engine/test_distributed_training.py",
    "engine/test_compile.py",
    "engine/test_survival.py",
    "engine/test_train.py",
    "checkpoint/test_hostile_files.py",
    "ops/test_triton.py",
    "bench/test_bench_gpu.py",
    "models/test_deformable_detr.py",
    "engine/blackbox/test_guard.py",
    "ops/test_operator.py",
    "engine/test_run_report.py",
    "test_readme.py",
    "doctor/test_doctor_trial.py",
    "doctor/test_doctor_command.py",
    "models/test_parity.py",
    "inference/test_optimize.py",
]


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {Path(__file__).parent / name: place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: places.get(item.path, len(places)))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with coco_tiny and bccd; what needs it is skipped where it is absent, and tried on a drawn set
    everywhere."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the real data is not here: ../shared/data beside the project")
    return SHARED_DATA


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight training and four validation images of drawn shapes, 64 pixels."""
    from ddetr.datasets import draw_shapes

    return draw_shapes(tmp_path_factory.mktemp("data") / "shapes", 8, 4, 64)


@pytest.fixture(scope="session")
def drawn_coco(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set with the peculiarities of COCO: see `drawn_sets.draw_coco`. To be read only."""
    from drawn_sets import draw_coco

    return draw_coco(tmp_path_factory.mktemp("data") / "coco")


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Pascal VOC set with the peculiarities of BCCD: see `drawn_sets.draw_cells`. To be read only."""
    from drawn_sets import draw_cells

    return draw_cells(tmp_path_factory.mktemp("data") / "cells")


@pytest.fixture(params=["drawn", "real"])
def any_coco(request: pytest.FixtureRequest, drawn_coco: Path) -> Path:
    """The drawn set; and the real one where it is."""
    return drawn_coco if request.param == "drawn" else request.getfixturevalue("shared_data") / "coco_tiny"


@pytest.fixture(scope="session")
def tiny_model() -> dict[str, Any]:
    """Constructor arguments of a detector that trains in a fraction of a second."""
    return dict(TINY_MODEL)


@pytest.fixture(scope="session")
def tiny_run(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The `RunResult` of a tiny detector that has learnt the training images of `shapes`, on which it is validated."""
    from ddetr.datasets.config import DataConfig
    from ddetr.engine.config import OptimConfig, TrainConfig
    from ddetr.engine.train import train

    return train(
        TrainConfig(
            DataConfig(str(shapes), val_split="train", augmentation="none", image_size=64, num_workers=0),
            TINY_MODEL | {"dropout": 0.0},
            optim=OptimConfig(lr=5e-3, clip_max_norm=1.0),
            epochs=25,
            batch_size=8,
            device_batch_size=8,
            val_every=10,
            output=str(tmp_path_factory.mktemp("runs") / "tiny run"),
            log_every=10,
            num_pictures=2,
            preflight=False,
        )
    )


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that plays the hub and a host of files (`served_weights.Served`), for this process and those that it
    starts; the caches of both are empty, and are the test's own."""
    from huggingface_hub import constants
    from served_weights import serve

    with serve() as found:
        home = tmp_path / "hub home"
        environment = {"HF_ENDPOINT": found.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        for name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "DDETR_CACHE"):
            monkeypatch.delenv(name, raising=False)
        # The library has read its environment when it was imported.
        monkeypatch.setattr(constants, "ENDPOINT", found.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield found

from pathlib import Path
from typing import Any

import pytest

from ddetr.datasets.config import DataConfig
from ddetr.engine.config import OptimConfig


@pytest.fixture
def short_run(shapes: Path, tiny_model: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `train()`: two epochs of two steps, with all that draws random numbers: augmentation and dropout."""
    return {
        "data": DataConfig(str(shapes), image_size=64, num_workers=0),
        "model": tiny_model | {"dropout": 0.1},
        "optim": OptimConfig(lr=1e-3),
        "epochs": 2,
        "batch_size": 4,
        "device_batch_size": 2,
        "log_every": 1,
        "num_pictures": 0,
        "preflight": False,
    }

import shutil
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def run_folder(tiny_run: Any, tmp_path: Path) -> Path:
    """A copy of what a short training run left, without its checkpoints: to be broken."""
    return Path(
        shutil.copytree(
            tiny_run.path, tmp_path / "a run", ignore=shutil.ignore_patterns("*.pth", "*.ckpt", "report.html")
        )
    )

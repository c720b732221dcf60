"""How long training waits for data, what the log says of it, and the memory beside it."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ddetr.engine.callbacks import _peak_memory_mb
from ddetr.engine.loading import data_wait
from ddetr.engine.loading.data_wait import DataWait


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(data_wait.time, "perf_counter", lambda: clock.now)
    return clock


def test_only_the_fetch_of_a_training_batch_is_a_wait(clock: SimpleNamespace) -> None:
    wait = DataWait()
    for region, seconds in (("data wait", 3.0), ("host to device", 5.0), ("the rest", 7.0), ("data wait", 1.0)):
        with wait.region(region):
            clock.now += seconds
    assert wait.share(16.0) == 0.25
    wait.restart()
    assert wait.share(16.0) == 0.0


@pytest.mark.parametrize(
    ("shares", "expected"),
    [
        ([0.5, 0.5, 0.5, 0.5, 0.9, 0.9, 0.9], 1),  # once
        ([0.8, 0.0, 0.0, 0.0, 0.0, 0.0], 0),  # one slow stretch
        ([0.2] * 12, 0),
        ([0.0, 0.0, 0.0, 0.4, 0.4, 0.4], 1),
        ([1.0, 1.0], 0),  # not long enough to tell
    ],
)
def test_much_waiting_is_said_once_with_the_cure(
    caplog: pytest.LogCaptureFixture, shares: list[float], expected: int
) -> None:
    """Each share is of ten seconds; a look is taken every half a minute."""
    wait = DataWait()
    with caplog.at_level("WARNING", "ddetr"):
        for share in shares:
            wait.warn(share, 10.0, num_workers=2)
    assert len(caplog.records) == expected
    for record in caplog.records:
        assert "% of the time is spent waiting for images: raise --data.num_workers (now 2" in record.getMessage()


def test_a_row_tells_the_share_and_leaves_memory_empty_on_a_cpu(tiny_run: Any) -> None:
    header, *lines = (tiny_run.path / "train.csv").read_text().splitlines()
    rows = [dict(zip(header.split(","), line.split(","))) for line in lines]
    assert all(0 < float(row["data_wait"]) <= 1 for row in rows)
    assert {row["gpu_memory_mb"] for row in rows} == {""}


def test_memory_is_the_peak_in_megabytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 3 * 2**20 + 5)
    trainers = {
        kind: SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device(kind))) for kind in ("cuda", "cpu")
    }
    assert _peak_memory_mb(trainers["cuda"]) == 3
    assert _peak_memory_mb(trainers["cpu"]) is None

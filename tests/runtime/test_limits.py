"""What containers leave of a machine, from made-up roots of a file system."""

import os
from pathlib import Path

import pytest

from ddetr.doctor import machine
from ddetr.runtime.limits import available_cores


def test_cores_are_those_of_the_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    assert available_cores(tmp_path) == 12
    own = tmp_path / "proc/self/cgroup"
    own.parent.mkdir(parents=True)
    own.write_text("0::/job\n")
    job = tmp_path / "sys/fs/cgroup/job"
    job.mkdir(parents=True)
    (job / "cpu.max").write_text("max 100000\n")
    assert available_cores(tmp_path) == 12
    (job / "cpu.max").write_text("250000 100000\n")
    assert available_cores(tmp_path) == 3
    (tmp_path / "sys/fs/cgroup/cpu.max").write_text("200000 100000\n")
    assert available_cores(tmp_path) == 2
    assert machine.look(str(tmp_path)).cores == 2
    old = tmp_path / "old"
    (old / "sys/fs/cgroup/cpu").mkdir(parents=True)
    for name, value in (("cpu.cfs_quota_us", "400000"), ("cpu.cfs_period_us", "100000")):
        (old / "sys/fs/cgroup/cpu" / name).write_text(value)
    assert available_cores(old) == 4
    (old / "sys/fs/cgroup/cpu/cpu.cfs_quota_us").write_text("-1")
    assert available_cores(old) == 12


def test_a_quota_of_a_group_around_the_own_one_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("5:cpu,cpuacct:/pod/container\n4:memory:/\n")
    pod = tmp_path / "sys/fs/cgroup/cpu/pod"
    (pod / "container").mkdir(parents=True)
    (pod / "container/cpu.cfs_quota_us").write_text("-1")
    (pod / "container/cpu.cfs_period_us").write_text("100000")
    (pod / "cpu.cfs_quota_us").write_text("250000")
    (pod / "cpu.cfs_period_us").write_text("100000")
    assert available_cores(tmp_path) == 3

"""What the operating system shows, from made-up roots of a file system."""

import os
import threading
from pathlib import Path

import pytest

from ddetr.doctor import machine
from ddetr.doctor.facts import Hardware


def add_pci(root: Path, address: str, vendor: str, kind: str, driver: str | None = None) -> None:
    device = root / "sys/bus/pci/devices" / address
    device.mkdir(parents=True)
    (device / "vendor").write_text(f"{vendor}\n")
    (device / "class").write_text(f"{kind}\n")
    if driver:
        folder = root / "sys/bus/pci/drivers" / driver
        folder.mkdir(parents=True, exist_ok=True)
        (device / "driver").symlink_to(folder)


def test_gpus_on_the_pci_bus(tmp_path: Path) -> None:
    add_pci(tmp_path, "0000:01:00.0", "0x10de", "0x030000", "nouveau")
    add_pci(tmp_path, "0000:01:00.1", "0x10de", "0x040300", "snd_hda_intel")  # the same card's sound
    add_pci(tmp_path, "0000:02:00.0", "0x10de", "0x030200")
    add_pci(tmp_path, "0000:03:00.0", "0x8086", "0x030000", "i915")
    found = machine.look_at_hardware(str(tmp_path))
    assert found == Hardware(gpus_on_pci=2, pci_drivers=["nouveau"])
    assert found.seen


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023\n", "535.104.05"),
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n", "580.65.06"),
        ("", None),
    ],
)
def test_the_kernel_module_and_its_devices(tmp_path: Path, text: str, version: str | None) -> None:
    (tmp_path / "proc/driver/nvidia").mkdir(parents=True)
    (tmp_path / "proc/driver/nvidia/version").write_text(text)
    (tmp_path / "dev").mkdir()
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / "dev" / name).touch()
    found = machine.look_at_hardware(str(tmp_path))
    assert found == Hardware(gpus_on_pci=None, kernel_module=version, devices=["/dev/nvidia0", "/dev/nvidia1"])


def test_a_machine_without_anything(tmp_path: Path) -> None:
    found = machine.look_at_hardware(str(tmp_path))
    assert found == Hardware()
    assert not found.seen


def test_a_driver_in_a_folder_of_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "usr/local/nvidia/lib64"
    folder.mkdir(parents=True)
    assert machine.look_at_hardware(str(tmp_path)).driver_folder is None
    (folder / "libcuda.so.1").touch()
    assert machine.look_at_hardware(str(tmp_path)).driver_folder == "/usr/local/nvidia/lib64"


def test_wsl_shows_no_nvidia_gpu_by_its_device(tmp_path: Path) -> None:
    """/dev/dxg is there for an Intel GPU as well."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/dxg").touch()
    assert not machine.look_at_hardware(str(tmp_path)).seen
    assert machine.look(str(tmp_path)).wsl


def test_wsl_in_a_container_without_its_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not machine.look(str(tmp_path)).wsl
    monkeypatch.setattr(machine.platform, "release", lambda: "5.15.167.4-microsoft-standard-WSL2")
    assert machine.look(str(tmp_path)).wsl


@pytest.mark.parametrize(
    ("file", "variable", "kind"),
    [
        (".dockerenv", None, "docker"),
        ("run/.containerenv", None, "podman"),
        (".dockerenv", "KUBERNETES_SERVICE_HOST", "kubernetes"),
        (None, "container", "container"),
        (None, None, ""),
    ],
)
def test_containers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str | None, variable: str | None, kind: str
) -> None:
    for name in ("KUBERNETES_SERVICE_HOST", "container"):
        monkeypatch.delenv(name, raising=False)
    if file:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).touch()
    if variable:
        monkeypatch.setenv(variable, "10.0.0.1")
    assert machine.container(tmp_path) == kind


def test_the_system_is_named(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Debian"\nPRETTY_NAME="Debian GNU/Linux 13 (trixie)"\n')
    assert machine.look(str(tmp_path)).system.startswith("Debian GNU/Linux 13 (trixie), ")


def test_folders(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "a.jpg").touch()
    found = machine.look_at_folder(str(data), asked_for=True, to_write=False)
    assert (found.exists, found.is_folder, found.readable, found.writable, found.entries) == (True, True, True, True, 1)
    assert not found.mounted
    assert found.free is not None
    assert found.free > 0
    missing = machine.look_at_folder(str(tmp_path / "a" / "b"), asked_for=True, to_write=True)
    assert (missing.exists, missing.writable, missing.error) == (False, True, None)
    assert missing.free == pytest.approx(found.free, rel=0.5)
    file = machine.look_at_folder(str(data / "a.jpg"), asked_for=True, to_write=False)
    assert (file.exists, file.is_folder) == (True, False)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads and writes everything")
def test_a_folder_that_is_closed(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir()
    closed.chmod(0o000)
    found = machine.look_at_folder(str(closed), asked_for=True, to_write=False)
    closed.chmod(0o700)
    assert (found.exists, found.readable, found.writable) == (True, False, False)


def test_a_folder_that_cannot_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "listdir", refuse)
    found = machine.look_at_folder(str(tmp_path), asked_for=True, to_write=False)
    assert (found.exists, found.readable, found.error) == (True, False, "Permission denied")


def test_a_file_system_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = threading.Event()

    def wait(path: str) -> list[str]:
        answer.wait(60)
        return []

    monkeypatch.setattr(os, "listdir", wait)
    monkeypatch.setattr(machine, "_PATIENCE", 0.2)
    found = machine.look_at_folder(str(tmp_path), asked_for=True, to_write=False)
    answer.set()
    assert (found.readable, found.error) == (False, "no answer in 0.2 s")


def test_limits_of_this_machine() -> None:
    found = machine.look_at_limits()
    if os.path.isdir("/dev/shm"):
        assert found.shared_memory is not None
        assert found.shared_memory_free is not None
        assert found.shared_memory >= found.shared_memory_free
    assert found.open_files is None or found.open_files > 0

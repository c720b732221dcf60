"""A file that could not be written to its end: the reason is what is raised, and the old file is still there."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from ddetr.weight_files.files import write_file, write_safetensors


@pytest.mark.parametrize("reason", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_the_reason_is_raised_and_not_what_pytorchs_writer_makes_of_it(
    reason: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> None:
        try:
            raise reason
        finally:
            raise RuntimeError("unexpected pos 2161152 vs 2161040")  # of the zip archive that is closed too early

    file = tmp_path / "last.ckpt"
    write_file(file, {"x": torch.zeros(2)})
    before = file.read_bytes()
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(type(reason)):
        write_file(file, {"x": torch.ones(2)})
    assert file.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


def test_a_full_disk_is_the_systems_error_for_safetensors_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    file = tmp_path / "a.safetensors"
    monkeypatch.setattr("ddetr.weight_files.files.save_file", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        write_safetensors(file, {"x": torch.zeros(2)}, {})
    assert caught.value.filename == str(file)
    assert not list(tmp_path.iterdir())

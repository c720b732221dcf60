"""A file that could not be written to its end: the reason is what is raised, and the old file is still there."""

from pathlib import Path
from typing import Any

import pytest
import torch

from ddetr.weight_files.files import write_file


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

"""Which state a run is resumed from: the newest whole one."""

import errno
from pathlib import Path

import pytest
import torch

from ddetr.engine.run.states import check_training_state, newest_state, set_aside_damaged
from ddetr.errors import InputError


def write_state(file: Path, step: int, value: float = 0.5) -> bytes:
    weights = torch.full((1000,), value)
    torch.save({"pytorch-lightning_version": "2.6.6", "global_step": step, "state_dict": {"w": weights}}, file)
    return file.read_bytes()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_state(tmp_path / "previous.ckpt", step=0)
    write_state(tmp_path / "last.ckpt", step=1)
    return tmp_path


def test_a_training_state_is_told_from_weights(tmp_path: Path) -> None:
    file = tmp_path / "last.ckpt"
    write_state(file, 1)
    check_training_state(file)
    torch.save({"model": {"x": torch.zeros(1)}}, file)
    with pytest.raises(InputError, match="holds weights, not the state of a run: start from them with --weights"):
        check_training_state(file)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="is no training state, or a damaged one"):
        check_training_state(file)


def test_a_damaged_state_gives_way_to_the_one_before(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    last, previous = folder / "last.ckpt", folder / "previous.ckpt"
    whole = last.read_bytes()
    assert newest_state(folder) == last
    last.write_bytes(whole[: len(whole) // 2])
    assert newest_state(folder) == previous
    assert "last.ckpt is no training state, or a damaged one" in caplog.text
    last.unlink()
    assert newest_state(folder) == previous
    previous.write_bytes(b"")
    with pytest.raises(InputError, match="previous.ckpt is no training state, or a damaged one"):
        newest_state(folder)


@pytest.mark.parametrize("damage", ["bit", "page"])
def test_a_state_whose_bytes_have_changed_is_not_taken(
    folder: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Both load without a word otherwise: PyTorch looks at no checksum."""
    last = folder / "last.ckpt"
    content = bytearray(last.read_bytes())
    place = content.index(torch.full((8,), 0.5).numpy().tobytes()) + 100
    content[place : place + 512 * (damage == "page") + 1] = bytes(
        [content[place] ^ 4] if damage == "bit" else 512 * (damage == "page") + 1
    )
    last.write_bytes(content)
    loaded = torch.load(last, weights_only=True)["state_dict"]["w"]
    assert not torch.equal(loaded, torch.full((1000,), 0.5))
    assert newest_state(folder) == folder / "previous.ckpt"
    assert "last.ckpt is damaged: the checksum of" in caplog.text


def test_a_damaged_archive_is_never_a_traceback(folder: Path) -> None:
    """A bit may flip anywhere, in the table of contents too."""
    last = folder / "last.ckpt"
    whole = last.read_bytes()
    for place in range(0, len(whole), 41):
        last.write_bytes(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        newest = newest_state(folder)
        if newest == last:
            assert torch.equal(torch.load(last, weights_only=True)["state_dict"]["w"], torch.full((1000,), 0.5))


def test_a_file_that_cannot_be_read_now_is_not_damaged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(*_: object, **__: object) -> None:
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(torch, "load", stale)
    with pytest.raises(OSError, match="Stale file handle"):
        newest_state(folder)


def test_a_state_that_holds_nan_is_not_taken(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_state(folder / "last.ckpt", 1, value=float("nan"))
    assert newest_state(folder) == folder / "previous.ckpt"
    assert "last.ckpt holds values that are no numbers, state_dict.w first" in caplog.text


def test_a_damaged_state_does_not_take_the_place_of_the_good_one(folder: Path) -> None:
    """It would, when the next one is saved: the last becomes the one before."""
    set_aside_damaged(folder / "last.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["last.ckpt", "previous.ckpt"]
    (folder / "last.ckpt").write_bytes(b"damaged")
    set_aside_damaged(folder / "previous.ckpt")
    assert sorted(path.name for path in folder.iterdir()) == ["damaged.ckpt", "previous.ckpt"]

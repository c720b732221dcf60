"""Files that are something else: code, damage, pictures, folders. Nothing runs and nothing changes."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from weights_of import PETS, make_checkpoint, make_model

from ddetr.checkpoint import load_checkpoint, load_weights, save_checkpoint, to_official_state_dict
from ddetr.errors import InputError


class Malicious:
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("read", [load_checkpoint, lambda path: load_weights(make_model(), path)])
def test_a_file_that_runs_code_is_refused(read: Any, legacy: bool, tmp_path: Path) -> None:
    content = {
        "format": "ddetr",
        "model": to_official_state_dict(make_model()),
        "metrics": Malicious(tmp_path / "harm"),
    }
    torch.save(content, tmp_path / "evil.pth", _use_new_zipfile_serialization=not legacy)
    with pytest.raises(InputError, match=r"wants to run '(posix|nt|os)\.mkdir', which was not done"):
        read(tmp_path / "evil.pth")
    assert not (tmp_path / "harm").exists()


def broken_files(folder: Path) -> dict[str, str]:
    """Name -> what the message must say."""
    save_checkpoint(folder / "whole.pth", make_checkpoint(make_model()))
    save_checkpoint(folder / "whole.safetensors", make_checkpoint(make_model()))
    whole, whole_st = (folder / "whole.pth").read_bytes(), (folder / "whole.safetensors").read_bytes()
    (folder / "short.pth").write_bytes(whole[: len(whole) // 2])
    (folder / "short.safetensors").write_bytes(whole_st[: len(whole_st) // 2])
    (folder / "empty.pth").write_bytes(b"")
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "text.pth").write_text("not weights at all")
    (folder / "picture.pth").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
    (folder / "pickle.pth").write_bytes(pickle.dumps({"a": 1}))
    (folder / "last.ckpt").write_bytes(pickle.dumps(PETS[0]))
    torch.save([1, 2, 3], folder / "list.pth")
    torch.save({}, folder / "nothing.pth")
    torch.save({"state_dict": {}, "pytorch-lightning_version": "2.6.6"}, folder / "lightning.ckpt")
    (folder / "folder.pth").mkdir()
    return {
        "absent.pth": "expected a file of weights, but there is none",
        "folder.pth": "folder",
        "short.pth": "damaged or cut short",
        "short.safetensors": "damaged or cut short",
        "empty.pth": "damaged or cut short",
        "empty.safetensors": "damaged or cut short",
        "text.pth": "got something else",
        "picture.pth": "got something else",
        "pickle.pth": "got something else",
        "last.ckpt": "--resume",
        "lightning.ckpt": "got ",
        "list.pth": "got ",
        "nothing.pth": "got ",
    }


def test_files_that_are_no_checkpoint(tmp_path: Path) -> None:
    model = make_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, message in broken_files(tmp_path).items():
        for read in (load_checkpoint, lambda path: load_weights(model, path)):
            with pytest.raises(InputError, match=re.escape(message)) as caught:
                read(tmp_path / name)
            assert name in str(caught.value)
            assert ("--resume" in str(caught.value)) == (name == "last.ckpt"), "which takes runs of ddetr alone"
            assert "\n" not in str(caught.value)
    for name, tensor in model.state_dict().items():
        assert tensor.equal(before[name])

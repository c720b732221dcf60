"""Files that are something else say what they are, in one sentence with the cure."""

import bz2
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from weights_of import make_model

from ddetr.checkpoint import load_checkpoint, load_weights
from ddetr.errors import InputError

LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 160000000\n"


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def tarred(content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        entry = tarfile.TarInfo("model.pth")
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """Name -> content, and what the message must say."""
    torch.save({"a": torch.zeros(3)}, folder / "whole.pth")
    save_file({"a": torch.zeros(300)}, folder / "whole.safetensors")
    torch.save({"a": torch.zeros(3)}, folder / "legacy.pth", _use_new_zipfile_serialization=False)
    whole, whole_st, legacy = ((folder / f"{n}").read_bytes() for n in ("whole.pth", "whole.safetensors", "legacy.pth"))
    arrays = io.BytesIO()
    np.savez(arrays, a=np.zeros(3))
    program = io.BytesIO()
    torch.save({}, program)
    with zipfile.ZipFile(program, "a") as archive:
        archive.writestr("archive/constants.pkl", b"")
    return {
        "lfs.pth": (LFS, "a Git LFS pointer for a file of 160,000,000 bytes"),
        "lfs.safetensors": (LFS, "run git lfs pull"),
        "login.pth": (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        "login.safetensors": (b"<html><head></head></html>", "a web page"),
        "denied.pth": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML, as a refused download"),
        "error.pth": (b'{"error": "not found"}', "JSON"),
        "notes.pth": (b"where the weights are: elsewhere", "a text"),
        "empty.bin": (b"", "its 0 bytes are damaged or cut short"),
        "zeros.pth": (bytes(4096), "zeros, as an interrupted copy"),
        "noise.pth": (bytes(range(255, 0, -1)) * 8, "an unknown kind of file"),
        "a.pth.gz": (gzip.compress(whole), "a gzip archive, unpack it first"),
        "a.pth.bz2": (bz2.compress(whole), "a bzip2 archive"),
        "a.pth.xz": (lzma.compress(whole), "an xz archive"),
        "a.tar": (tarred(whole), "a tar archive"),
        "a.zip": (zipped("weights/model.pth", whole), "a zip archive of 'weights/model.pth', unpack it first"),
        "a.npz": (arrays.getvalue(), "NumPy arrays"),
        "a.pkl": (b"\x80\x04K\x01.          ", "a pickle that torch.save did not write"),
        "zoo.pkl": (
            pickle.dumps({"model": {"conv1.weight": np.zeros(3)}, "matching_heuristics": True}),
            "of NumPy arrays, as detectron2's model zoo has them",
        ),
        "script.pt": (program.getvalue(), "a TorchScript program"),
        "a.pdf": (b"%PDF-1.7 .............", "a PDF"),
        "a.h5": (b"\x89HDF\r\n\x1a\n ..........", "an HDF5 file"),
        "renamed.safetensors": (whole, "Rename it to renamed.pth"),
        "old.safetensors": (legacy, "Rename it to old.pth"),
        "renamed.pth": (whole_st, "Rename it to renamed.safetensors"),
        "renamed.bin": (whole_st, "Rename it to renamed.safetensors"),
        "cut.pth": (whole[:-100], "damaged or cut short"),
        "cut_old.pth": (legacy[:-5], "damaged or cut short"),
        "cut_old_pickle.pth": (legacy[:100], "damaged or cut short"),
        "cut.safetensors": (whole_st[:-100], "damaged or cut short"),
        "cut_header.safetensors": (whole_st[:20], "damaged or cut short"),
    }


def test_each_file_says_what_it_is(tmp_path: Path) -> None:
    model = make_model()
    for name, (content, message) in files(tmp_path).items():
        (tmp_path / name).write_bytes(content)
        for read in (load_checkpoint, lambda path: load_weights(model, path)):
            with pytest.raises(InputError) as caught:
                read(tmp_path / name)
            said = str(caught.value)
            assert said.startswith(f"{tmp_path / name}: expected ")
            assert message in said
            assert "\n" not in said


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.pth")
    with pytest.raises(InputError, match="it is a named pipe, not a file"):
        load_weights(make_model(), tmp_path / "a.pth")


def test_any_beginning_of_a_file_is_refused(tmp_path: Path) -> None:
    """Cut anywhere: never another error."""
    model = make_model()
    torch.save({"a": torch.zeros(3)}, tmp_path / "zip.pth")
    torch.save({"a": torch.zeros(3)}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    save_file({"a": torch.zeros(3)}, tmp_path / "a.safetensors")
    for name in ("zip.pth", "old.pth", "a.safetensors"):
        whole = (tmp_path / name).read_bytes()
        for size in range(0, len(whole), max(1, len(whole) // 60)):
            (tmp_path / name).write_bytes(whole[:size])
            with pytest.raises(InputError):
                load_weights(model, tmp_path / name)

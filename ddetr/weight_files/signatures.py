"""What a file is that holds no weights, by its first bytes: in words for an error message."""

import re
import zipfile
from typing import BinaryIO

from ddetr.printable import one_line
from ddetr.wording import first_few

HEAD_BYTES = 1024
TORCH_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")  # torch.save before 1.6
TORCH_ARCHIVE = "what torch.save writes (an archive)"
PICKLE = "a pickle that torch.save did not write"
PICKLE_RECORD = re.compile(r"([^/]+/)?data\.pkl")

_PACKED = "unpack it first"
_SIGNATURES = (
    (b"\x1f\x8b", f"a gzip archive, {_PACKED}"),
    (b"BZh", f"a bzip2 archive, {_PACKED}"),
    (b"\xfd7zXZ\x00", f"an xz archive, {_PACKED}"),
    (b"7z\xbc\xaf\x27\x1c", f"a 7-Zip archive, {_PACKED}"),
    (b"Rar!", f"a RAR archive, {_PACKED}"),
    (b"\x28\xb5\x2f\xfd", f"a zstd archive, {_PACKED}"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"GIF8", "a picture (GIF)"),
    (b"%PDF", "a PDF document"),
    (b"\x89HDF", "an HDF5 file, as Keras writes"),
    (b"\x93NUMPY", "a NumPy array"),
    (b"GGUF", "a GGUF file, as language models have"),
    (b"\x7fELF", "a program"),
    (b"PK\x05\x06", "an empty zip archive"),
)


def described(head: bytes, file: BinaryIO) -> str:
    """What the file is, in words.

    Args:
        head: its first `HEAD_BYTES`.
        file: all of it; its position is at the beginning again afterwards.
    """
    if head.startswith(b"PK\x03\x04"):
        return _archive(file)
    if TORCH_MAGIC in head[:40]:
        return "what torch.save writes (in its old format)"
    for signature, what in _SIGNATURES:
        if head.startswith(signature):
            return what
    if head[257:262] == b"ustar":
        return f"a tar archive, {_PACKED}"
    if head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05":
        if b"multiarray" in head and b"numpy" in head:
            return (
                f"{PICKLE}, of NumPy arrays, as detectron2's model zoo has them: where you trust it, write its arrays "
                "as tensors with torch.save"
            )
        return f"{PICKLE}: write it with torch.save(model.state_dict(), FILE)"
    if not head.strip(b"\x00"):
        return "zeros, as an interrupted copy or download leaves them"
    return _text(head)


def _archive(file: BinaryIO) -> str:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError):
        return TORCH_ARCHIVE  # cut short: the reader says so
    finally:
        file.seek(0)
    if any(re.fullmatch(r"([^/]+/)?constants\.pkl", name) for name in names):
        return "a TorchScript program: write torch.save(model.state_dict(), FILE) where it was made"
    if any(PICKLE_RECORD.fullmatch(name) for name in names):
        return TORCH_ARCHIVE
    if names and all(name.endswith(".npy") for name in names):
        return "NumPy arrays (.npz)"
    return f"a zip archive of {first_few((repr(one_line(name)) for name in names), 3)}, {_PACKED}"


def _text(head: bytes) -> str:
    beginning = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if beginning.startswith(b"version https://git-lfs"):
        size = re.search(rb"size (\d{1,15})", beginning)
        of = f" for a file of {int(size[1]):,} bytes" if size else ""
        return f"a Git LFS pointer{of}, which git left in its place: run git lfs pull in that repository"
    if beginning.startswith((b"<!doctype html", b"<html", b"<head")):
        return "a web page, as a login or an error leaves it in the place of a download: download it again"
    if beginning.startswith((b"<?xml", b"<error")):
        return "XML, as a refused download leaves it: download it again"
    try:
        text = head.decode("utf-8", "ignore")
    except ValueError:
        return "an unknown kind of file"
    printable = sum(character.isprintable() or character.isspace() for character in text)
    if "\x00" in text or printable < 0.9 * len(text) or len(text) < 0.9 * len(head):
        return "an unknown kind of file"
    return "JSON" if beginning[:1] in (b"{", b"[") else "a text"

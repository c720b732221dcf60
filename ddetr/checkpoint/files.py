"""Bytes to tensors and back: nothing that a file contains is run."""

import argparse
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from ddetr.errors import InputError
from ddetr.files import write_atomically


class FileContent(NamedTuple):
    """What a file holds: the saved object (a dict of tensors for safetensors) and the metadata of safetensors."""

    content: Any
    metadata: dict[str, str]


def read_file(path: Path) -> FileContent:
    """Read a `.safetensors` file, or what `torch.save` wrote (either of its formats), on to the CPU.

    Raises:
        InputError: no such file; not such a file, or a damaged one; one that holds more than tensors and plain values.
    """
    if not path.exists():
        raise InputError(f"{path}: expected a file of weights, but there is none")
    if path.is_dir():
        raise InputError(f"{path}: expected a file of weights, got a folder")
    try:
        if path.suffix == ".safetensors":
            return _read_safetensors(path)
        # The official code pickles its command line, an argparse.Namespace: a bag of values, harmless to build.
        known = torch.serialization.get_safe_globals()
        harmless = [] if argparse.Namespace in known else [argparse.Namespace]
        with torch.serialization.safe_globals(harmless), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles: they are read, or refused with a message of ours
            return FileContent(torch.load(path, map_location="cpu", weights_only=True), {})
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except Exception as error:  # a damaged pickle raises anything, from KeyError to RecursionError
        raise InputError(f"{path}: {_diagnosis(path, error)}") from error


def write_file(path: Path, content: Any, keep_as: Path | None = None) -> None:
    """`torch.save` as `write_atomically` does it. A disk that takes no more raises OSError, with its reason."""

    def write(temporary: Path) -> None:
        try:
            with temporary.open("wb") as file:
                torch.save(content, file)
        except RuntimeError as error:  # what PyTorch's writer makes of a failed write
            reason = error.__context__
            if isinstance(reason, OSError) or (reason is not None and not isinstance(reason, Exception)):
                raise reason from error  # Ctrl+C is one of the second kind
            raise

    write_atomically(path, write, keep_as)


def _read_safetensors(path: Path) -> FileContent:
    with safe_open(path, framework="pt") as file:
        return FileContent({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def _diagnosis(path: Path, error: Exception) -> str:
    cut_short = f"expected a file of weights, but its {path.stat().st_size:,} bytes are damaged or cut short"
    if isinstance(error, SafetensorError):
        return f"{cut_short} ({error}). Copy or download it again"
    if path.suffix == ".ckpt":
        return "expected a published checkpoint, got a training state: pass it to --resume, or take the file beside it"
    refused = re.search(r"GLOBAL (\S+)", str(error))
    if refused and isinstance(error, pickle.UnpicklingError):
        return (
            f"expected tensors and plain values only, but the file wants to run {refused[1]!r}, which was not done. "
            "Save the weights alone, torch.save(model.state_dict(), FILE), or take them from a source that did"
        )
    with path.open("rb") as file:
        is_zip = file.read(4) == b"PK\x03\x04"
    if is_zip or isinstance(error, EOFError):
        return f"{cut_short}. Copy or download it again"
    return f"expected a file of weights (.pt, .pth, .safetensors), got something else ({type(error).__name__})"

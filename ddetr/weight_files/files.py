"""Bytes to tensors and back: nothing that a file contains is run, and nothing is read before it is asked for."""

import errno
import io
import math
import mmap
import os
import struct
import sys
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ddetr.errors import InputError
from ddetr.files import write_atomically
from ddetr.printable import one_line
from ddetr.untrusted import (
    MAX_PICKLE_BYTES,
    MAX_RECORDS,
    MAX_RUN_BYTES,
    MAX_WEIGHT_BYTES,
    open_file,
    parse_json,
    read_text,
)
from ddetr.weight_files.pickled import HostileFile, StandIn, StorageId, TensorView, read_pickle
from ddetr.weight_files.signatures import HEAD_BYTES, PICKLE, PICKLE_RECORD, TORCH_ARCHIVE, TORCH_MAGIC, described

COPY_AGAIN = "Copy or download it again"  # what a message of a damaged file ends with
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


class FileContent(NamedTuple):
    """What a file holds, with a `TensorView` for each tensor; its metadata if it is a safetensors file."""

    content: Any
    metadata: dict[str, str]
    records: "Records"


class _Place(NamedTuple):
    path: Path
    start: int  # in the file, bytes
    size: int  # bytes
    crc: int  # 0 where none was computed


@dataclass
class Records:
    """Where the numbers of a file's tensors lie; read when a tensor is loaded, and once each."""

    path: Path
    places: dict[str, _Place]
    swapped: bool = False  # written on a machine of the other byte order
    _read: dict[str, Tensor] = field(default_factory=dict)

    def load(self, name: str, view: TensorView) -> Tensor:
        """The tensor called `name`, on the CPU. Equal records are shared, as they were in the model.

        Raises:
            InputError: the file does not hold what the tensor says, or is damaged.
        """
        name = one_line(name)
        if wrong := self._why_impossible(view):
            raise InputError(f"{self.path}: {name}: {wrong}. The file is damaged, or was made to do harm")
        numbers = self._bytes(name, view.storage.key)
        numbers = numbers[: len(numbers) // view.dtype.itemsize * view.dtype.itemsize]
        if self.swapped:
            size = view.dtype.itemsize // (2 if view.dtype.is_complex else 1)
            numbers = numbers.view(-1, size).flip(1).reshape(-1)
        return numbers.view(view.dtype).as_strided(view.shape, view.stride, view.offset)

    def check_total(self, views: Iterable[TensorView]) -> None:
        """Raises `InputError` where these tensors are more than any detector has."""
        keys = {view.storage.key for view in views}
        total = sum(self.places[key].size for key in keys if key in self.places)
        if total > MAX_WEIGHT_BYTES or len(keys) > MAX_RECORDS:
            raise InputError(
                f"{self.path}: expected at most {MAX_WEIGHT_BYTES:,} bytes of weights in {MAX_RECORDS:,} tensors, got "
                f"{total:,} bytes in {len(keys):,}"
            )

    def _why_impossible(self, view: TensorView) -> str:
        """Empty where the tensor lies in its record and has no more elements than it."""
        shape, stride, offset = view.shape, view.stride, view.offset
        if shape is None or stride is None or offset is None or len(shape) != len(stride):
            return "its shape is no shape"
        place = self.places.get(view.storage.key)
        if place is None:
            return "its numbers are not in the file"
        held = place.size // view.dtype.itemsize
        last = offset + sum((size - 1) * step for size, step in zip(shape, stride))
        if math.prod(shape) and (math.prod(shape) > held or last >= held):
            return f"the shape {shape} needs more numbers than the {held:,} that the file holds for it"
        return ""

    def _bytes(self, name: str, key: str) -> Tensor:
        if key not in self._read:
            place = self.places[key]
            try:
                data = bytearray(place.size)
                with open_file(place.path) as file:
                    file.seek(place.start)
                    num_read = file.readinto(data)
            except MemoryError as error:
                raise InputError(f"{place.path}: {name} of {place.size:,} bytes does not fit into memory") from error
            except OSError as error:
                raise InputError(f"{place.path}: cannot be read ({error.strerror or error})") from error
            if num_read != place.size or (place.crc and zlib.crc32(data) != place.crc):
                raise InputError(f"{_cut_short(place.path)} (at {name}). {COPY_AGAIN}")
            self._read[key] = torch.frombuffer(data, dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
        return self._read[key]


def read_file(path: Path, *, any_name: bool = False) -> FileContent:
    """Read a `.safetensors` file, or what `torch.save` wrote (either of its formats).

    Args:
        path: the file.
        any_name: whether its suffix may be another than that of its content.

    Raises:
        InputError: no such file; another kind of file, or a damaged one; one that asks for something to be run.
    """
    try:
        raw = open_file(path)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{path}: expected a file of weights, but there is none") from error
    except IsADirectoryError as error:
        raise InputError(f"{path}: expected a file of weights, got a folder") from error
    except (OSError, ValueError) as error:  # a pipe, a device; a name that no file can have
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a file of weights, but {reason}") from error
    try:
        with raw as file:
            return _read(path, file, any_name=any_name)
    except HostileFile as error:
        raise InputError(
            f"{path}: expected tensors and plain values only, but the file wants to run {one_line(error)!r}, which was "
            "not done. Save the weights alone, torch.save(model.state_dict(), FILE), or take them from a source that "
            "did"
        ) from error
    except InputError:
        raise
    except OSError as error:
        if error.errno == errno.EINVAL:  # a place before the beginning
            raise InputError(f"{_cut_short(path)}. {COPY_AGAIN}") from error
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from error
    except SafetensorError as error:
        raise InputError(f"{_cut_short(path)} ({error}). {COPY_AGAIN}") from error
    except Exception as error:  # a damaged file raises anything, from KeyError to RecursionError
        raise InputError(f"{_cut_short(path)}. {COPY_AGAIN}") from error


def suffix_of_content(path: Path) -> str:
    """ ".safetensors" or ".pth", by what the file holds, whatever it is called. No tensor is loaded; raises as
    `read_file`."""
    read_file(path, any_name=True)
    with open_file(path) as file:
        return ".safetensors" if _is_safetensors(file.read(HEAD_BYTES)) else ".pth"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds a dict; None where there is none that can be read."""
    try:
        content = parse_json(read_text(path, MAX_RUN_BYTES), path.name)
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """A `.safetensors` file as `write_atomically` does it; tensors that share memory must be given once. A disk that
    takes no more raises OSError, with its reason."""

    def write(temporary: Path) -> None:
        temporary.touch()
        mode = temporary.stat().st_mode  # safetensors makes files for their owner alone
        try:
            save_file(dict(tensors), temporary, dict(metadata))
        except SafetensorError as error:
            raise OSError(errno.EIO, one_line(error), str(path)) from error
        temporary.chmod(mode)

    write_atomically(path, write)


def _is_safetensors(head: bytes) -> bool:
    return head[8:9] == b"{" and int.from_bytes(head[:8], "little") < MAX_RUN_BYTES and TORCH_MAGIC not in head[:40]


def _read(path: Path, file: BinaryIO, *, any_name: bool) -> FileContent:
    """By what the file is, whatever it is called; one that is called the wrong thing says so."""
    head = file.read(HEAD_BYTES)
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    what, hint = described(head, file), ""
    if size < 10 and what != "JSON":
        raise InputError(f"{_cut_short(path)}. {COPY_AGAIN}")
    is_zip, is_legacy, is_safetensors = head.startswith(b"PK\x03\x04"), TORCH_MAGIC in head[:40], _is_safetensors(head)
    if not any_name and path.suffix == ".safetensors" and (is_zip or is_legacy):
        hint = f". Rename it to {path.stem}.pth if it holds weights"
    elif not any_name and path.suffix != ".safetensors" and is_safetensors:
        what, hint = "safetensors", f". Rename it to {path.stem}.safetensors"
    elif is_safetensors:
        return _read_safetensors(path, file)
    elif what == TORCH_ARCHIVE:
        return _read_zip(path, file, size)
    elif is_legacy:
        return _read_legacy(path, file, size)
    elif path.suffix == ".ckpt" and what.startswith(PICKLE):
        hint = "; a run of ddetr is continued with --resume RUN"
    raise InputError(f"{path}: expected a file of weights (.pt, .pth, .safetensors), got something else: {what}{hint}")


def _read_safetensors(path: Path, file: BinaryIO) -> FileContent:
    with safe_open(path, framework="pt") as checked:  # raises for a header that lies about itself
        metadata = checked.metadata() or {}
    header_size = int.from_bytes(file.read(8), "little")
    header = parse_json(file.read(header_size).decode("utf-8"), str(path))
    content, places = {}, {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        shape, dtype = tuple(entry["shape"]), _DTYPES.get(entry["dtype"])
        if dtype is None:
            content[name] = StandIn(f"torch.{entry['dtype']}")
            continue
        places[name] = _Place(path, 8 + header_size + start, end - start, 0)
        stride = tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
        content[name] = TensorView(StorageId(name, dtype, math.prod(shape)), 0, shape, stride, dtype)
    return FileContent(content, metadata, Records(path, places, swapped=sys.byteorder != "little"))


def _read_zip(path: Path, file: BinaryIO, size: int) -> FileContent:
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        main = next(entry for entry in entries if PICKLE_RECORD.fullmatch(entry.filename))
        folder = main.filename.removesuffix("data.pkl")
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise InputError(
                f"{path}: its records are compressed, which torch.save never does: read it where it was made, and "
                "write it again with torch.save"
            )
        if sum(entry.file_size for entry in entries) > size or len(entries) > MAX_RECORDS:
            raise InputError(
                f"{path}: its {len(entries):,} records say that they are more than the file, which was made to do harm"
            )
        if main.file_size > MAX_PICKLE_BYTES:
            raise InputError(f"{path}: expected weights, got {main.file_size:,} bytes of other values")
        content = read_pickle(io.BytesIO(archive.read(main)))
        order = archive.read(f"{folder}byteorder") if f"{folder}byteorder" in archive.namelist() else b"little"
        places = {
            entry.filename.removeprefix(f"{folder}data/"): _place(path, file, entry)
            for entry in entries
            if entry.filename.startswith(f"{folder}data/")
        }
    return FileContent(content, {}, Records(path, places, swapped=order.decode() != sys.byteorder))


def _place(path: Path, file: BinaryIO, entry: zipfile.ZipInfo) -> _Place:
    """Where the bytes of a stored record are: behind its own header, which may differ from the archive's."""
    file.seek(entry.header_offset + 26)
    name_size, extra_size = struct.unpack("<HH", file.read(4))
    return _Place(path, entry.header_offset + 30 + name_size + extra_size, entry.file_size, entry.CRC)


def _read_legacy(path: Path, file: BinaryIO, size: int) -> FileContent:
    """What torch.save wrote before 1.6: five pickles, then the numbers of each storage behind their count."""
    storages: dict[str, StorageId] = {}
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:  # never gives more than there is
        _, _, system, content, keys = (read_pickle(whole, storages) for _ in range(5))
        places = {}
        for key in keys:
            (count,) = struct.unpack("<q", whole.read(8))
            start, length = whole.tell(), count * storages[key].dtype.itemsize
            if count < 0 or start + length > size:
                raise ValueError("cut short")
            places[key] = _Place(path, start, length, 0)
            whole.seek(start + length)
    is_little = system.get("little_endian", True) if isinstance(system, dict) else True
    return FileContent(content, {}, Records(path, places, swapped=is_little != (sys.byteorder == "little")))


def _cut_short(path: Path) -> str:
    return f"{path}: expected a file of weights, but its {path.stat().st_size:,} bytes are damaged or cut short"

"""Arrays and tensors in files that others made: read without running anything, and holding what they show.

The limits stand in untrusted.py.
"""

import math
import os
import zipfile
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from ddetr.printable import SHOWN_NAME, shortened
from ddetr.untrusted import MAX_ARRAYS_BYTES, MAX_SHARED, MAX_WEIGHT_BYTES, open_file

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


def read_arrays(path: str | os.PathLike, names: Iterable[str]) -> dict[str, "np.ndarray"]:
    """The arrays of these names that `numpy.savez` wrote, of plain numbers and no more of them than the file has bytes:
    some bytes of a header, or of a compressed file, can stand for terabytes.

    Raises:
        OSError: as `open_file`. ValueError, KeyError, zipfile.BadZipFile and others: damaged, or no such file.
    """
    import numpy as np

    arrays = {}
    with open_file(path, MAX_ARRAYS_BYTES) as raw, zipfile.ZipFile(raw) as archive:
        for name in names:
            entry = archive.getinfo(f"{name}.npy")
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is compressed, which ours never are")
            with archive.open(entry) as file:
                version = np.lib.format.read_magic(file)
                read_header = {
                    (1, 0): np.lib.format.read_array_header_1_0,
                    (2, 0): np.lib.format.read_array_header_2_0,
                }[version]
                shape, by_column, dtype = read_header(file)
                num_bytes = math.prod(shape) * dtype.itemsize
                if dtype.kind not in "biuf" or by_column or num_bytes > entry.file_size:
                    raise ValueError(f"{name} is no plain array")
                arrays[name] = np.frombuffer(file.read(num_bytes), dtype).reshape(shape)
    return arrays


def load_tensors(path: str | os.PathLike, most_bytes: int = MAX_WEIGHT_BYTES) -> Any:
    """What `torch.save` wrote, on the CPU: tensors and plain values; nothing is run.

    Raises:
        OSError: as `open_file`. ValueError and others: damaged, compressed, or tensors as `check_tensors` refuses them.
    """
    import torch

    with open_file(path, most_bytes) as raw:
        size = os.fstat(raw.fileno()).st_size
        if zipfile.is_zipfile(raw):
            with zipfile.ZipFile(raw) as archive:
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("its records are compressed, which torch.save never does")
        raw.seek(0)
        content = torch.load(raw, map_location="cpu", weights_only=True)
    check_tensors(content, size)
    return content


def check_tensors(content: Any, file_bytes: int) -> None:
    """Whether the tensors in nested dicts and lists hold what they show.

    A pickle says a tensor's shape and strides beside its numbers: a kB can say 2^40 elements, all the same one.

    Args:
        content: what `torch.load` gave.
        file_bytes: size of the file that it came from; one of ours is not compressed.

    Raises:
        ValueError: a tensor with more elements than are stored, more memory than the file has, no plain tensor.
    """
    import torch

    storages: dict[int, int] = {}
    shown = 0
    for name, tensor in _tensors(content, ""):
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout != torch.strided:
            raise ValueError(f"{name} is no plain tensor")
        if tensor.device.type != "cpu" or tensor.is_quantized or tensor.is_nested:
            raise ValueError(f"{name} is no plain tensor in memory")
        storage = tensor.untyped_storage()
        if tensor.numel() * tensor.element_size() > storage.nbytes():
            raise ValueError(f"{name} shows {tensor.numel():,} elements and holds fewer")
        storages[storage._cdata] = storage.nbytes()
        shown += tensor.numel() * tensor.element_size()
    if shown > MAX_SHARED * sum(storages.values()):
        raise ValueError(f"its tensors show more than {MAX_SHARED} times the numbers that they hold")
    if sum(storages.values()) > file_bytes:
        raise ValueError("it says that it holds more numbers than the file has room for")


def _tensors(content: Any, name: str) -> Iterable[tuple[str, "Tensor"]]:
    import torch

    waiting, seen = [(name, content)], set()
    while waiting:
        name, value = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield shortened(name or "it", SHOWN_NAME), value
        elif isinstance(value, dict | list | tuple | set) and id(value) not in seen:
            seen.add(id(value))  # a list may hold itself
            items = value.items() if isinstance(value, dict) else enumerate(value)
            waiting += [(f"{name}.{shortened(str(key), SHOWN_NAME)}" if name else str(key), one) for key, one in items]

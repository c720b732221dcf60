"""One set of weights in a folder or in several files, as transformers writes them."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_SHARDS
from ddetr.weight_files.files import Records, read_file, read_json
from ddetr.weight_files.pickled import StorageId, TensorView
from ddetr.wording import first_few

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_SUFFIX = ".index.json"


class Weights(NamedTuple):
    """What the file or the files hold together, and the configuration of transformers beside them ({} if none)."""

    content: Any
    metadata: dict[str, str]
    records: Records
    transformers_config: dict[str, Any]


def read_files(path: Path) -> Weights:
    """A file of weights; or a folder, an index or one of its shards, which stand for all shards together.

    Raises:
        InputError: as `read_file`; a folder without weights; an index that names what is not there.
    """
    path = weights_file(path)
    config = read_json(path.parent / "config.json") or {}
    config = config if config.get("model_type") == "deformable_detr" else {}
    if path.name.endswith(INDEX_SUFFIX):
        return Weights(*_read_shards(path), config)
    return Weights(*read_file(path), config)


def weights_file(path: Path) -> Path:
    """The file that a path means: of a folder its weights, of a part their index. Raises as `read_files`."""
    if path.is_dir():
        names = [*SINGLE_FILES, *(f"{name}{INDEX_SUFFIX}" for name in SINGLE_FILES)]
        files = [path / name for name in names if (path / name).is_file()]
        if files:
            return files[0]
        published = next((path / name for name in ("best.pth", "last.pth") if (path / name).is_file()), None)
        if published is not None:
            raise InputError(f"{path}: expected a file of weights, got the folder of a run: give {published}")
        raise InputError(
            f"{path}: expected a file of weights or a transformers folder with model.safetensors or "
            "pytorch_model.bin (or their index of several files), got a folder without them"
        )
    shard = re.fullmatch(r"(.+)-(\d{5})-of-(\d{5})(\.\w+)", path.name)
    if shard is None or not path.is_file():
        return path
    index = path.with_name(f"{shard[1]}{shard[4]}{INDEX_SUFFIX}")
    if not index.is_file():
        raise InputError(
            f"{path}: expected all weights, got file {int(shard[2])} of {int(shard[3])} without {index.name}"
        )
    return index


def _read_shards(index: Path) -> tuple[dict[str, Any], dict[str, str], Records]:
    place_of = (read_json(index) or {}).get("weight_map")
    if not isinstance(place_of, dict) or not place_of or not all(isinstance(name, str) for name in place_of.values()):
        raise InputError(
            f"{index}: expected an index of weights ({{'weight_map': {{NAME: FILE}}}}), got something else"
        )
    names = sorted(set(place_of.values()))
    strange = [name for name in names if not re.fullmatch(r"[\w.-]+", name) or name.startswith(".")]
    if strange or len(names) > MAX_SHARDS:
        raise InputError(
            f"{index}: expected at most {MAX_SHARDS} names of files in the same folder, got "
            f"{repr(one_line(strange[0])) if strange else len(names)}"
        )
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise InputError(
            f"{index}: {len(missing)} of its {len(names)} files are missing: {first_few(missing, 3)}. Download them too"
        )
    content: dict[str, Any] = {}
    records = Records(index, {})
    for name in names:
        shard = read_file(index.parent / name)
        if not isinstance(shard.content, dict) or shard.records.swapped:
            raise InputError(f"{index.parent / name}: expected a part of the weights, got something else")
        records.places |= {f"{name}/{key}": place for key, place in shard.records.places.items()}
        for tensor, view in shard.content.items():
            if isinstance(view, TensorView):
                storage = StorageId(f"{name}/{view.storage.key}", view.storage.dtype, view.storage.size)
                content[tensor] = replace(view, storage=storage)
    absent = [tensor for tensor in place_of if tensor not in content]
    if absent:
        raise InputError(
            f"{index}: {len(absent)} of its tensors are in none of its files, first {one_line(absent[0])!r}"
        )
    return content, {}, records

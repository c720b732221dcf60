"""How images reach a network of transformers: what its processor says in the file beside the weights."""

from pathlib import Path
from typing import Any

from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from ddetr.weight_files.files import read_json


def input_beside(path: Path, kind: str, notes: list[str] | None = None) -> dict[str, Any]:
    """`Checkpoint.input` of weights that do not tell it themselves: as the processor says, else as published.

    Args:
        path: file or folder of the weights.
        kind: whose they are; only transformers' have a processor.
        notes: gets what could not be followed.
    """
    found: dict[str, Any] = {"image_size": 800, "max_size": 1333}
    found |= {"mean": list(IMAGENET_MEAN), "std": list(IMAGENET_STD)}
    folder = path if path.is_dir() else path.parent
    told = read_json(folder / "preprocessor_config.json") if kind == "transformers" else None
    if told is None:
        return found
    size = told.get("size")
    size = size if isinstance(size, dict) else {"shortest_edge": size, "longest_edge": told.get("max_size")}
    edges = [size.get("shortest_edge"), size.get("longest_edge")]
    if all(isinstance(edge, int) and edge > 0 for edge in edges):
        found |= {"image_size": edges[0], "max_size": edges[1]}
    elif told.get("do_resize") is not False and notes is not None:
        notes.append("images are resized to 800 x at most 1333 pixels: its processor asks for another kind of size")
    for ours, theirs, none in (("mean", "image_mean", 0.0), ("std", "image_std", 1.0)):
        values = told.get(theirs)
        if told.get("do_normalize") is False:
            found[ours] = [none] * 3
        elif isinstance(values, list) and len(values) == 3 and all(isinstance(v, (int, float)) for v in values):
            found[ours] = values
    return found

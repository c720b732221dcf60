"""A checkpoint as a file of ours, or in the files of other projects.

ours          as best.pth, or the same as .safetensors
official      {"model": ...} of fundamentalvision/Deformable-DETR, for its `main.py --resume FILE`
transformers  a folder for `AutoModelForObjectDetection` and `AutoImageProcessor`, of 4.57 and of 5.x
detrex        {"model": ...} for its `train.init_checkpoint`
"""

import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ddetr.checkpoint.foreign import read_weights, same_values, with_decoder_heads
from ddetr.checkpoint.published import Checkpoint, build_from_checkpoint, save_checkpoint, without_aliases
from ddetr.checkpoint.transformers_folder import FOLDER_FILES, write_transformers_folder
from ddetr.checkpoint.written_names import in_detrex, in_transformers
from ddetr.checkpoint.written_rows import NUM_IDS, coco_alone, rows_at_ids
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD, PAPER_MAX_SIZE, PAPER_SIZE
from ddetr.errors import InputError
from ddetr.files import make_folder
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.printable import one_line
from ddetr.weight_files.files import write_file
from ddetr.wording import first_few

Format = Literal["ours", "official", "transformers", "detrex"]
_SUFFIXES = {"ours": (".pth", ".pt", ".safetensors"), "official": (".pth", ".pt"), "detrex": (".pth", ".pt")}
_PROJECTS = {"official": "the official code", "transformers": "transformers", "detrex": "detrex"}

# What timm, torchvision and detectron2 build alike under the same name.
_RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")
_OFFICIAL_RESNETS = (  # the official code has the channels of bottlenecks written down
    *_RESNETS[2:],
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
_OFFICIAL_FLAGS = {  # its options for the network, and their defaults
    "backbone": "resnet50",
    "dilation": False,
    "position_embedding": "sine",
    "num_feature_levels": 4,
    "enc_layers": 6,
    "dec_layers": 6,
    "dim_feedforward": 1024,
    "hidden_dim": 256,
    "dropout": 0.1,
    "nheads": 8,
    "num_queries": 300,
    "dec_n_points": 4,
    "enc_n_points": 4,
    "with_box_refine": False,
    "two_stage": False,
}


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        path: the file, or the folder of transformers.
        num_tensors: how many were read back, the same bit for bit.
        num_bytes: of all files.
        notes: (word, sentence) for people: how the classes lie in it, how to use it, what it cannot hold.
    """

    path: Path
    num_tensors: int
    num_bytes: int
    notes: tuple[tuple[str, str], ...]


def convert_checkpoint(
    checkpoint: Checkpoint, output: str | Path, format: Format, *, overwrite: bool = False
) -> Converted:
    """Write a checkpoint in the format of a project, read it back and compare; only then it gets its name.

    Numbers stay what they are, in their type. The official code has a class row for each category id: 91 rows, or as
    many as the highest id needs; those of no class give a score of 1e-6. For detrex the 91 rows of COCO become its 80.

    Args:
        checkpoint: the detector.
        output: the new file (.pth or .pt, of ours also .safetensors); for transformers the new folder.
        format: "ours", "official", "transformers" or "detrex".
        overwrite: whether `output` may replace what is there; of folders only those that this function wrote.

    Raises:
        InputError: the format cannot express this network; there is something at `output`; weights that do not fit
            their configuration, or are NaN or infinite.
    """
    path = Path(output).expanduser()
    if format not in get_args(Format):
        raise InputError(f"format: expected one of {', '.join(get_args(Format))}, got {one_line(format)!r}")
    _check_place(path, format, overwrite)
    model = build_from_checkpoint(checkpoint)
    if len(checkpoint.categories) != model.config["num_classes"]:
        raise InputError(
            f"expected a category for each of the {model.config['num_classes']} classes of the checkpoint, got "
            f"{len(checkpoint.categories)}"
        )
    if format != "ours":
        if reasons := _inexpressible(format, model):
            raise InputError(
                f"{_PROJECTS[format]} cannot express {', '.join(reasons)}. Nothing was written; --format ours holds it"
            )
        checkpoint = _for_others(checkpoint, format, model)
    make_folder(path.parent, "OUT")
    try:
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as folder:
            new = Path(folder, path.name)
            _write(new, checkpoint, format, len(model.backbone[0].num_channels))
            _check_same(new, checkpoint.model)
            num_bytes = sum(file.stat().st_size for file in (new.iterdir() if new.is_dir() else [new]))
            if path.is_dir():
                os.replace(path, Path(folder, "before"))
            os.replace(new, path)
    except OSError as error:
        raise InputError(f"OUT: {path} cannot be written ({error.strerror or error})") from error
    return Converted(
        path, len(checkpoint.model), num_bytes, () if format == "ours" else _notes(checkpoint, format, path)
    )


def _check_place(path: Path, format: Format, overwrite: bool) -> None:
    if path.name in ("", ".."):
        raise InputError(f"OUT: expected the name of a new file or folder, got {path}")
    if format == "transformers" and re.fullmatch(r"\.(?:pth?|bin|safetensors|json)", path.suffix):
        raise InputError(
            f"OUT: expected a new folder, which is what transformers reads, got the name of a file: {path}"
        )
    if format != "transformers" and path.suffix not in _SUFFIXES[format]:
        raise InputError(f"OUT: expected a file that ends in {' or '.join(_SUFFIXES[format])}, got {path}")
    if not path.exists():
        return
    if not overwrite:
        raise InputError(f"OUT: {path} is there already: choose another name, or replace it by --overwrite")
    if path.is_dir() != (format == "transformers"):
        raise InputError(f"OUT: {path} is a {'folder' if path.is_dir() else 'file'}: choose another name")
    if path.is_dir() and (others := sorted({entry.name for entry in path.iterdir()} - set(FOLDER_FILES))):
        raise InputError(
            f"OUT: {path} holds more than a converted checkpoint ({one_line(first_few(others, 3))}), and all of it "
            "would be replaced: choose another name"
        )


def _inexpressible(format: Format, model: DeformableDETR) -> list[str]:
    """What the network of the other project does not have."""
    config, backbone = model.config, str(model.config["backbone"])
    found = [name for name in ("mixed_selection", "class_aware") if config[name]]
    if config["query_selection"] != "topk":
        found.append(f"query_selection {config['query_selection']}")
    if config["num_backbone_levels"] == 4:
        found.append("a backbone level of stride 4 (num_backbone_levels 4)")
    if config["hidden_dim"] % 32:
        found.append(f"hidden_dim {config['hidden_dim']}, which the 32 groups of its norms do not divide")
    if format != "transformers" and config["two_stage"] and config["hidden_dim"] != 256:
        found.append(f"hidden_dim {config['hidden_dim']} in a two-stage network (its proposals are written for 256)")
    if config["position_embedding"] != "sine":
        found.append("learned position embeddings (ours stretch over maps of more than 50 cells)")
    if format != "detrex" and config["num_feature_levels"] == 2:
        found.append("two feature levels (it takes one stage of the backbone, or three)")
    if format == "detrex" and config["dilation"]:
        found.append("dilation as ours (detectron2 dilates one convolution more)")
    if format == "detrex" and (config["enc_n_points"], config["dec_n_points"]) != (4, 4):
        found.append("other numbers of points than 4")
    resnets = {"official": _OFFICIAL_RESNETS, "detrex": _RESNETS}.get(format)
    if (backbone.partition(".")[0] not in resnets) if resnets else not _is_for_transformers(model):
        known = "ResNets of bottlenecks" if format == "official" else "ResNets"
        found.append(f"the backbone {one_line(backbone)} (it has {known})")
    return found


def _is_for_transformers(model: DeformableDETR) -> bool:
    """Whether it makes the same backbone of its name: it takes the last three of timm's five maps, and puts a frozen
    norm with an eps of 1e-5 in the place of each batch norm, without the activation that some of them have."""
    with torch.device("meta"):  # not of `model`, whose norms may be frozen, and of another kind for that
        body = DeformableDETR(**model.config | {"freeze_backbone": "none"}).backbone[0].body
    maps = getattr(getattr(body, "feature_info", None), "info", ())
    norms = [module for module in body.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    return len(maps) == 5 and all(type(norm) is nn.BatchNorm2d and norm.eps == 1e-5 for norm in norms)


def _for_others(checkpoint: Checkpoint, format: Format, model: DeformableDETR) -> Checkpoint:
    """The checkpoint with every setting, on the CPU, without what others do not have, and with their class rows."""
    tensors = {name: tensor for name, tensor in checkpoint.model.items() if not name.endswith("num_batches_tracked")}
    if not model.config["with_box_refine"]:  # one head for all layers
        for name in tensors:
            first = re.sub(r"^((?:class|bbox)_embed)\.\d+\.", r"\1.0.", name)
            if first != name and not same_values(tensors[first], tensors[name]):
                raise InputError(f"{name} and {first} are one head in this network, but hold different values")
            tensors[name] = tensors[first]
        if format == "transformers":  # which ties them itself
            tensors = {n: tensor for n, tensor in tensors.items() if not re.match(r"\w+_embed\.[1-9]\d*\.", n)}
    own, aliases = without_aliases(tensors)
    tensors = {name: own[aliases.get(name, name)] for name in tensors}
    categories, config = checkpoint.categories, model.config
    proposals = config["dec_layers"] if config["two_stage"] else None
    if format == "official":
        tensors = rows_at_ids(tensors, categories, proposals)
        config = {**config, "backbone": config["backbone"].partition(".")[0]}  # without timm's tag of trained weights
    elif format == "detrex":
        tensors, categories = coco_alone(tensors, categories, proposals)
    return replace(checkpoint, model=tensors, config=config, categories=categories)


def _write(path: Path, checkpoint: Checkpoint, format: Format, num_backbone_levels: int) -> None:
    if format == "ours":
        save_checkpoint(path, checkpoint)
    elif format == "transformers":
        write_transformers_folder(path, checkpoint, in_transformers(checkpoint.model))
    else:
        weights = with_decoder_heads(checkpoint.model, checkpoint.config)
        content = {
            "model": weights if format == "official" else in_detrex(weights, num_backbone_levels),
            # Plain values, which the other programs pass over, and we read.
            "args": {name: checkpoint.config[name] for name in _OFFICIAL_FLAGS},
            "categories": [{"id": c.category_id, "name": c.name} for c in checkpoint.categories],
        }
        write_file(path, content)


def _check_same(path: Path, expected: Mapping[str, Tensor]) -> None:
    found = read_weights(path).tensors
    for name in {*found, *expected}:
        here, there = expected.get(name), found.get(name)
        if here is None or there is None or here.dtype != there.dtype or not torch.equal(here.cpu(), there):
            raise RuntimeError(f"{path.name} reads back otherwise than it was written, first {name}; it was not kept")


def _notes(checkpoint: Checkpoint, format: Format, path: Path) -> tuple[tuple[str, str], ...]:
    config, num_classes = checkpoint.config, len(checkpoint.categories)
    lost = ["the threshold", "the metrics", "how it was trained"]
    notes = []
    if format == "official":
        num_rows = len(checkpoint.model["class_embed.0.bias"])
        notes.append(("classes", f"{num_classes} in {num_rows} rows, each in that of its category id"))
        given = {name: config[name] for name, default in _OFFICIAL_FLAGS.items() if config[name] != default}
        flags = [f"--{name}" if value is True else f"--{name} {one_line(value)}" for name, value in given.items()]
        notes.append(("use", " ".join([f"main.py --eval --resume {path}", *flags])))
        if num_rows != NUM_IDS:
            notes.append(("change", f"num_classes = {NUM_IDS} in its models/deformable_detr.py to {num_rows}"))
    elif format == "detrex":
        settings = {"num_classes": num_classes, "num_queries": config["num_queries"]}
        settings |= {"with_box_refine": config["with_box_refine"], "as_two_stage": config["two_stage"]}
        notes.append(("classes", f"{num_classes}, in order"))
        given = " ".join(f"model.{name}={value}" for name, value in settings.items())
        notes.append(("use", f"train.init_checkpoint={path} {given}"))
    else:
        notes.append(("classes", f"{num_classes}, in order, by name"))
        lost.insert(0, "the category ids")
    sizes = (checkpoint.input.get("image_size"), checkpoint.input.get("max_size"))
    colors = [tuple(checkpoint.input.get("mean", IMAGENET_MEAN)), tuple(checkpoint.input.get("std", IMAGENET_STD))]
    if format != "transformers" and (*sizes, *colors) != (PAPER_SIZE, PAPER_MAX_SIZE, IMAGENET_MEAN, IMAGENET_STD):
        how = f"short side {sizes[0]}, long side {sizes[1]}, mean {colors[0]}, std {colors[1]}"
        lost.insert(0, f"how its images were made ({how})")
    notes.append(("left out", f"{', '.join(lost[:-1])} and {lost[-1]}, which {_PROJECTS[format]} keeps nowhere"))
    return tuple(notes)

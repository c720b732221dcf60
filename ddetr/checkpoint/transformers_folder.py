"""The folder from which Hugging Face transformers makes a detector and its image processor.

Of the settings only those are written that 4.57 and 5.x both read; the rest are their defaults.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ddetr.checkpoint.published import Checkpoint
from ddetr.datasets.transforms import IMAGENET_MEAN, IMAGENET_STD
from ddetr.files import write_text
from ddetr.weight_files.files import write_safetensors

FOLDER_FILES = ("config.json", "model.safetensors", "preprocessor_config.json")
_BILINEAR = 2  # Pillow's number


def write_transformers_folder(path: Path, checkpoint: Checkpoint, tensors: Mapping[str, Tensor]) -> None:
    """A new folder of `FOLDER_FILES`.

    checkpoint: of a network that transformers can express.
    tensors: its weights under transformers' names, each once.
    """
    path.mkdir()
    weights = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_safetensors(path / "model.safetensors", weights, {"format": "pt"})  # without the word 4.x refuses the file
    for name, content in (
        ("config.json", model_config(checkpoint)),
        ("preprocessor_config.json", preprocessor_config(checkpoint.input)),
    ):
        write_text(path / name, json.dumps(content, indent=2) + "\n")


def model_config(checkpoint: Checkpoint) -> dict[str, Any]:
    """config.json: the network, the names of its classes, and the official weights of matching and loss."""
    config = checkpoint.config
    names = [category.name for category in checkpoint.categories]
    dtypes = {tensor.dtype for tensor in checkpoint.model.values() if tensor.is_floating_point()}
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    return {
        "architectures": ["DeformableDetrForObjectDetection"],
        "model_type": "deformable_detr",
        "dtype": str(dtype).removeprefix("torch."),
        "id2label": dict(enumerate(names)),
        "label2id": {name: label for label, name in enumerate(names)},
        # timm makes it without a download: all its weights are in the file.
        "use_timm_backbone": True,
        "use_pretrained_backbone": False,
        "backbone": config["backbone"],
        "dilation": config["dilation"],
        "num_channels": 3,
        "num_feature_levels": config["num_feature_levels"],
        "position_embedding_type": "sine",
        "d_model": config["hidden_dim"],
        "encoder_layers": config["enc_layers"],
        "decoder_layers": config["dec_layers"],
        "encoder_attention_heads": config["nheads"],
        "decoder_attention_heads": config["nheads"],
        "encoder_ffn_dim": config["dim_feedforward"],
        "decoder_ffn_dim": config["dim_feedforward"],
        "encoder_n_points": config["enc_n_points"],
        "decoder_n_points": config["dec_n_points"],
        "dropout": config["dropout"],
        "activation_function": "relu",
        "num_queries": config["num_queries"],
        "with_box_refine": config["with_box_refine"],
        "two_stage": config["two_stage"],
        "two_stage_num_proposals": config["num_queries"],
        "auxiliary_loss": config["aux_loss"],
        "class_cost": 2,
        "bbox_cost": 5,
        "giou_cost": 2,
        "bbox_loss_coefficient": 5,
        "giou_loss_coefficient": 2,
        "focal_alpha": 0.25,
    }


def preprocessor_config(image_input: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json: how images reach the network, as our `Predictor` has it.

    image_input: of a checkpoint: image_size, max_size, mean, std.
    """
    return {
        "image_processor_type": "DeformableDetrImageProcessorFast",
        "format": "coco_detection",
        "do_resize": True,
        "size": {"shortest_edge": image_input["image_size"], "longest_edge": image_input["max_size"]},
        "resample": _BILINEAR,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(image_input.get("mean", IMAGENET_MEAN)),
        "image_std": list(image_input.get("std", IMAGENET_STD)),
        "do_convert_annotations": True,
        "do_pad": True,
    }

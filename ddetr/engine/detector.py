"""The network of a run, with the weights that it starts from."""

from typing import Any

from ddetr import console
from ddetr.checkpoint import load_weights
from ddetr.datasets import Annotations
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.runtime.distributed import is_first_process


def starts_from_weights(model: dict[str, Any], weights: str | None) -> bool:
    return bool(weights or model["pretrained_backbone"])


def build_detector(
    model: dict[str, Any], train_set: Annotations, weights: str | None, *, is_resumed: bool
) -> DeformableDETR:
    """The network, with its weights where they come from a file; a resumed run brings its own."""
    arguments = dict(model, num_classes=len(train_set.categories))
    if weights is not None or is_resumed:
        # Neither needs the download, but norms and stem are treated as what they are: trained.
        if arguments["freeze_backbone"] is None and starts_from_weights(model, weights):
            arguments["freeze_backbone"] = "stem"
        arguments["pretrained_backbone"] = False
    detector = DeformableDETR(**arguments)
    if weights is not None and not is_resumed:
        loaded = load_weights(detector, weights, categories=train_set.categories)
        if is_first_process():
            console.show(loaded.render())
    return detector

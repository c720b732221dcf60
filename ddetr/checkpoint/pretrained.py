"""Trained detectors by a name."""

from pathlib import Path

from ddetr.checkpoint.detectors import read_detector
from ddetr.checkpoint.published import build_from_checkpoint
from ddetr.models.deformable_detr import DeformableDETR
from ddetr.weight_files.sources import find_weights


def from_pretrained(source: str | Path) -> DeformableDETR:
    """A trained network in eval mode; its weights are downloaded where they are not on this machine.

    Args:
        source: a name of `ddetr weights list`, a hub id (ORG/NAME, with @REVISION and /FILE where wanted), an https
            address, a file or a folder.

    Raises:
        InputError: there is no such thing, it cannot be had, or it holds no detector.
    """
    return build_from_checkpoint(read_detector(find_weights(source)))

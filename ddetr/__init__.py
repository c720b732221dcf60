"""ddetr: Deformable DETR, from data to deployed detector. The map, in the order data flows:

errors.py, wording.py, printable.py, untrusted.py, arrays.py   the base
files.py, console.py, settings.py, padding.py, boxes.py         what stands on it
ops/          multi-scale deformable attention, the operator
runtime/      the process and its machine: device, precision, limits, other processes
weight_files/ names, addresses and files of weights -> tensors, whoever wrote them
datasets/     COCO, VOC and YOLO folders -> annotations, audit, samples, batches
models/       the network, its matching and its losses
checkpoint/   weights on disk, ours and others'
evaluation/   COCO's metrics over a predict function
doctor/       whether this machine, its GPUs and its PyTorch truly work
inference/    images -> named objects in pixels
report/       what a run shows for itself, and a data set before: one HTML file each, curves, pictures
engine/       training, on Lightning
demo.py       the whole way on drawn shapes
bench/        what is timed, and against what
cli/          `ddetr COMMAND`
"""

import importlib
from typing import Any

__version__ = "0.1.0"

# Name -> module. Loaded on first use, so that `import ddetr` is light.
_PUBLIC = {
    "DeformableDETR": "ddetr.models.deformable_detr",
    "Predictor": "ddetr.inference.predictor",
    "build_coco_dataset": "ddetr.datasets",
    "build_model": "ddetr.models.deformable_detr",
    "from_pretrained": "ddetr.checkpoint",
    "load_weights": "ddetr.checkpoint",
    "ms_deform_attn": "ddetr.ops",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'ddetr' has no attribute {name!r}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *_PUBLIC]

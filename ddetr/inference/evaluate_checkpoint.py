"""A checkpoint and a data set in, COCO's metrics out."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from ddetr import console
from ddetr.datasets.config import DataSource
from ddetr.errors import InputError
from ddetr.files import make_folder, write_text

if TYPE_CHECKING:
    from ddetr.evaluation.metrics import Metrics


def evaluate_checkpoint(
    checkpoint: str,
    data: DataSource,
    *,
    split: str | None = None,
    output: str | None = None,
    batch_size: int = 1,
    max_detections: int = 100,
    num_workers: int = 0,
    device: str | None = None,
) -> "Metrics":
    """Measure a published checkpoint on one split of a data set.

    Args:
        checkpoint: a published checkpoint, for instance best.pth of a run.
        data: the data set.
        split: which part; by default the validation split.
        output: folder for metrics.json and predictions.json (COCO's results format).
        batch_size: images that run through the model together; padding changes scores slightly, 1 has none.
        max_detections: detections per image that count.
        num_workers: processes that load images; 0 loads them in this one.
        device: "cpu" or "cuda"; by default a GPU if there is one.

    Raises:
        InputError: no checkpoint, no such split, or no class of the checkpoint in the data.
    """
    # Here, since they take seconds, and the command line needs the signature alone for its help and its mistakes.
    from torch.utils.data import DataLoader

    from ddetr.datasets import DetectionDataset, available_splits, collate
    from ddetr.datasets.splits import load_split
    from ddetr.datasets.transforms import official_eval
    from ddetr.evaluation.evaluator import CocoEvaluator, evaluate
    from ddetr.inference.predictor import Predictor

    predictor = Predictor.from_checkpoint(checkpoint, device, max_detections=max_detections)
    folder = make_folder(Path(output), "--output") if output is not None else None
    if split is None and data.val_split is None and data.val_annotations is None:
        splits = available_splits(data.path, data.format)
        split = splits[0] if len(splits) == 1 else None
    with console.waiting(f"reading {data.path}"):
        annotations = load_split(data, "val", split, categories=predictor.categories)
    if all(len(record.labels) == 0 for record in annotations.images):
        names = ", ".join(
            [*(category.name for category in predictor.categories[:5]), *["..."] * (len(predictor.categories) > 5)]
        )
        raise InputError(f"{annotations.name} has no object of the checkpoint's classes ({names}): nothing to measure")
    dataset = DetectionDataset(
        annotations, official_eval(predictor.image_size, predictor.max_size), normalize=False, train=False
    )
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
    evaluator = CocoEvaluator(annotations, max_detections)
    with console.progress("evaluate") as update:
        metrics = evaluate(predictor.detect, loader, annotations, evaluator=evaluator, progress=update)
    if folder is not None:
        write_text(folder / "metrics.json", json.dumps(metrics.to_dict(), indent=1) + "\n")
        write_text(folder / "predictions.json", json.dumps(evaluator.coco_results()) + "\n")
    return metrics

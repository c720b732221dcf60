"""A checkpoint and a data set in, COCO's metrics out."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ddetr import console
from ddetr.datasets.config import DataSource
from ddetr.errors import InputError
from ddetr.files import existing, make_folder, write_text

if TYPE_CHECKING:
    from ddetr.datasets import Annotations
    from ddetr.datasets.annotations import UnreadImage
    from ddetr.evaluation.evaluator import CocoEvaluator
    from ddetr.evaluation.metrics import Metrics
    from ddetr.inference.predictor import Predictor


# Long, since the signature with its help is the interface of the command.
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
    optimize: Literal["float32", "bfloat16", "compile"] | None = None,
    num_queries: int | None = None,
    query_selection: Literal["topk", "peaks", "distinct"] | None = None,
    accept_refused: bool = False,
) -> "Metrics":
    """Measure a published checkpoint on one split of a data set.

    What the reader of the data set found is shown before; images that could not be used are counted beside the
    metrics, and in metrics.json as "measured_on".

    Args:
        checkpoint: a published checkpoint, for instance best.pth of a run; or trained weights of another project.
        data: the data set.
        split: which part; by default the validation split.
        output: folder for metrics.json and predictions.json (COCO's results format).
        batch_size: images that run through the model together; padding changes scores slightly, 1 has none.
        max_detections: detections per image that count.
        num_workers: processes that load images beside this one; with 0 this one loads them itself, in turn with the
            model.
        device: "cpu" or "cuda"; by default a GPU if there is one.
        optimize: faster: float32 (the same but for rounding; what --optimize alone means), bfloat16, or compile:
            bfloat16 through torch.compile, a minute slower at first and for each new image size.
        num_queries: of a two-stage network, how many it works with; by default as it was trained.
        query_selection: of a two-stage network, how it chooses them; by default as it was trained.
        accept_refused: measure on what is left of a data set in which a part was refused.

    Raises:
        InputError: no checkpoint, no such split, a refused data set, or no class of the checkpoint in the data.
    """
    for name, value, least in (("batch_size", batch_size, 1), ("max_detections", max_detections, 1)):
        if value < least:
            raise InputError(f"{name} must be at least {least}, got {value}")
    if num_workers < 0:
        raise InputError(f"num_workers must be at least 0, got {num_workers}")
    existing(data.path)
    # Here, since they take seconds, and the command line needs the signature alone for its help and its mistakes.
    from ddetr.evaluation.evaluator import CocoEvaluator
    from ddetr.inference.predictor import Predictor
    from ddetr.runtime.allocator import keep_freed_memory

    predictor = Predictor.from_checkpoint(
        checkpoint,
        device,
        num_queries=num_queries,
        query_selection=query_selection,
        max_detections=max_detections,
        optimize=optimize or False,
    )
    if optimize and predictor.device.type == "cpu":
        keep_freed_memory()
    folder = make_folder(Path(output), "--output") if output is not None else None
    annotations = _read(data, split, predictor.categories, accept_refused=accept_refused)
    _say_what_was_trained_on(Path(checkpoint), annotations, existing(data.path))
    evaluator = CocoEvaluator(annotations, max_detections)
    metrics = _measure(predictor, evaluator, batch_size, num_workers)
    if not metrics.num_images:
        reason = evaluator.unread[0].reason
        raise InputError(f"none of the {len(annotations.images)} images of {annotations.name} can be read: {reason}")
    measured_on = evaluator.measured_on()
    if measured_on and measured_on["num_images"] < measured_on["num_images_listed"]:
        console.show(
            f"measured on {measured_on['num_images']:,} of {measured_on['num_images_listed']:,} images: the others "
            "could not be used"
        )
    for image in evaluator.unread:
        console.show(f"not read     {image.path}: {image.reason}")
    if folder is not None:
        content = metrics.to_dict() | ({"measured_on": measured_on} if measured_on else {})
        write_text(folder / "metrics.json", json.dumps(content, indent=1) + "\n")
        write_text(folder / "predictions.json", json.dumps(evaluator.coco_results()) + "\n")
    return metrics


def _read(data: DataSource, split: str | None, categories: Any, *, accept_refused: bool) -> "Annotations":
    """The split in the checkpoint's classes, after what was found in it is shown."""
    from ddetr.datasets import available_splits
    from ddetr.datasets.audit_report import render_findings
    from ddetr.datasets.image_files import reading_on_screen
    from ddetr.datasets.splits import load_split

    if split is None and data.val_split is None and data.val_annotations is None and data.val_fraction is None:
        splits = available_splits(data.path, data.format)
        split = splits[0] if len(splits) == 1 else None
    with reading_on_screen(data.path):
        annotations = load_split(data, "val", split, categories=categories)
    if annotations.findings:
        console.show(render_findings(annotations.findings))
    refused = [finding for finding in annotations.findings if finding.action == "refused"]
    if refused and not accept_refused:
        more = f", and {len(refused) - 1} more in the table above" if len(refused) > 1 else ""
        raise InputError(
            f"{annotations.name} was refused: {refused[0].where}: {refused[0].message}{more}. Repair it, or measure on "
            "what is left of it with --accept_refused"
        )
    if all(len(record.labels) == 0 for record in annotations.images):
        names = ", ".join([*(category.name for category in categories[:5]), *["..."] * (len(categories) > 5)])
        raise InputError(f"{annotations.name} has no object of the checkpoint's classes ({names}): nothing to measure")
    return annotations


def _say_what_was_trained_on(checkpoint: Path, annotations: "Annotations", root: Path) -> None:
    """Where a run has held images back, on which others of the same data set it is measured now."""
    from ddetr.datasets.splits import image_names, read_held_back

    held_back = set(read_held_back(checkpoint.parent) or ())
    names = image_names(annotations, root)
    others = sum(name not in held_back for name in names)
    if 0 < others < len(names):
        console.show(
            f"{others:,} of the {len(names):,} images are none of those that the run of {checkpoint} held back: it was "
            "trained on them, and the numbers flatter it. Give the run's --data.val_fraction, --data.group_pattern and "
            "--data.split_seed"
        )


def _measure(predictor: "Predictor", evaluator: "CocoEvaluator", batch_size: int, num_workers: int) -> "Metrics":
    """The metrics over the images that can be read; the evaluator knows the others."""
    from torch.utils.data import DataLoader

    from ddetr.datasets import DetectionDataset
    from ddetr.datasets.dataset import ReadableImages
    from ddetr.datasets.transforms import official_eval
    from ddetr.evaluation.evaluator import evaluate

    annotations, transform = evaluator.annotations, official_eval(predictor.image_size, predictor.max_size)
    images = ReadableImages(DetectionDataset(annotations, transform, normalize=False, train=False))
    loader = DataLoader(images, batch_size=batch_size, collate_fn=_collate_readable, num_workers=num_workers)

    def batches() -> Iterator[Any]:
        for batch, unread in loader:
            for image in unread:
                evaluator.leave_out(*image)
            if batch is not None:
                yield batch

    with console.progress("evaluate") as update:
        return evaluate(predictor.detect, batches(), annotations, evaluator=evaluator, progress=update)


def _collate_readable(samples: Sequence[Any]) -> "tuple[Any, list[UnreadImage]]":
    """(what `collate` makes of the images that can be read, None where there are none; the others)."""
    from ddetr.datasets import collate
    from ddetr.datasets.dataset import readable

    good, unread = readable(samples)
    return collate(good) if good else None, unread

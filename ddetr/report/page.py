"""`report.html`: a run, from what lies in its folder. What a section cannot show it says in words."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ddetr.errors import InputError
from ddetr.evaluation.metrics import METRIC_NAMES
from ddetr.files import write_text
from ddetr.printable import one_line
from ddetr.report import figures, tables, templates
from ddetr.report.analysis import ERROR_KINDS, Analysis, analyse
from ddetr.report.charts import shown
from ddetr.report.pictures import PAGE_SIDE, data_uri, truth_and_prediction
from ddetr.report.run_files import RunFiles, shown_time
from ddetr.report.templates import score
from ddetr.report.validation import Validation
from ddetr.untrusted import MAX_ROWS

logger = logging.getLogger(__name__)

REPORT_FILE = "report.html"
NUM_BEST, NUM_WORST = 4, 8  # images shown: they are most of the file, and of the time that it takes

SECTIONS = {
    "summary": "Summary",
    "curves": "Curves",
    "ap": "Average precision",
    "precision-recall": "Precision and recall",
    "confusion": "Confusion matrix",
    "errors": "Errors",
    "images": "Best and worst images",
    "data": "Data audit",
    "configuration": "Configuration",
    "environment": "Environment",
    "files": "Files",
}


def write_report(run: RunFiles) -> Path:
    """Writes `report.html` into the run folder, whole or not at all."""
    path = run.path / REPORT_FILE
    write_text(path, render(run))
    return path


def render(run: RunFiles) -> str:
    """The page."""
    builders: dict[str, Callable[[RunFiles], dict[str, Any]]] = {
        "summary": _summary,
        "curves": _curves,
        "ap": _ap,
        "detections": _detections,
        "data": lambda run: tables.data(run.audit),
        "configuration": lambda run: {"groups": tables.settings(run.config)},
        "environment": _environment,
        "files": lambda run: {"files": tables.files(run.path)},
    }
    return templates.render(
        "page.html",
        kind="run report",
        name=run.path.resolve().name,
        sections=SECTIONS,
        state=run.state,
        missing=run.missing,
        error_kinds=list(ERROR_KINDS),
        metric_names=METRIC_NAMES,
        class_columns=tables.CLASS_COLUMNS,
        **{section: _built(section, build, run) for section, build in builders.items()},
    )


def _built(section: str, build: Callable[[RunFiles], dict[str, Any]], run: RunFiles) -> dict[str, Any]:
    """A file of another version may hold anything: what it breaks is one section, not the report."""
    try:
        return {"problem": "", "there": False, "data_name": ""} | build(run)
    except Exception as error:
        logger.warning("report of %s, %s: %s: %s", run.path, section, type(error).__name__, error)
        logger.debug("", exc_info=True)
        return {
            "there": False,
            "data_name": "",
            "problem": "This section could not be made from the files that are here "
            f"({type(error).__name__}: {error}).",
        }


def _summary(run: RunFiles) -> dict[str, Any]:
    best, last = (run.metrics.get(which) or {} for which in ("best", "last"))
    data = run.config.get("data") or {}
    split = (run.audit.get("val") or {}).get("name")
    cards: list[tuple[str, str, str]] = []
    if best:
        cards.append(("Best AP", score(best.get("AP")), f"epoch {_counted(best)}, step {best.get('step', 0):,}"))
        cards.append(("AP50", score(best.get("AP50")), "of that validation"))
        cards.append(("AP75", score(best.get("AP75")), "of that validation"))
        if best.get("threshold") is not None:
            cards.append(("Best F1", score(best.get("f1")), f"at score threshold {best['threshold']:.2f}"))
    if last and last.get("step") != best.get("step"):
        cards.append(("Last AP", score(last.get("AP")), f"epoch {_counted(last)}, step {last.get('step', 0):,}"))
    if "loss" in run.training:
        cards.append(("Loss", shown(float(run.training["loss"][-1])), f"at step {int(run.training['step'][-1]):,}"))
    if not math.isnan(run.seconds):
        sessions = len(run.sessions)
        note = f"in {sessions} sessions" if sessions > 1 else "validations included"
        cards.append(("Time", _duration(run.seconds), note))
    speed = run.training.get("images_per_second", np.zeros(0))
    if np.isfinite(speed).any():
        cards.append(("Images per second", shown(float(np.nanmedian(speed))), "median of training"))
    began = run.sessions[0].get("began") if run.sessions else None
    seen = run.sessions[-1].get("seen") if run.sessions else None
    train = run.audit.get("train") or {}
    facts = [
        ("Data set", str(data.get("path", "unknown"))),
        ("Validated on", (f"{split}" if split else "unknown") + _of_images(best or last)),
        ("Images", _of_both(run.audit, "num_images")),
        ("Objects", _of_both(run.audit, "num_objects")),
        ("Classes", f"{len(run.audit['categories']):,}" if run.audit.get("categories") else "unknown"),
        ("Epochs", f"{run.config['epochs']:,}" if "epochs" in run.config else "unknown"),
        ("Began", shown_time(began)),
        ("Last sign of life", shown_time(seen)),
    ]
    return {"cards": cards, "facts": facts, "data_name": train.get("name") or Path(str(data.get("path", ""))).name}


def _curves(run: RunFiles) -> dict[str, Any]:
    main, more = figures.training_charts(run.training, run.validation)
    return {"charts": main, "more": more}


def _ap(run: RunFiles) -> dict[str, Any]:
    return {
        "rows": tables.ap_rows(run.metrics),
        "classes": tables.class_rows(run.metrics, run.detections),
        "has_sizes": run.detections is not None,
        "more": tables.num_left_out((run.metrics.get("best") or run.metrics.get("last") or {}).get("per_class", ())),
    }


def _detections(run: RunFiles) -> dict[str, Any]:
    """Everything that needs the detections of a validation."""
    validation = run.detections
    if validation is None:
        return {"there": False}
    names = [validation.name(label) for label in range(len(validation.categories))]
    num_images = len(validation.paths)
    analysis = analyse(validation.found, validation.objects, validation.threshold, num_images, len(names))
    precision_recall, by_class = figures.precision_recall_charts(validation)
    return {
        "there": True,
        "of": f"epoch {validation.epoch + 1}, step {validation.step:,}",
        "threshold": validation.threshold,
        "precision_recall": precision_recall,
        "by_class": by_class,
        "confusion": tables.confusion(analysis, names),
        "errors": tables.errors(analysis, names),
        "galleries": _galleries(run, validation, analysis),
    }


def _galleries(run: RunFiles, validation: Validation, analysis: Analysis) -> list[dict[str, Any]]:
    """The best and the worst images; of equal ones those with the most objects, the most mistakes."""
    scores = analysis.image_scores
    rated = np.flatnonzero(np.isfinite(scores))
    mistakes = analysis.image_false + analysis.image_missed
    worst_first = rated[np.lexsort((rated, -mistakes[rated], scores[rated]))]
    best_first = rated[np.lexsort((rated, -analysis.image_correct[rated], -scores[rated]))]
    num_best = min(NUM_BEST, (len(rated) + 1) // 3 if len(rated) < NUM_BEST + NUM_WORST else NUM_BEST)
    best = best_first[:num_best].tolist()
    worst = [index for index in worst_first.tolist() if index not in best][:NUM_WORST]
    galleries = []
    for title, chosen in (("Worst", worst), ("Best", best)):
        images = [_image(run, validation, analysis, index) for index in chosen]
        galleries.append(
            {"title": title, "images": images, "shown": sum(image["truth"] is not None for image in images)}
        )
    return galleries


def _image(run: RunFiles, validation: Validation, analysis: Analysis, index: int) -> dict[str, Any]:
    correct, false, missed = (
        int(counts[index]) for counts in (analysis.image_correct, analysis.image_false, analysis.image_missed)
    )
    image: dict[str, Any] = {
        "name": validation.paths[index].name,
        "score": float(analysis.image_scores[index]),
        "counts": f"{correct} correct, {missed} missed, {false} wrong",
        "truth": None,
        "prediction": None,
        "reason": "",
    }
    if not validation.may_show(index, [run.path] if run.images is None else [run.path, run.images]):
        return image | {
            "reason": f"{one_line(validation.paths[index])} is not shown: the run was made by someone else, on another "
            "machine or by an older version. Where its images may be shown: ddetr report --images FOLDER RUN."
        }
    try:
        truth, prediction = truth_and_prediction(validation, index, long_side=PAGE_SIDE)
    except InputError as error:
        return image | {"reason": str(error)}
    objects, found = validation.objects, validation.found
    of_truth = objects.labels[objects.image == index]
    of_image = (found.image == index) & (found.scores >= validation.threshold)
    return image | {
        "truth": data_uri(truth),
        "prediction": data_uri(prediction),
        "height": truth.shape[1],
        "width": truth.shape[2],
        "truth_alt": f"Truth in {image['name']}: {tables.listed(of_truth, validation.name)}",
        "prediction_alt": f"Prediction for {image['name']}: {tables.listed(found.labels[of_image], validation.name)}",
    }


def _environment(run: RunFiles) -> dict[str, Any]:
    sessions = [
        {
            "began": shown_time(one.get("began")),
            "seen": shown_time(one.get("seen")),
            "steps": f"{one.get('from_step', 0):,} to {one.get('step', 0):,}",
            "state": one.get("state", "unknown"),
            "host": (one.get("environment") or {}).get("host", "unknown"),
        }
        for one in run.sessions[-MAX_ROWS:]
    ]
    found: Mapping[str, Any] = (run.sessions[-1].get("environment") or {}) if run.sessions else {}
    labels = {
        "command": "Command",
        "folder": "Working directory",
        "host": "Host",
        "gpu": "GPU",
        "gpus": "Number of GPUs",
        "driver": "NVIDIA driver",
        "cuda": "CUDA",
        "processor": "Processor",
        "cores": "Cores",
        "system": "System",
        "kernel": "Kernel",
        "python": "Python",
        "torch": "PyTorch",
        "ddetr": "ddetr",
        "commit": "Commit",
        "backend": "Operator's back end",
        "devices": "Processes",
    }
    rows = [(label, str(found[key])) for key, label in labels.items() if found.get(key) is not None]
    packages = found.get("packages") or {}
    rows += [(name, str(version)) for name, version in packages.items() if name != "torch"]
    return {"rows": rows, "sessions": sessions}


def _of_both(audit: Mapping[str, Any], name: str) -> str:
    numbers = [
        f"{audit[key][name]:,} {role}" for key, role in (("train", "training"), ("val", "validation")) if audit.get(key)
    ]
    return ", ".join(numbers) or "unknown"


def _of_images(metrics: Mapping[str, Any]) -> str:
    """On how many of the images, where these are not all."""
    found = metrics.get("measured_on") or {}
    measured, listed = found.get("num_images"), found.get("num_images_listed")
    return "" if measured == listed else f", {measured:,} of {listed:,} images: the others could not be used"


def _counted(values: Mapping[str, Any]) -> str:
    """Epochs count from one for people."""
    return f"{values['epoch'] + 1:,}" if isinstance(values.get("epoch"), int) else "unknown"


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    if days:
        return f"{days} d {hours} h"
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"

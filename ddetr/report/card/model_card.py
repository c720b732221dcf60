"""README.md of a published detector, written from its run: the hub's front matter, and Markdown."""

import html
import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from ddetr.checkpoint import Checkpoint
from ddetr.evaluation.metrics import METRIC_NAMES
from ddetr.printable import one_line
from ddetr.report.card.public import last_part, public_command, without_paths
from ddetr.report.run_files import RunFiles
from ddetr.report.tables import CLASS_COLUMNS, class_rows
from ddetr.report.templates import score
from ddetr.untrusted import is_number
from ddetr.weight_files.catalogue import catalogue
from ddetr.weight_files.hub import hub_place

PAPER = "arXiv:2010.04159"
_CARD_METRICS = {
    "AP": "AP (COCO, IoU 0.50:0.95)",
    "AP50": "AP (IoU 0.50)",
    "AP75": "AP (IoU 0.75)",
}
_ENVIRONMENT = {
    "gpu": "GPU",
    "gpus": "Number of GPUs",
    "cuda": "CUDA",
    "processor": "Processor",
    "system": "System",
    "python": "Python",
    "torch": "PyTorch",
    "ddetr": "ddetr",
    "commit": "Commit",
    "devices": "Processes",
}


def model_card(
    run: RunFiles,
    checkpoint: Checkpoint,
    metrics: Any,
    repo: str,
    licence: str,
    *,
    has_curves: bool,
    pictures: Sequence[str],
) -> str:
    """README.md.

    Args:
        run: the run that made the checkpoint.
        checkpoint: what is published.
        metrics: of its validation, as metrics.json holds them; None where there was none.
        repo: "org/name" on the hub.
        licence: SPDX name in small letters, as the hub has it.
        has_curves: whether curves.png lies beside it.
        pictures: names of the pictures that lie beside it.
    """
    metrics = metrics if isinstance(metrics, Mapping) else {}
    source = _source(run)
    front = yaml.safe_dump(_front_matter(run, checkpoint, repo, licence, metrics, source), sort_keys=False)
    sections = [
        f"# {_text(repo.rpartition('/')[2])}",
        _summary(checkpoint),
        _use(repo),
        _results(run, metrics, has_curves=has_curves),
        _pictures(pictures),
        _data(run, checkpoint),
        _recipe(run, checkpoint, source),
        _environment(run),
        f"## Licence\n\n{_text(licence)}, chosen by who published it.",
    ]
    return f"---\n{front}---\n\n" + "\n\n".join(filter(None, sections)) + "\n"


def _front_matter(
    run: RunFiles,
    checkpoint: Checkpoint,
    repo: str,
    licence: str,
    metrics: Mapping[str, Any],
    source: str | None,
) -> dict[str, Any]:
    """What the hub reads; its library must be able to read the results back."""
    front: dict[str, Any] = {
        "library_name": "ddetr",
        "license": licence,
        "pipeline_tag": "object-detection",
        "tags": ["object-detection", "deformable-detr", "detr"],
    }
    entry = catalogue().get(source or "")
    if (place := hub_place(entry.address if entry else source or "")) is not None:
        front["base_model"] = place.repo
    measured = [
        {"type": name, "name": what, "value": round(float(metrics[name]), 4)}
        for name, what in _CARD_METRICS.items()
        if is_number(metrics.get(name))
    ]
    if measured:
        data = _split(run, "val").get("name") or checkpoint.training.get("data") or "validation"
        result = {
            "task": {"type": "object-detection", "name": "Object detection"},
            "dataset": {"type": re.sub(r"[^\w.-]+", "-", one_line(data)).strip("-") or "data", "name": one_line(data)},
            "metrics": measured,
        }
        front["model-index"] = [{"name": repo.rpartition("/")[2], "results": [result]}]
    return front


def _summary(checkpoint: Checkpoint) -> str:
    config = checkpoint.config
    kind = "two-stage " if config.get("two_stage") else "box-refining " if config.get("with_box_refine") else ""
    names = [category.name for category in checkpoint.categories]
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return (
        f"A {kind}Deformable DETR ({PAPER}) with the backbone {_text(config.get('backbone'))} that finds "
        f"{', '.join(map(_text, names[:20]))}{more} in images; trained with ddetr {_text(checkpoint.ddetr_version)}."
    )


def _use(repo: str) -> str:
    return f"""## How to use it

With ddetr installed, as its README says:

```sh
ddetr predict --weights {repo} --output predictions image.jpg
ddetr train --weights {repo} --data PATH    # on images of your own
```

```python
from ddetr import Predictor

predictor = Predictor.from_pretrained("{repo}")
found = predictor.predict("image.jpg")
print(found.names, found.scores, found.boxes_xyxy)
```"""


def _results(run: RunFiles, metrics: Mapping[str, Any], *, has_curves: bool) -> str:
    if not metrics:
        return "## Results\n\nThe run has had no validation: nothing is known of its accuracy."
    data = _text(_split(run, "val").get("name") or "the validation images")
    measured = [f"{_count(metrics.get('num_images'))} images", f"{_count(metrics.get('num_objects'))} objects"]
    parts = [
        f"## Results\n\nCOCO's metrics on {data}: {', '.join(measured)}, after step {_count(metrics.get('step'))}.",
        _table(METRIC_NAMES, [[score(metrics.get(name)) for name in METRIC_NAMES]]),
    ]
    if is_number(metrics.get("threshold")):
        parts.append(
            f"The best F1, {score(metrics.get('f1'))}, is at the score {score(metrics['threshold'])}: objects below it "
            "are not shown where no other threshold is given."
        )
    rows = class_rows(metrics={"best": metrics}, detections=None) if _has_classes(metrics) else []
    if rows:
        cells = [[_text(row["name"]), _count(row["num_objects"]), *map(score, row["values"])] for row in rows]
        parts.append(_table(("class", "objects", *CLASS_COLUMNS), cells))
    if has_curves:
        parts.append("![losses and AP by step](curves.png)")
    return "\n\n".join(parts)


def _pictures(names: Sequence[str]) -> str:
    if not names:
        return ""
    shown = "\n\n".join(f"![truth beside prediction]({name})" for name in names)
    return f"## Validation images\n\nTruth on the left, prediction on the right.\n\n{shown}"


def _data(run: RunFiles, checkpoint: Checkpoint) -> str:
    rows = [
        [role, _text(split.get("name", "-")), *(_count(split.get(key)) for key in ("num_images", "num_objects"))]
        for role, split in (("training", _split(run, "train")), ("validation", _split(run, "val")))
        if split
    ]
    table = _table(("", "name", "images", "objects"), rows) if rows else "The run says nothing of its data."
    parts = [f"## Data\n\n{table}", f"{len(checkpoint.categories):,} classes; their names and ids are in config.json."]
    if shared := _num_shared(run):
        parts.append(
            f"**{_count(shared)} of the validation images are training images too: the results flatter the detector.**"
        )
    return "\n\n".join(parts)


def _num_shared(run: RunFiles) -> int:
    """Validation images that the audit has found in training."""
    findings = run.audit.get("findings")
    counts = [
        group.get("count")
        for group in (findings if isinstance(findings, list) else [])
        if isinstance(group, Mapping) and group.get("kind") in ("duplicate-across-splits", "validation-is-training")
    ]
    return max((count for count in counts if isinstance(count, int)), default=0)


def _recipe(run: RunFiles, checkpoint: Checkpoint, source: str | None) -> str:
    parts = ["## Recipe"]
    begun = _begun(run)
    if begun:
        start = _text(source) if source else f"a file, {_text(last_part(str(begun.get('source'))))}"
        parts.append(f"It started from {start} (sha256 {_text(str(begun.get('sha256'))[:16])}).")
    trained = checkpoint.training
    if is_number(trained.get("step")):
        parts.append(f"These are the weights after step {_count(trained['step'])}.")
    environment = _last_environment(run)
    if command := public_command(environment.get("command"), source):
        parts.append(f"Command, paths shortened:\n\n{_fenced(command, 'sh')}")
    if run.config:
        settings = yaml.safe_dump(without_paths(run.config, source), sort_keys=False).rstrip()
        parts.append(f"All settings, paths shortened:\n\n{_fenced(settings, 'yaml')}")
    return "\n\n".join(parts)


def _environment(run: RunFiles) -> str:
    found = _last_environment(run)
    packages = found.get("packages")
    rows = [[label, _text(found[key])] for key, label in _ENVIRONMENT.items() if found.get(key) is not None]
    if isinstance(packages, Mapping):
        rows += [[_text(name), _text(version)] for name, version in packages.items() if name != "torch"]
    if is_number(run.seconds) and run.seconds > 0:
        rows.append(["Minutes of training", f"{run.seconds / 60:,.0f}, validations included"])
    return f"## Environment\n\n{_table(('', ''), rows)}" if rows else ""


def _source(run: RunFiles) -> str | None:
    """What the run started from, where others can have it too."""
    begun = _begun(run)
    source = begun.get("source")
    if not isinstance(source, str) or begun.get("is_public") is not True:
        return None
    return source.partition("?")[0]


def _begun(run: RunFiles) -> Mapping[str, Any]:
    return next((one["weights"] for one in run.sessions if isinstance(one.get("weights"), Mapping)), {})


def _last_environment(run: RunFiles) -> Mapping[str, Any]:
    found = run.sessions[-1].get("environment") if run.sessions else None
    return found if isinstance(found, Mapping) else {}


def _split(run: RunFiles, name: str) -> Mapping[str, Any]:
    found = run.audit.get(name)
    return found if isinstance(found, Mapping) else {}


def _has_classes(metrics: Mapping[str, Any]) -> bool:
    rows = metrics.get("per_class")
    needed = {"name", "label", "num_objects", "category_id"}
    return isinstance(rows, list) and all(isinstance(row, Mapping) and needed <= row.keys() for row in rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(value: object) -> str:
    """Words that others chose, without what Markdown or HTML would make of them."""
    return re.sub(r"([\\`*_\[\]|])", r"\\\1", html.escape(one_line(value), quote=False))


def _fenced(text: str, language: str) -> str:
    """A block of code; a fence in it does not end it."""
    fence = "`" * max(3, 1 + max((len(found) for found in re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else "-"

"""The numbers as JSON and as tables, and the threshold of the best F1."""

import io
import json
import math

import numpy as np
import pytest
from made_detections import compute, make_annotations, make_detections

from ddetr.evaluation.metrics import METRIC_NAMES, Metrics, best_threshold


def test_metrics_as_json_and_as_tables():
    from rich.console import Console

    annotations = make_annotations()
    metrics = compute(annotations, make_detections(annotations))
    plain = json.loads(json.dumps(metrics.to_dict(), allow_nan=False))
    assert [plain[name] for name in METRIC_NAMES] == pytest.approx(list(metrics.numbers().values()))
    assert plain["per_class"][-1]["AP"] is None
    assert plain["per_class"][1]["category_id"] == 9
    assert sum(row["num_objects"] for row in plain["per_class"]) == plain["num_objects"] == metrics.num_objects
    console = Console(file=io.StringIO(), width=100)
    console.print(metrics.render())
    text = console.file.getvalue()
    assert f"{metrics.AP:.3f}" in text
    assert "class 5" in text
    assert "nan" not in text
    console.print(metrics.render(per_class=False))
    assert text.count("class 5") == console.file.getvalue().count("class 5")


def test_best_threshold_by_hand():
    scores = np.array([0.9, 0.8, 0.6, 0.3])
    labels = np.array([0, 0, 0, 0])
    correct = np.array([True, True, False, True])
    # thresholds up to 0.3: 3 right of 4, of 3 objects: F1 = 6/7; 0.31 to 0.6: 2 of 3: 4/6; 0.61 to 0.8: 2 of 2: 4/5
    threshold, f1 = best_threshold(scores, labels, correct, np.array([3]))
    assert f1 == pytest.approx(6 / 7)
    assert 0.01 <= threshold <= 0.3
    assert all(math.isnan(value) for value in best_threshold(scores, labels, correct, np.array([0])))


def test_metrics_of_older_versions_can_be_read():
    values = compute(annotations := make_annotations(), make_detections(annotations)).to_dict()
    for row in values["per_class"]:
        del row["APs"], row["APm"], row["APl"]
    assert math.isnan(Metrics.from_dict(values).per_class[0].APs)


def test_best_threshold_equals_a_plain_loop():
    rng = np.random.default_rng(0)
    scores = rng.random(500).astype(np.float32).round(2)
    labels, correct = rng.integers(0, 4, 500), rng.random(500) < 0.5
    num_objects = np.array([200, 90, 0, 130])
    f1 = []
    for threshold in np.arange(1, 100) / 100:
        of_class = []
        for label in (0, 1, 3):
            kept = (scores.astype(np.float64) >= threshold) & (labels == label)
            of_class.append(2 * (kept & correct).sum() / (kept.sum() + num_objects[label]))
        f1.append(np.mean(of_class))
    threshold, best = best_threshold(scores, labels, correct, num_objects)
    assert best == pytest.approx(max(f1), abs=1e-12)
    assert f1[round(100 * threshold) - 1] == pytest.approx(max(f1), abs=1e-9)

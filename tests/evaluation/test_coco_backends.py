"""The libraries behind one function: the numbers of each are pycocotools', and nothing is printed."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from made_detections import (
    INSTALLED,
    as_detections,
    assert_equals_pycocotools,
    coco_json,
    compute,
    empty_objects,
    every_backend,
    exact_results,
    make_annotations,
    make_detections,
    needs_pycocotools,
    pycocotools_eval,
    read_truth,
    truth_as_detections,
)

from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator
from ddetr.evaluation.metrics import Metrics


@needs_pycocotools
@every_backend
@pytest.mark.parametrize("crowds", [False, True])
def test_numbers_equal_pycocotools_on_synthetic_truth(backend, crowds):
    annotations = make_annotations(crowds=crowds)
    detections = make_detections(annotations)
    metrics = compute(annotations, detections, backend=backend)
    assert metrics.backend == backend
    assert 0.05 < metrics.AP < 0.9  # the detections are neither hopeless nor perfect, so that the test says something
    assert_equals_pycocotools(metrics, pycocotools_eval(coco_json(annotations), exact_results(annotations, detections)))


@needs_pycocotools
@every_backend
def test_numbers_equal_pycocotools_on_coco(backend, any_coco):
    (annotation_file,) = any_coco.glob("**/instances_val*.json")
    truth = json.loads(annotation_file.read_text())
    annotations = read_truth(truth)
    detections = make_detections(annotations, per_image=100)
    metrics = compute(annotations, detections, backend=backend)
    assert_equals_pycocotools(metrics, pycocotools_eval(truth, exact_results(annotations, detections)))


@every_backend
def test_truth_as_detections_is_perfect(backend):
    annotations = make_annotations()
    metrics = compute(annotations, truth_as_detections(annotations), backend=backend)
    for name in ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100"):
        assert getattr(metrics, name) == pytest.approx(1.0), name
    assert metrics.f1 == 1.0
    assert metrics.threshold == 0.5  # every threshold is right: the middle


@every_backend
def test_no_detections_are_zeros(backend, capfd):
    annotations = make_annotations()
    metrics = compute(annotations, [as_detections([], [], [])] * len(annotations.images), backend=backend)
    assert set(metrics.numbers().values()) == {0.0}
    assert math.isnan(metrics.per_class[-1].AP)  # it has no objects
    assert metrics.per_class[0].AP == 0.0
    assert (math.isnan(metrics.threshold), metrics.f1) == (True, 0.0)
    assert capfd.readouterr() == ("", "")


@every_backend
def test_no_truth_is_undefined(backend, capfd):
    record = ImageRecord(1, Path("a.jpg"), (50, 60), *empty_objects())
    annotations = Annotations("empty", "coco", (Category(4, "cat"),), [record], ())
    metrics = compute(annotations, [as_detections([[1, 2, 3, 4]], [0.5], [0])], backend=backend)
    assert all(math.isnan(number) for number in metrics.numbers().values())
    assert metrics.to_dict()["AP"] is None
    assert capfd.readouterr() == ("", "")


@every_backend
def test_nothing_is_printed(backend, capfd):
    annotations = make_annotations()
    compute(annotations, make_detections(annotations), backend=backend)
    assert capfd.readouterr() == ("", "")


@every_backend
@pytest.mark.parametrize("max_detections", [1, 5, 300])
def test_other_limits_of_detections(backend, max_detections):
    annotations = make_annotations()
    metrics = compute(annotations, make_detections(annotations), max_detections=max_detections, backend=backend)
    reference = compute(annotations, make_detections(annotations), backend=backend)
    assert metrics.AR1 == reference.AR1
    if max_detections == 1:
        assert metrics.AR1 == metrics.AR10 == metrics.AR100
    elif max_detections == 300:  # there are fewer than 100 of a class, so this changes nothing
        assert metrics.numbers() == pytest.approx(reference.numbers())


def test_auto_takes_the_next_backend(monkeypatch):
    if len(INSTALLED) < 2:
        pytest.skip("needs two COCO evaluators")
    monkeypatch.setitem(BACKENDS, INSTALLED[0], ("no_such_module", "no_such_module", "COCOeval"))
    assert CocoEvaluator(make_annotations()).backend == INSTALLED[1]


@needs_pycocotools
@every_backend
def test_sizes_by_class_equal_pycocotools(backend):
    annotations = make_annotations(num_images=60)
    detections = make_detections(annotations)
    metrics = compute(annotations, detections, backend=backend)
    evaluation = pycocotools_eval(coco_json(annotations), exact_results(annotations, detections))
    precision = evaluation.eval["precision"]
    for label, row in enumerate(metrics.per_class):
        for area, name in enumerate(("APs", "APm", "APl"), start=1):
            values = precision[:, :, label, area, -1]
            expected = math.nan if values.max() == -1 else values[values > -1].mean()
            assert getattr(row, name) == pytest.approx(expected, abs=1e-9, nan_ok=True), (row.name, name)
    np.testing.assert_allclose(metrics.curves, precision[[0, 5], :, :, 0, -1], atol=1e-9)
    assert "curves" not in metrics.to_dict()
    assert Metrics.from_dict(metrics.to_dict()).per_class[0].APm == metrics.per_class[0].APm

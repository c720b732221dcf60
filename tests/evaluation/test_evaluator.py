"""COCO's metrics: equal to pycocotools', defined where there is nothing, the same from a file and from processes."""

import contextlib
import importlib.util
import io
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.ops import box_iou

from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.errors import InputError
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator, evaluate
from ddetr.evaluation.metrics import METRIC_NAMES, Metrics, best_threshold
from ddetr.evaluation.overlaps import Found, Objects, match_detections, overlapping_pairs

MODULES = {name: modules[0].split(".")[0] for name, modules in BACKENDS.items()}
INSTALLED = [name for name, module in MODULES.items() if importlib.util.find_spec(module)]

needs_pycocotools = pytest.mark.skipif("pycocotools" not in INSTALLED, reason="pycocotools, the reference, is missing")
every_backend = pytest.mark.parametrize("backend", INSTALLED)


def make_annotations(num_images=40, num_classes=6, seed=0, crowds=True) -> Annotations:
    """Random boxes of all three sizes; some crowds; some images without objects; category ids with gaps."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(num_images):
        n = int(rng.integers(0, 12)) if i % 5 else 0
        height, width = int(rng.integers(200, 500)), int(rng.integers(200, 500))
        top_left = rng.uniform(0, [width - 12, height - 12], (n, 2))
        size = np.exp(rng.uniform(np.log(8), np.log(250), (n, 2)))
        bottom_right = np.minimum(top_left + size, [width, height])
        boxes_xyxy = np.concatenate([top_left, bottom_right], axis=1).astype(np.float32)
        area = (bottom_right - top_left).prod(axis=1) * rng.uniform(0.5, 1, n)  # a mask's, smaller than the box
        labels = rng.integers(0, num_classes - 1, n)  # the last class has no objects
        ignore = (rng.random(n) < 0.15) & crowds
        path = Path(f"{i}.jpg")
        record = ImageRecord(10 * i + 3, path, (height, width), boxes_xyxy, labels, area.astype(np.float32), ignore)
        images.append(record)
    categories = tuple(Category(7 * label + 2, f"class {label}") for label in range(num_classes))
    return Annotations("synthetic", "coco", categories, images, ())


def make_detections(annotations: Annotations, seed=1, per_image=60):
    """Objects shifted a little, with some wrong classes, doubles and boxes anywhere; scores with ties."""
    rng = np.random.default_rng(seed)
    num_classes = len(annotations.categories)
    detections = []
    for record in annotations.images:
        height, width = record.size_hw
        n = len(record.labels)
        side = (record.boxes_xyxy[:, 2:] - record.boxes_xyxy[:, :2])[:, [0, 1, 0, 1]]
        near = [record.boxes_xyxy + side * rng.normal(0, noise, (n, 4)) for noise in (0.03, 0.15)]
        corners = rng.uniform(0, 1, (per_image, 2, 2)) * [width, height]
        anywhere = np.concatenate([corners.min(axis=1), corners.max(axis=1) + 1], axis=1)
        boxes = np.concatenate([*near, anywhere])
        boxes[:, 2:] = np.maximum(boxes[:, 2:], boxes[:, :2] + 1)
        labels = np.concatenate([record.labels, record.labels, rng.integers(0, num_classes, per_image)])
        labels = np.where(rng.random(len(labels)) < 0.1, rng.integers(0, num_classes, len(labels)), labels)
        scores = np.concatenate([rng.uniform(0.2, 1, 2 * n), rng.uniform(0, 0.5, per_image)])
        scores = np.where(rng.random(len(scores)) < 0.3, scores.round(1), scores)
        detections.append(as_detections(boxes, scores, labels))
    return detections


def as_detections(boxes_xyxy, scores, labels) -> dict[str, torch.Tensor]:
    return {
        "boxes": torch.as_tensor(np.array(boxes_xyxy), dtype=torch.float32).reshape(-1, 4),
        "scores": torch.as_tensor(np.array(scores), dtype=torch.float32),
        "labels": torch.as_tensor(np.array(labels), dtype=torch.int64),
    }


def truth_as_detections(annotations: Annotations) -> list[dict[str, torch.Tensor]]:
    kept = [~record.ignore for record in annotations.images]
    return [
        as_detections(record.boxes_xyxy[keep], np.ones(int(keep.sum())), record.labels[keep])
        for record, keep in zip(annotations.images, kept)
    ]


def ids_of(annotations: Annotations) -> list[int]:
    return [record.image_id for record in annotations.images]


def compute(annotations, detections, **options):
    evaluator = CocoEvaluator(annotations, **options)
    evaluator.update(ids_of(annotations), detections)
    return evaluator.compute()


def coco_json(annotations: Annotations) -> dict:
    """Written out here on its own, so that the evaluator's way of handing over the truth is tested too."""
    objects = []
    for record in annotations.images:
        for box, label, area, ignore in zip(record.boxes_xyxy, record.labels, record.area, record.ignore):
            x0, y0, x1, y1 = (float(value) for value in box)
            category_id = annotations.categories[label].category_id
            entry = {"image_id": record.image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            objects.append({**entry, "id": len(objects) + 1, "area": float(area), "iscrowd": int(ignore)})
    return {
        "info": {},
        "images": [{"id": r.image_id, "height": r.size_hw[0], "width": r.size_hw[1]} for r in annotations.images],
        "categories": [{"id": c.category_id, "name": c.name} for c in annotations.categories],
        "annotations": objects,
    }


def pycocotools_eval(truth: dict, results: list[dict]):
    """pycocotools as its own demo uses it."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def exact_results(annotations, detections) -> list[dict]:
    """Detections in COCO's format without any rounding, by other means than the package's."""
    results = []
    for image_id, one in zip(ids_of(annotations), detections):
        for box, score, label in zip(one["boxes"].double(), one["scores"].double(), one["labels"]):
            x0, y0, x1, y1 = box.tolist()
            category_id = annotations.categories[label].category_id
            entry = {"image_id": image_id, "category_id": category_id, "bbox": [x0, y0, x1 - x0, y1 - y0]}
            results.append({**entry, "score": score.item()})
    return results


def assert_equals_pycocotools(metrics, evaluation) -> None:
    expected = [math.nan if value == -1 else value for value in evaluation.stats]
    assert list(metrics.numbers().values()) == pytest.approx(expected, abs=1e-6, nan_ok=True)
    precision = evaluation.eval["precision"]  # (10, 101, K, 4, 3)
    for index, category_id in enumerate(evaluation.params.catIds):
        row = next(row for row in metrics.per_class if row.category_id == category_id)
        of_class = precision[:, :, index, 0, -1]
        expected_row = (
            [math.nan] * 3 if of_class.max() == -1 else [of_class.mean(), of_class[0].mean(), of_class[5].mean()]
        )
        of_row = [getattr(row, name) for name in ("AP", "AP50", "AP75")]
        assert of_row == pytest.approx(expected_row, abs=1e-6, nan_ok=True)


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
def test_numbers_equal_pycocotools_on_coco(backend, shared_data):
    (annotation_file,) = (shared_data / "coco_tiny").glob("**/instances_val*.json")
    truth = json.loads(annotation_file.read_text())
    annotations = read_truth(truth)
    detections = make_detections(annotations, per_image=100)
    metrics = compute(annotations, detections, backend=backend)
    assert_equals_pycocotools(metrics, pycocotools_eval(truth, exact_results(annotations, detections)))


def read_truth(truth: dict) -> Annotations:
    categories = tuple(Category(category["id"], category["name"]) for category in truth["categories"])
    label_of = {category.category_id: label for label, category in enumerate(categories)}
    images = []
    for image in truth["images"]:
        objects = [entry for entry in truth["annotations"] if entry["image_id"] == image["id"]]
        boxes_xywh = np.array([entry["bbox"] for entry in objects]).reshape(-1, 4)
        boxes_xyxy = np.concatenate([boxes_xywh[:, :2], boxes_xywh[:, :2] + boxes_xywh[:, 2:]], axis=1)
        labels = np.array([label_of[entry["category_id"]] for entry in objects], np.int64)
        area = np.array([entry["area"] for entry in objects], np.float32)
        ignore = np.array([entry.get("iscrowd", 0) for entry in objects], bool)
        size_hw = (image["height"], image["width"])
        path = Path(image["file_name"])
        images.append(ImageRecord(image["id"], path, size_hw, boxes_xyxy.astype(np.float32), labels, area, ignore))
    return Annotations("coco", "coco", categories, images, ())


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


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_at_all(images):
    records = [ImageRecord(1, Path("a.jpg"), (50, 60), *empty_objects())][:images]
    metrics = CocoEvaluator(Annotations("empty", "coco", (), records, ())).compute()
    assert all(math.isnan(number) for number in metrics.numbers().values())
    assert metrics.per_class == []


def empty_objects():
    return np.zeros((0, 4), np.float32), np.zeros(0, np.int64), np.zeros(0, np.float32), np.zeros(0, bool)


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


def from_coco_results(annotations: Annotations, results: list[dict]) -> dict:
    """The metrics of what a file in COCO's format holds."""
    label_of = {category.category_id: label for label, category in enumerate(annotations.categories)}
    ids = list(dict.fromkeys(result["image_id"] for result in results))
    assert [result["image_id"] for result in results] == sorted(result["image_id"] for result in results)
    evaluator = CocoEvaluator(annotations)
    evaluator.merge(
        [
            {
                "image_ids": np.array(ids),
                "num_detections": np.array([sum(result["image_id"] == i for result in results) for i in ids]),
                "num_non_finite": np.zeros(len(ids), np.int64),
                "boxes_xywh": np.array([result["bbox"] for result in results], np.float32),
                "scores": np.array([result["score"] for result in results], np.float32),
                "labels": np.array([label_of[result["category_id"]] for result in results]),
            }
        ]
    )
    return evaluator.compute().to_dict()


def test_saved_predictions_give_the_same_numbers(tmp_path):
    annotations = make_annotations()
    detections = make_detections(annotations)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids_of(annotations), detections)
    results = evaluator.coco_results()
    assert {result["category_id"] for result in results} <= {c.category_id for c in annotations.categories}
    saved = tmp_path / "predictions.json"
    saved.write_text(json.dumps(results))
    assert from_coco_results(annotations, json.loads(saved.read_text())) == evaluator.compute().to_dict()
    if "pycocotools" in INSTALLED:
        evaluation = pycocotools_eval(coco_json(annotations), json.loads(saved.read_text()))
        assert_equals_pycocotools(evaluator.compute(), evaluation)


def test_results_are_short_and_exact():
    boxes = [[0.1, 0.2, 100.3, 50.4]]
    record = ImageRecord(7, Path("a.jpg"), (100, 200), *empty_objects())
    evaluator = CocoEvaluator(Annotations("one", "coco", (Category(1, "a"), Category(5, "b")), [record], ()))
    evaluator.update([7], [as_detections(boxes, [0.9], [1])])
    (result,) = evaluator.coco_results()
    assert result == {"image_id": 7, "category_id": 5, "bbox": pytest.approx([0.1, 0.2, 100.2, 50.2]), "score": 0.9}
    assert max(len(str(value)) for value in result["bbox"]) <= 10


def test_merged_processes_equal_one():
    annotations = make_annotations()
    ids, detections = ids_of(annotations), make_detections(annotations)
    whole = CocoEvaluator(annotations)
    whole.update(ids, detections)
    shards = []
    for rank in range(3):
        order = list(range(rank, len(ids), 3))
        order += list(range(3 - rank))  # wraps around: images that other ranks have too
        shard = CocoEvaluator(annotations)
        for i in order:
            shard.update([ids[i]], [detections[i]])
        shards.append(shard)
    states = [shard.state() for shard in shards]
    expected = whole.compute().to_dict()
    for shard in shards:
        shard.merge(states)
        assert shard.compute().to_dict() == expected


def test_merging_prefers_the_first_state_on_every_rank():
    annotations = make_annotations()
    image_id = ids_of(annotations)[1]
    shards = [CocoEvaluator(annotations) for _ in range(2)]
    for rank, shard in enumerate(shards):
        shard.update([image_id], [as_detections([[0, 0, 10, 10]], [0.1 + rank / 2], [0])])
    states = [shard.state() for shard in shards]
    for shard in shards:
        shard.merge(states)
        assert [result["score"] for result in shard.coco_results()] == [0.1]


def test_an_empty_process_merges():
    annotations = make_annotations()
    evaluator = CocoEvaluator(annotations)
    evaluator.merge([CocoEvaluator(annotations).state()])
    assert evaluator.coco_results() == []


def test_repeated_images_count_once():
    annotations = make_annotations()
    ids, detections = ids_of(annotations), make_detections(annotations)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids, detections)
    expected = evaluator.compute()
    evaluator.update(ids[:3], detections[3:6])
    assert evaluator.compute().to_dict() == expected.to_dict()
    evaluator.reset()
    assert evaluator.coco_results() == []


def test_partial_evaluation(caplog):
    annotations = make_annotations()
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids_of(annotations)[:10], truth_as_detections(annotations)[:10])
    with caplog.at_level(logging.WARNING):
        everything = evaluator.compute()
    assert everything.AP < 1
    assert everything.num_images == len(annotations.images)
    assert "30 of 40 images got no detections" in caplog.text
    part = evaluator.compute(partial=True)
    assert part.numbers()["AP"] == pytest.approx(1.0)
    assert part.num_images == 10


def test_non_finite_detections_are_left_out_and_reported(caplog):
    annotations = make_annotations()
    detections = truth_as_detections(annotations)
    detections[1]["boxes"][0, 2] = math.nan
    detections[2]["scores"][0] = math.inf
    with caplog.at_level(logging.WARNING):
        metrics = compute(annotations, detections)
    assert metrics.AP < 1
    assert "2 detections were NaN or infinite" in caplog.text


def test_wrong_calls_say_what_is_wrong(monkeypatch):
    annotations = make_annotations()
    evaluator = CocoEvaluator(annotations)
    with pytest.raises(InputError, match=r"Labels must lie in 0\.\.5.*has 90\.\.90"):
        evaluator.update([3], [as_detections([[0, 0, 1, 1]], [1], [90])])
    with pytest.raises(InputError, match="Image id 1 is not in synthetic"):
        evaluator.update([1], [as_detections([], [], [])])
    with pytest.raises(InputError, match="detections for 2 images, got 1"):
        evaluator.update([3, 13], [as_detections([], [], [])])
    with pytest.raises(InputError, match=r"got \(1, 4\), \(2,\) and \(1,\)"):
        evaluator.update([3], [as_detections([[0, 0, 1, 1]], [1, 1], [0])])
    with pytest.raises(InputError, match="expected auto, hotcoco"):
        CocoEvaluator(annotations, backend="coco")
    with pytest.raises(InputError, match="max_detections"):
        CocoEvaluator(annotations, max_detections=0)
    monkeypatch.setitem(BACKENDS, "hotcoco", ("no_such_module", "no_such_module", "COCOeval"))
    with pytest.raises(InputError, match="pip install hotcoco"):
        CocoEvaluator(annotations, backend="hotcoco")
    for name in BACKENDS:
        monkeypatch.setitem(BACKENDS, name, ("no_such_module", "no_such_module", "COCOeval"))
    with pytest.raises(InputError, match="pip install hotcoco"):
        CocoEvaluator(annotations)


def test_auto_takes_the_next_backend(monkeypatch):
    if len(INSTALLED) < 2:
        pytest.skip("needs two COCO evaluators")
    monkeypatch.setitem(BACKENDS, INSTALLED[0], ("no_such_module", "no_such_module", "COCOeval"))
    assert CocoEvaluator(make_annotations()).backend == INSTALLED[1]


def test_evaluate_runs_a_predict_function_over_batches():
    annotations = make_annotations()
    by_size = {record.size_hw: one for record, one in zip(annotations.images, truth_as_detections(annotations))}
    assert len(by_size) == len(annotations.images)

    def predict_fn(images, mask, target_sizes_hw):
        assert images.shape[0] == mask.shape[0] == target_sizes_hw.shape[0]
        assert not torch.is_grad_enabled()
        return [by_size[tuple(size)] for size in target_sizes_hw.tolist()]

    def batches():
        for i in range(0, len(annotations.images), 7):
            records = annotations.images[i : i + 7]
            targets = [
                {"image_id": torch.tensor(record.image_id), "orig_size": torch.tensor(record.size_hw)}
                for record in records
            ]
            yield torch.zeros(len(records), 3, 4, 4), torch.zeros(len(records), 4, 4, dtype=torch.bool), targets

    seen = []
    evaluator = CocoEvaluator(annotations)
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    metrics = evaluate(predict_fn, batches(), annotations, evaluator=evaluator, progress=progress)
    assert metrics.numbers()["AP"] == pytest.approx(1.0)
    assert seen == [(7, 40), (14, 40), (21, 40), (28, 40), (35, 40), (40, 40)]
    assert len(evaluator.coco_results()) == metrics.num_objects


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


def test_match_detections_by_hand():
    objects_xyxy = np.array([[0.0, 0, 10, 10], [20, 0, 30, 10], [40, 0, 80, 40], [0, 0, 10, 10]])
    boxes_xyxy = np.array(
        [[0.0, 0, 10, 9], [0, 0, 10, 10], [20, 0, 30, 10], [42, 2, 50, 10], [60, 60, 70, 70], [0, 0, 10, 10]]
    )
    found = Found(
        np.array([0, 0, 0, 0, 0, 1]), to_xywh(boxes_xyxy), np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.1]), np.zeros(6, int)
    )
    ignore = np.array([False, False, True, False])
    objects = Objects(np.array([0, 0, 0, 1]), objects_xyxy, np.array([0, 1, 0, 0]), np.ones(4), ignore)
    counts, correct = match_detections(found, objects)
    # double of a better one, wrong class, in a crowd, nowhere, the object of another image
    assert correct.tolist() == [True, False, False, False, False, True]
    assert counts.tolist() == [True, True, True, False, True, True]


def to_xywh(boxes_xyxy):
    return np.concatenate([boxes_xyxy[:, :2], boxes_xyxy[:, 2:] - boxes_xyxy[:, :2]], axis=1).astype(np.float32)


@pytest.mark.parametrize("at_once", [1, 50, 10**6])
@pytest.mark.parametrize("same_class", [True, False])
def test_overlapping_pairs_equal_a_plain_loop(monkeypatch, at_once, same_class):
    monkeypatch.setattr("ddetr.evaluation.overlaps._PAIRS_AT_ONCE", at_once)
    annotations = make_annotations(num_images=8)
    evaluator = CocoEvaluator(annotations)
    evaluator.update(ids_of(annotations), make_detections(annotations, per_image=10))
    _, objects, found = evaluator.gathered()
    expected = []
    for k, (image, box, label) in enumerate(zip(found.image, found.boxes_xyxy, found.labels)):
        for n in np.flatnonzero((objects.image == image) & ((objects.labels == label) | (not same_class))):
            iou = box_iou(torch.tensor(box)[None], torch.tensor(objects.boxes_xyxy[n]).double()[None]).item()
            sides = np.minimum(box[2:], objects.boxes_xyxy[n, 2:]) - np.maximum(box[:2], objects.boxes_xyxy[n, :2])
            inside = sides.clip(0).prod() / (box[2:] - box[:2]).prod()
            if objects.ignore[n] and inside >= 0.5:
                expected.append((k, n, 0.0, inside))
            elif not objects.ignore[n] and iou >= 0.1:
                expected.append((k, n, iou, 0.0))
    pairs = overlapping_pairs(found, objects, 0.1, same_class=same_class)
    assert len(expected) > 20
    np.testing.assert_allclose(np.column_stack(pairs), expected, rtol=1e-6)


def test_gathered_is_by_image_id_and_may_be_partial():
    annotations = make_annotations(num_images=6)
    evaluator = CocoEvaluator(annotations)
    some = [4, 2]
    detections = make_detections(annotations, per_image=3)
    evaluator.update([annotations.images[i].image_id for i in some], [detections[i] for i in some])
    image_ids, objects, found = evaluator.gathered(partial=True)
    assert image_ids.tolist() == [annotations.images[i].image_id for i in (2, 4)]
    np.testing.assert_array_equal(objects.boxes_xyxy[objects.image == 1], annotations.images[4].boxes_xyxy)
    np.testing.assert_array_equal(found.scores[found.image == 0], detections[2]["scores"].numpy())
    image_ids, objects, found = evaluator.gathered()
    assert len(image_ids) == 6
    assert len(objects.labels) == sum(len(record.labels) for record in annotations.images)
    assert set(found.image.tolist()) == set(some)


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

"""Gathering detections: from processes, in any order, repeated, partial; and what is wrong with them."""

import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from made_detections import (
    as_detections,
    compute,
    empty_objects,
    ids_of,
    make_annotations,
    make_detections,
    truth_as_detections,
)

from ddetr.datasets.annotations import Annotations, ImageRecord
from ddetr.errors import InputError
from ddetr.evaluation.backends import BACKENDS
from ddetr.evaluation.evaluator import CocoEvaluator, evaluate


@pytest.mark.parametrize("images", [0, 1])
def test_nothing_at_all(images):
    records = [ImageRecord(1, Path("a.jpg"), (50, 60), *empty_objects())][:images]
    metrics = CocoEvaluator(Annotations("empty", "coco", (), records, ())).compute()
    assert all(math.isnan(number) for number in metrics.numbers().values())
    assert metrics.per_class == []


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


def test_an_image_that_cannot_be_read_is_in_no_number(caplog):
    annotations = make_annotations()
    ids, detections = ids_of(annotations), make_detections(annotations)
    without = CocoEvaluator(annotations)
    without.update(ids[2:], detections[2:])
    expected = without.compute(partial=True).to_dict()
    assert without.measured_on() == {}

    shards = [CocoEvaluator(annotations) for _ in range(2)]
    shards[0].update(ids[2::2], detections[2::2])
    shards[1].update(ids[3::2], detections[3::2])
    for rank, shard in enumerate(shards):
        shard.leave_out(ids[rank], f"{rank}.jpg", f"{rank}.jpg can't be read: gone")
    shards[1].leave_out(ids[2], "2.jpg", "one process could read it")
    states = [shard.state() for shard in shards]
    for shard in shards:
        shard.merge(states)
        caplog.clear()
        assert shard.compute().to_dict() == expected
        [said] = [record.getMessage() for record in caplog.records]
        assert said.startswith(f"2 of {len(ids)} images can't be read and were left out of the evaluation: 0.jpg can't")
        measured_on = shard.measured_on()
        assert measured_on["num_images"] == len(ids) - 2
        assert [image["path"] for image in measured_on["unreadable"]] == ["0.jpg", "1.jpg"]
    shards[0].reset()
    assert shards[0].unread == []


def test_no_image_at_all_can_be_read():
    annotations = make_annotations()
    evaluator = CocoEvaluator(annotations)
    for image_id in ids_of(annotations):
        evaluator.leave_out(image_id, "x.jpg", "the disk is gone")
    metrics = evaluator.compute()
    assert metrics.num_images == 0
    assert math.isnan(metrics.AP)

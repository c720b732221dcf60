"""The numbers of the report, by hand: confusion matrix, kinds of errors, a score per image."""

import numpy as np
import pytest
from made_validation import make_found, make_objects

from ddetr.report.analysis import ERROR_KINDS, analyse
from ddetr.report.tables import confusion, errors

A, B = [0, 0, 10, 10], [20, 0, 30, 10]  # two places of 100 pixels^2
NEAR_A = [0, 0, 10, 6]  # IoU 0.6 with A
HALF_A = [0, 0, 10, 4]  # IoU 0.4 with A
ELSEWHERE = [50, 50, 60, 60]
CAT, DOG = 0, 1


def test_each_kind_of_error_once() -> None:
    objects = make_objects(
        (0, A, CAT),  # found
        (1, A, CAT),  # taken for a dog
        (2, A, DOG),  # found at a wrong place
        (3, A, DOG),  # nobody looked
        (4, A, CAT),  # a dog is drawn near it: nobody found it
    )
    found = make_found(
        (0, NEAR_A, CAT, 0.9),
        (0, A, CAT, 0.8),  # better placed, but of a lower score: a duplicate
        (1, A, DOG, 0.9),
        (2, HALF_A, DOG, 0.9),
        (4, HALF_A, DOG, 0.9),
        (3, ELSEWHERE, CAT, 0.9),
        (3, A, DOG, 0.2),  # below the threshold
    )
    made = analyse(found, objects, 0.3, num_images=5, num_classes=2)
    expected = {
        "wrong class": [0, 1],
        "badly localised": [0, 1],
        "duplicate": [1, 0],
        "both": [0, 1],
        "background": [1, 0],
        "missed": [1, 1],
    }
    assert {kind: made.errors[kind].tolist() for kind in ERROR_KINDS} == expected
    assert made.confusion.tolist() == [
        [1, 1, 1],  # cats: found, taken for a dog, missed
        [0, 0, 2],
        [2, 2, 0],  # nothing there: duplicate and background; badly localised and both
    ]
    assert made.num_correct.tolist() == [1, 0]
    assert made.num_objects.tolist() == [3, 2]
    assert made.num_found.tolist() == [3, 3]
    # every detection is correct or of one kind
    assert made.num_found.sum() == made.num_correct.sum() + sum(
        made.errors[k].sum() for k in ERROR_KINDS if k != "missed"
    )
    # F1 times mean IoU: 0.6 of one match, one wrong detection
    assert made.image_scores[0] == pytest.approx(0.6 / 1.5)
    assert made.image_scores[1:].tolist() == [0, 0, 0, 0]
    table = errors(made, ["cat", "dog"])
    assert (table["num_correct"], table["num_objects"], table["num_found"]) == (1, 5, 6)
    assert table["precision"] == pytest.approx(1 / 6)
    assert table["classes"][1]["recall"] == 0


def test_regions_to_be_ignored_count_neither_for_nor_against() -> None:
    crowd = [40, 40, 90, 90]
    objects = make_objects((0, A, CAT), (0, crowd, CAT), ignored=[1])
    found = make_found((0, A, CAT, 0.9), (0, ELSEWHERE, CAT, 0.8), (0, ELSEWHERE, DOG, 0.7))
    made = analyse(found, objects, 0.3, 1, 2)
    assert made.num_objects.tolist() == [1, 0]
    assert made.num_found.tolist() == [1, 1]  # the dog lies in a crowd of cats: that is no excuse
    assert made.errors["background"].tolist() == [0, 1]
    assert made.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_the_right_class_is_matched_before_the_better_overlap_of_a_wrong_one() -> None:
    objects = make_objects((0, A, CAT), (0, A, DOG))
    found = make_found((0, NEAR_A, DOG, 0.9), (0, A, CAT, 0.5))
    made = analyse(found, objects, 0.3, 1, 2)
    assert made.confusion.tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


def test_an_object_is_found_once_and_a_detection_finds_one() -> None:
    close = [1, 0, 11, 10]
    objects = make_objects((0, A, CAT), (0, close, CAT))
    found = make_found((0, A, CAT, 0.9), (0, A, CAT, 0.8), (0, A, CAT, 0.7))
    made = analyse(found, objects, 0.3, 1, 1)
    assert made.num_correct.tolist() == [2]  # the second one takes the neighbour, as in COCO
    assert made.errors["duplicate"].tolist() == [1]


def test_nothing_at_all() -> None:
    made = analyse(make_found(), make_objects(), 0.5, num_images=2, num_classes=2)
    assert np.isnan(made.image_scores).all()
    assert made.confusion.sum() == 0
    assert np.isnan(errors(made, ["cat", "dog"])["precision"])
    assert confusion(made, ["cat", "dog"])["pairs"] == []


def test_counts_agree_with_each_other_on_random_boxes() -> None:
    rng = np.random.default_rng(0)
    num_images, num_classes = 30, 25

    def boxes(number: int) -> np.ndarray:
        corner = rng.integers(0, 40, (number, 2))
        return np.concatenate([corner, corner + rng.integers(5, 30, (number, 2))], axis=1)

    def rows(number: int) -> list:
        columns = (np.sort(rng.integers(0, num_images, number)), boxes(number), rng.integers(0, num_classes, number))
        return list(zip(*(column.tolist() for column in columns)))

    truth = rows(300)
    objects = make_objects(*truth, ignored=range(0, 300, 9))
    anywhere = sorted([*rows(600), *truth[::2]], key=lambda row: row[0])
    found = make_found(*((*row, score) for row, score in zip(anywhere, rng.random(len(anywhere)).tolist())))
    made = analyse(found, objects, 0.25, num_images, num_classes)
    assert made.confusion[:-1].sum(axis=1).tolist() == made.num_objects.tolist()
    assert made.confusion[:, :-1].sum(axis=0).tolist() == made.num_found.tolist()
    assert np.diag(made.confusion)[:-1].tolist() == made.num_correct.tolist()
    wrong = sum(made.errors[kind] for kind in ERROR_KINDS if kind != "missed")
    assert (made.num_correct + wrong).tolist() == made.num_found.tolist()
    assert (made.errors["missed"] <= made.num_objects - made.num_correct).all()
    assert made.image_correct.sum() == made.num_correct.sum() > 10
    assert (made.image_missed.sum(), made.image_false.sum()) == (
        (made.num_objects - made.num_correct).sum(),
        wrong.sum(),
    )

    # many classes: those that are confused most, and everything else together
    table = confusion(made, [f"class {label}" for label in range(num_classes)])
    assert table["is_partial"]
    assert len(table["columns"]) == 17
    counts = np.array([[cell["count"] for cell in row["cells"]] for row in table["rows"]])
    assert counts.sum() == made.confusion.sum()
    assert counts[:, -1].sum() == made.confusion[:, -1].sum()
    between = made.confusion[:-1, :-1] - np.diag(np.diag(made.confusion)[:-1])
    assert table["pairs"][0]["count"] == between.max()

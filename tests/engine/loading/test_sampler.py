"""Similar images together: nothing lost, nothing doubled, the same global batches; and epochs that begin in the
middle."""

import pytest
import torch

from ddetr.datasets import build_transform, sample_seed
from ddetr.datasets.dataset import Turn
from ddetr.engine.loading.sampler import EpochOrder, similar_together
from ddetr.padding import padded_hw

RECIPE = build_transform("official", train=True, image_size=800)
SIZES_HW = [(480, 640), (640, 480), (427, 640), (640, 640), (375, 500), (500, 333)]


def size_of(index: int, seed: int) -> tuple[int, int]:
    return RECIPE.draw(SIZES_HW[index % len(SIZES_HW)], torch.Generator().manual_seed(seed)).out_hw


def order_of(rank: int = 0, world_size: int = 1, **options) -> EpochOrder:
    options = {"num_images": 70, "batch_size": 16, "seed": 1, "rank": rank, "world_size": world_size} | options
    return EpochOrder(options.pop("num_images"), options.pop("batch_size"), **options)


def batches_of(order: EpochOrder) -> list[list[Turn]]:
    turns, share = list(order), order.batch_size // order.world_size
    return [turns[i : i + share] for i in range(0, len(turns), share)]


def padded_share(sizes_hw: list[tuple[int, int]], places: list[int], device_batch_size: int) -> float:
    pixels = padded = 0
    for i in range(0, len(places), device_batch_size):
        group = [sizes_hw[place] for place in places[i : i + device_batch_size]]
        height, width = padded_hw(group)
        padded += height * width * len(group)
        pixels += sum(h * w for h, w in group)
    return 1 - pixels / padded


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (1, 3), (2, 2), (4, 2), (2, 3), (4, 4), (2, 20)])
def test_grouping_keeps_the_global_batches(world_size: int, micro: int) -> None:
    plain = [sorted(batch) for batch in batches_of(order_of())]
    grouped = [
        batches_of(order_of(rank, world_size, device_batch_size=micro, size_of=size_of)) for rank in range(world_size)
    ]
    together = [sorted(turn for share in step for turn in share) for step in zip(*grouped)]
    assert together == plain
    assert all(len(share) == 16 // world_size for step in grouped for share in step)


def test_grouping_is_repeated_exactly() -> None:
    options = {"device_batch_size": 2, "size_of": size_of, "epoch": 3}
    assert list(order_of(**options)) == list(order_of(**options))
    assert list(order_of(**options)) != list(order_of(device_batch_size=2, epoch=3))


@pytest.mark.parametrize("micro", [2, 4])
def test_grouping_saves_padding(micro: int) -> None:
    saved = []
    for epoch in range(20):
        sizes_hw = [size_of(index, sample_seed(1, epoch, index)) for index in range(32)]
        plain = padded_share(sizes_hw, list(range(32)), micro)
        saved.append(plain - padded_share(sizes_hw, similar_together(sizes_hw, micro), micro))
    assert sum(saved) / len(saved) > 0.1


def test_processes_get_about_the_same_pixels() -> None:
    sizes_hw = [(100 + 10 * i, 100 + 10 * i) for i in range(32)]
    places = similar_together(sizes_hw, 2, 4)
    pixels = [sum(sizes_hw[place][0] ** 2 for place in places[8 * rank : 8 * rank + 8]) for rank in range(4)]
    assert max(pixels) < 1.15 * min(pixels)


def test_the_smaller_micro_batch_comes_last_in_each_share() -> None:
    """Shares of 8 in threes: 3, 3, 2. Were the 2 elsewhere, the loader would cut groups apart."""
    sizes_hw = [(100 + i // 3 * 50, 100) for i in range(16)]
    places = similar_together(sizes_hw, 3, 2)
    assert sorted(places) == list(range(16))
    for share in (places[:8], places[8:]):
        for group in (share[:3], share[3:6]):
            assert len({sizes_hw[place] for place in group}) <= 2


@pytest.mark.parametrize("size_of", [None, size_of])
@pytest.mark.parametrize("world_size", [1, 2])
def test_an_epoch_that_begins_in_the_middle_is_the_rest_of_it(world_size: int, size_of) -> None:
    for rank in range(world_size):
        options = {"epoch": 2, "device_batch_size": 2, "size_of": size_of}
        whole = batches_of(order_of(rank, world_size, **options))
        assert len(whole) == 4
        for first in range(5):
            order = order_of(rank, world_size, start=(2, first), **options)
            assert batches_of(order) == whole[first:]
            assert len(order) == 64 // world_size  # of the whole epoch


def test_the_first_epochs_are_strong() -> None:
    for strong_epochs, expected in ((None, [True] * 4), (3, [True, True, True, False]), (0, [False] * 4)):
        order = order_of(strong_epochs=strong_epochs)
        found = []
        for epoch in range(4):
            order.set_epoch(epoch)
            turns = list(order)
            assert len({turn.strong for turn in turns}) == 1
            found.append(turns[0].strong)
            assert [turn[:2] for turn in turns] == [turn[:2] for turn in order_of(epoch=epoch)]
        assert found == expected


def test_only_its_own_epoch_begins_in_the_middle() -> None:
    order = order_of(start=(1, 3))
    for epoch in (0, 2):
        order.set_epoch(epoch)
        assert list(order) == list(order_of(epoch=epoch))
    order.set_epoch(1)
    assert list(order) == list(order_of(epoch=1))[48:]

"""The same global batches for any number of processes and workers."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ddetr.datasets import load_annotations
from ddetr.engine.config import DataConfig
from ddetr.engine.data import DetectionData, EpochOrder, collate_micro
from ddetr.engine.splits import load_split, load_splits, without_empty_images
from ddetr.errors import InputError


def batches_of(
    rank: int, world_size: int, *, num_images: int = 22, epoch: int = 0, seed: int = 1
) -> list[list[tuple[int, int]]]:
    """This process's share of each global batch of 8."""
    order = EpochOrder(num_images, 8, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    pairs, share = list(order), 8 // world_size
    assert len(order) == len(pairs)
    return [pairs[i : i + share] for i in range(0, len(pairs), share)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    alone = batches_of(0, 1)
    shares = [batches_of(rank, world_size) for rank in range(world_size)]
    together = [[pair for share in step for pair in share] for step in zip(*shares)]
    assert together == alone


def test_an_epoch_is_a_permutation_without_the_incomplete_batch() -> None:
    indices = [index for batch in batches_of(0, 1) for index, _ in batch]
    assert len(indices) == len(set(indices)) == 16
    assert set(indices) < set(range(22))


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    first = batches_of(0, 1)
    assert batches_of(0, 1) == first
    for other in (batches_of(0, 1, epoch=1), batches_of(0, 1, seed=2)):
        assert [index for batch in other for index, _ in batch] != [index for batch in first for index, _ in batch]
        # the same image is augmented in another way
        assert not {seed for batch in first for _, seed in batch} & {seed for batch in other for _, seed in batch}


def test_set_epoch_is_the_epoch_of_the_constructor() -> None:
    order = EpochOrder(22, 8, seed=1)
    order.set_epoch(3)
    assert list(order) == [pair for batch in batches_of(0, 1, epoch=3) for pair in batch]


def loaders(
    shapes: Path, *, num_workers: int = 0, batch_size: int = 4, rank: int = 0, world_size: int = 1, **settings
) -> DetectionData:
    config = DataConfig(str(shapes), image_size=64, num_workers=num_workers, **settings)
    data = DetectionData(*load_splits(config), config, batch_size=batch_size, device_batch_size=2, seed=3)
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank, current_epoch=0)
    return data


def test_samples_do_not_depend_on_the_number_of_workers(shapes: Path) -> None:
    torch.manual_seed(0)
    plain = list(loaders(shapes).train_dataloader())
    torch.manual_seed(1)
    with_workers = list(loaders(shapes, num_workers=2).train_dataloader())
    assert len(plain) == len(with_workers) == 2
    for step, other_step in zip(plain, with_workers):
        for (images, mask, targets), (other_images, other_mask, other_targets) in zip(step, other_step, strict=True):
            assert torch.equal(images, other_images)
            assert (mask is None and other_mask is None) or torch.equal(mask, other_mask)
            for target, other in zip(targets, other_targets, strict=True):
                assert target.keys() == other.keys()
                assert all(torch.equal(target[name], other[name]) for name in target)


def test_a_step_is_cut_into_micro_batches_each_padded_by_itself() -> None:
    def sample(height: int, width: int) -> tuple[torch.Tensor, dict]:
        return torch.ones(3, height, width, dtype=torch.uint8), {"labels": torch.zeros(1, dtype=torch.int64)}

    samples = [sample(4, 6), sample(4, 6), sample(8, 2), sample(2, 8), sample(3, 3)]
    (same, no_mask, _), (mixed, mask, _), (rest, rest_mask, targets) = collate_micro(samples, 2)
    assert (same.shape, no_mask) == ((2, 3, 4, 6), None)
    assert mixed.shape == (2, 3, 8, 8)
    assert torch.equal(mask, mixed[:, 0] == 0)
    assert (rest.shape, rest_mask, len(targets)) == ((1, 3, 3, 3), None, 1)


def test_validation_is_shared_without_repetition(shapes: Path) -> None:
    shares = [
        [
            int(target["image_id"])
            for _, _, targets in loaders(shapes, rank=rank, world_size=3).val_dataloader()
            for target in targets
        ]
        for rank in range(3)
    ]
    assert sorted(sum(shares, [])) == [1, 2, 3, 4]
    assert [len(share) for share in shares] == [2, 1, 1]


def test_a_process_without_a_share_of_validation_still_takes_part(shapes: Path) -> None:
    assert len(loaders(shapes, rank=5, world_size=6).val_dataloader()) == 1


def test_a_batch_larger_than_the_data_set_is_refused(shapes: Path) -> None:
    with pytest.raises(InputError, match="has 8 images, fewer than one batch of 9.*--batch_size 4"):
        loaders(shapes, batch_size=9)


def test_a_batch_that_cannot_be_shared_is_refused(shapes: Path) -> None:
    with pytest.raises(InputError, match="batch_size 4 must be divisible by the 3 processes"):
        loaders(shapes, world_size=3).train_dataloader()


def test_a_missing_validation_split_is_named_with_its_cure(shapes: Path, tmp_path: Path) -> None:
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_train.json").write_bytes(
        (shapes / "annotations" / "instances_train.json").read_bytes()
    )
    (tmp_path / "train").symlink_to(shapes / "train")
    with pytest.raises(InputError, match="no validation split.*val_split.*val_annotations"):
        load_splits(DataConfig(str(tmp_path)))


def test_splits_and_files_can_be_named(shapes: Path) -> None:
    train, val = load_splits(DataConfig(str(shapes), train_split="val", val_split="train"))
    assert (len(train.images), len(val.images)) == (4, 8)
    named = DataConfig(str(shapes), val_annotations="annotations/instances_train.json", val_images="train")
    assert len(load_split(named, "val").images) == 8


def test_validation_takes_its_labels_from_training(shapes: Path) -> None:
    train, val = load_splits(DataConfig(str(shapes)))
    assert val.categories == train.categories == load_annotations(shapes, "train").categories


def test_images_without_an_object_to_learn_can_be_left_out(shapes: Path, tmp_path: Path) -> None:
    """An image whose objects are all ignore regions teaches as little; validation keeps all its images."""
    content = json.loads((shapes / "annotations" / "instances_train.json").read_text())
    bare, crowd, mixed = (image["id"] for image in content["images"][:3])
    kept = [a for a in content["annotations"] if a["image_id"] != bare]
    for image_id in (crowd, mixed):
        objects = [a for a in kept if a["image_id"] == image_id]
        for annotation in objects if image_id == crowd else objects[:1]:
            annotation["iscrowd"] = 1
        if image_id == mixed:
            kept.append(objects[-1] | {"id": 10_000, "iscrowd": 0})
    (tmp_path / "annotations").mkdir()
    for split in ("train", "val"):
        (tmp_path / split).symlink_to(shapes / "train")
        file = tmp_path / "annotations" / f"instances_{split}.json"
        file.write_text(json.dumps(content | {"annotations": kept}))
    for keep_empty, expected in ((True, 8), (False, 6)):
        train, val = load_splits(DataConfig(str(tmp_path), keep_empty=keep_empty))
        assert (len(train.images), len(val.images)) == (expected, 8)
    ids = {record.image_id for record in train.images}
    assert mixed in ids
    assert not {bare, crowd} & ids


def test_a_training_set_without_any_object_is_refused(shapes: Path) -> None:
    train = load_annotations(shapes, "train")
    nothing = [replace(record, ignore=np.ones(len(record.labels), bool)) for record in train.images]
    with pytest.raises(InputError, match="none of the 8 images has an object to train on"):
        without_empty_images(replace(train, images=nothing))


def test_a_negative_number_of_workers_is_refused() -> None:
    with pytest.raises(InputError, match="num_workers must be at least 0"):
        DataConfig("x", num_workers=-1)

"""The same global batches for any number of processes and workers."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ddetr.datasets import load_annotations, padded_shapes
from ddetr.datasets.config import DataConfig
from ddetr.datasets.dataset import Turn
from ddetr.datasets.splits import load_split, load_splits, without_empty_images
from ddetr.engine.config import TrainConfig
from ddetr.engine.loading.datamodule import DetectionData, Loaded, collate_micro
from ddetr.engine.loading.sampler import EpochOrder
from ddetr.engine.loading.workers import GRACE_SECONDS, default_num_workers, explained, workers_that_fit
from ddetr.engine.train import train
from ddetr.errors import InputError
from ddetr.ops import ms_deform_attn


def batches_of(rank: int, world_size: int, *, num_images: int = 22, epoch: int = 0, seed: int = 1) -> list[list[Turn]]:
    """This process's share of each global batch of 8."""
    order = EpochOrder(num_images, 8, seed=seed, epoch=epoch, rank=rank, world_size=world_size)
    turns, share = list(order), 8 // world_size
    assert len(order) == len(turns)
    return [turns[i : i + share] for i in range(0, len(turns), share)]


@pytest.mark.parametrize("world_size", [2, 4])
def test_global_batches_do_not_depend_on_the_number_of_processes(world_size: int) -> None:
    alone = batches_of(0, 1)
    shares = [batches_of(rank, world_size) for rank in range(world_size)]
    together = [[turn for share in step for turn in share] for step in zip(*shares)]
    assert together == alone


def test_an_epoch_is_a_permutation_without_the_incomplete_batch() -> None:
    indices = [turn.index for batch in batches_of(0, 1) for turn in batch]
    assert len(indices) == len(set(indices)) == 16
    assert set(indices) < set(range(22))


def test_each_epoch_and_seed_has_an_order_of_its_own() -> None:
    first = batches_of(0, 1)
    assert batches_of(0, 1) == first
    for other in (batches_of(0, 1, epoch=1), batches_of(0, 1, seed=2)):
        assert [turn.index for batch in other for turn in batch] != [turn.index for batch in first for turn in batch]
        # the same image is augmented in another way
        assert not {turn.seed for batch in first for turn in batch} & {turn.seed for batch in other for turn in batch}


def test_set_epoch_is_the_epoch_of_the_constructor() -> None:
    order = EpochOrder(22, 8, seed=1)
    order.set_epoch(3)
    assert list(order) == [turn for batch in batches_of(0, 1, epoch=3) for turn in batch]


STRONG = {"mosaic": 0.5, "mixup": 0.5, "scale_jitter": 0.5, "color_jitter": 0.5, "blur": 0.5}


def loaders(
    shapes: Path,
    *,
    num_workers: int = 0,
    batch_size: int = 4,
    rank: int = 0,
    world_size: int = 1,
    epochs: int | None = None,
    leave_out=None,
    **settings,
) -> DetectionData:
    config = DataConfig(str(shapes), image_size=64, num_workers=num_workers, **settings)
    sizes = {"batch_size": batch_size, "device_batch_size": 2}
    data = DetectionData(*load_splits(config), config, **sizes, seed=3, epochs=epochs, leave_out=leave_out)
    data.trainer = SimpleNamespace(world_size=world_size, global_rank=rank)
    return data


def assert_same(step: list, other_step: list) -> None:
    for (images, mask, targets), (other_images, other_mask, other_targets) in zip(step, other_step, strict=True):
        assert torch.equal(images, other_images)
        assert (mask is None and other_mask is None) or torch.equal(mask, other_mask)
        for target, other in zip(targets, other_targets, strict=True):
            assert target.keys() == other.keys()
            assert all(torch.equal(target[name], other[name]) for name in target)
            assert all(target[name].dtype == other[name].dtype for name in target)


@pytest.mark.parametrize("buckets", [False, True])
def test_samples_do_not_depend_on_the_number_of_workers(shapes: Path, buckets: bool) -> None:
    torch.manual_seed(0)
    plain = list(loaders(shapes, buckets=buckets).train_dataloader())
    torch.manual_seed(1)
    with_workers = list(loaders(shapes, num_workers=2, buckets=buckets).train_dataloader())
    assert len(plain) == len(with_workers) == 2
    for step, other_step in zip(plain, with_workers):
        assert_same(step, other_step)


@pytest.mark.parametrize(
    ("num_workers", "buckets", "world_size"), [(0, False, 1), (0, True, 2), (2, False, 2), (2, True, 1)]
)
def test_an_epoch_resumed_in_the_middle_gives_the_rest_of_its_batches(
    shapes: Path, num_workers: int, buckets: bool, world_size: int
) -> None:
    for rank in range(world_size):
        options = {"batch_size": 2, "num_workers": num_workers, "buckets": buckets}
        options |= {"rank": rank, "world_size": world_size}
        loader = loaders(shapes, **options).train_dataloader()
        loader.batch_sampler.sampler.set_epoch(1)  # as Lightning does it
        whole = list(loader)
        assert len(whole) == 4
        resumed = loaders(shapes, **options)
        resumed.start = (1, 3)
        loader = resumed.train_dataloader()
        assert len(loader) == 4  # Lightning counts on the epoch's length
        loader.batch_sampler.sampler.set_epoch(1)
        rest = list(loader)
        assert len(rest) == 1
        assert_same(rest[0], whole[3])
        loader.batch_sampler.sampler.set_epoch(2)
        assert len(list(loader)) == 4


@pytest.mark.parametrize("world_size", [1, 2])
def test_strong_augmentation_is_off_in_the_last_epochs_wherever_images_are_loaded(
    shapes: Path, world_size: int
) -> None:
    """Of three epochs, the last; the processes that load images live through all of them."""
    options = {"batch_size": 4, "world_size": world_size, "epochs": 3}
    for rank in range(world_size):
        strong = options | STRONG | {"augmentation_off_epochs": 1, "rank": rank}
        plain, here, there = (
            loaders(shapes, **settings).train_dataloader()
            for settings in (options | {"rank": rank}, strong, strong | {"num_workers": 1})
        )
        for epoch in range(3):
            for loader in (plain, here, there):
                loader.batch_sampler.sampler.set_epoch(epoch)
            steps = list(zip(plain, here, there, strict=True))
            for _, one, other in steps:
                assert_same(one, other)
            if epoch == 2:
                for without, one, _ in steps:
                    assert_same(without, one)
            else:
                assert not all(
                    torch.equal(micro[0], other[0]) for without, one, _ in steps for micro, other in zip(without, one)
                )
        resumed = loaders(shapes, **strong)
        resumed.start = (2, 1)
        assert_same(next(iter(resumed.train_dataloader())), steps[1][1])


def test_batches_loaded_before_the_start_are_not_loaded(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, read = loaders(shapes, batch_size=2), []
    load = data.train_set._load
    monkeypatch.setattr(data.train_set, "_load", lambda record: (read.append(record.image_id), load(record))[1])
    data.start = (0, 3)
    assert len(list(data.train_dataloader())) == 1
    assert len(read) == 2


@pytest.mark.parametrize("strong", [{}, STRONG], ids=["recipe", "strong"])
def test_buckets_know_the_shapes_before_anything_is_loaded(shapes: Path, strong: dict[str, float]) -> None:
    data = loaders(shapes, buckets=True, **strong)
    for turn in EpochOrder(8, 4, seed=3):
        image, _ = data.train_set[turn]
        assert data.size_of(turn.index, turn.seed) == tuple(image.shape[1:])


@pytest.mark.parametrize("count", [1, 3, 12])
def test_batches_have_one_of_the_padded_shapes(shapes: Path, count: int) -> None:
    data = loaders(shapes, padded_shapes=count, batch_size=4)
    allowed = padded_shapes(64, count)
    seen = set()
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for step in loader:
            for images, mask, targets in step if isinstance(step, list) else [step]:
                seen.add(tuple(images.shape[2:]))
                for i, target in enumerate(targets):
                    height, width = target["size"].tolist()
                    assert mask is None or mask[i].sum() == mask[i].numel() - height * width
    assert seen <= set(allowed)
    assert count == 1 or len(seen) > 1


def test_a_wrong_number_of_padded_shapes_is_refused() -> None:
    with pytest.raises(InputError, match="padded_shapes must lie in 1 to 12, got 13"):
        DataConfig("x", padded_shapes=13)


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
        train, val = load_splits(DataConfig(str(tmp_path)), keep_empty=keep_empty)
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


# ---- files that can't be read ----------------------------------------------------------------------------------------


@pytest.fixture
def damaged(shapes: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy of the data set in which some images are none."""

    def damage(*names: str) -> Path:
        root = tmp_path / "damaged"
        shutil.copytree(shapes, root)
        for name in names:
            (root / name).write_bytes((root / name).read_bytes()[:300])
        return root

    return damage


def image_names(root: Path, split: str) -> list[str]:
    return [f"{split}/{path.name}" for path in sorted((root / split).iterdir())]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_file_does_not_stop_training_and_is_told_once(
    shapes: Path, damaged: Callable[..., Path], caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    name = image_names(shapes, "train")[2]
    root = damaged(name)
    epochs = []
    for _ in range(2):
        data = loaders(root, num_workers=num_workers)
        loader = data.train_dataloader()
        epochs.append([])
        for epoch in range(2):
            loader.batch_sampler.sampler.set_epoch(epoch)
            epochs[-1] += list(loader)
        assert list(data.unreadable) == [str(root / name)]
    assert len(epochs[0]) == 4
    for step, other in zip(*epochs):
        assert_same(step, other)
    told = [record.getMessage() for record in caplog.records if "another image stands in" in record.getMessage()]
    assert len(told) == 2  # once for each of the two runs, though it was met in both epochs
    assert name in told[0]
    assert "unreadable so far: 1 of 8" in told[0]


def test_too_many_bad_files_stop_training(shapes: Path, damaged: Callable[..., Path]) -> None:
    data = loaders(damaged(*image_names(shapes, "train")[:2]), num_workers=1)
    with pytest.raises(InputError, match="2 of the 8 training images can't be read, more than 1; the last: .*--decode"):
        list(data.train_dataloader())


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_file_stops_validation_and_training_that_wants_to(
    shapes: Path, damaged: Callable[..., Path], num_workers: int
) -> None:
    """With one sentence, from a worker as well."""
    train_name, val_name = image_names(shapes, "train")[0], image_names(shapes, "val")[0]
    data = loaders(damaged(train_name, val_name), num_workers=num_workers, on_bad_image="raise")
    for loader, name in ((data.train_dataloader(), train_name), (data.val_dataloader(), val_name)):
        with pytest.raises(InputError, match=f"{name} can't be read: ") as caught:
            list(loader)
        assert "\n" not in str(caught.value)
        assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_bad_file_costs_validation_that_image(shapes: Path, damaged: Callable[..., Path], num_workers: int) -> None:
    """Whole batches of them too; the others come as they would have come."""
    names = image_names(shapes, "val")
    root = damaged(*names[:2])
    heard: list[tuple[int, str, str]] = []
    data = loaders(root, num_workers=num_workers, leave_out=lambda *image: heard.append(image))
    seen = [int(target["image_id"]) for _, _, targets in data.val_dataloader() for target in targets]
    every = [record.image_id for record in data.val_set.annotations.images]
    assert seen == every[2:]
    assert [image_id for image_id, _, _ in heard] == every[:2]
    assert [path for _, path, _ in heard] == [str(root / name) for name in names[:2]]
    assert all("can't be read" in reason for _, _, reason in heard)


def test_a_run_with_everything_on(
    shapes: Path,
    damaged: Callable[..., Path],
    tiny_model: dict[str, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Buckets, fixed shapes, a worker and a bad file in a real run: its last step is reached, the file is named."""
    name = image_names(shapes, "train")[5]
    config = DataConfig(str(damaged(name)), image_size=64, num_workers=1, buckets=True, padded_shapes=3)
    caplog.set_level("INFO", "ddetr")
    result = train(
        TrainConfig(
            config,
            tiny_model,
            epochs=2,
            batch_size=4,
            device_batch_size=2,
            output=str(tmp_path / "run"),
            log_every=1,
            num_pictures=0,
        )
    )
    steps = (result.path / "train.csv").read_text().splitlines()[1:]
    assert len(steps) == 4
    told = [record.getMessage() for record in caplog.records if "another image stands in" in record.getMessage()]
    assert len(told) == 1
    assert name in told[0]


# ---- loader processes ------------------------------------------------------------------------------------------------


def test_targets_do_not_take_shared_memory(shapes: Path) -> None:
    """Seven small tensors per image, each a file descriptor, would pass the limit of open files."""
    loader = loaders(shapes, num_workers=1).train_dataloader()
    packed = next(iter(super(type(loader), loader).__iter__()))
    assert isinstance(packed, Loaded)
    assert all(isinstance(values, np.ndarray) for _, _, targets in packed.batch for values in targets[0].values())
    for images, _, targets in next(iter(loader)):
        assert images.is_shared()
        assert all(isinstance(values, torch.Tensor) and not values.is_shared() for values in targets[0].values())


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="the system cannot tell who sent a signal")
def test_loaders_outlive_the_schedulers_sigterm(shapes: Path) -> None:
    """It goes to every process of the job; the training process still has to save."""
    loader = loaders(shapes, num_workers=2, batch_size=2).train_dataloader()
    steps = iter(loader)
    for _ in range(2):  # one of each: both have started
        next(steps)
    pids = [worker.pid for worker in loader._iterator._workers]
    somebody_else = (
        f"import os; [os.kill(pid, signal) for signal in {[signal.SIGTERM.value, signal.SIGINT.value]} for pid in "
        f"{pids}]"
    )
    subprocess.run([sys.executable, "-c", somebody_else], check=True)
    assert len(list(steps)) == 2
    for worker in loader._iterator._workers:
        give_up = time.monotonic() + GRACE_SECONDS - 5
        while worker.exitcode is None and time.monotonic() < give_up:
            worker.terminate()  # from the training process: at once; again, where it merged with the first signal
            worker.join(1)
        assert worker.exitcode == 0


def test_a_dead_loader_is_told_with_its_cures(shapes: Path) -> None:
    loader = loaders(shapes, num_workers=1, batch_size=2).train_dataloader()

    def load() -> None:
        with explained():
            for _ in loader:
                os.kill(loader._iterator._workers[0].pid, signal.SIGKILL)
                time.sleep(0.2)

    with pytest.raises(
        InputError, match=r"images died \((Killed|without a word)\).*shared memory.*--data.num_workers \(0 loads"
    ):
        load()


def test_other_errors_stay_as_they_are() -> None:
    for error in (RuntimeError("CUDA out of memory"), InputError("plain")):
        with pytest.raises(type(error)) as caught, explained():
            raise error
        assert caught.value is error


def test_loading_after_the_kernel_used_threads(shapes: Path) -> None:
    """Threads do not survive a fork: workers must neither wait for those of the kernel nor for PyTorch's."""
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        value = torch.rand(1, 600, 4, 8)
        locations, weights = torch.rand(1, 600, 4, 1, 4, 2), torch.full((1, 600, 4, 1, 4), 0.25)
        ms_deform_attn(value, [(20, 30)], locations, weights)
        torch.rand(400, 400) @ torch.rand(400, 400)
        assert len(list(loaders(shapes, num_workers=2).train_dataloader())) == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("on_gpu", "processes", "cores", "expected"),
    [
        (True, 1, 16, 4),
        (True, 1, 4, 3),
        (True, 1, 2, 1),
        (True, 1, 1, 1),
        (True, 8, 16, 1),
        (False, 1, 2, 0),
        (False, 1, 16, 4),
        (False, 4, 8, 0),
    ],
)
def test_default_number_of_workers(on_gpu: bool, processes: int, cores: int, expected: int) -> None:
    assert default_num_workers(on_gpu=on_gpu, processes=processes, cores=cores) == expected


@pytest.mark.parametrize(
    ("free", "expected"),
    [(None, 4), (9 * 100, 4), (9 * 100 - 1, 3), (3 * 100, 1), (3 * 100 - 1, 0), (0, 0)],
)
def test_loaders_have_room_for_two_batches_each_and_one_in_use(free: int | None, expected: int) -> None:
    assert workers_that_fit(4, 100, free) == expected


@pytest.mark.parametrize(("mib", "expected"), [(64, 0), (170, 1), (8192, 2)])
def test_a_small_shared_memory_gets_fewer_loaders(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, mib: int, expected: int
) -> None:
    """The paper's images in a container that nobody gave more than Docker's 64 MiB: the loaders would die."""
    config = DataConfig(str(shapes), image_size=800)
    data = DetectionData(*load_splits(config), config, batch_size=8, device_batch_size=2, seed=3)
    data.trainer = SimpleNamespace(world_size=1, global_rank=0)
    monkeypatch.setattr("ddetr.engine.loading.datamodule.default_num_workers", lambda **_: 2)
    monkeypatch.setattr("ddetr.engine.loading.datamodule.free_shared_memory", lambda: mib * 2**20)
    with caplog.at_level("WARNING", "ddetr"):
        assert data.train_dataloader().num_workers == data.val_dataloader().num_workers == expected
    assert caplog.text.count("docker run --shm-size 8g") == (expected < 2), "said once"
    assert (f"/dev/shm has {mib} MiB free, and a batch may take 54 MiB of it" in caplog.text) == (expected < 2)
    data.num_workers = 2  # asked for
    assert data.train_dataloader().num_workers == 2

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from ddetr.datasets import (
    Annotations,
    Category,
    DetectionDataset,
    ImageRecord,
    build_transform,
    collate,
    load_annotations,
    normalize_images,
    read_image,
    sample_seed,
)
from ddetr.errors import InputError


@pytest.fixture
def annotations(tmp_path, write_image):
    records = []
    for i, (width, height) in enumerate([(64, 48), (40, 60), (50, 50)]):
        path = write_image(tmp_path / f"{i}.jpg", size_wh=(width, height), seed=i)
        n = (3, 1, 0)[i]
        boxes = np.array([[4, 6, 24, 16], [10, 10, 30, 40], [0, 0, width, height]], dtype=np.float32)[:n]
        records.append(
            ImageRecord(
                image_id=100 + i,
                path=path,
                size_hw=(height, width),
                boxes_xyxy=boxes,
                labels=np.arange(n) % 2,
                area=(boxes[:, 2:] - boxes[:, :2]).prod(axis=1),
                ignore=np.arange(n) == 1,
            )
        )
    return Annotations("test", "coco", (Category(3, "cat"), Category(7, "dog")), records)


def test_sample_without_transform(annotations):
    dataset = DetectionDataset(annotations, normalize=False)
    assert len(dataset) == 3
    assert dataset.categories == annotations.categories
    image, target = dataset[0]
    assert type(image) is torch.Tensor
    assert (image.dtype, image.shape) == (torch.uint8, (3, 48, 64))
    torch.testing.assert_close(image, read_image(annotations.images[0].path))
    assert {name: (value.dtype, tuple(value.shape)) for name, value in target.items()} == {
        "boxes": (torch.float32, (2, 4)),
        "labels": (torch.int64, (2,)),
        "area": (torch.float32, (2,)),
        "iscrowd": (torch.int64, (2,)),
        "image_id": (torch.int64, ()),
        "orig_size": (torch.int64, (2,)),
        "size": (torch.int64, (2,)),
    }
    assert all(type(value) is torch.Tensor for value in target.values())
    # the second object is ignored
    want = torch.tensor([[14 / 64, 11 / 48, 20 / 64, 10 / 48], [0.5, 0.5, 1, 1]])
    torch.testing.assert_close(target["boxes"], want)
    assert target["labels"].tolist() == [0, 0]
    assert target["image_id"].item() == 100
    assert target["orig_size"].tolist() == target["size"].tolist() == [48, 64]


def test_normalised_sample_with_transform(annotations):
    dataset = DetectionDataset(annotations, build_transform(train=False, image_size=96), train=False)
    image, target = dataset[0]
    assert (image.dtype, image.shape) == (torch.float32, (3, 96, 128))
    assert image.abs().max() < 3
    assert target["orig_size"].tolist() == [48, 64]
    assert target["size"].tolist() == [96, 128]
    assert target["area"].tolist() == [800, 64 * 48 * 4]
    assert dataset[2][1]["boxes"].shape == (0, 4)


def test_a_seed_decides_the_sample_and_leaves_the_generator_alone(annotations):
    dataset = DetectionDataset(annotations, build_transform("official", train=True, image_size=64), normalize=False)
    torch.manual_seed(5)
    expected_next = torch.rand(3)
    torch.manual_seed(5)
    first = dataset[0, 123]
    torch.testing.assert_close(torch.rand(3), expected_next)
    torch.rand(7)
    again = dataset[(0, 123)]
    torch.testing.assert_close(first[0], again[0])
    torch.testing.assert_close(first[1], again[1])
    assert len({tuple(dataset[0, seed][0].shape) for seed in range(12)}) > 3


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_sample_is_the_same_wherever_it_is_loaded(annotations, num_workers):
    dataset = DetectionDataset(annotations, build_transform("official", train=True, image_size=64))
    keys = [(i, sample_seed(42, 0, i)) for i in (2, 0, 1)]
    loader = DataLoader(dataset, batch_size=2, sampler=keys, collate_fn=collate, num_workers=num_workers)
    loaded = [
        (image[:, : target["size"][0], : target["size"][1]], target)
        for images, _, targets in loader
        for image, target in zip(images, targets)
    ]
    for key, (image, target) in zip(keys, loaded, strict=True):
        torch.testing.assert_close(image, dataset[key][0])
        torch.testing.assert_close(target, dataset[key][1])


def test_sample_seeds_differ():
    seeds = {sample_seed(seed, epoch, index) for seed in range(5) for epoch in range(5) for index in range(40)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(1, 2, 3) == sample_seed(1, 2, 3)


def test_an_unreadable_file_raises_or_is_skipped(annotations, caplog):
    annotations.images[0].path.write_text("no image")
    with pytest.raises(InputError, match=r"0\.jpg"):
        DetectionDataset(annotations)[0]
    _, target = DetectionDataset(annotations, on_error="skip")[0]
    assert target["image_id"].item() in (101, 102)
    assert "0.jpg" in caplog.text
    with pytest.raises(InputError, match="falsify"):
        DetectionDataset(annotations, train=False, on_error="skip")
    with pytest.raises(InputError, match="on_error"):
        DetectionDataset(annotations, on_error="ignore")
    for record in annotations.images:
        record.path.unlink(missing_ok=True)
    with pytest.raises(InputError, match=r"11 images of test in a row can't be read.*data audit --decode"):
        DetectionDataset(annotations, on_error="skip")[1]


def test_the_seed_chooses_the_image_that_stands_in(annotations):
    annotations.images[0].path.write_text("no image")
    told = []
    dataset = DetectionDataset(annotations, on_error=lambda path, reason: told.append((path, reason)))
    chosen = [dataset[0, seed][1]["image_id"].item() for seed in range(12)]
    assert set(chosen) == {101, 102}
    assert len(told) == 12
    assert told[0] == (str(annotations.images[0].path), told[0][1])
    assert "0.jpg can't be read: it is no image of a known format" in told[0][1]
    assert [dataset[0, seed][1]["image_id"].item() for seed in range(12)] == chosen


def test_recipes_give_the_same_sample_with_and_without_the_short_way(annotations):
    """The data set does a recipe's work on arrays; called as any other transform, it must give the same."""
    recipe = build_transform("official", train=True, image_size=96)
    short = DetectionDataset(annotations, recipe, normalize=False)
    general = DetectionDataset(annotations, lambda image, target: recipe(image, target), normalize=False)
    for i in range(3):
        for seed in range(6):
            (image, target), (other_image, other) = short[i, seed], general[i, seed]
            assert torch.equal(image, other_image)
            assert target.keys() == other.keys()
            for name in target:
                torch.testing.assert_close(target[name], other[name], rtol=1e-6, atol=1e-7)


def test_any_v2_transform_works_and_misaligned_ones_are_refused(annotations):
    aligned = v2.SanitizeBoundingBoxes(
        min_size=25, labels_getter=lambda s: [s[1][k] for k in ("labels", "area", "iscrowd")]
    )
    transform = v2.Compose([v2.ColorJitter(0.5), v2.RandomHorizontalFlip(1.0), aligned])
    _, target = DetectionDataset(annotations, transform)[0]
    assert target["boxes"].tolist() == [[0.5, 0.5, 1, 1]]
    assert target["area"].tolist() == [64 * 48]
    with pytest.raises(InputError, match="must keep the same objects"):
        DetectionDataset(annotations, v2.SanitizeBoundingBoxes(min_size=25))[0]


def test_an_index_out_of_range_ends_iteration(annotations):
    assert len(list(DetectionDataset(annotations))) == 3


# ---- collate ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_collate_pads_right_and_bottom(annotations, normalize):
    samples = [DetectionDataset(annotations, normalize=normalize)[i] for i in range(3)]
    images, mask, targets = collate(samples)
    assert images.shape == (3, 3, 60, 64)
    assert images.dtype == (torch.float32 if normalize else torch.uint8)
    assert (mask.dtype, mask.shape) == (torch.bool, (3, 60, 64))
    assert [t["image_id"].item() for t in targets] == [100, 101, 102]
    for i, (image, target) in enumerate(samples):
        height, width = target["size"].tolist()
        torch.testing.assert_close(images[i, :, :height, :width], image)
        assert not mask[i, :height, :width].any()
        assert mask[i].sum() == 60 * 64 - height * width
        assert (images[i][:, mask[i]] == 0).all()


def test_normalising_after_collating_is_the_same(annotations):
    normalized, mask, _ = collate([DetectionDataset(annotations)[i] for i in range(3)])
    raw, same_mask, _ = collate([DetectionDataset(annotations, normalize=False)[i] for i in range(3)])
    torch.testing.assert_close(normalize_images(raw, same_mask), normalized)
    assert torch.equal(mask, same_mask)


def test_images_of_all_shapes_through_the_official_recipe(drawn_coco):
    annotations = load_annotations(drawn_coco, "val2017")
    dataset = DetectionDataset(annotations, build_transform("official", train=True, image_size=256), normalize=False)
    for i in range(len(dataset)):
        image, target = dataset[i, i]
        boxes = target["boxes"]
        corners = torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)
        assert ((corners > -1e-5) & (corners < 1 + 1e-5)).all()
        assert (boxes[:, 2:] > 0).all()
        assert tuple(target["size"].tolist()) == image.shape[1:]

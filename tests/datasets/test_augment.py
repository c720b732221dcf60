"""Boxes fit what is drawn, whatever is done to an image; and nothing but the seed decides what that is."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddetr.datasets import DetectionDataset, build_transform, normalize_images, training_set
from ddetr.datasets.annotations import Annotations, Category, ImageRecord
from ddetr.datasets.augment import FILL, Augmentation, blended, color_matrix, describe, recolored
from ddetr.datasets.config import DataConfig
from ddetr.datasets.dataset import Turn, sample_seed
from ddetr.errors import InputError

EACH = {
    "mosaic": {"mosaic": 1.0},
    "mixup": {"mixup": 1.0},
    "scale": {"scale_jitter": 1.0, "scale_jitter_low": 0.4},
    "blur": {"blur": 1.0},
    "mosaic and mixup": {"mosaic": 1.0, "mixup": 1.0},
    "scale, mixup, blur": {"scale_jitter": 1.0, "scale_jitter_low": 0.4, "mixup": 1.0, "blur": 1.0},
}
ALL = {"mosaic": 0.5, "mixup": 0.5, "scale_jitter": 0.5, "color_jitter": 0.5, "blur": 0.5}
GROUND = 128
SIZES_WH = [(140, 100), (90, 130), (120, 120)]  # image k has its objects in colour channel k alone


def settings(recipe: str = "official", image_size: int = 96, **options) -> DataConfig:
    return DataConfig("x", augmentation=recipe, image_size=image_size, **options)


def record_of(folder: Path, number: int, size_wh: tuple[int, int], channel: int, count: int = 4) -> ImageRecord:
    """Filled rectangles that don't touch: bright ones of label 2 * channel, dark ones of 2 * channel + 1."""
    draw = np.random.default_rng(number)
    width, height = size_wh
    pixels = np.full((height, width, 3), GROUND, np.uint8)
    boxes = []
    for place in range(count):
        cell_x, cell_y = place % 2 * (width // 2), place // 2 * (height // 2)
        w, h = draw.integers(12, width // 2 - 8), draw.integers(12, height // 2 - 8)
        x, y = cell_x + draw.integers(3, width // 2 - 3 - w), cell_y + draw.integers(3, height // 2 - 3 - h)
        pixels[y : y + h, x : x + w, channel] = 255 if place % 2 == 0 else 0
        boxes.append((x, y, x + w, y + h))
    path = folder / f"{number}.png"
    Image.fromarray(pixels).save(path)
    boxes = np.array(boxes, np.float32).reshape(-1, 4)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    labels = 2 * channel + np.arange(count) % 2
    return ImageRecord(number, path, (height, width), boxes, labels, area, np.zeros(count, bool))


@pytest.fixture
def drawn(tmp_path: Path) -> Annotations:
    records = [record_of(tmp_path, number, size, number) for number, size in enumerate(SIZES_WH)]
    return Annotations("drawn", "coco", tuple(Category(i, f"c{i}") for i in range(6)), records)


def corners_of(image: torch.Tensor, target: dict[str, torch.Tensor]) -> torch.Tensor:
    """(n, 4) xyxy in pixels."""
    height, width = image.shape[1:]
    boxes = target["boxes"] * torch.tensor([width, height, width, height])
    return torch.cat([boxes[:, :2] - boxes[:, 2:] / 2, boxes[:, :2] + boxes[:, 2:] / 2], dim=1)


def covered(boxes_xyxy: torch.Tensor, size_hw: tuple[int, int], grown_by: float) -> torch.Tensor:
    """(n, h, w): the pixels whose centres lie in a box that is so much larger on each side."""
    y, x = torch.arange(size_hw[0])[:, None] + 0.5, torch.arange(size_hw[1])[None] + 0.5
    left, top, right, bottom = (boxes_xyxy + grown_by * torch.tensor([-1, -1, 1, 1])).T[:, :, None, None]
    return (x >= left) & (x <= right) & (y >= top) & (y <= bottom)


def assert_boxes_fit(image: torch.Tensor, target: dict[str, torch.Tensor], *, mixed: bool = False) -> None:
    """Each channel departs from the ground where objects of its labels are, and nowhere else, but for a pixel along
    their borders."""
    size_hw, boxes = tuple(image.shape[1:]), corners_of(image, target)
    # Images that shine through one another have half of the contrast, and the ground may be the filling's colour.
    limit = 29 if mixed else 64
    ground = torch.tensor([GROUND, GROUND, GROUND]) if not mixed else torch.tensor([126, 122, 116])
    for label in range(6):
        away = image[label // 2].int() - ground[label // 2]
        seen = away > limit if label % 2 == 0 else -away > limit
        of_label, of_other = target["labels"] == label, target["labels"] == label + 1 - 2 * (label % 2)
        inside = covered(boxes[of_label], size_hw, 1).any(0)
        assert not (seen & ~inside).any(), f"an object of label {label} reaches beyond its box"
        core = covered(boxes[of_label], size_hw, -1).any(0) & ~covered(boxes[of_other], size_hw, 1).any(0)
        assert seen[core].all(), f"a box of label {label} is larger than its object"


@pytest.mark.parametrize("options", EACH.values(), ids=EACH)
@pytest.mark.parametrize("recipe", ["official", "none"])
def test_boxes_fit_what_is_drawn(drawn: Annotations, options: dict[str, float], recipe: str) -> None:
    dataset, numbers = training_set(drawn, settings(recipe, **options)), []
    for seed in range(20):
        image, target = dataset[seed % 3, seed]
        numbers.append(len(target["labels"]))
        assert_boxes_fit(image, target, mixed="mixup" in options)
        corners = corners_of(image, target)
        assert (target["boxes"][:, 2:] > 0).all()
        assert (corners > -1e-3).all()
        assert (corners < torch.tensor([image.shape[2], image.shape[1]] * 2) + 1e-3).all()
        torch.testing.assert_close(  # full rectangles: cut or not, their area is their box's
            target["area"], (corners[:, 2:] - corners[:, :2]).prod(1), rtol=1e-3, atol=0.1
        )
        assert len(target["iscrowd"]) == len(target["area"]) == len(target["labels"])
    assert max(numbers) <= dataset.most_objects
    if "mosaic" in options or "mixup" in options:
        assert max(numbers) > 4


def test_the_check_finds_boxes_that_are_off(drawn: Annotations) -> None:
    image, target = training_set(drawn, settings("none"))[0, 0]
    assert_boxes_fit(image, target)
    for change in (0.02, -0.02):
        with pytest.raises(AssertionError, match="beyond its box" if change < 0 else "larger than its object"):
            assert_boxes_fit(image, {**target, "boxes": target["boxes"] + torch.tensor([0, 0, change, change]) * 2})


def test_an_uncut_object_keeps_its_area_as_a_share(drawn: Annotations) -> None:
    """The area of an object with a mask is less than its box's: as in the recipe, only a cut makes it its box's."""
    for record in drawn.images:
        record.area[:] *= 0.5
    dataset = training_set(drawn, settings("none", scale_jitter=1.0, scale_jitter_low=0.5, scale_jitter_high=0.9))
    for seed in range(5):
        image, target = dataset[0, seed]
        height, width = image.shape[1:]
        box_area = (target["boxes"][:, 2:] * torch.tensor([width, height])).prod(1)
        torch.testing.assert_close(target["area"], 0.5 * box_area, rtol=1e-3, atol=0.1)


def test_ignored_objects_are_in_no_sample(drawn: Annotations) -> None:
    for record in drawn.images:
        record.ignore[1::2] = True
    dataset = training_set(drawn, settings(mosaic=1.0, mixup=1.0))
    for seed in range(10):
        assert not (dataset[0, seed][1]["labels"] % 2).any()


def test_a_sample_has_the_size_that_the_recipe_draws(drawn: Annotations) -> None:
    """Buckets, padded shapes and memory plans hold with and without; the image that the sample is named by too."""
    plain, strong = (training_set(drawn, settings(**options)) for options in ({}, ALL))
    different = 0
    for seed in range(40):
        (image, target), (other, more) = plain[seed % 3, seed], strong[seed % 3, seed]
        assert image.shape == other.shape
        assert other.dtype == torch.uint8
        assert all(torch.equal(target[name], more[name]) for name in ("size", "orig_size", "image_id"))
        assert "other_image_ids" not in target
        different += not torch.equal(image, other)
    assert different >= 30  # all five are off in 1 of 32


def test_an_option_changes_nothing_of_what_others_draw(drawn: Annotations) -> None:
    plain = training_set(drawn, settings(mosaic=0.5, scale_jitter=0.5, mixup=0.5))
    strong = training_set(drawn, settings(mosaic=0.5, scale_jitter=0.5, mixup=0.5, color_jitter=1.0, blur=1.0))
    for seed in range(20):
        (image, target), (other, more) = plain[0, seed], strong[0, seed]
        assert all(torch.equal(target[name], more[name]) for name in target)
        assert not torch.equal(image, other)


def test_off_is_the_recipe_to_the_bit(drawn: Annotations) -> None:
    recipe = DetectionDataset(drawn, build_transform("official", train=True, image_size=96), normalize=False)
    assert Augmentation.of(settings()) is None
    off = training_set(drawn, settings())
    in_the_last_epochs = training_set(drawn, settings(**dict.fromkeys(ALL, 1.0)))
    for seed in range(10):
        want = recipe[1, seed]
        for image, target in (off[1, seed], in_the_last_epochs[Turn(1, seed, strong=False)]):
            assert torch.equal(image, want[0])
            assert all(torch.equal(target[name], want[1][name]) for name in want[1])
        assert not torch.equal(in_the_last_epochs[1, seed][1]["boxes"], want[1]["boxes"])


def test_the_seed_alone_decides(drawn: Annotations) -> None:
    dataset = training_set(drawn, settings(**dict.fromkeys(ALL, 1.0)))
    torch.manual_seed(1)
    first = dataset[0, 7]
    state = torch.get_rng_state()
    torch.rand(5)
    again = dataset[0, 7]
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1]["boxes"], again[1]["boxes"])
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state), "the caller's generator is left alone"
    assert len({dataset[0, seed][1]["boxes"].sum().item() for seed in range(8)}) == 8


def test_partners_are_all_others_and_never_the_image_itself() -> None:
    augmentation, generator = Augmentation(mosaic=1.0, mixup=1.0), torch.Generator().manual_seed(0)
    plans = [augmentation.draw(3, 6, 0.5, generator) for _ in range(60)]
    assert {len(plan.partners) for plan in plans} == {4}
    partners = [partner for plan in plans for partner in plan.partners]
    assert {partner.index for partner in partners} == {0, 1, 2, 4, 5}
    assert {partner.flip for partner in partners} == {True, False}
    assert not any(partner.flip for partner in augmentation.draw(3, 6, 0.0, generator).partners)
    assert {plan.mosaic for plan in plans} != {plans[0].mosaic}
    assert all(plan.scale is None for plan in plans)
    alone = augmentation.draw(0, 1, 0.5, generator).partners
    assert {partner.index for partner in alone} == {0}  # there is no other


def test_a_partner_that_cannot_be_read_is_told_and_replaced(drawn: Annotations) -> None:
    drawn.images[1].path.write_text("no image")
    told = []
    config = settings("none", mosaic=1.0)
    dataset = training_set(drawn, config, lambda path, reason: told.append((path, reason)))
    for seed in range(8):
        image, target = dataset[0, seed]
        assert_boxes_fit(image, target)
        assert target["image_id"] == 0
        assert not (target["labels"] // 2 == 1).any()  # what only image 1 has
    assert {path for path, _ in told} == {str(drawn.images[1].path)}
    assert "can't be read" in told[0][1]
    with pytest.raises(InputError, match=r"1\.png can't be read"):
        [training_set(drawn, config)[0, seed] for seed in range(8)]


@pytest.mark.parametrize("size_wh", [(300, 1), (1, 300), (2, 2), (1, 1)])
def test_thin_and_tiny_images(drawn: Annotations, tmp_path: Path, size_wh: tuple[int, int]) -> None:
    width, height = size_wh
    Image.new("RGB", size_wh, "red").save(tmp_path / "thin.png")
    box = np.array([[0, 0, width, height]], np.float32)
    one = np.zeros(1, np.int64)
    thin = ImageRecord(9, tmp_path / "thin.png", (height, width), box, one, np.array([1.0], np.float32), one > 0)
    for annotations in (replace(drawn, images=[*drawn.images, thin]), replace(drawn, images=[thin])):
        dataset = training_set(annotations, settings(**dict.fromkeys(ALL, 0.7)))
        for seed in range(24):
            image, target = dataset[seed % len(dataset), seed]
            assert tuple(image.shape[1:]) == tuple(target["size"].tolist())
            assert target["boxes"].isfinite().all()
            assert (target["boxes"][:, 2:] > 0).all()


def test_images_without_objects(drawn: Annotations) -> None:
    empty = [replace(r, boxes_xyxy=r.boxes_xyxy[:0], labels=r.labels[:0], area=r.area[:0], ignore=r.ignore[:0])
             for r in drawn.images]  # fmt: skip
    _, target = training_set(replace(drawn, images=empty), settings(mosaic=1.0, mixup=1.0))[0, 1]
    assert target["boxes"].shape == (0, 4)
    dtypes = [target[name].dtype for name in ("boxes", "area", "labels", "iscrowd")]
    assert dtypes == [torch.float32, torch.float32, torch.int64, torch.int64]


def test_where_no_image_is_the_network_sees_padding(drawn: Annotations) -> None:
    config = settings("none", scale_jitter=1.0, scale_jitter_low=0.3, scale_jitter_high=0.3)
    image, _ = training_set(drawn, config)[0, 0]
    corner = image[:, 0, 0] if tuple(image[:, 0, 0].tolist()) == FILL else image[:, -1, -1]
    assert tuple(corner.tolist()) == FILL
    assert normalize_images(corner.view(3, 1, 1)).abs().max() < 0.01


# ---- colours, blends -------------------------------------------------------------------------------------------------


def test_colours_and_blur_touch_no_place() -> None:
    image = torch.randint(60, 180, (3, 20, 30), dtype=torch.uint8)
    assert torch.equal(recolored(image, None, None), image)
    assert (recolored(image, (1.0, 1.0, 1.0, 0.0), None).int() - image.int()).abs().max() <= 1
    colors = (1.1, 0.8, 1.2, 0.04)
    grey = float(image.permute(1, 2, 0)[::4, ::4].double().mean())
    matrix = torch.from_numpy(color_matrix(*colors, grey))
    want = torch.einsum("ij,jhw->ihw", matrix[:, :3], image.double()) + matrix[:, 3, None, None]
    changed = recolored(image, colors, None)
    assert changed.dtype == torch.uint8
    assert (changed.double() - want.clamp(0, 255)).abs().max() <= 1
    flat = torch.full((3, 20, 30), 77, dtype=torch.uint8)
    assert torch.equal(recolored(flat, None, 1.5), flat)
    blurred = recolored(image, None, 1.5)
    assert blurred.double().std() < 0.6 * image.double().std()


def test_what_each_colour_change_leaves() -> None:
    grey, red = np.array([90.0, 90, 90, 1]), np.array([200.0, 20, 20, 1])
    luma = np.array([0.299, 0.587, 0.114])
    turned = color_matrix(1, 1, 1.4, 0.1, 128)
    np.testing.assert_allclose(turned @ grey, [90] * 3, atol=0.5)  # saturation and hue leave what has no colour
    assert luma @ (turned @ red) == pytest.approx(luma @ red[:3], abs=0.5)
    np.testing.assert_allclose(color_matrix(1, 0.5, 1, 0, 128) @ grey, [109] * 3, atol=0.1)
    np.testing.assert_allclose(color_matrix(1.1, 1, 1, 0, 128) @ grey, [99] * 3, atol=0.1)
    np.testing.assert_allclose(color_matrix(1, 1, 0, 0, 128) @ red, [luma @ red[:3]] * 3, atol=0.5)
    blue, red_part, green_part = (color_matrix(1, 1, 1, turns, 0) @ red for turns in (2 / 3, 0, 1 / 3))
    assert np.argmax(red_part) == 0
    assert {int(np.argmax(blue)), int(np.argmax(green_part))} == {1, 2}


def test_blends_are_rounded() -> None:
    one, other = torch.full((3, 2, 2), 255, dtype=torch.uint8), torch.zeros((3, 2, 2), dtype=torch.uint8)
    assert blended(one, other, 0.5).unique().tolist() == [128]
    assert torch.equal(blended(one, one, 0.45), one)


# ---- options ---------------------------------------------------------------------------------------------------------


def test_ranges_of_the_options() -> None:
    for name in ALL:
        with pytest.raises(InputError, match=rf"{name} must lie in 0 to 1, got 1\.5"):
            settings(**{name: 1.5})
    with pytest.raises(InputError, match=r"scale_jitter_low must be at most scale_jitter_high, got 1\.5 and 1\.2"):
        settings(scale_jitter_low=1.5, scale_jitter_high=1.2)
    with pytest.raises(InputError, match="augmentation_off_epochs must be at least 0"):
        settings(augmentation_off_epochs=-1)


def test_an_augmentation_needs_a_recipe(drawn: Annotations) -> None:
    with pytest.raises(InputError, match="needs a recipe"):
        DetectionDataset(drawn, lambda image, target: (image, target), augmentation=Augmentation(mosaic=1.0))


def test_the_blur_grows_with_the_image_size() -> None:
    assert Augmentation.of(settings(image_size=800, blur=0.5)).sigma_range == (0.1, 2.0)
    assert Augmentation.of(settings(image_size=400, blur=0.5)).sigma_range == (0.05, 1.0)


def test_what_is_on_is_said_in_words() -> None:
    assert describe(settings()) == "augmentation: the paper's flips, scales and crops"
    assert describe(settings("none")) == "augmentation: resizing alone"
    said = describe(settings(mosaic=0.5, scale_jitter=1.0, blur=0.25, augmentation_off_epochs=2), 12)
    assert said == (
        "augmentation: the paper's flips, scales and crops; mosaics of four images (50%), scales of 0.1 to 2 (100%), "
        "blur (25%); these are off in the last 2 epochs"
    )
    assert describe(settings(blur=0.5, augmentation_off_epochs=1), 12).endswith("; these are off in the last epoch")
    assert "in all epochs" in describe(settings(mixup=0.5), 12)
    assert "never on: --data.augmentation_off_epochs is 2, and the run's epochs are 2" in describe(
        settings(mixup=0.5, augmentation_off_epochs=2), 2
    )


def test_samples_of_many_seeds_have_the_chances_of_their_options() -> None:
    augmentation = Augmentation(mosaic=0.5, mixup=0.25, scale_jitter=1.0, color_jitter=0.75, blur=0.0)
    plans = [
        augmentation.draw(0, 9, 0.5, torch.Generator().manual_seed(sample_seed(1, 0, index))) for index in range(600)
    ]
    for name, chance in {"mosaic": 0.5, "mixup": 0.25, "scale": 0.5, "colors": 0.75, "sigma": 0.0}.items():
        assert abs(sum(getattr(plan, name) is not None for plan in plans) / 600 - chance) < 0.07, name
    factors = [plan.scale[0] for plan in plans if plan.scale is not None]
    assert 0.1 <= min(factors) < 0.2
    assert 1.9 < max(factors) <= 2.0

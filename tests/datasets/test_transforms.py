import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2

from ddetr.datasets.transforms import (
    PAPER_SCALES,
    RandomSizeCrop,
    ResizeShortSide,
    build_transform,
    crop,
    normalize_images,
    official_eval,
    official_train,
    resized_hw,
)
from ddetr.errors import InputError


def sample(size_hw=(480, 640), boxes=((100.0, 50.0, 300.0, 250.0), (0.0, 0.0, 10.0, 10.0))):
    image = tv_tensors.Image(torch.randint(0, 256, (3, *size_hw), dtype=torch.uint8))
    boxes = torch.tensor(boxes).reshape(-1, 4)
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=size_hw),
        "labels": torch.arange(len(boxes)),
        "area": (boxes[:, 2:] - boxes[:, :2]).prod(1),
        "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
    }
    return image, target


@pytest.mark.parametrize(
    ("size_hw", "short_side", "max_size", "expected_hw"),
    [
        # by hand, from the official get_size_with_aspect_ratio
        ((480, 640), 800, 1333, (800, 1066)),  # 800 * 640 / 480 = 1066.67, rounded down
        ((640, 480), 800, 1333, (1066, 800)),
        ((427, 640), 800, 1333, (800, 1199)),  # 1199.06
        ((300, 1000), 800, 1333, (400, 1333)),  # 800 would give 2666: round(1333 * 300 / 1000) = 400, 1333.3
        ((1000, 300), 800, 1333, (1333, 400)),
        ((333, 1000), 800, 1333, (444, 1333)),  # round(443.889) = 444, int(1333.33)
        ((500, 833), 800, 1333, (800, 1332)),  # 833 / 500 * 800 = 1332.8 is within 1333
        ((500, 834), 800, 1333, (799, 1332)),  # 1334.4 is not: round(799.16) = 799, int(1332.73)
        ((800, 1200), 800, 1333, (800, 1200)),
        ((600, 600), 480, 1333, (480, 480)),
        ((300, 1000), 600, None, (600, 2000)),  # no limit in the crop branch
    ],
)
def test_official_size_arithmetic(size_hw, short_side, max_size, expected_hw):
    assert resized_hw(size_hw, short_side, max_size) == expected_hw


def test_official_eval_resizes_boxes_and_area():
    image, target = official_eval()(*sample())
    assert image.shape == (3, 800, 1066)
    assert image.dtype == torch.uint8
    scale_x, scale_y = 1066 / 640, 800 / 480
    want = torch.tensor(
        [[100 * scale_x, 50 * scale_y, 300 * scale_x, 250 * scale_y], [0, 0, 10 * scale_x, 10 * scale_y]]
    )
    torch.testing.assert_close(torch.as_tensor(target["boxes"]), want)
    torch.testing.assert_close(target["area"], torch.tensor([40000.0, 100.0]) * scale_x * scale_y)


def test_resizing_is_pillows_bilinear(shared_data):
    path = sorted((shared_data / "coco_tiny/val2017").iterdir())[0]
    with Image.open(path) as file:
        picture = file.convert("RGB")
    image = tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    resized, _ = ResizeShortSide((300,))(image, sample(tuple(image.shape[1:]))[1])
    want = np.asarray(picture.resize((resized.shape[2], resized.shape[1]), Image.Resampling.BILINEAR), dtype=np.int16)
    assert np.abs(resized.permute(1, 2, 0).numpy().astype(np.int16) - want).max() <= 2


def test_official_train_draws_the_paper_sizes():
    """Half of the images are resized whole to a scale of the list, half are cropped in between; half are flipped."""
    whole, flipped, scales = 0, 0, set()
    transform = official_train()
    for seed in range(80):
        torch.manual_seed(seed)
        image, target = transform(*sample((48, 64), ((4.0, 4.0, 12.0, 12.0),)))
        height, width = image.shape[1:]
        assert max(height, width) <= 1333
        if (height, width) in {resized_hw((48, 64), scale, 1333) for scale in PAPER_SCALES}:
            whole += 1
            scales.add(min(height, width))
            flipped += target["boxes"][0, 0].item() > width / 2
    assert 28 <= whole <= 60  # a crop may have the whole image's shape by chance
    assert 0.25 < flipped / whole < 0.75
    assert scales <= set(PAPER_SCALES)
    assert len(scales) >= 8


def test_crop_drops_only_boxes_without_area():
    boxes = [
        [0.0, 0, 20, 20],
        [10, 10, 30, 30],
        [30, 10, 40, 20],
        [29.5, 39.5, 60, 60],
        [0, 0, 100, 100],
        [0, 0, 10, 100],
    ]
    image, target = crop(*sample((100, 100), boxes), top=10, left=10, height=30, width=20)
    assert image.shape == (3, 30, 20)
    # box 2 touches the window's right edge and box 5 its left edge: no area; of box 3 half a pixel square stays
    assert target["labels"].tolist() == [0, 1, 3, 4]
    assert target["boxes"].tolist() == [[0, 0, 10, 10], [0, 0, 20, 20], [19.5, 29.5, 20, 30], [0, 0, 20, 30]]
    assert target["area"].tolist() == [100, 400, 0.25, 600]
    assert len(target["iscrowd"]) == 4
    assert target["boxes"].canvas_size == (30, 20)


def test_crop_keeps_pixels_under_boxes():
    """A bright rectangle stays exactly under its box through flip, resize and crop."""
    transform = official_train(scales=(96, 128), max_size=300, crop_scales=(80, 120), crop_range=(70, 100))
    for seed in range(12):
        image, target = sample((120, 160), [[40.0, 30.0, 80.0, 70.0]])
        image[:] = 0
        image[:, 30:70, 40:80] = 255
        torch.manual_seed(seed)
        image, target = transform(image, target)
        ys, xs = torch.nonzero(image[0] > 127, as_tuple=True)
        if not len(target["boxes"]):
            assert len(xs) == 0
            continue
        seen = torch.tensor([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
        assert (seen - torch.as_tensor(target["boxes"][0])).abs().max() <= 1.0


def test_crop_of_an_image_smaller_than_the_range():
    image, _ = RandomSizeCrop(384, 600)(*sample((100, 500)))
    assert image.shape[1] == 100
    assert 384 <= image.shape[2] <= 500


def test_images_without_objects():
    image, target = sample(boxes=())
    for seed in range(6):
        torch.manual_seed(seed)
        _, out = official_train()(image, target)
        assert out["boxes"].shape == (0, 4)
        assert out["area"].shape == (0,)


def test_recipes_scale_with_the_image_size():
    whole = build_transform("official", train=True, image_size=160).transforms[1]
    assert whole.first.short_sides == (96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160)
    assert whole.first.max_size == 267
    assert whole.second.transforms[0].short_sides == (80, 100, 120)
    assert (whole.second.transforms[1].min_size, whole.second.transforms[1].max_size) == (77, 120)
    paper = build_transform("official", train=True).transforms[1]
    assert paper.first.short_sides == PAPER_SCALES
    assert (paper.second.transforms[1].min_size, paper.second.transforms[1].max_size) == (384, 600)


@pytest.mark.parametrize("recipe", ["official", "plain", "none"])
def test_every_recipe_evaluates_alike(recipe):
    image, _ = build_transform(recipe, train=False, image_size=160)(*sample())
    assert image.shape == (3, 160, 213)


def test_plain_flips_and_none_does_not():
    for recipe, expected in (("plain", {True, False}), ("none", {False})):
        transform = build_transform(recipe, train=True, image_size=160)
        seen = set()
        for seed in range(12):
            torch.manual_seed(seed)
            image, target = transform(*sample())
            assert image.shape == (3, 160, 213)
            seen.add(target["boxes"][1, 0].item() > 100)
        assert seen == expected


def test_wrong_names_and_sizes():
    with pytest.raises(InputError, match=r'not \'oficial\'\. Did you mean "official"\?'):
        build_transform("oficial", train=True)
    with pytest.raises(InputError, match="16 or more"):
        build_transform(train=True, image_size=8)


def test_normalize_is_torchvisions_and_zeroes_padding():
    images = torch.randint(0, 256, (2, 3, 5, 7), dtype=torch.uint8)
    want = v2.functional.normalize(images.float() / 255, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(normalize_images(images), want)
    mask = torch.zeros(2, 5, 7, dtype=torch.bool)
    mask[1, 3:] = True
    normalized = normalize_images(images, mask)
    assert (normalized[1, :, 3:] == 0).all()
    torch.testing.assert_close(normalized[0], want[0])

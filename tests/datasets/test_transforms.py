import numpy as np
import pytest
import torch
from drawn_sets import draw_photo
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ddetr.datasets import load_annotations, read_image
from ddetr.datasets.transforms import (
    MAX_PADDED_SHAPES,
    PAPER_SCALES,
    Crop,
    Recipe,
    View,
    build_transform,
    normalize_images,
    official_eval,
    official_train,
    padded_shapes,
    resized_hw,
    view_of_image,
    view_of_objects,
    whole_pixels,
    worst_padded_hw,
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
        ((2, 2400), 64, 107, (1, 107)),  # of strips the official arithmetic would leave nothing, or too much
        ((2400, 2), 64, 107, (107, 1)),
        ((1, 2000), 800, 1333, (1, 1333)),
        ((1, 1), 800, 1333, (800, 800)),
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


def test_resizing_is_pillows_bilinear():
    picture = draw_photo((640, 426), seed=0)
    image = tv_tensors.Image(torch.from_numpy(np.array(picture)).permute(2, 0, 1))
    resized, _ = Recipe((300,))(image, sample(tuple(image.shape[1:]))[1])
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
    boxes = np.array(
        [
            [0.0, 0, 20, 20],
            [10, 10, 30, 30],
            [30, 10, 40, 20],
            [29.5, 39.5, 60, 60],
            [0, 0, 100, 100],
            [0, 0, 10, 100],
        ],
        dtype=np.float32,
    )
    view = View(False, Crop((100, 100), top=10, left=10, height=30, width=20), (30, 20))
    boxes, area, keep = view_of_objects(boxes, np.ones(6, np.float32), view, (100, 100))
    # box 2 touches the window's right edge and box 5 its left edge: no area; of box 3 half a pixel square stays
    assert keep.tolist() == [True, True, False, True, True, False]
    assert boxes.tolist() == [[0, 0, 10, 10], [0, 0, 20, 20], [19.5, 29.5, 20, 30], [0, 0, 20, 30]]
    assert area.tolist() == [100, 400, 0.25, 600]


def test_the_crop_takes_labels_along():
    image, target = sample((100, 100), [[0.0, 0, 5, 5], [40, 40, 60, 60], [90, 90, 100, 100]])
    recipe = Recipe((40,), crop=1.0, crop_short_sides=(100,), crop_range=(40, 40))
    for seed in range(20):
        torch.manual_seed(seed)
        _, out = recipe(image, target)
        assert len(out["boxes"]) == len(out["labels"]) == len(out["iscrowd"]) == len(out["area"])
        assert set(out["labels"].tolist()) <= {0, 1, 2}
        assert out["boxes"].canvas_size == (40, 40)
        if out["labels"].tolist() == [1] and out["area"].item() == 400:
            return
    raise AssertionError("no window of twenty shows the object in the middle whole and alone")


def step_by_step(image, target, view):
    """The recipe as it is written in the paper's code: every step by itself, with torchvision's functions."""
    if view.flip:
        image, target = F.horizontal_flip(image), {**target, "boxes": F.horizontal_flip(target["boxes"])}

    def resize(image, target, size):
        old = image.shape[-2:]
        scale = (size[0] / old[0]) * (size[1] / old[1])
        boxes = F.resize(target["boxes"], list(size))
        return F.resize(image, list(size), antialias=True), {**target, "boxes": boxes, "area": target["area"] * scale}

    if view.crop is not None:
        of_hw, top, left, height, width = view.crop
        image, target = resize(image, target, of_hw)
        image, boxes = F.crop(image, top, left, height, width), F.crop(target["boxes"], top, left, height, width)
        keep = (boxes[:, 2:] > boxes[:, :2]).all(1)
        target = {name: values[keep] for name, values in {**target, "boxes": F.clamp_bounding_boxes(boxes)}.items()}
        corners = target["boxes"].as_subclass(torch.Tensor)
        target["area"] = (corners[:, 2:] - corners[:, :2]).prod(1)
        target["boxes"] = tv_tensors.BoundingBoxes(corners, format="XYXY", canvas_size=(height, width))
    return resize(image, target, view.out_hw)


def test_merged_steps_give_what_single_steps_give(any_coco):
    """Sizes, boxes, areas and labels to the last bit but rounding; pixels exactly where nothing is cropped, and close
    where the steps resample twice."""
    annotations = load_annotations(any_coco, "val2017")
    recipe = official_train()
    differences = []
    for i in range(0, 80, 3):
        record = annotations.images[i % len(annotations.images)]
        boxes = torch.from_numpy(record.boxes_xyxy.copy())
        target = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=record.size_hw),
            "labels": torch.from_numpy(record.labels.copy()),
            "area": torch.from_numpy(record.area.copy()),
            "iscrowd": torch.zeros(len(boxes), dtype=torch.int64),
        }
        image = tv_tensors.Image(read_image(record.path))
        torch.manual_seed(i)
        got_image, got = recipe(image, target)
        torch.manual_seed(i)
        view = recipe.draw(record.size_hw)
        want_image, want = step_by_step(image, target, view)
        assert got_image.shape == want_image.shape
        for name in want:
            torch.testing.assert_close(
                torch.as_tensor(got[name]), torch.as_tensor(want[name]), rtol=1e-6, atol=1e-3, msg=name
            )
        difference = (got_image.int() - want_image.int()).abs().float().mean().item()
        if view.crop is None:
            assert difference == 0
        else:
            differences.append(difference)
    assert len(differences) >= 6
    assert np.mean(differences) < 3
    assert max(differences) < 10


@pytest.mark.parametrize("flip", [False, True])
def test_a_merged_crop_shows_the_window_to_a_fraction_of_a_pixel(flip):
    """On a ramp the value is the place, so that a window moved by a pixel would show as 2 levels."""
    ramp = (torch.arange(120)[None, :, None] * 2).expand(100, 120, 3).to(torch.uint8).permute(2, 0, 1)
    for left in range(0, 60, 7):
        view = View(flip, Crop((150, 180), 10, left, 90, 101), (120, 135))
        image = view_of_image(ramp.flip(-1) if flip else ramp, view)
        assert image.shape == (3, 120, 135)
        centres = (torch.arange(135) + 0.5) * 101 / 135 + left  # of the resized image, 1.5 times the ramp
        want = 2 * (centres / 1.5 - 0.5)
        off = (image[0, 60].float() - want)[3:-3].abs().max()
        assert off < 1.2, f"{off / 2:.2f} pixels"


def test_window_borders_move_to_pixel_borders():
    assert whole_pixels(0.0, 100.0, 200, 100) == (0, 100, 0, 200)
    # a step of 0.8 from 10.4: three outputs before it is 8.0; the end, 50.4, is 52.0 two outputs later
    assert whole_pixels(10.4, 40.0, 50, 100) == (8, 52, 3, 55)
    for start, length, outputs, limit in ((0.3, 0.5, 3, 1), (99.2, 0.8, 600, 100), (3.7, 2.2, 1000, 7), (0, 5.5, 2, 6)):
        first, last, before, total = whole_pixels(start, length, outputs, limit)
        assert 0 <= first < last <= limit
        assert 0 <= before <= total - outputs
    worst = 0.0
    for i in range(300):
        start, length, outputs = i * 0.37 % 90, 300 + i * 0.711, 480 + i
        first, last, before, total = whole_pixels(start, length, outputs, 640)
        step = length / outputs
        after = total - outputs - before
        worst = max(worst, abs(start - before * step - first), abs(start + length + after * step - last))
    assert worst <= 0.5


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
    recipe = Recipe((100,), crop=1.0, crop_short_sides=(100,), crop_range=(384, 600))
    for seed in range(10):
        crop = recipe.draw((100, 500), torch.Generator().manual_seed(seed)).crop
        assert crop.height == 100
        assert 384 <= crop.width <= 500


def test_images_without_objects():
    image, target = sample(boxes=())
    for seed in range(6):
        torch.manual_seed(seed)
        _, out = official_train()(image, target)
        assert out["boxes"].shape == (0, 4)
        assert out["area"].shape == (0,)


def test_recipes_scale_with_the_image_size():
    small = build_transform("official", train=True, image_size=160)
    assert small.short_sides == (96, 102, 109, 115, 122, 128, 134, 141, 147, 154, 160)
    assert small.max_size == 267
    assert small.crop_short_sides == (80, 100, 120)
    assert small.crop_range == (77, 120)
    paper = build_transform("official", train=True)
    assert paper == official_train()
    assert (paper.short_sides, paper.max_size) == (PAPER_SCALES, 1333)
    assert (paper.crop_short_sides, paper.crop_range) == ((400, 500, 600), (384, 600))
    assert (paper.flip, paper.crop) == (0.5, 0.5)


def test_draws_are_uniform_and_within_their_ranges():
    recipe = official_train()
    generator = torch.Generator().manual_seed(0)
    views = [recipe.draw((480, 640), generator) for _ in range(3000)]
    crops = [view.crop for view in views if view.crop is not None]
    assert 0.46 < len(crops) / len(views) < 0.54
    assert 0.46 < np.mean([view.flip for view in views]) < 0.54
    assert {min(crop.of_hw) for crop in crops} == {400, 500, 600}
    for crop in crops:
        height, width = crop.of_hw
        assert 384 <= crop.height <= min(600, height)
        assert 384 <= crop.width <= min(600, width)
        assert 0 <= crop.top <= height - crop.height
        assert 0 <= crop.left <= width - crop.width
    of_600 = [crop for crop in crops if crop.of_hw == (600, 800)]
    assert (min(c.height for c in of_600), max(c.height for c in of_600)) == (384, 600)
    counts = np.bincount([PAPER_SCALES.index(min(view.out_hw)) for view in views if view.crop is None], minlength=11)
    assert counts.min() > 0.6 * counts.mean()


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
    with pytest.raises(InputError, match=r"not \'oficial\' \(did you mean official\?\)"):
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


def test_padded_shapes_hold_every_batch_of_the_recipe():
    for image_size in (64, 160, 800):
        recipe = build_transform("official", train=True, image_size=image_size)
        generator = torch.Generator().manual_seed(0)
        shapes = padded_shapes(image_size, MAX_PADDED_SHAPES)
        worst = worst_padded_hw(image_size)
        assert all(height % 32 == 0 and width % 32 == 0 for height, width in shapes)
        assert all(side <= largest for side, largest in zip(worst, shapes[0]))
        for size_hw in ((480, 640), (640, 427), (300, 900), (1000, 1000)):
            for _ in range(50):
                height, width = recipe.draw(size_hw, generator).out_hw
                assert height <= worst[0] + 1
                assert width <= worst[1] + 1
                assert any(height <= h and width <= w for h, w in shapes)
    assert worst_padded_hw(800) == (1333, 1333)
    assert padded_shapes(800, 3) == [(1344, 1344), (800, 1216), (1216, 800)]
    assert padded_shapes(16, 3) == [(32, 32)]  # all three are the same
    for count in (0, MAX_PADDED_SHAPES + 1):
        with pytest.raises(InputError, match="padded_shapes must lie in 1 to"):
            padded_shapes(800, count)


@pytest.mark.parametrize("recipe", ["official", "plain", "none"])
@pytest.mark.parametrize("size_hw", [(1, 1), (1, 900), (900, 1), (2, 2400), (3, 2), (7, 500)])
def test_every_recipe_leaves_a_pixel_of_the_thinnest_image(recipe, size_hw):
    transform = build_transform(recipe, train=True, image_size=32)
    height, width = size_hw
    for seed in range(6):
        torch.manual_seed(seed)
        target = {
            "boxes": tv_tensors.BoundingBoxes([[0, 0, width, height]], format="XYXY", canvas_size=size_hw),
            "labels": torch.tensor([0]),
            "area": torch.tensor([float(width * height)]),
            "iscrowd": torch.tensor([0]),
        }
        target["boxes"] = target["boxes"].float()
        image, target = transform(tv_tensors.Image(torch.zeros(3, *size_hw, dtype=torch.uint8)), target)
        assert min(image.shape[1:]) >= 1
        assert max(image.shape[1:]) <= 1.5 * 53  # 1333 of 800 at 32, and what the official rounding adds
        assert torch.isfinite(torch.as_tensor(target["boxes"])).all()

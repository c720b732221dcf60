"""Networks that timm makes for one image size: at that size they are timm's, bit for bit or nearly."""

import pytest
import timm
import torch

from ddetr.models.backbones import Backbone
from tests.models.backbones.test_backbone import images


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "size", "num_equal"),
    [
        ("tiny_hiera", 224, 3),
        ("tiny_hiera_abswin", 256, 3),
        ("test_coatnet", 160, 3),
        ("test_maxvit", 160, 3),
        ("test_mambaout", 96, 3),
        # The last stage of timm's has one window and so no shift: only at this size.
        ("tiny_swin", 224, 2),
        ("tiny_swinv2", 256, 2),
    ],
)
def test_at_its_own_size_it_is_that_of_timm(name: str, size: int, num_equal: int) -> None:
    torch.manual_seed(0)
    backbone = Backbone(name, 3).eval()
    fixed = timm.create_model(name, features_only=True, out_indices=(-3, -2, -1)).eval()
    fixed.load_state_dict(backbone.body.state_dict())
    x = images(size, size, count=1)
    expected = fixed(x)
    if getattr(fixed, "output_fmt", None) == "NHWC":
        expected = [one.permute(0, 3, 1, 2) for one in expected]
    for one, two in list(zip(backbone(x), expected, strict=True))[:num_equal]:
        torch.testing.assert_close(one, two)


@torch.no_grad()
@pytest.mark.parametrize("name", ["test_coatnet", "tiny_hiera"])
def test_positions_are_interpolated(name: str) -> None:
    """A constant image at twice the size: positions alone differ between cells, and they are as smooth."""
    torch.manual_seed(0)
    backbone = Backbone(name, 3).eval()
    size = {"test_coatnet": 160, "tiny_hiera": 224}[name]
    small, large = (backbone(torch.ones(1, 3, side, side))[1] for side in (size, 2 * size))
    assert large.shape[-1] == 2 * small.shape[-1]
    inner = (slice(None), slice(None), slice(2, -2), slice(2, -2))  # borders see padding
    torch.testing.assert_close(large[inner].mean((2, 3)), small[inner].mean((2, 3)), atol=0.3, rtol=0.3)


def test_images_are_padded_at_the_right_and_bottom_alone() -> None:
    """The map of a part that no window joins to the padding is that of the image without it."""
    torch.manual_seed(0)
    backbone = Backbone("tiny_convnext", 3).eval()
    x = images(96, 96, count=1)
    padded = torch.zeros(1, 3, 128, 128)
    padded[..., :96, :96] = x
    with torch.no_grad():
        cut = backbone(x[..., :90, :90])
        x[..., 90:, :] = 0.0
        x[..., :, 90:] = 0.0
        for one, two in zip(cut, backbone(x), strict=True):
            torch.testing.assert_close(one, two)

"""Any network of timm as a backbone."""

import pytest
import torch

from ddetr.models.backbones import Backbone

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", IMAGENET),
        ("resnet50", IMAGENET),
        ("tf_efficientnet_lite0", HALF),  # of TensorFlow
        ("tf_efficientnet_b0.ns_jft_in1k", IMAGENET),  # the tag decides, not the network
        ("tf_efficientnet_b0.in1k", IMAGENET),
        ("tf_efficientnetv2_b0", IMAGENET),
        ("tf_efficientnetv2_s.in21k", HALF),
    ],
)
def test_the_normalisation_is_that_of_the_weights(name: str, expected: tuple) -> None:
    with torch.device("meta"):
        backbone = Backbone(name, 3)
    assert (backbone.mean, backbone.std) == expected

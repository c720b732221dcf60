"""transformers, which nobody here wrote, on the folders that we write: the same outputs, and the same boxes in pixels
through its own image processor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from weights_of import PETS, make_checkpoint, make_model

from ddetr.checkpoint import Checkpoint, convert_checkpoint, load_weights
from ddetr.checkpoint.foreign import read_weights
from ddetr.datasets.transforms import normalize_images
from ddetr.inference.predictor import Predictor
from ddetr.models.deformable_detr import DeformableDETR

transformers = pytest.importorskip("transformers")

TINY = {"backbone": "test_resnet"}  # timm's, of plain batch norms


def lively_model(seed: int, **options: Any) -> DeformableDETR:
    """Random, with norms that let the image through: outputs depend on it."""
    model = make_model(seed, **TINY | options)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("weight") and tensor.ndim == 1:
                tensor.add_(1)
    return model.eval()


def load_theirs(folder: Path) -> nn.Module:
    """As a user does, and nothing may be missing or left."""
    model, info = transformers.AutoModelForObjectDetection.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@torch.no_grad()
def outputs_of(ours: nn.Module, theirs: nn.Module) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Logits and boxes of both, for two images of which one is padded."""
    images = torch.randn(2, 3, 96, 128, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 96, 128, dtype=torch.bool)
    mask[1, 70:], mask[1, :, 100:] = True, True
    images = images.masked_fill(mask[:, None], 0.0)
    own, found = ours(images, mask), theirs(pixel_values=images, pixel_mask=(~mask).long())
    return (own["pred_logits"], own["pred_boxes"]), (found.logits, found.pred_boxes)


def assert_same_outputs(ours: nn.Module, theirs: nn.Module) -> None:
    for own, found in zip(*outputs_of(ours, theirs)):
        torch.testing.assert_close(found, own, atol=1e-5, rtol=0)
        assert (own[0] - own[1]).abs().max() > 1e-2, "the images make no difference, and neither would an error"


def test_both_directions_compute_the_same(variant: dict[str, Any], tmp_path: Path) -> None:
    """ours -> transformers; then other weights, from transformers -> ours -> transformers: bit-identical."""
    ours = lively_model(1, **variant)
    convert_checkpoint(make_checkpoint(ours, categories=PETS), tmp_path / "ours", "transformers")
    theirs = load_theirs(tmp_path / "ours")
    assert_same_outputs(ours, theirs)

    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1 + 0.1 * torch.rand_like(parameter))
    (tmp_path / "theirs").mkdir()
    torch.save(theirs.state_dict(), tmp_path / "theirs" / "pytorch_model.bin")
    (tmp_path / "theirs" / "config.json").write_bytes((tmp_path / "ours" / "config.json").read_bytes())
    ours = lively_model(2, **variant)
    report = load_weights(ours, tmp_path / "theirs", categories=PETS)
    assert report.share == 1
    assert_same_outputs(ours, theirs)

    convert_checkpoint(Checkpoint.of(ours, PETS), tmp_path / "back", "transformers")
    back = load_theirs(tmp_path / "back").state_dict()
    assert back.keys() == theirs.state_dict().keys()
    assert all(back[name].equal(tensor) for name, tensor in theirs.state_dict().items())
    found = read_weights(tmp_path / "back").tensors
    assert all(found[name].equal(ours.state_dict()[name]) for name in found)


@pytest.mark.parametrize("size_hw", [(90, 140), (150, 101), (64, 64)])
def test_its_image_processor_gives_the_same_boxes_in_pixels(size_hw: tuple[int, int], tmp_path: Path) -> None:
    """Also with a mean and a deviation that are not ImageNet's."""
    model = lively_model(3, with_box_refine=True, two_stage=True)
    colors = {"mean": (0.5, 0.4, 0.3), "std": (0.5, 0.25, 0.2)}
    checkpoint = make_checkpoint(model, categories=PETS, image_size=96, max_size=200)
    checkpoint.input |= {name: list(value) for name, value in colors.items()}
    convert_checkpoint(checkpoint, tmp_path / "out", "transformers")
    theirs = load_theirs(tmp_path / "out")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "out")
    predictor = Predictor(model, PETS, image_size=96, max_size=200, threshold=0.0, device="cpu", **colors)

    image = np.random.default_rng(0).integers(0, 255, (*size_hw, 3), dtype=np.uint8)
    inputs = processor(images=image, return_tensors="pt")
    assert inputs["pixel_values"][0].equal(normalize_images(predictor.prepare(image).resized, **colors))
    with torch.no_grad():
        outputs = theirs(**inputs)
    (found,) = processor.post_process_object_detection(outputs, threshold=0.0, target_sizes=[size_hw])
    expected = predictor.predict(image)
    torch.testing.assert_close(found["boxes"], expected.boxes_xyxy, atol=1e-3, rtol=0)
    torch.testing.assert_close(found["scores"], expected.scores, atol=1e-5, rtol=0)
    names = [theirs.config.id2label[label] for label in found["labels"].tolist()]
    assert names == expected.names
    assert expected.boxes_xyxy.std(dim=0).min() > 1, "all boxes are one, and would be so of any image"

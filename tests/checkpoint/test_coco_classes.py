"""COCO's class names and ids are those of COCO itself."""

from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from ddetr.checkpoint.coco_classes import COCO_CLASSES


def test_coco_table() -> None:
    """Against torchvision's, whose list has all 91 ids."""
    names = FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    assert {i: name for i, name in enumerate(names) if name not in ("__background__", "N/A")} == COCO_CLASSES

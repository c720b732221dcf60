"""Images -> feature maps: the networks of timm.

backbone.py   `Backbone`
"""

from ddetr.models.backbones.backbone import Backbone, FreezeBackbone

__all__ = ["Backbone", "FreezeBackbone"]

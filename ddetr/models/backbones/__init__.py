"""Images -> feature maps: the networks of timm.

backbone.py     `Backbone`: any of them, at any image size
families.py     what each family needs for that
plain_vit.py    vision transformers of one stride, and their windows
pyramid.py      maps of several strides from their one
swin.py         the windows of Swin on maps of any size
hiera.py        Hiera at any image size
coatnet.py      the attention of CoAtNet at any image size
pretrained.py   where the weights come from; files of any project
names.py        how those projects name them
"""

from ddetr.models.backbones.backbone import Backbone, FreezeBackbone
from ddetr.models.backbones.pretrained import find_start

__all__ = ["Backbone", "FreezeBackbone", "find_start"]

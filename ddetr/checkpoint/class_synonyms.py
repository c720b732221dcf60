"""Names that data sets have for the same class, as far as there is no doubt: COCO's first, then those of Pascal VOC,
Open Images and Objects365. Spaces, capitals, `_` and `-` make no difference, and are not written out."""

from ddetr.datasets.annotations import alike

_GROUPS = """
airplane = aeroplane
cell phone = mobile phone = mobile telephone
couch = sofa
dining table = dinning table
donut = doughnut
frisbee = flying disc
hair drier = hair dryer
handbag = handbag/satchel
keyboard = computer keyboard
laptop = laptop computer
microwave = microwave oven
motorcycle = motorbike
mouse = computer mouse
refrigerator = fridge
remote = remote control
skis = ski
tennis racket = tennis racquet
tv = television = tv monitor = monitor/tv
"""


def _without_spaces(name: str) -> str:
    return alike(name).replace(" ", "")


_FIRST_OF: dict[str, str] = {
    _without_spaces(name): _without_spaces(group.split("=")[0])
    for group in _GROUPS.strip().splitlines()
    for name in group.split("=")
}


def meaning(name: str) -> str:
    """The same for class names that mean the same: "tvmonitor" and "TV", "pottedplant" and "potted plant"."""
    key = _without_spaces(name)
    return _FIRST_OF.get(key, key)

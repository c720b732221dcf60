"""COCO's 80 classes: files of foreign weights hold rows for them, but seldom their names."""

import re

_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella, handbag,
tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard,
tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange, broccoli, carrot,
hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv, laptop, mouse, remote,
keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear,
hair drier, toothbrush
"""
_GAPS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}  # ids that COCO's annotators dropped

NUM_IDS = 91  # rows of a head that uses the ids 0..90 as they are
COCO_CLASSES: dict[int, str] = dict(
    zip(
        (category_id for category_id in range(1, NUM_IDS) if category_id not in _GAPS),
        " ".join(_NAMES.split()).split(", "),
        strict=True,
    )
)
"""Category id -> name, in the order of the ids."""
UNUSED = "N/A"  # in transformers' files the name of each id that COCO dropped


def is_unused(name: str) -> bool:
    """Whether this is how a file calls an id that COCO dropped: "N/A", or "N/A 12" in ours."""
    return re.fullmatch(rf"{UNUSED}( \d+)?", name) is not None

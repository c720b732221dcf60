"""Whether the boxes of a split look as if they meant something else than its format says.

Forms, n boxes and sizes as in box_form.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ddetr.datasets.annotations import FindingLog, ImageTable
from ddetr.datasets.box_form import RELATIVE, base, corners_of, is_relative, numbers_of, turned
from ddetr.datasets.config import BoxForm

_MEANING = {
    "xyxy": "two corners (x1, y1, x2, y2)",
    "xywh": "a corner and a size (x, y, width, height)",
    "cxcywh": "a centre and a size (x, y, width, height)",
}
_NUMBERS = {
    "xyxy": ("x1", "y1", "x2", "y2"),
    "xywh": ("x", "y", "width", "height"),
    "cxcywh": ("x", "y", "width", "height"),
}
# Orders in which the numbers of a form may stand in a file -> the places of its own numbers there. A size before a
# corner fits as well as behind it.
_ORDERS = {
    "xyxy": {"x1, x2, y1, y2": [0, 2, 1, 3], "y1, y2, x1, x2": [2, 0, 3, 1]},
    "xywh": {},
    "cxcywh": {"width, height, x, y": [2, 3, 0, 1]},
}
_TELLING = 20  # boxes, all of which fit by one of these orders by no chance: corners don't as sizes and centres
_ONE = np.ones((1, 2))  # the size of an image whose boxes are fractions
_SMALLEST_SIDE = 16  # of an image in which a box within the first pixel is told from fractions
_MOSTLY = 0.5  # of the boxes: fewer than that in 0..1 are mistakes of their own
# Boxes that don't fit into their images are mistakes of their own where they are fewer than this or a smaller share of
# all. Corners read as sizes, or sizes as corners, break three of four; centres as corners, and corners as centres, only
# those near an edge.
_FEW, _SHARE = 2, 0.25
_FEW_OF_CENTRES, _SHARE_OF_CENTRES = 5, 0.03
_CLEARER = 20  # times fewer of them don't fit when they are read by the right form
_CLEARER_OF_TWO = 3  # where it must be one of two, and boxes of the right one may reach out of their images too
# Fewer boxes than this, or a smaller share, are mistakes of their own, where no form is clearly better or units differ.
_FEW_OF_ANY, _SHARE_OF_ANY = 5, 0.2
_SCALES = {100: "hundredths (percent)", 1000: "thousandths"}  # of the image's sides, which no form has
_REACH = 0.7  # of a scale, which the boxes that are in it come to
_CHANCE_BITS = 20  # boxes of large images all lie within the scale's first pixels by a chance of one to 2 ** this
_WHOLE, _FEW_WHOLE = 0.9, 10  # of the boxes: so many that are the whole image are no objects that fill it
_SAMPLED = 10_000  # boxes, over the whole split, that show whether all need to be looked at
_SAME = 1e-9  # of a number: what making corners of sizes, and sizes of them, adds to it
_EDGE = 0.01  # of the image's side, from its edges, or one pixel: such a box is the whole image
# Of the images' sides: the boxes of smaller images leave so much empty at the right and below, and many of them lie
# nearer to the left, and to the top, than a quarter of that.
_EMPTY, _NEAR = 0.25, 0.25
_MANY_NEAR = 20  # images that have such a box


def settled_form(numbers: np.ndarray, sizes_hw: np.ndarray, log: FindingLog, where: str) -> BoxForm:
    """Whether the (n, 4) numbers of a whole split, which don't say what they are, are two corners or a corner and a
    size: by which of the two the boxes fit into their images of (n, 2) sizes, reported; "xywh" where that can't be
    known, which is reported too, or where `check_meaning` will say more."""
    judged = np.isfinite(numbers).all(axis=1) & (sizes_hw >= _SMALLEST_SIDE).all(axis=1)
    numbers, sizes_hw = numbers[judged], sizes_hw[judged]
    if not len(numbers) or ((numbers >= -0.05) & (numbers <= 1.05)).all(axis=1).mean() > _MOSTLY:
        return "xywh"
    differ = (np.abs(numbers[:, :2]) >= 1).any(axis=1)  # from the corner of the image on, a size is a corner too
    numbers, sizes_hw = numbers[differ], sizes_hw[differ]
    if not len(numbers):
        return "xywh"
    forms = ("xyxy", "xywh")
    misfits = {form: _misfits(corners_of(numbers, form), sizes_hw) for form in forms}
    best, other = sorted(forms, key=lambda form: int(misfits[form].sum()))
    count = int(misfits[other].sum())
    if count >= _fewest(other, best, len(numbers)) and misfits[best].sum() * _CLEARER_OF_TWO <= count:
        message = (
            f"The columns don't say what the four numbers of a box are; they were read as {_MEANING[best]}: "
            f"{_of(misfits[other])} don't fit into their images as {_MEANING[other]}."
        )
        log.add("box-form", "note", where, message)
        return best
    message = (
        f"What the four numbers of a box are can't be known: of {len(numbers):,} boxes {count:,} don't fit into their "
        f"images as {_MEANING[other]}, and {int(misfits[best].sum()):,} as {_MEANING[best]}. Say it by --data.boxes "
        "xyxy or xywh."
    )
    log.add("box-form-unknown", "refused", where, message, count=len(numbers))
    return "xywh"


def check_meaning(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, own: BoxForm, wanted: BoxForm, log: FindingLog, where: str
) -> bool:
    """Reports where the boxes of a whole split look as if they meant something else; whether they do.

    Args:
        boxes_xyxy: (n, 4) corners as they are read: pixels, or fractions where `wanted` is relative.
        sizes_hw: (n, 2) of their images.
        own: the form that the data set's format says; wanted: what they were read as, "auto" for `own`.
    """
    if not (own if wanted == "auto" else wanted).startswith("xyxy"):
        unit = (np.ones(2), 0.0) if is_relative(wanted) else (sizes_hw,)
        boxes_xyxy, _ = turned(boxes_xyxy, *unit)
    judged = np.isfinite(boxes_xyxy).all(axis=1) & (boxes_xyxy[:, 2:] != boxes_xyxy[:, :2]).any(axis=1)
    judged &= (sizes_hw >= _SMALLEST_SIDE).all(axis=1)
    if not judged.all():
        boxes_xyxy, sizes_hw = boxes_xyxy[judged], sizes_hw[judged]
    if not len(boxes_xyxy):
        return False
    if wanted == "auto":
        bad = _misfits(boxes_xyxy, sizes_hw)
        reports = [_report_repeated, _report_fractions, _report_order, _report_scale]
        reports += [_report_other_form, _report_misfits]
        return any(report(boxes_xyxy, sizes_hw, bad, own, log, where) for report in reports)
    if is_relative(wanted):
        beyond = (np.abs(boxes_xyxy) > 2).any(axis=1)
        if beyond.mean() > _MOSTLY:
            message = f"{_of(beyond)} are no fractions of an image, but were read as {wanted}: correct --data.boxes."
            log.add("boxes-not-relative", "refused", where, message, count=int(beyond.sum()))
            return True
    return False


def check_fractions(boxes_xyxy: np.ndarray, own: BoxForm, log: FindingLog, where: str) -> None:
    """The same of (n, 4) corners in fractions, of a format that has fractions; own: its form, one that is relative."""
    judged = np.isfinite(boxes_xyxy).all(axis=1) & (boxes_xyxy[:, 2:] != boxes_xyxy[:, :2]).any(axis=1)
    boxes_xyxy = boxes_xyxy[judged]
    bad = _misfits(boxes_xyxy, _ONE)
    reports = (_report_repeated, _report_order, _report_other_form, _report_misfits)
    any(report(boxes_xyxy, _ONE, bad, own, log, where) for report in reports)


def check_placement(table: ImageTable, where: str, log: FindingLog) -> None:
    """Adds a note where nearly all boxes of a whole split are the whole image, or where all leave the right and the
    lower part of every image empty."""
    counts, total = np.diff(table.offsets), len(table.labels)
    if not total:
        return
    sides = np.repeat(table.sizes_hw[:, ::-1].astype(np.float32), counts, axis=0)  # (n, 2) width, height
    start, end, edge = table.boxes_xyxy[:, :2], table.boxes_xyxy[:, 2:], np.maximum(1, _EDGE * sides)
    whole = ((start <= edge) & (end >= sides - edge)).all(axis=1)
    if whole.sum() >= max(_FEW_WHOLE, _WHOLE * total):
        message = (
            f"{_of(whole)} are the whole image, as where labels of classification were written as boxes: a model can't "
            "learn from them where an object is."
        )
        log.add("whole-image-boxes", "note", where, message, count=int(whole.sum()))
        return
    reach = (end / sides).max(axis=0)  # (2,) of the images' sides
    if (reach > 1 - _EMPTY).any():
        return
    is_near, of_image = start < _NEAR * (1 - reach) * sides, np.repeat(np.arange(len(table)), counts)
    if all(len(np.unique(of_image[near])) >= _MANY_NEAR for near in is_near.T):
        message = (
            f"All {total:,} boxes lie in the left {reach[0]:.0%} and the upper {reach[1]:.0%} of their images: were "
            "they drawn on smaller ones? If so, multiply them by how much larger these are; `ddetr data show` shows "
            "some."
        )
        log.add("boxes-in-one-corner", "note", where, message, count=total)


def num_misfits(numbers: np.ndarray, form: BoxForm) -> int:
    """How many of (n, 4) boxes as written, in fractions, don't fit into their images."""
    return int(_misfits(corners_of(numbers, form), _ONE).sum())


# Each of these says whether it has found what is the matter; bad: (n,) bool, the boxes that don't fit into their image.


def _report_repeated(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether one of a box's numbers is written for another in most boxes, as a broken exporter does. Sides that are
    equal are those of a square."""
    some = numbers_of(boxes_xyxy[:: 1 + len(boxes_xyxy) // _SAMPLED], own)
    for first, second in ((0, 2), (1, 3), (0, 3), (1, 2)):
        if _are_same(some, first, second).mean() < _MOSTLY / 2:
            continue
        numbers = numbers_of(boxes_xyxy, own)
        same = _are_same(numbers, first, second)
        if same.sum() > _MOSTLY * len(same) and len(np.unique(numbers[same, first])) >= _FEW_OF_ANY:
            names = _NUMBERS[base(own)]
            message = (
                f"{names[second]} is the same number as {names[first]} in {_of(same)}: a program wrote one for the "
                "other, it seems, and the boxes are wrong. Export them anew; if they are right as they are, read them "
                f"by --data.boxes {own}."
            )
            log.add("repeated-number", "refused", where, message, count=int(same.sum()))
            return True
    return False


def _are_same(numbers: np.ndarray, first: int, second: int) -> np.ndarray:
    """(n,) bool: of which boxes two numbers are the same."""
    with np.errstate(over="ignore"):
        return np.abs(numbers[:, first] - numbers[:, second]) <= _SAME * np.abs(numbers[:, first])


def _report_fractions(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether most boxes lie in 0..1, or many do and many others are in pixels."""
    small = (boxes_xyxy >= -0.05).all(axis=1) & (boxes_xyxy <= 2.1).all(axis=1)
    if not small.any():
        return False
    numbers = numbers_of(boxes_xyxy[small], own)
    small[small] = ((numbers >= -0.05) & (numbers <= 1.05)).all(axis=1)
    count, num_large = int(small.sum()), int((boxes_xyxy > 3).any(axis=1).sum())
    if _are_many(min(count, num_large), len(small)):
        message = (
            f"{_of(small)} lie in 0 to 1, as fractions of the image do, and {num_large:,} are in pixels: the units "
            f"look mixed. Write all in one; if they are right as they are, read them by --data.boxes {own}."
        )
        log.add("boxes-in-mixed-units", "refused", where, message, count=count)
        return True
    if count > _MOSTLY * len(small):
        numbers = numbers_of(boxes_xyxy[small], own)
        fitting, _ = _best_forms(numbers, _ONE, _from(own))
        message = (
            f"{_of(small)} lie in 0 to 1 where pixels are expected: they look like fractions of the image, "
            f"{_said(fitting)}. {_cure([form + RELATIVE for form in fitting], own)}"
        )
        log.add("boxes-look-relative", "refused", where, message, count=count)
        return True
    if count:
        message = f"{_of(small)} lie within the first pixel of their images: fractions among pixels?"
        log.add("box-in-first-pixel", "note", where, message, count=count)
    return False


def _report_other_form(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether boxes, of which those of `bad` don't fit into their images, do in another form."""
    count = int(bad.sum())
    forms = [form for form in _from(own)[1:] if count >= _fewest(own, form, len(bad))]
    if not forms:
        return False
    fitting, misfits = _best_forms(numbers_of(boxes_xyxy, own), sizes_hw, forms)
    if misfits * _CLEARER > count:
        return False
    message = f"{_of(bad)} don't fit into their images as {_said([own])}, but do as {_said(fitting)}. "
    log.add(f"boxes-look-like-{base(fitting[0])}", "refused", where, message + _cure(fitting, own), count=count)
    return True


def _report_order(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether boxes, most of which don't fit into their images by any form, do if their numbers stand in another
    order."""
    count = int(_have_sides(boxes_xyxy[bad]).sum())
    if not _are_many(count, len(bad)):
        return False
    numbers = numbers_of(boxes_xyxy, own)
    misfits = {
        (form, order): int(_misfits(corners_of(numbers[:, places], form), sizes_hw).sum())
        for form in _from(own)
        for order, places in _ORDERS[base(form)].items()
    }
    (form, order), fewest = min(misfits.items(), key=lambda item: item[1])
    forms, by_a_form = _best_forms(numbers, sizes_hw, _from(own))
    if fewest * _CLEARER > count or by_a_form < fewest or (by_a_form == fewest and len(bad) < _TELLING):
        return False
    message = (
        f"{count:,} of {len(bad):,} boxes don't fit into their images as {_said([own])}, but do if the numbers of each "
        f"stand in the order {order}. If so, write them in the other order; if they are right as they are, read them "
        f"by --data.boxes {own}."
    )
    if by_a_form == fewest:
        message += f" They fit as {_said(forms)} too (--data.boxes {' or '.join(forms)}): look at some of them."
    log.add("boxes-in-another-order", "refused", where, message, count=count)
    return True


def _report_misfits(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether many boxes don't fit into their images, in whatever form."""
    bad = bad.copy()
    bad[bad] = _have_sides(boxes_xyxy[bad])
    count = int(bad.sum())
    if count < max(_FEW_OF_ANY, _SHARE_OF_ANY * len(bad)):
        return False
    forms, misfits = _best_forms(numbers_of(boxes_xyxy, own)[:, [1, 0, 3, 2]], sizes_hw, _from(own))
    if misfits * _CLEARER <= count:
        message = (
            f"{_of(bad)} don't fit into their images, but do as {_said(forms)} if x and y are exchanged. If so, "
            f"exchange them in the file; if they are right as they are, read them by --data.boxes {own}."
        )
        log.add("boxes-look-exchanged", "refused", where, message, count=count)
    else:
        message = (
            f"{_of(bad)} don't fit into their images by any form: are they "
            f"{'fractions' if is_relative(own) else 'in pixels'} of these images, as {_said([own])}? Look at some "
            "before training."
        )
        log.add("boxes-reach-out", "note", where, message, count=count)
    return True


def _report_scale(
    boxes_xyxy: np.ndarray, sizes_hw: np.ndarray, bad: np.ndarray, own: BoxForm, log: FindingLog, where: str
) -> bool:
    """Whether all boxes lie in a scale that no form has: many don't fit into smaller images then, or it is no chance
    that they leave the rest of larger images empty."""
    count = int(_have_sides(boxes_xyxy[bad]).sum())
    many = count >= max(_FEW_OF_ANY, _SHARE_OF_ANY * len(bad))
    for scale, unit in _SCALES.items():
        if boxes_xyxy[:, :2].max() > 1.02 * scale:
            continue
        few_pixels = _in_few_pixels(sizes_hw, scale)
        if not (few_pixels or many):
            continue
        numbers = numbers_of(boxes_xyxy, own)
        forms = _forms_in_scale(numbers, scale, own)
        if forms and (few_pixels or not _fit_in_pixels(numbers, sizes_hw, count, own)):
            message = (
                f"All {len(bad):,} boxes lie in 0 to {scale}, whatever the size of their images: they look like {unit} "
                f"of it, {_said(forms)}. If so, divide them by {scale} and read them by --data.boxes "
                f"{' or '.join(form + RELATIVE for form in forms)}; if they are right as they are, by --data.boxes "
                f"{own}."
            )
            log.add("boxes-look-scaled", "refused" if many else "note", where, message, count=len(bad))
            return True
    return False


def _have_sides(boxes_xyxy: np.ndarray) -> np.ndarray:
    """(n,) bool: not those that rounding has left without a side, which are said box by box."""
    return (boxes_xyxy[:, 2:] != boxes_xyxy[:, :2]).all(axis=1)


def _are_many(count: int, total: int) -> bool:
    return count >= max(_FEW_OF_ANY, _SHARE_OF_ANY * total) or 0 < _MOSTLY * total <= count


def _forms_in_scale(numbers: np.ndarray, scale: int, own: BoxForm) -> list[str]:
    """The forms by which all boxes lie in 0..scale and some come near its end in both directions."""
    if numbers.max() > 1.02 * scale or numbers.max() < _REACH * scale / 2:
        return []
    forms, misfits = _best_forms(numbers / scale, _ONE, _from(own))
    reach = corners_of(numbers, forms[0])[:, 2:].max(axis=0)
    return forms if misfits == 0 and (reach >= _REACH * scale).all() else []


def _fit_in_pixels(numbers: np.ndarray, sizes_hw: np.ndarray, count: int, own: BoxForm) -> bool:
    """Whether clearly fewer than `count` boxes don't fit into their images by some form."""
    return _best_forms(numbers, sizes_hw, _from(own))[1] * _CLEARER <= count


def _in_few_pixels(sizes_hw: np.ndarray, scale: int) -> bool:
    """Whether it is no chance that the boxes of images of (n, 2) sizes all lie within the first `scale` pixels."""
    if len(sizes_hw) < _FEW_OF_ANY or sizes_hw.min() < scale:
        return False
    return bool(np.log2(sizes_hw / scale).sum() >= _CHANCE_BITS)


def _best_forms(numbers: np.ndarray, sizes_hw: np.ndarray, forms: Sequence[str]) -> tuple[list[str], int]:
    """Of the forms those by which fewest boxes don't fit into their images, and how many those are."""
    misfits = {form: int(_misfits(corners_of(numbers, form), sizes_hw).sum()) for form in forms}
    fewest = min(misfits.values())
    return [form for form, count in misfits.items() if count == fewest], fewest


def _misfits(boxes_xyxy: np.ndarray, sizes_hw: np.ndarray) -> np.ndarray:
    """(n,) bool: boxes without a size, or with more than rounding outside of their image."""
    limits = sizes_hw[:, ::-1].astype(np.float64)
    room = np.where(limits > 1, np.maximum(1.5, 0.02 * limits), 0.02)  # of fractions the image's side is 1
    start, end = boxes_xyxy[:, :2], boxes_xyxy[:, 2:]
    return ((end <= start) | (start < -room) | (end > limits + room)).any(axis=1)


def _of(mask: np.ndarray) -> str:
    return f"{int(mask.sum()):,} of {len(mask):,} boxes"


def _from(own: BoxForm) -> list[str]:
    """All forms of its unit, the format's own first."""
    unit = RELATIVE if is_relative(own) else ""
    return list(dict.fromkeys([own, *(form + unit for form in _MEANING)]))


def _fewest(own: str, form: str, total: int) -> float:
    """Of `total` boxes so many don't fit at least, read as `own`, where they are of another form."""
    if base(form) == "cxcywh" or (base(own), base(form)) == ("cxcywh", "xywh"):
        return max(_FEW_OF_CENTRES, _SHARE_OF_CENTRES * total)
    return max(_FEW, _SHARE * total)


def _said(forms: Sequence[str]) -> str:
    return " or ".join(_MEANING[base(form)] for form in forms)


def _cure(forms: Sequence[str], own: str) -> str:
    wanted = " or ".join(forms)
    return f"If so, read them by --data.boxes {wanted}; if they are right as they are, by --data.boxes {own}."

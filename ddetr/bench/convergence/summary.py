"""When a side reaches an AP, and what its seeds have in common."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from ddetr.bench.convergence.points import START, Curve

LEVELS = (0.3, 0.5, 0.7)
SHARE_OF_BEST = 0.9
COUNTS = ("epoch", "images", "seconds")


def reached(curve: Curve, ap: float) -> dict[str, float] | None:
    """Epochs, images and seconds until the AP is `ap`, on the line between two validations; None where it never is."""
    before = START
    for point in curve.points:
        if point.AP >= ap > before.AP:
            part = (ap - before.AP) / (point.AP - before.AP)
            return {
                name: getattr(before, name) + part * (getattr(point, name) - getattr(before, name)) for name in COUNTS
            }
        before = point
    return None


def spread(values: Sequence[float]) -> dict[str, float | None]:
    """Mean and sample standard deviation, None for one value."""
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "deviation": deviation}


def summary(curves: Iterable[Curve]) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """A row for each side, over its seeds; and the APs, by name, that are looked for."""
    sides: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve.points:
            sides.setdefault(curve.side, []).append(curve)
    best = max((statistics.fmean(curve.last.AP for curve in seeds) for seeds in sides.values()), default=0.0)
    levels = {f"AP {level:g}": level for level in LEVELS} | {
        f"{SHARE_OF_BEST:.0%} of the best AP": SHARE_OF_BEST * best
    }
    rows = []
    for side, seeds in sides.items():
        row: dict[str, Any] = {
            "side": side,
            "seeds": [curve.seed for curve in seeds],
            "unfinished": [curve.seed for curve in seeds if not curve.is_finished],
            "epochs": seeds[0].epochs,
            "epochs done": min(curve.last.epoch for curve in seeds),
            "parameters": seeds[0].parameters,
            "AP": spread([curve.last.AP for curve in seeds]),
            "AP50": spread([curve.last.AP50 for curve in seeds]),
            "best AP": spread([max(point.AP for point in curve.points) for curve in seeds]),
            "seconds": spread([curve.last.seconds for curve in seeds]),
            "seconds a step": spread([curve.last.seconds / max(curve.last.step, 1) for curve in seeds]),
            "reached": {},
        }
        for name, level in levels.items():
            found = [place for curve in seeds if (place := reached(curve, level)) is not None]
            row["reached"][name] = {
                "seeds": len(found),
                **({count: spread([place[count] for place in found]) for count in COUNTS} if found else {}),
            }
        rows.append(row)
    return rows, levels

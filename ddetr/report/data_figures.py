"""The numbers of a data set as charts and rows: sizes and shapes of objects and images, objects per image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ddetr.report.charts import Bars, histogram, shown
from ddetr.report.data_pool import Pool
from ddetr.report.tables import SIZES

MOST_BINS = 30
MOST_SIZES = 6  # of images, by how often they occur
Named = Sequence[tuple[str, Pool]]  # (training or validation, its images)


def charts(pools: Named) -> list[Markup]:
    """Those that have something to show."""
    sides = [(role, pool.trained_sides[~pool.objects.ignore]) for role, pool in pools]
    shapes = [(role, _shapes(pool)) for role, pool in pools]
    per_image = [(role, pool.per_image) for role, pool in pools]
    short = [(role, pool.sizes_hw.min(axis=1)) for role, pool in pools]
    images = [(role, pool.sizes_hw[:, 1] / np.maximum(pool.sizes_hw[:, 0], 1)) for role, pool in pools]
    found = [
        _chart("Side of the objects as trained", "root of the area in pixels", sides, _doubling(sides)),
        _chart("Shape of the objects", "width / height", shapes, _doubling(shapes)),
        _chart("Objects per image", "objects", per_image, _whole(per_image), log=False),
        _chart("Short side of the images", "pixels", short, _whole(short), log=False),
        _chart("Shape of the images", "width / height", images, _doubling(images)),
    ]
    return [one for one in found if one is not None]


def size_rows(pools: Named) -> list[dict[str, Any]]:
    """Objects of COCO's sizes: a row per split, in the image's own pixels and at the size of training."""
    rows = []
    for role, pool in pools:
        counted = ~pool.objects.ignore
        for what, area in (
            ("in the images' pixels", pool.objects.area[counted].astype(np.float64)),
            ("as trained", pool.trained_sides[counted].astype(np.float64) ** 2),
        ):
            counts = [int(((area >= low) & (area < high)).sum()) for _, low, high in SIZES]
            total = max(1, sum(counts))
            rows.append({"role": role, "what": what, "counts": [(count, count / total) for count in counts]})
    return rows


def image_sizes(pools: Named) -> list[dict[str, Any]]:
    """The most frequent sizes of images, and how many each split has."""
    columns = [np.unique(pool.sizes_hw, axis=0, return_counts=True) for _, pool in pools]
    counts: dict[tuple[int, int], list[int]] = {}
    for place, (sizes, numbers) in enumerate(columns):
        for (height, width), number in zip(sizes.tolist(), numbers.tolist()):
            counts.setdefault((height, width), [0] * len(columns))[place] = number
    most = sorted(counts.items(), key=lambda item: (-sum(item[1]), item[0]))
    rows = [{"name": f"{width} x {height}", "counts": numbers} for (height, width), numbers in most[:MOST_SIZES]]
    if len(most) > MOST_SIZES:
        rest = np.sum([numbers for _, numbers in most[MOST_SIZES:]], axis=0).tolist()
        rows.append({"name": f"{len(most) - MOST_SIZES:,} other sizes", "counts": rest})
    return rows


def by_class(pools: Named, num_classes: int) -> dict[str, list[str]]:
    """Columns for a table of the classes, of the first of the pools: images with each, the median of its sides as
    trained."""
    _, pool = pools[0]
    counted = ~pool.objects.ignore
    labels, sides = pool.objects.labels[counted], pool.trained_sides[counted]
    pairs = np.unique(np.stack([labels, pool.objects.image[counted]]), axis=1)
    images = np.bincount(pairs[0], minlength=num_classes)
    counts = np.bincount(labels, minlength=num_classes)
    in_order = sides[np.lexsort((sides, labels))]
    ends = np.cumsum(counts)
    medians = [shown(float(in_order[end - (count + 1) // 2])) if count else "-" for end, count in zip(ends, counts)]
    return {"images": [f"{number:,}" for number in images.tolist()], "median side as trained": medians}


def _shapes(pool: Pool) -> np.ndarray:
    boxes = pool.objects.boxes_xyxy[~pool.objects.ignore]
    return (boxes[:, 2] - boxes[:, 0]) / np.maximum(boxes[:, 3] - boxes[:, 1], 1e-6)


def _chart(
    title: str, x_label: str, rows: Sequence[tuple[str, np.ndarray]], edges: np.ndarray, log: bool = True
) -> Markup | None:
    bars, medians = [], []
    for color, (role, values) in enumerate(rows):
        if len(values):
            counts, _ = np.histogram(np.clip(values, edges[0], edges[-1]), edges)
            bars.append(Bars(role, counts / len(values), color))
            medians.append(f"{role} {shown(float(np.median(values)))}")
    if len({float(value) for _, values in rows if len(values) for value in (values.min(), values.max())}) == 1:
        return None  # one bar, which says no more than the median and the table
    return histogram(bars, edges, title=title, x_label=x_label, log=log, note=f"median: {', '.join(medians)}")


def _doubling(rows: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Edges at powers of the root of two that hold all values but the last thousandths at either end."""
    values = np.concatenate([np.zeros(0), *(values for _, values in rows)])
    low, high = np.quantile(values, [0.001, 0.999]) if len(values) else (1.0, 2.0)
    first, last = (2 * np.log2(np.maximum([low, high], 1e-3))).tolist()
    first, last = int(np.floor(first)), max(int(np.floor(first)) + 2, int(np.ceil(last + 1e-9)))
    return 2.0 ** (np.arange(first, last + 1) / 2)


def _whole(rows: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """At most MOST_BINS edges, equally far from each other, that hold all values; a bin begins at a whole number."""
    values = np.concatenate([np.zeros(0, np.int64), *(values for _, values in rows)])
    low, high = (int(values.min()), int(values.max())) if len(values) else (0, 1)
    low = 0 if low < high / 2 else low
    step = -(-(high - low + 1) // MOST_BINS)
    return np.arange(low, high + step + 1, step)[: MOST_BINS + 1]

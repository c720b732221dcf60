"""Stage 2: the operator beside every other one that is there: values checked first, then the time of each."""

import torch

from ddetr.bench.gpu import official
from ddetr.bench.gpu.sheet import Place, Sheet
from ddetr.bench.op import BOTH, FORWARD, measure, name_of
from ddetr.bench.sides import SIDES
from ddetr.bench.sizes import SIZES, Size, pyramid
from ddetr.bench.timing import copy_bandwidth, cpu_clock, cuda_clock

_PYRAMID = pyramid(800, 1066)
# In the order of their worth: the targets are those of batch 4.
_SIZES = {f"{kind} batch {batch}": (kind, batch) for batch in (4, 8, 1, 2) for kind in ("encoder", "decoder")}
_COLUMNS = (
    *("size", "dtype", "side", "forward ms", "ratio", "GB/s", "of a copy", "fwd + bwd ms", "ratio", "GB/s", "error"),
)
_SLOW = "embedding_bag"  # tens of thousands of launches for an encoder
_BUILD_SECONDS = 30  # that the official kernel is waited for


def run(sheet: Sheet, place: Place) -> None:
    """The stage."""
    clock = cuda_clock(place.device) if place.on_gpu else cpu_clock(1)
    copy = copy_bandwidth(place.device, clock)
    sheet.data |= {"copy_gb_per_s": copy, "clock": clock.counts, "rows": [], "left_out": []}
    sheet.say(f"a large copy moves {copy:.0f} GB/s, reading and writing; {clock.counts}; ratios are to grid_sample")
    if place.on_gpu:
        official.wait_for(sheet, place, _BUILD_SECONDS)
    dtypes = (torch.bfloat16, torch.float32)
    sizes = {"tiny": SIZES["tiny"]} if place.small else {n: _size(*made) for n, made in _SIZES.items()}
    for name, size in sizes.items():
        for dtype in dtypes:
            kind = name_of(dtype)
            with sheet.part(f"{name}, {kind}", seconds=0 if place.small else 8) as go:
                if go:
                    names = [side for side in SIDES if side != _SLOW or not (place.on_gpu and size.queries == 0)]
                    rounds = 2 if place.small else 10
                    rows, left_out = measure(name, size, place.device, dtype, clock, rounds, names)
                    sheet.data["rows"] += rows
                    sheet.data["left_out"] += left_out
                    sheet.table("The operator", _COLUMNS, [_cells(row, copy) for row in sheet.data["rows"]])
                    _judge(sheet, name, kind, rows)
    if wrong := [row for row in sheet.data["left_out"] if row["side"].startswith("ours")]:
        sheet.check("ours is measured everywhere", False, f"{wrong[0]['size']}: {wrong[0]['reason']}")
    for side, reason in dict.fromkeys((row["side"], row["reason"]) for row in sheet.data["left_out"]):
        sheet.skip(side, reason)


def _size(kind: str, batch: int) -> Size:
    return Size(batch, _PYRAMID, 0 if kind == "encoder" else 300)


def _cells(row: dict, copy: float) -> list[str]:
    cells = [row["size"], row["dtype"], row["side"]]
    for kind in (FORWARD, BOTH):
        ratio = row[kind]["ratio"]
        cells += [f"{row[kind]['ms']:.3f}", "-" if ratio is None else f"{ratio:.1f}x", f"{row[kind]['gb_per_s']:.0f}"]
        if kind == FORWARD:
            cells.append(f"{100 * row[kind]['gb_per_s'] / copy:.0f} %")
    return [*cells, f"{max(row['error'].values()):.0e}"]


def _judge(sheet: Sheet, name: str, dtype: str, rows: list[dict]) -> None:
    """Ours in words, beside the best of the others."""
    ours = next((row for row in rows if row["side"] == "ours"), None)
    others = [row for row in rows if not row["side"].startswith(("ours", "embedding_bag"))]
    if ours is None or not others:
        return
    parts = []
    for kind in (FORWARD, BOTH):
        best = min(others, key=lambda row: row[kind]["ms"])
        times = best[kind]["ms"] / ours[kind]["ms"]
        parts.append(f"{kind} {ours[kind]['ms'] * 1000:.0f} µs, {times:.1f}x as fast as the next ({best['side']})")
    sheet.say(f"{name}, {dtype}: {'; '.join(parts)}")

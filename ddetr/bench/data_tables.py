"""The figures of `ddetr bench data` for people: tables of the terminal, and a markdown file for benchmarks/results/."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.table import Table

from ddetr.bench.record import describe

SIDES = ("ours", "plain Pillow")
STAGES = ("read", "decode", "augment", "all up to tensors", "collate")
DESCRIPTIONS = {
    "ours": "torchvision's JPEG decoder where it agrees with Pillow; flip, crop and resize in one resampling of uint8; "
    "batches of uint8, which the device normalises",
    "plain Pillow": "the paper's recipe step by step: Pillow decodes, flips, resizes, crops and resizes again; "
    "to_tensor, "
    "normalize; batches of float32",
}


def header(report: Mapping[str, Any]) -> list[str]:
    """Machine, command and what was loaded."""
    return [
        describe(report["machine"]),
        report["command"],
        f"{report['num_images']} images of {report['data']}, augmentation {report['augmentation']}, image_size "
        f"{report['image_size']}, steps of {report['batch_size']} images in micro-batches of "
        f"{report['device_batch_size']}",
    ]


def of_sides(report: Mapping[str, Any]) -> list[Any]:
    """One core: images per second of each side, the ratio, and where the time goes."""
    table = _table("", "images/s", "ratio", "ms per image")
    for row in report["rows"]:
        table.add_row(*_side_cells(row)[:-1])
    where = [f"  {row['side']}: {_side_cells(row)[-1]}" for row in report["rows"]]
    return [f"\none core: CPU time, median of {report['rounds']} interleaved rounds", table, *where]


def of_padding(report: Mapping[str, Any]) -> list[Any]:
    """Padding with and without buckets, with and without fixed shapes."""
    table = _table("--data.buckets", "--data.padded_shapes", "padded share", "shapes")
    for row in report["padding"]:
        table.add_row(*_padding_cells(row))
    return ["\npadding in what the network sees", table]


def of_loaders(report: Mapping[str, Any]) -> list[Any]:
    """Images per second by number of loader processes."""
    table = _table("processes", "images/s")
    for row in report["loaders"]:
        table.add_row(str(row["num_workers"]), f"{row['images_per_second']:.0f}")
    return ["\nthe whole loader: wall time, as the training process receives it", table]


def footer(report: Mapping[str, Any]) -> list[str]:
    """How the sides compare in what they give, and who was left out."""
    return [*correctness(report), *(f"left out: {row['side']}: {row['reason']}" for row in report["left_out"])]


def correctness(report: Mapping[str, Any]) -> Iterator[str]:
    if not report["left_out"]:
        checked = report["checked"]
        yield (
            f"both sides gave the same labels and sizes, boxes within {checked['boxes']:.0e} of the image's side, and "
            f"pixels that differ by {checked['pixels']:.1f} of 255 levels in the mean (resampled once, and twice)"
        )


def markdown(report: Mapping[str, Any]) -> str:
    """A file for benchmarks/results/."""
    machine, command, what = header(report)
    lines = [
        f"# The data loader, {report['machine']['date']}",
        "",
        f"- Machine: {machine}.",
        f"- Command: `{command}`.",
        f"- {what}.",
        *(f"- {line[0].upper()}{line[1:]}." for line in correctness(report)),
        "",
        f"## One core: CPU time, median of {report['rounds']} interleaved rounds",
        "",
        "| side | images/s | ratio | ms per image | of which |",
        "|---|---|---|---|---|",
        *(f"| {' | '.join(_side_cells(row))} |" for row in report["rows"]),
        "",
        "## The whole loader, wall time, as the training process receives it",
        "",
        "| processes | images/s |",
        "|---|---|",
        *(f"| {row['num_workers']} | {row['images_per_second']:.0f} |" for row in report["loaders"]),
        "",
        "## Padding in what the network sees",
        "",
        "| --data.buckets | --data.padded_shapes | padded share | shapes |",
        "|---|---|---|---|",
        *(f"| {' | '.join(_padding_cells(row))} |" for row in report["padding"]),
    ]
    if report["left_out"]:
        lines += ["", "Left out:", "", *(f"- {row['side']}: {row['reason']}" for row in report["left_out"])]
    lines += ["", "Sides:", "", *(f"- {row['side']}: {report['sides'][row['side']]}" for row in report["rows"])]
    return "\n".join(lines) + "\n"


def _table(*headings: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        table.add_column(heading, justify="right" if heading else "left")
    return table


def _side_cells(row: Mapping[str, Any]) -> list[str]:
    ratio = "-" if row["ratio"] is None else f"{row['ratio']:.1f}x"
    stages = ", ".join(f"{stage} {ms:.2f}" for stage, ms in row["stages_ms"].items())
    return [row["side"], f"{row['images_per_second']:.0f}", ratio, f"{row['ms']:.2f}", stages]


def _padding_cells(row: Mapping[str, Any]) -> list[str]:
    shapes = f"{row['num_shapes']} in {row['num_batches']} batches"
    count = "null" if row["padded_shapes"] is None else str(row["padded_shapes"])
    return ["on" if row["buckets"] else "off", count, f"{row['padded_share']:.1%}", shapes]

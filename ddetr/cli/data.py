"""The commands `ddetr data ...`."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ddetr import console
from ddetr.cli.parser import Parser
from ddetr.errors import InputError
from ddetr.files import existing


def audit_command(parser: Parser) -> Callable[[Any], None]:
    """List what is wrong with a data set, before training finds out."""
    from ddetr.datasets.config import TrainingSource

    parser.usage = "ddetr data audit [options] PATH"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_class_arguments(TrainingSource, skip={"path"}, instantiate=False)
    parser.add_argument("--num_queries", type=int, default=300, help="queries of the model to be trained")
    parser.add_argument("--max_detections", type=int, default=100, help="detections per image that evaluation counts")
    parser.add_argument(
        "--decode",
        type=bool | Literal["auto"],
        default="auto",
        help="decode images, to find damaged ones: auto up to 4,000 of a split, for a minute; true all; false none",
    )
    parser.add_argument("--output", type=str | None, default=None, help="JSON file for all findings")

    def run(settings: Any) -> None:
        from ddetr.datasets import audit
        from ddetr.datasets.audit_report import things
        from ddetr.datasets.image_files import reading_on_screen
        from ddetr.datasets.splits import load_splits
        from ddetr.files import make_folder, write_text

        options = dict(vars(settings))
        extra = {name: options.pop(name) for name in ("num_queries", "max_detections", "decode")}
        output, data = options.pop("output"), TrainingSource(**options)
        with reading_on_screen(data.path):
            train, val = load_splits(data)
        with console.reading(f"decoding images of {data.path}", "images") as update:
            report = audit(train, val, **extra, strict=data.strict, progress=update)
        console.show(report.render())
        if output:
            file = Path(output)
            write_text(make_folder(file.parent, "--output") / file.name, json.dumps(report.to_dict(), indent=1) + "\n")
        if report.refused:
            raise InputError(f"{things(report.refused)} must be repaired before training, see the table above")

    return run


def show_command(parser: Parser) -> Callable[[Any], None]:
    """Look at a data set before training: one HTML file, augmentation included."""
    from dataclasses import fields

    from ddetr.datasets.config import SEEN_NOWHERE, DataConfig, PageConfig

    parser.usage = "ddetr data show [options] PATH"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_class_arguments(DataConfig, skip={"path", *SEEN_NOWHERE}, instantiate=False)
    parser.add_class_arguments(PageConfig, instantiate=False)
    parser.add_argument("--output", type=str, default="data.html", metavar="FILE", help="the page")

    def run(settings: Any) -> None:
        given = dict(vars(settings))
        output = given.pop("output")
        page = PageConfig(**{field.name: given.pop(field.name) for field in fields(PageConfig)})
        data = DataConfig(**given)
        place, root = Path(output).expanduser(), existing(data.path)
        root = root if root.is_dir() else root.parent
        if output == parser.get_default("output") and Path.cwd().resolve().is_relative_to(root.resolve()):
            raise InputError(f"{output} would lie among the data, in {root.resolve()}: say where to by --output FILE")
        from ddetr.datasets.image_files import reading_on_screen
        from ddetr.datasets.splits import load_splits
        from ddetr.files import make_folder
        from ddetr.report.data_page import check_place, write_data_page

        check_place(place)
        with reading_on_screen(data.path):
            train, val = load_splits(data)
        place = make_folder(place.parent, "--output") / place.name
        with console.progress("draw") as update:
            failures = write_data_page(place, train, val, data, page, update)
        console.show(f"page         {place.absolute()}")
        for name, reason in failures:
            console.show(f"not read     {name}: {reason}")

    return run


def convert_command(parser: Parser) -> Callable[[Any], None]:
    """Write a data set anew as COCO, YOLO or Pascal VOC."""
    from ddetr.datasets.config import TrainingSource

    parser.usage = "ddetr data convert [options] PATH OUT --to FORMAT"
    parser.add_argument("path", type=str, help="folder of the data set, in any format that is read")
    parser.add_argument("output", type=str, help="new or empty folder", metavar="OUT")
    parser.add_argument("--to", type=Literal["coco", "yolo", "voc"], required=True, help="format to write")
    parser.add_argument("--split", type=str | None, default=None, help="the one split to convert; by default all")
    parser.add_argument(
        "--images",
        type=Literal["copy", "link"],
        default="copy",
        help="link: hard links where the disk is the same; they take no space, but editing one edits the original too",
    )
    parser.add_class_arguments(TrainingSource, skip={"path"}, instantiate=False)

    def run(settings: Any) -> None:
        from ddetr.datasets import audit
        from ddetr.datasets.audit_report import render_findings, things
        from ddetr.datasets.convert.conversion import convert
        from ddetr.datasets.convert.source import read_source
        from ddetr.datasets.image_files import reading_on_screen

        options = dict(vars(settings))
        to, output, split, images = (options.pop(name) for name in ("to", "output", "split", "images"))
        data = TrainingSource(**options)
        with reading_on_screen(data.path):
            source = read_source(data, split)
        report = audit(source.first, source.splits.get(source.val or ""), strict=data.strict)
        others = [f for name in source.others for f in source.splits[name].findings]
        console.show(report.render())
        if others:
            console.show(render_findings(others))
        actions = ("refused", "repaired", "dropped") if data.strict else ("refused",)
        if refused := [*report.refused, *(finding for finding in others if finding.action in actions)]:
            raise InputError(f"{things(refused)} must be repaired first, see the table above; nothing was written")
        with console.progress("write") as update:
            done = convert(source, output, to, images=images, progress=update)
        for name, count in done.num_images.items():
            console.show(f"{name:<12} {count:,} images")
        console.show(f"{'in all':<12} {done.num_objects:,} objects in {done.path}")
        for note in done.notes:
            console.show(f"changed      {note}")

    return run

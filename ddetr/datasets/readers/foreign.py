"""What a folder is that no reader knows: its kind by cheap looks (names, first kilobytes), and what to do about it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_formats import is_clutter, is_image_name
from ddetr.datasets.readers.json_files import json_text
from ddetr.datasets.readers.side_by_side import PARTS
from ddetr.errors import InputError
from ddetr.printable import one_line
from ddetr.untrusted import MAX_LABEL_BYTES, open_file, parse_json, read_csv
from ddetr.wording import first_few

_DEPTH = 6  # folders below the one that was given
_FILES = 20_000  # that are looked at; what it is shows long before
_NEAR = 50  # folders inside that are tried
_STARTS = 200  # files whose first bytes are read
_READ = (".json", ".jsonl", ".ndjson", ".csv", ".txt", ".xml")  # those of these kinds
_ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".7z", ".rar")
_VIDEOS = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg")
_BY_DATUMARO = "`datum convert -i PATH -f coco -o NEW -- --save-media` (of Datumaro) makes COCO of it"
_BY_FIFTYONE = (
    "`fiftyone convert --input-dir PATH --input-type fiftyone.types.{} --output-dir NEW --output-type "
    "fiftyone.types.COCODetectionDataset` makes COCO of it"
)
_BY_HAND = "write its boxes into a CSV table (filename,class,xmin,ymin,xmax,ymax), which is read"
_DRAW = (
    "draw a box around each object in a labelling tool (CVAT, Label Studio, Roboflow), and export COCO, Pascal VOC or "
    "YOLO"
)
_PAPERS = (".md", ".rst", ".pdf", ".html", ".cff", ".bib", ".py", ".ipynb", ".sh")  # that lie beside any data
_PAPER_NAMES = ("readme", "license", "licence", "copying", "notice", "citation", "requirements")


class _Look:
    """The names of the files below a folder, or of one file, and the first bytes of some."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files: list[Path] = [path] if path.is_file() else []  # hidden ones left out
        self.folders: list[Path] = []
        self.deeper = False  # whether there are folders that were not looked into
        for folder, inner, files in os.walk(path):
            inner[:] = sorted(name for name in inner if not is_clutter(name))
            self.folders += [Path(folder, name) for name in inner]
            self.files += [Path(folder, name) for name in sorted(files) if not is_clutter(name)]
            if inner and len(Path(folder).relative_to(path).parts) >= _DEPTH:
                self.deeper = True
                inner[:] = []
            if len(self.files) > _FILES:
                break

    def any_file(self, *ends: str) -> Path | None:
        """The first file whose name ends so."""
        return next((file for file in self.files if file.name.lower().endswith(ends)), None)

    def any_name(self, *names: str) -> Path | None:
        """The first file or folder of one of these names."""
        return next((place for place in [*self.folders, *self.files] if place.name.lower() in names), None)

    @cached_property
    def starts(self) -> dict[Path, bytes]:
        """First bytes of the files of text."""
        found = {}
        for file in [f for f in self.files if f.suffix.lower() in _READ][:_STARTS]:
            try:
                with open_file(file) as stream:
                    found[file] = stream.read(1 << 14)
            except OSError:
                continue
        return found

    def any_start(self, suffix: str, *words: bytes) -> Path | None:
        """The first file with this suffix, or of any for "", in whose first bytes all of these stand."""
        fits = (
            f for f, start in self.starts.items() if suffix in ("", f.suffix.lower()) and all(w in start for w in words)
        )
        return next(fits, None)


def _lines_of(look: _Look, is_line: Callable[[list[str]], bool], separator: str | None = None) -> Path | None:
    """The first text file whose first lines are all such; `is_line` gets their words."""

    def words_of(line: str) -> list[str]:
        return [word.strip() for word in line.split(separator) if word.strip()]

    for file, start in look.starts.items():
        lines = [line for line in start.decode("utf-8", "replace").splitlines()[:5] if line.strip()]
        if file.suffix.lower() == ".txt" and lines and all(is_line(words_of(line)) for line in lines):
            return file
    return None


def _numbers(words: list[str]) -> int:
    """How many of the first words are numbers."""
    return next((i for i, word in enumerate(words) if not word.lstrip("-").replace(".", "", 1).isdigit()), len(words))


def _is_dota(words: list[str]) -> bool:
    is_head = "".join(words).startswith(("imagesource", "gsd"))
    return is_head or (_numbers(words) == 8 and len(words) in (9, 10))  # x1 y1 ... x4 y4 class difficult


def _lfs_pointer(look: _Look) -> Path | None:
    return next((f for f, start in look.starts.items() if start.startswith(b"version https://git-lfs")), None)


def _records(look: _Look) -> Path | None:
    return look.any_file(".record") or next((file for file in look.files if ".tfrecord" in file.name.lower()), None)


def _supervisely(look: _Look) -> Path | None:
    meta = look.any_name("meta.json") if look.any_name("ann") else None
    return look.any_start(".json", b'"geometryType"') or meta


def _wider_face(look: _Look) -> Path | None:
    return next((f for f in look.files if f.name.startswith("wider_face_") and f.suffix == ".txt"), None)


def _mot(look: _Look) -> Path | None:
    return next((file for file in look.files if file.name == "gt.txt" and file.parent.name == "gt"), None)


def _coco_objects(look: _Look) -> Path | None:
    """A JSON file that begins with a list whose entries speak of images by their ids."""
    words = (b'"image_id"', b'"category_id"', b'"bbox"')
    fits = (f for f, start in look.starts.items() if start.lstrip().startswith(b"[") and all(w in start for w in words))
    return next((file for file in fits if file.suffix.lower() == ".json"), None)


def _for_each_image(look: _Look) -> Path | None:
    """A JSON file that is called as an image is."""
    images = {file.stem for file in look.files if is_image_name(file.name)}
    return next((file for file in look.starts if file.suffix.lower() == ".json" and file.stem in images), None)


def _keys(file: Path) -> str:
    """The first keys of a JSON file, and what to do about data that have such."""
    try:
        content = parse_json(json_text(file, MAX_LABEL_BYTES, FindingLog(), file.name), file.name)
    except InputError:
        content = None
    keys = f"it has {first_few(map(one_line, content), 8)}; " if isinstance(content, dict) and content else ""
    return f"{keys}{_BY_HAND}"


def _of_another_task(look: _Look) -> Path | None:
    names = ("captions_", "panoptic_", "stuff_", "image_info_")
    return next((f for f in look.starts if f.suffix.lower() == ".json" and f.name.lower().startswith(names)), None)


def _are_fractions(words: list[str]) -> bool:
    return all(word.replace(".", "", 1).isdigit() and 0 <= float(word) <= 1 for word in words)


def _is_yolo(words: list[str]) -> bool:
    return len(words) == 5 and words[0].isdigit() and _are_fractions(words[1:])


def _is_jde(words: list[str]) -> bool:
    """`0 12 0.5 0.5 0.2 0.3`, where 12 or -1 is whom a box belongs to in each image of a video."""
    return len(words) == 6 and words[0].isdigit() and words[1].lstrip("-").isdigit() and _are_fractions(words[2:])


def _is_oid(words: list[str]) -> bool:
    """`Soda can 178.56 749.44 238.08 812.16`."""
    return len(words) > 4 and _numbers(words) == 0 and _numbers(words[-4:]) == 4


def _is_corners(words: list[str]) -> bool:
    """`10 20 50 80 3` or `car 10 20 50 80`: pixels, with the second corner right of and below the first."""
    words = " ".join(words).replace(",", " ").split()
    for four in (words[:4], words[1:]):
        if len(words) == 5 and _numbers(four) == 4:
            left, top, right, bottom = map(float, four)
            return left < right and top < bottom and max(right, bottom) > 1
    return False


def _is_keras_yolo(words: list[str]) -> bool:
    """`images/a.jpg 5,6,25,16,0 50,60,90,100,1`."""
    rest = [word.split(",") for word in words[1:]]
    return is_image_name(words[0]) and bool(rest) and all(_numbers(cells) == 5 == len(cells) for cells in rest)


def _boxes_in_one_column(look: _Look) -> Path | None:
    """A table whose first row holds a list of numbers, or of boxes, in one of its cells."""
    tables = (f for f in look.starts if f.suffix.lower() == ".csv")
    return next((f for f in tables if any(b'"[' in line for line in look.starts[f].splitlines()[1:3])), None)


def _is_tracked(words: list[str]) -> bool:
    """`0 2 Car 0 0 -1.79 296.7 161.7 455.2 292.3 2.0 1.8 4.4 -4.5 1.8 13.4 -2.1`."""
    return len(words) in (17, 18) and _numbers(words) == 2 and _numbers(words[3:]) >= 14


def _named_columns(table: Path) -> str:
    try:
        found = next(read_csv(table, MAX_LABEL_BYTES, errors="replace"), [])
    except (OSError, ValueError):
        found = []
    listed = f"; it has {first_few([one_line(cell, 40) for cell in found], 10)}" if found else ""
    return (
        "name its columns filename, class, xmin, ymin, xmax and ymax, in pixels, or bbox_width and bbox_height where "
        f"it has sizes instead of second corners{listed}"
    )


def _labelbox(look: _Look) -> Path | None:
    return look.any_start(".ndjson", b'"data_row"') or look.any_start(".json", b'"data_row"')


@dataclass(frozen=True)
class _Kind:
    """Data of a kind that is not read: what it is called, where it is seen, what is to be done."""

    title: str
    seen: Callable[[_Look], Path | None]
    cure: str | Callable[[Path], str]


_KINDS = (
    _Kind("a pointer of Git LFS instead of a file", _lfs_pointer, "`git lfs pull` fetches the file itself"),
    _Kind("TensorFlow records", _records, _BY_FIFTYONE.format("TFObjectDetectionDataset")),
    _Kind(
        "Parquet or Arrow tables of Hugging Face `datasets`",
        lambda look: look.any_file(".parquet", ".arrow"),
        "load them by `datasets.load_dataset`, and save the images beside a metadata.jsonl (file_name, objects), which "
        "is read",
    ),
    _Kind(
        "a project of VGG's Image Annotator 3 (VIA)",
        lambda look: look.any_start(".json", b'"vid_list"', b'"aname"'),
        f"draw still images in VIA 2, whose projects are read, or {_BY_HAND}",
    ),
    _Kind(
        "a CSV export of Label Studio",
        lambda look: look.any_start(".csv", b"annotation_id", b"lead_time"),
        "export it as JSON, which is read, with its images",
    ),
    _Kind("a Supervisely project", _supervisely, "export it from Supervisely as COCO, Pascal VOC or YOLO"),
    _Kind("a VoTT project", lambda look: look.any_file(".vott") or look.any_start(".json", b'"asset"'), _BY_DATUMARO),
    _Kind("Datumaro's JSON", lambda look: look.any_start(".json", b'"items"', b'"categories"'), _BY_DATUMARO),
    _Kind(
        "JSON of Scalabel, as BDD100K has",
        lambda look: look.any_start(".json", b'"box2d"') or look.any_start(".json", b'"poly2d"'),
        "`python -m scalabel.label.to_coco -m det -i JSON -o NEW.json` makes COCO of a file of its present form; where "
        f"that refuses it, as older ones with a file for each image, {_BY_HAND}",
    ),
    _Kind(
        "what MegaDetector found, which are detections of a model",
        lambda look: look.any_start(".json", b'"images"', b'"detections"', b'"conf"'),
        _DRAW,
    ),
    _Kind("Cityscapes' polygons", lambda look: look.any_file("_polygons.json"), _BY_DATUMARO),
    _Kind("Labelbox's JSON", _labelbox, f"export it as COCO, or {_BY_HAND}"),
    _Kind("a SageMaker Ground Truth manifest", lambda look: look.any_file(".manifest"), _BY_HAND),
    _Kind("WIDER FACE's lists of faces", _wider_face, _BY_DATUMARO),
    _Kind("MOT's tracks", _mot, _BY_DATUMARO),
    _Kind("KITTI's tracks", lambda look: _lines_of(look, _is_tracked), _BY_HAND),
    _Kind("dlib's imglab XML", lambda look: look.any_start(".xml", b"<image file="), _BY_HAND),
    _Kind("Google AutoML's table", lambda look: look.any_start(".csv", b"gs://"), _BY_HAND),
    _Kind(
        "boxes as words for a language model (PaliGemma)",
        lambda look: look.any_start(".jsonl", b'"suffix"', b"<loc"),
        "export it once more as COCO",
    ),
    _Kind(
        "COCO's results, which are detections of a model",
        lambda look: look.any_start(".json", b'"image_id"', b'"score"'),
        "give the annotations that they were compared with, an object with images, annotations and categories",
    ),
    _Kind(
        "COCO's objects without their images and categories",
        _coco_objects,
        'write one object, {"images": [...], "annotations": [...], "categories": [...]}, with this list as annotations',
    ),
    _Kind(
        "DOTA's corners of turned boxes",
        lambda look: look.any_name("labeltxt", "labeltxt-v1.0", "labeltxt-v1.5") or _lines_of(look, _is_dota),
        _BY_DATUMARO,
    ),
    _Kind(
        "COCO's annotations of another task",
        _of_another_task,
        "those of detection are called instances_*.json, and come with the same download",
    ),
    _Kind(
        "Segment Anything's masks",
        lambda look: look.any_start(".json", b'"image":', b'"stability_score"'),
        "its masks have no classes: draw or choose the objects of yours in a labelling tool, and export COCO",
    ),
    _Kind(
        "rows as YOLO's are",
        lambda look: _lines_of(look, _is_yolo),
        "put the images into a folder called images and these text files into one called labels beside it, or all "
        "into one folder",
    ),
    _Kind(
        "rows of JDE and FairMOT, which track (class, track, box)",
        lambda look: _lines_of(look, _is_jde),
        "take the second number out of each row, and call the folder labels, beside one called images: that is YOLO",
    ),
    _Kind(
        "a list with images and boxes in each line, as keras-yolo3 has",
        lambda look: _lines_of(look, _is_keras_yolo),
        _BY_HAND,
    ),
    _Kind("label files of OIDv4 ToolKit", lambda look: _lines_of(look, _is_oid), _BY_HAND),
    _Kind("text files with corners of boxes in pixels", lambda look: _lines_of(look, _is_corners), _BY_HAND),
    _Kind(
        "VisDrone's annotations",
        lambda look: _lines_of(look, lambda words: len(words) == 8 == _numbers(words), ","),
        f"Ultralytics' VisDrone.yaml makes YOLO of it, or {_BY_HAND}",
    ),
    _Kind(
        "COCO's words, but not as its JSON has them",
        lambda look: look.any_start("", b"file_name", b"images"),
        'it must be a *.json file with one object, {"images": [...], "annotations": [...], "categories": [...]}: write '
        "it by json.dump, once",
    ),
    _Kind("an archive", lambda look: look.any_file(*_ARCHIVES), "unpack it first, and give the folder that comes out"),
    _Kind(
        "a table with boxes as lists in one column",
        _boxes_in_one_column,
        "write a row for each box, with columns filename, class, xmin, ymin, xmax and ymax, in pixels",
    ),
    _Kind(
        "a table without the columns of boxes",
        lambda look: look.any_file(".csv", ".tsv"),
        _named_columns,
    ),
    _Kind(
        "segmentation masks and no boxes",
        lambda look: look.any_name("segmentationclass", "segmentationobject", "masks", "mask"),
        f"draw a box around each object of a mask, and {_BY_HAND}",
    ),
    _Kind("a JSON file for each image, of a kind that is not known", _for_each_image, _keys),
)


def what_it_is(path: Path, is_known: Callable[[Path], bool], wrong: str | None = None) -> str | None:
    """A sentence or two about a folder or file in which no reader found its format; None where nothing is recognised.

    is_known: whether a reader finds its format in a folder. wrong: what a reader found broken in `path`.
    """
    look = _Look(path)
    near: list[Path] = []
    for place in _near(look):
        if not any(place.is_relative_to(other) for other in near) and _is_one(place, is_known):
            near.append(place)
    if wrong and len(near) != 1:
        return wrong
    if near:
        what = f"{near[0]} is one: give that path" if len(near) == 1 else f"there are {first_few(near, 4)}: give one"
        return f"{path} is no data set itself, but {what}"
    for kind in _KINDS:
        seen = kind.seen(look)
        if seen is not None:
            place = "" if seen == path else f" ({one_line(seen.relative_to(path))})"
            cure = kind.cure if isinstance(kind.cure, str) else kind.cure(seen)
            return f"{path} is no data set that is read; it holds {kind.title}{place}: {cure}"
    return _pictures(look)


def _near(look: _Look) -> list[Path]:
    """Folders that may have been meant: those inside, and the one around where this looks like a part of it."""
    if look.path.is_file():
        return []
    inside = sorted(look.folders, key=lambda place: len(place.parts))[:_NEAR]
    around = [look.path.resolve().parent] if look.path.resolve().name.lower() in PARTS else []
    return [*inside, *around]


def _is_one(place: Path, is_known: Callable[[Path], bool]) -> bool:
    try:
        return is_known(place)
    except (InputError, OSError):
        return False


def _is_paper(file: Path) -> bool:
    return file.suffix.lower() in _PAPERS or file.stem.lower() in _PAPER_NAMES


def _pictures(look: _Look) -> str | None:
    """Where there are images or videos, and nothing else that is known."""
    images = [file for file in look.files if is_image_name(file.name)]
    if not images:
        video = look.any_file(*_VIDEOS)
        if video is None:
            return None
        return (
            f"{look.path} holds videos ({one_line(video.name)}) and no images: take single frames from them "
            "(`ffmpeg -i VIDEO -vf fps=1 frames/%06d.jpg`), and annotate those"
        )
    if look.deeper:
        return None  # labels may lie there
    folders = sorted({file.parent.name for file in images if file.parent != look.path} - set(PARTS))
    others = [file for file in look.files if not is_image_name(file.name) and not _is_paper(file)]
    if len(folders) > 1 and not others:
        return (
            f"{look.path} holds {len(images):,} images in folders ({first_few(map(one_line, folders), 4)}) and no "
            f"boxes: that is a data set of classification. A detector needs boxes: {_DRAW}"
        )
    if others:
        return None
    return (
        f"{look.path} holds {len(images):,} images and no annotations: copy those here that belong to them, or {_DRAW}"
    )

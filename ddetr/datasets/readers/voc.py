"""Pascal VOC: one XML file per image, splits in `ImageSets/Main/*.txt`.

Classes are the names in the training split, sorted; `category_id` is label + 1 (VOC has no ids of its own). Coordinates
are used as written: VOC's devkit counts pixels from 1 with both corners included, most tools that write its format
count from 0, and nothing in a file tells which; the difference is one pixel. `difficult` objects are ignored, not
dropped; turned boxes and polygons become the box around them.

Read as well: lists elsewhere (`ImageSets/*.txt`, `train.txt`, `Splits/train.txt`), XML files in folders of other names
(`annots`, `xmls`, `labels`, ...) or beside their images, and a folder for each split (Roboflow's export).
"""

from __future__ import annotations

import codecs
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from xml.etree import ElementTree

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import ImageFolders, counted, folders_in, listed_lines, read_headers
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.file_names import last_parts
from ddetr.datasets.readers.label_folders import (
    IMAGE_FOLDERS,
    ImagesBeside,
    Source,
    box_around,
    box_around_turned,
    folder_named,
    folders_holding,
    label_files,
    named_splits,
    report_images,
    report_in_no_list,
    without_shared,
)
from ddetr.datasets.readers.reader import (
    WHOLE,
    LabelledImage,
    Wanted,
    is_true,
    looked_at_once,
    number,
    read_labelled,
    size_hw,
    split_kind,
)
from ddetr.errors import InputError
from ddetr.untrusted import (
    MAX_LABEL_BYTES,
    MAX_OBJECTS,
    SHOWN_NAME,
    decode_xml,
    one_line,
    open_file,
    parse_xml,
    read_bytes,
    shortened,
    xml_root_name,
)

_XML_FOLDERS = ("annotations", "annotation", "annots", "annot", "xmls", "xml", "labels", "label")
_SAMPLED = 8  # files of a folder whose beginning says what it holds
_FLAG = re.compile(r"\s+(-1|0|1)$")  # whether an image holds objects of a list's class
_MOST_WORDS = 32  # of a line of a list that are tried as the name of an image
_BARE_AMPERSAND = re.compile(r"&(?!(?:[A-Za-z]\w{0,30}|#[0-9]{1,7}|#x[0-9A-Fa-f]{1,6});)")
_FEW_OTHERS, _SHARE_OF_OTHERS = 5, 0.2  # XML files that state another image: fewer are slips of renaming
_CORNERS = (("xmin", "ymin", "xmax", "ymax"), ("x1", "y1", "x2", "y2"), ("left", "top", "right", "bottom"))


# ---- where things lie ------------------------------------------------------------------------------------------------


def voc_splits(path: Path) -> dict[str, list[Source]]:
    """Split name -> where its images come from; {} where there is no VOC data set."""
    return {} if path.is_file() else _layout(path)[1]


@looked_at_once
def _layout(path: Path) -> tuple[Path, dict[str, list[Source]]]:
    """The data set's folder, and its splits: `path`, or the only one up to two levels below (VOCdevkit/VOC2007)."""
    level = [path]
    for _ in range(3):
        alone = len(level) == 1
        found = {folder: splits for folder in level if (splits := _splits_of(folder, alone))}
        if len(found) > 1:
            names = ", ".join(one_line(folder.name) for folder in found)
            raise InputError(f"{path} holds several Pascal VOC data sets ({names}): give the path of one")
        if found:
            return next(iter(found.items()))
        level = [sub for folder in level for sub in folders_in(folder)]
    return path, {}


def _splits_of(root: Path, beside_images: bool) -> dict[str, list[Source]]:
    """beside_images: whether folders count that hold XML files under no name that says so."""
    folder = _xml_folder(root)
    if folder is not None:
        return _listed(root, folder) or _unlisted(folder)
    if not beside_images:
        return {}
    sources = []
    for sub in folders_in(root):
        is_split = split_kind(sub.name) is not None
        places = _xml_folders(sub) if is_split else [sub] * _holds_voc(sub)
        sources += [(sub.name, Source(place)) for place in places]
    if not any(split_kind(name) for name, _ in sources) and _holds_voc(root):  # and in folders as well
        return _listed(root, root) or {WHOLE: [Source(root), *(source for _, source in sources)]}
    return named_splits(sources)


def _xml_folder(root: Path) -> Path | None:
    """The folder below `root` whose XML files, or whose folders of them, describe images."""
    for folder in folder_named(root, _XML_FOLDERS):
        if folders_holding(folder, _holds_voc):
            return folder
    return None


def _xml_folders(split: Path) -> list[Path]:
    """The folders of XML files in the folder of a split; not those of a data set in it that has lists of its own."""

    def holds(folder: Path) -> bool:
        return _holds_voc(folder) and (folder.parent == split or not folder_named(folder.parent, ("ImageSets",)))

    return folders_holding(_xml_folder(split) or split, holds)


def _holds_voc(folder: Path) -> bool:
    """Whether the XML files there are VOC's: the first element of the first says so. One that can't be told is taken
    for one, so that reading it can say what is wrong."""
    files = label_files(folder, ".xml", _SAMPLED)
    names = [name for file in files if (name := xml_root_name(file)) is not None]
    return bool(files) and (not names or names[0].lower() == "annotation")


def _listed(root: Path, folder: Path) -> dict[str, list[Source]]:
    """The splits by the first place with lists of images."""
    sets = folder_named(root, ("ImageSets",))
    main = [inner for place in sets for inner in folder_named(place, ("Main",))]
    others = [sub for place in (*sets, root) for sub in folders_in(place)[:_SAMPLED] if sub not in (*main, *sets)]
    index = None
    for place in (*main, *sets, root, folder, *others):
        lists = label_files(place, ".txt")
        if place in others:  # `Splits/train.txt`
            lists = [file for file in lists if split_kind(file.stem)][:_SAMPLED]
        if place not in main and lists:  # other text files may lie there: classes.txt, README.txt
            index = index or _by_name(folder)
            lists = [file for file in lists if _lists_images(file, index)]
        names = {file.stem for file in lists}
        # "aeroplane_train" is train once more with a flag for aeroplanes: no split of its own
        own = [f for f in lists if f.stem.rpartition("_")[2] not in names or "_" not in f.stem]
        splits: dict[str, list[Source]] = {}
        for file in own:
            _, mark, word = file.stem.rpartition("_")
            of_a_class = mark and split_kind(word) and _has_flags(file)  # where those are all, as VoTT writes
            splits.setdefault(word if of_a_class else file.stem, []).append(Source(folder, file))
        if splits:
            return splits
    return {}


def _has_flags(file: Path) -> bool:
    """Whether its first line ends in what the images of a class have: `name -1`."""
    try:
        return any(_FLAG.search(line.rstrip()) for line in listed_lines(file)[:1])
    except InputError:
        return False


def _lists_images(file: Path, index: dict[str, Path | None]) -> bool:
    try:
        with open_file(file) as stream:
            start = stream.read(1 << 14)
    except OSError:
        return False
    encoding = "utf-16" if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    lines = start.decode(encoding, "replace").splitlines()
    return any(_named(line, index) is not None for line in [line for line in lines if line.strip()][:_SAMPLED])


def _unlisted(folder: Path) -> dict[str, list[Source]]:
    inner = {} if _holds_voc(folder) else {sub: folders_holding(sub, _holds_voc) for sub in folders_in(folder)}
    if not any(inner.values()):  # all XML files in one folder, the images in one for each split
        places = [sub for place in folder_named(folder.parent, IMAGE_FOLDERS) for sub in folders_in(place)]
        splits = {sub.name: [Source(folder, sub)] for sub in places if split_kind(sub.name)}
        return splits or {WHOLE: [Source(folder)]}
    return named_splits([(sub.name, Source(place)) for sub, places in inner.items() for place in places])


# ---- names -----------------------------------------------------------------------------------------------------------


def _xml_files(folder: Path) -> list[Path]:
    places = folders_holding(folder, lambda place: bool(label_files(place, ".xml", 1)))
    return [file for place in places for file in label_files(place, ".xml")]


def _by_name(folder: Path) -> dict[str, Path | None]:
    """XML file by its name without suffix, and by its path below the folder; None for a name that two have."""
    index: dict[str, Path | None] = {}
    for file in _xml_files(folder):
        for key in {_composed(file.stem), _composed(file.relative_to(folder).as_posix()[: -len(file.suffix)])}:
            index[key] = None if key in index else file
    return index


def _composed(name: str) -> str:
    """A Mac writes an accent as a letter of its own."""
    return name if name.isascii() else unicodedata.normalize("NFC", name)


def _named(line: str, index: dict[str, Path | None]) -> Path | None:
    """The XML file of an image that a line of a list names: by all of the line, or by the words before a flag ("name
    -1" in lists of one class) or another path ("images/name.jpg labels/name.xml")."""
    name = _composed(line.strip().replace("\\", "/"))
    for _ in range(_MOST_WORDS):
        in_other_words = last_parts(name) if "%" in name or "?" in name else ()
        for key in (name.removeprefix("./"), PurePosixPath(name).name, *in_other_words):
            stem, _, suffix = key.rpartition(".")
            bare = stem if is_image_name(key) or suffix.lower() == "xml" else key
            for known in (key, bare):
                if index.get(known) is not None:
                    return index[known]
        words = name.rsplit(maxsplit=1)
        if len(words) < 2:
            break
        name = words[0]
    return None


def _listed_files(source: Source, log: FindingLog) -> list[Path]:
    """The XML files of the images in a list, or in a folder."""
    index = _by_name(source.folder)
    if source.listing.is_dir():
        found = (_named(name, index) for name in ImageFolders().images(source.listing))
        return list(dict.fromkeys(file for file in found if file is not None))
    files: dict[Path, None] = {}
    for line_number, line in enumerate(listed_lines(source.listing), 1):
        if not line.strip():
            continue
        where = f"{source.listing.name}, line {line_number}"
        file = _named(line, index)
        if file is None:
            name = _FLAG.sub("", line.strip())
            message = f"The image {shortened(name, SHOWN_NAME)!r} has no annotation file; it was left out."
            log.add("missing-annotation", "dropped", where, message)
        elif file in files:
            log.add("duplicate-image", "repaired", where, f"{one_line(file.stem)} is listed twice; used once.")
        else:
            files[file] = None
    return list(files)


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_voc(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    root, splits = _layout(wanted.path)
    beside = ImagesBeside(root, wanted.image_dir)
    folders = {source.folder for sources in splits.values() for source in sources}
    known = {file.stem for folder in folders for file in _xml_files(folder)}

    def read(sources: Sequence[Source], log: FindingLog) -> list[LabelledImage]:
        files = [f for s in sources for f in (_xml_files(s.folder) if s.listing is None else _listed_files(s, log))]
        trees = {file: tree for file in counted(files) if (tree := _parse(file, root, log)) is not None}
        images = without_shared(_images(root, trees, beside, log), log)
        report_images(log, wanted, beside, list(trees), images, known)
        if wanted.is_training and all(source.listing for source in sources):
            _report_unlisted(splits, beside, log)
        return images

    return read_labelled(wanted, "voc", splits, read)


def _report_unlisted(splits: dict[str, list[Source]], beside: ImagesBeside, log: FindingLog) -> None:
    """Counts the images with an XML file that are in none of the lists."""
    sources = [source for some in splits.values() for source in some]
    listed = {file for source in sources if source.listing for file in _listed_files(source, FindingLog())}
    for folder in sorted({source.folder for source in sources}):
        left = [file for file in _xml_files(folder) if file not in listed and beside.find_own(file) is not None]
        report_in_no_list(log, folder, [file.stem for file in left], [source.listing for source in sources])


def _parse(file: Path, root: Path, log: FindingLog) -> ElementTree.Element | None:
    where = str(file.relative_to(root))
    try:
        text, other_encoding = decode_xml(read_bytes(file, MAX_LABEL_BYTES))
        tree = _tree(text, where, log)
    except ElementTree.ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        message = f"The XML is broken ({reason} at line {line}, column {column}); the image was left out."
        log.add("malformed-xml", "dropped", f"{where}, line {line}", message)
        return None
    except (OSError, ValueError, LookupError) as error:
        log.add("malformed-xml", "dropped", where, f"The file can't be read ({error}); the image was left out.")
        return None
    if other_encoding is not None:
        message = f"The text is not in the encoding that the file states; it was read as {other_encoding}."
        log.add("xml-encoding", "repaired", where, message)
    return tree


def _tree(text: str, where: str, log: FindingLog) -> ElementTree.Element:
    """The root element, the names of all in small letters and without namespaces; raises as `parse_xml`."""
    try:
        tree = parse_xml(text)
    except ElementTree.ParseError as error:
        escaped = _BARE_AMPERSAND.sub("&amp;", text)
        try:
            if escaped == text:
                raise error
            tree = parse_xml(escaped)
        except ElementTree.ParseError:
            raise error from None
        log.add("bare-ampersand", "repaired", where, "It has an & where XML wants &amp;; it was read as the letter.")
    for element in tree.iter():
        if not element.tag.islower() or "}" in element.tag:
            element.tag = element.tag.rpartition("}")[2].lower()
    return tree


def _images(
    root: Path, trees: dict[Path, ElementTree.Element], beside: ImagesBeside, log: FindingLog
) -> Iterator[LabelledImage]:
    others: list[_OtherName] = []
    taken: set[Path] = set()  # images of all files
    for file, tree in trees.items():
        where = str(file.relative_to(root))
        if tree.tag != "annotation":
            message = f"Expected <annotation>, found <{one_line(tree.tag)}>: it is no annotation of an image."
            log.add("other-xml", "note", where, message)
            continue
        path = _find_image(file, tree, beside, where, others)
        if path is None:
            message = "Its image was not found in JPEGImages, images or beside it; it was left out."
            log.add("missing-image", "dropped", where, message, image=file.name)
            continue
        taken.add(path)
        names, difficult, boxes, numbers = _objects(tree, where, log)
        declared_hw = _declared_hw(tree)
        if declared_hw is None:
            log.add("missing-size", "repaired", where, "It states no image size; it was read from the image.")
        yield LabelledImage(path, where, names, boxes, numbers, declared_hw=declared_hw, ignore=difficult)
    _report_other_names(others, taken - {one.own for one in others}, len(trees), log)


class _OtherName(NamedTuple):
    """An XML file that states another image than the one that is called as it is; both are there."""

    where: str
    stated: str
    its: Path
    own: Path
    declared_hw: tuple[int, int] | None


def _report_other_names(others: Sequence[_OtherName], settled: set[Path], total: int, log: FindingLog) -> None:
    """Stops where many files state each another image, and the stated sizes don't show that the images of their own
    names are meant. settled: images of files that state no other: of those, others are copies."""
    crossed = [one for one in others if one.its not in settled]
    if len(crossed) >= max(_FEW_OTHERS, _SHARE_OF_OTHERS * total) and len({one.its for one in crossed}) == len(crossed):
        headers = read_headers([path for one in crossed for path in (one.own, one.its)])
        known = [None if isinstance(header, InputError) else header.upright_hw for header in headers]
        telling = [
            (one.declared_hw == own, one.declared_hw == its)
            for one, own, its in zip(crossed, known[::2], known[1::2], strict=True)
            if own != its
        ]
        of_own, of_its = (sum(fits) for fits in zip(*telling, strict=True)) if telling else (0, 0)
        if of_own < _FEW_OTHERS or of_its:
            first = crossed[0]
            message = (
                f"{len(crossed):,} of {total:,} XML files state the file name of another image that is there, such as "
                f"{one_line(first.stated)} for {one_line(first.own.name)}: whose boxes these are can't be known. If "
                "those of the image that is called as the XML file, take <filename> out; if not, rename the XML files."
            )
            log.add("file-names-differ", "refused", first.where, message, count=len(crossed))
            return
    for one in others:
        message = (
            f"It states the file name {one_line(one.stated)}, and {one_line(one.its.name)} is there; "
            f"{one_line(one.own.name)} has its own name and was taken."
        )
        log.add("file-name-differs", "note", one.where, message)


def _find_image(
    file: Path, tree: ElementTree.Element, beside: ImagesBeside, where: str, others: list[_OtherName]
) -> Path | None:
    """By the XML's own name first: <filename> is often wrong after a data set has been renamed. Where it is that of
    another image, that goes to `others`."""
    stated = _text(tree, "filename")
    by_statement = beside.find(file, stated)
    if by_statement is not None and by_statement.stem == file.stem:  # of a.jpg and a.png the one that it names
        return by_statement
    by_name = beside.find_own(file)
    if by_name is None or by_statement in (None, by_name):
        return by_name or by_statement
    others.append(_OtherName(where, stated, by_statement, by_name, _declared_hw(tree)))
    return by_name


def _objects(
    tree: ElementTree.Element, where: str, log: FindingLog
) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """Names, difficult (n,) bool, corners as written (n, 4), and the number of each object that has a box."""
    names, difficult, boxes, numbers = [], [], [], []
    objects = list(tree.iter("object"))
    elsewhere = 0 if objects else sum(1 for _ in tree.iter("bndbox"))
    if elsewhere:
        message = f"It has {elsewhere} bndbox, but no <object> around them; they were left out."
        log.add("missing-object", "dropped", where, message, count=elsewhere)
    total = sum(max(1, len(obj.findall("bndbox"))) for obj in objects)
    if total > MAX_OBJECTS:
        report_crowd(log, where, total)
    for i, obj in enumerate(objects[:MAX_OBJECTS], 1):
        place = f"{where}, object {i}"
        name = _text(obj, "name")
        if is_true(_text(obj, "deleted")):
            log.add("deleted-object", "note", place, "The object is marked as deleted; it was left out.")
            continue
        box = _box(obj, place, log)
        if box is None:
            written = obj.find("bndbox")
            wanted, found = ("bndbox, robndbox or polygon", obj) if written is None else ("xmin ... ymax", written)
            listed = ", ".join(f"<{one_line(child.tag, 40)}>" for child in found[:12]) or "nothing"
            message = f"The {found.tag} has no {wanted}, but {listed}; it was left out."
            log.add("missing-box", "dropped", place, message)
            continue
        if not name:
            log.add("missing-name", "dropped", place, "The object has no name; it was left out.")
            continue
        others = [corners for other in obj.findall("bndbox")[1:] if (corners := _corners(other)) is not None]
        if others:
            message = f"It has {1 + len(others)} boxes; each was read as an object of its own."
            log.add("several-boxes", "repaired", place, message)
        for one in [box, *others][: MAX_OBJECTS - len(names)]:
            names.append(name)
            difficult.append(is_true(_text(obj, "difficult")))
            boxes.append(one)
            numbers.append(i)
    return names, np.array(difficult, dtype=bool), np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _box(obj: ElementTree.Element, place: str, log: FindingLog) -> list[float] | None:
    """An object's corners: its <bndbox>, or what is around its turned box (radians) or its polygon."""
    box, turned, polygon = (obj.find(key) for key in ("bndbox", "robndbox", "polygon"))
    if box is not None:
        return _corners(box)
    if turned is not None:
        around = box_around_turned(*(number(_text(turned, key)) for key in ("cx", "cy", "w", "h", "angle")))
    elif polygon is not None:  # <x1>, <y1>, <x2>, ...; or <pt> of <x> and <y>
        xs, ys = (
            [number(point.text) for point in polygon.iter() if re.fullmatch(rf"{axis}\d*", point.tag)] for axis in "xy"
        )
        around = box_around(list(zip(xs, ys, strict=True)) if len(xs) == len(ys) else [])
    else:
        return None
    log.add("box-from-shape", "note", place, "It has a turned box or a polygon, no bndbox; the box around it was used.")
    return around


def _corners(box: ElementTree.Element) -> list[float] | None:
    """None where it has elements of other names, such as a width: which they mean isn't known."""
    found = {child.tag for child in box}
    keys = next((keys for keys in _CORNERS if found.issuperset(keys)), _CORNERS[0])
    return [number(_text(box, key)) for key in keys] if found.intersection(keys) or not found else None


def _declared_hw(tree: ElementTree.Element) -> tuple[int, int] | None:
    size = tree.find("size")
    return None if size is None else size_hw(_text(size, "height"), _text(size, "width"))


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()

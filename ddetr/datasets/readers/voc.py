"""Pascal VOC: one XML file per image, splits in `ImageSets/Main/*.txt`.

Classes are the names in the training split, sorted; `category_id` is label + 1 (VOC has no ids of its own). Coordinates
are used as written: VOC's devkit counts pixels from 1 with both corners included, most tools that write its format
count from 0, and nothing in a file tells which; the difference is one pixel. `difficult` objects are ignored, not
dropped. Folders of images with their XML files beside them (Roboflow's export) are read too: each folder is a split.
"""

from __future__ import annotations

import math
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree
from xml.parsers import expat

import numpy as np

from ddetr.datasets.annotations import Annotations, FindingLog, report_crowd
from ddetr.datasets.image_files import ImageFolders, is_image_name, listed_lines
from ddetr.datasets.readers.reader import LabelledImage, Wanted, read_labelled
from ddetr.errors import InputError
from ddetr.untrusted import MAX_LABEL_BYTES, MAX_OBJECTS, read_bytes

WHOLE = "all"  # the one split of a data set that has none


def voc_root(path: Path) -> Path | None:
    """The folder with `Annotations` in it: `path`, or the only one below it (VOCdevkit/VOC2007); None without one."""
    for depth in ("", "*/", "*/*/"):
        roots = sorted(
            {folder.parent for folder in path.glob(f"{depth}Annotations") if next(folder.glob("*.xml"), None)}
        )
        if len(roots) > 1:
            names = ", ".join(root.name for root in roots)
            raise InputError(f"{path} holds several Pascal VOC data sets ({names}); name one of them")
        if roots:
            return roots[0]
    return None


def voc_splits(path: Path) -> dict[str, Path]:
    """Split name -> its list of images, or its folder of XML files; {} where there is no VOC data set."""
    if path.is_file():
        return {}
    root = voc_root(path)
    if root is None:
        return {f.name: f for f in sorted(path.iterdir()) if f.is_dir() and next(f.glob("*.xml"), None)}
    lists = sorted((root / "ImageSets" / "Main").glob("*.txt"))
    names = {file.stem for file in lists}
    # "aeroplane_train" is train once more with a flag for aeroplanes: no split of its own
    splits = {file.stem: file for file in lists if file.stem.rpartition("_")[2] not in names or "_" not in file.stem}
    return splits or {WHOLE: root / "Annotations"}


def read_voc(wanted: Wanted) -> Annotations:
    """One split; `load_annotations` says what is wanted."""
    path = wanted.path
    root = voc_root(path) or path
    found_images = ImageFolders()

    def read(listing: Path, log: FindingLog) -> list[LabelledImage]:
        files = _xml_files(root, listing, log)
        trees = {file: tree for file in files if (tree := _parse(file, root, log)) is not None}
        return _images(root, trees, wanted.image_dir, found_images, log)

    return read_labelled(wanted, "voc", voc_splits(path), read)


def _xml_files(root: Path, listing: Path, log: FindingLog) -> list[Path]:
    """The XML file of each image of a split, listed or not yet known to exist."""
    if listing.is_dir():
        return sorted(listing.glob("*.xml"))
    files: dict[Path, None] = {}
    for number, line in enumerate(listed_lines(listing), 1):
        words = line.split()
        if not words:
            continue
        name = Path(words[0]).name
        stem = name.rpartition(".")[0] if is_image_name(name) or name.endswith(".xml") else name
        file = root / "Annotations" / f"{stem}.xml"
        if file in files:
            log.add(
                "duplicate-image", "repaired", f"{listing.name}, line {number}", f"{stem} is listed twice; used once."
            )
        files[file] = None
    return list(files)


def _parse(file: Path, root: Path, log: FindingLog) -> ElementTree.Element | None:
    where = str(file.relative_to(root))
    try:
        content = read_bytes(file, MAX_LABEL_BYTES)
        _check_entities(content)
        return ElementTree.fromstring(content)
    except ElementTree.ParseError as error:
        line, column = error.position
        reason = str(error).partition(":")[0]
        message = f"The XML is broken ({reason} at line {line}, column {column}); the image was left out."
        log.add("malformed-xml", "dropped", f"{where}, line {line}", message)
    except FileNotFoundError:
        log.add("missing-annotation", "dropped", where, "The image has no annotation file; it was left out.")
    except (OSError, ValueError, LookupError) as error:
        log.add("malformed-xml", "dropped", where, f"The file can't be read ({error}); the image was left out.")
    return None


def _check_entities(content: bytes) -> None:
    """ValueError where an XML file declares entities: a few lines of them can stand for gigabytes, or for another
    file. No labelling tool writes any."""
    if b"DOCTYPE" not in content.replace(b"\0", b""):  # UTF-16 has a zero byte in each letter
        return

    def refuse(name: str, *_: object) -> None:
        raise ValueError(f"it declares the entity {name[:40]!r}; write the text itself")

    parser = expat.ParserCreate()
    parser.EntityDeclHandler = refuse
    with suppress(expat.ExpatError):  # said by whoever reads the content
        parser.Parse(content, True)


def _images(
    root: Path,
    trees: dict[Path, ElementTree.Element],
    image_dir: Path | None,
    folders: ImageFolders,
    log: FindingLog,
) -> list[LabelledImage]:
    images = []
    for file, tree in trees.items():
        where = str(file.relative_to(root))
        path = _find_image(root, file, tree, image_dir, folders)
        if path is None:
            message = "Its image was not found in JPEGImages or beside it; it was left out."
            log.add("missing-image", "dropped", where, message)
            continue
        names, difficult, boxes, numbers = _objects(tree, where, log)
        size_hw = _declared_hw(tree, where, log)
        images.append(LabelledImage(path, where, names, boxes, numbers, declared_hw=size_hw, ignore=difficult))
    if trees and not images:
        looked = image_dir or root / "JPEGImages"
        message = f"None of the {len(trees)} images was found in {looked}; give image_dir."
        log.add("every-image-missing", "refused", str(root), message, count=len(trees))
    return images


def _find_image(
    root: Path, file: Path, tree: ElementTree.Element, image_dir: Path | None, folders: ImageFolders
) -> Path | None:
    # by the XML's own name first: <filename> is often wrong after a data set has been renamed
    names = [f"{file.stem}.jpg", Path(_text(tree, "filename").replace("\\", "/")).name]
    places = [image_dir] if image_dir else [root / "JPEGImages", file.parent, root / "images", root]
    for name in filter(None, names):
        for place in places:
            image = folders.find(place / name)
            if image is not None and is_image_name(image.name):
                return image
    return None


def _objects(
    tree: ElementTree.Element, where: str, log: FindingLog
) -> tuple[list[str], np.ndarray, np.ndarray, list[int]]:
    """Names, difficult (n,) bool, corners as written (n, 4), and the number of each object that has a box."""
    names, difficult, boxes, numbers = [], [], [], []
    objects = tree.findall("object")
    if len(objects) > MAX_OBJECTS:
        report_crowd(log, where, len(objects))
    for number, obj in enumerate(objects[:MAX_OBJECTS], 1):
        place = f"{where}, object {number}"
        box = obj.find("bndbox")
        name = _text(obj, "name")
        if box is None or not name:
            message = f"The object has no {'bndbox' if box is None else 'name'}; it was left out."
            log.add("missing-box" if box is None else "missing-name", "dropped", place, message)
            continue
        names.append(name)
        difficult.append(_text(obj, "difficult") in ("1", "true", "True"))
        boxes.append([_number(_text(box, key)) for key in ("xmin", "ymin", "xmax", "ymax")])
        numbers.append(number)
    return names, np.array(difficult, dtype=bool), np.array(boxes, dtype=np.float64).reshape(-1, 4), numbers


def _declared_hw(tree: ElementTree.Element, where: str, log: FindingLog) -> tuple[int, int] | None:
    size = tree.find("size")
    height, width = (_number(_text(size, key)) if size is not None else 0.0 for key in ("height", "width"))
    if not (0 < height < math.inf and 0 < width < math.inf):
        log.add("missing-size", "repaired", where, "It states no image size; it was read from the image.")
        return None
    return round(height), round(width)


def _text(element: ElementTree.Element, key: str) -> str:
    return (element.findtext(key) or "").strip()


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return float("nan")

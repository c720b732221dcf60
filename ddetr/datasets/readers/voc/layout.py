"""Where Pascal VOC's annotations lie, and which of them a split has: `Annotations/*.xml`, `ImageSets/Main/*.txt`.

Read as well: lists elsewhere (`ImageSets/*.txt`, `train.txt`, `Splits/train.txt`), XML files in folders of other names
(`annots`, `xmls`, `labels`, ...) or beside their images, and a folder for each split (Roboflow's export).
"""

import codecs
import re
import unicodedata
from pathlib import Path, PurePosixPath

from ddetr.datasets.annotations import FindingLog
from ddetr.datasets.image_files import ImageFolders, folders_in, listed_lines
from ddetr.datasets.image_formats import is_image_name
from ddetr.datasets.readers.file_names import last_parts
from ddetr.datasets.readers.label_folders import (
    IMAGE_FOLDERS,
    Source,
    folder_named,
    folders_holding,
    label_files,
    named_splits,
)
from ddetr.datasets.readers.reader import WHOLE, looked_at_once, split_kind
from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, one_line, shortened
from ddetr.untrusted import open_file, xml_root_name

_XML_FOLDERS = ("annotations", "annotation", "annots", "annot", "xmls", "xml", "labels", "label")
_SAMPLED = 8  # files of a folder whose beginning says what it holds
_FLAG = re.compile(r"\s+(-1|0|1)$")  # whether an image holds objects of a list's class
_MOST_WORDS = 32  # of a line of a list that are tried as the name of an image


def voc_splits(path: Path) -> dict[str, list[Source]]:
    """Split name -> where its images come from; {} where there is no VOC data set."""
    return {} if path.is_file() else layout(path)[1]


@looked_at_once
def layout(path: Path) -> tuple[Path, dict[str, list[Source]]]:
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


def xml_files(folder: Path) -> list[Path]:
    places = folders_holding(folder, lambda place: bool(label_files(place, ".xml", 1)))
    return [file for place in places for file in label_files(place, ".xml")]


def _by_name(folder: Path) -> dict[str, Path | None]:
    """XML file by its name without suffix, and by its path below the folder; None for a name that two have."""
    index: dict[str, Path | None] = {}
    for file in xml_files(folder):
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


def listed_files(source: Source, log: FindingLog) -> list[Path]:
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

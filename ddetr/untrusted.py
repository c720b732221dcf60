"""Files and names that others made: how much of them is read. What of it reaches a screen: printable.py;
arrays and tensors: arrays.py.

A data set, a run folder or a bundle may come from anybody. All limits stand here, each with its reason: far above what
anybody has had, far below what takes a machine down. The functions are the one way to open and parse such input; they
import nothing heavy.
"""

import codecs
import csv
import errno
import io
import itertools
import json
import os
import re
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from typing import TYPE_CHECKING, Any, BinaryIO

from ddetr.errors import InputError
from ddetr.printable import SHOWN_NAME, one_line, shortened

if TYPE_CHECKING:
    from xml.etree.ElementTree import Element

MAX_CLASSES = 25_000  # ImageNet-21k has 21,841; the head of each layer and the evaluation's arrays grow with them
MAX_OBJECTS = 20_000  # in an image; SKU-110K has 718, DOTA 10,000 before it is cut: each is compared with every query
MAX_PAIRS = MAX_OBJECTS * 1_000  # of objects and detections in an image, which are compared
MAX_NAME = 1_000  # characters of a class name; ImageNet's longest list of synonyms has 150
MAX_DRAWN, MAX_TAGS = 2_000, 300  # boxes of a picture, and their names: more nobody can tell apart
MAX_TAG = 60  # characters of such a name: more hide the picture
MAX_ROWS = 2_000  # of a table in a page: LVIS has 1,203 classes
MAX_COLUMNS = 500  # of a table of a run; ours have 40
MAX_PATH = 4_096  # characters; no system has files of longer names
MAX_SPLIT_PATHS = 10_000  # folders and lists that a split in a data.yaml names: each is looked for in many places
MAX_PATH_PARTS = 64  # of a split's folder in a data.yaml: each end of it is tried
MAX_PLACE = 1_000  # characters that a finding keeps of a place or a sentence: there are millions of findings
MAX_MESSAGE = 2_000  # characters of one message on a screen
MAX_PLACES = 10_000  # of a kind of finding; what repeats in each of COCO's 860,000 objects is counted, not listed

MAX_IMAGE_BYTES = 2**30  # Pillow refuses above 179 million pixels, which no usual format stores in more
MAX_IMAGE_SEGMENTS = 100_000  # that are walked through for an image's size; cameras write dozens
MAX_ANNOTATION_BYTES = 2**32  # a COCO file; that of Objects365 has 2.6 GB
MAX_LABEL_BYTES = 2**28  # the labels of one image (XML, text), or a list of all images: 250 characters for a million
MAX_YAML_BYTES = 2**21  # 25,000 classes by name take 1 MB; parsing one takes seconds
MAX_YAML_NODES = 250_000  # with every alias written out
MAX_YAML_DEPTH = 50
MAX_YAML_VALUE = 10_000  # characters; longer ones are no setting, path or name
MAX_RUN_BYTES = 2**26  # a JSON file of a run, beside weights or in them: parsed it takes 20 times as much
MAX_TABLE_BYTES = 2**28  # train.csv: a million rows
MAX_LINE = 2**20  # characters of a line in a data set's CSV file: a row has a few hundred
MAX_SHARED = 32  # tensors that share their numbers: heads of all layers do
MAX_ARRAYS_BYTES = 2**32  # of a validation: COCO's takes 13 MB, LVIS's with 300 detections per image 150 MB

MAX_WEIGHT_BYTES = 2**34  # of the tensors that are read from a file: 4 billion float32 parameters
MAX_RECORDS = 100_000  # tensors of a file, or records of its archive
MAX_SHARDS = 1000  # files that one set of weights lies in
MAX_PICKLE_BYTES = 2**26  # of what describes the tensors, and holds the plain values beside them
MAX_OPERATIONS = 5_000_000  # a training state of a detector has some ten thousand
MAX_AXES = 16  # of a tensor
MAX_STEP = 2**62 - 1  # of a tensor's shape, strides and offset: PyTorch counts in 64 bits
MAX_BITS = 64  # of a number; Python refuses to write one of many thousand
MAX_VALUES = 1_000_000  # plain values in a field of a checkpoint
MAX_DICTS = 10_000  # that are searched for the detector
MAX_DEPTH = 4  # of the nested dicts that are searched

MAX_THREADS = 1024  # a machine of today has half as many cores; PyTorch dies of a million
MAX_SIDE = 2**14  # pixels of an image as the network gets it
MAX_NETWORK = {  # far above any network that has been trained
    "num_classes": MAX_CLASSES,
    "hidden_dim": 8192,
    "nheads": 1024,
    "num_queries": 20_000,
    "num_feature_levels": 8,
    "enc_layers": 100,
    "dec_layers": 100,
    "dim_feedforward": 65_536,
    "enc_n_points": 64,
    "dec_n_points": 64,
}


# ---- files -----------------------------------------------------------------------------------------------------------


def open_file(path: str | os.PathLike, most_bytes: int | None = None) -> BinaryIO:
    """A regular file of at most `most_bytes` (of any size without), open for reading.

    Raises:
        OSError: there is none, or it is something else: a folder, or what would hang or never end (pipe, device).
    """
    _check_file(path, os.stat(path), most_bytes)
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    descriptor = os.open(path, flags)
    try:
        _check_file(path, os.fstat(descriptor), most_bytes)  # again: the name may stand for another file by now
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_bytes(path: str | os.PathLike, most_bytes: int) -> bytes:
    """All of a regular file; raises as `open_file`."""
    with open_file(path, most_bytes) as file:
        size = os.fstat(file.fileno()).st_size
        content = file.read(size + 1)
    if len(content) > size:  # such as those of /proc, whose size is 0
        raise OSError(errno.EFBIG, "it has more than its stated size", str(path))
    return content


def read_text(path: str | os.PathLike, most_bytes: int, encoding: str = "utf-8-sig", errors: str = "strict") -> str:
    """All of a regular text file with `\\n` at the ends of lines; raises as `open_file`, or UnicodeDecodeError. UTF-16,
    which Windows' shell writes, and UTF-32 are read too where their mark stands first."""
    content = read_bytes(path, most_bytes)
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):  # first: one begins as UTF-16 does
        encoding = "utf-32"
    elif content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    text = content.decode(encoding, errors)
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def _check_file(path: str | os.PathLike, found: os.stat_result, most_bytes: int | None) -> None:
    if stat.S_ISDIR(found.st_mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder, not a file", str(path))
    if not stat.S_ISREG(found.st_mode):
        kinds = {stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
        raise OSError(errno.EINVAL, f"it is {kinds.get(stat.S_IFMT(found.st_mode), 'a device')}, not a file", str(path))
    if most_bytes is not None and found.st_size > most_bytes:
        size, most = found.st_size / 2**20, most_bytes / 2**20
        raise OSError(errno.EFBIG, f"it has {size:,.0f} MB, more than the {most:,.0f} MB that are read", str(path))


# ---- documents -------------------------------------------------------------------------------------------------------


def parse_json(text: str, what: str, pairs_hook: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The value of a JSON text.

    Args:
        what: the file's name, for the message.
        pairs_hook: makes an object of its (key, value) pairs; by default a dict, whose doubled keys are refused.

    Raises:
        InputError: broken, nested without end, a number of thousands of digits, a key twice in an object.
    """
    try:
        text = text.lstrip("\ufeff")  # a second mark, of a text that had one when it was written with one
        return json.loads(text, object_pairs_hook=pairs_hook or without_doubles)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{what} is broken JSON: {error.msg} at line {error.lineno}, column {error.colno}; restore or re-export it"
        ) from None
    except RecursionError:
        raise InputError(f"{what} can't be read: its JSON is nested hundreds of levels deep") from None
    except ValueError as error:  # Python reads no whole number of more than 4300 digits
        raise InputError(f"{what} can't be read: {error}") from None


def is_number(value: Any) -> bool:
    """Whether a value from a file is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The dict of an object's pairs; ValueError where a key stands twice with different values: readers differ in
    which one they take."""
    found = dict(pairs)
    if len(found) < len(pairs):
        for key, value in pairs:
            if found[key] != value:
                raise ValueError(f"the key {shortened(key, SHOWN_NAME)!r} stands twice in one object of its JSON")
    return found


def parse_yaml(text: str, what: str, *, as_text: bool = False) -> Any:
    """The value of a YAML text in plain types.

    Args:
        what: the file's name, for the message.
        as_text: every value is the text that is written: `no`, `010` and `1e3` are names, no numbers. A key that stands
            twice in one map with different values is refused.

    Raises:
        InputError: broken, too deep, or too large once every alias is written out (a few lines can stand for billions).
    """
    import yaml  # here: most commands need none

    try:
        _check_yaml(yaml.parse(text, Loader=yaml.SafeLoader), what)
        return _yaml_of_text(text, what) if as_text else yaml.safe_load(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it cannot be parsed"
        if "escape character" in problem:
            problem += "; write paths with / or without quotes"
        raise InputError(f"{what}: broken YAML{place}: {problem}") from None
    except InputError:
        raise
    except (ValueError, KeyError, AttributeError, TypeError, OverflowError, RecursionError) as error:
        # what PyYAML raises for values that are not what they seem, such as the date 2020-99-99
        raise InputError(f"{what}: broken YAML: a value cannot be read ({type(error).__name__}: {error})") from None


def _yaml_of_text(text: str, what: str) -> Any:
    import yaml

    class Loader(yaml.BaseLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            pairs = [
                (self.construct_object(key, True), self.construct_object(value, True)) for key, value in node.value
            ]
            found = dict(pairs)
            for key, value in pairs:
                if found[key] != value:
                    line = node.start_mark.line + 1
                    raise InputError(f"{what}: {one_line(key)!r} stands twice in the map that begins at line {line}")
            return found

    loader = Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _check_yaml(events: Iterable[Any], what: str) -> None:
    """Walks through a document without building it: how deep it is, and how large with its aliases written out."""
    import yaml

    sizes: dict[str, int | None] = {}  # anchor -> nodes below it; None while it is open
    open_nodes: list[tuple[str | None, int]] = []  # (anchor, nodes so far) of the collections around
    for event in events:
        if isinstance(event, yaml.ScalarEvent) and len(event.value) > MAX_YAML_VALUE:
            raise InputError(
                f"{what}: line {event.start_mark.line + 1} holds a value of {len(event.value):,} characters; the most "
                f"are {MAX_YAML_VALUE:,}"
            )
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1))
            if event.anchor is not None:
                sizes[event.anchor] = None
            if len(open_nodes) > MAX_YAML_DEPTH:
                raise InputError(f"{what} is nested more than {MAX_YAML_DEPTH} levels deep")
            continue
        if isinstance(event, yaml.CollectionEndEvent):
            anchor, size = open_nodes.pop()
        elif isinstance(event, yaml.AliasEvent):
            anchor, size = None, sizes.get(event.anchor, 1)  # one without its anchor is refused by the parser
            if size is None:
                raise InputError(f"{what}: line {event.start_mark.line + 1} holds a value that contains itself")
        elif isinstance(event, yaml.ScalarEvent):
            anchor, size = event.anchor, 1
        else:
            continue
        if anchor is not None:
            sizes[anchor] = size
        if open_nodes:
            open_nodes[-1] = (open_nodes[-1][0], open_nodes[-1][1] + size)
        if size > MAX_YAML_NODES or (open_nodes and open_nodes[-1][1] > MAX_YAML_NODES):
            raise InputError(f"{what} holds more than {MAX_YAML_NODES:,} values (aliases count as often as they stand)")


_XML_ENCODING = re.compile(rb"""^\s*<\?xml[^>]{0,200}?\sencoding\s*=\s*["'](?:x-)?([A-Za-z][\w.-]{0,40})["']""")
# Families of names that text is written in, and no others: Python knows some that take quadratic time (punycode).
_TEXT_ENCODINGS = re.compile(
    r"utf-?8|cp\d|ascii|us-|iso|latin|windows|koi8|mac|ms|gb|hz|big5|shift|s_?jis|euc|ks|johab|tis"
)
_WIDER = {"gb2312": "gb18030", "gbk": "gb18030", "gb_2312-80": "gb18030", "cp936": "gb18030", "ms936": "gb18030"} | {
    **dict.fromkeys(("shift_jis", "shift-jis", "sjis", "s_jis", "ms_kanji"), "cp932"),
    **dict.fromkeys(("euc-kr", "euc_kr", "ks_c_5601-1987"), "cp949"),
}  # what tools write under these names is more than the standards of these names have
_BYTE_ORDER_MARKS = (
    *((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32")),
    *((codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"), (b"<\0", "utf-16-le"), (b"\0<", "utf-16-be")),
)


def decode_xml(content: bytes) -> tuple[str, str | None]:
    """The text of an XML file, and the encoding that it is read in where that isn't the one it states, else None.

    Raises:
        UnicodeDecodeError: it begins as UTF-16 or UTF-32 and goes on as something else.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if content.startswith(mark):
            return content.decode(encoding), None
    found = _XML_ENCODING.match(content)
    stated = found[1].decode().lower() if found else "utf-8"
    if not _TEXT_ENCODINGS.match(stated):
        stated = "utf-8"  # utf-16 among them: its bytes would have looked otherwise
    for encoding in (_WIDER.get(stated, stated), "utf-8", "cp1252"):
        try:
            return content.decode(encoding), None if encoding in (stated, _WIDER.get(stated)) else encoding
        except (UnicodeDecodeError, LookupError):
            continue
    return content.decode("latin-1"), "latin-1"


def parse_xml(text: str) -> "Element":
    """The root element of an XML text; what it says of its encoding doesn't count.

    Raises:
        xml.etree.ElementTree.ParseError: broken. ValueError: it declares entities: a few lines of them can stand for
            gigabytes, or for another file. No labelling tool writes any.
    """
    from xml.etree import ElementTree
    from xml.parsers import expat

    def refuse(name: str, *_: object) -> None:
        raise ValueError(f"it declares the entity {name[:40]!r}; write the text itself")

    text = text.lstrip()  # what stands before the declaration would end the check of entities, and nothing else
    if "DOCTYPE" in text:
        parser = expat.ParserCreate()
        parser.EntityDeclHandler = refuse
        with suppress(expat.ExpatError):  # said below
            parser.Parse(text, True)
    return ElementTree.fromstring(text)


def xml_root_name(path: str | os.PathLike) -> str | None:
    """The name of an XML file's first element, by its first kilobytes; None where none is there."""
    try:
        with open_file(path) as file:
            start = file.read(1 << 16)
    except OSError:
        return None
    text = re.sub("<!--.*?(-->|$)", "", start.replace(b"\0", b"").decode("latin-1"), flags=re.DOTALL)
    found = re.search(r"<([A-Za-z_][\w.:-]{0,100})", text)
    return found[1] if found else None


def parse_csv(text: str) -> list[list[str]]:
    """The rows of a CSV text that a run has written line by line, without a last line that has no end: it may have lost
    digits. Zeros, as a crash of the machine leaves them, are no characters.

    Raises:
        ValueError: broken.
    """
    return list(_rows(text[: text.rfind("\n") + 1].replace("\0", "").splitlines()))


def read_csv(path: str | os.PathLike, most_bytes: int, errors: str = "strict") -> Iterator[list[str]]:
    """The rows of a CSV file, one after another; UTF-8 or UTF-16, with commas, semicolons or tabs, as its first line
    has them.

    Raises:
        OSError: as `open_file`. ValueError: broken, a line of over `MAX_LINE` characters, another encoding.
    """
    with open_file(path, most_bytes) as raw:
        has_mark = raw.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        raw.seek(0)
        with io.TextIOWrapper(raw, "utf-16" if has_mark else "utf-8-sig", errors, newline="") as text:
            lines = _bounded_lines(text)
            first = next(lines, "")
            delimiter = max(",;\t", key=first.count)
            yield from _rows(itertools.chain([first] if first else [], lines), delimiter)


def _bounded_lines(text: io.TextIOWrapper) -> Iterator[str]:
    while line := text.readline(MAX_LINE):
        if len(line) == MAX_LINE:
            raise ValueError(f"it has a line of over {MAX_LINE:,} characters")
        yield line.replace("\0", "")


def _rows(lines: Iterable[str], delimiter: str = ",") -> Iterator[list[str]]:
    try:
        yield from csv.reader(lines, delimiter=delimiter)
    except csv.Error as error:
        raise ValueError(str(error)) from None

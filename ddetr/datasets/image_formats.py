"""Which image files are read: one list, the same for data sets, for `predict FOLDER` and for the audit.

Pillow opens thirty kinds more: no photographs, and EPS is a program that it would let Ghostscript run. What people take
for an image and is not read stands here too, with what makes it readable, so that it is named and not passed over.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Iterable
from contextlib import suppress
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple

from PIL import Image

# Pillow's name of each format that cameras, phones, scanners and the web make -> the suffixes of its files. MPO, of
# cameras with two lenses and of some phones, is JPEG with more images behind the first.
_FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    "PNG": (".png", ".apng"),
    "BMP": (".bmp",),
    "DIB": (".dib",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "WEBP": (".webp",),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "AVIF": (".avif",),
    "HEIF": (".heic", ".heif", ".hif"),
    "JXL": (".jxl",),
    "JPEG2000": (".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"),
    "TGA": (".tga",),
    "QOI": (".qoi",),
    "ICO": (),  # no photographs: read where somebody names one, and not looked for in folders
}


class _Plugin(NamedTuple):
    """A package that brings Pillow a format; it is used where it is installed."""

    format: str
    module: str
    register: str | None  # the function that does it; None where the import does
    cure: str


_PLUGINS = (
    _Plugin("AVIF", "pillow_avif", None, "pip install --upgrade pillow"),  # Pillow has it itself since 11.3
    _Plugin("HEIF", "pillow_heif", "register_heif_opener", "pip install pillow-heif"),
    _Plugin("JXL", "pillow_jxl", None, "pip install pillow-jxl-plugin"),
)

_CONVERT = "convert them to JPEG or PNG"
_DEVELOP = "camera raw files: develop them to JPEG"
_FRAMES = "videos: cut them into frames, ffmpeg -i FILE frame_%06d.jpg"
_SLIDE = "slides and volumes: cut them into tiles or layers, as PNG"
_OTHERS = {
    _DEVELOP: ".dng .cr2 .cr3 .crw .nef .nrw .arw .sr2 .srf .orf .rw2 .raf .pef .srw .3fr .iiq .rwl .x3f .raw",
    _CONVERT: ".psd .psb .xcf .ai .eps .ps .svg .svgz .pdf .wmf .emf .cdr .pcx .sgi .ras .xbm .xpm .dds .jls .jxr .wdp "
    ".bpg .flif .hdr .exr .pfm .pict .pct",
    "DICOM: convert them to PNG, with the window that shows what is to be found": ".dcm .dicom",
    "arrays of numpy: save them as PNG": ".npy .npz",
    "FITS: convert them to PNG, with the scale that shows what is to be found": ".fits .fit .fts",
    _SLIDE: ".svs .ndpi .czi .mrxs .scn .nii .nrrd .mha .mhd",
    _FRAMES: ".mp4 .mov .avi .mkv .webm .m4v .mpg .mpeg .wmv",
}


START_BYTES = 64  # of a file, by which it is known
_CONTENTS = (
    (rb"$", "it is empty"),
    (rb"version https://git-lfs", "it is a pointer of Git LFS: `git lfs pull` fetches the file itself"),
    (rb"\s*<(!doctype|html|head|\?xml)", "it is a web page, as a download that failed leaves: fetch the image again"),
    (rb"\s*[{\[]", "it is text, such as a download that failed leaves: fetch the image again"),
    (rb"\0*$", "all its first bytes are zero, as a copy that was cut off leaves: copy it again"),
    (rb"II[*+]\0|MM\0[*+]", "a TIFF of a kind that Pillow doesn't read, such as several bands: write it as 8-bit RGB"),
)
_BRANDS = ((rb"....ftyp(hei[cmsx]|hev[cmx]|mif1|msf1)", ".heic"), (rb"....ftypavi[fs]", ".avif"))
_BRANDS += ((rb"\xff\x0a|\0\0\0\x0cJXL ", ".jxl"), (rb"%PDF", ".pdf"), (rb"8BPS", ".psd"))


class Unread(NamedTuple):
    """Files of a folder that are images, or hold some, and are not read."""

    suffix: str  # in lower case
    names: list[str]
    is_photo: bool  # of a format that cameras and phones write
    cure: str  # what makes them readable

    @property
    def said(self) -> str:
        return f"{len(self.names):,} {self.suffix} files are not read, such as {self.names[0]}: {self.cure}"


@functools.cache
def known_formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are read here: in this version, with the plug-ins that are installed."""
    Image.init()  # by itself Pillow asks the rarer formats only where no list is given
    for plugin in _PLUGINS:
        if plugin.format not in Image.OPEN and find_spec(plugin.module) is not None:
            with suppress(ImportError, OSError, RuntimeError):  # one that is broken is none
                module = import_module(plugin.module)
                if plugin.register is not None:
                    getattr(module, plugin.register)()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


@functools.cache
def image_suffixes() -> frozenset[str]:
    """The suffixes of files that are read, in lower case."""
    return frozenset(suffix for name in known_formats() for suffix in _FORMATS[name])


_CLUTTER = frozenset(["__macosx", "@eadir", "#recycle", "$recycle.bin", "system volume information", "lost+found"])


def is_clutter(name: str) -> bool:
    """Whether a file or folder of this name is nothing that somebody put into a data set: hidden ones (`._a.jpg` and
    `.ipynb_checkpoints` too), and what archives, network disks and bins leave behind."""
    return name.startswith(".") or name.lower() in _CLUTTER


def is_image_name(name: str) -> bool:
    """Whether a file of this name is taken for an image that is read. Hidden ones are not: macOS leaves a ._NAME.jpg,
    which is none, beside each file."""
    return suffix_of(name) in image_suffixes() and not is_clutter(name)


def suffix_of(name: str) -> str:
    return os.path.splitext(name)[1].lower()


@functools.cache
def unread_suffixes() -> dict[str, tuple[bool, str]]:
    """suffix -> (of a photo, what makes it readable), of what is an image and is not read."""
    found = {suffix: (cure is _DEVELOP, cure) for cure, suffixes in _OTHERS.items() for suffix in suffixes.split()}
    for plugin in _PLUGINS:
        if plugin.format not in known_formats():
            found |= dict.fromkeys(_FORMATS[plugin.format], (True, f"{plugin.cure}, or {_CONVERT}"))
    return found


def said_of_content(start: bytes) -> str:
    """What a file that begins so is where it is no image that is read, and what to do about it; "" for what nobody
    knows. start: its first `START_BYTES`, all where it has fewer."""
    for pattern, said in _CONTENTS:
        if re.match(pattern, start, re.IGNORECASE):
            return said
    kind = next((suffix for pattern, suffix in _BRANDS if re.match(pattern, start, re.DOTALL)), "")
    _, cure = unread_suffixes().get(kind, (False, ""))
    return f"it is what {kind} files are: {cure}" if cure else ""


def is_unread_name(name: str) -> bool:
    """Whether a file of this name is an image, or holds some, and is not read."""
    return suffix_of(name) in unread_suffixes() and not is_clutter(name)


def unread_files(names: Iterable[str]) -> list[Unread]:
    """Those of some file names that are images and are not read, by suffix, the most frequent first."""
    found: dict[str, list[str]] = {}
    for name in names:
        if is_unread_name(os.path.basename(name)):
            found.setdefault(suffix_of(name), []).append(name)
    groups = [Unread(suffix, sorted(group), *unread_suffixes()[suffix]) for suffix, group in found.items()]
    return sorted(groups, key=lambda group: (-len(group.names), group.suffix))

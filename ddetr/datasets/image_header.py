"""What an image file says of itself in its first bytes: size and orientation; nothing is decoded.

JPEG and PNG, which are nearly all of any data set, are parsed here (about 20 us per file: Pillow needs five times that,
and for a PNG without EXIF it decodes the whole image); everything else is asked of Pillow. Both `image_size_hw` and
`read_image` go through this file, so that a size and the pixels can't disagree about orientation.
"""

from __future__ import annotations

import functools
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from ddetr.untrusted import MAX_IMAGE_SEGMENTS

# every JPEG "start of frame"; the three codes left out of C0..CF mean other things
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_STANDALONE_MARKERS = frozenset([0x01, *range(0xD0, 0xD9)])


# What cameras, phones, scanners and the web make. Pillow opens thirty more: EPS is a program, which Ghostscript would
# run. HEIF is there where a plug-in brings it.
_FORMATS = ("JPEG", "PNG", "BMP", "DIB", "GIF", "TIFF", "WEBP", "PPM", "AVIF", "HEIF", "JPEG2000", "TGA", "ICO", "QOI")


@dataclass(frozen=True)
class ImageHeader:
    """Size of the pixels as stored, the EXIF orientation (1..8) that turns them upright, and whether the file is a JPEG
    of the usual kind: 8 bits, grey or three colours."""

    stored_hw: tuple[int, int]
    orientation: int
    is_usual_jpeg: bool = False

    @property
    def upright_hw(self) -> tuple[int, int]:
        return self.stored_hw[::-1] if self.orientation >= 5 else self.stored_hw  # 5..8 swap the axes


def read_header(file: BinaryIO) -> ImageHeader:
    """Reads from the start of an open file; raises OSError or ValueError where it is no image."""
    start = file.read(8)
    file.seek(0)
    try:
        if start[:3] == b"\xff\xd8\xff":
            return _read_jpeg(file)
        if start == b"\x89PNG\r\n\x1a\n":
            return _read_png(file)
    except (struct.error, IndexError):
        raise ValueError("the file ends within its header") from None
    return _ask_pillow(file)


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Pillow's image of a file, of the formats that photographs come in; the one place where ours are opened."""
    return Image.open(file, formats=_known_formats())


@functools.cache
def _known_formats() -> tuple[str, ...]:
    Image.init()  # by itself Pillow asks the rarer formats only where no list is given
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _read_jpeg(file: BinaryIO) -> ImageHeader:
    file.seek(2)
    orientation = 1
    for _ in range(MAX_IMAGE_SEGMENTS):
        marker = file.read(2)
        if len(marker) < 2 or marker[0] != 0xFF:
            raise ValueError("no start of frame: not a complete JPEG")
        if marker[1] == 0xFF:  # a fill byte before a marker is legal
            file.seek(-1, 1)
            continue
        code = marker[1]
        if code in _STANDALONE_MARKERS:
            continue
        length = max(0, struct.unpack(">H", file.read(2))[0] - 2)
        if code in _START_OF_FRAME:
            precision, height, width, components = struct.unpack(">BHHB", file.read(6))
            if not (height and width):
                raise ValueError("the JPEG states no size")
            return ImageHeader((height, width), orientation, precision == 8 and components in (1, 3))
        if code == 0xE1:
            segment = file.read(length)
            if segment[:6] == b"Exif\x00\x00":
                orientation = _exif_orientation(segment[6:])
        else:
            file.seek(length, 1)
    raise ValueError(f"no start of frame in {MAX_IMAGE_SEGMENTS:,} segments")


def _read_png(file: BinaryIO) -> ImageHeader:
    file.seek(8)
    length, name, width, height = struct.unpack(">I4sII", file.read(16))
    if name != b"IHDR" or not (height and width):
        raise ValueError("not a complete PNG")
    file.seek(8 + 8 + length + 4)
    orientation = 1
    for _ in range(MAX_IMAGE_SEGMENTS):
        length, name = struct.unpack(">I4s", file.read(8))
        if name in (b"IDAT", b"IEND"):
            return ImageHeader((height, width), orientation)
        if name == b"eXIf":
            orientation = _exif_orientation(file.read(length))
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)
    raise ValueError(f"no pixels in {MAX_IMAGE_SEGMENTS:,} chunks")


def _exif_orientation(tiff: bytes) -> int:
    """Orientation from an EXIF block, 1 where it has none or is malformed (viewers do the same)."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        offset = struct.unpack_from(order + "I", tiff, 4)[0]
        for i in range(struct.unpack_from(order + "H", tiff, offset)[0]):
            tag, kind, _count, value = struct.unpack_from(order + "HHIH", tiff, offset + 2 + 12 * i)
            if tag == ExifTags.Base.Orientation:
                return value if kind == 3 and 1 <= value <= 8 else 1  # kind 3: a 16-bit number
    except struct.error:
        pass
    return 1


def _ask_pillow(file: BinaryIO) -> ImageHeader:
    with open_image(file) as image:
        width, height = image.size
        # Pillow turns a TIFF itself as it loads it, and states the upright size before
        orientation = 1 if image.format == "TIFF" else image.getexif().get(ExifTags.Base.Orientation, 1)
    return ImageHeader((height, width), orientation if orientation in range(1, 9) else 1)

"""What an image file says of itself in its first bytes: size and orientation; nothing is decoded.

JPEG and PNG, which are nearly all of any data set, are parsed here (about 20 us per file: Pillow needs five times that,
and for a PNG without EXIF it decodes the whole image); everything else is asked of Pillow. Both `image_size_hw` and
`read_image` go through this file, so that a size and the pixels can't disagree about orientation.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image

from ddetr.datasets.image_formats import known_formats
from ddetr.untrusted import MAX_IMAGE_SEGMENTS

# every JPEG "start of frame"; the three codes left out of C0..CF mean other things
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_EXIF_MARK = b"Exif\x00\x00"
_NUMBERS = {3: "H", 4: "I", 8: "h", 9: "i"}  # EXIF's kinds of whole numbers; the standard says 3
_STANDALONE_MARKERS = frozenset([0x01, *range(0xD0, 0xD9)])

PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_WORDS = frozenset([b"tEXt", b"zTXt", b"iTXt", b"iCCP"])  # chunks that say something about the pixels
_TAIL_BYTES = 1 << 16  # of a PNG, in which an orientation behind the pixels is looked for

_TIFF_WIDTH, _TIFF_HEIGHT = ExifTags.Base.ImageWidth, ExifTags.Base.ImageLength


@dataclass(frozen=True, slots=True)
class ImageHeader:
    """Size of the pixels as stored, the EXIF orientation (1..8) that turns them upright, whether the file is a JPEG of
    the usual kind (8 bits, grey or three colours), and whether Pillow has turned the pixels once it has loaded them."""

    stored_hw: tuple[int, int]
    orientation: int
    is_usual_jpeg: bool = False
    is_turned_by_pillow: bool = False

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
        if start == PNG_START:
            return _read_png(file)
    except (struct.error, IndexError):
        raise ValueError("the file ends within its header") from None
    return _ask_pillow(file)


def open_image(file: BinaryIO | Path) -> Image.Image:
    """Pillow's image of a file, of the formats that photographs come in; the one place where ours are opened."""
    return Image.open(file, formats=known_formats())


def png_without_words(data: bytes) -> bytes:
    """A PNG without its texts and its colour profile, of which Pillow refuses those above a megabyte: they change no
    pixel."""
    parts, place = [data[: len(PNG_START)]], len(PNG_START)
    for _ in range(MAX_IMAGE_SEGMENTS):
        length, name = int.from_bytes(data[place : place + 4], "big"), data[place + 4 : place + 8]
        if not name:
            break
        end = place + 12 + length
        if name not in _PNG_WORDS:
            parts.append(data[place:end])
        place = end
    return b"".join(parts)


def pillow_orientation(image: Image.Image) -> int:
    """The orientation (1..8) that turns what Pillow has decoded upright, by EXIF alone, as for a file.

    Pillow takes XMP's where EXIF has none, which viewers don't; a TIFF it has turned by either once it is loaded.
    """
    try:
        said = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # of damaged EXIF it raises anything
        return 1
    if said not in range(2, 9):
        return 1
    written = image.info.get("exif")
    is_of_file = isinstance(written, bytes) and _exif_orientation(written.removeprefix(_EXIF_MARK)) == said
    return said if is_of_file or not _is_of_xmp(image, said) else 1


def _is_of_xmp(image: Image.Image, said: int) -> bool:
    """Whether Pillow can have taken this orientation out of XMP."""
    for name in ("XML:com.adobe.xmp", "xmp"):
        text = image.info.get(name)
        text = text.decode("utf-8", "replace") if isinstance(text, bytes) else text
        if isinstance(text, str) and re.search(rf"tiff:Orientation(=\"|>){said}", text):
            return True
    return False


def _read_jpeg(file: BinaryIO) -> ImageHeader:
    file.seek(2)
    orientation = None
    for _ in range(MAX_IMAGE_SEGMENTS):
        marker = file.read(2)
        if len(marker) < 2:
            raise ValueError("no start of frame: not a complete JPEG")
        if marker[0] != 0xFF or marker[1] == 0xFF:  # stray bytes, which decoders pass over; fill bytes are legal
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
            return ImageHeader((height, width), orientation or 1, precision == 8 and components in (1, 3))
        if code == 0xE1:
            segment = file.read(length)
            if segment.startswith(_EXIF_MARK) and orientation is None:  # of several the first counts, as for Pillow
                orientation = _exif_orientation(segment.removeprefix(_EXIF_MARK))
        else:
            file.seek(length, 1)
    raise ValueError(f"no start of frame in {MAX_IMAGE_SEGMENTS:,} segments")


def _read_png(file: BinaryIO) -> ImageHeader:
    file.seek(8)
    length, name, width, height = struct.unpack(">I4sII", file.read(16))
    if name != b"IHDR" or not (height and width):
        raise ValueError("not a complete PNG")
    file.seek(8 + 8 + length + 4)
    for _ in range(MAX_IMAGE_SEGMENTS):
        length, name = struct.unpack(">I4s", file.read(8))
        if name in (b"IDAT", b"IEND"):
            return ImageHeader((height, width), _trailing_orientation(file))
        if name == b"eXIf":
            return ImageHeader((height, width), _exif_orientation(file.read(length).removeprefix(_EXIF_MARK)))
        file.seek(length + 4, 1)
    raise ValueError(f"no pixels in {MAX_IMAGE_SEGMENTS:,} chunks")


def _trailing_orientation(file: BinaryIO) -> int:
    """Of a PNG whose EXIF stands behind its pixels, which is legal: looked for in the end of the file, since walking
    there would be to read all of it."""
    file.seek(max(0, file.seek(0, 2) - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
    place = tail.rfind(b"eXIf")
    if place < 4:
        return 1
    end = place + 4 + int.from_bytes(tail[place - 4 : place], "big")
    if end + 4 > len(tail) or zlib.crc32(tail[place:end]) != int.from_bytes(tail[end : end + 4], "big"):
        return 1  # pixels that look like it
    return _exif_orientation(tail[place + 4 : end].removeprefix(_EXIF_MARK))


def _exif_orientation(tiff: bytes) -> int:
    """Orientation from an EXIF block, 1 where it has none or is malformed (viewers do the same)."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    try:
        offset = struct.unpack_from(order + "I", tiff, 4)[0]
        for i in range(struct.unpack_from(order + "H", tiff, offset)[0]):
            entry = offset + 2 + 12 * i
            tag, kind, count = struct.unpack_from(order + "HHI", tiff, entry)
            if tag == ExifTags.Base.Orientation:
                number = _NUMBERS.get(kind)
                if number is None or not 1 <= count <= 4 // struct.calcsize(order + number):
                    return 1
                value = struct.unpack_from(order + number, tiff, entry + 8)[0]
                return value if value in range(1, 9) else 1
    except struct.error:
        pass
    return 1


def _ask_pillow(file: BinaryIO) -> ImageHeader:
    with open_image(file) as image:
        if image.format == "TIFF":  # Pillow turns it as it loads it, and some versions state the upright size before
            stored_hw = (image.tag_v2[_TIFF_HEIGHT], image.tag_v2[_TIFF_WIDTH])
            said = image.getexif().get(ExifTags.Base.Orientation, 1)  # XMP's too: so does Pillow
            return ImageHeader(stored_hw, said if said in range(1, 9) else 1, is_turned_by_pillow=True)
        width, height = image.size
        return ImageHeader((height, width), pillow_orientation(image))

"""The decode policy: an image file, or a Pillow image, to upright 8-bit RGB; one function each, used everywhere.

| file                       | what is done                                                                            |
|----------------------------|-----------------------------------------------------------------------------------------|
| EXIF orientation           | applied: images come upright, as every viewer shows them                                |
| greyscale                  | the one channel three times                                                             |
| palette                    | its colours                                                                             |
| RGBA, transparency         | laid over white, as browsers and labelling tools show it; hidden colours stay hidden    |
| 16-bit greyscale           | divided by 257, so that 65,535 is 255; never stretched by the content of a single image |
| TIFF that states 12 bits   | the same by what it states: 4,095 is 255                                                |
| CMYK                       | converted to RGB by Pillow                                                              |
| several frames             | the first                                                                               |
| EPS, PSD, FITS and others  | refused: no photographs, and for EPS Pillow would run a program                         |
| float or 32-bit pixels     | refused: there is no scale that is right for all                                        |
| truncated, corrupt, absent | `InputError` naming the file; half an image is never used                               |

Pillow decodes, except for JPEGs of the usual kind: torchvision's decoder gives the same pixels in four fifths of the
time. It is deprecated since torchvision 0.29, so it is used where it is there and agrees with Pillow on a small
picture, and Pillow decodes everything where it does not. What it refuses is left to Pillow too, whose message is the
one that people see. Tensors keep the decoder's interleaved memory: (3, h, w) with channels-last strides, which
torchvision resizes twice as fast as contiguous ones.
"""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Callable
from os import PathLike

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ddetr.datasets.image_formats import START_BYTES, said_of_content, suffix_of, unread_suffixes
from ddetr.datasets.image_header import (
    PNG_START,
    ImageHeader,
    open_image,
    pillow_orientation,
    png_without_words,
    read_header,
)
from ddetr.errors import InputError
from ddetr.untrusted import MAX_IMAGE_BYTES, open_file, read_bytes

_EXIF_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BACK = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}  # the other turns undo themselves


def image_header(path: str | PathLike) -> ImageHeader:
    """Size and orientation from the first bytes; `InputError` where there is no readable image."""
    start = b""
    try:
        with open_file(path, MAX_IMAGE_BYTES) as file:
            start = file.read(START_BYTES)
            file.seek(0)
            return read_header(file)
    except _DECODE_ERRORS as error:
        raise _unreadable(path, error, start) from error


def image_size_hw(path: str | PathLike) -> tuple[int, int]:
    """(height, width) in pixels of the upright image; nothing is decoded."""
    return image_header(path).upright_hw


def read_image(path: str | PathLike, size_hw: tuple[int, int] | None = None) -> Tensor:
    """(3, h, w) uint8 RGB, upright.

    size_hw: the frame that the caller's boxes live in. Where it is the stored frame of an image that EXIF rotates by a
    quarter turn, the stored pixels are returned: somebody annotated them with a tool that ignores EXIF. Any other
    disagreement raises `InputError`.
    """
    try:
        data = read_bytes(path, MAX_IMAGE_BYTES)
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise _unreadable(path, error) from error
    return decode_image(data, path, size_hw)


def decode_image(data: bytes, path: str | PathLike, size_hw: tuple[int, int] | None = None) -> Tensor:
    """The same of a file's bytes; `path` is for messages."""
    try:
        header = read_header(io.BytesIO(data))
        is_stored = size_hw is not None and header.upright_hw != tuple(size_hw)
        if is_stored and header.stored_hw != tuple(size_hw):
            raise InputError(size_mismatch(path, header.upright_hw, size_hw))
        turn = _EXIF_TURNS.get(header.orientation)
        if header.is_turned_by_pillow:
            turn = _BACK.get(header.orientation, turn) if is_stored else None
        elif is_stored:
            turn = None
        if header.is_usual_jpeg and (pixels := _decode_jpeg(data, header)) is not None:
            return pixels if turn is None else _to_tensor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), turn)
        return _decode_by_pillow(data, turn)
    except _DECODE_ERRORS as error:
        raise error if isinstance(error, InputError) else _unreadable(path, error, data[:START_BYTES]) from error


def _decode_by_pillow(data: bytes, turn: Image.Transpose | None) -> Tensor:
    try:
        with open_image(io.BytesIO(data)) as image:
            return _to_tensor(_pillow_to_rgb(image), turn)
    except ValueError:  # of a PNG with long texts
        if not data.startswith(PNG_START):
            raise
    with open_image(io.BytesIO(png_without_words(data))) as image:
        return _to_tensor(_pillow_to_rgb(image), turn)


def _decode_jpeg(data: bytes, header: ImageHeader) -> Tensor | None:
    """(3, h, w) as stored, or None where Pillow has to do it or to say what is wrong."""
    decode = fast_jpeg_decoder()
    largest = Image.MAX_IMAGE_PIXELS
    if decode is None or (largest is not None and math.prod(header.stored_hw) > largest):  # Pillow warns or refuses
        return None
    try:
        pixels = decode(data)
    except RuntimeError:
        return None
    return pixels if tuple(pixels.shape) == (3, *header.stored_hw) else None


@functools.cache
def fast_jpeg_decoder() -> Callable[[bytes], Tensor] | None:
    """torchvision's decoder, JPEG bytes -> (3, h, w) RGB in interleaved memory; None where it is absent or not
    Pillow's equal.

    It is the operator beneath `torchvision.io.decode_jpeg`, which warns at each call since 0.29.
    """
    import torchvision.io  # noqa: F401  (registers the operator)

    def decode(data: bytes) -> Tensor:
        pixels = torch.ops.image.decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), 3, False)  # 3: RGB
        return (
            pixels.permute(1, 2, 0).contiguous().permute(2, 0, 1)
        )  # a copy only if another version is not interleaved

    ramp = np.linspace(0, 255, 24 * 40 * 3).reshape(24, 40, 3).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(ramp).save(file, "JPEG", quality=90)
    try:
        found = decode(file.getvalue()).permute(1, 2, 0).numpy()
    except (RuntimeError, AttributeError):
        return None
    with open_image(file) as image:
        return decode if np.array_equal(found, np.asarray(image)) else None


def rgb_from_pillow(image: Image.Image) -> Tensor:
    """(3, h, w) uint8 RGB, upright, of an image that Pillow has opened: the same policy as for a file."""
    try:
        image.load()  # first: Pillow turns a TIFF while loading, and finds a PNG's EXIF behind the pixels
        return _to_tensor(_pillow_to_rgb(image), _EXIF_TURNS.get(pillow_orientation(image)))
    except _DECODE_ERRORS as error:
        raise _unreadable(getattr(image, "filename", "") or "the image", error) from error


def size_mismatch(path: str | PathLike, actual_hw: tuple[int, int], expected_hw: tuple[int, int]) -> str:
    (height, width), (expected_height, expected_width) = actual_hw, expected_hw
    return (
        f"{path} is {width} x {height} pixels, but its annotations are for {expected_width} x {expected_height}: the "
        "image was resized or replaced after it was annotated. Restore it or correct the annotations."
    )


# What Pillow, libjpeg and libpng raise for files that are not what they claim; SyntaxError is Pillow's for broken PNGs
_DECODE_ERRORS = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, Image.DecompressionBombError)


_OTHER_TIFF = "if it has more than 4 bands, or several of 16 bits, save it with three of 8 bits"


def _unreadable(path: str | PathLike, error: Exception, start: bytes | None = None) -> InputError:
    """start: the first bytes of the file, where they were read."""
    if isinstance(error, FileNotFoundError):
        return InputError(f"there is no image {path}")
    if isinstance(error, Image.UnidentifiedImageError):
        suffix = suffix_of(str(path))
        _, cure = unread_suffixes().get(suffix, (False, ""))
        said = cure or ("" if start is None else said_of_content(start))
        said = said or (_OTHER_TIFF if suffix in (".tif", ".tiff") else "")
        return InputError(f"{path} can't be read: it is no image of a known format{f' ({said})' if said else ''}")
    said = getattr(error, "strerror", None) or str(error)  # of an OSError without number and name
    reason = (said.strip().splitlines() or [type(error).__name__])[0]
    return InputError(f"{path} can't be read: {reason}")


def _pillow_to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in ("I", "F") or image.mode.startswith("I;"):
        pixels = np.asarray(image)
        if image.mode == "F" or (image.mode == "I" and pixels.max(initial=0) > 65535):
            kind = "float" if image.mode == "F" else "32-bit"
            raise ValueError(f"it has {kind} pixels, whose scale is unknown; convert it to 8 or 16 bits.")
        bits = getattr(image, "tag_v2", {}).get(ExifTags.Base.BitsPerSample, (16,))
        most = 4095 if bits == (12,) else 65535
        image = Image.fromarray((pixels.clip(0, most).astype(np.uint32) * 255 // most).astype(np.uint8))
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _to_tensor(image: Image.Image, turn: Image.Transpose | None) -> Tensor:
    pixels = np.array(image if turn is None else image.transpose(turn))  # a copy: Pillow's memory is read-only
    return torch.from_numpy(pixels).permute(2, 0, 1)

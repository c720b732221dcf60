import io
import struct
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from drawn_sets import draw_photo
from PIL import Image, ImageOps

from ddetr.datasets import images
from ddetr.datasets.images import image_header, image_size_hw, read_image, rgb_from_pillow
from ddetr.errors import InputError

RAMP = np.linspace(0, 255, 24 * 16 * 3).reshape(16, 24, 3).astype(np.uint8)  # 24 wide, 16 high


def as_array(image: torch.Tensor) -> np.ndarray:
    assert image.dtype == torch.uint8
    return image.permute(1, 2, 0).numpy()


def test_plain_files_decode_to_pillows_pixels(tmp_path):
    for name in ("a.jpg", "a.png", "a.bmp", "a.webp", "a.gif", "a.tif"):
        Image.fromarray(RAMP).save(tmp_path / name)
        with Image.open(tmp_path / name) as image:
            want = np.asarray(image.convert("RGB"))
        np.testing.assert_array_equal(as_array(read_image(tmp_path / name)), want, err_msg=name)
        assert image_size_hw(tmp_path / name) == (16, 24)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path, suffix, orientation):
    exif = Image.Exif()
    exif[0x010E] = "a description before the orientation's place, of more than four bytes"
    exif[0x0112] = orientation
    path = tmp_path / f"turned.{suffix}"
    Image.fromarray(RAMP).save(path, exif=exif)
    with Image.open(path) as image:
        want = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    np.testing.assert_array_equal(as_array(read_image(path)), want)
    assert image_size_hw(path) == want.shape[:2]
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_array(rgb_from_pillow(image)), want)


def test_boxes_drawn_on_stored_pixels_get_the_stored_pixels(tmp_path, write_image):
    path = write_image(tmp_path / "a.jpg", size_wh=(24, 16), orientation=6)
    assert image_size_hw(path) == (24, 16)
    assert read_image(path, (24, 16)).shape == (3, 24, 16)
    stored = read_image(path, (16, 24))
    with Image.open(path) as image:
        np.testing.assert_array_equal(as_array(stored), np.asarray(image))


def test_another_size_than_annotated_is_refused(tmp_path, write_image):
    path = write_image(tmp_path / "a.jpg", size_wh=(24, 16))
    with pytest.raises(InputError, match=r"a\.jpg is 24 x 16 pixels, but its annotations are for 48 x 32"):
        read_image(path, (32, 48))


def test_greyscale_is_the_channel_three_times(tmp_path):
    for name in ("grey.jpg", "grey.png"):
        Image.fromarray(RAMP[..., 0]).save(tmp_path / name)
        image = read_image(tmp_path / name)
        assert torch.equal(image[0], image[1])
        assert torch.equal(image[0], image[2])
    np.testing.assert_array_equal(image[0].numpy(), RAMP[..., 0])


def test_one_bit_and_palette_images_give_their_colours(tmp_path):
    palette = Image.new("P", (3, 1))
    palette.putpalette([0, 0, 0, 10, 20, 30, 250, 240, 230])
    palette.putdata([0, 1, 2])
    palette.save(tmp_path / "palette.png")
    assert as_array(read_image(tmp_path / "palette.png"))[0].tolist() == [[0, 0, 0], [10, 20, 30], [250, 240, 230]]
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "bits.png")
    assert as_array(read_image(tmp_path / "bits.png"))[0].tolist() == [[255] * 3, [0] * 3]


def test_transparency_is_laid_over_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [0, 0, 0, 128]]], dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "rgba.png")
    got = as_array(read_image(tmp_path / "rgba.png"))[0].tolist()
    assert got[:2] == [[10, 20, 30], [255, 255, 255]]
    assert got[2] == pytest.approx([127] * 3, abs=1)
    Image.fromarray(np.array([[[50, 0], [50, 255]]], dtype=np.uint8), mode=None).save(tmp_path / "la.png")
    assert as_array(read_image(tmp_path / "la.png"))[0].tolist() == [[255] * 3, [50] * 3]
    Image.fromarray(pixels[..., :3]).save(tmp_path / "key.png", transparency=(10, 20, 30))
    assert as_array(read_image(tmp_path / "key.png"))[0].tolist() == [[255] * 3, [255] * 3, [0] * 3]


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_divided_by_257(tmp_path, suffix):
    Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16)).save(tmp_path / f"deep.{suffix}")
    assert as_array(read_image(tmp_path / f"deep.{suffix}"))[0, :, 1].tolist() == [0, 1, 128, 255]


def test_twelve_bits_are_divided_where_the_file_states_them(tmp_path):
    values = [0, 17, 2048, 4095]
    packed = sum(value << 12 * (3 - i) for i, value in enumerate(values)).to_bytes(6, "big")
    tags = [(256, 4), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (278, 1), (279, 6)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    ifd = struct.pack("<H", len(tags)) + entries + bytes(4)
    (tmp_path / "deep.tif").write_bytes(b"II*\0" + struct.pack("<I", 14) + packed + ifd)
    for pixels in (read_image(tmp_path / "deep.tif"), rgb_from_pillow(Image.open(tmp_path / "deep.tif"))):
        assert as_array(pixels)[0, :, 1].tolist() == [0, 1, 127, 255]


def test_float_and_32_bit_pixels_are_refused(tmp_path):
    Image.fromarray(np.array([[0.5, 0.7]], dtype=np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(InputError, match=r"float\.tif can't be read: it has float pixels"):
        read_image(tmp_path / "float.tif")
    Image.fromarray(np.array([[1, 1 << 20]], dtype=np.int32)).save(tmp_path / "int.tif")
    with pytest.raises(InputError, match=r"int\.tif can't be read: it has 32-bit pixels"):
        read_image(tmp_path / "int.tif")


def test_cmyk_is_converted(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg", quality=95)
    red, green, blue = as_array(read_image(tmp_path / "cmyk.jpg"))[4, 4].tolist()
    assert red > 240
    assert green < 15
    assert blue < 15


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.webp", "a.tif", "a.bmp"])
@pytest.mark.parametrize("keep", [0.7, 0.3, 40, 10, 2, 0])
def test_truncated_files_raise_and_are_named(tmp_path, write_image, name, keep):
    path = write_image(tmp_path / name, size_wh=(256, 192))
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    with pytest.raises(InputError, match=name.replace(".", r"\.")):
        read_image(path)


def test_what_is_no_image_says_so(tmp_path):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    with pytest.raises(InputError, match=r"a\.jpg can't be read: it is no image of a known format"):
        read_image(tmp_path / "a.jpg")
    (tmp_path / "a.tif").write_text("18 bands")
    with pytest.raises(InputError, match=r"known format \(if it has more than 4 bands"):
        read_image(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"there is no image .*absent\.jpg"):
        read_image(tmp_path / "absent.jpg")
    with pytest.raises(InputError, match=r"there is no image"):
        image_size_hw(tmp_path / "absent.jpg")
    with pytest.raises(InputError, match="can't be read"):
        image_header(tmp_path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", r"format \(it is empty\)"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a pointer of Git LFS: `git lfs pull`"),
        (b"\n<!DOCTYPE html><html>404</html>", "a web page, as a download that failed leaves"),
        (b'{"error": "rate limit"}', "it is text"),
        (bytes(300), "first bytes are zero"),
        (b"II*\0\x08" + bytes(9), "a TIFF of a kind that Pillow doesn't read"),
        (b"%PDF-1.7", r"it is what \.pdf files are: convert them"),
        (b"no idea", "format$"),
    ],
)
def test_what_is_in_a_file_that_is_no_image(tmp_path, content, said):
    (tmp_path / "a.jpg").write_bytes(content)
    for read in (read_image, image_header):
        with pytest.raises(InputError, match=f"it is no image of a known {said}" if "format" in said else said):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize("is_last", [False, True])
@pytest.mark.parametrize("words", [b"iTXt", b"zTXt", b"iCCP"])
def test_long_texts_of_a_png_are_passed_over(tmp_path, words, is_last):
    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    text = zlib.compress(bytes(2**21))
    long = chunk(words, b"x\0\1\0\0\0" + text if words == b"iTXt" else b"x\0\0" + text)
    file = io.BytesIO()
    Image.fromarray(RAMP).save(file, "PNG")
    data = file.getvalue()
    place = len(data) - 12 if is_last else 33  # before the end, or behind the header
    (tmp_path / "a.png").write_bytes(data[:place] + long + data[place:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png").permute(1, 2, 0).numpy(), RAMP)


def test_size_is_found_behind_a_long_header(tmp_path):
    path = tmp_path / "long.jpg"
    Image.fromarray(RAMP).save(path, icc_profile=bytes(200_000), comment=b"x" * 60_000)
    assert image_size_hw(path) == (16, 24)
    assert read_image(path).shape == (3, 16, 24)


@pytest.fixture(params=["drawn", "real"])
def jpegs(request, drawn_coco, cells):
    """Files of several sizes and kinds; and some that cameras made, where these are."""
    if request.param == "drawn":
        return [*sorted(drawn_coco.glob("*/*.jpg")), *sorted((cells / "JPEGImages").iterdir())[:3]]
    root = request.getfixturevalue("shared_data")
    return [*sorted((root / "coco_tiny").glob("*/*.jpg"))[:20], *sorted((root / "bccd/JPEGImages").iterdir())[:3]]


def test_headers_of_jpegs_agree_with_pillow(jpegs):
    for path in jpegs:
        with Image.open(path) as image:
            assert image_size_hw(path) == image.size[::-1]


# ---- both decoders of JPEG files -------------------------------------------------------------------------------------


def outcome(path, monkeypatch, fast):
    """The pixels, or the message; of torchvision's decoder or of Pillow alone."""
    with monkeypatch.context() as patch:
        if not fast:
            patch.setattr(images, "fast_jpeg_decoder", lambda: None)
        try:
            return as_array(read_image(path)).tobytes()
        except InputError as error:
            return str(error)


def damaged(data, rng):
    """A few ways in which files are broken: cut, bytes changed, a piece missing, something else appended."""
    bytes_changed = bytearray(data)
    for place in rng.integers(len(data) // 2, len(data), 6):
        bytes_changed[place] = rng.integers(256)
    middle = len(data) // 2
    yield from (data[: len(data) - 2], data[: int(0.6 * len(data))], data[:200], bytes(bytes_changed))
    yield from (
        data[:middle] + data[middle + 500 :],
        data + b"and more",
        data[:middle] + bytes(64) + data[middle + 64 :],
    )


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_torchvisions_decoder_keeps_the_policy(tmp_path, monkeypatch):
    assert images.fast_jpeg_decoder() is not None, "this torchvision has no decoder that agrees with Pillow"
    photo = draw_photo((197, 150), seed=0)
    exif = Image.Exif()
    exif[0x0112] = 6
    kinds = {
        "plain": (photo, {}),
        "progressive": (photo, {"progressive": True}),
        "420": (photo, {"subsampling": 2, "quality": 60}),
        "422": (photo, {"subsampling": 1}),
        "444": (photo, {"subsampling": 0, "quality": 98}),
        "rgb": (photo, {"keep_rgb": True}),
        "grey": (photo.convert("L"), {}),
        "cmyk": (photo.convert("CMYK"), {}),
        "turned": (photo, {"exif": exif}),
        "one": (photo.crop((0, 0, 1, 1)), {}),
    }
    rng = np.random.default_rng(0)
    decoded = 0
    for name, (image, options) in kinds.items():
        path = tmp_path / f"{name}.jpg"
        image.save(path, **options)
        for number, data in enumerate([path.read_bytes(), *damaged(path.read_bytes(), rng)]):
            path.write_bytes(data)
            fast, slow = (outcome(path, monkeypatch, fast=fast) for fast in (True, False))
            if number and isinstance(fast, bytes) and isinstance(slow, bytes):
                # What is left of a damaged image, two versions of libjpeg may smooth differently.
                assert len(fast) == len(slow), f"{name}, damage {number}"
            else:
                assert fast == slow, f"{name}, damage {number}"
            assert number or not isinstance(fast, str), fast
            decoded += not isinstance(fast, str)
    assert len(kinds) < decoded < 8 * len(kinds)


def test_stray_bytes_between_the_segments_of_a_jpeg(tmp_path, write_image):
    """Decoders pass over them ("extraneous bytes before marker")."""
    content = write_image(tmp_path / "a.jpg").read_bytes()
    place = content.index(b"\xff\xdb")
    for stray in (b"\0", b"\x01\x02\xff"):
        (tmp_path / "b.jpg").write_bytes(content[:place] + stray + content[place:])
        assert image_size_hw(tmp_path / "b.jpg") == image_size_hw(tmp_path / "a.jpg")
        assert torch.equal(read_image(tmp_path / "b.jpg"), read_image(tmp_path / "a.jpg"))


def test_jpegs_are_pillows_to_the_bit(jpegs):
    for path in jpegs:
        with Image.open(path) as image:
            np.testing.assert_array_equal(as_array(read_image(path)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("wrong", ["absent", "other pixels", "refuses"])
def test_pillow_decodes_where_torchvision_does_not(tmp_path, monkeypatch, write_image, wrong):
    path = write_image(tmp_path / "a.jpg")
    want = as_array(read_image(path))

    def decode(data, mode, apply_exif):
        if wrong == "refuses":
            raise RuntimeError("no")
        return torch.zeros(3, 24, 40, dtype=torch.uint8)

    operators = SimpleNamespace() if wrong == "absent" else SimpleNamespace(decode_jpeg=decode)
    monkeypatch.setattr(torch.ops, "image", operators)
    images.fast_jpeg_decoder.cache_clear()
    try:
        assert images.fast_jpeg_decoder() is None
        np.testing.assert_array_equal(as_array(read_image(path)), want)
    finally:
        images.fast_jpeg_decoder.cache_clear()


def test_decoding_a_jpeg_says_nothing(tmp_path, write_image, recwarn):
    """torchvision announces the end of its decoders at each call of the public function."""
    read_image(write_image(tmp_path / "a.jpg"))
    assert not recwarn.list


def test_images_are_interleaved_in_memory(tmp_path, write_image):
    for name in ("a.jpg", "a.png"):
        assert read_image(write_image(tmp_path / name)).stride() == (1, 64 * 3, 3)
    assert read_image(write_image(tmp_path / "turned.jpg", orientation=6)).stride() == (1, 48 * 3, 3)


def test_enormous_jpegs_stay_pillows_business(tmp_path, monkeypatch, write_image):
    """Its limit on pixels protects against files that claim to be huge."""
    path = write_image(tmp_path / "a.jpg", size_wh=(64, 48))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(InputError, match="exceeds limit"):
        read_image(path)

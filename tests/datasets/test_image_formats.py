"""Which files are images, the same everywhere; and that a path and an open image agree on which way is up."""

import struct
import sys
import zlib
from types import ModuleType

import numpy as np
import pytest
from PIL import Image, features

from ddetr.datasets import image_formats, load_annotations
from ddetr.datasets.image_formats import image_suffixes, is_image_name, known_formats, unread_files
from ddetr.datasets.images import image_header, read_image, rgb_from_pillow
from ddetr.errors import InputError

RAMP = np.linspace(0, 255, 24 * 16 * 3).reshape(16, 24, 3).astype(np.uint8)  # 24 wide, 16 high
XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'


@pytest.fixture
def plugin(monkeypatch):
    """A package that brings Pillow HEIF, as pillow-heif does."""

    def install(*, works=True):
        module = ModuleType("pillow_heif")
        module.__spec__ = object()

        def register():
            if not works:
                raise ImportError("libheif.so is gone")
            monkeypatch.setitem(Image.OPEN, "HEIF", (lambda file, name: None, lambda start: False))

        module.register_heif_opener = register
        monkeypatch.setitem(sys.modules, "pillow_heif", module)

    caches = (image_formats.known_formats, image_formats.image_suffixes, image_formats.unread_suffixes)
    for cache in caches:
        cache.cache_clear()
    yield install
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


def test_what_is_listed_is_what_pillow_opens(tmp_path):
    options = {".j2c": {"format": "JPEG2000"}, ".mpo": {"format": "MPO"}}
    written = 0
    for suffix in sorted(image_suffixes()):
        path = tmp_path / f"a{suffix}"
        try:
            Image.fromarray(RAMP).save(path, **options.get(suffix, {}))
        except (KeyError, ValueError):  # Pillow reads these and does not write them
            continue
        assert read_image(path).shape == (3, 16, 24), suffix
        written += 1
    assert written >= 20
    assert {".jpg", ".png", ".mpo", ".tif", ".jp2", ".pbm"} <= image_suffixes()
    assert not {"EPS", "PSD", "FITS", "WMF"} & set(known_formats())


def test_programs_are_never_opened(tmp_path):
    Image.fromarray(RAMP).save(tmp_path / "a.eps")
    (tmp_path / "a.eps").rename(tmp_path / "a.jpg")
    with pytest.raises(InputError, match="no image of a known format"):
        read_image(tmp_path / "a.jpg")
    assert not is_image_name("a.eps")


def test_a_plug_in_is_used_where_it_is_installed(plugin):
    plugin()
    assert is_image_name("IMG_0001.HEIC")
    assert not unread_files(["IMG_0001.HEIC"])


def test_a_plug_in_that_is_broken_is_none(plugin):
    plugin(works=False)
    assert not is_image_name("IMG_0001.HEIC")


def test_what_is_not_read_is_named_with_its_cure(plugin, monkeypatch, tmp_path):
    monkeypatch.setattr(image_formats, "find_spec", lambda name: None)
    names = ["a/IMG_1.HEIC", "a/IMG_2.heic", "b.CR2", "c.psd", "d.jpg", "e.txt", "._f.heic", "g.mp4"]
    found = {unread.suffix: unread for unread in unread_files(names)}
    assert list(found) == [".heic", ".cr2", ".mp4", ".psd"]
    assert found[".heic"].names == ["a/IMG_1.HEIC", "a/IMG_2.heic"]
    assert "pip install pillow-heif" in found[".heic"].cure
    assert [unread.is_photo for unread in found.values()] == [True, True, False, False]
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic")
    with pytest.raises(InputError, match=r"a\.heic can't be read: .*pip install pillow-heif"):
        read_image(tmp_path / "a.heic")


def test_no_suffix_is_both_read_and_not_read():
    assert not image_suffixes() & image_formats.unread_suffixes().keys()


def test_a_yolo_set_with_other_photos_names_them(make_yolo, kinds):
    root = make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"})
    for name in ("b.dng", "c.psd", "._d.dng"):
        (root / "images/train" / name).write_bytes(b"x")
    annotations = load_annotations(root, "train")
    assert [(f.action, f.count) for f in annotations.findings if f.kind == "image-not-read"] == [
        ("dropped", 1),
        ("note", 1),
    ]
    assert annotations.num_images_left_out == 1


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read_in_every_format(make_yolo, make_coco, write_image):
    root = make_yolo({"images/train/a.jpg": "0 .5 .5 .2 .2"})
    write_image(root / "images/train/phone.avif")
    assert len(load_annotations(root, "train").images) == 2
    root = make_coco(edit=lambda content: content["images"][0].update(file_name="1.avif"))
    (root / "train/1.jpg").unlink()
    write_image(root / "train/1.avif")
    assert [record.path.name for record in load_annotations(root, "train").images] == ["1.avif", "2.jpg"]


def test_coco_and_voc_name_what_lies_beside_the_images(make_coco, make_voc):
    from dataset_parts import voc_object, voc_xml

    for root, split, folder in (
        (make_coco(), "train", "train"),
        (make_voc({"a": voc_xml([voc_object()])}), "train", "JPEGImages"),
    ):
        (root / folder / "x.nef").write_bytes(b"x")
        [found] = [f for f in load_annotations(root, split).findings if f.kind == "image-not-read"]
        assert (found.action, found.count) == ("note", 1)
        assert "x.nef" in found.message


# ---- which way is up -------------------------------------------------------------------------------------------------


def assert_agree(path):
    """The path, the image as Pillow has opened, loaded, copied and converted it, and the header."""
    pixels = read_image(path)
    with Image.open(path) as image:
        assert rgb_from_pillow(image).equal(pixels), "opened"
        assert rgb_from_pillow(image).equal(pixels), "loaded"
        assert rgb_from_pillow(image.copy()).equal(pixels), "copied"
        assert rgb_from_pillow(image.convert("RGB")).equal(pixels), "converted"
    header = image_header(path)
    assert header.upright_hw == pixels.shape[1:]
    assert read_image(path, header.upright_hw).equal(pixels)
    stored = read_image(path, header.stored_hw)
    assert stored.shape[1:] == header.stored_hw
    return pixels, stored


@pytest.mark.parametrize("suffix", ["jpg", "mpo", "png", "webp", "tif", "avif"])
def test_a_path_and_an_open_image_agree(tmp_path, suffix):
    if suffix == "avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    options = {"save_all": True, "append_images": [Image.fromarray(RAMP[::-1].copy())]} if suffix == "mpo" else {}
    plain = None
    for orientation in range(10):  # 0 and 9 are none
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"{orientation}.{suffix}"
        Image.fromarray(RAMP).save(path, exif=exif, **options)
        pixels, stored = assert_agree(path)
        plain = pixels if orientation == 0 else plain
        turned = orientation in range(5, 9)
        assert pixels.shape == ((3, 24, 16) if turned else (3, 16, 24))
        assert (image_header(path).orientation == orientation) == (orientation in range(1, 9))
        if turned:
            assert stored.equal(plain)


@pytest.mark.parametrize("suffix", ["jpg", "webp", "png", "tif"])
def test_xmp_alone_turns_what_pillow_turns_itself(tmp_path, suffix):
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    options = {"png": {"pnginfo": info}, "tif": {"tiffinfo": {700: XMP}}}.get(suffix, {"xmp": XMP})
    Image.fromarray(RAMP).save(tmp_path / f"a.{suffix}", **options)
    pixels, _ = assert_agree(tmp_path / f"a.{suffix}")
    assert pixels.shape == ((3, 24, 16) if suffix == "tif" else (3, 16, 24))


def exif_block(kind, count, order):
    value = struct.pack(order + ("I" if kind in (4, 9) else "HH"), *((6,) if kind in (4, 9) else (6, 0)))
    header = b"II*\0" if order == "<" else b"MM\0*"
    return header + struct.pack(order + "IHHHI", 8, 1, 0x0112, kind, count) + value + bytes(4)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("order", ["<", ">"])
def test_odd_and_damaged_exif_is_the_same_for_both(tmp_path, order):
    path = tmp_path / "a.jpg"
    blocks = [exif_block(kind, count, order) for kind in (1, 2, 3, 4, 7, 8, 9, 12) for count in (0, 1, 2)]
    for block in [*blocks, b"", b"II", b"no exif at all", b"II*\0\xff\xff\xff\xff"]:
        Image.fromarray(RAMP).save(path, exif=b"Exif\0\0" + block)
        assert_agree(path)
    Image.fromarray(RAMP).save(path, exif=b"Exif\0\0" + exif_block(4, 1, order))
    assert image_header(path).orientation == 6


def test_of_two_exif_segments_the_first_counts(tmp_path):
    path = tmp_path / "a.jpg"
    Image.fromarray(RAMP).save(path, exif=b"Exif\0\0" + exif_block(3, 1, "<"))
    other = Image.Exif()
    other[0x0112] = 3
    segment = other.tobytes()
    segment = b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment
    data = path.read_bytes()
    tables = data.index(b"\xff\xdb")
    for place, size_hw in ((tables, (24, 16)), (2, (16, 24))):
        path.write_bytes(data[:place] + segment + data[place:])
        pixels, _ = assert_agree(path)
        assert pixels.shape[1:] == size_hw


def test_a_png_with_exif_behind_its_pixels(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(RAMP).save(path)
    data, block = path.read_bytes(), b"eXIf" + exif_block(3, 1, ">")
    chunk = struct.pack(">I", len(block) - 4) + block + struct.pack(">I", zlib.crc32(block))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    pixels, _ = assert_agree(path)
    assert pixels.shape == (3, 24, 16)
    path.write_bytes(data[:-12] + b"\0\0\0\x04eXIf" + data[-12:])  # it only looks like one
    assert image_header(path).orientation == 1


def test_an_orientation_that_was_set_in_memory_counts():
    image = Image.fromarray(RAMP)
    image.getexif()[0x0112] = 6
    assert rgb_from_pillow(image).shape == (3, 24, 16)

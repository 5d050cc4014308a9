from __future__ import annotations

import io
import struct
import subprocess
import sys
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image, TiffImagePlugin

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image, decode_png, encode_png, open_image


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_claiming(width: int, height: int, data: bytes = b"") -> bytes:
    """A PNG whose header claims a size, over image data that may be anything."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


def encoded(kind: str, size: tuple[int, int] = (40, 30), **options: object) -> bytes:
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (5, 7, 4), (1, 1, 4), (64, 1, 3)])
def test_pngs_round_trip_exactly(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    back = decode_png(encode_png(array))
    assert back.dtype == np.uint8
    assert np.array_equal(back, array)


def test_colour_under_zero_alpha_survives() -> None:
    array = np.zeros((4, 4, 4), np.uint8)
    array[..., :3] = (11, 22, 33)
    assert np.array_equal(decode_png(encode_png(array)), array)


def test_encoding_is_reproducible_and_takes_views() -> None:
    array = np.random.default_rng(2).integers(0, 256, (9, 8, 4), dtype=np.uint8)
    assert encode_png(array) == encode_png(array.copy())
    assert np.array_equal(decode_png(encode_png(array[:, ::-1, :3])), array[:, ::-1, :3])


@pytest.mark.parametrize("array", [np.zeros((3, 3)), np.zeros((3, 3, 2), np.uint8), np.zeros((1, 3, 3, 4), np.uint8)])
def test_arrays_that_are_no_images_are_refused(array: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"not uint8 of \(H, W\), \(H, W, 3\) or \(H, W, 4\)"):
        encode_png(array)


def test_a_png_of_another_kind_is_not_one_of_ours() -> None:
    with pytest.raises(LayerloopError, match="image is JPEG RGB, not an 8-bit PNG of layerloop"):
        decode_png(encoded("JPEG"))
    buffer = io.BytesIO()
    Image.new("P", (4, 4)).save(buffer, "PNG")
    with pytest.raises(LayerloopError, match="image is PNG P, not an 8-bit PNG of layerloop"):
        decode_png(buffer.getvalue())


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "PPM"])
def test_usual_formats_decode(kind: str) -> None:
    assert decode_image(encoded(kind)).size == (40, 30)


def test_an_empty_file_is_one_line() -> None:
    with pytest.raises(LayerloopError, match=r"image is empty \(0 bytes\): give a PNG, JPEG"):
        decode_image(b"")


@pytest.mark.parametrize("data", [b"this is no image", b"\0" * 99])
def test_what_is_no_image_is_told_by_its_first_bytes(data: bytes) -> None:
    with pytest.raises(LayerloopError) as caught:
        decode_image(data)
    assert str(caught.value).startswith(f"image starts with {data[:12]!r}, not a known format: give a PNG, JPEG")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing: export it as PNG"),
        (b'<?xml version="1.0"?>\n<svg/>', "an SVG drawing: export it as PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript: export it as PNG"),
        (b"8BPS\0\1", "a Photoshop document: export it as PNG"),
        (b"%PDF-1.7", "a PDF: export it as PNG"),
        (b"\xff\x0a\xfa\x7f", "JPEG XL: convert it to PNG"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "a pointer of Git LFS and not the file itself: fetch it "),
        (b"\n<!DOCTYPE html><title>Sign in</title>", "a web page: download the file itself"),
        (b"\x1f\x8b\x08\0", "packed by gzip: unpack it"),
    ],
)
def test_files_of_other_kinds_are_told_by_what_they_are(data: bytes, said: str) -> None:
    with pytest.raises(LayerloopError) as caught:
        decode_image(data)
    assert str(caught.value).startswith(f"image starts with {data[:12]!r}, it is {said}")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF"])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_truncated_images_are_refused_in_one_line(kind: str, share: float) -> None:
    data = encoded(kind, (200, 150))
    with pytest.raises(LayerloopError) as caught:
        decode_image(data[: int(len(data) * share)])
    assert "\n" not in str(caught.value)
    assert any(
        word in str(caught.value) for word in ("truncated or damaged", "header is damaged", "not a known format")
    )


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_flipped_bits_never_escape_as_another_exception() -> None:
    rng = np.random.default_rng(3)
    for kind in ("PNG", "JPEG", "GIF", "TIFF", "BMP", "WEBP"):
        data = np.frombuffer(encoded(kind), np.uint8)
        for _ in range(60):
            spoiled = data.copy()
            spoiled[rng.integers(0, min(len(data), 400), 4)] ^= rng.integers(1, 256, 4).astype(np.uint8)
            try:
                decode_image(spoiled.tobytes(), max_pixels=10**6)
            except LayerloopError as error:
                assert "\n" not in str(error)


def test_a_size_over_the_limit_is_refused_before_decoding() -> None:
    with pytest.raises(LayerloopError) as caught:
        decode_image(png_claiming(5000, 4000), max_pixels=10_000_000)
    size = "image is 5000 x 4000, 20.0 megapixels, over the 10 allowed"
    assert str(caught.value) == f"{size}: make it smaller or raise recipe.data.max_megapixels"


def test_a_size_beyond_pillows_own_limit_may_be_allowed() -> None:
    image = open_image(png_claiming(20_000, 15_000), max_pixels=300_000_000)  # Pillow alone refuses 300 megapixels
    assert image.size == (20_000, 15_000)


def test_zero_sides_are_refused() -> None:
    for width, height in ((0, 5), (5, 0), (0, 0)):
        with pytest.raises(LayerloopError):
            decode_image(png_claiming(width, height))
    gif = b"GIF89a" + struct.pack("<HH", 0, 0) + b"\0\0\0" + b";"
    with pytest.raises(LayerloopError):
        decode_image(gif)


BOMB = """
import resource, sys
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image
data = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    decode_image(data, max_pixels=10_000_000)
except LayerloopError as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_decompression_bomb_costs_no_memory() -> None:
    bomb = png_claiming(6_000, 6_000, b"\0" * (6_000 * 18_001))  # 108 MB of pixels in a hundred kB
    assert len(bomb) < 200_000
    done = subprocess.run([sys.executable, "-c", BOMB], input=bomb, capture_output=True, check=True)
    message, kilobytes = done.stdout.decode().splitlines()
    assert message.startswith("image is 6000 x 6000, 36.0 megapixels, over the 10 allowed")
    assert int(kilobytes) < 60_000


def heic(orientation: int) -> bytes:
    """A phone's photograph, 96 x 64: red above, blue on the left, and an EXIF orientation."""
    pillow_heif.register_heif_opener()
    array = np.zeros((64, 96, 3), np.uint8)
    array[:32], array[:, :48, 2] = (200, 30, 30), 250
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "HEIF", quality=95, exif=exif.tobytes())
    return buffer.getvalue()


def test_a_phones_photograph_is_read_and_turned_once() -> None:
    plain, turned = decode_image(heic(1)), decode_image(heic(6))
    assert (plain.size, turned.size) == ((96, 64), (64, 96))
    assert plain.getpixel((90, 5))[0] > 150, "red above on the right"
    assert turned.getexif().get(0x0112, 1) == 1, "or it would be turned again"
    right_way = plain.transpose(Image.Transpose.ROTATE_270)
    assert np.abs(np.asarray(turned, int) - np.asarray(right_way, int)).mean() < 8


@pytest.mark.parametrize("share", [0.1, 0.5, 0.97])
def test_a_phones_photograph_that_is_cut_off_is_said_to_be(share: float) -> None:
    data = heic(1)
    with pytest.raises(LayerloopError, match="HEIC or AVIF, truncated or damaged|truncated or damaged"):
        decode_image(data[: int(len(data) * share)])


def tiff_of(*pages: tuple[int, tuple[int, int], dict[int, int]]) -> bytes:
    """A TIFF of grey pages: level, size, and further tags."""
    images, tags = [], []
    for level, size, further in pages:
        images.append(Image.new("L", size, level))
        info = TiffImagePlugin.ImageFileDirectory_v2()
        for tag, value in further.items():
            info[tag] = value
        tags.append(info)
    buffer = io.BytesIO()
    with TiffImagePlugin.AppendingTiffWriter(buffer, new=True) as writer:
        for image, info in zip(images, tags, strict=True):
            image.save(writer, "TIFF", tiffinfo=info)
            writer.newFrame()
    return buffer.getvalue()


def test_a_thumbnail_before_the_picture_of_a_tiff_is_not_taken_for_it() -> None:
    small, large = (90, (4, 6), {254: 1}), (200, (64, 40), {274: 6})
    for data in (tiff_of(large, small), tiff_of(small, large), tiff_of(small, small, large)):
        assert open_image(data).getexif().get(274) == 6
        image = decode_image(data)
        assert (image.size, image.getpixel((2, 2))) == ((40, 64), 200), "the picture, turned by its own tag"
    alone = decode_image(tiff_of(small, small))
    assert (alone.size, alone.getpixel((2, 2))) == ((4, 6), 90)
    with pytest.raises(LayerloopError, match="only a thumbnail can be read: export it as PNG"):
        decode_image(tiff_of((90, (4, 6), {254: 1, 330: 8})))


def test_the_size_of_a_tiffs_picture_is_checked_and_not_that_of_its_thumbnail() -> None:
    data = tiff_of((90, (4, 6), {254: 1}), (200, (640, 400), {}))
    with pytest.raises(LayerloopError, match=r"640 x 400, 0\.3 megapixels, over the 0\.1 allowed"):
        open_image(data, max_pixels=100_000)

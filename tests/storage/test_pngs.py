"""PNGs and other pictures that are read without a damaged remark, and not without their pixels."""

from __future__ import annotations

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from layerloop.components.decompose.pictures import look_at
from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image, open_image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
WIDTH, HEIGHT = 9, 6


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(pixels: bytes, *extra: bytes, colour: int = 2, interlaced: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 8, colour, 0, 0, interlaced)
    middle = (chunk(b"IHDR", header), *extra, chunk(b"IDAT", zlib.compress(pixels)), chunk(b"IEND", b""))
    return SIGNATURE + b"".join(middle)


def row(value: int) -> bytes:
    return b"\0" + bytes([value]) * 3 * WIDTH


def test_pixels_that_end_early_are_no_black_rows() -> None:
    white, black = row(255), row(0)
    for whole in (white * HEIGHT, white * 5 + black, black * HEIGHT):
        assert decode_image(png(whole)).size == (WIDTH, HEIGHT)
    for rows in (1, HEIGHT - 1):
        with pytest.raises(LayerloopError, match=rf"truncated or damaged \({28 * rows} of 168 bytes of pixels\)"):
            decode_image(png(white * rows))


def test_interlaced_pixels_that_end_early_are_told_too() -> None:
    size = sum(
        max(0, -(-(HEIGHT - top) // down)) * (1 + 3 * columns)
        for left, top, across, down in (
            (0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2),
        )
        if (columns := -(-(WIDTH - left) // across)) > 0
    )  # fmt: skip
    assert decode_image(png(bytes(size), interlaced=1)).size == (WIDTH, HEIGHT)
    with pytest.raises(LayerloopError, match=rf"\({size - 28} of {size} bytes of pixels\)"):
        decode_image(png(bytes(size - 28), interlaced=1))


def test_a_palette_that_is_not_there_makes_no_black_picture() -> None:
    indexes = (b"\0" + bytes([1]) * WIDTH) * HEIGHT
    palette = chunk(b"PLTE", bytes([0, 0, 0, 10, 20, 30]))
    assert np.asarray(upright_srgb(decode_image(png(indexes, palette, colour=3))))[0, 0].tolist() == [10, 20, 30]
    with pytest.raises(LayerloopError, match=r"^image is a PNG with a palette that it lacks \(PLTE\): save it again$"):
        decode_image(png(indexes, colour=3))


@pytest.mark.parametrize(
    "remark",
    [
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"tEXt", b"k\0v")[:-1] + b"\xff",
        chunk(b"gAMA", b"1"),
    ],
)
def test_a_picture_that_can_be_read_can_be_looked_at(remark: bytes, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(row(200) * HEIGHT, remark))
    seen = look_at(str(tmp_path / "a.png"))
    assert (seen.width, seen.height) == (WIDTH, HEIGHT) and (seen.read() == 200).all()


def test_what_a_png_says_of_its_colours_outlives_a_damaged_remark() -> None:
    linear, damaged = chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"tEXt", b"k\0v")[:-1] + b"\xff"
    for said in ((linear, damaged), (damaged, linear)):
        assert np.asarray(upright_srgb(decode_image(png(row(124) * HEIGHT, *said))))[0, 0, 0] == 185


def test_an_avif_with_exif_that_makes_no_sense_is_used_and_turned_by_its_own_box() -> None:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "a maker of cameras"
    buffer = io.BytesIO()
    Image.new("RGB", (40, 24), (200, 100, 50)).save(buffer, "AVIF", quality=100, exif=exif)
    data = buffer.getvalue()
    start = max(data.rfind(b"MM\0*"), data.rfind(b"II*\0"))
    for place, value in ((0, b"XX"), (-10, b"\xff" * 10), (4, b"\xff" * 4)):
        spoiled = data[: start + place] + value + data[start + place + len(value) :]
        assert upright_srgb(decode_image(spoiled)).size == (24, 40)
        assert open_image(spoiled).size == (40, 24)
    with pytest.raises(LayerloopError):
        decode_image(data[: len(data) // 2])


def test_an_avif_is_turned_by_its_box_and_not_by_xmp() -> None:
    for said, kept in ((b"1", b"6"), (b"6", b"1")):
        xmp, exif = b'<x:xmpmeta><rdf:Description tiff:Orientation="%s"/></x:xmpmeta>', Image.Exif()
        exif[0x0112] = int(said)
        buffer = io.BytesIO()
        Image.new("RGB", (40, 24)).save(buffer, "AVIF", exif=exif, xmp=xmp % said)
        data = buffer.getvalue().replace(xmp % said, xmp % kept)
        assert upright_srgb(decode_image(data)).size == ((40, 24) if said == b"1" else (24, 40))


def test_a_bmp_whose_alpha_nobody_filled_in_is_opaque() -> None:
    for alpha, expected in ((0, 255), (128, 128)):
        pixels = bytes([50, 100, 200, alpha]) * 4
        masks = struct.pack("<4I", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)
        header = struct.pack("<IiiHHIIiiII", 108, 2, 2, 1, 32, 3, len(pixels), 0, 0, 0, 0) + masks + bytes(52)
        data = b"BM" + struct.pack("<IHHI", 122 + len(pixels), 0, 0, 122) + header + pixels
        assert np.asarray(upright_srgb(decode_image(data)))[0, 0].tolist() == [200, 100, 50, expected]


def test_megabytes_of_remarks_cost_a_jpeg_neither_time_nor_its_orientation_and_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    buffer = io.BytesIO()
    picture = Image.new("CMYK", (40, 24), (0, 255, 255, 0))
    picture.save(buffer, "JPEG", quality=100, exif=exif, icc_profile=profile)
    plain = bytearray(buffer.getvalue())
    plain[plain.index(b"Adobe") + 11] = 2  # its colours are YCCK, which only this mark says
    extra = b"Exif\0\0" + bytes(65_000)
    segment = b"\xff\xe1" + struct.pack(">H", len(extra) + 2) + extra
    last = plain.index(b"\xff\xdb")
    for count in (1, 100):
        full = bytes(plain[:last] + segment * count + plain[last:])
        image = decode_image(full)
        assert len(image.info["exif"]) < 200_000, "put together by Pillow, in time by the square of their number"
        assert upright_srgb(image).size == (24, 40) and image.info["icc_profile"] == profile
        assert (np.asarray(image) == np.asarray(decode_image(bytes(plain)))).all(), "Adobe's mark is kept"

"""Colours that an image says it has, by whatever of its format, against what they are in sRGB."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pillow_heif
import pytest
from PIL import Image

from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image

COLOUR = (200, 100, 50)
# COLOUR in sRGB, taken through the primaries and curves that the standards print.
AS_P3, AS_BT2020, AS_ADOBE_RGB, AS_LINEAR = (215, 93, 31), (241, 76, 29), (227, 100, 42), (229, 168, 122)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def saved(kind: str, *, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), COLOUR).convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def png(*extra: bytes, mode: str = "RGB", **options: object) -> bytes:
    data = saved("PNG", mode=mode, **options)
    return data[:33] + b"".join(extra) + data[33:]


def jpeg(**options: object) -> bytes:
    return saved("JPEG", quality=100, subsampling=0, **options)


def cicp(primaries: int, transfer: int) -> bytes:
    return chunk(b"cICP", bytes([primaries, transfer, 0, 1]))


def avif(primaries: int, transfer: int) -> bytes:
    data = bytearray(saved("AVIF", quality=100, subsampling="4:4:4"))
    struct.pack_into(">HH", data, data.index(b"nclx") + 4, primaries, transfer)
    return bytes(data)


def heic(primaries: int, transfer: int) -> bytes:
    pillow_heif.register_heif_opener()
    return saved("HEIF", quality=-1, chroma=444, color_primaries=primaries, transfer_characteristics=transfer)


def profile(space: bytes = b"RGB ", **tags: bytes) -> bytes:
    """A hand-made profile of Display P3's columns and sRGB's curve, or of grey of the power of one."""

    def xyz(*values: float) -> bytes:
        return b"XYZ " + bytes(4) + b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    curve = b"para" + bytes(4) + struct.pack(">HH", 3, 0)
    curve += b"".join(struct.pack(">i", round(v * 65536)) for v in (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045))
    body = {b"wtpt": xyz(0.9642, 1.0, 0.8249), b"desc": b"desc" + bytes(4) + struct.pack(">I", 2) + b"p\0" + bytes(79)}
    body |= {name.encode(): content for name, content in tags.items()}
    if space == b"GRAY":
        body |= {b"kTRC": b"curv" + bytes(8)}
    else:
        columns = {"r": (0.5151, 0.2412, -0.0011), "g": (0.2920, 0.6922, 0.0419), "b": (0.1571, 0.0666, 0.7841)}
        body |= {f"{name}XYZ".encode(): xyz(*values) for name, values in columns.items()}
        body |= {f"{name}TRC".encode(): curve for name in columns}
    table, data, start = b"", b"", 132 + 12 * len(body)
    for name, content in body.items():
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(data), 0x04400000, b"mntr", space, b"XYZ ", b"acsp")
    white = b"".join(struct.pack(">i", round(v * 65536)) for v in (0.9642, 1.0, 0.8249))
    return (head + bytes(28) + white).ljust(128, b"\0") + struct.pack(">I", len(body)) + table + data


def jp2(icc: bytes, *, mode: str = "RGB", method: int = 2) -> bytes:
    """JPEG 2000 whose colour box holds a profile."""
    data = saved("JPEG2000", mode=mode)
    box, header = data.index(b"colr") - 4, data.index(b"jp2h") - 4
    size, head = (struct.unpack_from(">I", data, at)[0] for at in (box, header))
    new = struct.pack(">I4sBBB", 11 + len(icc), b"colr", method, 0, 0) + icc
    grown = struct.pack(">I", head + len(new) - size)
    return data[:header] + grown + data[header + 4 : box] + new + data[box + size :]


def adobe_rgb_exif(index: bytes = b"R03\0") -> bytes:
    """The mark of DCF's optional colour space, as cameras write it."""

    def directory(tag: int, kind: int, count: int, value: bytes) -> bytes:
        return struct.pack("<HHHI", 1, tag, kind, count) + value.ljust(4, b"\0") + bytes(4)

    first, second = directory(0x8769, 4, 1, struct.pack("<I", 26)), directory(0xA005, 4, 1, struct.pack("<I", 44))
    return b"Exif\0\0II*\0\x08\0\0\0" + first + second + directory(1, 2, 4, index)


def read(data: bytes) -> np.ndarray:
    pixels: np.ndarray = np.asarray(upright_srgb(decode_image(data)))[8, 8].astype(int)
    return pixels


@pytest.mark.parametrize(
    ("data", "colour"),
    [
        (png(cicp(12, 13)), AS_P3),
        (png(cicp(9, 1)), AS_BT2020),
        (png(cicp(1, 8)), AS_LINEAR),
        (png(cicp(1, 13)), COLOUR),
        (png(cicp(1, 1)), COLOUR),
        (avif(12, 13), AS_P3),
        (avif(1, 8), AS_LINEAR),
        (avif(1, 13), COLOUR),
        (heic(12, 13), AS_P3),
        (heic(6, 6), COLOUR),
        (jp2(profile()), AS_P3),
        (jp2(profile(), method=3), AS_P3),
        (jpeg(exif=adobe_rgb_exif()), AS_ADOBE_RGB),
        (jpeg(exif=adobe_rgb_exif(b"R98\0")), COLOUR),
        (png(chunk(b"gAMA", struct.pack(">I", 100_000))), AS_LINEAR),
        (png(chunk(b"gAMA", struct.pack(">I", 45_455))), COLOUR),
        (png(chunk(b"gAMA", struct.pack(">I", 0))), COLOUR),
        (png(chunk(b"gAMA", struct.pack(">I", 100_000)), chunk(b"sRGB", b"\0")), COLOUR),
    ],
    ids=lambda value: value[:4].hex() if isinstance(value, bytes) else "",
)
def test_colours_are_those_that_the_file_says(data: bytes, colour: tuple[int, int, int]) -> None:
    assert np.abs(read(data)[:3] - colour).max() <= 3


def test_chromaticities_of_a_png_are_taken_where_they_are_not_srgbs() -> None:
    p3 = (31270, 32900, 68000, 32000, 26500, 69000, 15000, 6000)
    srgb = (31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000)
    none = (31270, 0, 68000, 0, 26500, 0, 15000, 0)
    for values, colour in ((p3, AS_P3), (srgb, COLOUR), (none, COLOUR)):
        assert np.abs(read(png(chunk(b"cHRM", struct.pack(">8I", *values)))) - colour).max() <= 2


def test_of_what_a_file_says_twice_its_standard_chooses() -> None:
    linear = png(cicp(1, 8), icc_profile=profile())
    assert np.abs(read(linear) - AS_LINEAR).max() <= 2, "PNG: code points before the profile"
    assert np.abs(read(png(icc_profile=profile(), exif=adobe_rgb_exif())) - AS_P3).max() <= 2
    gamma = chunk(b"gAMA", struct.pack(">I", 100_000))
    assert np.abs(read(png(gamma, icc_profile=profile())) - AS_P3).max() <= 2


@pytest.mark.parametrize(
    "data",
    [
        png(cicp(9, 16)),
        avif(9, 16),
        heic(9, 18),
        png(icc_profile=profile(cicp=b"cicp" + bytes(4) + bytes([9, 16, 0, 1]))),
    ],
    ids=["PNG", "AVIF", "HEIC", "ICC"],
)
def test_high_dynamic_range_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(
        LayerloopError, match=r"^image is of high dynamic range \((PQ|HLG)\), which has no 8-bit form: "
    ):
        read(data)


def test_grey_has_the_profile_of_its_grey_in_every_format() -> None:
    grey, lit = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50), 185
    linear = profile(b"GRAY")
    for data in (
        jp2(linear, mode="L"),
        saved("WEBP", mode="L", lossless=True, icc_profile=linear),
        saved("WEBP", mode="LA", lossless=True, icc_profile=linear),
        png(mode="L", icc_profile=linear),
        png(chunk(b"gAMA", struct.pack(">I", 100_000)), mode="L"),
    ):
        assert np.abs(read(data)[:3] - lit).max() <= 1
    assert np.abs(read(png(icc_profile=linear)) - COLOUR).max() == 0, "of colours it is ignored"
    assert np.abs(read(png(cicp(12, 13), mode="L")) - grey).max() <= 1, "grey has no primaries"


def test_jpeg_2000_of_colours_that_would_be_taken_for_rgb_is_refused() -> None:
    data = bytearray(saved("JPEG2000"))
    for space, read_as in ((16, COLOUR), (14, None)):
        struct.pack_into(">I", data, data.index(b"colr") + 7, space)
        if read_as:
            assert np.abs(read(bytes(data)) - read_as).max() <= 3
        else:
            with pytest.raises(LayerloopError, match="JPEG 2000 in the colour space 14 of its standard"):
                read(bytes(data))


@pytest.mark.parametrize("entry", [(3, 2, 0), (0, 0, 3)])
def test_channels_of_jpeg_2000_that_would_be_taken_for_others_are_refused(entry: tuple[int, int, int]) -> None:
    data = bytearray(saved("JPEG2000", mode="RGBA"))
    assert np.abs(read(bytes(data))[:3] - COLOUR).max() <= 3
    struct.pack_into(">3H", data, data.index(b"cdef") + 6 + 6 * entry[0], *entry)  # premultiplied; blue comes first
    with pytest.raises(LayerloopError, match="JPEG 2000 with colours that are premultiplied or in another order"):
        read(bytes(data))


def test_boxes_that_are_damaged_say_nothing() -> None:
    data = avif(12, 13)
    for name in (b"pitm", b"iprp", b"ipco", b"ipma", b"colr"):
        at = data.index(name)
        for place, value in ((-4, b"\0\0\0\0"), (4, b"\xff" * 8), (0, b"none")):
            spoiled = data[: at + place] + value + data[at + place + len(value) :]
            try:
                assert min(np.abs(read(spoiled) - colour).max() for colour in (COLOUR, AS_P3)) <= 3
            except LayerloopError as error:
                assert "\n" not in str(error)

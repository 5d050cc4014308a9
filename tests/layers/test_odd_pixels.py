"""Pixels as other programs store them: few bits, many bits, white as 0, clear colours, profiles that are damaged."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from layerloop.components.layers.normalise import GreyRange, upright_srgb
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image

WIDTH, HEIGHT = 8, 2


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(depth: int, colour: int, row: bytes, *, clear: tuple[int, ...]) -> bytes:
    """A PNG of two equal rows of packed samples, with a tRNS chunk."""
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"tRNS", struct.pack(f">{len(clear)}H", *clear))
        + chunk(b"IDAT", zlib.compress((b"\0" + row) * HEIGHT)) + chunk(b"IEND", b"")
    )  # fmt: skip


def tiff(bits: int, values: bytes, *, photometric: int, kind: int = 1) -> bytes:
    """A grey TIFF of one strip."""
    entries = (
        (256, WIDTH), (257, HEIGHT), (258, bits), (259, 1), (262, photometric), (273, 122), (277, 1), (278, HEIGHT),
        (279, len(values)),
    )  # fmt: skip
    entries = (*entries, (339, kind))
    directory = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in entries)
    directory = directory.replace(
        struct.pack("<HHII", 273, 4, 1, 122), struct.pack("<HHII", 273, 4, 1, 14 + len(directory))
    )
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + directory + bytes(4) + values


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(upright_srgb(decode_image(data)))


@pytest.mark.parametrize(
    ("depth", "row", "clear", "values"),
    [
        (4, b"\xff\xff\x33\x33", 15, (255, 51)),
        (2, b"\xff\x55", 3, (255, 85)),
        (2, b"\xff\x00", 3, (255, 0)),
        (1, b"\xf0", 1, (255, 0)),
        (8, b"\xff" * 4 + b"\x33" * 4, 255, (255, 51)),
        (16, b"\x80\x01" * 4 + b"\x80\x00" * 4, 0x8001, (128, 128)),
    ],
)
def test_the_clear_grey_of_a_png_is_clear_at_any_depth(
    depth: int, row: bytes, clear: int, values: tuple[int, int]
) -> None:
    read = pixels(png(depth, 0, row, clear=(clear,)))
    assert read.shape == (HEIGHT, WIDTH, 4)
    assert [tuple(read[0, x]) for x in (0, 7)] == [(values[0],) * 3 + (0,), (values[1],) * 3 + (255,)]


def test_the_clear_colour_of_a_png_of_16_bits_is_clear_and_no_other() -> None:
    row = b"\x10\x00\x20\x00\x30\x00" * 4 + b"\x00\x10\x00\x20\x00\x30" * 4
    read = pixels(png(16, 2, row, clear=(0x1000, 0x2000, 0x3000)))
    assert tuple(read[0, 0]) == (0x10, 0x20, 0x30, 0) and read[0, 7, 3] == 255
    other = pixels(png(16, 2, row, clear=(0x0110, 0x0220, 0x0330)))
    assert (other[..., 3] == 255).all(), "the low bytes of the one are the high bytes of another colour"
    near = pixels(png(16, 2, row, clear=(0x1000, 0x2000, 0x3001)))
    assert near.shape[-1] == 3 or (near[..., 3] == 255).all(), "one level of 65,536 apart"
    beyond = pixels(png(4, 0, b"\xff\xff\x33\x33", clear=(51,)))
    assert beyond.shape[-1] == 3 or (beyond[..., 3] == 255).all(), "51 is no value of four bits"


def test_grey_of_more_than_8_bits_is_read_by_its_range() -> None:
    twelve = tiff(12, b"\x80\x08\x00" * (WIDTH * HEIGHT // 2), photometric=1)
    assert (pixels(twelve) == round(0x800 / 4095 * 255)).all()
    for photometric, value in ((0, 55), (1, 200)):
        sixteen = tiff(16, np.full(WIDTH * HEIGHT, 200 * 257, "<u2").tobytes(), photometric=photometric)
        eight = tiff(8, np.full(WIDTH * HEIGHT, 200, "u1").tobytes(), photometric=photometric)
        assert (pixels(sixteen) == value).all() and (pixels(eight) == value).all()


@pytest.mark.parametrize(("value", "read"), [(0, 0), (1, 0), (30_000, 117)])
def test_grey_of_32_bits_is_read_as_of_16_where_it_can_be_nothing_else(value: int, read: int) -> None:
    assert (pixels(tiff(32, np.full(WIDTH * HEIGHT, value, "<u4").tobytes(), photometric=1)) == read).all()


def test_grey_of_32_bits_that_may_be_of_8_is_refused() -> None:
    with pytest.raises(
        LayerloopError, match=r"^image has 32-bit values up to 200, of 255 or 65535: save it with 8 bits$"
    ):
        pixels(tiff(32, np.full(WIDTH * HEIGHT, 200, "<u4").tobytes(), photometric=1))


@pytest.mark.parametrize("kind", ["u2", "f4"])
def test_grey_of_many_bits_takes_no_memory_beyond_its_own(kind: str) -> None:
    values = np.linspace(0, 1, 1500 * 2000).reshape(1500, 2000)
    values = (values * 65535).astype(kind) if kind == "u2" else values.astype(kind)
    grey = GreyRange(65535.0 if kind == "u2" else 1.0)
    tracemalloc.start()
    found = grey.scaled(values)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found[0, 0], found[-1, -1]) == (0, 255) and (np.diff(found.astype(int).ravel()) >= 0).all()
    assert peak < 15e6, "three million pixels, of which each as float64 took 24 bytes"


@pytest.mark.parametrize("kind", [1, 3, 4])
def test_an_orientation_of_any_whole_number_type_turns(kind: int) -> None:
    value = struct.pack({1: "<B", 3: "<H", 4: "<I"}[kind], 6).ljust(4, b"\0")
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + struct.pack("<HHI", 0x0112, kind, 1) + value + bytes(4)
    buffer = io.BytesIO()
    Image.new("RGB", (20, 12)).save(buffer, "JPEG", exif=exif)
    assert pixels(buffer.getvalue()).shape == (20, 12, 3)


def profiled(mode: str, profile: bytes) -> np.ndarray:
    buffer = io.BytesIO()
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 5, dtype=np.uint8), (4, 1))).convert(mode)
    ramp.save(buffer, "PNG" if mode != "CMYK" else "TIFF", icc_profile=profile)
    return pixels(buffer.getvalue())


def test_a_profile_whose_curves_are_damaged_is_ignored() -> None:
    sound = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    plain = profiled("RGB", sound)
    count = struct.unpack_from(">I", sound, 128)[0]
    tags = {sound[at : at + 4]: struct.unpack_from(">II", sound, at + 4) for at in range(132, 132 + 12 * count, 12)}
    for name in (b"rTRC", b"gXYZ", b"wtpt"):
        offset, length = tags[name]
        damaged = sound[: offset + 8] + bytes(length - 8) + sound[offset + length :]
        read = profiled("RGB", damaged).astype(int)
        assert np.abs(read - plain).max() <= 2, f"{name!r} of nothing but zeros spoils the picture"


def test_what_is_known_and_cannot_be_read_is_not_called_unknown() -> None:
    of_64_bits = tiff(64, bytes(8 * WIDTH * HEIGHT), photometric=1, kind=3)
    with pytest.raises(LayerloopError, match=r"^image is TIFF by its first bytes, but cut off, damaged or of a kind"):
        decode_image(of_64_bits)
    with pytest.raises(LayerloopError, match=r"^image starts with b'\\x00\\x01', not a known format"):
        decode_image(b"\0\1")

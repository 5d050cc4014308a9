"""TIFFs of every layout, held to what TIFF 6.0 says of them and not to what Pillow alone reads."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from layerloop.components.decompose.pictures import look_at
from layerloop.components.layers.normalise import upright_srgb
from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import decode_image

WIDTH, HEIGHT = 24, 16
ONE, OTHER = (10, 220, 30), (200, 100, 50)  # of the upper left quarter, and of the rest

Values = tuple[int, ...]


def tiff(data: bytes, tags: dict[int, Values], *, order: str = "<", packed: bool = False) -> bytes:
    """A TIFF of one strip, or of one a plane, from its tags (all LONG but for the colour map) and its pixels."""
    planes = tags.get(277, (1,))[0] if tags.get(284) == (2,) else 1
    size = len(data) // planes
    strips = [data[at * size : (at + 1) * size] for at in range(planes)]
    strips = [zlib.compress(strip) for strip in strips] if packed else strips
    all_tags = {256: (WIDTH,), 257: (HEIGHT,), 259: (8 if packed else 1,), 278: (HEIGHT,), 277: (1,)} | tags
    all_tags |= {279: tuple(map(len, strips)), 273: (0,) * planes}
    kinds = {tag: "I" if tag in (273, 279) else "H" for tag in all_tags}
    start = 10 + 12 * len(all_tags) + 4
    far = {tag: struct.calcsize(f"={len(v)}{kinds[tag]}") for tag, v in all_tags.items()}
    first = start + sum(size for size in far.values() if size > 4)
    all_tags[273] = tuple(first + sum(map(len, strips[:at])) for at in range(planes))
    entries, beyond = b"", b""
    for tag in sorted(all_tags):
        values = struct.pack(f"{order}{len(all_tags[tag])}{kinds[tag]}", *all_tags[tag])
        entries += struct.pack(f"{order}HHI", tag, 3 if kinds[tag] == "H" else 4, len(all_tags[tag]))
        if len(values) > 4:
            entries += struct.pack(f"{order}I", start + len(beyond))
            beyond += values
        else:
            entries += values.ljust(4, b"\0")
    head = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(all_tags))
    return head + entries + bytes(4) + beyond + b"".join(strips)


def picture(*, alpha: int | None = None, premultiplied: bool = False) -> np.ndarray:
    pixels = np.full((HEIGHT, WIDTH, 3), OTHER, np.int64)
    pixels[: HEIGHT // 2, : WIDTH // 2] = ONE
    if alpha is None:
        return pixels
    shown = np.rint(pixels * alpha / 255) if premultiplied else pixels
    return np.dstack([shown, np.full((HEIGHT, WIDTH), alpha)]).astype(np.int64)


def read(data: bytes) -> np.ndarray:
    pixels: np.ndarray = np.asarray(upright_srgb(decode_image(data)))
    return pixels[[2, -2], [2, -2]].astype(int)  # a pixel of either colour


def in_planes(pixels: np.ndarray, bits: int, order: str) -> bytes:
    scaled = pixels * (257 if bits == 16 else 1)
    return scaled.transpose(2, 0, 1).astype(f"{order}u{bits // 8}").tobytes()


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bits", [8, 16])
def test_planes_are_read_as_planes_of_their_depth(bits: int, packed: bool, order: str) -> None:
    tags: dict[int, Values] = {262: (2,), 284: (2,)}
    plain = tags | {258: (bits,) * 3, 277: (3,)}
    found = read(tiff(in_planes(picture(), bits, order), plain, order=order, packed=packed))
    assert np.array_equal(found, [ONE, OTHER])
    for kind in (1, 2):  # ExtraSamples: alpha with premultiplied colours, and without
        data = in_planes(picture(alpha=128, premultiplied=kind == 1), bits, order)
        clear = tags | {258: (bits,) * 4, 277: (4,), 338: (kind,)}
        found = read(tiff(data, clear, order=order, packed=packed))
        assert np.abs(found - [(*ONE, 128), (*OTHER, 128)]).max() <= 1


@pytest.mark.parametrize("packed", [False, True])
def test_grey_with_its_alpha_in_a_plane_is_refused_for_that(packed: bool) -> None:
    data = in_planes(picture(alpha=128)[..., 2:], 8, "<")
    with pytest.raises(LayerloopError, match=r"alpha in a plane of its own, which is not read of grey: save it as PNG"):
        decode_image(tiff(data, {258: (8, 8), 262: (1,), 277: (2,), 284: (2,), 338: (2,)}, packed=packed))


@pytest.mark.parametrize(
    ("kind", "bits", "sort", "scale"), [("f4", 32, 3, 1 / 255), ("i4", 32, 2, 257), ("i2", 16, 2, 32767 / 255)]
)
@pytest.mark.parametrize("packed", [False, True])
def test_numbers_are_read_in_either_order_of_bytes_packed_or_not(
    kind: str, bits: int, sort: int, scale: float, packed: bool
) -> None:
    tags: dict[int, Values] = {258: (bits,), 262: (1,), 339: (sort,)}
    for order in "<>":
        values = (picture()[..., 0] * scale).astype(f"{order}{kind}").tobytes()
        found = read(tiff(values, tags, order=order, packed=packed))
        assert np.abs(found - [(ONE[0],) * 3, (OTHER[0],) * 3]).max() <= 1, order


def test_subsampled_colours_are_read_without_compression() -> None:
    def converted(red: float, green: float, blue: float) -> Values:
        luma = 0.299 * red + 0.587 * green + 0.114 * blue
        return round(luma), round((blue - luma) * 0.564 + 128), round((red - luma) * 0.713 + 128)

    one, other = converted(*ONE), converted(*OTHER)
    data = b"".join(
        bytes([colour[0]] * 4 + [*colour[1:]])
        for y in range(0, HEIGHT, 2)
        for x in range(0, WIDTH, 2)
        for colour in [one if y < HEIGHT // 2 and x < WIDTH // 2 else other]
    )
    for subsampling in ({530: (2, 2)}, {}):  # 2, 2 by default
        found = read(tiff(data, {258: (8, 8, 8), 262: (6,), 277: (3,)} | subsampling))
        assert np.abs(found - [ONE, OTHER]).max() <= 2


@pytest.mark.parametrize("scale", [257, 1])
def test_a_palette_has_16_bits_or_8(scale: int) -> None:
    colours = [0] * 768
    for index, colour in enumerate((ONE, OTHER), 1):
        for channel in range(3):
            colours[256 * channel + index] = colour[channel] * scale
    indexes = np.where(picture()[..., 0] == ONE[0], 1, 2).astype(np.uint8).tobytes()
    found = read(tiff(indexes, {258: (8,), 262: (3,), 320: tuple(colours)}))
    assert np.array_equal(found, [ONE, OTHER])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_looked_at_in_the_size_in_which_it_is_read(orientation: int, tmp_path: Path) -> None:
    data = tiff(picture().astype(np.uint8).tobytes(), {258: (8, 8, 8), 262: (2,), 274: (orientation,), 277: (3,)})
    (tmp_path / "a.tif").write_bytes(data)
    seen = look_at(str(tmp_path / "a.tif"))
    assert (seen.height, seen.width) == seen.read().shape[:2] == ((16, 24) if orientation < 5 else (24, 16))


def test_a_tiff_that_is_turned_by_its_xmp_alone_is_looked_at_turned(tmp_path: Path) -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    Image.new("RGB", (24, 16)).save(tmp_path / "a.tif", tiffinfo={700: xmp})
    seen = look_at(str(tmp_path / "a.tif"))
    assert (seen.height, seen.width) == seen.read().shape[:2] == (24, 16)


def test_a_page_that_is_nowhere_behind_the_picture_keeps_nobody_from_it(tmp_path: Path) -> None:
    data = bytearray(tiff(picture().astype(np.uint8).tobytes(), {258: (8, 8, 8), 262: (2,), 277: (3,)}))
    (count,) = struct.unpack_from("<H", data, 8)
    data[10 + 12 * count : 14 + 12 * count] = b"\xff\xff\xff\xff"
    (tmp_path / "a.tif").write_bytes(data)
    assert look_at(str(tmp_path / "a.tif")).read()[2, 2].tolist() == list(ONE)

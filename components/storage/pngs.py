"""PNGs as their specification has them, where Pillow alone decodes other pixels, or none for a damaged remark."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
# What says its colours and turns it upright, and how long that is, where it has one length.
_COLOUR_CHUNKS = {b"iCCP": None, b"eXIf": None, b"cICP": 4, b"sRGB": 1, b"gAMA": 4, b"cHRM": 32}
_MAX_PROFILE = 1 << 20  # bytes; Pillow's own limit of an unpacked chunk
_CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7's passes (section 8.2): first column and row, and steps.
_PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
_AT_ONCE = 1 << 20  # bytes unpacked


def chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end of the data) of every chunk to the last, or to one that is cut off."""
    position = len(SIGNATURE)
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        yield kind, position + 8, position + 8 + length
        position += 12 + length
        if kind == b"IEND":
            return


def bare_png(data: bytes) -> bytes | None:
    """A PNG's chunks that make its pixels, and those of its colours and orientation that are whole; None where nothing
    is left out. Nothing is decompressed beyond what Pillow itself allows."""
    if not data.startswith(SIGNATURE):
        return None
    kept, left_out = [SIGNATURE], False
    for kind, start, end in chunks(data):
        length = _COLOUR_CHUNKS.get(kind, 0) or end - start
        said = kind in _COLOUR_CHUNKS and length == end - start and _is_whole(data[start - 4 : end + 4])
        if said or kind in _PIXEL_CHUNKS:
            kept.append(data[start - 8 : end + 4])
        else:
            left_out = True
    return b"".join(kept) if left_out else None


def _is_whole(chunk: bytes) -> bool:
    """Whether a chunk (its name, data and CRC) has the right CRC and, if it is a profile, unpacks to a usual size."""
    if len(chunk) < 8 or zlib.crc32(chunk[:-4]) != int.from_bytes(chunk[-4:], "big"):
        return False
    if not chunk.startswith(b"iCCP"):
        return True
    packed = chunk[4:-4].partition(b"\0")[2][1:]
    try:
        unpacker = zlib.decompressobj()
        unpacker.decompress(packed, _MAX_PROFILE)
    except zlib.error:
        return False
    return not unpacker.unconsumed_tail


def take_clear(image: Image.Image, data: bytes) -> tuple[int, ...] | None:
    """Bring the clear colour of a PNG's tRNS to the 8 bits of Pillow's pixels, which it does not: of 2 or 4 bits grey.
    That of 16 bits colour has no 8 bits and is taken away and returned."""
    clear, depth = image.info.get("transparency"), data[24] if data[12:16] == b"IHDR" else 8
    if clear is None:
        return None
    if image.mode == "RGB" and depth == 16 and isinstance(clear, tuple):
        return tuple(image.info.pop("transparency"))
    if image.mode == "L" and depth in (2, 4) and isinstance(clear, int):
        if clear >= 2**depth:
            del image.info["transparency"]
        else:
            image.info["transparency"] = clear * 255 // (2**depth - 1)
    return None


def unlike(image: Image.Image, low: Any, clear: tuple[int, ...]) -> Image.Image:
    """Alpha of a decoded PNG of 16 bits colour: 0 where a pixel is the clear colour in all its bits. Pillow decodes the
    high bytes; `low`, the same image opened again, is read as little-endian, where the low ones are the high ones."""
    from PIL import Image

    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    return Image.fromarray(np.where((values == clear).all(axis=-1), 0, 255).astype(np.uint8))


def check_palette(image: Image.Image) -> None:
    """Refuse colours of a palette that is not there, which Pillow shows as black.

    Raises:
        LayerloopError: there is none.
    """
    if image.mode == "P" and image.palette is None:
        raise LayerloopError("image is a PNG with a palette that it lacks (PLTE): save it again")


def check_rows(image: Image.Image, data: bytes) -> None:
    """Refuse a decoded PNG whose pixel data end well and too early: Pillow leaves the rest black.

    Raises:
        LayerloopError: it lacks rows.
    """
    interlaced = data[28] == 1
    if not interlaced and any(image.crop((0, image.height - 1, image.width, image.height)).tobytes()):
        return  # the last row was decoded
    wanted = _unpacked_size(*struct.unpack_from(">IIBB", data, 16), interlaced=interlaced)
    unpacker, found = zlib.decompressobj(), 0
    try:
        for kind, start, end in chunks(data):
            waiting = data[start:end] if kind == b"IDAT" else b""
            while waiting and found < wanted:
                found += len(unpacker.decompress(waiting, _AT_ONCE))
                waiting = unpacker.unconsumed_tail
        found += len(unpacker.flush())
    except zlib.error:
        pass  # then there are as many as that
    if found < wanted:
        raise LayerloopError(f"image is truncated or damaged ({found} of {wanted} bytes of pixels): save it again")


def _unpacked_size(width: int, height: int, depth: int, colour: int, *, interlaced: bool) -> int:
    """Bytes of a PNG's pixels, each row with its filter (section 7.2)."""
    bits, size = depth * _CHANNELS[colour], 0
    for left, top, across, down in _PASSES if interlaced else ((0, 0, 1, 1),):
        columns, rows = math.ceil((width - left) / across), math.ceil((height - top) / down)
        if columns > 0 and rows > 0:
            size += rows * (1 + math.ceil(columns * bits / 8))
    return size

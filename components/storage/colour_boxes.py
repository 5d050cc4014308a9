"""What files say that Pillow does not read: their colours, by code points of PNG, HEIC and AVIF and by the boxes of
JPEG 2000; and AVIF without its EXIF."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.pngs import chunks

if TYPE_CHECKING:
    from PIL import Image

CODE_POINTS = "cicp"  # in an image's info: (colour primaries, transfer characteristics) by ITU-T H.273

_MOST_BOXES = 10_000
# Enumerated colour spaces of JPEG 2000 (ISO 15444-1 and -2, M.11.7.3) that decode to RGB, grey or CMYK.
_READ_SPACES = frozenset({0, 12, 15, 16, 17, 18, 24})
_EXIF_ITEM = re.compile(rb"(infe[\2\3]\0{2}.(?:.{4}|.{6}))Exif", re.DOTALL)  # ISO 14496-12, 8.11.6
_COLOUR, _PREMULTIPLIED = 0, 2  # types of channels
_ENUMERATED = 1  # method of a colour box; 2 and 3 are a profile


def note_colours(image: Image.Image, data: bytes) -> None:
    """Put what an opened image's bytes say of its colours into its info: code points as CODE_POINTS, and a profile.

    Boxes that are damaged say nothing.

    Raises:
        LayerloopError: JPEG 2000 of a colour space, or with channels, that would be taken for RGB.
    """
    points: tuple[int, int] | None = None
    if image.format == "HEIF":
        said: dict[str, Any] = image.info.get("nclx_profile") or {}
        points = (int(said.get("color_primaries", 2)), int(said.get("transfer_characteristics", 2))) if said else None
    elif image.format == "PNG":
        points = _png_code_points(data)
    elif image.format == "AVIF":
        points = _avif_code_points(data)
    elif image.format == "JPEG2000":
        _note_jp2_colours(image, data)
    if points is not None:
        image.info[CODE_POINTS] = points


def bare_avif(data: bytes) -> bytes | None:
    """An AVIF without its EXIF, which libavif reads before any pixel; None where there is none."""
    if data[4:8] != b"ftyp" or b"avif" not in data[8:64]:
        return None
    bare = _EXIF_ITEM.sub(rb"\1none", data)
    return bare if bare != data else None


def _png_code_points(data: bytes) -> tuple[int, int] | None:
    """Of the chunk cICP, which stands before the pixels (PNG, third edition, 11.3.2.6)."""
    for kind, start, end in chunks(data):
        if kind == b"cICP" and end - start == 4:
            return data[start], data[start + 1]
        if kind == b"IDAT":
            break
    return None


def _avif_code_points(data: bytes) -> tuple[int, int] | None:
    """Of the `colr` box of type nclx of the primary item (ISO 23008-12, 6.5.5; 23000-22)."""
    try:
        meta = _find(data, 0, len(data), b"meta")
        if meta is None:
            return None
        inside = (meta[0] + 4, meta[1])
        primary, properties = _find(data, *inside, b"pitm"), _find(data, *inside, b"iprp")
        if primary is None or properties is None:
            return None
        wide = data[primary[0]] > 0  # version 1 has ids of 32 bits
        (item,) = struct.unpack_from(">I" if wide else ">H", data, primary[0] + 4)
        store, links = _find(data, *properties, b"ipco"), _find(data, *properties, b"ipma")
        if store is None or links is None:
            return None
        boxes = list(_boxes(data, *store))
        for index in _linked(data, links[0], item):
            if 0 < index <= len(boxes) and boxes[index - 1][0] == b"colr":
                start = boxes[index - 1][1]
                if data[start : start + 4] == b"nclx":
                    primaries, transfer = struct.unpack_from(">HH", data, start + 4)
                    return int(primaries), int(transfer)
    except (struct.error, IndexError):
        pass
    return None


def _linked(data: bytes, start: int, item: int) -> list[int]:
    """Numbers of the properties of an item, by the box ipma (ISO 14496-12, 8.11.14)."""
    version, wide = data[start], data[start + 3] & 1
    (entries,) = struct.unpack_from(">I", data, start + 4)
    position = start + 8
    for _ in range(min(entries, _MOST_BOXES)):
        (number,) = struct.unpack_from(">I" if version else ">H", data, position)
        position += 4 if version else 2
        count, found = data[position], []
        position += 1
        for _ in range(count):
            found.append(struct.unpack_from(">H", data, position)[0] & 0x7FFF if wide else data[position] & 0x7F)
            position += 2 if wide else 1
        if number == item:
            return found
    return []


def _note_jp2_colours(image: Image.Image, data: bytes) -> None:
    """The profile of a JP2, or that its colours are no kind of RGB, grey or CMYK; the first box counts."""
    try:
        header = _find(data, 0, len(data), b"jp2h")
        colours = _find(data, *header, b"colr") if header else None
        if header is None or colours is None:
            return
        _check_channels(data, *header)
        start, end = colours
        if data[start] != _ENUMERATED:
            image.info.setdefault("icc_profile", data[start + 3 : end])
            return
        (space,) = struct.unpack_from(">I", data, start + 3)
    except (struct.error, IndexError):
        return
    if space not in _READ_SPACES:
        raise LayerloopError(
            f"image is JPEG 2000 in the colour space {space} of its standard, which is not read: save it as PNG"
        )


def _check_channels(data: bytes, start: int, end: int) -> None:
    """Refuse channels that Pillow takes in another meaning (ISO 15444-1, I.5.3.6): it looks at no box `cdef`.

    Raises:
        LayerloopError: colours that are premultiplied, or in another order than that of their channels.
    """
    box = _find(data, start, end, b"cdef")
    if box is None:
        return
    (count,) = struct.unpack_from(">H", data, box[0])
    for entry in range(min(count, (box[1] - box[0] - 2) // 6)):
        channel, kind, colour = struct.unpack_from(">3H", data, box[0] + 2 + 6 * entry)
        if kind == _PREMULTIPLIED or (kind == _COLOUR and colour != channel + 1):
            raise LayerloopError(
                "image is JPEG 2000 with colours that are premultiplied or in another order, which is not read: save "
                "it as PNG"
            )


def _find(data: bytes, start: int, end: int, wanted: bytes) -> tuple[int, int] | None:
    """(start, end) of the content of the first box of a kind."""
    return next(((first, last) for kind, first, last in _boxes(data, start, end) if kind == wanted), None)


def _boxes(data: bytes, start: int, end: int) -> Iterator[tuple[bytes, int, int]]:
    """(kind, start, end of the content) of the boxes in a part of a file (ISO 14496-12, 4.2; JPEG 2000 likewise)."""
    for _ in range(_MOST_BOXES):
        if start + 8 > end:
            return
        size, kind = struct.unpack_from(">I4s", data, start)
        head = 8
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, start + 8)
            head = 16
        last = end if size == 0 else min(end, start + size)
        if last < start + head:
            return
        yield kind, start + head, last
        start = last

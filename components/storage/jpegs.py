"""JPEGs without megabytes of remarks, whose EXIF Pillow puts together in time that grows with the square of them."""

from __future__ import annotations

from collections.abc import Iterator

START = b"\xff\xd8\xff"
_MOST_REMARKS = 4_000_000  # bytes of segments that are no part of the pixels; beyond it only what is needed is kept
_APP0, _APP1, _APP2, _APP14, _APP15, _COMMENT = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_START_OF_SCAN = 0xDA
_ALONE = (0x01, 0xFF, *range(0xD0, 0xD9))  # markers without a length, and fill bytes


def without_excess(data: bytes) -> bytes:
    """A JPEG as it is or, where its remarks are many, with its first EXIF and its profile only."""
    segments = list(_segments(data))
    remarks = sum(end - start for marker, start, end in segments if _is_remark(marker))
    if remarks <= _MOST_REMARKS:
        return data
    kept, upto, exif = [], 0, False
    for marker, start, end in segments:
        if not _is_remark(marker) or _is_needed(marker, data[start + 4 : start + 16], exif=exif):
            exif = exif or marker == _APP1
            continue
        kept.append(data[upto:start])
        upto = end
    return b"".join([*kept, data[upto:]])


def _is_remark(marker: int) -> bool:
    return _APP0 <= marker <= _APP15 or marker == _COMMENT


def _is_needed(marker: int, head: bytes, *, exif: bool) -> bool:
    if marker == _APP1:
        return not exif and head.startswith(b"Exif\0\0")
    return marker in (_APP0, _APP14) or (marker == _APP2 and head.startswith(b"ICC_PROFILE\0"))


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """(marker, start, end) of the segments before the first scan (ITU-T T.81, annex B)."""
    position = 2
    while position + 4 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker == _START_OF_SCAN:
            return
        if marker in _ALONE:
            position += 1 if marker == 0xFF else 2
            continue
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield marker, position, end
        position = end

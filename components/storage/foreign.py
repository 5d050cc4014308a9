"""Files that are something else than their name or their place says, by their first bytes."""

from __future__ import annotations

import re
from typing import Final

HEAD: Final = 512  # bytes that are looked at

_EXPORT, _UNPACK, _CONVERT = "export it as PNG", "unpack it", "convert it to PNG"
_KINDS = tuple(
    (re.compile(start, re.DOTALL | re.IGNORECASE), what, remedy)
    for start, what, remedy in (
        (rb"version https://git-lfs", "a pointer of Git LFS and not the file itself", "fetch it with `git lfs pull`"),
        (rb"\s*(?:<!--.*?-->\s*)?<(?:!doctype html|html)", "a web page", "download the file itself"),
        (rb"\s*(?:<\?xml.*?)?<svg", "an SVG drawing", _EXPORT),
        (rb"8BPS", "a Photoshop document", _EXPORT),
        (rb"%PDF", "a PDF", _EXPORT),
        (rb"%!PS", "PostScript", _EXPORT),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL", _CONVERT),
        (rb"II\xbc\x01", "JPEG XR", _CONVERT),
        (rb"FUJIFILMCCD|....ftypcrx ", "a camera's raw file", _EXPORT),
        (rb"\x1f\x8b", "packed by gzip", _UNPACK),
        (rb"BZh[1-9]", "packed by bzip2", _UNPACK),
        (rb"\xfd7zXZ", "packed by xz", _UNPACK),
        (rb"\x28\xb5\x2f\xfd", "packed by zstd", _UNPACK),
        (rb"PK\x03\x04", "a zip", _UNPACK),
        (rb"7z\xbc\xaf", "a 7z archive", _UNPACK),
        (rb"Rar!", "a rar archive", _UNPACK),
        (rb".{257}ustar", "a tar", "name it .tar"),
        (rb"PAR1", "a parquet table", "name it .parquet"),
        (rb"ARROW1", "an Arrow table", "write it as parquet"),
    )
)  # fmt: skip


def foreign_kind(head: bytes) -> tuple[str, str] | None:
    """(what a file is, what to do) by its first HEAD bytes; None where they tell nothing."""
    return next(((what, remedy) for start, what, remedy in _KINDS if start.match(head)), None)

"""One image of the inputs, and the names of files that are images or are passed over."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from layerloop.components.schema.messages import printable
from layerloop.components.shard_dataset.files import Passed, suffix_of

IMAGE_SUFFIXES = frozenset((
    "png", "jpg", "jpeg", "jfif", "webp", "avif", "heic", "heif", "gif", "bmp", "tif", "tiff", "jp2", "j2k", "ppm",
    "pgm",
))  # fmt: skip
_PACKED = ("gz", "tgz", "bz2", "tbz2", "xz", "txz", "zst", "zip", "7z", "rar")


@dataclass(frozen=True)
class Item:
    """One image: its origin (printable), and either how to get its bytes or why that is impossible."""

    origin: str
    load: Callable[[], bytes]
    problem: str | None = None


def sized_item(origin: str, size: int, max_bytes: int, load: Callable[[], bytes]) -> Item:
    """An image of `size` encoded bytes; over `max_bytes` it is a problem, and is not read."""
    if size > max_bytes:
        return broken_item(
            origin, f"file has {size / 1e6:.0f} MB, over the {max_bytes / 1e6:.0f} allowed: make it smaller"
        )
    return Item(origin, load)


def broken_item(origin: str, problem: str) -> Item:
    """An image that cannot be read."""
    return Item(origin, lambda: b"", problem)


def one_line(error: BaseException, most: int = 120) -> str:
    """What an exception of a library says, in `most` characters at most, printable."""
    return printable(" ".join(str(error).split()))[:most] or type(error).__name__


def hidden(name: str) -> bool:
    """Dot files, `.DS_Store` and the `._photo.jpg` of macOS among them, and what lies in dot folders."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def passed_over(name: str) -> Passed:
    """A file that is not read, for its name."""
    if hidden(name):
        return Passed(printable(name), "hidden", "hidden files are not read")
    suffix = suffix_of(name)
    if not suffix:
        return Passed(printable(name), "without suffix", "a file without a suffix is not read: name it .png or .jpg")
    kind = f".{printable(suffix)}"
    if suffix in ("tar", "parquet"):
        return Passed(printable(name), kind, f"{kind} within a tar is not read: give it by itself")
    if suffix in _PACKED:
        return Passed(printable(name), kind, f"{kind} is packed, which is not read: unpack it")
    return Passed(printable(name), kind, f"{kind} is not read: convert it to PNG or JPEG if it is an image")

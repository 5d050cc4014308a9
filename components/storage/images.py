"""Images in and out of bytes: bounded when they come from outside, exact when they are our own PNGs."""

from __future__ import annotations

import functools
import io
import re
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.colour_boxes import bare_avif, note_colours
from layerloop.components.storage.foreign import HEAD, foreign_kind
from layerloop.components.storage.jpegs import START, without_excess
from layerloop.components.storage.pngs import SIGNATURE, bare_png, check_palette, check_rows, take_clear, unlike
from layerloop.components.storage.tiffs import choose_page, set_layout

if TYPE_CHECKING:
    from PIL import Image

# What photographs and designs come as. Not EPS (runs Ghostscript) nor formats that are not in use.
_KINDS = "PNG, JPEG, WebP, HEIC, GIF, BMP, TIFF, JPEG 2000 or AVIF"
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM")

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_STARTS = {
    re.compile(start, re.DOTALL): kind
    for start, kind in (
        (rb"\x89PNG", "PNG"), (rb"\xff\xd8\xff", "JPEG"), (rb"II[*+]\0|MM\0[*+]", "TIFF"), (rb"GIF8", "GIF"),
        (rb"RIFF....WEBP", "WebP"), (rb"BM", "BMP"), (rb"\0\0\0\x0cjP|\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"P[1-6]\s", "PPM"),
    )
}  # fmt: skip

MAX_PIXELS = 100_000_000  # of our own PNGs too: a shard may have been made by someone else


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an untrusted image with its header read and its size checked; no pixel is decoded yet.

    Of a TIFF it is the first page that is not marked as a thumbnail of another. One whose remarks (texts, profiles,
    EXIF) cannot be read is opened without them.

    Raises:
        LayerloopError: empty, not an image, without pixels, only a thumbnail, or larger than `max_pixels`.
    """
    return _with_or_without_remarks(_opened, data, max_pixels)


def _opened(data: bytes, max_pixels: int) -> Image.Image:
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise LayerloopError(f"image is empty (0 bytes): give a {_KINDS}")
    _silence()
    formats = ("PNG",) if data.startswith(SIGNATURE) else _formats()  # all others take a tenth of a second to load
    # Pillow's own bound may be below ours: it is raised, never lowered, to what the caller allows.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    if data.startswith(START):
        data = without_excess(data)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.format == "TIFF":
            choose_page(image)
            set_layout(image)
        elif image.format == "PNG":
            check_palette(image)
        elif image.format == "AVIF":
            image.info.pop("xmp", None)  # Pillow would turn it by that; its boxes alone do (ISO 23000-22, 7.2)
        note_colours(image, data)
    except LayerloopError:
        raise
    except UnidentifiedImageError:
        if data[4:8] == b"ftyp" and data[8:12] in _HEIF_BRANDS:
            raise LayerloopError("image is HEIC or AVIF, truncated or damaged: save it again") from None
        if kind := next((kind for start, kind in _STARTS.items() if start.match(data)), None):
            raise LayerloopError(
                f"image is {kind} by its first bytes, but cut off, damaged or of a kind that is not read: save it "
                "again as PNG with 8 bits"
            ) from None
        if foreign := foreign_kind(data[:HEAD]):
            raise LayerloopError(f"image starts with {data[:12]!r}, it is {foreign[0]}: {foreign[1]}") from None
        raise LayerloopError(f"image starts with {data[:12]!r}, not a known format: give a {_KINDS}") from None
    except Image.DecompressionBombError:
        raise LayerloopError(
            f"image is more than twice over {max_pixels / 1e6:g} megapixels: make it smaller"
        ) from None
    except Exception as error:  # Pillow's parsers raise nearly anything on hostile headers
        raise LayerloopError(f"image header is damaged ({_short(error)}): save it again") from None
    width, height = image.size
    if width < 1 or height < 1:
        raise LayerloopError(f"image is {width} x {height} pixels: give one with pixels")
    if width * height > max_pixels:
        raise LayerloopError(
            f"image is {width} x {height}, {width * height / 1e6:.1f} megapixels, over the {max_pixels / 1e6:g} "
            "allowed: make it smaller or raise recipe.data.max_megapixels"
        )
    return image


def decode_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Decode the first frame of an untrusted image; its size is checked before any pixel is decoded.

    One whose remarks (texts, profiles, EXIF) cannot be read is decoded without them.

    Raises:
        LayerloopError: as `open_image`, or truncated or damaged.
    """
    image = _with_or_without_remarks(_decoded, data, max_pixels)
    if image.format == "PNG":
        check_rows(image, data)
    return image


def _with_or_without_remarks(read: Callable[[bytes, int], Image.Image], data: bytes, max_pixels: int) -> Image.Image:
    """What `read` makes of an image or, where that fails, of the image without what is no part of its pixels."""
    try:
        return read(data, max_pixels)
    except LayerloopError:
        bare = bare_png(data) or bare_avif(data)
        if bare is None:
            raise
        try:
            return read(bare, max_pixels)
        except LayerloopError:
            pass
        raise


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    image = _opened(data, max_pixels)
    clear = take_clear(image, data) if image.format == "PNG" else None
    try:
        image.load()
        if clear is not None:
            image.putalpha(unlike(image, _opened(data, max_pixels), clear))
    except MemoryError:
        size = " x ".join(map(str, image.size))
        raise LayerloopError(f"image of {size} pixels does not fit in memory: make it smaller") from None
    except Exception as error:  # as above, on hostile pixels
        raise LayerloopError(f"image is truncated or damaged ({_short(error)}): save it again") from None
    if image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0):
        image.putalpha(255)  # a byte that Windows leaves at 0, as browsers take it
    return image


def encode_png(array: np.ndarray) -> bytes:
    """PNG of (H, W), (H, W, 3) or (H, W, 4) uint8; exact, also for colour under zero alpha.

    Raises:
        ValueError: another shape or type.
    """
    from PIL import Image

    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (3, 4)):
        raise ValueError(f"array is {array.dtype}{list(array.shape)}, not uint8 of (H, W), (H, W, 3) or (H, W, 4)")
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(array)).save(buffer, "PNG", compress_level=6)
    return buffer.getvalue()


def decode_png(data: bytes, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """The array that `encode_png` was given.

    Raises:
        LayerloopError: as `decode_image`, or a PNG of another kind than `encode_png` makes.
    """
    image = _with_or_without_remarks(_decoded, data, max_pixels)
    if image.format != "PNG" or image.mode not in ("L", "RGB", "RGBA"):
        raise LayerloopError(
            f"image is {image.format} {image.mode}, not an 8-bit PNG of layerloop: make the shard again"
        )
    return np.asarray(image)


def read_png(
    members: Mapping[str, bytes],
    name: str,
    *,
    where: str,
    size: tuple[int, ...] | None = None,
    remedy: str = "make the shard again",
) -> np.ndarray:
    """A member of a sample by `decode_png`; where its size is known, (height, width), nothing of another is decoded.

    Raises:
        LayerloopError: as `decode_png`, of another size, or missing, in a line that begins with `where` and names it.
    """
    if name not in members:
        raise LayerloopError(f"{where} lacks {name}: {remedy}")
    try:
        if size is not None and (found := _opened(members[name], MAX_PIXELS).size[::-1]) != size:
            sizes = " x ".join(map(str, found)), " x ".join(map(str, size))
            raise LayerloopError(f"image is {sizes[0]}, its group's record says {sizes[1]}: {remedy}")
        return decode_png(members[name])
    except LayerloopError as error:
        raise LayerloopError(f"{where}.{name}: {error}") from None


@functools.cache
def _silence() -> None:
    """Pillow's warnings are of images that are refused anyway."""
    warnings.filterwarnings("ignore", module=r"PIL\.")


@functools.cache
def _formats() -> tuple[str, ...]:
    """The FORMATS that this build of Pillow reads."""
    import pillow_heif
    from PIL import Image

    pillow_heif.register_heif_opener()  # photographs of phones; turned upright by it, with EXIF's orientation reset
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _short(error: Exception) -> str:
    return " ".join(f"{error}".split())[:120] or type(error).__name__

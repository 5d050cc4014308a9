"""Images in and out of bytes: bounded when they come from outside, exact when they are our own PNGs."""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.tiffs import choose_page, set_layout

if TYPE_CHECKING:
    from PIL import Image

# What photographs and designs come as. Not EPS (runs Ghostscript) nor formats that are not in use.
_KINDS = "PNG, JPEG, WebP, HEIC, GIF, BMP, TIFF, JPEG 2000 or AVIF"
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "JPEG2000", "AVIF", "HEIF", "PPM")

_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"mif1", b"msf1", b"avif", b"avis")
_PNG = b"\x89PNG\r\n\x1a\n"
_STARTS = {
    re.compile(start, re.DOTALL): kind
    for start, kind in (
        (rb"\x89PNG", "PNG"), (rb"\xff\xd8\xff", "JPEG"), (rb"II[*+]\0|MM\0[*+]", "TIFF"), (rb"GIF8", "GIF"),
        (rb"RIFF....WEBP", "WebP"), (rb"BM", "BMP"), (rb"\0\0\0\x0cjP|\xff\x4f\xff\x51", "JPEG 2000"),
        (rb"P[1-6]\s", "PPM"),
    )
}  # fmt: skip
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")
_MAX_PROFILE = 1 << 20  # bytes; Pillow's own limit of an unpacked chunk

MAX_PIXELS = 100_000_000  # of our own PNGs too: a shard may have been made by someone else


def open_image(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The first frame of an untrusted image with its header read and its size checked; no pixel is decoded yet.

    Of a TIFF it is the first page that is not marked as a thumbnail of another.

    Raises:
        LayerloopError: empty, not an image, without pixels, only a thumbnail, or larger than `max_pixels`.
    """
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise LayerloopError(f"image is empty (0 bytes): give a {_KINDS}")
    _silence()
    formats = ("PNG",) if data.startswith(_PNG) else _formats()  # all others take a tenth of a second to load
    # Pillow's own bound may be below ours: it is raised, never lowered, to what the caller allows.
    Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=formats)
        if image.format == "TIFF":
            choose_page(image)
            set_layout(image)
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

    A PNG whose ancillary chunks (texts, profiles, EXIF) cannot be read is decoded without them.

    Raises:
        LayerloopError: as `open_image`, or truncated or damaged.
    """
    try:
        return _decoded(data, max_pixels)
    except LayerloopError:
        bare = _bare_png(data)
        if bare is None:
            raise
        try:
            return _decoded(bare, max_pixels)
        except LayerloopError:
            pass
        raise


def _decoded(data: bytes, max_pixels: int) -> Image.Image:
    image = open_image(data, max_pixels=max_pixels)
    clear = _take_clear(image, data)
    try:
        image.load()
        if clear is not None:
            image.putalpha(_unlike(image, data, clear))
    except MemoryError:
        size = " x ".join(map(str, image.size))
        raise LayerloopError(f"image of {size} pixels does not fit in memory: make it smaller") from None
    except Exception as error:  # as above, on hostile pixels
        raise LayerloopError(f"image is truncated or damaged ({_short(error)}): save it again") from None
    return image


def _take_clear(image: Image.Image, data: bytes) -> tuple[int, ...] | None:
    """Bring the clear colour of a PNG's tRNS to the 8 bits of Pillow's pixels, which it does not: of 2 or 4 bits grey.
    That of 16 bits colour has no 8 bits and is taken away and returned."""
    clear, depth = image.info.get("transparency"), data[24] if data[12:16] == b"IHDR" else 8
    if image.format != "PNG" or clear is None:
        return None
    if image.mode == "RGB" and depth == 16 and isinstance(clear, tuple):
        return tuple(image.info.pop("transparency"))
    if image.mode == "L" and depth in (2, 4) and isinstance(clear, int):
        if clear >= 2**depth:
            del image.info["transparency"]
        else:
            image.info["transparency"] = clear * 255 // (2**depth - 1)
    return None


def _unlike(image: Image.Image, data: bytes, clear: tuple[int, ...]) -> Image.Image:
    """Alpha of a decoded PNG of 16 bits colour: 0 where a pixel is the clear colour in all its bits. Pillow decodes the
    high bytes; read as little-endian, the low ones are the high ones."""
    from PIL import Image

    low = open_image(data, max_pixels=image.width * image.height)
    low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]  # type: ignore[attr-defined]
    values = np.asarray(image).astype(np.uint16) << 8 | np.asarray(low)
    return Image.fromarray(np.where((values == clear).all(axis=-1), 0, 255).astype(np.uint8))


def _bare_png(data: bytes) -> bytes | None:
    """A PNG's chunks that make its pixels, and those of its colours and orientation that are whole; None where nothing
    is left out. Nothing is decompressed beyond what Pillow itself allows."""
    if not data.startswith(_PNG):
        return None
    kept, position, left_out = [_PNG], len(_PNG), False
    while position + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, position)
        end = position + 12 + length
        if kind in _PIXEL_CHUNKS or (kind in (b"iCCP", b"eXIf") and _is_whole(data[position + 4 : end])):
            kept.append(data[position:end])
        else:
            left_out = True
        position = end
        if kind == b"IEND":
            break
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
    image = decode_image(data, max_pixels=max_pixels)
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
        if size is not None and (found := open_image(members[name]).size[::-1]) != size:
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

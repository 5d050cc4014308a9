"""Normalisation of source images to upright sRGB, with or without alpha, at the policy's size, and their keys."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import struct
from typing import TYPE_CHECKING, Self

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.colours import profile_of
from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import Image

    from layerloop.components.schema.recipe import DataRecipe

Pixels = npt.NDArray[np.uint8]

_ORIENTATION = 0x0112  # tag of EXIF
# White and black of each mode that a profile is of; what a sound profile makes of them, in levels of sRGB.
_ENDS: dict[str, tuple[float | tuple[float, ...], float | tuple[float, ...]]] = {
    "L": (255, 0), "RGB": ((255, 255, 255), (0, 0, 0)), "RGBA": ((255, 255, 255, 255), (0, 0, 0, 255)),
    "CMYK": ((0, 0, 0, 0), (0, 0, 0, 255)),
}  # fmt: skip
_WHITE, _BLACK = 192, 128
_AT_ONCE = 1 << 18  # grey values that are scaled at once


def normalise(image: Image.Image, data: DataRecipe) -> Pixels:
    """`(H, W, 3)` uint8 of a decoded image, as the authors feed theirs: LANCZOS to `target_size`.

    Raises:
        LayerloopError: an extreme aspect ratio, or as `upright_srgb`.
    """
    return resized(on_white(upright_srgb(image)), data)


def resized(image: Image.Image, data: DataRecipe) -> Pixels:
    """`(H, W, 3)` uint8 of an RGB image at `target_size`.

    Raises:
        LayerloopError: an extreme aspect ratio.
    """
    from PIL import Image

    return np.asarray(image.resize(target_size(*image.size, data), Image.Resampling.LANCZOS))


def upright_srgb(image: Image.Image) -> Image.Image:
    """A decoded image as 8-bit RGB or RGBA: the one form of source images, of layers and of elements.

    The EXIF orientation is applied, and colours of which the image says that they are others (colours.py) are converted
    to sRGB. Metadata that are damaged say nothing, and spoil no image.

    Raises:
        LayerloopError: a pixel format that has no sensible 8-bit form, or colours of high dynamic range.
    """
    profile, grey = profile_of(image), GreyRange.of(image)
    image = _upright(image)
    image, alpha = _eight_bit(image, grey)
    image = _to_srgb(image, profile)
    if alpha is not None:
        image.putalpha(alpha)
    return image


@dataclasses.dataclass(frozen=True)
class GreyRange:
    """What the values of a grey image of more than 8 bits mean: the largest, and whether 0 is white."""

    top: float
    inverted: bool = False
    unsaid: bool = False  # values of 32 bits, whose range is that of their writer

    @classmethod
    def of(cls, image: Image.Image) -> Self:
        """Of a decoded image; of TIFF by its tags BitsPerSample, SampleFormat and PhotometricInterpretation (TIFF
        6.0, sections 8 and 19), which Pillow applies to 8 bits only."""
        tags = getattr(image, "tag_v2", None) or {}
        bits, photometric = tags.get(258) or (16,), tags.get(262)
        wide, signed = image.mode in ("I", "F"), tags.get(339) == (2,) and tuple(bits) == (16,)
        top = 1.0 if image.mode == "F" else 4095.0 if tuple(bits) == (12,) else 32767.0 if signed else 65535.0
        return cls(top, inverted=photometric == 0, unsaid=wide and tuple(bits) == (32,))

    def scaled(self, values: npt.NDArray[np.generic]) -> Pixels:
        """Values `(H, W)` as 8 bits, a few rows at a time: as float64 they take eight bytes each."""
        out = np.empty(values.shape, np.uint8)
        step = max(1, _AT_ONCE // values.shape[1])
        for start in range(0, len(values), step):
            rows = slice(start, start + step)
            shares = values[rows].astype(np.float64) * (255 / self.top)
            out[rows] = np.rint(255 - shares if self.inverted else shares)
        return out


def target_size(width: int, height: int, data: DataRecipe, *, stretch: bool = False) -> tuple[int, int]:
    """(width, height) with the longest side at the recipe's resolution, each side `round(side * scale / m) * m`.

    Smaller images are enlarged: all training images have one scale, as at the released model's inference.

    Args:
        stretch: a short side that would be under half a multiple becomes one multiple, and the image is distorted.

    Raises:
        LayerloopError: so elongated that the short side would be under half a multiple.
    """
    scale = data.resolution / max(width, height)
    sides = [round(side * scale / data.multiple) * data.multiple for side in (width, height)]
    if stretch:
        sides = [max(side, data.multiple) for side in sides]
    if min(sides) == 0:
        raise LayerloopError(
            f"image is {width} x {height}, at most {min(width, height) * scale:.1f} pixels on its short side at "
            f"{data.resolution}: crop it"
        )
    return sides[0], sides[1]


def image_key(pixels: Pixels) -> str:
    """First 16 hex digits of the sha256 of size and pixels: the image's key everywhere, free of dots."""
    height, width = pixels.shape[:2]
    return hashlib.sha256(f"{width}x{height}:".encode() + np.ascontiguousarray(pixels).tobytes()).hexdigest()[:16]


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF orientation says, whatever else stands in the EXIF."""
    from PIL import Image

    turned = Image.Transpose
    method = {
        2: turned.FLIP_LEFT_RIGHT, 3: turned.ROTATE_180, 4: turned.FLIP_TOP_BOTTOM, 5: turned.TRANSPOSE,
        6: turned.ROTATE_270, 7: turned.TRANSVERSE, 8: turned.ROTATE_90,
    }.get(orientation(image))  # fmt: skip
    return image if method is None else image.transpose(method)


def orientation(image: Image.Image) -> int:
    """EXIF orientation 1..8; 1 where there is none that can be read."""
    try:
        value: object = image.getexif().get(_ORIENTATION)
    except Exception:  # Pillow raises nearly anything on hostile EXIF, struct.error and SyntaxError among them
        value = None
    if value is None:
        exif = image.info.get("exif")
        value = _raw_orientation(exif) if isinstance(exif, bytes) else None
    if isinstance(value, bytes) and len(value) == 1:  # written as BYTE, not as SHORT
        value = value[0]
    try:
        return int(float(value)) if value is not None else 1  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        return 1


def _raw_orientation(exif: bytes) -> int | None:
    """The orientation of the first directory, read without a look at any other tag (TIFF 6.0, section 2)."""
    data = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(data[:2])
    try:
        if order is None:
            return None
        (start,) = struct.unpack_from(f"{order}I", data, 4)
        (count,) = struct.unpack_from(f"{order}H", data, start)
        for entry in range(start + 2, start + 2 + 12 * count, 12):
            tag, kind, length = struct.unpack_from(f"{order}HHI", data, entry)
            if (tag, kind, length) == (_ORIENTATION, 3, 1):  # one SHORT, which lies in the entry itself
                return int(struct.unpack_from(f"{order}H", data, entry + 8)[0])
    except struct.error:  # the directory ends early
        return None
    return None


def _eight_bit(image: Image.Image, grey: GreyRange) -> tuple[Image.Image, Image.Image | None]:
    """(image in 8-bit L, RGB, RGBA or CMYK, its values scaled and not clipped; alpha of its own for grey)."""
    from PIL import Image

    clear = image.info.get("transparency")
    if image.mode.startswith("I;16"):
        values = np.asarray(image)
        alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)) if clear is not None else None
        return Image.fromarray(grey.scaled(values)), alpha
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > grey.top or not np.isfinite(values).all():
            raise LayerloopError(f"image has 32-bit values outside 0..{grey.top:g}: save it with 8 or 16 bits")
        if grey.unsaid and 1 < values.max() <= 255:
            raise LayerloopError(
                f"image has 32-bit values up to {values.max():g}, of 255 or 65535: save it with 8 bits"
            )
        return Image.fromarray(grey.scaled(values)), None
    if image.mode in ("L", "RGB", "RGBA", "CMYK") and clear is None:
        return image, None
    if image.mode in ("LA", "La", "L"):  # grey with alpha keeps its colour space, which its profile is of
        both = image.convert("LA")
        return both.getchannel("L"), both.getchannel("A")
    if image.mode in ("PA", "RGBa", "RGBX") or clear is not None:
        return image.convert("RGBA" if image.mode != "RGBX" else "RGB"), None
    if image.mode == "1":
        return image.convert("L"), None
    if image.mode == "LAB":
        return _lab_to_srgb(image), None
    return image.convert("RGB"), None  # P, YCbCr, HSV


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours converted from the embedded profile; a profile that is damaged or of another colour space is ignored, as
    is one that makes no white of white or no dark of black: its curves or tables are damaged."""
    from PIL import Image, ImageCms

    target = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile and image.mode in ("RGB", "RGBA") and profile[16:20] == b"GRAY" and _is_grey(image):
        alpha = image.getchannel("A") if image.mode == "RGBA" else None
        image = _to_srgb(image.getchannel("R"), profile)  # grey in a format that has none, such as WebP
        if alpha is not None:
            image.putalpha(alpha)
        return image
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), image.mode, target)
            white, black = (
                np.asarray(ImageCms.applyTransform(Image.new(image.mode, (1, 1), colour), transform))[0, 0, :3]
                for colour in _ENDS[image.mode]
            )
            sound = white.min() >= _WHITE and black.max() <= _BLACK
            converted = ImageCms.applyTransform(image, transform) if sound else None
        except Exception:  # hostile profiles make lcms and Pillow raise several kinds
            converted = None
        if converted is not None:
            return converted
    return image.convert(target)


def _is_grey(image: Image.Image) -> bool:
    values = np.asarray(image)
    return bool((values[..., :1] == values[..., 1:3]).all())


def _lab_to_srgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # only in place it returns None
    return converted


def on_white(image: Image.Image) -> Image.Image:
    """RGB of an RGB or RGBA image, laid on white."""
    from PIL import Image

    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")

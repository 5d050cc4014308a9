"""Normalisation of source images to upright sRGB without alpha at the policy's size, and their keys."""

from __future__ import annotations

import hashlib
import io
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import Image

    from layerloop.components.schema.recipe import DataRecipe

Pixels = npt.NDArray[np.uint8]


def normalise(image: Image.Image, data: DataRecipe) -> Pixels:
    """`(H, W, 3)` uint8 of a decoded image, as the authors feed theirs: LANCZOS to `target_size`.

    The EXIF orientation is applied, an embedded ICC profile is converted to sRGB, and alpha is flattened onto white.

    Raises:
        LayerloopError: an extreme aspect ratio, or a pixel format that has no sensible 8-bit form.
    """
    from PIL import Image, ImageOps

    target_size(*image.size, data)  # refused before the work is done
    profile = image.info.get("icc_profile")
    image = ImageOps.exif_transpose(image)
    image = _on_white(_to_srgb(_eight_bit(image), profile))
    return np.asarray(image.resize(target_size(*image.size, data), Image.Resampling.LANCZOS))


def target_size(width: int, height: int, data: DataRecipe) -> tuple[int, int]:
    """(width, height) with the longest side at the recipe's resolution, each side `round(side * scale / m) * m`.

    Smaller images are enlarged: all training images have one scale, as at the released model's inference.

    Raises:
        LayerloopError: so elongated that the short side would be under half a multiple.
    """
    scale = data.resolution / max(width, height)
    sides = [round(side * scale / data.multiple) * data.multiple for side in (width, height)]
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


def _eight_bit(image: Image.Image) -> Image.Image:
    """The image in one of 8-bit L, RGB, RGBA or CMYK, its values scaled and not clipped; transparency becomes alpha."""
    from PIL import Image

    if image.mode.startswith("I;16"):
        return Image.fromarray(_scaled(np.asarray(image), 65535))
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        top = {"I": 65535.0, "F": 1.0}[image.mode]
        if values.min() < 0 or values.max() > top or not np.isfinite(values).all():
            raise LayerloopError(f"image has 32-bit values outside 0..{top:g}: save it with 8 or 16 bits")
        return Image.fromarray(_scaled(values, top))
    if image.mode in ("L", "RGB", "RGBA", "CMYK") and "transparency" not in image.info:
        return image
    if image.mode in ("LA", "La", "PA", "RGBa", "RGBX") or "transparency" in image.info:
        return image.convert("RGBA" if image.mode != "RGBX" else "RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode == "LAB":
        return _lab_to_srgb(image)
    return image.convert("RGB")  # P, YCbCr, HSV


def _scaled(values: npt.NDArray[np.generic], top: float) -> Pixels:
    return np.rint(values.astype(np.float64) * (255 / top)).astype(np.uint8)


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Colours converted from the embedded profile; a profile that is damaged or of another colour space is ignored."""
    from PIL import ImageCms

    target = "RGBA" if image.mode == "RGBA" else "RGB"
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(image, source, ImageCms.createProfile("sRGB"), outputMode=target)
        except (ImageCms.PyCMSError, OSError, ValueError):
            converted = None
        if converted is not None:
            return converted
    return image.convert(target)


def _lab_to_srgb(image: Image.Image) -> Image.Image:
    from PIL import ImageCms

    converted = ImageCms.profileToProfile(
        image, ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), outputMode="RGB"
    )
    assert converted is not None  # only in place it returns None
    return converted


def _on_white(image: Image.Image) -> Image.Image:
    from PIL import Image

    if image.mode == "RGB":
        return image
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image).convert("RGB")

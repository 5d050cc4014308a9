"""The colours that an image says it has: by an ICC profile, by code points (ITU-T H.273), by EXIF or by PNG's gamma.

All become an ICC profile, so that one way leads to sRGB. What is near enough to sRGB says nothing.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import Image

CODE_POINTS = "cicp"  # in an image's info: (colour primaries, transfer characteristics) by H.273

Chromaticities = tuple[float, ...]  # x and y of white, red, green and blue
_D65 = (0.3127, 0.3290)
_SRGB: Chromaticities = (*_D65, 0.64, 0.33, 0.30, 0.60, 0.15, 0.06)
_ADOBE_RGB: Chromaticities = (*_D65, 0.64, 0.33, 0.21, 0.71, 0.15, 0.06)
# H.273, table 2. Those of standard television (5 to 7) are near to sRGB's, and written without thought.
_PRIMARIES: Mapping[int, Chromaticities] = {
    9: (*_D65, 0.708, 0.292, 0.170, 0.797, 0.131, 0.046),  # BT.2020
    11: (0.314, 0.351, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # DCI-P3
    12: (*_D65, 0.680, 0.320, 0.265, 0.690, 0.150, 0.060),  # Display P3
}
# H.273, table 3: exponents. Those of video (1, 6, 14, 15) are shown by sRGB's curve, as browsers do.
_EXPONENTS: Mapping[int, float] = {4: 2.2, 5: 2.8, 8: 1.0}
_HDR = {16: "PQ", 18: "HLG"}

_EXIF_IFD, _INTEROPERABILITY_IFD, _INTEROPERABILITY_INDEX = 0x8769, 0xA005, 1
_DCF_OPTIONAL = "R03"  # DCF 2.0: the colours are AdobeRGB, which cameras say so and not by a profile
_ADOBE_EXPONENT = 2 + 51 / 256

_GAMMA = 1 / 2.2
_SAME_GAMMA, _SAME_CHROMATICITY = 0.05, 0.01  # libpng's threshold; a step that no eye sees

_GREYS = ("1", "L", "LA", "La", "I", "F")
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
_D50 = (0.9642, 1.0, 0.8249)  # of the profile connection space
_SRGB_CURVE = (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)  # ICC.1, parametric curve of type 3


def profile_of(image: Image.Image) -> bytes | None:
    """The ICC profile of a decoded image's colours; None where they are sRGB's.

    PNG's code points go before its profile (PNG, third edition, section 4.3), a profile before all others.

    Raises:
        LayerloopError: the colours are of high dynamic range, whose values mean nothing in 8 bits of sRGB.
    """
    points, profile = image.info.get(CODE_POINTS), image.info.get("icc_profile") or None
    inside = _code_points_in(profile) if profile else None
    for _, transfer in (pair for pair in (points, inside) if pair):
        if transfer in _HDR:
            raise LayerloopError(
                f"image is of high dynamic range ({_HDR[transfer]}), which has no 8-bit form: export it as SDR"
            )
    grey = image.mode in _GREYS or image.mode.startswith("I;16")
    if points and (image.format == "PNG" or not profile):
        primaries, exponent = _PRIMARIES.get(points[0]), _EXPONENTS.get(points[1])
        return None if primaries is None and exponent is None else _made(grey, primaries or _SRGB, exponent)
    if profile or image.mode == "CMYK":
        return profile
    if image.format == "PNG":
        return _of_gamma(image.info, grey)
    return _made(grey, _ADOBE_RGB, _ADOBE_EXPONENT) if _is_adobe_rgb(image) else None


def _of_gamma(info: Mapping[Any, Any], grey: bool) -> bytes | None:
    """Of a PNG's gAMA and cHRM, which sRGB makes void."""
    gamma, said = info.get("gamma"), info.get("chromaticity")
    exponent = None
    if isinstance(gamma, float) and 0.1 < gamma < 10 and abs(gamma / _GAMMA - 1) > _SAME_GAMMA:
        exponent = 1 / gamma
    primaries = tuple(map(float, said)) if isinstance(said, Sequence) and len(said) == 8 else _SRGB
    if max(abs(one - other) for one, other in zip(primaries, _SRGB, strict=True)) <= _SAME_CHROMATICITY:
        primaries = _SRGB
    if "srgb" in info or (exponent is None and (primaries == _SRGB or grey)):
        return None
    return _made(grey, primaries, exponent)


def _is_adobe_rgb(image: Image.Image) -> bool:
    try:
        exif = image.getexif()
        exif.get_ifd(_EXIF_IFD)
        return str(exif.get_ifd(_INTEROPERABILITY_IFD).get(_INTEROPERABILITY_INDEX)).rstrip("\0 ") == _DCF_OPTIONAL
    except Exception:  # Pillow raises nearly anything on hostile EXIF
        return False


def _code_points_in(profile: bytes) -> tuple[int, int] | None:
    """Code points of a profile's `cicp` tag (ICC.1:2022, 10.3)."""
    try:
        for entry in range(132, 132 + 12 * min(100, struct.unpack_from(">I", profile, 128)[0]), 12):
            if profile[entry : entry + 4] == b"cicp":
                (offset,) = struct.unpack_from(">I", profile, entry + 4)
                return profile[offset + 8], profile[offset + 9]
    except (struct.error, IndexError):
        pass
    return None


@functools.cache
def _made(grey: bool, primaries: Chromaticities, exponent: float | None) -> bytes | None:
    """A profile of these primaries and of values that are light to this power, or by sRGB's curve; None where there is
    no such thing."""
    if exponent is None:
        curve = struct.pack(">4s4xHH5i", b"para", 3, 0, *_fixed(_SRGB_CURVE))
    else:
        curve = struct.pack(">4s4xHHi", b"para", 0, 0, *_fixed([exponent]))
    tags = {b"wtpt": _xyz(_D50), b"desc": _text("layerloop"), b"cprt": _text("none")}
    if grey:
        return _profile(b"GRAY", tags | {b"kTRC": curve})
    try:
        columns = _to_xyz(primaries).T
    except (np.linalg.LinAlgError, ZeroDivisionError):
        return None
    if not np.isfinite(columns).all() or np.abs(columns).max() > 2:
        return None
    for name, column in zip("rgb", columns, strict=True):
        tags |= {f"{name}XYZ".encode(): _xyz(column), f"{name}TRC".encode(): curve}
    return _profile(b"RGB ", tags)


def _to_xyz(primaries: Chromaticities) -> np.ndarray:
    """`(3, 3)` from linear RGB to XYZ, adapted to D50 by Bradford's matrix (ICC.1, annex E)."""
    white, *colours = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in np.reshape(primaries, (4, 2)).tolist())
    matrix = np.stack(colours, axis=1)
    cones = _BRADFORD @ np.asarray(_D50) / (_BRADFORD @ white)
    adapted: np.ndarray = np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ matrix
    return adapted * np.linalg.solve(matrix, white)


def _profile(space: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A display profile of version 4.4 (ICC.1:2022, section 7)."""
    table, body, start = b"", b"", 132 + 12 * len(tags)
    for name, content in tags.items():
        table += struct.pack(">4sII", name, start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    head = struct.pack(">I4xI4s4s4s12x4s", start + len(body), 0x04400000, b"mntr", space, b"XYZ ", b"acsp")
    head = (head + bytes(28) + struct.pack(">3i", *_fixed(_D50))).ljust(128, b"\0")
    return head + struct.pack(">I", len(tags)) + table + body


def _xyz(values: Sequence[float] | np.ndarray) -> bytes:
    return struct.pack(">4s4x3i", b"XYZ ", *_fixed(values))


def _text(text: str) -> bytes:
    encoded = text.encode("utf-16-be")
    return struct.pack(">4s4xII4sII", b"mluc", 1, 12, b"enUS", len(encoded), 28) + encoded


def _fixed(values: Sequence[float] | np.ndarray) -> list[int]:
    return [round(float(value) * 65536) for value in values]

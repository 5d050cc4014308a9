"""Planes that measures share: images laid on backdrops in floating point, gradients, areas that grow."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.stack import Pixels

Floats = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]

FAINT = 2 / 255  # alpha up to this counts as transparent
SOLID = 0.9  # alpha from this on counts as opaque
LUMA = np.array([0.299, 0.587, 0.114])  # Rec. 601


def cleared(stack: Pixels, *, faint: float = FAINT) -> Pixels:
    """The stack with every alpha of 2/255 or less set to 0: what nobody sees, such as a decoder's noise, is no layer.

    LayerD's protocol takes such alpha for overlap: on a toy case of three groups, a floor of 1/255 costs 0.26 of alpha
    IoU. Its numbers after clearing are reported in addition to those without, for all models alike.
    """
    out = stack.copy()
    out[..., 3][out[..., 3] <= faint * 255] = 0
    return out


def completed(stack: Pixels, layers: int) -> Pixels:
    """The stack `(L, H, W, 4)` with blank layers on top, where it has fewer than `layers`."""
    lacking = max(0, layers - len(stack))
    return np.concatenate([stack, np.zeros((lacking, *stack.shape[1:]), np.uint8)]) if lacking else stack


def laid(*images: Pixels) -> list[Floats]:
    """Each image `(..., H, W, 4)` laid on black and on white, `(2, ..., H, W, 3)` float64, 0..255, unrounded, so that
    transparency never passes for a colour; `(1, ...)` where all are opaque and both are the same."""
    opaque = all(int(image[..., 3].min()) == 255 for image in images)
    out = []
    for image in images:
        alpha = image[..., 3:].astype(np.float64) / 255
        black = image[..., :3] * alpha
        out.append(black[None] if opaque else np.stack([black, black + 255 * (1 - alpha)]))
    return out


def gradient(plane: npt.NDArray[Any]) -> Floats:
    """`(2, ..., H, W)`: derivative of planes down and across. A side of one pixel has none."""
    values = np.asarray(plane, np.float64)
    return np.stack(
        [np.gradient(values, axis=axis) if values.shape[axis] > 1 else np.zeros_like(values) for axis in (-2, -1)]
    )


def gradient_magnitude(plane: npt.NDArray[Any]) -> Floats:
    """Magnitude of central differences of planes `(..., H, W)`, per pixel; one-sided at the edges."""
    return np.asarray(np.hypot(*gradient(plane)))


def widened(area: Flags, pixels: int) -> Flags:
    """The area `(H, W)` grown by `pixels` in the four directions and along the diagonals."""
    from scipy.ndimage import maximum_filter

    grown: Flags = maximum_filter(area, size=2 * pixels + 1, mode="constant", cval=False)
    return grown


def edge_band(alpha: Pixels) -> Flags:
    """Pixels near the edges of an alpha plane `(H, W)`: where it rises by half or more within 1/160 of the longest side
    (4 pixels at 640, 2 at the least)."""
    from scipy.ndimage import maximum_filter, minimum_filter

    size = 2 * max(2, max(alpha.shape) // 160) + 1
    band: Flags = maximum_filter(alpha, size=size) - minimum_filter(alpha, size=size) > 127
    return band

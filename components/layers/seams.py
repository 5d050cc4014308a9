"""Edges of layers where the source has none: a picture that was cut, and not taken apart. Without any truth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.planes import cleared, edge_reach
from layerloop.components.layers.stack import Pixels

Float32 = npt.NDArray[np.float32]


def unsupported_edges(stack: Pixels, source: Pixels, *, contrast: float = 0.1, least: float = 0.1) -> float | None:
    """Share of the length of the foreground layers' edges where the source has none, 0..1: seams of a picture that is
    cut into tiles, strips, blots or dots and not into what it shows. An edge is where a layer's alpha (2/255 and less
    taken for 0) varies by a tenth or more within 1/160 of the longest side (2 pixels at the least), counted by what the
    layers above it leave to see; its length is the sum of the steps of alpha from pixel to pixel, so that soft edges
    count like hard ones. The source has none there where every colour channel varies by less than a tenth of that.
    Objects of nearly the colour behind them have such edges too, so a little is no fault; texture of a photograph
    hides seams in part. Undefined where no foreground layer has an edge."""
    reach = edge_reach(stack.shape[1:3])
    found = _variation(np.moveaxis(source, -1, 0), reach).max(axis=0)
    left = np.ones(stack.shape[1:3], np.float32)  # what the layers above leave to see
    length = seams = 0.0
    for layer in stack[:0:-1]:
        alpha = cleared(layer)[..., 3]
        if not alpha.any():
            continue
        varies = _variation(alpha, reach)
        edge = varies * left >= 255 * least
        steps = (_steps(alpha) * left)[edge]
        length += float(steps.sum())
        seams += float(steps[(found < contrast * varies)[edge]].sum())
        left *= 1 - alpha.astype(np.float32) / 255
    return seams / length if length > 0 else None


def _variation(plane: Pixels, reach: int) -> Float32:
    """Largest less smallest value of planes `(..., H, W)` within `reach` pixels, 0..255."""
    from scipy.ndimage import maximum_filter, minimum_filter

    size, axes = 2 * reach + 1, (-2, -1)
    return np.asarray(maximum_filter(plane, size, axes=axes) - minimum_filter(plane, size, axes=axes), np.float32)


def _steps(plane: Pixels) -> Float32:
    """Magnitude of the steps of a plane `(H, W)` to the next pixel down and across."""
    values = plane.astype(np.float32)
    squares = np.zeros_like(values)
    squares[:-1] += (values[1:] - values[:-1]) ** 2
    squares[:, :-1] += (values[:, 1:] - values[:, :-1]) ** 2
    return np.sqrt(squares, out=squares)

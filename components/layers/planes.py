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


def byte_sum(values: Pixels) -> int:
    """Exact sum of bytes `(H, ...)`, in 32 bits, which is several times as fast as in 64: all at once as long as that
    cannot overflow, else row by row."""
    if values.size <= 2**24:
        return int(values.sum(dtype=np.uint32))
    return int(values.reshape(len(values), -1).sum(axis=1, dtype=np.uint32).sum(dtype=np.int64))


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


def laid_luma(images: Pixels) -> Floats:
    """Luma (Rec. 601) of images `(..., H, W, 4)` laid on black and on white: `(2, ..., H, W)` float64, 0..255;
    `(1, ...)` where all are opaque."""
    alpha = images[..., 3] / 255
    black = (images[..., :3] @ LUMA) * alpha
    return black[None] if int(images[..., 3].min()) == 255 else np.stack([black, black + 255 * (1 - alpha)])


def gradient(plane: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """`(2, ..., H, W)`: derivative of planes down and across, by central differences, at the borders one-sided. A side
    of one pixel has none."""
    out = np.zeros((2, *plane.shape), plane.dtype)
    down, across = out
    if plane.shape[-2] > 1:
        np.subtract(plane[..., 2:, :], plane[..., :-2, :], out=down[..., 1:-1, :])
        down[..., 1:-1, :] /= 2
        down[..., 0, :], down[..., -1, :] = plane[..., 1, :] - plane[..., 0, :], plane[..., -1, :] - plane[..., -2, :]
    if plane.shape[-1] > 1:
        np.subtract(plane[..., 2:], plane[..., :-2], out=across[..., 1:-1])
        across[..., 1:-1] /= 2
        across[..., 0], across[..., -1] = plane[..., 1] - plane[..., 0], plane[..., -1] - plane[..., -2]
    return out


def neighbours_mean(plane: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """`(2, H, W)`: mean of the two pixels of a plane `(H, W)` between which `gradient` takes the difference."""
    down, across = np.pad(plane, ((1, 1), (0, 0)), "edge"), np.pad(plane, ((0, 0), (1, 1)), "edge")
    return np.stack([(down[2:] + down[:-2]) / 2, (across[:, 2:] + across[:, :-2]) / 2])


def gradient_magnitude(plane: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.floating[Any]]:
    """Magnitude of the gradient of planes `(..., H, W)`, per pixel."""
    down, across = gradient(plane)
    down *= down
    across *= across
    down += across
    return np.sqrt(down, out=down)


def widened(area: Flags, pixels: int) -> Flags:
    """The area `(H, W)` grown by `pixels` in the four directions and along the diagonals."""
    from scipy.ndimage import maximum_filter

    grown: Flags = maximum_filter(area, size=2 * pixels + 1, mode="constant", cval=False)
    return grown


def edge_reach(size: tuple[int, ...]) -> int:
    """Pixels about an edge that count as its own: 1/160 of the longest side, 2 at the least."""
    return max(2, max(size) // 160)


def edge_band(alpha: Pixels) -> Flags:
    """Pixels near the edges of an alpha plane `(H, W)`: where it rises by half or more within 1/160 of the longest side
    (4 pixels at 640, 2 at the least)."""
    from scipy.ndimage import maximum_filter, minimum_filter

    size = 2 * edge_reach(alpha.shape) + 1
    band: Flags = maximum_filter(alpha, size=size) - minimum_filter(alpha, size=size) > 127
    return band

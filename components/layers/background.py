"""Layer 0 where upper layers cover it: was the background completed? Against the true one, or without any truth."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.planes import (
    FAINT,
    LUMA,
    SOLID,
    Flags,
    Floats,
    gradient,
    gradient_magnitude,
    laid,
    laid_luma,
    neighbours_mean,
    widened,
)
from layerloop.components.layers.stack import Pixels


def inpainting_ssim(stack: Pixels, truth: Pixels) -> float | None:
    """SSIM (7x7 window, RGB) between layer 0 and the true background, averaged over the area that the true upper layers
    cover (alpha above 2/255) and over both laid on black and on white. Undefined where nothing is covered or a side is
    under 3 pixels."""
    area = covered_area(truth)
    if not area.any() or min(area.shape) < 3:
        return None
    window = min(7, *(side if side % 2 else side - 1 for side in area.shape))
    part = _around(area, window)  # all that the windows of the area's pixels see
    ours, theirs = laid(stack[0][part], truth[0][part])
    return float(np.mean([values.mean() for values in structural_similarity(ours, theirs, window)[:, area[part]]]))


def inpainting_l1(stack: Pixels, truth: Pixels) -> float | None:
    """Mean absolute RGB difference, 0..1, between layer 0 and the true background in the area that the true upper
    layers cover (alpha above 2/255), averaged over both laid on black and on white. Undefined where nothing is
    covered."""
    area = covered_area(truth)
    if not area.any():
        return None
    ours, theirs = laid(stack[0][area][None], truth[0][area][None])
    return float(np.abs(ours - theirs).mean() / 255)


def structural_similarity(one: Floats, other: Floats, window: int) -> Floats:
    """SSIM (Wang et al., IEEE Trans. Image Processing 13, 2004) of images `(N, H, W, C)`, 0..255, in every pixel and
    channel: uniform windows, sample covariance, K1 0.01 and K2 0.03. Equal to scikit-image's to the bit, which filters
    each channel of each image by itself."""
    from scipy.ndimage import uniform_filter

    def local_mean(planes: Floats) -> Floats:
        return np.asarray(uniform_filter(planes, size=window, axes=(1, 2)), np.float64)

    pixels = window**2
    unbiased = pixels / (pixels - 1)
    mean, mean_other = local_mean(one), local_mean(other)
    variance = unbiased * (local_mean(one * one) - mean * mean)
    variance_other = unbiased * (local_mean(other * other) - mean_other * mean_other)
    covariance = unbiased * (local_mean(one * other) - mean * mean_other)
    c1, c2 = (0.01 * 255.0) ** 2, (0.03 * 255.0) ** 2
    above = (2 * mean * mean_other + c1) * (2 * covariance + c2)
    below = (mean**2 + mean_other**2 + c1) * (variance + variance_other + c2)
    return np.asarray(above / below, np.float64)


def residue(stack: Pixels, source: Pixels) -> float | None:
    """How much of the source's foreground is left in layer 0, 0..1, where no true background is known. In the area that
    the predicted upper layers cover (joint alpha above 0.5; the whole canvas where they cover nothing), widened by one
    pixel to take in its outline: the share of the source's luma gradients that layer 0 has as well (laid on black and
    on white), both projected on the source's without what of layer 0 shows through the upper layers; clipped to 0..1. 1
    when layer 0 still is the source there, 0 when nothing of it shows. Undefined where the source has no detail there,
    or no other than layer 0's."""
    zone, clear = widened(_predicted_area(stack), 1), _clear_share(stack)
    seen = neighbours_mean(clear)[:, zone] if (clear < 0.5).any() else 0.0  # by the product rule of differences
    found = np.stack([gradient(luma)[:, zone] for luma in laid_luma(stack[0])])
    whole = gradient(source[..., :3].astype(np.float64) @ LUMA)[:, zone]
    hidden = whole - found * seen
    energy = min(float((whole**2).sum()), float((hidden**2).sum(axis=(1, 2)).max()))
    if energy < 1.0 * zone.sum():  # under a grey level per pixel: nothing that could be left over
        return None
    ours, all_of_it = (found * hidden).sum(axis=(1, 2)), (whole * hidden).sum(axis=(1, 2))
    share = np.divide(ours, all_of_it, out=np.ones_like(ours), where=all_of_it > np.maximum(ours, 0))
    return float(np.where(ours > 0, share, 0.0).mean())


def holes(stack: Pixels, *, solid: float = SOLID) -> float:
    """Share of the area that the predicted upper layers cover (joint alpha above 0.5; the whole canvas where they cover
    nothing) where layer 0 has an alpha under 0.9: not filled at all."""
    return float((stack[0, ..., 3] < solid * 255)[_predicted_area(stack)].mean())


def ring_smoothness(stack: Pixels) -> float | None:
    """Whether layer 0 is as smooth where it was inpainted as around it, 0..1. With a the mean gradient magnitude of its
    luma in the area that the predicted upper layers cover (joint alpha above 0.5; widened by one pixel to take in its
    outline) and b that in the ring around it (1/32 of the longest side wide, at least 2 pixels): (min(a, b) + e) /
    (max(a, b) + e), where e is one grey level per pixel. 1 when the texture continues, small when ghosts, seams or blur
    show. Mean over layer 0 laid on black and on white. A layer 0 that is blurred throughout, and upper layers that
    cover where nothing was, score well too, so no verdict follows from this number. Undefined without such an area or
    ring."""
    area = _predicted_area(stack)
    inside = widened(area, 1)
    ring = widened(area, 2 + max(2, max(area.shape) // 32)) & ~widened(area, 2)
    if not ring.any():
        return None
    values = []
    for luma in laid_luma(stack[0]):
        magnitude = gradient_magnitude(luma)
        a, b = magnitude[inside].mean(), magnitude[ring].mean()
        values.append((min(a, b) + 1.0) / (max(a, b) + 1.0))
    return float(np.mean(values))


def covered_area(truth: Pixels, *, faint: float = FAINT) -> Flags:
    """Area `(H, W)` bool where any layer above layer 0 has an alpha above `faint`."""
    return np.asarray((truth[1:, ..., 3] > faint * 255).any(axis=0))


def _around(area: Flags, margin: int) -> tuple[slice, slice]:
    """Rows and columns of the rectangle about an area, with a margin in pixels."""
    bounds = [np.flatnonzero(area.any(axis=axis)) for axis in (1, 0)]
    down, across = (slice(max(0, int(at[0]) - margin), int(at[-1]) + margin + 1) for at in bounds)
    return down, across


def _predicted_area(stack: Pixels) -> Flags:
    """Area `(H, W)` bool where the joint alpha of all layers above layer 0 exceeds 0.5; the whole canvas if nowhere."""
    everywhere = np.ones(stack.shape[1:3], bool)
    if len(stack) < 2:
        return everywhere
    area: Flags = _clear_share(stack) < 0.5
    return area if area.any() else everywhere


def _clear_share(stack: Pixels) -> npt.NDArray[np.float32]:
    """`(H, W)`: the share of layer 0 that the layers above it leave to see, 1 less their joint alpha."""
    return np.asarray(np.prod(1 - stack[1:, ..., 3].astype(np.float32) / 255, axis=0), np.float32)

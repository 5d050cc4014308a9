"""A decomposition at the source's own size: alpha that follows the source's edges, colours that are the source's.

A model decomposes an image at its working size. Enlarged, its layers are blurred and their composite is only roughly
the source. Here every layer gets

- alpha by guided upsampling, with the source as the guide (`_guide_maps`);
- at soft edges the colour of the layer's own solid parts, without the halo of what lies behind (`_own_colours`);
- where it is seen, the colours that make the composite the source (`_recomposing`): the source's pixel itself where the
  layer is opaque and uncovered, and elsewhere the least change, in proportion to how much the layer is seen.

What is hidden behind other layers keeps the model's colours. Colours are float32 in [0, 1]; numpy, and scipy's filters.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.planes import FAINT, SOLID
from layerloop.components.layers.stack import Pixels, check_stack, composite, on_backdrop, resize
from layerloop.components.schema.errors import LayerloopError

Floats = npt.NDArray[np.float32]

RADIUS = 4  # of the guided filter's window, pixels of the working size
EPSILON = 1e-4  # of the guided filter: a guide that varies by less than 1 % is not followed
EDGE = 3  # how far, in pixels of the working size, a layer's own colour is carried across its soft edge
STRIP = 1 << 19  # pixels that are worked on at once
HALF_LEVEL = 0.5 / 255


def restore(stack: Pixels, source: Pixels) -> Pixels:
    """The layers `(L, h, w, 4)` at the size of `source` `(H, W, 3 or 4)`, so that their composite is the source.

    Returns `(L, H, W, 4)` uint8. The composite's alpha is the source's (255 for RGB), and where that is not 0 its
    colour is the source's to within rounding: one level, more only under a nearly transparent alpha. Where all layers
    together leave a hole in an opaque source, layer 0 is made opaque there. (0, 0, 0, 0) where a layer is transparent.

    Raises:
        LayerloopError: not a stack, or not an image.
    """
    check_stack(stack)
    if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] not in (3, 4):
        raise LayerloopError(f"source is {source.dtype}{list(source.shape)}: give uint8[H, W, 3 or 4]")
    height, width = source.shape[:2]
    if height * width <= stack.shape[1] * stack.shape[2]:  # smaller than the working size, where nothing is gained
        stack = resize(stack, (width, height))
    small = resize(on_backdrop(source, "white"), (stack.shape[2], stack.shape[1]))
    maps = _maps(stack, small, guided=stack.shape[1:3] != source.shape[:2])
    out = np.empty((len(stack), height, width, 4), np.uint8)
    rows = max(1, STRIP // width)

    def work(top: int) -> None:
        bottom = min(height, top + rows)
        out[:, top:bottom] = _strip(maps, source[top:bottom], top, height)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # numpy releases the interpreter lock
        list(pool.map(work, range(0, height, rows)))
    return out


def difference(stack: Pixels, source: Pixels) -> tuple[float, int]:
    """(mean, maximum) absolute difference in levels, 0..255, between the composite of `stack` `(L, H, W, 4)` and
    `source` `(H, W, 3 or 4)`: premultiplied colours and alpha."""
    levels, most, rows = 0.0, 0, max(1, STRIP // source.shape[1])
    for top in range(0, len(source), rows):
        part = source[top : top + rows]
        gap = np.abs(_premultiplied(composite(stack[:, top : top + rows])) - _premultiplied(part))
        levels, most = levels + float(gap.sum(dtype=np.float64)), max(most, round(float(gap.max())))
    return levels / (4 * source.shape[0] * source.shape[1]), most


def _unit(levels: Pixels) -> Floats:
    """Levels 0..255 as float32 in [0, 1]."""
    return levels.astype(np.float32) * np.float32(1 / 255)


def _premultiplied(image: Pixels) -> Floats:
    """`(H, W, 4)` float32 in 0..255, alpha last, of RGB or RGBA."""
    alpha = image[..., 3:].astype(np.float32) if image.shape[-1] == 4 else np.full((*image.shape[:2], 1), 255.0)
    return np.concatenate([image[..., :3] * (alpha / 255), alpha], axis=-1, dtype=np.float32)


# ------------------------------------------------------------------------------------------------- at the working size


def _maps(stack: Pixels, source: Pixels, *, guided: bool) -> Floats:
    """`(L, 9, h, w)`, or `(L, 4, h, w)` where nothing is enlarged: what `_strip` needs of each layer, smooth enough to
    be interpolated. Colour (3), then alpha, or a and b of alpha = a . I + b (4) and its least and greatest value (2).
    """
    values = np.moveaxis(_unit(stack), -1, 1)
    alpha, image = values[:, 3], np.moveaxis(_unit(source), -1, 0)
    colours = _own_colours(values[:, :3], alpha, image)
    if not guided:
        return np.concatenate([colours, alpha[:, None]], axis=1)
    return np.concatenate([colours, _guide_maps(alpha, image)], axis=1)


def _own_colours(colours: Floats, alpha: Floats, image: Floats) -> Floats:
    """Colours `(L, 3, h, w)` of the layers, without what lies behind them at their soft edges.

    Where a layer is nearly transparent its colour means little, and its own colours around are carried there. On a soft
    edge, up to `EDGE` pixels from where the layer is solid and seen, it gets the image's colour there: the blurred
    foreground of Forte, "Approximate Fast Foreground Colour Estimation" (ICIP 2021), whose last step, the colour that
    explains the image, is `_recomposing`. Wide transparency, such as a shadow or glass, keeps the model's colours.
    """
    seen = _weights(alpha)
    out = np.empty_like(colours)
    for index, own in enumerate(alpha):
        carried, mass = _carried(colours[index], own * own)
        clear = (own < 0.02) & (mass > 1e-6)
        base = np.where(clear, carried, colours[index])
        solid, mass = _carried(image, (seen[index] >= SOLID).astype(np.float32))
        share = np.where(own < SOLID, np.clip(4 * mass, 0, 1), 0)
        out[index] = base + (solid - base) * share
    return out


def _carried(colours: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """Normalised convolution: (weighted mean of `colours` `(3, h, w)` around each pixel, mean of the weights there)."""
    mass = _blur(weights)
    total = np.stack([_blur(plane * weights) for plane in colours])
    return np.divide(total, mass, out=np.zeros_like(total), where=mass > 1e-6), mass


def _blur(plane: Floats) -> Floats:
    from scipy.ndimage import uniform_filter

    blurred: Floats = uniform_filter(plane, size=2 * EDGE + 1, mode="nearest")
    return blurred


def _guide_maps(alpha: Floats, image: Floats) -> Floats:
    """`(L, 6, h, w)`: a and b of alpha = a . I + b in every window, then the least and the greatest alpha of each
    pixel's neighbours.

    a is that of He, Sun and Tang, "Guided Image Filtering" (TPAMI 2013, equation 18, for a colour guide), interpolated
    as in He and Sun's fast version (arXiv 1505.00996). b is alpha - a . I, theirs and what the guide does not explain,
    so that at the working size alpha is the model's. The two bounds keep the guide's texture out of alpha wherever
    alpha is even.
    """
    from scipy.ndimage import maximum_filter, minimum_filter, uniform_filter

    def mean(plane: Floats) -> Floats:
        found: Floats = uniform_filter(plane, size=2 * RADIUS + 1, mode="nearest")
        return found

    mean_image = np.stack([mean(plane) for plane in image])
    covariance = np.empty((*image.shape[1:], 3, 3), np.float32)
    for i in range(3):
        for j in range(i, 3):
            product = mean(image[i] * image[j]) - mean_image[i] * mean_image[j]
            covariance[..., i, j] = covariance[..., j, i] = product
    inverse = np.linalg.inv(covariance + EPSILON * np.eye(3, dtype=np.float32))
    maps = np.empty((len(alpha), 6, *image.shape[1:]), np.float32)
    for index, own in enumerate(alpha):
        both = np.stack([mean(plane * own) for plane in image]) - mean_image * mean(own)
        a = np.stack([mean(plane) for plane in np.einsum("hwij,jhw->ihw", inverse, both)])
        maps[index, :3], maps[index, 3] = a, own - (a * image).sum(axis=0)
        maps[index, 4], maps[index, 5] = minimum_filter(own, 3), maximum_filter(own, 3)
    return maps


# --------------------------------------------------------------------------------------------------- at the full size


def _strip(maps: Floats, source: Pixels, top: int, height: int) -> Pixels:
    """Rows of the result, `(L, rows, W, 4)`, of the source's rows `(rows, W, 3 or 4)` from `top` of `height`."""
    rows, width = source.shape[:2]
    planes = _interpolated(maps, top, rows, (height, width)).reshape(*maps.shape[:2], rows * width)
    flat = source.reshape(rows * width, source.shape[2])
    image = np.moveaxis(_unit(on_backdrop(source, "white").reshape(rows * width, 3)), -1, 0)
    if maps.shape[1] == 4:
        alpha = planes[:, 3]
    else:
        alpha = np.einsum("lcn,cn->ln", planes[:, 3:6], image) + planes[:, 6]
        alpha = np.clip(alpha, planes[:, 7], planes[:, 8])
    alpha = _covering(np.clip(alpha, 0, 1), flat[:, 3] if flat.shape[1] == 4 else None)
    levels = np.rint(alpha * 255).astype(np.uint8)
    wanted = np.moveaxis(_unit(flat[:, :3]), -1, 0)
    colours = _recomposing(np.clip(planes[:, :3], 0, 1), _weights(_unit(levels)), wanted)
    out = np.empty((len(maps), rows * width, 4), np.uint8)
    out[..., :3] = np.rint(np.moveaxis(colours, 1, -1) * 255)
    out[..., 3] = levels
    out[levels == 0] = 0
    return out.reshape(len(maps), rows, width, 4)


def _interpolated(maps: Floats, top: int, rows: int, size: tuple[int, int]) -> Floats:
    """`(..., rows, W)`: rows from `top` of the maps `(..., h, w)` resampled bilinearly to `size` = (H, W), as all rows
    at once would be but for the rounding of a float32."""
    from PIL import Image

    height, width = size
    if maps.shape[-2:] == size:
        return maps[..., top : top + rows, :]
    scale = maps.shape[-2] / height
    box = (0, top * scale, maps.shape[-1], min((top + rows) * scale, maps.shape[-2]))
    planes = maps.reshape(-1, *maps.shape[-2:])
    out = np.empty((len(planes), rows, width), np.float32)
    for index, plane in enumerate(planes):
        enlarged = Image.fromarray(plane).resize((width, rows), Image.Resampling.BILINEAR, box=box)
        out[index] = np.asarray(enlarged)
    return out.reshape(*maps.shape[:-2], rows, width)


def _covering(alpha: Floats, wanted: npt.NDArray[np.uint8] | None) -> Floats:
    """Alpha `(L, N)` such that all layers together cover as much as the source: all, or its alpha `wanted` `(N,)`.

    Alpha up to 2/255 counts as none and from 253/255 on as full. Where the source is partly transparent all layers are
    scaled by one factor, found by bisection.
    """
    alpha = np.where(alpha <= FAINT, 0, np.where(alpha >= 1 - FAINT, 1, np.rint(alpha * 255) / 255)).astype(np.float32)
    hole = (1 - alpha).prod(axis=0) > HALF_LEVEL
    alpha[0, hole] = 1
    if wanted is None:
        return alpha
    alpha[:, wanted == 0] = 0
    partial = np.flatnonzero((wanted > 0) & (wanted < 255))
    if len(partial):
        clear = 1 - _unit(wanted[partial])
        part = alpha[:, partial]
        low, high = np.zeros(len(partial), np.float32), np.ones(len(partial), np.float32)
        for _ in range(20):
            factor = (low + high) / 2
            more = (1 - factor * part).prod(axis=0) > clear  # still too clear
            low, high = np.where(more, factor, low), np.where(more, high, factor)
        alpha[:, partial] = part * high
    return alpha


def _weights(alpha: Floats) -> Floats:
    """How much of each layer is seen: alpha_l times what the layers above it let through, `(L, ...)`."""
    through = np.cumprod((1 - alpha)[::-1], axis=0)[::-1]
    out = alpha.copy()
    out[:-1] *= through[1:]
    return out


def _recomposing(colours: Floats, weights: Floats, wanted: Floats) -> Floats:
    """The colours `(L, 3, N)` nearest to those given, in [0, 1], whose sum by `weights` `(L, N)` is `wanted` `(3, N)`
    times the sum of the weights. It exists, since all layers might have the colour that is wanted.

    The least change is the residual times w_l / sum w^2; colours that reach a bound stay there, and the rest is shared
    among the others. Every round ends or fixes a colour, so L rounds are enough.
    """
    total = weights.sum(axis=0)
    at: npt.NDArray[np.int64] | slice = slice(None)
    for _ in range(len(colours) + 1):
        part, seen = colours[:, :, at], weights[:, None, at]
        residual = wanted[:, at] * total[at] - (part * seen).sum(axis=0)
        free = ((part < 1) | (residual < 0)) & ((part > 0) | (residual > 0))
        power = seen * seen * free
        sum_power = power.sum(axis=0)
        step = np.divide(residual, sum_power, out=np.zeros_like(residual), where=sum_power > 0)
        colours[:, :, at] = np.clip(part + seen * free * step, 0, 1)
        clipped = (
            np.abs(wanted[:, at] * total[at] - (colours[:, :, at] * seen).sum(axis=0)).max(axis=0) > HALF_LEVEL / 4
        )
        if not clipped.any():
            break
        at = np.flatnonzero(clipped) if isinstance(at, slice) else at[clipped]
    return colours

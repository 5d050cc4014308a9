"""What is wrong with single layers: blank, glazed, duplicate, idle. One value per layer of a stack `(L, H, W, 4)`.

Alpha of 2/255 and less is cleared before every test, so that nothing is made of what nobody sees. Thresholds are
parameters; their defaults are the definitions that reports repeat.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from layerloop.components.layers.planes import FAINT, SOLID, Flags, Floats, cleared
from layerloop.components.layers.stack import Pixels

Float32 = npt.NDArray[np.float32]


def mean_alpha(stack: Pixels) -> Floats:
    """Mean alpha of a layer over the canvas, 0..1."""
    return stack[..., 3].mean(axis=(-2, -1)) / 255


def coverage(stack: Pixels, *, faint: float = FAINT) -> Floats:
    """Share of the canvas where a layer's alpha is above 2/255."""
    return (stack[..., 3] > faint * 255).mean(axis=(-2, -1))


def semi_transparent(stack: Pixels, *, faint: float = FAINT, solid: float = SOLID) -> Floats:
    """Share of a layer's covered pixels (alpha above 2/255) whose alpha is under 0.9; 0 where it covers nothing."""
    alpha = stack[..., 3]
    covered = (alpha > faint * 255).sum(axis=(-2, -1))
    partial = ((alpha > faint * 255) & (alpha < solid * 255)).sum(axis=(-2, -1))
    return partial / np.maximum(covered, 1)


def blank(stack: Pixels, *, least: float = 0.005) -> Flags:
    """A layer is blank when its mean alpha is under 0.005, alpha of 2/255 and less taken for 0."""
    return _blank(cleared(stack), least)


def _blank(seen: Pixels, least: float = 0.005) -> Flags:
    """As `blank`, of a stack without faint alpha."""
    return mean_alpha(seen) < least


def glazed(stack: Pixels, *, extent: float = 0.25, share: float = 0.8, weak: float = 0.15) -> Flags:
    """A layer is glazed when it is not blank, more than 80 % of what it covers (alpha above 2/255) has an alpha under
    0.9, and it covers more than a quarter of the canvas or has a mean alpha under 0.15 where it covers: a veil over the
    image in place of an object."""
    seen = cleared(stack)
    covered, mean = coverage(seen), mean_alpha(seen)
    candidates: Flags = ~_blank(seen) & ((covered > extent) | (mean < weak * covered))
    candidates[candidates] = semi_transparent(stack[candidates]) > share
    return candidates


def duplicate(
    stack: Pixels, source: Pixels, *, extent: float = 0.9, solid: float = SOLID, distance: float = 0.03
) -> Flags:
    """A foreground layer is a duplicate when it repeats the image (alpha of 0.9 or more over more than 90 % of the
    canvas, RGB L1 to the source there under 0.03), or a layer below it (IoU of both alphas 0.9 or more, RGB L1 under
    0.03 where both cover). Of equal layers the lowest is none, and neither is layer 0."""
    opaque = stack[..., 3] >= solid * 255
    flags: Flags = opaque.mean(axis=(-2, -1)) > extent
    for index in np.flatnonzero(flags):
        gap = np.abs(stack[index, ..., :3].astype(np.int16) - source[..., :3]).mean(axis=-1) / 255
        flags[index] = (gap * opaque[index]).sum() / opaque[index].sum() < distance
    seen = cleared(stack)
    shown = ~_blank(seen)
    for upper in range(1, len(stack)):
        others = [seen[lower] for lower in range(upper) if shown[lower]] if shown[upper] else []
        flags[upper] |= any(_alike(seen[upper], other, share=extent, distance=distance) for other in others)
    flags[0] = False
    return flags


def idle(stack: Pixels, source: Pixels, *, least: float = 0.02) -> Flags:
    """A layer is idle when the image does without it: taking it away moves the composite by less than 0.02
    farther from the source (mean absolute RGB difference, on black and on white, per alpha of the layer that is not
    hidden), or when 99 % of it is hidden. Layers are tried from the top, and an idle one stays away while those below
    it are tried. Layer 0 is idle only when 99 % of it is hidden; blank layers never are."""
    seen = cleared(stack)
    shown = ~_blank(seen)
    wanted = source[..., :3].astype(np.float32)
    layers = [_premultiplied(layer) for layer in seen]
    below = list(itertools.accumulate(layers[:-1], lambda lower, upper: _joined(upper, lower)))  # under each one
    above: Float32 = np.zeros((*wanted.shape[:2], 4), np.float32)  # the layers above that are of use
    flags: Flags = np.zeros(len(stack), bool)
    for index in range(len(stack) - 1, 0, -1):
        if not shown[index]:
            continue
        alpha = layers[index][..., 3]
        visible = alpha * (1 - above[..., 3])
        mass, at = float(visible.sum()), visible > 0
        top, lower, goal = above[at], below[index - 1][at], wanted[at]
        without, present = _joined(top, lower), _joined(top, _joined(layers[index][at], lower))
        gain = float((_distance(without, goal) - _distance(present, goal)).sum())
        flags[index] = mass < 0.01 * float(alpha.sum()) or gain < least * mass
        if not flags[index]:
            above = _joined(above, layers[index])
    if shown[0]:
        alpha = layers[0][..., 3]
        flags[0] = float((alpha * (1 - above[..., 3])).sum()) < 0.01 * float(alpha.sum())
    return flags


@dataclass(frozen=True)
class LayerFlags:
    """What is wrong with each layer of a decomposition, `(L,)` bool each."""

    blank: Flags
    glazed: Flags
    duplicate: Flags
    idle: Flags

    @property
    def bad(self) -> Flags:
        """A layer is bad when it is blank, glazed, a duplicate or idle."""
        return self.blank | self.glazed | self.duplicate | self.idle


def flags_of(stack: Pixels, source: Pixels) -> LayerFlags:
    """The flags of a decomposition of `source` `(H, W, 3 or 4)`."""
    return LayerFlags(blank(stack), glazed(stack), duplicate(stack, source), idle(stack, source))


def _alike(layer: Pixels, other: Pixels, *, share: float, distance: float) -> bool:
    """Whether two layers cover the same with the same colours."""
    larger, smaller = (pick(layer[..., 3], other[..., 3]) for pick in (np.maximum, np.minimum))
    common = int(smaller.sum(dtype=np.int64))
    if common < share * int(larger.sum(dtype=np.int64)):
        return False
    gap = np.abs(layer[..., :3].astype(np.int16) - other[..., :3]).mean(axis=-1) / 255
    return bool((gap * smaller).sum() < distance * common)


def _premultiplied(layer: Pixels) -> Float32:
    """`(H, W, 4)` float32: colour 0..255 times alpha, and alpha 0..1."""
    out = layer.astype(np.float32)
    out[..., 3] /= 255
    out[..., :3] *= out[..., 3:]
    return out


def _joined(upper: Float32, lower: Float32) -> Float32:
    """`upper` over `lower`, both premultiplied."""
    joined: Float32 = upper + lower * (1 - upper[..., 3:])
    return joined


def _distance(pixels: Float32, wanted: Float32) -> Float32:
    """Mean absolute RGB difference 0..1 of premultiplied pixels `(N, 4)`, on black and on white, from `wanted`."""
    black = pixels[..., :3]
    white = black + 255 * (1 - pixels[..., 3:])
    apart: Float32 = (np.abs(black - wanted) + np.abs(white - wanted)).mean(axis=-1) / 510
    return apart

"""Sketches as pixels: every element painted straight on the requested pixel grid."""

from __future__ import annotations

import math

import numpy as np

from layerloop.components.layers.photos import photo_crop
from layerloop.components.layers.shapes import signed_distance
from layerloop.components.layers.sketch import Element, Sketch


def paint(element: Element, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Straight RGBA, float32 in [0, 1], at points relative to the element's centre, one `pixel` (design pixels) apart.

    Colour is defined under alpha 0 too, so that interpolation and convolution meet no seam at the edge.
    """
    a, b = element.width / 2, element.height / 2
    distance = signed_distance(element.shape, x, y, a, b, element.params)
    out = np.empty((*distance.shape, 4), np.float32)
    out[..., 3] = np.clip(0.5 - distance / pixel, 0, 1)
    fill = element.fill
    if fill.kind == "photo":
        out[..., :3] = photo_crop(fill.photo, fill.crop, (distance.shape[1], distance.shape[0])) / np.float32(255)
        return out
    first, second = np.asarray(fill.first, np.float32), np.asarray(fill.second, np.float32)
    if fill.kind == "flat":
        out[..., :3] = first
        return out
    if fill.kind == "linear":
        reach = abs(a * math.cos(fill.direction)) + abs(b * math.sin(fill.direction))
        position = (x * math.cos(fill.direction) + y * math.sin(fill.direction)) / (2 * reach) + 0.5
    else:
        position = np.hypot(x, y) / math.hypot(a, b)
    out[..., :3] = first + (second - first) * np.clip(position, 0, 1)[..., None]
    return out


def render_sketch(sketch: Sketch, size: tuple[int, int]) -> np.ndarray:
    """The layers of a sketch painted straight on a grid of (width, height): (L, H, W, 4) uint8, straight, bottom
    first."""
    width, height = size
    step_x, step_y = sketch.width / width, sketch.height / height
    columns = ((np.arange(width, dtype=np.float32) + 0.5) * step_x)[None, :]
    rows = ((np.arange(height, dtype=np.float32) + 0.5) * step_y)[:, None]
    out = np.empty((len(sketch.elements), height, width, 4), np.uint8)
    for index, element in enumerate(sketch.elements):
        x = columns - np.float32(element.left + element.width / 2)
        y = rows - np.float32(element.top + element.height / 2)
        if element.angle:
            cos, sin = math.cos(math.radians(element.angle)), math.sin(math.radians(element.angle))
            x, y = x * cos + y * sin, y * cos - x * sin
        painted = paint(element, x, y, math.sqrt(step_x * step_y))
        painted[..., 3] *= element.opacity
        out[index] = np.rint(painted * 255)
    return out

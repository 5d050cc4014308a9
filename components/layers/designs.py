"""Layered designs made from a seed.

A design is a background (flat, gradient or photograph) under one to several elements (discs, cards, stars, rings,
banners, blobs, bars of "text", ...). Every shape is a signed distance function (shapes.py) and every fill is defined on
the plane (sketch.py), so one painter (paint.py) serves two ends: `render_sketches` paints straight on the pixel grid of
the policy, fast enough to train on, and crello.py paints each element on a canvas of its own, as a Crello row has it.

Elements are ordered bottom to top by falling size: large elements lie behind small ones. So the order of the layers can
be read off the composite, which a decomposition model needs when elements do not overlap.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence

import numpy as np

from layerloop.components.layers.paint import render_sketch
from layerloop.components.layers.photos import PHOTOS, draw_crop
from layerloop.components.layers.shapes import SHAPE_SHARES, SHAPES
from layerloop.components.layers.sketch import Colour, Element, Fill, Sketch

Box = tuple[float, float, float, float]  # left, top, right, bottom, in design pixels

PALETTES = (
    "264653 2a9d8f e9c46a f4a261 e76f51 fefae0",
    "003049 d62828 f77f00 fcbf49 eae2b7 669bbc",
    "606c38 283618 fefae0 dda15e bc6c25 a3b18a",
    "cdb4db ffc8dd ffafcc bde0fe a2d2ff 5e548e",
    "0d1b2a 1b263b 415a77 778da9 e0e1dd ff6b6b",
    "f72585 7209b7 3a0ca3 4361ee 4cc9f0 fff1e6",
    "ffcdb2 ffb4a2 e5989b b5838d 6d6875 f9f7f3",
    "ef476f ffd166 06d6a0 118ab2 073b4c f8f9fa",
    "f6bd60 f7ede2 f5cac3 84a59d f28482 3d405b",
    "22223b 4a4e69 9a8c98 c9ada7 f2e9e4 e07a5f",
    "8ecae6 219ebc 023047 ffb703 fb8500 ffffff",
    "ccd5ae e9edc9 fefae0 faedcd d4a373 344e41",
    "10002b 5a189a 9d4edd e0aaff ff9e00 ff6d00",
    "2b2d42 8d99ae edf2f4 ef233c d90429 ffd6a5",
    "d8f3dc 95d5b2 52b788 2d6a4f 081c15 ffc43d",
    "f8f4e3 d4cdc3 2a2b2a ff3c38 a23e48 6c8ead",
)


def draw_sketch(rng: np.random.Generator, *, canvas: tuple[int, int], layers: int, photo_share: float = 0.15) -> Sketch:
    """A design of `layers` layers (the background and `layers - 1` elements) on a canvas of (width, height) pixels.

    `photo_share` of the backgrounds are crops of photographs. Everything follows from `rng`.
    """
    if layers < 1:
        raise ValueError(f"layers is {layers}: a design has a background at least, so choose 1 or more")
    width, height = canvas
    if min(canvas) < 16:
        raise ValueError(f"canvas is {width}x{height}: choose sides of 16 pixels or more")
    palette = _draw_palette(rng)
    background = _draw_background(rng, canvas, palette, photo_share)
    elements = [background]
    boxes: list[Box] = []
    colours = [background.fill.mean()]
    sizes = _draw_sizes(rng, layers - 1)
    for size in sizes:
        element, box = _draw_element(rng, canvas, size, boxes, palette, colours)
        elements.append(element)
        boxes.append(box)
        colours.append(element.fill.mean())
    return Sketch(width, height, tuple(elements))


def _draw_palette(rng: np.random.Generator) -> list[Colour]:
    if rng.random() < 0.5:
        names = PALETTES[rng.integers(len(PALETTES))].split()
        turn = rng.normal(0.0, 0.03)
        colours = [tuple(int(name[i : i + 2], 16) / 255 for i in (0, 2, 4)) for name in names]
        hsv = [colorsys.rgb_to_hsv(*colour) for colour in colours]
        return [colorsys.hsv_to_rgb((h + turn) % 1, s, v) for h, s, v in hsv]
    base = rng.random()
    spread = ((0, 0.06, 0.12, 0.94), (0, 0.5, 0.05, 0.55), (0, 1 / 3, 2 / 3, 0.08), (0, 0.42, 0.58, 0.02))[
        rng.integers(4)
    ]
    palette: list[Colour] = []
    for offset in spread:
        palette.append(colorsys.hsv_to_rgb((base + offset) % 1, rng.uniform(0.45, 0.95), rng.uniform(0.55, 1.0)))
    palette.append(colorsys.hsv_to_rgb(base, rng.uniform(0.0, 0.15), rng.uniform(0.9, 1.0)))
    palette.append(colorsys.hsv_to_rgb((base + spread[1]) % 1, rng.uniform(0.3, 0.8), rng.uniform(0.1, 0.35)))
    return palette


def _draw_background(
    rng: np.random.Generator, canvas: tuple[int, int], palette: Sequence[Colour], photo_share: float
) -> Element:
    width, height = canvas
    draw = rng.random()
    if draw < photo_share:
        name = PHOTOS[rng.integers(len(PHOTOS))]
        fill = Fill("photo", (0, 0, 0), (0, 0, 0), photo=name, crop=draw_crop(rng, name, width / height))
    else:
        first = palette[int(rng.integers(len(palette)))]
        kind = ("flat", "linear", "radial")[rng.choice(3, p=(0.35, 0.4, 0.25))]
        fill = _draw_fill(rng, kind, first, palette)
    return Element("plane", 0.0, 0.0, float(width), float(height), 0.0, 1.0, fill)


def _draw_fill(rng: np.random.Generator, kind: str, first: Colour, palette: Sequence[Colour]) -> Fill:
    if kind == "flat":
        return Fill("flat", first, first)
    if rng.random() < 0.5:  # towards a neighbour in the palette, else lighter or darker
        other = np.asarray(palette[int(rng.integers(len(palette)))])
        second = np.asarray(first) + (other - np.asarray(first)) * rng.uniform(0.4, 0.8)
    else:
        target = 1.0 if rng.random() < 0.5 else 0.0
        second = np.asarray(first) + (target - np.asarray(first)) * rng.uniform(0.25, 0.5)
    return Fill(kind, first, (float(second[0]), float(second[1]), float(second[2])), float(rng.uniform(0, 2 * np.pi)))


def _draw_sizes(rng: np.random.Generator, count: int) -> list[float]:
    """Element sizes as fractions of the canvas's geometric mean side, falling: the order a model can read."""
    ranges = {
        1: ((0.38, 0.72),),
        2: ((0.46, 0.72), (0.26, 0.42)),
        3: ((0.46, 0.70), (0.31, 0.43), (0.21, 0.29)),
        4: ((0.46, 0.66), (0.33, 0.43), (0.25, 0.31), (0.18, 0.235)),
    }.get(count) or tuple((0.6 * 0.8**k, 0.68 * 0.8**k) for k in range(count))
    return [float(rng.uniform(*bounds)) for bounds in ranges]


def _draw_element(
    rng: np.random.Generator,
    canvas: tuple[int, int],
    size: float,
    boxes: Sequence[Box],
    palette: Sequence[Colour],
    colours: Sequence[np.ndarray],
) -> tuple[Element, Box]:
    """An element and its bounding box. It hides at most two fifths of any element under it."""
    names = tuple(SHAPES)
    shape = names[rng.choice(len(names), p=SHAPE_SHARES)]
    aspect, angle, params = SHAPES[shape].draw(rng)
    side = size * math.sqrt(canvas[0] * canvas[1])
    width = min(side * math.sqrt(aspect), 0.92 * canvas[0]) if shape != "banner" else side * math.sqrt(aspect)
    height = min(side / math.sqrt(aspect), 0.92 * canvas[1])
    if shape == "banner":  # reaches over both edges
        width, height = 1.5 * max(canvas), max(0.14 * min(canvas), 0.42 * side)
    turn = math.radians(angle)
    extent = (
        abs(width * math.cos(turn)) + abs(height * math.sin(turn)),
        abs(width * math.sin(turn)) + abs(height * math.cos(turn)),
    )
    best: tuple[float, tuple[float, float]] = (math.inf, (canvas[0] / 2, canvas[1] / 2))
    for _ in range(10):
        centre = tuple(
            rng.uniform(min(0.42 * e, 0.5 * c), max(c - 0.42 * e, 0.5 * c)) for e, c in zip(extent, canvas, strict=True)
        )
        box = (
            centre[0] - extent[0] / 2,
            centre[1] - extent[1] / 2,
            centre[0] + extent[0] / 2,
            centre[1] + extent[1] / 2,
        )
        hidden = max((_hidden_share(lower, box) for lower in boxes), default=0.0)
        if hidden < best[0]:
            best = (hidden, (centre[0], centre[1]))
        if hidden <= 0.4:
            break
    centre_x, centre_y = best[1]
    fill = _draw_contrasting_fill(rng, palette, colours)
    opacity = 1.0 if rng.random() > 0.06 else float(rng.uniform(0.7, 0.9))
    element = Element(shape, centre_x - width / 2, centre_y - height / 2, width, height, angle, opacity, fill, params)
    box = (centre_x - extent[0] / 2, centre_y - extent[1] / 2, centre_x + extent[0] / 2, centre_y + extent[1] / 2)
    return element, box


def _hidden_share(lower: Box, upper: Box) -> float:
    across = max(0.0, min(lower[2], upper[2]) - max(lower[0], upper[0]))
    down = max(0.0, min(lower[3], upper[3]) - max(lower[1], upper[1]))
    return across * down / max(1e-6, (lower[2] - lower[0]) * (lower[3] - lower[1]))


def _draw_contrasting_fill(rng: np.random.Generator, palette: Sequence[Colour], colours: Sequence[np.ndarray]) -> Fill:
    """A fill that stands out from the background and, where possible, from the elements under it."""
    best: tuple[float, Fill | None] = (-1.0, None)
    for attempt in range(12):
        if attempt < 8:
            first = palette[int(rng.integers(len(palette)))]
        else:
            first = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.3, 0.9), rng.uniform(0.2, 1.0))
        fill = _draw_fill(rng, ("flat", "linear", "radial")[rng.choice(3, p=(0.6, 0.3, 0.1))], first, palette)
        mean = fill.mean()
        away = float(np.abs(mean - colours[0]).mean())
        if fill.kind != "flat":  # both ends of a gradient must stand out, not only its mean
            away = min(away, *(float(np.abs(np.asarray(end) - colours[0]).mean()) for end in (fill.first, fill.second)))
        apart = min((float(np.abs(mean - colour).mean()) for colour in colours[1:]), default=1.0)
        score = min(away / 0.22, apart / 0.12)
        if score > best[0]:
            best = (score, fill)
        if score >= 1:
            break
    assert best[1] is not None
    return best[1]


def render_sketches(
    rng: np.random.Generator,
    *,
    count: int,
    layers: int,
    size: tuple[int, int],
    photo_share: float = 0.15,
) -> np.ndarray:
    """`count` new designs as layers (count, L, H, W, 4) uint8 at (width, height): the fast path for training.

    Equal to rendering the rows of crello.generate_design but for anti-aliasing, and colour is defined under alpha 0.
    """
    scale = max(1, math.ceil(256 / max(size)))
    canvas = (size[0] * scale, size[1] * scale)
    out = np.empty((count, layers, size[1], size[0], 4), np.uint8)
    for index in range(count):
        out[index] = render_sketch(draw_sketch(rng, canvas=canvas, layers=layers, photo_share=photo_share), size)
    return out

"""Layered designs made from a seed, in the column layout of Crello v5, and the renderer of such rows.

A design is a background (flat, gradient or photograph) under one to several elements (discs, cards, stars, rings,
banners, blobs, bars of "text", ...). Every shape is a signed distance function and every fill is defined on the whole
plane, so one painter serves two ends: `generate_design` paints each element on a canvas of its own, as a real Crello
row carries it, and `render_sketches` paints straight on the pixel grid of the policy, fast enough to train on.

Elements are ordered bottom to top by falling size: large things lie behind small ones. So the order of the layers can
be read off the composite, which a decomposition model needs when elements do not overlap.

Only numpy and Pillow are needed; pyarrow for parquet, scikit-image and scikit-learn (whose own sample pictures are
used) only when they are asked for.
"""

from __future__ import annotations

import colorsys
import functools
import io
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from layerloop.components.layers import stack
from layerloop.components.layers.stack import on_backdrop

Design = dict[str, Any]
Colour = tuple[float, float, float]

PHOTOS = (
    "skimage:astronaut.png",
    "skimage:chelsea.png",
    "skimage:coffee.png",
    "skimage:hubble_deep_field.jpg",
    "skimage:rocket.jpg",
    "skimage:retina.jpg",
    "skimage:ihc.png",
    "skimage:motorcycle_left.png",
    "sklearn:china.jpg",
    "sklearn:flower.jpg",
)

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


# --------------------------------------------------------------------------------------------------------------- sketch


@dataclass(frozen=True)
class Fill:
    """Colour as a function of the plane: `flat`, `linear` or `radial` from `first` to `second` (0..1), or a `photo`."""

    kind: str
    first: Colour
    second: Colour
    direction: float = 0.0  # radians, of a linear gradient
    photo: str = ""
    crop: tuple[float, float, float, float] = (0.0, 0.0, 1.0, 1.0)  # left, top, right, bottom as fractions of the photo

    def mean(self) -> np.ndarray:
        """Typical colour, (3,) in [0, 1]: what contrast is judged against."""
        if self.kind == "photo":
            return _photo_crop(self.photo, self.crop, (4, 4)).reshape(-1, 3).mean(0) / 255.0
        return (np.asarray(self.first) + np.asarray(self.second)) / 2


@dataclass(frozen=True)
class Element:
    """One element in design pixels, before it is painted. `angle` in degrees, clockwise, about the centre."""

    shape: str
    left: float
    top: float
    width: float
    height: float
    angle: float
    opacity: float
    fill: Fill
    params: tuple[float, ...] = ()


@dataclass(frozen=True)
class Sketch:
    """A design before it is painted: a canvas in pixels and its elements, bottom first (the first is the
    background)."""

    width: int
    height: int
    elements: tuple[Element, ...]


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
    boxes: list[tuple[float, float, float, float]] = []
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
        fill = Fill("photo", (0, 0, 0), (0, 0, 0), photo=name, crop=_draw_crop(rng, name, width / height))
    else:
        first = palette[int(rng.integers(len(palette)))]
        kind = ("flat", "linear", "radial")[rng.choice(3, p=(0.35, 0.4, 0.25))]
        fill = _draw_fill(rng, kind, first, palette)
    return Element("plane", 0.0, 0.0, float(width), float(height), 0.0, 1.0, fill)


def _draw_crop(rng: np.random.Generator, name: str, aspect: float) -> tuple[float, float, float, float]:
    photo_height, photo_width = _photo(name).shape[:2]
    limit = min(photo_width, photo_height * aspect)  # the widest crop of this aspect
    crop_width = limit * rng.uniform(0.5, 1.0)
    crop_height = crop_width / aspect
    left = rng.uniform(0, photo_width - crop_width) / photo_width
    top = rng.uniform(0, photo_height - crop_height) / photo_height
    return left, top, left + crop_width / photo_width, top + crop_height / photo_height


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
    boxes: Sequence[tuple[float, float, float, float]],
    palette: Sequence[Colour],
    colours: Sequence[np.ndarray],
) -> tuple[Element, tuple[float, float, float, float]]:
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


def _hidden_share(lower: tuple[float, float, float, float], upper: tuple[float, float, float, float]) -> float:
    across = max(0.0, min(lower[2], upper[2]) - max(lower[0], upper[0]))
    down = max(0.0, min(lower[3], upper[3]) - max(lower[1], upper[1]))
    return across * down / max(1e-6, (lower[2] - lower[0]) * (lower[3] - lower[1]))


def _draw_contrasting_fill(rng: np.random.Generator, palette: Sequence[Colour], colours: Sequence[np.ndarray]) -> Fill:
    """A fill that stands out from the background and, if it can be had, from the elements under it."""
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


# --------------------------------------------------------------------------------------------------------------- shapes
# A shape is a signed distance in pixels (negative inside) of points x, y relative to its centre, for half sides a, b.


def _plane(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    return np.full(np.broadcast_shapes(x.shape, y.shape), -1e3, np.float32)


def _box(x: np.ndarray, y: np.ndarray, a: float, b: float, radius: float) -> np.ndarray:
    u, v = np.abs(x) - (a - radius), np.abs(y) - (b - radius)
    outside = np.hypot(np.maximum(u, 0), np.maximum(v, 0))
    return outside + np.minimum(np.maximum(u, v), 0) - radius


def _ellipse(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    k1 = np.hypot(x / a, y / b)
    k2 = np.hypot(x / a**2, y / b**2)
    return k1 * (k1 - 1) / np.maximum(k2, 1e-6)


def _card(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    return _box(x, y, a, b, params[0] * min(a, b))


def _polygon(x: np.ndarray, y: np.ndarray, points: np.ndarray) -> np.ndarray:
    """Signed distance to a polygon (N, 2), by winding number (Hart's and Quilez's formulation)."""
    squared = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    sign = np.ones_like(squared)
    for (ax, ay), (bx, by) in zip(points, np.roll(points, 1, axis=0), strict=True):
        ex, ey = bx - ax, by - ay
        wx, wy = x - ax, y - ay
        along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
        squared = np.minimum(squared, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
        above, below, left = y >= ay, y < by, ex * wy > ey * wx
        sign = np.where((above & below & left) | (~above & ~below & ~left), -sign, sign)
    return sign * np.sqrt(squared)


def _triangle(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    return _polygon(x, y, np.array([[-a, b], [a, b], [params[0] * a, -b]]))


def _diamond(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    return (np.abs(x) / a + np.abs(y) / b - 1) * (a * b / math.hypot(a, b))


def _star(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    count, inner = int(params[0]), params[1]
    turns = np.arange(2 * count) * math.pi / count
    radii = np.where(np.arange(2 * count) % 2 == 0, 1.0, inner)
    return _polygon(x, y, np.stack([a * radii * np.sin(turns), -b * radii * np.cos(turns)], 1))


def _ring(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    radius, half = min(a, b), params[0] * min(a, b) / 2
    return np.abs(np.hypot(x, y) - (radius - half)) - half


def _half_disc(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    return np.maximum(_ellipse(x, y - b, a, 2 * b, ()), y - b)


def _cross(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    arm = params[0] * min(a, b)
    return np.minimum(_box(x, y, a, arm, 0.3 * arm), _box(x, y, arm, b, 0.3 * arm))


def _blob(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    turn = np.arctan2(y / b, x / a)
    wave = sum(params[2 * k] * np.cos((k + 2) * turn + params[2 * k + 1]) for k in range(3))
    radius = (1 + wave) / (1 + sum(abs(params[2 * k]) for k in range(3)))
    return (np.hypot(x / a, y / b) - radius) * min(a, b)


def _heart(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    u, v = np.abs(x) / a * 0.6, 0.55 * (1 - y / b)  # Quilez's heart, in its frame [-0.6, 0.6] x [0, 1.1]
    upper = np.hypot(u - 0.25, v - 0.75) - math.sqrt(2) / 4
    fold = 0.5 * np.maximum(u + v, 0)
    lower = np.sqrt(np.minimum(u**2 + (v - 1) ** 2, (u - fold) ** 2 + (v - fold) ** 2)) * np.sign(u - v)
    return np.where(u + v > 1, upper, lower) * min(a / 0.6, b / 0.55)


def _bars(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    """Words as bars: `params` is the number of lines, then for every word line, start and end in [-1, 1]."""
    lines = int(params[0])
    pitch = 2 * b / lines
    distance = np.full(np.broadcast_shapes(x.shape, y.shape), np.inf, np.float32)
    for line, start, end in zip(params[1::3], params[2::3], params[3::3], strict=True):
        middle = -b + (line + 0.5) * pitch
        half = (end - start) / 2 * a
        thick = min(0.34 * pitch, half)
        distance = np.minimum(distance, _box(x - (start + end) / 2 * a, y - middle, half, thick, 0.5 * thick))
    return distance


def _dots(x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]) -> np.ndarray:
    across, down = int(params[0]), int(params[1])
    pitch_x, pitch_y = 2 * a / across, 2 * b / down
    column = np.clip(np.round((x + a) / pitch_x - 0.5), 0, across - 1)
    row = np.clip(np.round((y + b) / pitch_y - 0.5), 0, down - 1)
    radius = 0.36 * min(pitch_x, pitch_y)
    return np.hypot(x + a - (column + 0.5) * pitch_x, y + b - (row + 0.5) * pitch_y) - radius


@dataclass(frozen=True)
class Shape:
    """A signed distance function and a draw of (width / height, angle in degrees, parameters)."""

    distance: Callable[[np.ndarray, np.ndarray, float, float, tuple[float, ...]], np.ndarray]
    draw: Callable[[np.random.Generator], tuple[float, float, tuple[float, ...]]]
    share: float


def _tilt(rng: np.random.Generator, most: float, straight: float = 0.5) -> float:
    return 0.0 if rng.random() < straight else float(rng.uniform(-most, most))


def _draw_bars(rng: np.random.Generator) -> tuple[float, float, tuple[float, ...]]:
    lines = int(rng.integers(2, 4))
    words: list[float] = []
    for line in range(lines):
        start, end = -1.0, (1.0 if line == 0 else float(rng.uniform(0.1, 0.9)))
        split = float(rng.uniform(-0.4, 0.3))
        if end - split < 0.4 or rng.random() < 0.4:
            words += [line, start, end]
        else:
            words += [line, start, split - 0.08, line, split + 0.08, end]
    return float(rng.uniform(1.6, 2.4)), _tilt(rng, 15, 0.8), (float(lines), *words)


SHAPES: dict[str, Shape] = {
    "disc": Shape(_ellipse, lambda rng: (1.0, 0.0, ()), 0.14),
    "ellipse": Shape(_ellipse, lambda rng: (rng.uniform(1.3, 1.8), _tilt(rng, 90, 0.3), ()), 0.06),
    "card": Shape(_card, lambda rng: (rng.uniform(0.6, 1.7), _tilt(rng, 30), (rng.uniform(0.0, 0.5),)), 0.18),
    "pill": Shape(_card, lambda rng: (rng.uniform(2.0, 3.2), _tilt(rng, 50), (1.0,)), 0.07),
    "triangle": Shape(
        _triangle, lambda rng: (rng.uniform(0.9, 1.3), _tilt(rng, 180, 0.4), (rng.uniform(-0.4, 0.4),)), 0.10
    ),
    "diamond": Shape(_diamond, lambda rng: (rng.uniform(0.7, 1.2), _tilt(rng, 20, 0.7), ()), 0.05),
    "star": Shape(_star, lambda rng: (1.0, _tilt(rng, 36), (float(rng.integers(4, 8)), rng.uniform(0.42, 0.62))), 0.09),
    "ring": Shape(_ring, lambda rng: (1.0, 0.0, (rng.uniform(0.3, 0.5),)), 0.07),
    "half-disc": Shape(_half_disc, lambda rng: (rng.uniform(1.6, 2.2), 90.0 * rng.integers(4), ()), 0.04),
    "cross": Shape(_cross, lambda rng: (1.0, _tilt(rng, 45), (rng.uniform(0.28, 0.4),)), 0.04),
    "heart": Shape(_heart, lambda rng: (1.05, _tilt(rng, 20, 0.6), ()), 0.03),
    "blob": Shape(
        _blob,
        lambda rng: (
            rng.uniform(0.8, 1.3),
            0.0,
            tuple(np.stack([rng.uniform(0.03, 0.15, 3), rng.uniform(0, 6.3, 3)], 1).ravel()),
        ),
        0.06,
    ),
    "bars": Shape(_bars, _draw_bars, 0.04),
    "dots": Shape(_dots, lambda rng: (1.0, 0.0, (2.0, 2.0)) if rng.random() < 0.5 else (1.5, 0.0, (3.0, 2.0)), 0.01),
    "banner": Shape(
        _card, lambda rng: (3.0, (0.0, 90.0, rng.uniform(-50, 50))[rng.choice(3, p=(0.4, 0.2, 0.4))], (0.0,)), 0.02
    ),
}
SHAPE_SHARES = np.array([shape.share for shape in SHAPES.values()]) / sum(shape.share for shape in SHAPES.values())


# --------------------------------------------------------------------------------------------------------------- paint


@functools.lru_cache(maxsize=32)
def _photo(name: str) -> np.ndarray:
    """A sample picture of scikit-image or scikit-learn, (H, W, 3) uint8, longest side at most 640."""
    package, file = name.split(":")
    if package == "skimage":
        import skimage

        path = Path(skimage.__file__).parent / "data" / file
    else:
        import sklearn

        path = Path(sklearn.__file__).parent / "datasets" / "images" / file
    with Image.open(path) as image:
        picture = image.convert("RGB")
    picture.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return np.asarray(picture)


def _photo_crop(name: str, crop: tuple[float, float, float, float], size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8 of a crop given in fractions, resampled to `size` (width, height)."""
    pixels = _photo(name)
    height, width = pixels.shape[:2]
    box = (crop[0] * width, crop[1] * height, min(crop[2], 1.0) * width, min(crop[3], 1.0) * height)
    return np.asarray(
        Image.fromarray(pixels).resize(size, Image.Resampling.BOX if size[0] < 8 else Image.Resampling.LANCZOS, box=box)
    )


def _paint(element: Element, x: np.ndarray, y: np.ndarray, pixel: float) -> np.ndarray:
    """Straight RGBA, float32 in [0, 1], at points relative to the element's centre, one `pixel` (design pixels) apart.

    Colour is defined under alpha 0 too, so that interpolation and convolution meet no seam at the edge.
    """
    a, b = element.width / 2, element.height / 2
    distance = (
        SHAPES[element.shape].distance(x, y, a, b, element.params)
        if element.shape != "plane"
        else _plane(x, y, a, b, ())
    )
    out = np.empty((*distance.shape, 4), np.float32)
    out[..., 3] = np.clip(0.5 - distance / pixel, 0, 1)
    fill = element.fill
    if fill.kind == "photo":
        out[..., :3] = _photo_crop(fill.photo, fill.crop, (distance.shape[1], distance.shape[0])) / np.float32(255)
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
        painted = _paint(element, x, y, math.sqrt(step_x * step_y))
        painted[..., 3] *= element.opacity
        out[index] = np.rint(painted * 255)
    return out


def render_sketches(
    rng: np.random.Generator,
    *,
    count: int,
    layers: int,
    size: tuple[int, int],
    photo_share: float = 0.15,
) -> np.ndarray:
    """`count` new designs as layers (count, L, H, W, 4) uint8 at (width, height): the fast path for training.

    Equal to rendering `generate_design`'s rows but for anti-aliasing, and colour is defined under alpha 0.
    """
    scale = max(1, math.ceil(256 / max(size)))
    canvas = (size[0] * scale, size[1] * scale)
    out = np.empty((count, layers, size[1], size[0], 4), np.uint8)
    for index in range(count):
        out[index] = render_sketch(draw_sketch(rng, canvas=canvas, layers=layers, photo_share=photo_share), size)
    return out


def photo_crops(rng: np.random.Generator, *, count: int, size: tuple[int, int]) -> np.ndarray:
    """Crops of the sample photographs at (width, height): (count, H, W, 3) uint8."""
    out = np.empty((count, size[1], size[0], 3), np.uint8)
    for index in range(count):
        name = PHOTOS[rng.integers(len(PHOTOS))]
        out[index] = _photo_crop(name, _draw_crop(rng, name, size[0] / size[1]), size)
    return out


def composite(layers: np.ndarray) -> np.ndarray:
    """What layers (..., L, H, W, 4) uint8, bottom first, look like on black: (..., H, W, 3) uint8."""
    return on_backdrop(stack.composite(layers), "black")


# ----------------------------------------------------------------------------------------------------- Crello's layout

# Types of v5 by shape; anything else here is an SvgElement, or an ImageElement if it is a photograph.
ELEMENT_TYPES = {"plane": "ColoredBackground"}

# Columns of Crello v5 that say something about an element's text: present, so that one reader serves both, and empty.
TEXT_COLUMNS = {
    "text": "",
    "font": "",
    "font_size": 0.0,
    "line_height": 1.0,
    "letter_spacing": 0.0,
    "text_align": "",
    "capitalize": False,
    "font_bold": [],
    "font_italic": [],
    "text_color": [],
    "text_line": [],
}


def generate_design(
    rng: np.random.Generator, *, canvas: tuple[int, int] = (320, 320), layers: int, photo_share: float = 0.15
) -> Design:
    """One design as a row in Crello v5's columns, its elements painted as PNG (straight RGBA, unrotated, bottom first).

    `canvas` is (width, height) in pixels; `layers` counts the background. The same `rng` state gives the same row, byte
    for byte. Raises ValueError for `layers` under 1 or sides under 16.
    """
    return design_of(
        draw_sketch(rng, canvas=canvas, layers=layers, photo_share=photo_share), f"{rng.integers(2**63):016x}"
    )


def design_of(sketch: Sketch, name: str) -> Design:
    """A sketch as a row: `name` becomes its id."""
    elements = sketch.elements
    design: Design = {
        "id": name,
        "length": len(elements),
        "group": "generated",
        "format": "generated",
        "category": "generated",
        "title": f"{len(elements) - 1} shapes: {', '.join(element.shape for element in elements[1:])}",
        "canvas_width": sketch.width,
        "canvas_height": sketch.height,
        "type": [_element_type(element) for element in elements],
        "left": [float(element.left) for element in elements],
        "top": [float(element.top) for element in elements],
        "width": [float(element.width) for element in elements],
        "height": [float(element.height) for element in elements],
        "angle": [float(element.angle) for element in elements],
        "opacity": [float(element.opacity) for element in elements],
        "color": [[] for _ in elements],
        "image": [_png(_paint_alone(element)) for element in elements],
    }
    for column, empty in TEXT_COLUMNS.items():
        design[column] = [list(empty) if isinstance(empty, list) else empty for _ in elements]
    return design


def _element_type(element: Element) -> str:
    if element.fill.kind == "photo":
        return "ImageElement"
    return ELEMENT_TYPES.get(element.shape, "SvgElement")


def _paint_alone(element: Element) -> np.ndarray:
    """An element on a canvas of its own, unrotated and opaque: (h, w, 4) uint8, of about its size in design pixels."""
    width, height = max(1, round(element.width)), max(1, round(element.height))
    own = replace(element, left=0.0, top=0.0, angle=0.0, opacity=1.0)
    columns = ((np.arange(width, dtype=np.float32) + 0.5) * (element.width / width) - element.width / 2)[None, :]
    rows = ((np.arange(height, dtype=np.float32) + 0.5) * (element.height / height) - element.height / 2)[:, None]
    return np.rint(_paint(own, columns, rows, 1.0) * 255).astype(np.uint8)


def _png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA" if pixels.shape[-1] == 4 else "RGB").save(out, "PNG")
    return out.getvalue()


def write_designs_parquet(path: str | Path, designs: Iterable[Design]) -> None:
    """Write rows in Crello's schema: an image is a struct of `bytes` and `path`, as the datasets library stores it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, numbers, lists = pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.list_(pa.string()))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    flags = pa.list_(pa.list_(pa.bool_()))
    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "group", "format", "category", "title")]
        + [(name, pa.int64()) for name in ("length", "canvas_width", "canvas_height")]
        + [("type", text)]
        + [(name, pa.list_(pa.float64())) for name in ("left", "top", "width", "height", "angle", "opacity")]
        + [("color", lists), ("image", pa.list_(image))]
        + [(name, text) for name in ("text", "font", "text_align")]
        + [(name, numbers) for name in ("font_size", "line_height", "letter_spacing")]
        + [("capitalize", pa.list_(pa.bool_())), ("font_bold", flags), ("font_italic", flags)]
        + [("text_color", lists), ("text_line", pa.list_(pa.list_(pa.int64())))]
    )
    rows = [
        {**design, "image": [{"bytes": _image_bytes(i), "path": None} for i in design["image"]]} for design in designs
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


def read_designs_parquet(path: str | Path) -> list[Design]:
    """Rows of a parquet file in Crello's columns, images as their bytes. Raises ValueError where a needed column
    lacks."""
    import pyarrow.parquet as pq

    designs = pq.read_table(path).to_pylist()
    for design in designs:
        missing = [name for name in NEEDED_COLUMNS if name not in design]
        if missing:
            raise ValueError(
                f"{path} lacks the columns {', '.join(missing)}: it is no table of designs in Crello's layout"
            )
        design["image"] = [_image_bytes(image) for image in design["image"]]
    return designs


NEEDED_COLUMNS = (
    "id", "length", "canvas_width", "canvas_height", "left", "top", "width", "height", "angle", "opacity", "image",
)  # fmt: skip


def _image_bytes(image: Any) -> bytes | None:
    """The bytes of an image cell: bytes, the datasets library's struct, or nothing."""
    if isinstance(image, Mapping):
        image = image.get("bytes")
    return bytes(image) if image else None


def render_design(
    design: Design, *, longest_side: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """The layers of a row in Crello v5's columns: (L, H, W, 4) uint8, straight RGBA, bottom first, 0 where transparent.

    As LayerD renders ground truth: for every element a transparent canvas, translated to (left, top), rotated by
    `angle` degrees clockwise about the element's centre, its image stretched over (width, height), anti-aliased, at
    `opacity`. Give `longest_side` in pixels, or `size` as (width, height), or neither for the design's own canvas.

    Raises ValueError naming the element where it has no image (a real Crello text element has a font instead).
    """
    canvas = (float(design["canvas_width"]), float(design["canvas_height"]))
    if size is None:
        scale = 1.0 if longest_side is None else longest_side / max(canvas)
        size = (max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale)))
    elif longest_side is not None:
        raise ValueError("give longest_side or size, not both")
    out = np.zeros((int(design["length"]), size[1], size[0], 4), np.uint8)
    for index in range(len(out)):
        encoded = _image_bytes(design["image"][index])
        if encoded is None:
            kind = design["type"][index] if "type" in design else "element"
            raise ValueError(f"element {index} ({kind}) of design {design['id']} has no image: it cannot be rendered")
        with Image.open(io.BytesIO(encoded)) as opened:
            image = opened.convert("RGBA")
        box = tuple(float(design[name][index]) for name in ("left", "top", "width", "height"))
        if box[2] > 0 and box[3] > 0:
            out[index] = _place(image, box, float(design["angle"][index]), canvas, size)
            out[index, ..., 3] = np.rint(out[index, ..., 3] * min(1.0, max(0.0, float(design["opacity"][index]))))
    return out


def _place(
    image: Image.Image,
    box: tuple[float, ...],
    angle: float,
    canvas: tuple[float, float],
    size: tuple[int, int],
    finer: int = 2,
) -> np.ndarray:
    """One element on a transparent canvas of `size`, sampled `finer` times finer than that and averaged."""
    left, top, width, height = box
    scale_x, scale_y = size[0] * finer / canvas[0], size[1] * finer / canvas[1]
    # 1. the element at about the size it will have, where an averaging filter does what bilinear sampling cannot
    most = 4 * finer * max(size)
    stretch = (scale_x, scale_y) if angle % 180 == 0 else (math.sqrt(scale_x * scale_y),) * 2
    own = (min(most, max(1, round(width * stretch[0]))), min(most, max(1, round(height * stretch[1]))))
    pixels = image.convert("RGBa").resize(
        own, Image.Resampling.BOX if min(own) >= 2 * max(image.size) else Image.Resampling.LANCZOS
    )
    padded = Image.new("RGBa", (own[0] + 4, own[1] + 4))  # a clear margin, so that the edges are sampled too
    padded.paste(pixels, (2, 2))
    # 2. from a pixel of the fine canvas back to a pixel of that element
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    to_own_x, to_own_y = own[0] / width, own[1] / height
    centre_x, centre_y = left + width / 2, top + height / 2
    a, b = cos / scale_x * to_own_x, sin / scale_y * to_own_x
    d, e = -sin / scale_x * to_own_y, cos / scale_y * to_own_y
    c = (-cos * centre_x - sin * centre_y + width / 2) * to_own_x + 2
    f = (sin * centre_x - cos * centre_y + height / 2) * to_own_y + 2
    fine = (size[0] * finer, size[1] * finer)
    placed = padded.transform(fine, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    return np.asarray(placed.reduce(finer).convert("RGBA"))

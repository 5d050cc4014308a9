"""The shapes of elements: signed distances, and how often and with which proportions each is drawn.

A distance is in pixels, negative inside, of points x, y relative to the shape's centre, for half sides a, b.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


def _plane(x: np.ndarray, y: np.ndarray) -> np.ndarray:
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


def signed_distance(
    shape: str, x: np.ndarray, y: np.ndarray, a: float, b: float, params: tuple[float, ...]
) -> np.ndarray:
    """Distance of a shape of `SHAPES`, or of "plane", which covers every point."""
    return _plane(x, y) if shape == "plane" else SHAPES[shape].distance(x, y, a, b, params)


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

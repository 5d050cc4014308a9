"""Layered design data as people have it: words, posters and forms that differ in little, and copies of one of them."""

from __future__ import annotations

import io
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

WORDS = (
    "spring", "summer", "autumn", "winter", "harvest", "market", "garden", "window", "planet", "silver",
    "golden", "coffee", "flower", "forest", "island", "mirror", "orange", "pencil", "quartz", "rocket",
    "sailor", "tunnel", "violin", "walnut", "yellow", "zipper", "anchor", "bridge", "candle", "desert",
)  # fmt: skip


def font(size: float) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font that Pillow ships."""
    return ImageFont.load_default(size)


def word(text: str, *, side: int = 640, height: int = 32, at: tuple[int, int] = (200, 300)) -> Image.Image:
    """A white image with one word."""
    image = Image.new("RGB", (side, side), "white")
    ImageDraw.Draw(image).text(at, text, "black", font(height))
    return image


@dataclass(frozen=True)
class Poster:
    """A layout with three texts; equal layouts with one other text are other posters."""

    layout: int
    headline: str
    line: str
    number: str

    def draw(self) -> Image.Image:
        rng = np.random.default_rng(self.layout)
        width, height = ((640, 640), (640, 480), (480, 640), (800, 600))[self.layout % 4]
        y, x = np.mgrid[0:height, 0:width] / max(width, height)
        slope = rng.uniform(-60, 60, (3, 2))
        base = rng.uniform(150, 250, 3)
        pixels = base + slope[:, 0] * x[..., None] + slope[:, 1] * y[..., None]
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
        draw = ImageDraw.Draw(image)
        for _ in range(5):
            left, top = rng.uniform(0, width * 0.8), rng.uniform(0, height * 0.8)
            box = (left, top, left + rng.uniform(40, 200), top + rng.uniform(40, 200))
            shape = (draw.ellipse, draw.rectangle)[rng.integers(2)]
            shape(box, tuple(int(v) for v in rng.integers(0, 256, 3)))
        ink = tuple(int(v) for v in rng.integers(0, 90, 3))
        for text, size in ((self.headline, 54), (self.line, 24), (self.number, 20)):
            left, top = rng.uniform(10, width * 0.4), rng.uniform(10, height - 70)
            box = draw.textbbox((left, top), text, font(size))
            draw.rectangle((box[0] - 6, box[1] - 6, box[2] + 6, box[3] + 6), "white")
            draw.text((left, top), text, ink, font(size))
        return image


def form(number: str, *, size: float = 16, seed: int = 0) -> Image.Image:
    """A form of boxes and labels; only its number tells it from the next one."""
    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (640, 900), "white")
    draw = ImageDraw.Draw(image)
    for row in range(12):
        draw.text((40, 120 + row * 60), f"{WORDS[rng.integers(len(WORDS))]} {WORDS[row]}", "black", font(15))
        draw.rectangle((250, 112 + row * 60, 600, 148 + row * 60), outline=(90, 90, 90))
    draw.text((40, 40), "Registration form", "black", font(30))
    draw.text((430, 50), f"No. {number}", "black", font(size))
    return image


def copies(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """The image as it comes back from elsewhere: recompressed, resized, shifted by a pixel."""
    for quality in (50, 75, 90):
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=quality)
        yield f"quality {quality}", Image.open(buffer)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=75)
    yield "webp", Image.open(buffer)
    for scale in (0.5, 0.75, 1.6):
        size = (round(image.width * scale), round(image.height * scale))
        yield f"scale {scale}", image.resize(size, Image.Resampling.BICUBIC)
    for dx, dy in ((1, 0), (0, -1), (1, 1)):
        shifted = image.copy()  # the edge repeats
        shifted.paste(image, (dx, dy))
        yield f"shift {dx} {dy}", shifted
    yield "crop", image.crop((1, 1, image.width, image.height))
    buffer = io.BytesIO()
    image.resize((round(image.width * 0.8), round(image.height * 0.8)), Image.Resampling.LANCZOS).save(
        buffer, "JPEG", quality=80
    )
    yield "scale 0.8, quality 80", Image.open(buffer)

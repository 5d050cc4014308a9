"""Photographs that ship inside scikit-image and scikit-learn, which are imported only when needed."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
from PIL import Image

Crop = tuple[float, float, float, float]  # left, top, right, bottom as fractions of the photograph

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


@functools.lru_cache(maxsize=32)
def _photo(name: str) -> np.ndarray:
    """A photograph of scikit-image or scikit-learn, (H, W, 3) uint8, longest side at most 640."""
    package, file = name.split(":")
    if package == "skimage":
        import skimage

        path = Path(skimage.__file__).parent / "data" / file
    else:
        import sklearn

        path = Path(sklearn.__file__).parent / "datasets" / "images" / file
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    rgb.thumbnail((640, 640), Image.Resampling.LANCZOS)
    return np.asarray(rgb)


def photo_crop(name: str, crop: Crop, size: tuple[int, int]) -> np.ndarray:
    """(height, width, 3) uint8 of a crop given in fractions, resampled to `size` (width, height)."""
    pixels = _photo(name)
    height, width = pixels.shape[:2]
    box = (crop[0] * width, crop[1] * height, min(crop[2], 1.0) * width, min(crop[3], 1.0) * height)
    return np.asarray(
        Image.fromarray(pixels).resize(size, Image.Resampling.BOX if size[0] < 8 else Image.Resampling.LANCZOS, box=box)
    )


def draw_crop(rng: np.random.Generator, name: str, aspect: float) -> Crop:
    """A crop of the photograph `name`, of this aspect (width / height) and at least half as wide as is possible."""
    photo_height, photo_width = _photo(name).shape[:2]
    limit = min(photo_width, photo_height * aspect)  # the widest crop of this aspect
    crop_width = limit * rng.uniform(0.5, 1.0)
    crop_height = crop_width / aspect
    left = rng.uniform(0, photo_width - crop_width) / photo_width
    top = rng.uniform(0, photo_height - crop_height) / photo_height
    return left, top, left + crop_width / photo_width, top + crop_height / photo_height


def photo_crops(rng: np.random.Generator, *, count: int, size: tuple[int, int]) -> np.ndarray:
    """Crops of the sample photographs at (width, height): (count, H, W, 3) uint8."""
    out = np.empty((count, size[1], size[0], 3), np.uint8)
    for index in range(count):
        name = PHOTOS[rng.integers(len(PHOTOS))]
        out[index] = photo_crop(name, draw_crop(rng, name, size[0] / size[1]), size)
    return out

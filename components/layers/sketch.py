"""A design before it is painted: a canvas and its elements, as data."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from layerloop.components.layers.photos import Crop, photo_crop

Colour = tuple[float, float, float]  # 0..1


@dataclass(frozen=True)
class Fill:
    """Colour as a function of the plane: `flat`, `linear` or `radial` from `first` to `second` (0..1), or a `photo`."""

    kind: str
    first: Colour
    second: Colour
    direction: float = 0.0  # radians, of a linear gradient
    photo: str = ""
    crop: Crop = (0.0, 0.0, 1.0, 1.0)  # of the photo

    def mean(self) -> np.ndarray:
        """Typical colour, (3,) in [0, 1]: what contrast is judged against."""
        if self.kind == "photo":
            return photo_crop(self.photo, self.crop, (4, 4)).reshape(-1, 3).mean(0) / 255.0
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

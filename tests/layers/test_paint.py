"""Shapes and photographs as pixels."""

import numpy as np
import pytest

from layerloop.components.layers.paint import render_sketch
from layerloop.components.layers.photos import PHOTOS, photo_crops
from layerloop.components.layers.shapes import SHAPES
from layerloop.components.layers.sketch import Element, Fill, Sketch


def test_every_shape_is_drawn_inside_its_box_and_covers_some_of_it():
    for name, shape in SHAPES.items():
        aspect, _, params = shape.draw(np.random.default_rng(1))
        fill = Fill("flat", (1, 0, 0), (1, 0, 0))
        width, height = 40 * aspect**0.5, 40 / aspect**0.5
        element = Element(name, 60 - width / 2, 60 - height / 2, width, height, 0.0, 1.0, fill, params)
        alpha = render_sketch(Sketch(120, 120, (element,)), (120, 120))[0, ..., 3] / 255
        rows, columns = np.nonzero(alpha > 0.5)
        assert columns.min() >= 60 - width / 2 - 1 and columns.max() <= 60 + width / 2, name
        assert rows.min() >= 60 - height / 2 - 1 and rows.max() <= 60 + height / 2, name
        assert 0.2 < alpha.sum() / (width * height) <= 1.01, name


def test_a_disc_has_the_area_of_a_disc():
    element = Element("disc", 10, 10, 40, 40, 0.0, 1.0, Fill("flat", (1, 1, 1), (1, 1, 1)))
    alpha = render_sketch(Sketch(64, 64, (element,)), (64, 64))[0, ..., 3] / 255
    assert alpha.sum() == pytest.approx(np.pi * 400, rel=0.005)


def test_photographs_come_from_installed_packages():
    crops = photo_crops(np.random.default_rng(0), count=2 * len(PHOTOS), size=(32, 48))
    assert crops.shape == (2 * len(PHOTOS), 48, 32, 3)
    assert crops.std() > 30

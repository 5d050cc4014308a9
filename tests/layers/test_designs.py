"""What is drawn at random: layers that a model can tell apart, in an order that it can read."""

import numpy as np

from layerloop.components.layers.designs import draw_sketch, render_sketches


def test_the_same_seed_gives_the_same_batch():
    first, again = (render_sketches(np.random.default_rng(5), count=3, layers=3, size=(64, 48)) for _ in range(2))
    assert first.shape == (3, 3, 48, 64, 4)
    assert (first == again).all()


def test_the_background_is_opaque_and_every_element_is_well_visible():
    for seed in range(60):
        layers = 2 + seed % 4
        stack = render_sketches(np.random.default_rng(seed), count=1, layers=layers, size=(64, 64))[0]
        alpha = stack[..., 3] / 255
        assert (alpha[0] == 1).all()
        for index in range(1, layers):
            hidden = 1 - np.prod(1 - alpha[index + 1 :], axis=0)
            assert (alpha[index] * (1 - hidden)).sum() > 25, (seed, index)  # of 4096 pixels


def test_elements_differ_in_colour_from_the_background():
    for seed in range(40):
        sketch = draw_sketch(np.random.default_rng(seed), canvas=(64, 64), layers=3, photo_share=0)
        background = sketch.elements[0].fill.mean()
        for element in sketch.elements[1:]:
            assert np.abs(element.fill.mean() - background).mean() > 0.1, seed


def test_the_larger_element_lies_lower():
    """The order that a model is to read off the image."""
    falling = []
    for seed in range(60):
        alpha = render_sketches(np.random.default_rng(seed), count=1, layers=3, size=(64, 64), photo_share=0)[
            0, 1:, ..., 3
        ]
        falling.append(alpha[0].sum() > alpha[1].sum())
    assert np.mean(falling) > 0.8

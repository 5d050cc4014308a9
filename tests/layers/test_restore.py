"""A decomposition at the source's size: its composite is the source, its edges and its colours are the source's."""

from __future__ import annotations

import numpy as np
import pytest

from layerloop.components.layers import restore as module
from layerloop.components.layers.restore import difference, restore
from layerloop.components.layers.stack import Pixels, composite, resize
from layerloop.components.schema.errors import LayerloopError

RED, BLUE = np.array([200, 30, 20]), np.array([20, 40, 180])


def noise(*shape: int, seed: int = 0) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


def disc(side: int, radius: float = 0.3) -> np.ndarray:
    """Alpha 0..1 of an anti-aliased disc in the middle, of a radius that is a share of the side: (side, side)."""
    y, x = (np.mgrid[:side, :side] + 0.5) / side - 0.5
    return np.clip((radius - np.hypot(x, y)) * side + 0.5, 0, 1)


def scene(side: int) -> Pixels:
    """A red disc on blue, (side, side, 3)."""
    alpha = disc(side)[..., None]
    return np.rint(RED * alpha + BLUE * (1 - alpha)).astype(np.uint8)


def halved(side: int) -> Pixels:
    """Its layers as a model gives them, with what lies behind in the colours of the soft edge: (2, side, side, 4)."""
    stack = np.full((2, side, side, 4), 255, np.uint8)
    stack[0, ..., :3] = BLUE
    stack[1, ..., :3] = scene(side)
    stack[1, ..., 3] = np.rint(disc(side) * 255)
    return stack


@pytest.mark.parametrize("size", [(24, 32), (90, 121), (10, 7), (1, 1), (1, 200), (23, 32)])
def test_the_layers_recompose_to_an_opaque_source(size: tuple[int, int]) -> None:
    stack, source = noise(3, 24, 32, 4), noise(*size, 3, seed=1)
    layers = restore(stack, source)
    assert layers.shape == (3, *size, 4)
    assert (composite(layers)[..., 3] == 255).all()
    assert np.abs(composite(layers)[..., :3].astype(int) - source).max() <= 1
    assert difference(layers, source)[1] <= 1


def test_the_layers_recompose_to_a_source_with_alpha() -> None:
    source = noise(60, 80, 4, seed=2)
    source[:20, :, 3], source[20:40, :, 3] = 0, 255
    layers = restore(noise(4, 24, 32, 4), source)
    again = composite(layers)
    assert not layers[:, :20].any()
    assert np.abs(again[..., 3].astype(int) - source[..., 3]).max() <= 3  # each of four layers is rounded
    strong = source[..., 3] > 128
    assert np.abs(again[..., :3].astype(int) - source[..., :3])[strong].max() <= 2


def test_where_a_layer_is_opaque_and_uncovered_it_has_the_sources_pixels() -> None:
    source = noise(320, 320, 3, seed=3)
    layers = restore(halved(64), source)
    inside, outside = disc(320, 0.25) == 1, disc(320, 0.35) == 0
    assert np.array_equal(layers[1][inside][:, :3], source[inside])
    assert np.array_equal(layers[0][outside][:, :3], source[outside])


def test_what_is_hidden_keeps_the_models_colours() -> None:
    layers = restore(halved(64), scene(320))
    hidden = disc(320, 0.22) == 1
    assert np.abs(layers[0][hidden][:, :3].astype(int) - BLUE).max() <= 1
    assert (layers[0][hidden][:, 3] == 255).all()


def test_alpha_follows_the_sources_edge_and_not_the_models_pixels() -> None:
    truth = disc(640) * 255
    ours = np.abs(restore(halved(64), scene(640))[1, ..., 3] - truth).mean()
    enlarged = np.abs(resize(halved(64), (640, 640), "bilinear")[1, ..., 3] - truth).mean()
    assert ours < 0.2 * enlarged


def test_the_guides_texture_stays_out_of_even_alpha() -> None:
    stack, source = halved(64), noise(640, 640, 3, seed=4)
    layers = restore(stack, source)
    assert (layers[1, ..., 3][disc(640, 0.24) == 1] == 255).all()
    assert (layers[1, ..., 3][disc(640, 0.36) == 0] == 0).all()


@pytest.mark.parametrize("side", [64, 320])
def test_a_soft_edge_has_no_halo_of_what_lies_behind(side: int) -> None:
    layer = restore(halved(64), scene(side))[1]
    edge = (layer[..., 3] > 25) & (layer[..., 3] < 230)
    assert edge.any()
    away = np.abs(layer[edge][:, :3] - RED).mean()
    before = halved(64)[1]
    of_model = (before[..., 3] > 25) & (before[..., 3] < 230)
    assert away < 0.15 * np.abs(before[of_model][:, :3] - RED).mean()


def test_a_wide_shadow_stays_a_shadow() -> None:
    stack = np.full((2, 48, 48, 4), 255, np.uint8)
    stack[1] = (0, 0, 0, 0)
    stack[1, 12:36, 12:36, 3] = 76
    source = composite(stack)[..., :3]
    layers = restore(stack, source)
    assert layers[1, 14:34, 14:34, :3].max() <= 2
    assert (layers[1, 14:34, 14:34, 3] == 76).all()


def test_a_hole_in_all_layers_is_closed_by_the_lowest() -> None:
    stack = np.zeros((2, 16, 16, 4), np.uint8)
    stack[1, :8] = 255
    layers = restore(stack, noise(16, 16, 3))
    assert (layers[0, 8:, :, 3] == 255).all()
    assert (layers[0, :8, :, 3] == 0).all()


def test_faint_alpha_is_none_and_nearly_full_alpha_is_full() -> None:
    stack = np.full((2, 8, 8, 4), 255, np.uint8)
    stack[1, ..., 3] = 2
    stack[1, :4, :, 3] = 253
    layers = restore(stack, noise(8, 8, 3))
    assert (layers[1, :4, :, 3] == 255).all()
    assert not layers[1, 4:].any()


def test_strips_are_seamless(monkeypatch: pytest.MonkeyPatch) -> None:
    stack, source = noise(2, 16, 24, 4), noise(77, 90, 3, seed=5)
    whole = restore(stack, source)
    monkeypatch.setattr(module, "STRIP", 90 * 7)
    gap = np.abs(restore(stack, source).astype(int) - whole)
    assert gap.max() <= 1
    assert (gap > 0).mean() < 0.001  # Pillow's boxes are float32


def test_bounds_of_colour_leave_the_composite_exact() -> None:
    """The least change alone would need a colour above white in one layer."""
    stack = np.full((2, 4, 4, 4), 255, np.uint8)
    stack[1, ..., :3], stack[1, ..., 3], stack[0, ..., :3] = 250, 128, 0
    source = np.full((4, 4, 3), 255, np.uint8)
    layers = restore(stack, source)
    assert np.array_equal(composite(layers)[..., :3], source)


def test_what_is_no_image_is_refused() -> None:
    with pytest.raises(LayerloopError, match=r"source is float64\[8, 8, 3\]: give uint8\[H, W, 3 or 4\]"):
        restore(noise(1, 8, 8, 4), np.zeros((8, 8, 3)))  # type: ignore[arg-type]

"""Images and grids: what is drawn can be read again, and groups are split so that they stay connected."""

from __future__ import annotations

import io
import itertools
import math
import zlib

import numpy as np
import pytest
from PIL import Image

from layerloop.components.judge.grids import Layout, cells_of, draw_grid, rows_within, split
from layerloop.components.judge.images import EncodedImage, candidate_images, encode_rgb, fitted
from layerloop.components.layers.designs import render_sketches
from layerloop.components.layers.stack import composite, on_backdrop, resize


def pixels_of(image: EncodedImage) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(image.png)))


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (64, 64), (33, 100)])
def test_our_png_is_exact_for_pillow(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    image = Image.open(io.BytesIO(encode_rgb(pixels)))
    assert image.mode == "RGB"
    np.testing.assert_array_equal(np.asarray(image), pixels)


@pytest.mark.parametrize("above", [0, 1, 7, 8, 30, 64])
@pytest.mark.parametrize("below", [0, 1, 7, 8, 30])
def test_our_png_is_exact_where_rows_repeat(above: int, below: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 40, 3), np.uint8)
    pixels[:above] = pixels[0]
    pixels[64 - below :] = pixels[-1]
    data = encode_rgb(pixels)
    image = Image.open(io.BytesIO(data))
    image.verify()  # the chunks' sums
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)
    packed = data[data.index(b"IDAT") + 4 : data.index(b"IEND") - 8]
    unpacker = zlib.decompressobj()
    assert len(unpacker.decompress(packed)) == 64 * (1 + 40 * 3)
    assert unpacker.eof and not unpacker.unused_data  # the stream's own sum, and nothing behind it
    assert encode_rgb(pixels.copy()) == data


@pytest.mark.parametrize("backdrop", ["white", "black", "checker"])
def test_layers_are_laid_explicitly_and_exactly(backdrop: str) -> None:
    stack = render_sketches(np.random.default_rng(3), count=1, layers=4, size=(48, 40))[0]
    stack[2, ..., 3] //= 2
    shown = candidate_images(stack, (backdrop,))
    for layer, image in zip(stack, shown.layers[backdrop], strict=True):
        np.testing.assert_array_equal(pixels_of(image), on_backdrop(layer, backdrop))  # type: ignore[arg-type]
    whole = pixels_of(shown.recomposition).astype(int)
    assert np.abs(whole - on_backdrop(composite(stack), "white")).max() <= 1


def test_an_empty_layer_is_the_backdrop_alone() -> None:
    stack = np.zeros((2, 16, 16, 4), np.uint8)
    stack[0] = (10, 20, 30, 255)
    shown = candidate_images(stack, ("white",))
    assert (pixels_of(shown.layers["white"][1]) == 255).all()
    assert (pixels_of(shown.recomposition) == (10, 20, 30)).all()


def test_images_are_sized_to_the_judges_resolution_and_keep_their_shape() -> None:
    stack = np.full((2, 60, 90, 4), 255, np.uint8)
    assert fitted(stack, 30).shape == (2, 20, 30, 4)
    assert fitted(stack, 180).shape == (2, 120, 180, 4)
    assert fitted(stack, 90) is stack


@pytest.mark.parametrize("longest", [40, 95])
def test_reduced_layers_look_as_exact_arithmetic_makes_them(longest: int) -> None:
    stack = render_sketches(np.random.default_rng(3), count=1, layers=4, size=(96, 96))[0]
    stack[2] = np.random.default_rng(0).integers(0, 256, stack[2].shape, np.uint8)  # alpha and colour of every kind
    exact = resize(stack, (longest, longest), "box")
    found = fitted(stack, longest)
    for backdrop in ("white", "black"):
        difference = np.abs(on_backdrop(found, backdrop).astype(int) - on_backdrop(exact, backdrop))  # type: ignore[arg-type]
        assert difference.max() <= 3 and difference.mean() < 0.5


def test_a_drawn_grid_can_be_read_cell_by_cell() -> None:
    stacks = list(render_sketches(np.random.default_rng(1), count=3, layers=2, size=(40, 32), photo_share=0.0))
    pixels = pixels_of(draw_grid(stacks, "white"))
    layout = Layout.of_image((pixels.shape[1], pixels.shape[0]), 3, 3)
    assert layout == Layout(3, 3, 32, 40)
    cells = cells_of(pixels, layout)
    for row, stack in enumerate(stacks):
        np.testing.assert_array_equal(cells[row, 0], on_backdrop(composite(stack), "white"))
        np.testing.assert_array_equal(cells[row, 2], on_backdrop(stack[1], "white"))
    assert Layout.of_image((pixels.shape[1] + 1, pixels.shape[0]), 3, 3) is None


def test_every_row_and_column_has_a_label_that_is_its_own() -> None:
    stack = np.full((2, 64, 64, 4), 255, np.uint8)
    pixels = pixels_of(draw_grid([stack] * 3, "white"))
    margins = [pixels[y : y + 64, :28] for y, _ in (Layout(3, 3, 64, 64).corner(row, 0) for row in range(3))]
    assert len({margin.tobytes() for margin in margins}) == 3
    tops = [pixels[:28, x : x + 64] for _, x in (Layout(3, 3, 64, 64).corner(0, column) for column in range(3))]
    assert len({top.tobytes() for top in tops}) == 3


@pytest.mark.parametrize(("count", "rows", "overlap"), [(8, 12, 2), (12, 5, 2), (13, 4, 1), (7, 3, 2), (40, 6, 3)])
def test_grids_cover_all_and_are_connected(count: int, rows: int, overlap: int) -> None:
    order = list(np.random.default_rng(0).permutation(count))
    grids = split(order, rows=rows, overlap=overlap)
    assert {c for grid in grids for c in grid} == set(range(count))
    assert all(len(grid) <= rows and len(set(grid)) == len(grid) for grid in grids)
    assert all(len(set(a) & set(b)) >= overlap for a, b in itertools.pairwise(grids))
    assert max(map(len, grids)) - min(map(len, grids)) <= 1


def test_the_pixel_budget_bounds_the_rows() -> None:
    rows = rows_within(1e6, columns=5, height=160, width=160, at_most=12)
    used, more = (math.prod(Layout(count, 5, 160, 160).size) for count in (rows, rows + 1))
    assert used <= 1e6 < more
    assert rows_within(1e9, columns=5, height=160, width=160, at_most=12) == 12
    assert rows_within(1.0, columns=5, height=160, width=160, at_most=12) == 2

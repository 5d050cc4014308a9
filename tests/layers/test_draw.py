"""Labelled grids of images."""

from __future__ import annotations

import numpy as np
import pytest

from layerloop.components.layers.draw import Cell, difference, fit, labelled_grid
from layerloop.components.layers.stack import Pixels
from layerloop.components.schema.errors import LayerloopError

WHITE = (255, 255, 255)


def tile(colour: tuple[int, int, int], height: int = 20, width: int = 30) -> Pixels:
    return np.full((height, width, 3), colour, np.uint8)


def area_of(grid: Pixels, colour: tuple[int, int, int]) -> int:
    return int((grid == colour).all(axis=-1).sum())


def centre_of(grid: Pixels, colour: tuple[int, int, int]) -> np.ndarray:
    """(row, column) of the middle of what has this colour."""
    return np.argwhere((grid == colour).all(axis=-1)).mean(axis=0)


def test_every_cell_is_in_the_grid_whole() -> None:
    colours = [[(250, 10, 10), (10, 250, 10)], [(10, 10, 250), (250, 250, 10)]]
    grid = labelled_grid(
        [[Cell(tile(colour)) for colour in row] for row in colours],
        column_headings=["left", "right"],
        row_headings=["a", "b"],
    )
    for row in colours:
        for colour in row:
            assert area_of(grid, colour) == 600


def test_cells_stand_in_reading_order() -> None:
    grid = labelled_grid([[Cell(tile((250, 10, 10))), Cell(tile((10, 250, 10)))], [Cell(tile((10, 10, 250)))]])
    red, green, blue = (
        np.argwhere((grid == c).all(axis=-1)).mean(axis=0) for c in ((250, 10, 10), (10, 250, 10), (10, 10, 250))
    )
    assert red[1] < green[1] and red[0] == green[0]
    assert blue[0] > red[0] and blue[1] == red[1]


def test_labels_take_room_and_leave_ink() -> None:
    plain = labelled_grid([[Cell(tile((250, 10, 10)))]])
    labelled = labelled_grid([[Cell(tile((250, 10, 10)), "blank\n0.4 %")]])
    assert labelled.shape[0] > plain.shape[0]
    ink = (labelled != WHITE).any(axis=-1) & ~(labelled == (250, 10, 10)).all(axis=-1)
    assert ink[plain.shape[0] :].sum() > 20


def test_a_long_label_widens_its_column_and_is_not_cut() -> None:
    short = labelled_grid([[Cell(tile(WHITE), "i")]])
    long = labelled_grid([[Cell(tile(WHITE), "a label far wider than its image")]])
    assert long.shape[1] > short.shape[1] + 100
    ink = (long != WHITE).any(axis=-1)
    assert not ink[:, :2].any() and not ink[:, -2:].any()


def test_an_empty_place_stays_empty() -> None:
    grid = labelled_grid([[Cell(tile((250, 10, 10))), Cell(None)], [Cell(None), Cell(tile((250, 10, 10)))]])
    assert area_of(grid, (250, 10, 10)) == 1200


def test_cells_of_several_sizes_are_centred_in_their_column() -> None:
    grid = labelled_grid([[Cell(tile((250, 10, 10), 10, 10))], [Cell(tile((10, 250, 10), 10, 50))]])
    red, green = centre_of(grid, (250, 10, 10)), centre_of(grid, (10, 250, 10))
    assert abs(red[1] - green[1]) <= 0.5


def test_wrong_headings_are_refused() -> None:
    with pytest.raises(LayerloopError, match="no cells"):
        labelled_grid([])
    with pytest.raises(LayerloopError, match="2 column headings for 1 columns"):
        labelled_grid([[Cell(tile(WHITE))]], column_headings=["a", "b"])
    with pytest.raises(LayerloopError, match="1 row headings for 2 rows"):
        labelled_grid([[Cell(tile(WHITE))]] * 2, row_headings=["a"])


def test_a_small_image_is_enlarged_by_a_whole_factor() -> None:
    image = np.random.default_rng(0).integers(0, 256, (10, 16, 4), dtype=np.uint8)
    shown = fit(image, 100)
    assert shown.shape == (60, 96, 4)
    assert np.array_equal(shown[::6, ::6], image)


def test_a_large_image_is_reduced_to_the_longest_side() -> None:
    assert fit(tile(WHITE, 300, 600), 200).shape == (100, 200, 3)


def test_difference_is_absolute_and_amplified_without_wrapping() -> None:
    a, b = tile((10, 200, 100)), tile((30, 190, 100))
    assert (difference(a, b) == (20, 10, 0)).all()
    assert (difference(b, a, gain=20) == (255, 200, 0)).all()

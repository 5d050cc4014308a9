"""Grids of candidates x layers with drawn labels: splitting, layout, drawing, and reading."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from layerloop.components.judge.images import EncodedImage, encode_rgb
from layerloop.components.layers.stack import Pixels, composite, on_backdrop

TEXT = 14  # height of the labels, pixels
MARGIN = 28  # room for row labels on the left and for column labels at the top, pixels
GAP = 6  # between cells, pixels
PAGE = (64, 66, 70)  # behind the cells: no backdrop has this colour, so an empty layer differs from the page
INK = (255, 255, 255)


@dataclass(frozen=True)
class Layout:
    """Positions of the cells of a grid. All cells have the same size in pixels."""

    rows: int
    columns: int
    height: int
    width: int

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) of the complete image."""
        return MARGIN + self.columns * (self.width + GAP), MARGIN + self.rows * (self.height + GAP)

    def corner(self, row: int, column: int) -> tuple[int, int]:
        """(y, x) of a cell's top left pixel."""
        return MARGIN + row * (self.height + GAP), MARGIN + column * (self.width + GAP)

    @classmethod
    def of_image(cls, size: tuple[int, int], rows: int, columns: int) -> Layout | None:
        """The layout of a drawn grid of (width, height) `size` with so many rows and columns, or None."""
        width, over_x = divmod(size[0] - MARGIN, columns)
        height, over_y = divmod(size[1] - MARGIN, rows)
        if over_x or over_y or width <= GAP or height <= GAP:
            return None
        return cls(rows, columns, height - GAP, width - GAP)


def cells_of(pixels: Pixels, layout: Layout) -> Pixels:
    """The cells of a drawn grid: `(rows, columns, h, w, 3)`."""
    out = np.empty((layout.rows, layout.columns, layout.height, layout.width, 3), np.uint8)
    for row in range(layout.rows):
        for column in range(layout.columns):
            y, x = layout.corner(row, column)
            out[row, column] = pixels[y : y + layout.height, x : x + layout.width]
    return out


def column_names(layers: int) -> list[str]:
    """Labels of a grid's columns, which are drawn into it and so hashed with it: the recomposition, then the layers."""
    return ["whole", *(f"layer {index}" for index in range(layers))]


def draw_grid(stacks: Sequence[Pixels], backdrop: str) -> EncodedImage:
    """One row per candidate (labelled 1, 2, ... as given): its recomposition, then every layer, on `backdrop`.

    Args:
        stacks: Cell-sized layers of each candidate, `(L, h, w, 4)`, all of one shape.
        backdrop: Behind every layer and the recomposition.
    """
    layers, height, width = stacks[0].shape[:3]
    layout = Layout(len(stacks), layers + 1, height, width)
    page = _page(layout, tuple(column_names(layers))).copy()
    for row, stack in enumerate(stacks):
        shown = on_backdrop(np.concatenate([composite(stack)[None], stack]), backdrop)  # type: ignore[arg-type]
        for column, cell in enumerate(shown):
            y, x = layout.corner(row, column)
            page[y : y + height, x : x + width] = cell
    return EncodedImage(encode_rgb(page))


@functools.lru_cache(maxsize=32)
def _page(layout: Layout, columns: tuple[str, ...]) -> Pixels:
    """The empty grid with its labels; groups of one shape share it."""
    from PIL import Image, ImageDraw, ImageFont

    canvas = Image.new("RGB", layout.size, PAGE)
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(size=TEXT)
    for column, name in enumerate(columns):
        _, x = layout.corner(0, column)
        fits = draw.textlength(name, font=font) <= layout.width + GAP
        draw.text((x + layout.width / 2, MARGIN / 2), name if fits else name.split()[-1][:4], INK, font, anchor="mm")
    for row in range(layout.rows):
        y, _ = layout.corner(row, 0)
        draw.text((MARGIN / 2, y + layout.height / 2), str(row + 1), INK, font, anchor="mm")
    return np.asarray(canvas)


def rows_within(pixels: float, *, columns: int, height: int, width: int, at_most: int) -> int:
    """Candidates that a grid may hold within a budget of `pixels`; at least two, since one is not compared."""
    across = Layout(1, columns, height, width).size[0]
    return max(2, min(at_most, int((pixels / across - MARGIN) // (height + GAP))))


def split(order: Sequence[int], *, rows: int, overlap: int) -> list[list[int]]:
    """Cut an order of candidates into grids of at most `rows`, neighbours sharing at least `overlap`, sizes near equal.

    Every candidate is in a grid, and the grids are connected by shared candidates, so they can be put on one scale.
    """
    count = len(order)
    if count <= rows:
        return [list(order)]
    overlap = min(overlap, rows - 1)
    grids = math.ceil((count - overlap) / (rows - overlap))
    size = math.ceil((count + (grids - 1) * overlap) / grids)
    starts = [round(index * (count - size) / (grids - 1)) for index in range(grids)]
    return [list(order[start : start + size]) for start in starts]

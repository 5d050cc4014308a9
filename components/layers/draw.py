"""Labelled grids and contact sheets as pixels. Pillow draws the text; everything else is numpy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from layerloop.components.layers.stack import Pixels, resize
from layerloop.components.schema.errors import LayerloopError

if TYPE_CHECKING:
    from PIL import ImageDraw

PAPER, INK = (255, 255, 255), (32, 33, 36)  # RGB of the page and of the text


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: an RGB image `(h, w, 3)` uint8, or None to leave it empty, and lines of text under it."""

    image: Pixels | None
    label: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the image, pixels."""
        return (0, 0) if self.image is None else (self.image.shape[0], self.image.shape[1])


def labelled_grid(
    rows: Sequence[Sequence[Cell]],
    *,
    column_headings: Sequence[str] = (),
    row_headings: Sequence[str] = (),
    text_size: int = 12,
    gap: int = 6,
) -> Pixels:
    """One image `(H, W, 3)` uint8 of rows of labelled images.

    Args:
        rows: Cells; a row may be shorter than others. An image is centred in its column and row.
        column_headings: Over each column.
        row_headings: Left of each row.
        text_size: Height of the letters, pixels.
        gap: Space between cells, pixels.

    Raises:
        LayerloopError: no cells, or another number of headings than of rows or columns.
    """
    across = max((len(row) for row in rows), default=0)
    if not across:
        raise LayerloopError("the grid has no cells: give at least one image")
    for headings, count, what in ((column_headings, across, "column"), (row_headings, len(rows), "row")):
        if headings and len(headings) != count:
            raise LayerloopError(f"the grid has {len(headings)} {what} headings for {count} {what}s: give one each")
    full = [[*row, *[Cell(None)] * (across - len(row))] for row in rows]
    text = _Text(text_size)
    layout = _lay_out(full, column_headings, row_headings, text, gap)
    return _draw(full, column_headings, row_headings, text, layout)


class _Text:
    """Lines of one letter size: how much room they take, and how they are drawn."""

    # Pillow's own font has no glyphs for these.
    _SPELT_OUT = str.maketrans({"\u00a0": " ", "\u03b1": "alpha", "\u00d7": "x", "\u2212": "-"})

    def __init__(self, size: int) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.size, self.font = size, ImageFont.load_default(size=size)
        self._ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(self, text: str) -> tuple[int, int]:
        """(height, width) in pixels, with half a line below; (0, 0) of no text."""
        if not text:
            return 0, 0
        spelt_out = text.translate(self._SPELT_OUT)
        left, top, right, bottom = self._ruler.multiline_textbbox((0, 0), spelt_out, font=self.font, spacing=2)
        return int(np.ceil(bottom - top)) + self.size // 2, int(np.ceil(right - left))

    def write(self, canvas: ImageDraw.ImageDraw, at: tuple[float, float], text: str, anchor: str) -> None:
        """Draw at (x, y), which is the text's `anchor` in Pillow's words."""
        if text:
            spelt_out = text.translate(self._SPELT_OUT)
            canvas.multiline_text(at, spelt_out, fill=INK, font=self.font, anchor=anchor, spacing=2, align="center")


@dataclass(frozen=True)
class _Layout:
    """Positions and sizes of a grid's columns and rows, in pixels."""

    left: Sequence[int]  # of each column, and of what would be the next one
    top: Sequence[int]  # of each row, and of what would be the next one
    widths: Sequence[int]  # of the columns
    heights: Sequence[int]  # of the rows' images, without the labels under them
    gap: int


def _lay_out(
    rows: Sequence[Sequence[Cell]], column_headings: Sequence[str], row_headings: Sequence[str], text: _Text, gap: int
) -> _Layout:
    headings = column_headings or [""] * len(rows[0])
    widths = [
        max([text.extent(heading)[1], *(max(cell.size[1], text.extent(cell.label)[1]) for cell in column)])
        for heading, column in zip(headings, zip(*rows, strict=True), strict=True)
    ]
    heights = [max(cell.size[0] for cell in row) for row in rows]
    labels = [max(text.extent(cell.label)[0] for cell in row) for row in rows]
    left = max((text.extent(heading)[1] for heading in row_headings), default=0) + (2 * gap if row_headings else gap)
    top = max(text.extent(heading)[0] for heading in headings) + (2 * gap if column_headings else gap)
    return _Layout(
        left=list(accumulate((width + gap for width in widths), initial=left)),
        top=list(accumulate((h + label + gap for h, label in zip(heights, labels, strict=True)), initial=top)),
        widths=widths,
        heights=heights,
        gap=gap,
    )


def _draw(
    rows: Sequence[Sequence[Cell]],
    column_headings: Sequence[str],
    row_headings: Sequence[str],
    text: _Text,
    layout: _Layout,
) -> Pixels:
    from PIL import Image, ImageDraw

    page = Image.new("RGB", (layout.left[-1], layout.top[-1]), PAPER)
    canvas = ImageDraw.Draw(page)
    for left, width, heading in zip(layout.left, layout.widths, column_headings, strict=False):
        text.write(canvas, (left + width / 2, layout.gap), heading, "ma")
    for top, height, heading in zip(layout.top, layout.heights, row_headings, strict=False):
        text.write(canvas, (layout.left[0] - layout.gap, top + height / 2), heading, "rm")
    for row, top, tallest in zip(rows, layout.top, layout.heights, strict=False):
        for cell, left, widest in zip(row, layout.left, layout.widths, strict=False):
            if cell.image is None:
                continue
            height, width = cell.size
            x = left + (widest - width) // 2
            page.paste(Image.fromarray(np.ascontiguousarray(cell.image[..., :3])), (x, top + (tallest - height) // 2))
            text.write(canvas, (x + width / 2, top + tallest + 2), cell.label, "ma")
    return np.asarray(page)


def fit(pixels: Pixels, longest: int) -> Pixels:
    """Images `(..., H, W, 3|4)` uint8 whose longest side is about `longest` pixels, for looking at.

    A small image is enlarged by an integer factor, pixel by pixel, so that its pixels stay visible; a large one
    is reduced (premultiplied, area average).
    """
    height, width = pixels.shape[-3:-1]
    side = max(height, width)
    if side <= longest:
        factor = max(1, longest // side)
        return pixels.repeat(factor, axis=-3).repeat(factor, axis=-2)
    scale = longest / side
    return resize(pixels, (max(1, round(width * scale)), max(1, round(height * scale))), "box")


def difference(a: Pixels, b: Pixels, *, gain: float = 1.0) -> Pixels:
    """`gain` * |a - b| per colour channel of two RGB images `(..., H, W, 3)`, clipped: `(..., H, W, 3)` uint8."""
    distance = np.abs(a[..., :3].astype(np.float32) - b[..., :3].astype(np.float32))
    return np.rint(distance * gain).clip(0, 255).astype(np.uint8)

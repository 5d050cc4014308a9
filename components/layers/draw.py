"""Labelled grids and contact sheets as pixels. Pillow draws the text; everything else is numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from layerloop.components.layers.stack import Pixels, resize
from layerloop.components.schema.errors import LayerloopError

Colour = tuple[int, int, int]


# Pillow's own font has no glyphs for these.
_PLAIN = str.maketrans({"\u00a0": " ", "\u03b1": "alpha", "\u00d7": "x", "\u2212": "-"})


def _plain(text: str) -> str:
    return text.translate(_PLAIN)


def labelled_grid(
    cells: Sequence[Sequence[Pixels | None]],
    labels: Sequence[Sequence[str]] | None = None,
    *,
    columns: Sequence[str] = (),
    rows: Sequence[str] = (),
    text_size: int = 12,
    gap: int = 6,
    background: Colour = (255, 255, 255),
    foreground: Colour = (32, 33, 36),
) -> Pixels:
    """One picture `(H, W, 3)` uint8 of a grid of RGB cells (`None` leaves a place empty).

    Args:
        cells: Rows of `(h, w, 3)` uint8 pictures; sizes may differ, a cell is centred in its column.
        labels: A text under each cell, in the shape of `cells`; may have several lines; "" for none.
        columns: A heading over each column.
        rows: A heading left of each row.
        text_size: Height of the letters, pixels.
        gap: Space between cells, pixels.
        background: RGB of the page.
        foreground: RGB of the text.

    Raises:
        LayerloopError: no cells, or labels of another shape.
    """
    from PIL import Image, ImageDraw, ImageFont

    across = max((len(row) for row in cells), default=0)
    if not across:
        raise LayerloopError("the grid has no cells: give at least one picture")
    if labels is not None and [len(row) for row in labels] != [len(row) for row in cells]:
        raise LayerloopError("the grid's labels have another shape than its cells: give one text per cell")
    for heading, count, what in ((columns, across, "columns"), (rows, len(cells), "rows")):
        if heading and len(heading) != count:
            raise LayerloopError(f"the grid has {len(heading)} {what} headings for {count} {what}: give one each")

    font = ImageFont.load_default(size=text_size)
    labels = None if labels is None else [[_plain(text) for text in row] for row in labels]
    columns, rows = [_plain(text) for text in columns], [_plain(text) for text in rows]
    ruler = ImageDraw.Draw(Image.new("RGB", (1, 1)))

    def extent(text: str) -> tuple[int, int]:
        if not text:
            return 0, 0
        left, top, right, bottom = ruler.multiline_textbbox((0, 0), text, font=font, spacing=2)
        return int(np.ceil(right - left)), int(np.ceil(bottom - top)) + text_size // 2

    def text_of(row: int, column: int) -> str:
        return labels[row][column] if labels is not None and column < len(labels[row]) else ""

    def shape_of(row: int, column: int) -> tuple[int, int]:
        cell = cells[row][column] if column < len(cells[row]) else None
        return (0, 0) if cell is None else (cell.shape[0], cell.shape[1])

    indices = range(len(cells))
    widths = [
        max(
            [extent(columns[c])[0] if columns else 0]
            + [max(shape_of(r, c)[1], extent(text_of(r, c))[0]) for r in indices]
        )
        for c in range(across)
    ]
    heights = [max(shape_of(r, c)[0] for c in range(across)) for r in indices]
    captions = [max(extent(text_of(r, c))[1] for c in range(across)) for r in indices]
    left = max((extent(text)[0] for text in rows), default=0) + (2 * gap if rows else gap)
    top = max((extent(text)[1] for text in columns), default=0) + (2 * gap if columns else gap)

    width = left + sum(widths) + gap * across
    height = top + sum(heights) + sum(captions) + gap * len(cells)
    canvas = Image.new("RGB", (width, height), background)
    draw = ImageDraw.Draw(canvas)

    def write(x: float, y: float, text: str, anchor: str) -> None:
        if text:
            draw.multiline_text((x, y), text, fill=foreground, font=font, anchor=anchor, spacing=2, align="center")

    x_of = np.cumsum([left, *(w + gap for w in widths)])
    for column in range(across):
        write(float(x_of[column]) + widths[column] / 2, gap, columns[column] if columns else "", "ma")
    y = top
    for row in indices:
        write(left - gap, y + heights[row] / 2, rows[row] if rows else "", "rm")
        for column in range(across):
            cell = cells[row][column] if column < len(cells[row]) else None
            if cell is None:
                continue
            h, w = cell.shape[:2]
            x = int(x_of[column]) + (widths[column] - w) // 2
            canvas.paste(Image.fromarray(np.ascontiguousarray(cell[..., :3])), (x, y + (heights[row] - h) // 2))
            write(x + w / 2, y + heights[row] + 2, text_of(row, column), "ma")
        y += heights[row] + captions[row] + gap
    return np.asarray(canvas)


def fit(pixels: Pixels, longest: int) -> Pixels:
    """Images `(..., H, W, 3|4)` uint8 whose longest side is about `longest` pixels, for looking at.

    A small picture is enlarged by a whole factor, pixel by pixel, so that what is shown is what was made; a large one
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
    """`gain` * |a - b| per colour channel of two RGB pictures `(..., H, W, 3)`, clipped: `(..., H, W, 3)` uint8."""
    distance = np.abs(a[..., :3].astype(np.float32) - b[..., :3].astype(np.float32))
    return np.rint(distance * gain).clip(0, 255).astype(np.uint8)

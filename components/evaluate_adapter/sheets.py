"""Contact sheets: the choice of decompositions to show, as PNG sheets and as small tiles of the report."""

from __future__ import annotations

import base64
import functools
import io
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from layerloop.components.evaluate_adapter.assess import Row
from layerloop.components.evaluate_adapter.cases import Case, Kind
from layerloop.components.layers.draw import Cell, difference, fit, labelled_grid
from layerloop.components.layers.measure import measure_layers
from layerloop.components.layers.stack import Pixels, composite, on_backdrop, resize
from layerloop.components.schema.seeds import seed_for

REFERENCE = "Reference"  # the row of the true layers; its picture is the source
GAIN = 4  # of |difference| images: a difference of 64 levels is full
SHEET_SIDE = 128  # longest side of a cell in PNG sheets, pixels
TILE_SIDE = 160  # longest side of a tile in the report; smaller images are embedded as they are
RANKED_BY: dict[Kind, str] = {"designs": "layerd_cost_0", "pictures": "recomposition_error"}


@dataclass(frozen=True)
class Choice:
    """A case to show, and the reason."""

    case: Case
    why: str


@dataclass(frozen=True)
class Strip:
    """One decomposition of a case, as a row of a sheet."""

    model: str  # REFERENCE, "Base", "Adapter"
    stack: Pixels


def choose(cases: Sequence[Case], base: Sequence[Row], tuned: Sequence[Row], *, seed: int, count: int) -> list[Choice]:
    """At most `count` cases of one kind: the best, the median and the worst by difference, then a seeded random draw.

    Ranked by the difference adapter - base of LayerD's cost without edits (designs) or of the recomposition error
    (unlabelled images), where lower is better. Nothing is picked by eye.
    """
    column = RANKED_BY[cases[0].kind] if cases else ""
    ranked = sorted(
        (index for index in range(len(cases)) if base[index].get(column) is not None),
        key=lambda index: (tuned[index][column] - base[index][column], cases[index].name),
    )
    what = {"designs": "LayerD cost", "pictures": "recomposition error"}
    chosen: dict[int, str] = {}
    if len(ranked) >= 3:
        for label, index in (("best", ranked[0]), ("median", ranked[len(ranked) // 2]), ("worst", ranked[-1])):
            gap = tuned[index][column] - base[index][column]
            signed = f"{gap:+.3f}".replace("-", "−")
            chosen[index] = f"{label} by difference in {what[cases[index].kind]} ({signed})"
    rest = [index for index in range(len(cases)) if index not in chosen]
    random.Random(seed_for(seed, "evaluation", "shown")).shuffle(rest)
    for index in rest[: max(0, count - len(chosen))]:
        chosen[index] = "drawn at random"
    return [Choice(cases[index], why) for index, why in list(chosen.items())[:count]]


def strips_of(choice: Choice, stacks: Mapping[str, Pixels]) -> list[Strip]:
    """Rows of a sheet: the reference where there is one, then each model's."""
    truth = choice.case.truth
    reference = [] if truth is None else [Strip(REFERENCE, truth)]
    return [*reference, *(Strip(model, stack) for model, stack in stacks.items())]


def caption(layer: Mapping[str, float | bool]) -> tuple[str, list[str]]:
    """Text under a layer: its flags ("" for none), and lines of numbers, that break at commas alone."""
    flags = ", ".join(name for name in ("blank", "glazed", "duplicate", "idle") if layer[name])
    alpha = f"α {layer['mean_alpha']:.2f}"
    if layer["semi_transparent"] >= 0.005:
        alpha += f", semi {100 * layer['semi_transparent']:.0f} %"
    lines = (f"covers {100 * layer['coverage']:.0f} %", alpha)
    return flags, [line.replace(" ", "\u00a0").replace(",\u00a0", ", ") for line in lines]


def contact_sheet(choice: Choice, strips: Sequence[Strip]) -> Pixels:
    """A contact sheet `(H, W, 3)`: the source, and what each model's layers recompose to; layers on a checkerboard,
    layer 0 first; |difference|."""
    source = choice.case.source
    most = max(len(strip.stack) for strip in strips)
    rows = [] if strips[0].model == REFERENCE else [[Cell(fit(source, SHEET_SIDE)), *[Cell(None)] * (most + 1)]]
    for strip in strips:
        picture, gap = recomposed(strip, on_backdrop(composite(strip.stack), "checker"), source)
        row = [Cell(fit(source if picture is None else picture, SHEET_SIDE))]
        for layer, facts in zip(strip.stack, measure_layers(strip.stack, source), strict=True):
            flags, lines = caption(facts)
            shown = on_backdrop(fit(layer, SHEET_SIDE), "checker")
            row.append(Cell(shown, "\n".join([*lines, flags]).strip()))
        row += [Cell(None)] * (most - len(strip.stack))
        rows.append([*row, Cell(None if gap is None else fit(gap, SHEET_SIDE))])
    models = [*(["Source"] if len(rows) > len(strips) else []), *(strip.model for strip in strips)]
    return labelled_grid(rows, column_headings=headings(most), row_headings=models, text_size=11, gap=8)


def headings(layers: int) -> list[str]:
    """Headings of a sheet's columns."""
    upper = [f"layer {index}" for index in range(1, layers)]
    return ["recomposed", "layer 0, inpainted", *upper, f"|difference| ×{GAIN}"]


def without_layer(stack: Pixels, index: int) -> Pixels:
    """The recomposition `(H, W, 4)` of all layers but one: what is left when a user deletes it."""
    return composite(np.delete(stack, index, axis=0))


def recomposed(strip: Strip, recomposition: Pixels, source: Pixels) -> tuple[Pixels | None, Pixels | None]:
    """The recomposition and its difference from the source; the reference's own would only repeat the source."""
    if strip.model == REFERENCE:
        return None, None
    return recomposition, difference(on_backdrop(recomposition, "checker"), source, gain=GAIN)


def data_url(pixels: Pixels, longest: int = TILE_SIDE) -> str:
    """A picture `(H, W, 3|4)` as a data URL: small ones exactly, those of a longer side than `longest` reduced to it.
    WebP, or PNG without libwebp."""
    from PIL import Image

    height, width = pixels.shape[:2]
    small = max(height, width) <= TILE_SIDE
    if max(height, width) > longest:
        scale = longest / max(height, width)
        pixels = resize(pixels, (max(1, round(width * scale)), max(1, round(height * scale))), "box")
    image = Image.fromarray(pixels)
    buffer = io.BytesIO()
    if not _has_webp():
        image.save(buffer, "PNG", optimize=True)
        return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    image.save(buffer, "WEBP", lossless=small, quality=40 if small else 82, method=2 if small else 4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"


@functools.cache
def _has_webp() -> bool:
    from PIL import features

    return bool(features.check("webp"))

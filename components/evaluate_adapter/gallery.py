"""The report's gallery: rows of small images, whose backdrop the reader chooses without any script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from layerloop.components.evaluate_adapter.sheets import Choice, Strip, caption, data_url, headings, recomposed
from layerloop.components.layers.measure import measure_layers
from layerloop.components.layers.stack import Pixels, composite

SHOWN_SIDE = 128  # longest side of a tile on the page, CSS pixels


@dataclass(frozen=True)
class ShownCase:
    """A case in the gallery with its rows."""

    choice: Choice
    strips: tuple[Strip, ...]


def gallery(articles: Sequence[str]) -> str:
    """The articles under a choice of backdrops: radio buttons, since scripts do not run where reports are shown."""
    backdrops = {
        "checker": "checkerboard", "white": "white", "black": "black", "magenta": "magenta", "alpha": "alpha as grey",
    }  # fmt: skip
    inputs = "".join(
        f'<input class="backdrop" type="radio" name="backdrop" id="b-{name}"{" checked" if name == "checker" else ""}>'
        for name in backdrops
    )
    labels = "".join(f'<label for="b-{name}">{text}</label>' for name, text in backdrops.items())
    toolbar = f'<div class="toolbar"><span>Layers on</span>{labels}</div>'
    return f'{inputs}{toolbar}<div class="samples">{"".join(articles)}</div>'


def article(shown: ShownCase) -> str:
    """One case: reference, base and adapter as rows of tiles, with each layer's numbers under it."""
    case = shown.choice.case
    heads = headings(max(len(strip.stack) for strip in shown.strips))
    cells = ["<span></span>", *(f'<span class="head">{head}</span>' for head in heads)]
    for index, strip in enumerate(shown.strips):
        recomposition, gap = recomposed(strip, composite(strip.stack), case.source)
        cells.append(f'<span class="side {strip.model.lower()}">{escape(strip.model)}</span>')
        cells += [_tile(case.source if index == 0 else None), _tile(recomposition, "recomposition"), _tile(gap)]
        facts = measure_layers(strip.stack, case.source)
        for layer, numbers in zip(strip.stack, facts, strict=True):
            flags, lines = caption(numbers)
            flagged = f"<b>{escape(flags)}</b>" if flags else ""
            cells.append(_tile(layer, "layer", f"<p>{'<br>'.join([*lines, flagged])}</p>"))
        cells += ["<span></span>"] * (len(heads) - 3 - len(strip.stack))
    kind = {"designs": "Design", "pictures": "Image"}[case.kind]
    size = f"{case.layers} layers, {case.source.shape[1]} × {case.source.shape[0]} px"
    return (
        f'<article class="sample"><header><h3>{kind} {escape(case.key[:8])}</h3>'
        f'<span class="chip">{escape(shown.choice.why)}</span><span class="small">{size}</span></header>'
        f'<div class="sheet"><div class="grid" style="--columns:{len(heads)}">{"".join(cells)}</div></div></article>'
    )


def _tile(pixels: Pixels | None, kind: str = "", below: str = "") -> str:
    """A tile at an integer multiple of its size, or reduced; `below` is HTML under it."""
    if pixels is None:
        return "<span></span>"
    height, width = pixels.shape[:2]
    side = max(height, width)
    factor = SHOWN_SIDE // side if side <= SHOWN_SIDE else SHOWN_SIDE / side
    classes = " ".join(filter(None, (kind, "pixels" if side <= SHOWN_SIDE else "")))
    image = (
        f'<img class="{classes}" alt="" width="{round(width * factor)}" height="{round(height * factor)}" '
        f'src="{data_url(pixels)}">'
    )
    return f'<div class="cell"><div class="{"shade" if kind == "layer" else ""}">{image}</div>{below}</div>'

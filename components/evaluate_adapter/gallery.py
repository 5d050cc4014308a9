"""The gallery: rows of pictures, whose backdrop the reader chooses without any script, on the report's page as small
tiles and on a page of each case at full size, beside the layers as PNG files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources
from string import Template

from layerloop.components.evaluate_adapter.sheets import (
    REFERENCE,
    Choice,
    Strip,
    caption,
    data_url,
    headings,
    recomposed,
    without_layer,
)
from layerloop.components.layers.measure import measure_layers
from layerloop.components.layers.stack import Pixels, composite
from layerloop.components.storage.images import encode_png

SHOWN_SIDE = 128  # longest side of a tile on the page, CSS pixels
FIRST = 3  # cases that are seen without a click
FOLDER = "gallery"  # beside the report
_END = "</article>"


@dataclass(frozen=True)
class ShownCase:
    """A case in the gallery with its rows."""

    choice: Choice
    strips: tuple[Strip, ...]

    @property
    def folder(self) -> str:
        """Of its files, relative to the report."""
        return f"{FOLDER}/{self.choice.case.kind}-{self.choice.case.name}"


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
    first, rest = "".join(articles[:FIRST]), "".join(articles[FIRST:])
    if rest:
        rest = f"<details><summary>{len(articles) - FIRST} more</summary>{rest}</details>"
    return f'{inputs}{toolbar}<div class="samples">{first}{rest}</div>'


def article(shown: ShownCase, *, full: bool = False) -> str:
    """One case: reference, base and adapter as rows of tiles, with each layer's numbers under it. A tile leads to its
    file in the gallery. `full` is of the case's own page, beside these files."""
    case, source = shown.choice.case, shown.choice.case.source
    heads = headings(max(len(strip.stack) for strip in shown.strips))
    cells = ["<span></span>", *(f'<span class="head">{head}</span>' for head in heads)]
    folder = "" if full else f"{shown.folder}/"
    picture = _tile(source, f"Source, {case.title}", file=f"{folder}source.png", full=full)
    if shown.strips[0].model != REFERENCE:
        cells += ['<span class="side reference">Source</span>', picture, *["<span></span>"] * (len(heads) - 1)]
    for strip in shown.strips:
        recomposition, gap = recomposed(strip, composite(strip.stack), source)
        said = f"{strip.model}, {{}}, {case.title}"
        cells.append(f'<span class="side {strip.model.lower()}">{escape(strip.model)}</span>')
        if recomposition is None:
            cells.append(picture)
        else:
            cells.append(_tile(recomposition, said.format("recomposition"), "recomposition", full=full))
        facts = measure_layers(strip.stack, source)
        for at, (layer, numbers) in enumerate(zip(strip.stack, facts, strict=True)):
            flags, texts = caption(numbers)
            flagged = f"<b>{escape(flags)}</b>" if flags else ""
            below, file = f"<p>{'<br>'.join([*texts, flagged])}</p>", folder + _file_of(strip, at)
            cells.append(_tile(layer, said.format(f"layer {at}"), "layer", below=below, file=file, full=full))
        cells += ["<span></span>"] * (len(heads) - 2 - len(strip.stack))
        cells.append(_tile(gap, said.format("difference of recomposition and source"), full=full))
    size = f"{case.layers} layer{'s' * (case.layers != 1)}, {case.size[1]} × {case.size[0]} px"
    link = "" if full else f'<a href="{folder}index.html">full size</a>'
    return (
        f'<article class="sample"><header><h3>{escape(case.title)}</h3>'
        f'<span class="chip">{escape(shown.choice.why)}</span>'
        f'<span class="small">{size}, key {escape(case.key[:8])}</span>{link}</header>'
        f'<div class="sheet"><div class="grid" style="--columns:{len(heads)}">{"".join(cells)}</div></div>{_END}'
    )


def with_removed(article: str, removed: str) -> str:
    """The article with the views of `removed_views` at its end."""
    return f"{article.removesuffix(_END)}{removed}{_END}"


def removed_views(shown: ShownCase, *, full: bool = False) -> str:
    """What is left of the picture when one layer is deleted, for both models: whole objects in layers leave whole
    holes or backgrounds."""
    strips = [strip for strip in shown.strips if strip.model != REFERENCE]
    most = max(len(strip.stack) for strip in strips)
    cells = ["<span></span>", *(f'<span class="head">without layer {index}</span>' for index in range(most))]
    for strip in strips:
        cells.append(f'<span class="side {strip.model.lower()}">{escape(strip.model)}</span>')
        for index in range(most):
            left = without_layer(strip.stack, index) if index < len(strip.stack) > 1 else None
            said = f"{strip.model}, without layer {index}, {shown.choice.case.title}"
            cells.append(_tile(left, said, "recomposition", full=full))
    grid = f'<div class="sheet"><div class="grid" style="--columns:{most}">{"".join(cells)}</div></div>'
    return f"<details{' open' if full else ''}><summary>With one layer removed</summary>{grid}</details>"


def full_size(shown: ShownCase, *, campaign: str) -> Iterator[tuple[str, bytes]]:
    """Files of a case's folder in the gallery, by their names relative to the report: source and layers as PNGs, and a
    page that shows them at full size."""
    case = shown.choice.case
    yield f"{shown.folder}/source.png", encode_png(case.source)
    for strip in shown.strips:
        for index, layer in enumerate(strip.stack):
            yield f"{shown.folder}/{_file_of(strip, index)}", encode_png(layer)
    page = Template(resources.files(__package__).joinpath("case.html").read_text(encoding="utf-8")).substitute(
        title=escape(case.title),
        style=style(),
        campaign=escape(campaign),
        report="../../report.html",
        gallery=gallery([with_removed(article(shown, full=True), removed_views(shown, full=True))]),
    )
    yield f"{shown.folder}/index.html", page.encode()


def style() -> str:
    """The style sheet of all pages."""
    return resources.files(__package__).joinpath("style.css").read_text(encoding="utf-8")


def _file_of(strip: Strip, index: int) -> str:
    return f"{strip.model.lower()}-layer{index}.png"


def _tile(
    pixels: Pixels | None, said: str, kind: str = "", *, below: str = "", file: str = "", full: bool = False
) -> str:
    """A tile at an integer multiple of its size, or reduced; of a `full` page at its own size. `said` describes it,
    `below` is HTML under it, `file` what it leads to."""
    if pixels is None:
        return "<span></span>"
    height, width = pixels.shape[:2]
    side = max(height, width)
    factor: float = SHOWN_SIDE // side if side <= SHOWN_SIDE else 1 if full else SHOWN_SIDE / side
    classes = " ".join(filter(None, (kind, "pixels" if side <= SHOWN_SIDE else "")))
    source = file if full and file else data_url(pixels, side) if full else data_url(pixels)
    image = (
        f'<img class="{classes}" alt="{escape(said)}" width="{round(width * factor)}" '
        f'height="{round(height * factor)}" src="{escape(source)}">'
    )
    if file:
        image = f'<a href="{escape(file)}">{image}</a>'
    return f'<div class="cell"><div class="{"shade" if kind == "layer" else ""}">{image}</div>{below}</div>'

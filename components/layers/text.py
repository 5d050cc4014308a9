"""Text elements of Crello drawn from font files, as cr-renderer draws them (github.com/CyberAgentAILab/cr-renderer,
`text_utils.py`): lines by index, spans by colour, weight and slant, glyph by glyph without kerning.

Other than there: a family that is not among the files is not replaced by another, and Pillow draws, not Skia.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from layerloop.components.schema.errors import LayerloopError

Face = Callable[[bool, bool, float], ImageFont.FreeTypeFont]  # of (bold, italic, pixels an em)
Box = tuple[float, float, float, float]  # left, top, right, bottom

SUFFIXES = (".ttf", ".otf", ".ttc")
_STYLES = re.compile(r"\b(?:bold|regular|light|italic|medium|oblique)\b")
_MOST = 16_000  # pixels on a side of one text


@dataclass(frozen=True)
class Text:
    """What a Crello row says of a text element. `bold`, `italic`, `colours` and `lines` have a value for each character
    of `text`; `lines` is empty where all are on one line."""

    text: str
    width: float  # of its box, design pixels
    size: float  # design pixels an em
    line_height: float  # ems
    letter_spacing: float  # design pixels
    align: str  # left, center, right; anything else is left
    bold: Sequence[bool]
    italic: Sequence[bool]
    colours: Sequence[str]
    lines: Sequence[int]


@dataclass(frozen=True)
class _Glyph:
    """One character on its line: where it begins, in pixels of the drawing, and how it is drawn."""

    character: str
    left: float
    baseline: float
    font: ImageFont.FreeTypeFont
    colour: tuple[int, int, int, int]


def text_of(row: Mapping[str, Any], index: int) -> Text:
    """The text element `index` of a row in Crello v5's columns.

    Raises:
        LayerloopError: a colour that is none.
    """
    text = str(row["text"][index] or "")
    capitalised = bool(row["capitalize"][index])

    def values(column: str, otherwise: Any) -> list[Any]:
        given = list(row[column][index] or ())
        return given[: len(text)] + [given[-1] if given else otherwise] * (len(text) - len(given))

    return Text(
        text=text.upper() if capitalised and len(text.upper()) == len(text) else text,
        width=float(row["width"][index]),
        size=float(row["font_size"][index] or 0),
        line_height=float(row["line_height"][index] or 1.0),
        letter_spacing=float(row["letter_spacing"][index] or 0),
        align=str(row["text_align"][index] or "left"),
        bold=[bool(value) for value in values("font_bold", False)],
        italic=[bool(value) for value in values("font_italic", False)],
        colours=[str(value) for value in values("text_color", "rgb(0, 0, 0)")],
        lines=[int(value) for value in list(row["text_line"][index] or ())[: len(text)]],
    )


def draw_text(text: Text, face: Face, zoom: float) -> tuple[Image.Image, Box] | None:
    """A text as a straight RGBA image, `zoom` times the design's pixels, and the box that it covers, in design pixels
    from the element's top left corner; None where there is nothing to draw.

    Raises:
        LayerloopError: a colour that is none, or a text too large to draw.
    """
    glyphs = [glyph for line, indices in _lines(text) for glyph in _line(text, line, indices, face, zoom)]
    boxes = [
        (*_moved(glyph.font.getbbox(glyph.character, anchor="ls"), glyph.left, glyph.baseline),) for glyph in glyphs
    ]
    if not boxes:
        return None
    left, top = (int(np.floor(min(box[side] for box in boxes))) - 1 for side in (0, 1))
    right, bottom = (int(np.ceil(max(box[side] for box in boxes))) + 1 for side in (2, 3))
    width, height = right - left, bottom - top
    if max(width, height) > _MOST:
        raise LayerloopError(f"text {text.text[:20]!r} is {width} x {height} pixels: it is too large to draw")
    drawn = Image.new("RGBA", (width, height))
    for colour, spans in itertools.groupby(glyphs, key=lambda glyph: glyph.colour):
        mask = Image.new("L", (width, height))
        pen = ImageDraw.Draw(mask)
        for glyph in spans:
            pen.text((glyph.left - left, glyph.baseline - top), glyph.character, 255, glyph.font, anchor="ls")
        span = Image.new("RGBA", (width, height), (*colour[:3], 0))
        span.putalpha(mask.point([round(value * colour[3] / 255) for value in range(256)]))
        drawn = Image.alpha_composite(drawn, span)
    return drawn, (left / zoom, top / zoom, right / zoom, bottom / zoom)


def _moved(box: tuple[float, float, float, float], x: float, y: float) -> Box:
    return (box[0] + x, box[1] + y, box[2] + x, box[3] + y)


def _lines(text: Text) -> list[tuple[int, list[int]]]:
    """(number, indices of its characters) of each line: runs of one value, as cr-renderer takes them."""
    keys = text.lines if len(text.lines) == len(text.text) else [0] * len(text.text)
    runs = itertools.groupby(range(len(keys)), key=lambda index: keys[index])
    return [(number, list(indices)) for number, (_, indices) in enumerate(runs)]


def _line(text: Text, line: int, indices: list[int], face: Face, zoom: float) -> list[_Glyph]:
    """Glyphs of one line, aligned within the element's width."""
    glyphs: list[_Glyph] = []
    at = 0.0
    shown = [index for index in indices if text.text[index] != "\n"]
    for index in shown:
        font = face(text.bold[index], text.italic[index], max(1.0, int(text.size) * zoom))
        baseline = line * text.size * text.line_height * zoom + font.getmetrics()[0]
        glyphs.append(_Glyph(text.text[index], at, baseline, font, _rgba(text.colours[index])))
        at += font.getlength(text.text[index]) + text.letter_spacing * zoom
    room = text.width * zoom - (at - text.letter_spacing * zoom if shown else 0.0)
    offset = {"center": room / 2, "right": room}.get(text.align, 0.0)
    return [_Glyph(g.character, g.left + offset, g.baseline, g.font, g.colour) for g in glyphs]


def _rgba(colour: str) -> tuple[int, int, int, int]:
    """8-bit RGBA of `rgba(255, 0, 0, 0.5)`, `rgb(255, 0, 0)`, `#f00` or a name."""
    match = re.fullmatch(r"rgba\((.+),\s*([\d.]+)\s*\)", colour.strip())
    try:
        if match:
            red, green, blue = (round(float(part)) for part in match[1].split(","))
            return (red, green, blue, round(255 * min(1.0, float(match[2]))))
        solid = ImageColor.getcolor(colour.strip(), "RGBA")
    except ValueError:
        raise LayerloopError(f"text_color is {colour!r}, which is no colour: give rgba(r, g, b, a)") from None
    assert isinstance(solid, tuple)
    red, green, blue, *rest = solid
    return (red, green, blue, rest[0] if rest else 255)


class FontFiles:
    """The font files of a folder, all the way down, by the family and style that they name themselves."""

    def __init__(self, folder: Path) -> None:
        self._files: dict[str, dict[tuple[bool, bool], Path]] = {}
        for path in sorted(folder.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                self._add(path)
        if not self._files:
            raise LayerloopError(f"fonts {folder} has no font files: give a folder of {', '.join(SUFFIXES)}")

    def _add(self, path: Path) -> None:
        try:
            family, style = ImageFont.truetype(path, 16).getname()
        except OSError as error:
            raise LayerloopError(f"font {path} cannot be read ({error}): take it out of the folder") from None
        words = (style or "").lower()
        if re.search(r"light|thin|medium|semi|extra|black|condensed", words):
            return  # Crello knows regular and bold
        key = ("bold" in words, "italic" in words or "oblique" in words)
        self._files.setdefault(_family(family or path.stem), {}).setdefault(key, path)

    def face(self, name: str) -> Face | None:
        """The fonts of a family as Crello names it, its regular one where a style is missing."""
        files = self._files.get(_family(name))
        if not files:
            return None
        whole_bold = "bold" in name.lower().replace("_", " ").split()

        def of(bold: bool, italic: bool, pixels: float) -> ImageFont.FreeTypeFont:
            wanted = (bold or whole_bold, italic)
            path = files.get(wanted) or files.get((False, False)) or files[min(files)]
            return _loaded(path, pixels)

        return of


def _family(name: str) -> str:
    """A family's name for comparison: `Open_Sans Bold` and `open sans` are one."""
    return " ".join(_STYLES.sub(" ", name.lower().replace("_", " ").replace("-", " ")).split())


@functools.lru_cache(maxsize=256)
def _loaded(path: Path, pixels: float) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(path, pixels, layout_engine=ImageFont.Layout.BASIC)

"""A PowerPoint file with one slide, on which every layer is a picture that can be moved."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from layerloop.components.schema.errors import LayerloopError
from layerloop.components.storage.images import encode_png

Pixels = npt.NDArray[np.uint8]
Box = tuple[int, int, int, int]

INCH = 914_400  # English metric units
LONGEST, SHORTEST, LARGEST = 13.333, 1.0, 56.0  # inches: of a usual wide slide, and PowerPoint's bounds of a side


def write_pptx(stack: Pixels, names: Sequence[str], boxes: Sequence[Box | None]) -> bytes:
    """A presentation of the layers `(L, H, W, 4)`, bottom first, each cropped to its box (left, top, right, bottom);
    those without one are left out. Equal layers give equal bytes.

    Raises:
        LayerloopError: python-pptx is not installed.
    """
    try:
        from pptx import Presentation
    except ImportError:
        raise LayerloopError(
            "format pptx needs python-pptx, which is not here: pip install 'layerloop[decompose]', or leave it out"
        ) from None
    height, width = stack.shape[1:3]
    scale = LONGEST / max(width, height) * INCH  # English metric units per pixel
    scale = min(max(scale, SHORTEST * INCH / min(width, height)), LARGEST * INCH / max(width, height))
    deck = Presentation()
    deck.slide_width, deck.slide_height = (max(round(side * scale), round(SHORTEST * INCH)) for side in (width, height))
    slide = deck.slides.add_slide(deck.slide_layouts[6])  # the blank layout of python-pptx's template
    for layer, name, box in zip(stack, names, boxes, strict=True):
        if box is None:
            continue
        left, top, right, bottom = box
        shape = slide.shapes.add_picture(
            io.BytesIO(encode_png(layer[top:bottom, left:right])),
            *(round(side * scale) for side in (left, top, right - left, bottom - top)),
        )
        shape.name = name
        shape._element.nvPicPr.cNvPr.set("descr", name)  # else the name of a file that nobody knows
    buffer = io.BytesIO()
    deck.save(buffer)
    return _without_dates(buffer.getvalue())


def _without_dates(data: bytes) -> bytes:
    """The zip with the same members and one date for all, instead of the time of writing."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as source, zipfile.ZipFile(out, "w") as target:
        for member in source.infolist():
            kept = zipfile.ZipInfo(member.filename, date_time=(1980, 1, 1, 0, 0, 0))
            packed = zipfile.ZIP_STORED if member.filename.endswith(".png") else zipfile.ZIP_DEFLATED
            target.writestr(kept, source.read(member), compress_type=packed)
    return out.getvalue()

"""Designs in the column layout of Crello v5: rows made of generated designs, their parquet files, and the renderer.

Crello is cyberagent/crello on the Hugging Face hub. Only numpy and Pillow are needed; pyarrow for parquet.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from layerloop.components.layers.designs import draw_sketch
from layerloop.components.layers.paint import paint
from layerloop.components.layers.sketch import Element, Sketch

Design = dict[str, Any]  # a row

# Types of v5 by shape; anything else here is an SvgElement, or an ImageElement if it is a photograph.
ELEMENT_TYPES = {"plane": "ColoredBackground"}

# Columns of Crello v5 that say something about an element's text: present, so that one reader serves both, and empty.
TEXT_COLUMNS = {
    "text": "",
    "font": "",
    "font_size": 0.0,
    "line_height": 1.0,
    "letter_spacing": 0.0,
    "text_align": "",
    "capitalize": False,
    "font_bold": [],
    "font_italic": [],
    "text_color": [],
    "text_line": [],
}


def generate_design(
    rng: np.random.Generator, *, canvas: tuple[int, int] = (320, 320), layers: int, photo_share: float = 0.15
) -> Design:
    """One design as a row in Crello v5's columns, its elements painted as PNG (straight RGBA, unrotated, bottom first).

    `canvas` is (width, height) in pixels; `layers` counts the background. The same `rng` state gives the same row, byte
    for byte. Raises ValueError for `layers` under 1 or sides under 16.
    """
    return design_of(
        draw_sketch(rng, canvas=canvas, layers=layers, photo_share=photo_share), f"{rng.integers(2**63):016x}"
    )


def design_of(sketch: Sketch, name: str) -> Design:
    """A sketch as a row: `name` becomes its id."""
    elements = sketch.elements
    design: Design = {
        "id": name,
        "length": len(elements),
        "group": "generated",
        "format": "generated",
        "category": "generated",
        "title": f"{len(elements) - 1} shapes: {', '.join(element.shape for element in elements[1:])}",
        "canvas_width": sketch.width,
        "canvas_height": sketch.height,
        "type": [_element_type(element) for element in elements],
        "left": [float(element.left) for element in elements],
        "top": [float(element.top) for element in elements],
        "width": [float(element.width) for element in elements],
        "height": [float(element.height) for element in elements],
        "angle": [float(element.angle) for element in elements],
        "opacity": [float(element.opacity) for element in elements],
        "color": [[] for _ in elements],
        "image": [_encode_png(_paint_alone(element)) for element in elements],
    }
    for column, empty in TEXT_COLUMNS.items():
        design[column] = [list(empty) if isinstance(empty, list) else empty for _ in elements]
    return design


def _element_type(element: Element) -> str:
    if element.fill.kind == "photo":
        return "ImageElement"
    return ELEMENT_TYPES.get(element.shape, "SvgElement")


def _paint_alone(element: Element) -> np.ndarray:
    """An element on a canvas of its own, unrotated and opaque: (h, w, 4) uint8, of about its size in design pixels."""
    width, height = max(1, round(element.width)), max(1, round(element.height))
    own = replace(element, left=0.0, top=0.0, angle=0.0, opacity=1.0)
    columns = ((np.arange(width, dtype=np.float32) + 0.5) * (element.width / width) - element.width / 2)[None, :]
    rows = ((np.arange(height, dtype=np.float32) + 0.5) * (element.height / height) - element.height / 2)[:, None]
    return np.rint(paint(own, columns, rows, 1.0) * 255).astype(np.uint8)


def _encode_png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels, "RGBA" if pixels.shape[-1] == 4 else "RGB").save(out, "PNG")
    return out.getvalue()


def write_designs_parquet(path: str | Path, designs: Iterable[Design]) -> None:
    """Write rows in Crello's schema: an image is a struct of `bytes` and `path`, as the datasets library stores it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, numbers, lists = pa.list_(pa.string()), pa.list_(pa.float32()), pa.list_(pa.list_(pa.string()))
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    flags = pa.list_(pa.list_(pa.bool_()))
    schema = pa.schema(
        [(name, pa.string()) for name in ("id", "group", "format", "category", "title")]
        + [(name, pa.int64()) for name in ("length", "canvas_width", "canvas_height")]
        + [("type", text)]
        + [(name, pa.list_(pa.float64())) for name in ("left", "top", "width", "height", "angle", "opacity")]
        + [("color", lists), ("image", pa.list_(image))]
        + [(name, text) for name in ("text", "font", "text_align")]
        + [(name, numbers) for name in ("font_size", "line_height", "letter_spacing")]
        + [("capitalize", pa.list_(pa.bool_())), ("font_bold", flags), ("font_italic", flags)]
        + [("text_color", lists), ("text_line", pa.list_(pa.list_(pa.int64())))]
    )
    rows = [
        {**design, "image": [{"bytes": _image_bytes(i), "path": None} for i in design["image"]]} for design in designs
    ]
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)


NEEDED_COLUMNS = (
    "id", "length", "canvas_width", "canvas_height", "left", "top", "width", "height", "angle", "opacity", "image",
)  # fmt: skip


def _image_bytes(image: Any) -> bytes | None:
    """The bytes of an image cell: bytes, the datasets library's struct, or nothing."""
    if isinstance(image, Mapping):
        image = image.get("bytes")
    return bytes(image) if image else None


def _decode(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as opened:
        return opened.convert("RGBA")


def render_design(
    design: Design,
    *,
    longest_side: int | None = None,
    size: tuple[int, int] | None = None,
    decode: Callable[[bytes], Image.Image] = _decode,
) -> np.ndarray:
    """The layers of a row in Crello v5's columns: (L, H, W, 4) uint8, straight RGBA, bottom first, 0 where transparent.

    As LayerD renders ground truth: for every element a transparent canvas, translated to (left, top), rotated by
    `angle` degrees clockwise about the element's centre, its image stretched over (width, height), anti-aliased, at
    `opacity`. Give `longest_side` in pixels, or `size` as (width, height), or neither for the design's own canvas.
    `decode` makes an RGBA image of an element's bytes, where they are not our own.

    Raises ValueError naming the element where it has no image (a real Crello text element has a font instead).
    """
    canvas = (float(design["canvas_width"]), float(design["canvas_height"]))
    if size is None:
        scale = 1.0 if longest_side is None else longest_side / max(canvas)
        size = (max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale)))
    elif longest_side is not None:
        raise ValueError("give longest_side or size, not both")
    out = np.zeros((int(design["length"]), size[1], size[0], 4), np.uint8)
    for index in range(len(out)):
        encoded = _image_bytes(design["image"][index])
        if encoded is None:
            kind = design["type"][index] if "type" in design else "element"
            raise ValueError(f"element {index} ({kind}) of design {design['id']} has no image: it cannot be rendered")
        image = decode(encoded)
        box = tuple(float(design[name][index]) for name in ("left", "top", "width", "height"))
        if box[2] > 0 and box[3] > 0:
            out[index] = _place_element(image, box, float(design["angle"][index]), canvas, size)
            out[index, ..., 3] = np.rint(out[index, ..., 3] * min(1.0, max(0.0, float(design["opacity"][index]))))
    return out


def _place_element(
    image: Image.Image,
    box: tuple[float, ...],
    angle: float,
    canvas: tuple[float, float],
    size: tuple[int, int],
    finer: int = 2,
) -> np.ndarray:
    """One element on a transparent canvas of `size`, sampled `finer` times finer than that and averaged."""
    left, top, width, height = box
    scale_x, scale_y = size[0] * finer / canvas[0], size[1] * finer / canvas[1]
    # 1. the element at about the size it will have, where an averaging filter does what bilinear sampling cannot
    most = 4 * finer * max(size)
    stretch = (scale_x, scale_y) if angle % 180 == 0 else (math.sqrt(scale_x * scale_y),) * 2
    own = (min(most, max(1, round(width * stretch[0]))), min(most, max(1, round(height * stretch[1]))))
    pixels = image.convert("RGBa").resize(
        own, Image.Resampling.BOX if min(own) >= 2 * max(image.size) else Image.Resampling.LANCZOS
    )
    padded = Image.new("RGBa", (own[0] + 4, own[1] + 4))  # a clear margin, so that the edges are sampled too
    padded.paste(pixels, (2, 2))
    # 2. from a pixel of the fine canvas back to a pixel of that element
    turn = math.radians(angle)
    cos, sin = math.cos(turn), math.sin(turn)
    to_own_x, to_own_y = own[0] / width, own[1] / height
    centre_x, centre_y = left + width / 2, top + height / 2
    a, b = cos / scale_x * to_own_x, sin / scale_y * to_own_x
    d, e = -sin / scale_x * to_own_y, cos / scale_y * to_own_y
    c = (-cos * centre_x - sin * centre_y + width / 2) * to_own_x + 2
    f = (sin * centre_x - cos * centre_y + height / 2) * to_own_y + 2
    fine = (size[0] * finer, size[1] * finer)
    placed = padded.transform(fine, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
    return np.asarray(placed.reduce(finer).convert("RGBA"))

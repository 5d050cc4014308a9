"""Designs in the column layout of Crello v5: rows made of generated designs, their parquet files, and the renderer.

Crello is cyberagent/crello on the Hugging Face hub. Only numpy and Pillow are needed; pyarrow for parquet. What of the
rendered elements is ground truth says truth.py.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
from PIL import Image, ImageFont

from layerloop.components.layers.designs import draw_sketch
from layerloop.components.layers.paint import paint
from layerloop.components.layers.sketch import Element, Sketch
from layerloop.components.layers.stack import straight
from layerloop.components.layers.text import FontFiles, Text, draw_text, text_of
from layerloop.components.schema.errors import LayerloopError

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
    rng: np.random.Generator,
    *,
    canvas: tuple[int, int] = (320, 320),
    layers: int,
    photo_share: float = 0.15,
    every_kind: bool = False,
) -> Design:
    """One design as a row in Crello v5's columns, its elements painted as PNG (straight RGBA, unrotated, bottom first).

    `canvas` is (width, height) in pixels; `layers` counts the background. With `every_kind` five more elements stand
    among them, which Crello's rows have and sketches have not: see `_with_every_kind`. The same `rng` state gives the
    same row, byte for byte. Raises ValueError for `layers` under 1 or sides under 16.
    """
    sketch = draw_sketch(rng, canvas=canvas, layers=layers, photo_share=photo_share)
    design = design_of(sketch, f"{rng.integers(2**63):016x}")
    return _with_every_kind(design, rng) if every_kind else design


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


def _with_every_kind(design: Design, rng: np.random.Generator) -> Design:
    """The design with five more elements: right over the background an opaque picture that covers the canvas and so
    hides it; on top a turned bar, a card of opacity 0.5, a shadow whose image is nowhere opaque, and a text with its
    preview, half as transparent as its opacity and its colour say together."""
    width, height = float(design["canvas_width"]), float(design["canvas_height"])
    colour = [int(value) for value in rng.integers(40, 216, 3)]
    ramp = np.empty((48, 64, 3), np.uint8)
    ramp[:] = (np.array(colour) + np.linspace(-40, 39, 64)[:, None]).astype(np.uint8)
    bar, card = np.full((6, 40, 4), 255, np.uint8), np.full((20, 30, 4), 255, np.uint8)
    bar[..., :3], card[..., :3] = rng.integers(0, 256, 3), rng.integers(0, 256, 3)
    shadow = np.zeros((32, 32, 4), np.uint8)
    shadow[4:-4, 4:-4, 3] = 110
    elements = [
        ("ImageElement", (0.0, 0.0, width, height), 0.0, 1.0, ramp, 1),
        ("SvgElement", (0.1 * width, 0.15 * height, 0.4 * width, 0.06 * height), 25.0, 1.0, bar, None),
        ("SvgElement", (0.6 * width, 0.1 * height, 0.3 * width, 0.2 * height), 0.0, 0.5, card, None),
        ("ImageElement", (0.1 * width, 0.5 * height, 0.3 * width, 0.3 * height), 0.0, 1.0, shadow, None),
    ]
    made = {name: list(value) if isinstance(value, list) else value for name, value in design.items()}
    for kind, box, angle, opacity, pixels, index in elements:
        _insert(made, index, kind, box, angle, opacity, _encode_png(pixels))
    box = (0.45 * width, 0.62 * height, 0.5 * width, 0.14 * height)
    text = Text(
        "Big sale", box[2], 0.12 * height, 1.0, 0.0, "center", [False] * 8, [False] * 8, ["rgba(20,20,20,0.5)"] * 8, []
    )
    preview = Image.new("RGBA", (360, max(1, round(360 * box[3] / box[2]))))
    drawn = draw_text(text, lambda bold, italic, pixels: cast(Any, ImageFont.load_default(pixels)), 360 / box[2])
    assert drawn is not None
    preview.paste(drawn[0], (round(drawn[1][0] * 360 / box[2]), round(drawn[1][1] * 360 / box[2])))
    _insert(made, None, "TextElement", box, 0.0, 0.5, _encode_png(np.asarray(preview)))
    of_text = {
        "text": text.text, "font": "Montserrat", "font_size": text.size, "text_align": text.align,
        "font_bold": list(text.bold), "font_italic": list(text.italic), "text_color": list(text.colours),
        "text_line": [0] * 8,
    }  # fmt: skip
    for name, value in of_text.items():
        made[name][-1] = value
    return made


def _insert(
    design: Design, index: int | None, kind: str, box: tuple[float, ...], angle: float, opacity: float, image: bytes
) -> None:
    """Put an element into a row, in every column; on top where `index` is None."""
    at = int(design["length"]) if index is None else index
    values: dict[str, Any] = {"type": kind, "angle": angle, "opacity": opacity, "color": [], "image": image}
    values |= dict(zip(("left", "top", "width", "height"), box, strict=True))
    values |= {name: list(empty) if isinstance(empty, list) else empty for name, empty in TEXT_COLUMNS.items()}
    for name, value in values.items():
        design[name].insert(at, value)
    design["length"] += 1


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


_NUMBERS = ("left", "top", "width", "height", "angle", "opacity")  # columns with a number for each element
NEEDED_COLUMNS = ("id", "length", "canvas_width", "canvas_height", *_NUMBERS, "image")
REVISION = "5.1.0"  # of cyberagent/crello; what LayerD takes


@dataclass(frozen=True)
class Rendered:
    """One element on the canvas: (H, W, 4) uint8, straight RGBA, 0 where transparent; whether its own image is nowhere
    opaque; and for a text what it was drawn from."""

    layer: np.ndarray
    transparent: bool
    text: Literal["", "preview", "fonts"]


def _image_bytes(image: Any) -> bytes | None:
    """The bytes of an image cell: bytes, the datasets library's struct, or nothing."""
    if isinstance(image, Mapping):
        image = image.get("bytes")
    return bytes(image) if image else None


def _decode(encoded: bytes) -> Image.Image:
    with Image.open(io.BytesIO(encoded)) as opened:
        return opened.convert("RGBA")


def class_labels(metadata: Mapping[bytes, bytes] | None) -> dict[str, list[str]]:
    """Names of the classes by column, of a parquet schema's metadata as the datasets library writes it: such a column
    holds indices."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, ValueError, TypeError):
        return {}
    inner = {name: value.get("feature", value) for name, value in features.items() if isinstance(value, dict)}
    return {
        name: list(f["names"]) for name, f in inner.items() if isinstance(f, dict) and f.get("_type") == "ClassLabel"
    }


def with_labels(row: Design, labels: Mapping[str, Sequence[str]]) -> Design:
    """The row with class indices replaced by their names."""

    def named(value: Any, names: Sequence[str]) -> Any:
        if isinstance(value, list):
            return [named(item, names) for item in value]
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else value

    return {name: named(value, labels[name]) if name in labels else value for name, value in row.items()}


def check_row(design: Design) -> None:
    """Refuse a row that cannot be rendered.

    Raises:
        LayerloopError: naming the column, and the element, that is null, of another length, or no number.
    """
    for name in ("length", "canvas_width", "canvas_height"):
        if not _is_number(design.get(name)) or float(design[name]) < 1:
            raise LayerloopError(f"column {name} is {_shown(design.get(name))}: give a number of 1 or more")
    count = int(design["length"])
    for name in (*_NUMBERS, "image"):
        values = design.get(name)
        if not isinstance(values, Sequence) or len(values) < count:
            found = _shown(values) if not isinstance(values, Sequence) else f"a list of {len(values)}"
            raise LayerloopError(f"column {name} is {found}, but length is {count}: give a value for each element")
    for name in _NUMBERS:
        for index, value in enumerate(design[name][:count]):
            if not _is_number(value):
                raise LayerloopError(f"column {name} is {_shown(value)} for element {index}: give a number")


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _shown(value: object) -> str:
    return "null" if value is None else repr(value)[:40]


def render_design(
    design: Design, *, longest_side: int | None = None, size: tuple[int, int] | None = None
) -> np.ndarray:
    """The elements of a row in Crello v5's columns, made by us, as layers: (L, H, W, 4) uint8, straight RGBA, bottom
    first, 0 where transparent.

    Give `longest_side` in pixels, or `size` as (width, height), or neither for the design's own canvas.

    Raises:
        LayerloopError: as `render_elements`.
    """
    check_row(design)
    canvas = (float(design["canvas_width"]), float(design["canvas_height"]))
    if size is None:
        scale = 1.0 if longest_side is None else longest_side / max(canvas)
        size = (max(1, round(canvas[0] * scale)), max(1, round(canvas[1] * scale)))
    elif longest_side is not None:
        raise ValueError("give longest_side or size, not both")
    return np.stack([element.layer for element in render_elements(design, size=size)])


def render_elements(
    design: Design,
    *,
    size: tuple[int, int],
    decode: Callable[[bytes], Image.Image] = _decode,
    fonts: FontFiles | None = None,
) -> Iterator[Rendered]:
    """The elements of a row in Crello v5's columns one by one, on a canvas of `size` = (width, height).

    As LayerD renders ground truth (src/layerd/data/renderer.py): for every element a transparent canvas, translated to
    (left, top), rotated by `angle` degrees clockwise about the element's centre, its image stretched over (width,
    height), anti-aliased, at `opacity`. A text's opacity is that of its colour. It is drawn from `fonts` where they
    have its family, else it is its image, a preview.

    Args:
        decode: makes an RGBA image of an element's bytes, where they are not our own.

    Raises:
        LayerloopError: as `check_row`, or naming the element that has no image.
    """
    check_row(design)
    canvas = (float(design["canvas_width"]), float(design["canvas_height"]))
    for index in range(int(design["length"])):
        is_text = _is_text(design, index)
        encoded = _image_bytes(design["image"][index])
        box = tuple(float(design[name][index]) for name in ("left", "top", "width", "height"))
        drawn = _drawn_text(design, index, box, canvas, size, fonts) if is_text and fonts else None
        if drawn is None and encoded is None:
            raise LayerloopError(
                f"element {index} ({_kind(design, index)}) of design {design['id']} has no image: it cannot be rendered"
            )
        try:
            image, box = drawn or (decode(encoded or b""), box)
        except LayerloopError as error:
            raise LayerloopError(f"element {index} ({_kind(design, index)}): {error}") from None
        layer = np.zeros((size[1], size[0], 4), np.uint8)
        if box[2] > 0 and box[3] > 0:
            layer = _place_element(image, box, float(design["angle"][index]), canvas, size)
        if not is_text:
            layer[..., 3] = np.rint(layer[..., 3] * min(1.0, max(0.0, float(design["opacity"][index]))))
        source: Literal["", "preview", "fonts"] = "" if not is_text else "preview" if drawn is None else "fonts"
        yield Rendered(layer, int(np.asarray(image.getchannel("A")).max(initial=0)) < 255, source)


def _kind(design: Design, index: int) -> str:
    return str(design["type"][index]) if design.get("type") is not None else "element"


def _is_text(design: Design, index: int) -> bool:
    """Whether an element is a text: by its type, or by having words where types are numbers without names."""
    if isinstance(kind := design["type"][index] if design.get("type") is not None else None, str):
        return kind.lower() == "textelement"
    return bool(design.get("text") is not None and design["text"][index])


def _drawn_text(
    design: Design,
    index: int,
    box: tuple[float, ...],
    canvas: tuple[float, float],
    size: tuple[int, int],
    fonts: FontFiles,
) -> tuple[Image.Image, tuple[float, ...]] | None:
    """A text element drawn from font files, on a box about the same centre; None where the files lack its family."""
    face = fonts.face(str(design["font"][index]))
    if face is None:
        return None
    zoom = 2 * math.sqrt(size[0] * size[1] / (canvas[0] * canvas[1]))
    drawn = draw_text(text_of(design, index), face, zoom)
    if drawn is None:
        return Image.new("RGBA", (1, 1)), box
    image, (left, top, right, bottom) = drawn
    half = (max(box[2] / 2 - left, right - box[2] / 2), max(box[3] / 2 - top, bottom - box[3] / 2))
    whole = Image.new("RGBA", (max(1, round(2 * half[0] * zoom)), max(1, round(2 * half[1] * zoom))))
    whole.paste(image, (round((left - box[2] / 2 + half[0]) * zoom), round((top - box[3] / 2 + half[1]) * zoom)))
    centre = (box[0] + box[2] / 2, box[1] + box[3] / 2)
    return whole, (centre[0] - half[0], centre[1] - half[1], whole.width / zoom, whole.height / zoom)


def _place_element(
    image: Image.Image,
    box: tuple[float, ...],
    angle: float,
    canvas: tuple[float, float],
    size: tuple[int, int],
    finer: int = 2,
) -> np.ndarray:
    """One element on a transparent canvas of `size`, sampled `finer` times finer than that and averaged. It is
    premultiplied and resampled in float32, plane by plane, and divided by alpha before anything is clipped, so that one
    flat colour stays that colour (`stack.straight`)."""
    left, top, width, height = box
    scale_x, scale_y = size[0] * finer / canvas[0], size[1] * finer / canvas[1]
    # 1. the element at about the size it will have, where an averaging filter does what bilinear sampling cannot
    most = 4 * finer * max(size)
    stretch = (scale_x, scale_y) if angle % 180 == 0 else (math.sqrt(scale_x * scale_y),) * 2
    own = (min(most, max(1, round(width * stretch[0]))), min(most, max(1, round(height * stretch[1]))))
    method = Image.Resampling.BOX if min(own) >= 2 * max(image.size) else Image.Resampling.LANCZOS
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
    alpha = np.asarray(image.getchannel("A"), np.float32) / 255
    placed = np.empty((size[1], size[0], 4), np.float32)
    for index, channel in enumerate("RGBA"):
        plane = alpha if channel == "A" else np.asarray(image.getchannel(channel), np.float32) / 255 * alpha
        padded = Image.new("F", (own[0] + 4, own[1] + 4))  # a clear margin, so that the edges are sampled too
        padded.paste(Image.fromarray(plane).resize(own, method), (2, 2))
        drawn = padded.transform(fine, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)
        placed[..., index] = np.asarray(drawn.reduce(finer))
    return straight(placed)

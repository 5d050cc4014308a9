"""The page of one picture: its layers to switch, in one file that needs no other."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from string import Template
from typing import Any

from layerloop.components.layers.stack import Pixels, resize
from layerloop.components.schema.messages import counted

PREVIEW, THUMBNAIL = 1100, 132  # longest sides of pictures in the page, pixels
QUALITY = 90  # of WebP


@dataclass(frozen=True)
class Page:
    """What the page shows. `record` is that of `files.py`; `documents` are files beside the page."""

    title: str
    source: Pixels
    stack: Pixels
    record: Mapping[str, Any]
    documents: Sequence[str]


def render(page: Page) -> bytes:
    """The page as HTML. Pictures in it are reduced to 1100 pixels; the files beside it have all."""
    height, width = page.stack.shape[1:3]
    size = _within(width, height, PREVIEW)
    layers = [_smaller(layer, size) for layer in page.stack]
    template = Template(resources.files("layerloop.components.decompose").joinpath("page.html").read_text("utf-8"))
    record = page.record
    values = {
        "title": html.escape(page.title),
        "facts": html.escape(_facts(record)),
        "model": html.escape(record["model"]),
        "ratio": f"{width} / {height}",
        "wide": f"{max(0.2, width / height):.4f}",
        "source": _data_url(_smaller(page.source, size)),
        "images": "".join(
            f'<img class="layer" id="layer-{index}" alt="{html.escape(_name(record, index))}" src="{_data_url(layer)}">'
            for index, layer in enumerate(layers)
        ),
        "list": "".join(_row(record, index, layers[index]) for index in reversed(range(len(layers)))),
        "downloads": "".join(f'<a href="{html.escape(_quoted(name))}">{_kind(name)}</a>' for name in page.documents),
        "exact": html.escape(_exactness(record)),
    }
    return template.substitute(values).encode()


def _row(record: Mapping[str, Any], index: int, layer: Pixels) -> str:
    numbers = record["layers"][index]
    small = resize(layer, _within(layer.shape[1], layer.shape[0], THUMBNAIL))
    flags = [flag for flag in ("blank", "glazed", "duplicate") if numbers[flag]]
    box = numbers["box"]
    where = f"{box[2] - box[0]} × {box[3] - box[1]} at {box[0]}, {box[1]}" if box else "empty"
    name = html.escape(numbers["name"])
    file = f'<a href="{html.escape(numbers["file"])}" title="PNG at full size">PNG</a>' if "file" in numbers else ""
    return (
        f'<li data-layer="{index}"><label><input type="checkbox" checked aria-label="Show {name}">'
        f'<span class="thumb"><img alt="" src="{_data_url(small)}"></span></label>'
        f"<div><b>{name}</b>{''.join(f'<i>{flag}</i>' for flag in flags)}"
        f"<p>{where}<br>covers {100 * numbers['coverage']:.0f} %</p></div>"
        f'<span class="acts"><button type="button" data-solo="{index}">Only this</button>{file}</span></li>'
    )


def _facts(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    guidance = f", guidance {settings['guidance']:g}" if settings["guidance"] != 1 else ""
    layers = counted(len(record["layers"]), "layers")
    return (
        f"{record['width']} × {record['height']}, {layers}. {settings['sampler'].capitalize()}, "
        f"{settings['steps']} steps{guidance}, at {settings['resolution']} pixels, seed {settings['seed']}."
    )


def _exactness(record: Mapping[str, Any]) -> str:
    again, kept = record["recomposition"], record["kept"]
    most = again["largest_difference_levels"]
    close = f"to within {most} of 255 levels (mean {again['mean_difference_levels']:.3g})" if most else "exactly"
    return (
        f"All layers together are the picture {close}: where a layer is seen, it has the picture's own colours. The "
        f"model's own layers were {255 * kept['recomposition_error']:.1f} levels from it on average."
    )


def _name(record: Mapping[str, Any], index: int) -> str:
    return str(record["layers"][index]["name"])


def _kind(name: str) -> str:
    return html.escape({"psd": "Photoshop", "pptx": "PowerPoint", "zip": "ZIP of PNGs"}[name.rpartition(".")[2]])


def _quoted(name: str) -> str:
    from urllib.parse import quote

    return quote(name)


def _within(width: int, height: int, longest: int) -> tuple[int, int]:
    scale = min(1.0, longest / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def _smaller(image: Pixels, size: tuple[int, int]) -> Pixels:
    return image if (image.shape[1], image.shape[0]) == size else resize(image, size, "box")


def _data_url(image: Pixels) -> str:
    from PIL import Image, features

    kind = "WEBP" if features.check("webp") else "PNG"
    options: dict[str, Any] = {"quality": QUALITY, "method": 2} if kind == "WEBP" else {}
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

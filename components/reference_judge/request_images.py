"""The images of a request: labels and images as a VLM gets them, and the layers recovered from them.

Nothing but the request is used. A layer on two backdrops gives its colour and alpha almost exactly; on white alone,
alpha is inferred where the layer is topmost (from the recomposition, and from what lies below) and taken as opaque
elsewhere.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import string
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from layerloop.components.judge.grids import Layout, cells_of
from layerloop.components.judge.requests import GRID, LAYER, RECOMPOSITION, SOURCE
from layerloop.components.layers.stack import Pixels, backdrop_pixels
from layerloop.components.reference_judge.rules import Floats, RecoveredLayers

MAX_LAYERS = 64
MAX_PIXELS = 24_000_000  # of one image
MAX_TOTAL_PIXELS = 48_000_000  # of a request: its images are held decoded, and a few MB of PNG may have gigabytes
SIDE = 128  # longest side at which images are compared, as coarse as a VLM's patches

_ROW = re.compile(r"^candidate (\d+): (.+)$", re.MULTILINE)
_PAIR = re.compile(r"([a-z_0-9]+) ([0-9.]+)")


def _pattern(label: str, **fields: str) -> re.Pattern[str]:
    """Pattern of a label of `judge.requests` with its fields filled in; a field is a group of its name."""
    pieces: list[str] = []
    for text, name, _, _ in string.Formatter().parse(label):
        again = any(f"(?P<{name}>" in piece for piece in pieces)
        pieces += [re.escape(text), "" if name is None else f"(?P={name})" if again else f"(?P<{name}>{fields[name]})"]
    return re.compile("".join(pieces))


_BACKDROP = "white|black|checker"
_LAYER = _pattern(LAYER, index=r"\d+", count=r"\d+", place="[a-z]+", backdrop=_BACKDROP)
_GRID = _pattern(GRID, backdrop=_BACKDROP, rows=r"\d+", columns=r"\d+", names=".*")


class BadRequestError(Exception):
    """A client's error, in the OpenAI API's terms."""

    def __init__(self, message: str, *, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.message, self.param, self.status, self.code = message, param, status, code


@dataclass
class RequestImages:
    """The images of one request by their labels."""

    source: Pixels | None = None
    recomposition: Pixels | None = None
    layers: dict[str, dict[int, Pixels]] = field(default_factory=dict)  # backdrop -> index -> (h, w, 3)
    grids: dict[str, Pixels] = field(default_factory=dict)  # backdrop -> (rows, columns, h, w, 3)
    question: str = ""


def parse_images(messages: Any) -> RequestImages:
    """Labels and images of the user messages; an image belongs to the text before it.

    Raises:
        BadRequestError: content that is not text or an image as a data URL, or an image that cannot be decoded.
    """
    images = RequestImages()
    label = ""
    for part in _parts(messages):
        if isinstance(part, str):
            label = part.strip()
            images.question = part
            continue
        if label == SOURCE:
            images.source = part
        elif label == RECOMPOSITION:
            images.recomposition = part
        elif match := _LAYER.fullmatch(label):
            images.layers.setdefault(match["backdrop"], {})[int(match["index"])] = part
        elif match := _GRID.fullmatch(label):
            layout = Layout.of_image((part.shape[1], part.shape[0]), int(match["rows"]), int(match["columns"]))
            if layout is None:
                raise BadRequestError(
                    f"the grid of {part.shape[1]}x{part.shape[0]} pixels does not have {match['rows']} rows"
                )
            images.grids[match["backdrop"]] = cells_of(part, layout)
    return images


def recover_candidates(images: RequestImages) -> list[RecoveredLayers]:
    """The decompositions that are shown: one, or one per grid row.

    Raises:
        BadRequestError: no source, no layers, or images of different shapes.
    """
    if images.source is None:
        raise BadRequestError(f"no image is labelled {SOURCE!r}", param="messages")
    if images.grids:
        shown = {backdrop: cells[:, 1:] for backdrop, cells in images.grids.items()}
        first = next(iter(images.grids))
        recompositions = list(images.grids[first][:, 0])
        if len({cells.shape for cells in shown.values()}) != 1:
            raise BadRequestError("the grids have different shapes", param="messages")
        return [
            _recover(images.source, recompositions[row], {b: c[row] for b, c in shown.items()})
            for row in range(len(recompositions))
        ]
    if images.recomposition is None or not images.layers:
        raise BadRequestError("the recomposition is missing, or an image labelled 'Layer 0 ...'", param="messages")
    stacks = {}
    for backdrop, layers in images.layers.items():
        if len(layers) > MAX_LAYERS:
            raise BadRequestError(f"{len(layers)} layers are shown, over {MAX_LAYERS}", param="messages")
        if sorted(layers) != list(range(len(layers))) or len({p.shape for p in layers.values()}) != 1:
            raise BadRequestError(f"the layers on {backdrop} are not 0..L-1 of one size", param="messages")
        stacks[backdrop] = np.stack([layers[index] for index in sorted(layers)])
    if len({stack.shape for stack in stacks.values()}) != 1:
        raise BadRequestError("the layers on different backdrops differ in number or size", param="messages")
    return [_recover(images.source, images.recomposition, stacks)]


def phase1_scores(question: str) -> list[dict[str, float]]:
    """Phase-1 scores as listed in a phase-2 question, by row, 0..5."""
    found = {
        int(row): {name: float(value) for name, value in _PAIR.findall(rest)} for row, rest in _ROW.findall(question)
    }
    return [found[row] for row in sorted(found)]


def _parts(messages: Any) -> list[str | Pixels]:
    if not isinstance(messages, list) or not messages:
        raise BadRequestError("'messages' must be a non-empty list", param="messages")
    parts: list[str | Pixels] = []
    for index, message in enumerate(messages):
        where = f"messages.{index}"
        if not isinstance(message, dict) or message.get("role") not in ("system", "developer", "user", "assistant"):
            raise BadRequestError(f"'{where}' is not a message with a role", param=where)
        if message["role"] != "user":
            continue
        content = message.get("content")
        if isinstance(content, str):
            parts.append(content)
            continue
        if not isinstance(content, list):
            raise BadRequestError(f"'{where}.content' must be text or a list of parts", param=where)
        for at, part in enumerate(content):
            parts.append(_part(part, f"{where}.content.{at}", most=MAX_TOTAL_PIXELS - _pixels(parts)))
    return parts


def _pixels(parts: list[str | Pixels]) -> int:
    return sum(part.shape[0] * part.shape[1] for part in parts if not isinstance(part, str))


def _part(part: Any, where: str, *, most: int) -> str | Pixels:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    if isinstance(part, dict) and part.get("type") == "image_url" and isinstance(part.get("image_url"), dict):
        return decode_data_url(part["image_url"].get("url"), where, most=most)
    raise BadRequestError(f"'{where}' is neither a text nor an image_url part", param=where)


def decode_data_url(url: Any, where: str, *, most: int = MAX_PIXELS) -> Pixels:
    """RGB `(H, W, 3)` of a base64 data URL of a PNG, JPEG or WebP image, its size checked before it is decoded.
    `most` is what the request may still have in pixels.

    Raises:
        BadRequestError: another kind of URL (nothing is ever fetched), not base64, not an image, or too large.
    """
    from PIL import Image

    match = re.match(r"data:image/(png|jpeg|webp);base64,", url[:64]) if isinstance(url, str) else None
    if match is None:
        raise BadRequestError(f"'{where}': give the image as data:image/png;base64,...; no URL is fetched", param=where)
    try:
        data = base64.b64decode(url[match.end() :], validate=True)
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "WEBP")) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadRequestError(
                    f"'{where}' has {image.width}x{image.height} pixels, over {MAX_PIXELS}", param=where
                )
            if image.width * image.height > most:
                raise BadRequestError(f"the images of the request have over {MAX_TOTAL_PIXELS} pixels", param=where)
            return np.asarray(image.convert("RGB"))
    except (binascii.Error, OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise BadRequestError(f"'{where}' cannot be decoded as an image", param=where, code="invalid_image") from None


def _recover(source: Pixels, recomposition: Pixels, layers: dict[str, Pixels]) -> RecoveredLayers:
    """Colour and alpha of layers `(L, h, w, 3)` shown on each backdrop."""
    height, width = recomposition.shape[:2]
    if any(stack.shape[1:3] != (height, width) for stack in layers.values()):
        raise BadRequestError("the recomposition and the layers differ in size", param="messages")
    scale = min(1.0, SIDE / max(height, width))
    size = (max(2, round(width * scale)), max(2, round(height * scale)))
    checker = backdrop_pixels(height, width, "checker")
    behind = _reduced(checker[None], size)[0]
    seen_source, seen_recomposition = _reduced(source[None], size)[0], _reduced(recomposition[None], size)[0]
    shown = {backdrop: _reduced(stack, size) for backdrop, stack in layers.items()}
    if "white" in shown and "black" in shown:
        alpha = 1 - (shown["white"] - shown["black"]).mean(-1)
        colour = shown["black"]
    elif "checker" in shown and ("white" in shown or "black" in shown):
        flat, level = (shown["white"], 1.0) if "white" in shown else (shown["black"], 0.0)
        guess = _alpha_from_recomposition(flat, np.full_like(behind, level), seen_recomposition)
        alpha = _alpha_between(flat - shown["checker"], level - behind, guess)
        colour = flat - level * (1 - alpha[..., None])
    else:
        backdrop, flat = next(iter(shown.items()))
        level = behind if backdrop == "checker" else np.full_like(behind, 1.0 if backdrop == "white" else 0.0)
        alpha = _alpha_from_recomposition(flat, level, seen_recomposition)
        colour = flat - level * (1 - alpha[..., None])
    alpha = np.clip(alpha, 0, 1).astype(np.float32)
    return RecoveredLayers(
        seen_source, seen_recomposition, np.clip(colour, 0, alpha[..., None]).astype(np.float32), alpha
    )


def _reduced(pixels: Pixels, size: tuple[int, int]) -> Floats:
    """`(N, H, W, 3)` uint8 as float32 in [0, 1] at (width, height) `size`, by area."""
    if pixels.shape[2::-1][:2] == size:
        return np.asarray(pixels, np.float32) / np.float32(255)
    from PIL import Image

    reduced = [np.asarray(Image.fromarray(p).resize(size, Image.Resampling.BOX)) for p in np.ascontiguousarray(pixels)]
    return np.asarray(np.stack(reduced), np.float32) / np.float32(255)


def _alpha_between(difference: Floats, span: Floats, guess: Floats) -> Floats:
    """Alpha `(L, h, w)` from what two backdrops that differ by `span[h, w, 3]` show; `guess` where they do not differ.

    A checkerboard's grey is 51 levels from white, so one level of rounding is two percent of alpha: that much is cut
    off both ends of the scale.
    """
    known = np.abs(span).mean(-1) > 0.05
    through = difference.mean(-1) / np.where(known, span.mean(-1), 1)
    return np.asarray(np.where(known, np.clip((1 - through - 0.03) / 0.94, 0, 1), guess), np.float32)


def _alpha_from_recomposition(shown: Floats, level: Floats, recomposition: Floats) -> Floats:
    """Alpha `(L, h, w)` of layers shown on one backdrop only.

    The bottom layer counts as opaque. Where no higher layer has ink, the recomposition R says how much of what lies
    below (B) comes through: shown - R = (1 - a)(level - B), solved by least squares over the channels. Elsewhere a
    layer is opaque where it has ink.
    """
    ink = np.abs(shown - level).max(-1)
    marked = np.clip((ink - 0.02) / 0.04, 0, 1)
    alpha = np.ones_like(ink)
    below = shown[0]
    for index in range(1, len(shown)):
        higher = marked[index + 1 :].max(0) if index + 1 < len(shown) else np.zeros_like(ink[0])
        span = level - below
        power = (span**2).sum(-1)
        through = ((shown[index] - recomposition) * span).sum(-1) / np.maximum(power, 1e-6)
        solved = 1 - np.clip(through, 0, 1)
        sure = np.clip(power / 0.02, 0, 1) * (1 - higher)
        alpha[index] = sure * solved + (1 - sure) * marked[index]
        below = shown[index] - (1 - alpha[index][..., None]) * (level - below)
    return np.asarray(alpha, np.float32)

"""Layers as bytes that other programs open: Photoshop documents (psd.py) and a zip of PNGs."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Sequence

import numpy as np

from layerloop.components.layers.psd import layer_names, write_document
from layerloop.components.layers.stack import Pixels, check_stack, composite

__all__ = ["layer_names", "read_psd", "write_png_zip", "write_psd"]


def write_psd(
    stack: Pixels, names: Sequence[str] | None = None, *, groups: Sequence[str | None] | None = None
) -> bytes:
    """A Photoshop document of a stack `(L, H, W, 4)` in memory; `psd.save_psd` writes a file with less of it.

    Raises:
        LayerloopError: as `psd.save_psd`.
    """
    buffer = io.BytesIO()
    write_document(buffer, stack, names, groups=groups)
    return buffer.getvalue()


def read_psd(data: bytes) -> Pixels:
    """Layers `(L, H, W, 4)` uint8 of a document, each on the full canvas, bottom first, read by psd-tools; (0, 0, 0, 0)
    around them and where alpha is 0."""
    from psd_tools import PSDImage

    document = PSDImage.open(io.BytesIO(data))
    layers = [layer for layer in document.descendants() if not layer.is_group()]
    stack = np.zeros((len(layers), document.height, document.width, 4), np.uint8)
    for index, layer in enumerate(layers):
        image = layer.topil(apply_icc=False)  # the numbers that are in the file
        if image is not None:
            left, top, right, bottom = layer.bbox
            stack[index, top:bottom, left:right] = np.asarray(image.convert("RGBA"))
    stack[stack[..., 3] == 0] = 0
    return stack


def write_png_zip(stack: Pixels, names: Sequence[str] | None = None) -> bytes:
    """A zip of the layers as straight-alpha PNGs and of their composite, in equal bytes for equal stacks.

    Members: `0-background.png`, `1-layer-1.png`, ... and `composite.png`; of a name of its own the letters, digits and
    underscores of any script, up to 60, with dashes between them.
    """
    from PIL import Image

    check_stack(stack)
    names = list(names) if names is not None else layer_names(len(stack))
    images = {f"{index}-{_stem(name)}.png": layer for index, (name, layer) in enumerate(zip(names, stack, strict=True))}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, pixels in {**images, "composite.png": composite(stack)}.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), png.getvalue())
    return buffer.getvalue()


def _stem(name: str) -> str:
    return re.sub(r"\W+", "-", name.lower())[:60].strip("-") or "layer"

"""Layers as files that other programs open: Photoshop documents and a zip of PNGs."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Sequence

import numpy as np

from layerloop.components.layers.stack import Pixels, check_stack, composite
from layerloop.components.schema.errors import LayerloopError


def layer_names(count: int) -> list[str]:
    """`Background`, `Layer 1`, ... bottom first."""
    return ["Background", *(f"Layer {index}" for index in range(1, count))][:count]


def write_psd(stack: Pixels, names: Sequence[str] | None = None) -> bytes:
    """A Photoshop document of a stack `(L, H, W, 4)`: every layer a pixel layer with its alpha, bottom first.

    The document's mode is RGBA: in an RGB document psd-tools turns alpha into a layer mask, which other programs read
    as an opaque layer. Photoshop keeps no fully transparent margin, so each layer is stored with its bounding box. The
    file is opened again and compared before it is returned.

    Raises:
        LayerloopError: the reopened document differs from the stack.
    """
    from PIL import Image
    from psd_tools import PSDImage
    from psd_tools.api.layers import PixelLayer

    check_stack(stack)
    if stack.ndim != 4:
        raise LayerloopError(f"stack is uint8{list(stack.shape)}: a document holds one decomposition, (L, H, W, 4)")
    names = list(names) if names is not None else layer_names(len(stack))
    if len(names) != len(stack):
        raise LayerloopError(f"{len(names)} names were given for {len(stack)} layers: give one each, bottom first")
    height, width = stack.shape[1:3]
    document = PSDImage.new(mode="RGBA", size=(width, height), color=0)
    for name, layer in zip(names, stack, strict=True):
        left, top, right, bottom = _bounds(layer)
        image = Image.fromarray(layer[top:bottom, left:right])
        document.append(PixelLayer.frompil(image, document, name=name, top=top, left=left))
    buffer = io.BytesIO()
    document.save(buffer)
    data = buffer.getvalue()
    if not np.array_equal(read_psd(data), _visible(stack)):
        raise LayerloopError("the Photoshop document differs from its layers when it is opened again: report this")
    return data


def read_psd(data: bytes) -> Pixels:
    """Layers `(L, H, W, 4)` uint8 of a document, each on the full canvas, bottom first; (0, 0, 0, 0) around them."""
    from psd_tools import PSDImage

    document = PSDImage.open(io.BytesIO(data))
    stack = np.zeros((len(document), document.height, document.width, 4), np.uint8)
    for index, layer in enumerate(document):
        image = layer.topil()
        if image is not None:
            left, top, right, bottom = layer.bbox
            stack[index, top:bottom, left:right] = np.asarray(image.convert("RGBA"))
    return _visible(stack)


def write_png_zip(stack: Pixels, names: Sequence[str] | None = None) -> bytes:
    """A zip of the layers as straight-alpha PNGs and of their composite, in equal bytes for equal stacks.

    Members: `0-background.png`, `1-layer-1.png`, ... and `composite.png`.
    """
    from PIL import Image

    check_stack(stack)
    names = list(names) if names is not None else layer_names(len(stack))
    images = {
        f"{index}-{name.lower().replace(' ', '-')}.png": layer
        for index, (name, layer) in enumerate(zip(names, stack, strict=True))
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, pixels in {**images, "composite.png": composite(stack)}.items():
            png = io.BytesIO()
            Image.fromarray(pixels).save(png, "PNG")
            archive.writestr(zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0)), png.getvalue())
    return buffer.getvalue()


def _bounds(layer: Pixels) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the pixels that are not transparent; one pixel for a blank layer, since an empty
    box cannot be stored."""
    rows, columns = np.flatnonzero(layer[..., 3].any(axis=1)), np.flatnonzero(layer[..., 3].any(axis=0))
    if not len(rows):
        return 0, 0, 1, 1
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _visible(stack: Pixels) -> Pixels:
    """The stack with (0, 0, 0, 0) where alpha is 0."""
    return np.where(stack[..., 3:] > 0, stack, 0).astype(np.uint8)
